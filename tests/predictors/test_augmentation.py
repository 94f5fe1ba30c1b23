"""Augmentation: image and mask move together, each row by its own draws."""

import numpy as np
import pytest
import torch
from torch import Tensor

from factory.predictors.augmentation import Augmentation

KINDS = ["standard", "strong"]


def discs(count: int = 16, size: int = 48) -> tuple[Tensor, Tensor]:
    """Images that are their own masks: an off-centre bright ellipse with a bar on a grey ground."""
    y, x = np.mgrid[:size, :size] / size
    shape = ((x - 0.4) / 0.22) ** 2 + ((y - 0.45) / 0.14) ** 2 < 1
    shape |= (np.abs(y - 0.3) < 0.05) & (np.abs(x - 0.6) < 0.15)
    mask = torch.from_numpy(shape.astype(np.uint8)).expand(count, size, size).contiguous()
    return (40 + 170 * mask)[..., None], mask


def overlap(one: Tensor, other: Tensor) -> Tensor:
    both, either = (one & other).sum(dim=(1, 2)), (one | other).sum(dim=(1, 2))
    return both / either


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_follows_the_image(kind: str) -> None:
    images, masks = discs()
    pixels, moved = Augmentation(kind=kind).apply(images, masks, "a")  # type: ignore[arg-type]
    assert moved is not None and set(moved.unique().tolist()) == {0.0, 1.0}
    seen = pixels[:, 0] > (pixels.amax(dim=(1, 2, 3)) * 0.6).reshape(-1, 1, 1)
    assert overlap(seen, moved > 0).min() > (0.9 if kind == "standard" else 0.75)
    # The rows did move, each in its own way.
    assert overlap(masks > 0, moved > 0).median() < 0.8
    assert len({row.numpy().tobytes() for row in moved}) == len(moved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_its_identity_and_place_only(kind: str) -> None:
    images, masks = discs()
    augmentation = Augmentation(kind=kind)  # type: ignore[arg-type]
    whole, whole_masks = augmentation.apply(images, masks, "a")
    part, part_masks = augmentation.apply(images[:5], masks[:5], "a")
    assert whole_masks is not None and part_masks is not None
    torch.testing.assert_close(part, whole[:5], rtol=0, atol=1e-6)
    assert torch.equal(part_masks, whole_masks[:5])
    again, _ = augmentation.apply(images, masks, "a")
    assert torch.equal(again, whole)
    other, _ = augmentation.apply(images, masks, "b")
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_and_depth_stay_in_place(kind: str, channels: int) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 32, 32, channels), dtype=torch.uint8, generator=rng)
    images[:, 16:] //= 8
    before = images.clone()
    pixels, nothing = Augmentation(kind=kind).apply(images, None, "c")  # type: ignore[arg-type]
    assert nothing is None and pixels.shape == (64, channels, 32, 32) and pixels.dtype == torch.float32
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert torch.equal(images, before)
    assert (pixels[:, :, 6:12].mean(dim=(1, 2, 3)) > pixels[:, :, 20:26].mean(dim=(1, 2, 3))).all()


def test_half_of_the_rows_are_mirrored() -> None:
    images = torch.zeros((200, 32, 32, 1), dtype=torch.uint8)
    images[:, :, :8] = 255
    pixels, _ = Augmentation().apply(images, None, "d")
    mirrored = (pixels[..., 16:].sum(dim=(1, 2, 3)) > pixels[..., :16].sum(dim=(1, 2, 3))).sum()
    assert 70 <= int(mirrored) <= 130  # four standard deviations


def test_none_is_the_image_itself() -> None:
    images, masks = discs(3)
    pixels, target = Augmentation(kind="none").apply(images, 2 * masks, "e")
    assert torch.equal(pixels[:, 0], images[..., 0].float() / 255)
    assert target is not None and torch.equal(target, masks.float())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="augmentation: want one of none, standard, strong, got 'mild'"):
        Augmentation(kind="mild")  # type: ignore[arg-type]
