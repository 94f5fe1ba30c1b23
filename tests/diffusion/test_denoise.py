"""The denoising loop: exact on a case with a known answer, and what guidance must and must not do."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from factory.diffusion.conditions import Conditions
from factory.diffusion.denoise import denoise, make_noise_scheduler
from factory.diffusion.sampling import Sampling

NAMES = ("ddim", "dpmpp_2m", "unipc", "euler")
GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def training_config(prediction_type: str = "epsilon") -> Any:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type=prediction_type, steps_offset=1,
    ).config  # fmt: skip


class GaussianDenoiser(nn.Module):
    """The exact prediction for data x₀ ~ N(m, s²), m the mean of the prompt embedding."""

    def __init__(self, prediction_type: str, std: float, scaled_input: bool = False) -> None:
        super().__init__()
        self.prediction_type, self.std, self.scaled_input = prediction_type, std, scaled_input
        self.calls: list[int] = []
        self.alphas = DDPMScheduler(**dict(training_config())).alphas_cumprod

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.calls.append(len(latents))
        alpha = self.alphas[timesteps.long()].view(-1, 1, 1, 1)
        mean = prompt_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        variance = alpha * self.std**2 + 1 - alpha
        noise = (1 - alpha).sqrt() * (latents - alpha.sqrt() * mean) / variance
        if self.prediction_type == "epsilon":
            return noise
        clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def run(
    denoiser: nn.Module,
    name: str = "ddim",
    *,
    steps: int = 50,
    scale: float = 1.0,
    batch: int = 4,
    prediction_type: str = "epsilon",
    **kwargs: Any,
) -> Tensor:
    sampling = Sampling(noise_scheduler=name, num_inference_steps=steps)  # type: ignore[arg-type]
    noise = torch.randn((batch, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    return denoise(
        denoiser,
        make_noise_scheduler(sampling, training_config(prediction_type)),
        noise,
        Conditions(prompt_embeds=torch.full((batch, 2, 3), 0.5)),
        Conditions(prompt_embeds=torch.full((batch, 2, 3), -0.25)),
        num_inference_steps=steps,
        guidance_scale=scale,
        **kwargs,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_exact_denoiser_ends_at_the_data_distribution(name: str, prediction_type: str) -> None:
    """With the exact prediction for N(0.5, 0.8²) every schedule must end there."""
    latents = run(GaussianDenoiser(prediction_type, std=0.8), name, steps=60, prediction_type=prediction_type)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert latents.mean().item() == pytest.approx(0.5, abs=0.06)
    assert latents.std().item() == pytest.approx(0.8, abs=0.06)


def test_stochastic_ddim_keeps_the_variance_and_each_image_its_own_noise() -> None:
    def rngs(seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = run(GaussianDenoiser("epsilon", 0.8), eta=1.0, rngs=rngs([1, 2, 3, 4]))
    assert together.std().item() == pytest.approx(0.8, abs=0.06)
    again = run(GaussianDenoiser("epsilon", 0.8), eta=1.0, rngs=rngs([1, 2, 3, 9]))
    torch.testing.assert_close(again[:3], together[:3], rtol=0, atol=0)
    assert (again[3] - together[3]).abs().max() > 0.1
    with pytest.raises(ValueError, match="rngs"):
        run(GaussianDenoiser("epsilon", 0.8), eta=1.0)
    with pytest.raises(ValueError, match="one per image"):
        run(GaussianDenoiser("epsilon", 0.8), eta=1.0, rngs=rngs([1, 2]))


def test_scale_one_is_the_conditional_model_in_single_batches() -> None:
    denoiser = GaussianDenoiser("epsilon", 0.8)
    latents = run(denoiser, steps=10)
    assert denoiser.calls == [4] * 10
    assert latents.mean().item() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="null_conditions"):
        denoise(denoiser, make_noise_scheduler(Sampling(), training_config()), torch.zeros(1, 4, 8, 8),
                Conditions(prompt_embeds=torch.zeros(1, 2, 3)), None, num_inference_steps=2, guidance_scale=2.0)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_guidance_extrapolates_in_one_call_of_twice_the_batch(name: str) -> None:
    """Guidance is linear in the mean here: scale s aims at m = 0.5 + (s − 1) · (0.5 − (−0.25)).

    The loop starts at zero mean and not at √ᾱ_T · m, and its flow carries that on: m · (1 − √ᾱ_T · 0.8) is the
    exact end.
    """
    denoiser = GaussianDenoiser("epsilon", 0.8)
    latents = run(denoiser, name, steps=40, scale=3.0)
    assert set(denoiser.calls) == {8}
    start = float(denoiser.alphas[-1].sqrt())
    noise_mean = torch.randn((4, 4, 16, 16), generator=torch.Generator().manual_seed(0)).mean().item()
    assert latents.mean().item() == pytest.approx(2.0 * (1 - 0.8 * start) + 0.8 * noise_mean, abs=0.03)


def test_guidance_interval_limits_the_doubled_calls() -> None:
    denoiser = GaussianDenoiser("epsilon", 0.8)
    run(denoiser, steps=10, scale=3.0, guidance_start=0.2, guidance_stop=0.7)
    assert denoiser.calls == [4] * 2 + [8] * 5 + [4] * 3
    off = run(GaussianDenoiser("epsilon", 0.8), steps=10, scale=3.0, guidance_start=0.5, guidance_stop=0.5)
    torch.testing.assert_close(off, run(GaussianDenoiser("epsilon", 0.8), steps=10), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_image_does_not_depend_on_its_batch(name: str) -> None:
    together = run(GaussianDenoiser("epsilon", 0.8), name, steps=8, scale=2.0)
    alone = run(GaussianDenoiser("epsilon", 0.8), name, steps=8, scale=2.0, batch=1)
    torch.testing.assert_close(alone[0], together[0], rtol=1e-5, atol=1e-5)


def test_schedules_start_from_unit_noise() -> None:
    """Euler's latents start at its own scale; the caller always hands in unit noise."""
    for name, expected in (("ddim", 1.0), ("euler", math.sqrt(14.6**2 + 1))):
        scheduler = make_noise_scheduler(Sampling(noise_scheduler=name), training_config())  # type: ignore[arg-type]
        scheduler.set_timesteps(20)
        assert float(scheduler.init_noise_sigma) == pytest.approx(expected, rel=0.1)


@pytest.fixture
def loop_sums() -> Callable[[], dict[str, dict[str, float]]]:
    spec = importlib.util.spec_from_file_location("regenerate_denoise", GOLDEN / "regenerate_denoise.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.loop_sums


def test_short_loops_reproduce_the_golden_sums(loop_sums: Callable[[], dict[str, dict[str, float]]]) -> None:
    golden = json.loads((GOLDEN / "denoise.json").read_text())
    sums = loop_sums()
    assert set(sums) == set(NAMES)
    for name, values in golden.items():
        assert sums[name] == pytest.approx(values, rel=1e-4, abs=1e-3), name
