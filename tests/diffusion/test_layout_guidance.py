"""Layout guidance: right losses, right gradient, and nothing where it is off."""

import dataclasses
from typing import Any

import pytest
import torch
from attention_batch import disk_masks, make_batch, make_latents, make_step, make_unet
from diffusers import DDIMScheduler
from torch import Tensor, nn

from factory.diffusion.bound_layout_guidance import cross_loss, self_loss, smooth, word_maps, word_regions
from factory.diffusion.denoise import denoise
from factory.diffusion.guidance import DenoisingBatch
from factory.diffusion.layout_guidance import LESION_AND_SKIN, LayoutGuidance

SIDES = {"cross_side": 4, "self_side": 8}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return make_unet()


def loop(batch: DenoisingBatch, guidances: list[Any], steps: int = 6) -> Tensor:
    count = len(batch.prompts)
    return denoise(
        batch.denoiser,
        DDIMScheduler(clip_sample=False),
        make_latents(count),
        batch.conditions,
        dataclasses.replace(batch.conditions, prompt_embeds=torch.zeros_like(batch.conditions.prompt_embeds)),
        num_inference_steps=steps,
        guidance_scale=3.0,
        guidances=guidances,
        rngs=[torch.Generator().manual_seed(i) for i in range(count)],
    )


def random_attention(batch: int, side: int) -> Tensor:
    logits = torch.randn((batch, side**2, side**2), generator=torch.Generator().manual_seed(5))
    return (2 * logits).softmax(dim=-1)


@pytest.mark.parametrize("reduction", ["mean_over_mask", "paper", "code"])
def test_self_loss_is_the_papers_loop(reduction: Any) -> None:
    attention = random_attention(2, 8)
    masks = disk_masks(2, 32)
    masks[:, ::4] = 0
    masks = masks[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2)  # every cell full or empty
    masks[:, 8:20, 8:20] = 1
    regions = word_regions(masks, LESION_AND_SKIN, 8)
    assert set(regions.unique().tolist()) == {0.0, 1.0}
    expected = []
    for a, words in zip(attention, regions, strict=True):
        total = 0.0
        for region in words:  # Eq. 5
            outside, members = 1 - region, torch.nonzero(region).flatten()
            leaving = [float((a[p] * outside).sum()) for p in members]
            if reduction == "mean_over_mask":
                total += sum(leaving) / len(leaving)
            else:
                per_cell = [value / float(outside.sum()) for value in leaving]
                total += sum(per_cell) / (len(per_cell) if reduction == "code" else 1)
        expected.append(total / 2)
    assert torch.allclose(self_loss(attention, regions, reduction), torch.tensor(expected), rtol=1e-5)


def test_self_loss_is_zero_where_nothing_leaves() -> None:
    regions = word_regions(disk_masks(1), LESION_AND_SKIN, 8)
    lesion = (regions[:, 0] > 0.5).float()
    regions = torch.stack([lesion, 1 - lesion], dim=1)
    stays = torch.einsum("btp,btq->bpq", regions, regions)
    stays = stays / stays.sum(dim=-1, keepdim=True)
    assert self_loss(stays, regions, "mean_over_mask").item() == pytest.approx(0.0, abs=1e-6)


def test_contrast_ignores_bos_eos_and_padding() -> None:
    rng = torch.Generator().manual_seed(1)
    cross = torch.rand((1, 16, 10), generator=rng)
    weights = torch.zeros(1, 1, 10)
    weights[0, 0, 2] = 1
    maps = word_maps(cross, weights, [6], "contrast", 100.0)
    changed = cross.clone()
    changed[..., 0] = 9.0  # BOS
    changed[..., 5:] = 9.0  # EOS and padding
    assert torch.equal(maps, word_maps(changed, weights, [6], "contrast", 100.0))
    expected = (100 * cross[0, :, 1:5]).softmax(dim=-1)[:, 1]
    assert torch.allclose(maps[0, 0], expected, atol=1e-6)
    assert torch.equal(word_maps(cross, weights, [6], "paper", 100.0)[0, 0], cross[0, :, 2])


def test_cross_loss_forms_against_their_formulas() -> None:
    maps = torch.rand((1, 2, 16), generator=torch.Generator().manual_seed(2))
    regions = (torch.arange(16) < 5).float().repeat(1, 2, 1)
    regions[0, 1] = 1 - regions[0, 1]
    contrast = [(1 - m[r > 0].mean()) + m[r == 0].mean() for m, r in zip(maps[0], regions[0], strict=True)]
    assert cross_loss(maps, regions, "contrast").item() == pytest.approx(float(sum(contrast)) / 2, rel=1e-5)
    squares = [((m - r) ** 2).sum() for m, r in zip(maps[0], regions[0], strict=True)]
    assert cross_loss(maps, regions, "paper").item() == pytest.approx(0.5 * float(sum(squares)), rel=1e-5)


