"""MaskedBlend: the background stays, the lesion is a sample; one mask function for training and inference."""

import math
from typing import Any

import pytest
import torch
from test_denoise import GaussianDenoiser, run

from factory.diffusion.conditions import Conditions
from factory.diffusion.guidance import BoundMaskedBlend, DenoisingBatch
from factory.diffusion.latent_masks import latent_masks
from factory.diffusion.masked_blend import MaskedBlend

SIDE, RESOLUTION = 16, 128


def masks(top: int = 40, height: int = 30) -> torch.Tensor:
    out = torch.zeros(4, RESOLUTION, RESOLUTION, dtype=torch.uint8)
    out[:, top : top + height, 24:77] = 1
    return out


def batch(masks: torch.Tensor | None, backgrounds: torch.Tensor | None) -> DenoisingBatch:
    return DenoisingBatch(
        denoiser=GaussianDenoiser("epsilon", 1.0),
        conditions=Conditions(prompt_embeds=torch.zeros(4, 2, 3)),
        prompts=["An image of hta"] * 4,
        token_positions=lambda word: [[1]] * 4,
        num_tokens=[3] * 4,
        masks=masks,
        backgrounds=backgrounds,
        resolution=RESOLUTION,
    )


def backgrounds() -> torch.Tensor:
    return torch.randn((4, 4, SIDE, SIDE), generator=torch.Generator().manual_seed(7))


def rngs() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(4)]


def test_cells_that_any_pixel_touches_are_inside() -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 9, 3:60] = 2  # a line one pixel thin, of class 2
    hard, soft = latent_masks(mask, 8), latent_masks(mask, 8, soft=True)
    assert hard.shape == (1, 1, 8, 8) and hard[0, 0, 1].tolist() == [1.0] * 8 and hard.sum() == 8
    assert soft[0, 0, 1, 1] == pytest.approx(1 / 8) and soft[0, 0, 1, 0] == pytest.approx(5 / 64)
    with pytest.raises(ValueError, match="multiple"):
        latent_masks(mask, 24)


def test_outside_the_mask_the_latents_are_the_background_bit_by_bit() -> None:
    bound = MaskedBlend().bind(batch(masks(), backgrounds()))
    assert isinstance(bound, BoundMaskedBlend)
    latents = run(GaussianDenoiser("epsilon", 1.0), guidances=[bound], rngs=rngs())
    outside = latent_masks(masks(), SIDE).expand_as(latents) == 0
    assert torch.equal(latents[outside], backgrounds()[outside])
    assert not torch.isclose(latents[~outside], backgrounds()[~outside]).any(dim=0).all()


def test_an_empty_mask_gives_the_background_and_a_full_one_plain_sampling() -> None:
    empty = MaskedBlend().bind(batch(masks() * 0, backgrounds()))
    assert torch.equal(run(GaussianDenoiser("epsilon", 1.0), guidances=[empty], rngs=rngs()), backgrounds())
    full = MaskedBlend().bind(batch(torch.ones_like(masks()), backgrounds()))
    plain = run(GaussianDenoiser("epsilon", 1.0))
    assert torch.equal(run(GaussianDenoiser("epsilon", 1.0), guidances=[full], rngs=rngs()), plain)


def test_dilation_widens_what_is_painted_by_whole_cells() -> None:
    plain = MaskedBlend().bind(batch(masks(), backgrounds())).mask
    wide = MaskedBlend(dilation=1).bind(batch(masks(), backgrounds())).mask
    rows, columns = plain[0, 0].any(1).sum(), plain[0, 0].any(0).sum()
    assert wide[0, 0].sum() == (rows + 2) * (columns + 2) and (wide >= plain).all()


def test_all_timesteps_with_the_exact_noise_keep_unit_variance_in_and_outside() -> None:
    """Every training timestep, as DDPM draws (eta = 1); the paper's Eq. 2 has no noise term and collapses."""
    bound = MaskedBlend().bind(batch(masks(), backgrounds()))
    latents = run(GaussianDenoiser("epsilon", 1.0), steps=999, guidances=[bound], rngs=rngs(), eta=1.0)
    inside = latent_masks(masks(), SIDE).expand_as(latents) > 0
    count = int(inside.sum())
    # The prompt's mean is .5: the denoiser's data are N(.5, 1).
    assert latents[inside].var().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / count))
    assert latents[inside].mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(count))
    assert printed_equation_variance() < 0.01


def printed_equation_variance() -> float:
    """Variance at the end of x_{t−1} = (x_t − β_t / √(1 − ᾱ_t) ε) / √α_t without σ_t z, exact ε, unit variance."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = 1 - betas
    bars = alphas.cumprod(0)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in reversed(range(1000)):
        noise = (1 - bars[t]).sqrt() * x  # E[ε | x_t] for unit-variance data
        x = (x - betas[t] / (1 - bars[t]).sqrt() * noise) / alphas[t].sqrt()
    return x.var().item()


@pytest.mark.parametrize("fields", [{"start": 0.5, "stop": 0.5}, {"stop": 1.5}, {"dilation": -1}])
def test_wrong_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="MaskedBlend"):
        MaskedBlend(**fields)


def test_masks_and_backgrounds_are_needed() -> None:
    with pytest.raises(ValueError, match="no masks"):
        MaskedBlend().bind(batch(None, backgrounds()))
    with pytest.raises(ValueError, match="no backgrounds"):
        MaskedBlend().bind(batch(masks(), None))
