"""`AttentionOtsu`: threshold, clean-up, and masks out of a real denoising loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factory.synthesis.attention_annotator import AttentionOtsu, mask_of, otsu_threshold


def test_otsu_is_skimages_on_200_maps() -> None:
    from skimage.filters import threshold_otsu

    rng = np.random.default_rng(0)
    for number in range(200):
        split = rng.random((24, 24)) < rng.uniform(0.05, 0.95)
        levels = np.where(
            split, rng.normal(rng.uniform(120, 220), 20, split.shape), rng.normal(60, 25, split.shape)
        )
        levels = levels.clip(0, 255).astype(np.uint8)
        assert otsu_threshold(levels) == threshold_otsu(levels), number


def test_a_constant_map_has_no_threshold() -> None:
    assert otsu_threshold(np.full((8, 8), 7, np.uint8)) is None
    assert mask_of(np.zeros((8, 8), np.uint8), closing=5, max_area=0.6) is None


def disk(radius: float, size: int = 64, x: float = 32, y: float = 32) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def test_clean_up_closes_gaps_fills_holes_and_keeps_the_largest() -> None:
    wanted = disk(14)
    levels = np.where(wanted, 200, 20).astype(np.uint8)
    levels[30:34, 30:34] = 20  # a hole
    levels[:, 40:42] = 20  # a thin gap
    levels[2:5, 2:5] = 220  # a speck
    mask = mask_of(levels, closing=5, max_area=0.6)
    assert mask is not None and mask.dtype == np.uint8
    both, either = (mask & wanted).sum(), (mask | wanted).sum()
    assert both / either > 0.97
    assert not mask[:8, :8].any()
    without = mask_of(levels, closing=1, max_area=0.6)
    assert without is not None and without.sum() < 0.85 * wanted.sum()


def test_closing_takes_nothing_away_at_the_border() -> None:
    levels = np.where(disk(12, x=2), 200, 20).astype(np.uint8)
    mask = mask_of(levels, closing=7, max_area=0.6)
    assert mask is not None and np.array_equal(mask > 0, disk(12, x=2) | (mask > 0))
    assert mask.sum() < 1.05 * disk(12, x=2).sum()


def test_too_large_a_region_fails() -> None:
    levels = np.where(disk(30), 200, 20).astype(np.uint8)
    share = disk(30).mean()
    assert mask_of(levels, closing=5, max_area=0.6) is None and share > 0.6
    assert mask_of(levels, closing=5, max_area=0.8) is not None


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"power": 0}, "power"), ({"closing": 4}, "closing"), ({"max_area": 0.0}, "max_area"),
     ({"power_form": "tensor"}, "power_form"), ({"word": ""}, "word"), ({"cross_side": 0}, "cross_side")],
)  # fmt: skip
def test_bad_fields_are_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AttentionOtsu(**changes)


def test_masks_come_out_of_the_synthesizer_whatever_the_batch(tmp_path: Path) -> None:
    from factory.assets.base_models import write_random_base
    from factory.diffusion.layout_guidance import LayoutGuidance
    from factory.diffusion.sampling import Sampling
    from factory.generators.conditioning import TextOnly
    from factory.generators.latent_diffusion import LatentDiffusion, Trainable
    from factory.synthesis.synthesizer import PreparedRequest, Synthesizer
    from schemas.request import SynthesisPlan

    torch.set_num_threads(1)
    base = write_random_base(tmp_path / "base", "micro")
    generator = LatentDiffusion(
        base=str(base), conditioning=TextOnly(), trainable=Trainable(unet="full"), resolution=64,
        placeholders=(("<lesion>", "lesion"), ("<skin>", "skin")),
    )  # fmt: skip
    plan = SynthesisPlan(recipe="r", fingerprint="f", weights={}, real_digest="d", labels=("a",))
    mask = disk(14).astype(np.uint8)
    requests = [
        PreparedRequest(
            request=plan.request("a", i), requested_mask=mask, prompt="image of <lesion> in <skin>"
        )
        for i in range(3)
    ]

    def make(batch_size: int) -> list[Any]:
        return Synthesizer(
            generator,
            None,
            Sampling(num_inference_steps=4, guidance_scale=2.0),
            (LayoutGuidance(cross_side=4, self_side=8),),
            AttentionOtsu(cross_side=4, self_side=8, max_area=1.0),
            batch_size=batch_size,
            colour=True,
        ).synthesize(requests)

    together, alone = make(3), make(1)
    for a, b in zip(together, alone, strict=True):
        assert a.error is None and a.image.shape == (64, 64, 3)
        assert not a.annotation_failed and a.mask.shape == (64, 64) and a.mask.sum() > 0
        overlap = (a.mask & b.mask).sum() / (a.mask | b.mask).sum()
        assert overlap > 0.97
    assert not np.array_equal(together[0].mask, together[1].mask)
