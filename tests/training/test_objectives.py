import json
from pathlib import Path

import pytest
import torch

from factory.training.objectives import NoisePrediction, PredictionStep, add_noise, min_snr_weights

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def _step(prediction_type: str, model_pred: torch.Tensor | None = None) -> PredictionStep:
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 5, 5, generator=rng)
    return PredictionStep(
        latents=latents,
        noise=noise,
        timesteps=torch.tensor([0, 100, 300, 500, 800, 999]),
        alphas_cumprod=ALPHAS,
        prediction_type=prediction_type,
        model_pred=noise if model_pred is None else model_pred,
        timestep_weights=torch.ones(6),
    )


def test_targets_are_those_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(scheduler.alphas_cumprod, ALPHAS, rtol=1e-5, atol=1e-7)
    step = _step("v_prediction")
    velocity = scheduler.get_velocity(step.latents, step.noise, step.timesteps)
    torch.testing.assert_close(step.target(), velocity, rtol=1e-4, atol=1e-5)
    noisy = scheduler.add_noise(step.latents, step.noise, step.timesteps)
    torch.testing.assert_close(step.noisy_latents, noisy, rtol=1e-4, atol=1e-5)
    assert torch.equal(_step("epsilon").target(), step.noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_noise_and_latents(prediction_type: str) -> None:
    step = _step(prediction_type)
    perfect = _step(prediction_type, step.target())
    torch.testing.assert_close(perfect.predicted_noise(), step.noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(perfect.predicted_latents(), step.latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(NoisePrediction().loss(perfect), torch.zeros(6))


def test_v_error_is_the_noise_error_over_alpha_bar() -> None:
    """For one model, ‖v - v̂‖² = ‖ε - ε̂‖² / ᾱ_t (ε̂ = √ᾱ v̂ + √(1-ᾱ) x_t, so Δε = √ᾱ Δv)."""
    wrong = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    step = _step("v_prediction", wrong)
    noise_error = (step.predicted_noise() - step.noise).square().mean((1, 2, 3))
    torch.testing.assert_close(
        NoisePrediction().loss(step) * ALPHAS[step.timesteps], noise_error, rtol=1e-4, atol=1e-5
    )


def test_loss_is_per_image() -> None:
    step = _step("epsilon", torch.zeros(6, 4, 5, 5))
    loss = NoisePrediction().loss(step)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, step.noise.square().mean((1, 2, 3)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(prediction_type: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction_type == "epsilon" else snr + 1)
    weights = min_snr_weights(ALPHAS, timesteps, 5.0, prediction_type)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-6)
    if prediction_type == "epsilon":
        assert (weights[snr <= 4.9] == 1).all() and (weights <= 1).all()


def test_add_noise_keeps_unit_variance() -> None:
    rng = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 3, 4, 64, 64, generator=rng)
    noisy = add_noise(latents, noise, ALPHAS[[10, 500, 990]])
    assert (noisy.var((1, 2, 3)) - 1).abs().max() < 0.05


def test_weight_must_be_positive() -> None:
    with pytest.raises(ValueError, match="weight"):
        NoisePrediction(weight=0.0)


def test_five_steps_reproduce_the_golden_losses() -> None:
    """A change that should not alter the maths must reproduce these; else run the script beside the file."""
    import sys

    sys.path.insert(0, str(GOLDEN))
    from regenerate_noise_prediction import five_losses

    golden = json.loads((GOLDEN / "noise_prediction.json").read_text())
    for name, values in five_losses().items():
        assert values == pytest.approx(golden[name], rel=2e-5), name
