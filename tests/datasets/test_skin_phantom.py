"""The dermoscopy phantom: repeatable, coloured, with lesions that differ from the skin."""

import numpy as np
import pytest

from factory.datasets.skin_phantom import MELANOMA, NAEVUS, skin_sample
from factory.geometry import component_areas, solidity


def test_an_image_depends_on_seed_and_index_alone() -> None:
    first, again, other = skin_sample(64, 1, 4), skin_sample(64, 1, 4), skin_sample(64, 2, 4)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)


def test_images_are_colour_with_one_darker_lesion() -> None:
    samples = [skin_sample(96, 0, i) for i in range(24)]
    for sample in samples:
        assert sample.image.shape == (96, 96, 3) and sample.image.dtype == np.uint8
        assert np.ptp(sample.image.mean(axis=(0, 1))) > 20
        inside, outside = sample.image[sample.mask > 0], sample.image[sample.mask == 0]
        assert np.median(inside.sum(axis=1)) < np.median(outside.sum(axis=1)) - 40
        assert len(component_areas(sample.mask)) == 1 and 0.02 < sample.mask.mean() < 0.4
    assert {s.attributes["hair"] for s in samples} == {"yes", "no"}
    outlines = {label: np.mean([solidity(s.mask) for s in samples if s.label_name == label]) for label in (NAEVUS, MELANOMA)}  # fmt: skip
    assert outlines[NAEVUS] > outlines[MELANOMA] + 0.02


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="size"):
        skin_sample(16, 0, 0)
    with pytest.raises(ValueError, match="index"):
        skin_sample(64, 0, -1)
