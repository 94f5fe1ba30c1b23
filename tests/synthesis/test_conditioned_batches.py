"""Backgrounds, layout guidance, classes and annotated masks: what a request gives does not depend on its batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_generators import RESOLUTION

from factory.diffusion.layout_guidance import LayoutGuidance
from factory.diffusion.masked_blend import MaskedBlend
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import ClassLabel, TextAndInpaint, TextOnly
from factory.generators.latent_diffusion import LatentDiffusion
from factory.synthesis.annotators import RequestedMask
from factory.synthesis.attention_annotator import AttentionOtsu
from factory.synthesis.eroded_mask import ErodedMask
from factory.synthesis.synthesizer import IMAGE_TOLERANCE, GeneratedImage, PreparedRequest, Synthesizer
from schemas.request import SynthesisPlan

LABELS = ("benign", "malignant")
PLACEHOLDERS = (("<lesion>", "lesion"), ("<skin>", "skin"))


def requests(count: int, *, backgrounds: bool = False) -> list[PreparedRequest]:
    plan = SynthesisPlan(recipe="r", fingerprint="f", weights={}, real_digest="r", labels=LABELS)
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        mask = np.zeros((RESOLUTION, RESOLUTION), np.uint8)
        mask[10 + 3 * i : 34 + 3 * i, 16:44] = 1
        background = rng.integers(0, 256, (RESOLUTION, RESOLUTION), dtype=np.uint8)
        out.append(
            PreparedRequest(
                request=plan.request(LABELS[i % 2], i),
                requested_mask=mask,
                prompt="<lesion> on <skin>",
                background=background if backgrounds else None,
            )
        )
    return out


def synthesizer(base: Path, conditioning: Any, **kwargs: Any) -> Synthesizer:
    generator = LatentDiffusion(
        base=str(base), conditioning=conditioning, resolution=RESOLUTION, placeholders=PLACEHOLDERS
    )
    settings: dict[str, Any] = {"guidances": (), "annotator": RequestedMask(), "batch_size": 4} | kwargs
    return Synthesizer(
        generator,
        None,
        Sampling(num_inference_steps=4, guidance_scale=2.0),
        settings.pop("guidances"),
        settings.pop("annotator"),
        **settings,
    )


def difference(one: list[GeneratedImage], two: list[GeneratedImage]) -> int:
    assert [item.request_id for item in one] == [item.request_id for item in two]
    assert all(item.error is None for item in (*one, *two))
    return max(
        int(np.abs(a.image.astype(int) - b.image.astype(int)).max())
        for a, b in zip(one, two)
        if a.image is not None and b.image is not None
    )


@pytest.mark.parametrize("conditioning", [TextOnly(), TextAndInpaint()])
def test_a_lesion_is_painted_into_its_own_background(base: Path, conditioning: Any) -> None:
    asked = requests(3, backgrounds=True)
    kwargs: dict[str, Any] = {
        "guidances": (MaskedBlend(),),
        "annotator": ErodedMask(),
        "feather": 2 / RESOLUTION,
    }
    together = synthesizer(base, conditioning, **kwargs).synthesize(asked)
    alone = synthesizer(base, conditioning, **kwargs | {"batch_size": 1}).synthesize(asked)
    assert difference(together, alone) <= IMAGE_TOLERANCE
    for item, request in zip(together, asked):
        assert item.image is not None and item.mask is not None
        assert request.requested_mask is not None and request.background is not None
        far = np.ones_like(request.requested_mask, bool)
        rows, columns = np.nonzero(request.requested_mask)
        far[rows.min() - 3 : rows.max() + 4, columns.min() - 3 : columns.max() + 4] = False
        np.testing.assert_array_equal(item.image[far], request.background[far])
        assert (item.image != request.background)[request.requested_mask > 0].mean() > 0.9
        assert not (item.mask > request.requested_mask).any()


def test_a_request_without_background_fails_alone(base: Path) -> None:
    asked = requests(3, backgrounds=True)
    asked[1] = replace(asked[1], background=None)
    asked[2] = replace(asked[2], background=np.zeros((8, 8), np.uint8))
    results = synthesizer(base, TextAndInpaint(), guidances=(MaskedBlend(),)).synthesize(asked)
    assert [item.error is None for item in results] == [True, False, False]
    assert "no background" in str(results[1].error) and "want uint8 (64, 64)" in str(results[2].error)


def test_guided_images_and_their_annotated_masks_do_not_depend_on_the_batch(base: Path) -> None:
    asked = requests(3)
    kwargs: dict[str, Any] = {
        "guidances": (LayoutGuidance(cross_side=4, self_side=8),),
        "annotator": AttentionOtsu(cross_side=4, self_side=8, max_area=1.0),
    }
    together = synthesizer(base, TextOnly(), **kwargs).synthesize(asked)
    alone = synthesizer(base, TextOnly(), **kwargs | {"batch_size": 1}).synthesize(asked)
    assert difference(together, alone) <= IMAGE_TOLERANCE
    plain = synthesizer(base, TextOnly()).synthesize(asked)
    assert difference(together, plain) > IMAGE_TOLERANCE, "the guidance does something"
    for one, two in zip(together, alone):
        assert one.annotation_failed == (one.mask is None) == (two.mask is None)
        if one.mask is not None and two.mask is not None:
            union = np.count_nonzero(one.mask | two.mask)
            assert np.count_nonzero(one.mask & two.mask) / union >= 0.99


def test_a_failed_annotation_keeps_the_image(base: Path) -> None:
    nothing = AttentionOtsu(cross_side=4, self_side=8, max_area=1e-9)
    results = synthesizer(base, TextOnly(), annotator=nothing).synthesize(requests(2))
    assert all(item.image is not None and item.mask is None and item.annotation_failed for item in results)


def test_classes_and_colour(base: Path) -> None:
    asked = [replace(item, requested_mask=None, prompt="") for item in requests(3)]
    together = synthesizer(base, ClassLabel(), annotator=None, colour=True).synthesize(asked)
    alone = synthesizer(base, ClassLabel(), annotator=None, colour=True, batch_size=1).synthesize(asked)
    assert difference(together, alone) <= IMAGE_TOLERANCE
    grey = synthesizer(base, ClassLabel(), annotator=None).synthesize(asked)
    for item, mean in zip(together, grey):
        assert item.image is not None and item.image.shape == (RESOLUTION, RESOLUTION, 3)
        assert mean.image is not None and item.mask is None and not item.annotation_failed
        assert np.abs(item.image.mean(axis=2) - mean.image).max() <= 2
