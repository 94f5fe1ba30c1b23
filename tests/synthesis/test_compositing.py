"""Compositing: the lesion's pixels under the mask, the patient's away from it, exactly."""

import numpy as np
import pytest
from scipy import ndimage

from factory.synthesis.compositing import composite


def pictures(*shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image, background = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
    ys, xs = np.mgrid[: shape[0], : shape[1]]
    return image, background, ((np.hypot(ys - 30, xs - 34) < 11) * 2).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 3)])
@pytest.mark.parametrize("feather", [0.0, 1.0, 4.5])
def test_inside_is_the_image_and_beyond_the_seam_the_background(
    shape: tuple[int, ...], feather: float
) -> None:
    image, background, mask = pictures(*shape)
    found = composite(image, background, mask, feather)
    distance = ndimage.distance_transform_edt(mask == 0)
    assert found.dtype == np.uint8 and found.shape == image.shape
    assert np.array_equal(found[mask > 0], image[mask > 0])
    away = distance > feather
    assert np.array_equal(found[away], background[away])
    seam = (distance > 0) & (distance < feather)
    low, high = np.minimum(image, background)[seam], np.maximum(image, background)[seam]
    assert (found[seam] >= low).all() and (found[seam] <= high).all()


def test_the_seam_is_linear_in_the_distance() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :10] = 1
    found = composite(np.full((40, 40), 200, np.uint8), np.zeros((40, 40), np.uint8), mask, 8.0)
    assert found[5, 9:18].tolist() == [200, 175, 150, 125, 100, 75, 50, 25, 0]


def test_channels_follow_the_image() -> None:
    image, background, mask = pictures(64, 64)
    colour = np.stack([background, background, background], axis=2)
    assert np.array_equal(composite(image, colour, mask, 2), composite(image, background, mask, 2))
    rgb = composite(np.stack([image] * 3, axis=2), background, mask, 2)
    assert np.array_equal(rgb, np.stack([composite(image, background, mask, 2)] * 3, axis=2))


def test_an_empty_mask_gives_the_background_and_a_full_one_the_image() -> None:
    image, background, mask = pictures(64, 64)
    assert np.array_equal(composite(image, background, mask * 0, 3), background)
    assert np.array_equal(composite(image, background, np.ones_like(mask), 3), image)


def test_wrong_inputs_are_refused() -> None:
    image, background, mask = pictures(64, 64)
    for arguments in (
        (image.astype(float), background, mask, 1.0),
        (image, background[:32], mask, 1.0),
        (image, background, mask, -1.0),
    ):
        with pytest.raises(ValueError, match="composite"):
            composite(*arguments)  # type: ignore[arg-type]
