"""MaskedDenoising: the loss sees one region, small lesions count, and the printed form stays reachable."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from factory.diffusion.latent_masks import latent_masks
from factory.training.masked_denoising import MaskedDenoising
from factory.training.objectives import NoisePrediction, PredictionStep

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
SIDE, RESOLUTION = 8, 64


def masks() -> torch.Tensor:
    out = torch.zeros(4, RESOLUTION, RESOLUTION, dtype=torch.uint8)
    out[0, 8:48, 8:56] = 1  # 30 cells
    out[1, 9, 9] = 3  # one cell
    out[3] = 1  # 2 has no lesion, 3 nothing else
    return out


def step(
    pred: torch.Tensor | None = None, prediction_type: str = "epsilon", **changes: Any
) -> PredictionStep:
    rng = torch.Generator().manual_seed(0)
    latents, noise, model_pred = torch.randn(3, 4, 4, SIDE, SIDE, generator=rng)
    values: dict[str, Any] = {
        "latents": latents, "noise": noise, "timesteps": torch.tensor([0, 300, 700, 999]),
        "alphas_cumprod": ALPHAS, "prediction_type": prediction_type,
        "model_pred": model_pred if pred is None else pred,
        "timestep_weights": torch.ones(4), "masks": masks(),
    }  # fmt: skip
    return PredictionStep(**{**values, **changes})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("form", ["prediction", "paper"])
def test_gradient_is_exactly_zero_outside_the_region(prediction_type: str, form: Any) -> None:
    for region in ("lesion", "background"):
        pred = torch.randn(4, 4, SIDE, SIDE, requires_grad=True)
        MaskedDenoising(region=region, form=form).loss(step(pred, prediction_type)).sum().backward()  # type: ignore[arg-type]
        assert pred.grad is not None
        inside = (latent_masks(masks(), SIDE) > 0).expand_as(pred)
        inside = inside if region == "lesion" else ~inside
        assert (pred.grad[~inside] == 0).all() and (pred.grad[inside] != 0).all()


def test_lesion_and_background_partition_the_loss() -> None:
    whole = NoisePrediction().loss(step())
    parts = [MaskedDenoising(region=r, normalise="paper").loss(step()) for r in ("lesion", "background")]  # type: ignore[arg-type]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    cells = latent_masks(masks(), SIDE).sum((1, 2, 3))
    by_area = MaskedDenoising(min_cells=1).loss(step())
    torch.testing.assert_close(by_area * cells / SIDE**2, parts[0])


def test_empty_masks_give_no_lesion_loss_and_the_whole_as_background() -> None:
    assert MaskedDenoising().loss(step())[2] == 0
    background = MaskedDenoising(region="background").loss(step())
    assert background[3] == 0
    assert background[2] == pytest.approx(NoisePrediction().loss(step())[2].item())


def test_a_small_lesion_counts_by_its_area_but_not_below_sixteen_cells() -> None:
    flat = step(torch.zeros(4, 4, SIDE, SIDE), noise=torch.ones(4, 4, SIDE, SIDE))
    torch.testing.assert_close(MaskedDenoising().loss(flat), torch.tensor([1.0, 1 / 16, 0.0, 1.0]))
    paper = MaskedDenoising(normalise="paper").loss(flat)
    torch.testing.assert_close(paper, torch.tensor([30 / 64, 1 / 64, 0.0, 1.0]))


def test_background_weight_adds_the_mean_error_of_the_rest() -> None:
    lesion, background = (MaskedDenoising(region=r).loss(step()) for r in ("lesion", "background"))  # type: ignore[arg-type]
    both = MaskedDenoising(background_weight=0.05).loss(step())
    torch.testing.assert_close(both, lesion + 0.05 * background)


def test_the_papers_form_is_the_error_of_the_clean_latents() -> None:
    """‖x̂_0 − x_0‖² = (1 − ᾱ) / ᾱ ‖ε̂ − ε‖²."""
    here = step()
    alpha = ALPHAS[here.timesteps]
    expected = MaskedDenoising().loss(here) * (1 - alpha) / alpha
    torch.testing.assert_close(MaskedDenoising(form="paper").loss(here), expected, rtol=1e-3, atol=1e-6)


def test_timestep_weights_apply() -> None:
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0])
    torch.testing.assert_close(
        MaskedDenoising().loss(step(timestep_weights=weights)), weights * MaskedDenoising().loss(step())
    )


def test_needs_say_which_rows_can_be_trained_on() -> None:
    assert MaskedDenoising().needs == ("masks", "lesions")
    assert MaskedDenoising(region="background").needs == ("masks",)
    with pytest.raises(ValueError, match="no masks"):
        MaskedDenoising().loss(step(masks=None))


@pytest.mark.parametrize(
    "fields",
    [{"weight": 0.0}, {"region": "rim"}, {"background_weight": 2.0}, {"min_cells": 0}, {"form": "x"}],
)
def test_wrong_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="MaskedDenoising"):
        MaskedDenoising(**fields)


@pytest.mark.parametrize("name", ["masked_denoising", "region_attention", "sketch_perception"])
def test_five_steps_reproduce_the_golden_losses(name: str) -> None:
    """A change that should not alter the maths must reproduce these; else run the script beside the files."""
    sys.path.insert(0, str(GOLDEN))
    from regenerate_region_objectives import five_losses

    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    for key, values in five_losses(name).items():
        assert values == pytest.approx(golden[key], rel=2e-5), key
