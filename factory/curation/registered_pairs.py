"""A synthetic image beside the part of a real one that it was registered to, and their difference: to be looked at."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from factory.curation.crops import Frame, banded, correlation_map, crop_template, make_target, region_box
from factory.curation.memorisation import CopyMatch


@dataclass(frozen=True, kw_only=True, eq=False)
class RegisteredPair:
    """Crops of one size, uint8 (h, w) grey.

    Attributes:
        synthetic: the crop that was compared.
        real: the part of the real image where it correlates best, mirrored and scaled to it.
        difference: |synthetic − real| once the real crop has the same mean and deviation; 0 where they agree.
    """

    synthetic: np.ndarray = field(repr=False)
    real: np.ndarray = field(repr=False)
    difference: np.ndarray = field(repr=False)


def registered_pair(frame: Frame, reference: Frame, match: CopyMatch, side: int) -> RegisteredPair | None:
    """The crops of a match; None where the template does not fit into the real image.

    Args:
        frame: of the synthetic image.
        reference: of the real image `match.reference`.
        match: where they are most alike.
        side: px that frames were made at.
    """
    pixels = banded(frame.grey, match.scale, side)
    template = crop_template(pixels, frame, match.region, match.mirrored)
    height, width = template.shape
    target = make_target(banded(reference.grey, 1.0, side), side)
    if target.shape[0] < height or target.shape[1] < width:
        return None
    top, left = np.unravel_index(
        int(correlation_map(template, target).argmax()), _rest(target.shape, template.shape)
    )
    real = reference.grey[top : top + height, left : left + width]
    real = real[:, ::-1] if match.mirrored else real
    box = region_box(frame, match.region)
    rows, columns = frame.grey.shape
    crop = frame.grey[
        round(box[0] * rows) : round(box[2] * rows), round(box[1] * columns) : round(box[3] * columns)
    ]
    resized = np.asarray(
        Image.fromarray(np.ascontiguousarray(real)).resize(
            (crop.shape[1], crop.shape[0]), Image.Resampling.BILINEAR
        )
    )
    return RegisteredPair(synthetic=crop.copy(), real=resized, difference=difference(crop, resized))


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|one − other| of uint8 (h, w) images, `other` brought to the mean and deviation of `one`."""
    first, second = one.astype(np.float32), other.astype(np.float32)
    scale = first.std() / max(float(second.std()), 1e-6)
    matched = (second - second.mean()) * scale + first.mean()
    return np.abs(first - matched).clip(0, 255).astype(np.uint8)


def _rest(outer: tuple[int, ...], inner: tuple[int, ...]) -> tuple[int, int]:
    return outer[0] - inner[0] + 1, outer[1] - inner[1] + 1
