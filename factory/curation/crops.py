"""Crops of images and how well one lies in another: normalised cross-correlation of what is locally normalised."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from factory.datasets.registration import normalised

Region = Literal["frame", "lesion"]
REGIONS: tuple[Region, ...] = ("frame", "lesion")
_SMOOTHING = 0.7
_THUMBNAIL = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """An image made ready for the test.

    Attributes:
        grey: uint8 (h, w), letterboxed to the test's side, empty margins cut off.
        lesion: top, left, bottom, right of the lesion and its margin as fractions of `grey`; None without one.
    """

    grey: np.ndarray = field(repr=False)
    lesion: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Target:
    """Spectrum (C, C/2+1), integral images of values and squares (C+1, C+1), shape inside."""

    spectrum: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    shape: tuple[int, int]


def make_target(pixels: np.ndarray, side: int) -> Target:
    """A locally normalised image (h, w), h and w at most `side`, made ready to be searched."""
    size = side + side % 2
    square = np.zeros((size, size), np.float32)
    square[: pixels.shape[0], : pixels.shape[1]] = pixels
    sums, squares = (
        np.pad(s, ((1, 0), (1, 0))).cumsum(0, dtype=np.float64).cumsum(1).astype(np.float32)
        for s in (square, square**2)
    )
    return Target(fft.rfft2(square), sums, squares, (pixels.shape[0], pixels.shape[1]))


def banded(grey: np.ndarray, factor: float, side: int) -> np.ndarray:
    """Locally normalised float32 image, scaled by `factor`; the neighbourhood is that of a frame of `side` px."""
    longer = max(8, round(max(grey.shape) * factor))
    return ndimage.gaussian_filter(normalised(grey, longer, side / 22), _SMOOTHING, mode="nearest")


def region_box(frame: Frame, region: Region) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of a region as fractions of the frame."""
    if region == "frame":
        return 0.14, 0.14, 0.86, 0.86
    assert frame.lesion is not None
    return frame.lesion


def crop_template(pixels: np.ndarray, frame: Frame, region: Region, mirrored: bool) -> np.ndarray:
    """The region of a frame in its scaled `pixels`, of zero mean and unit norm."""
    top, left, bottom, right = region_box(frame, region)
    height, width = pixels.shape
    crop = pixels[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
    crop = crop[:, ::-1] if mirrored else crop
    centred = crop - crop.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-6)


def correlations(template: np.ndarray, targets: Sequence[Target]) -> list[float]:
    """Best normalised cross-correlation of the template, wholly inside each target; -1 where it does not fit."""
    height, width = template.shape
    scores = [-1.0] * len(targets)
    usable = [k for k, t in enumerate(targets) if t.shape[0] >= height and t.shape[1] >= width]
    if not usable:
        return scores
    size = len(targets[0].sums) - 1
    spectrum = np.conj(fft.rfft2(template, (size, size)))
    raw = fft.irfft2(np.stack([targets[k].spectrum for k in usable]) * spectrum, (size, size))
    for k, values in zip(usable, raw):
        scores[k] = float(_normalised_by_energy(values, targets[k], height, width).max())
    return scores


def correlation_map(template: np.ndarray, target: Target) -> np.ndarray:
    """Normalised cross-correlation at every place where the template (h, w) lies inside a target (H, W):
    (H − h + 1, W − w + 1)."""
    size = len(target.sums) - 1
    spectrum = np.conj(fft.rfft2(template, (size, size)))
    return _normalised_by_energy(
        fft.irfft2(target.spectrum * spectrum, (size, size)), target, *template.shape
    )


def _normalised_by_energy(values: np.ndarray, target: Target, height: int, width: int) -> np.ndarray:
    """Products of a template of that size with every window of the target, over the window's norm."""
    rows, columns = target.shape[0] - height + 1, target.shape[1] - width + 1
    total, square = (
        s[height : height + rows, width : width + columns] - s[:rows, width : width + columns]
        - s[height : height + rows, :columns] + s[:rows, :columns]
        for s in (target.sums, target.squares)
    )  # fmt: skip
    # Windows with almost no structure are not amplified.
    energy = np.maximum(square - total**2 / (height * width), 0.02 * height * width)
    return values[:rows, :columns] / np.sqrt(energy)


def thumbnail_of(grey: np.ndarray) -> np.ndarray:
    """Unit-norm, locally normalised thumbnail, (576,) float32."""
    small = Image.fromarray(grey).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    square = normalised(np.asarray(small), _THUMBNAIL, 3.0)
    flat = square.ravel() - square.mean()
    return (flat / max(float(np.linalg.norm(flat)), 1e-6)).astype(np.float32)


def thumbnails_of(frames: Sequence[Frame]) -> np.ndarray:
    return np.array([thumbnail_of(f.grey) for f in frames], np.float32).reshape(-1, _THUMBNAIL**2)