def test_smoothing_is_scipys_gaussian() -> None:
    from scipy.ndimage import gaussian_filter

    maps = torch.rand((2, 2, 64), generator=torch.Generator().manual_seed(2))
    assert smooth(maps, 0.0) is maps
    expected = gaussian_filter(maps.reshape(2, 2, 8, 8).numpy(), 0.7, mode="mirror", radius=3, axes=(2, 3))
    assert torch.allclose(smooth(maps, 0.7).reshape(2, 2, 8, 8), torch.from_numpy(expected), atol=1e-6)


def test_eta_falls_as_in_the_code_and_stays_in_the_paper() -> None:
    falling, constant = LayoutGuidance(), LayoutGuidance(schedule="constant")
    assert falling.eta_at(0, 50) == 20.0
    assert falling.eta_at(49, 50) == pytest.approx(20.0 * 0.5**0.5)
    assert constant.eta_at(30, 50) == 20.0


@pytest.mark.parametrize("form", ["contrast", "paper"])
def test_one_step_reduces_the_loss(unet: nn.Module, form: Any) -> None:
    bound = LayoutGuidance(eta=0.05, cross_form=form, **SIDES).bind(make_batch(unet, 4))
    latents, step = make_latents(4), make_step(2)
    before = bound.losses(latents, step)
    after = bound.losses(bound.before_step(latents, step), step)
    assert (after < before).all(), (before, after)


def test_no_eta_leaves_the_trajectory_bit_identical(unet: nn.Module) -> None:
    batch = make_batch(unet, 2)
    plain = loop(batch, [])
    assert torch.equal(plain, loop(batch, [LayoutGuidance(eta=0.0, **SIDES).bind(batch)]))
    guided = loop(batch, [LayoutGuidance(eta=20.0, **SIDES).bind(batch)])
    assert (plain - guided).abs().max() > 1e-3


def test_batch_size_does_not_change_an_image(unet: nn.Module) -> None:
    component = LayoutGuidance(eta=20.0, **SIDES)
    eight = make_batch(unet, 8)
    together = component.bind(eight).before_step(make_latents(8), make_step(1))
    for i in (0, 5):
        alone = dataclasses.replace(
            eight,
            conditions=dataclasses.replace(
                eight.conditions, prompt_embeds=eight.conditions.prompt_embeds[i : i + 1]
            ),
            prompts=eight.prompts[i : i + 1],
            token_positions=lambda word: eight.token_positions(word)[:1],
            num_tokens=eight.num_tokens[i : i + 1],
            masks=eight.masks[i : i + 1] if eight.masks is not None else None,
        )
        single = component.bind(alone).before_step(make_latents(8)[i : i + 1], make_step(1))
        moved = (together[i] - make_latents(8)[i]).abs().max()
        assert (together[i] - single[0]).abs().max() < 1e-4 * moved


def test_the_second_half_is_not_touched(unet: nn.Module) -> None:
    batch = make_batch(unet, 1)
    bound = LayoutGuidance(eta=20.0, **SIDES).bind(batch)
    seen: list[int] = []
    inner = bound.before_step
    bound.before_step = lambda latents, step: (seen.append(step.index), inner(latents, step))[1]  # type: ignore[method-assign]
    loop(batch, [bound], steps=8)
    assert seen == [0, 1, 2, 3]


def test_an_empty_mask_gives_a_finite_loss(unet: nn.Module) -> None:
    batch = make_batch(unet, 2, masks=torch.zeros((2, 32, 32), dtype=torch.uint8))
    bound = LayoutGuidance(**SIDES).bind(batch)
    assert bound.before_step(make_latents(2), make_step(0)).isfinite().all()


def test_what_cannot_work_is_refused(unet: nn.Module) -> None:
    batch = make_batch(unet, 1)
    with pytest.raises(ValueError, match="no masks were requested"):
        LayoutGuidance(**SIDES).bind(dataclasses.replace(batch, masks=None))
    with pytest.raises(ValueError, match="has no 'absent'"):
        LayoutGuidance(tokens=(("absent", "inside"),), **SIDES).bind(batch)
    with pytest.raises(ValueError, match="self-attention: no layer with a map of 32 × 32.*sides 8, 4"):
        LayoutGuidance(cross_side=4).bind(batch).before_step(make_latents(1), make_step(0))
    for changes, name in (
        ({"eta": -1.0}, "eta"),
        ({"schedule": "cosine"}, "schedule"),
        ({"stop": 1.5}, "stop"),
        ({"tokens": (("<lesion>", "above"),)}, "tokens"),
        ({"self_reduction": "sum"}, "self_reduction"),
    ):
        with pytest.raises(ValueError, match=name):
            LayoutGuidance(**changes)  # type: ignore[arg-type]
