"""Registration of two images of the same frame: where one lies in the other, and how alike they are there.

A frame that was exported twice differs in crop, scale, grey map and marks, but not in speckle. So the images
are compared after local normalisation (which removes the brightness that all ultrasound images share), over
their overlap, after a search for position and scale: coarse by normalised cross-correlation of a central
template (Lewis, "Fast normalized cross-correlation", 1995), fine by inverse-compositional Gauss-Newton steps
(Baker and Matthews, IJCV 56, 2004) on position and separate vertical and horizontal scale.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from factory.imaging import as_grey

_COARSE = 64
"""px of the longer side for the coarse search."""
_FINE = (96, 176)
"""px of the longer side for the Gauss-Newton steps, coarse to fine; less where images are smaller."""
_LEAST = 32
_TEMPLATE = 0.7
_SCALES = tuple(float(scale) for scale in np.geomspace(0.5, 1.35, 11))
_HOPELESS = 0.15
_CACHED = 4096
_FLAT = 5.0
"""Grey levels: contrast below it is noise and is not amplified."""


def normalised(image: np.ndarray, longer_side: int, sigma: float) -> np.ndarray:
    """Locally normalised float32 image, zero mean and at most unit deviation around every pixel.

    Args:
        image: uint8 (H, W) or (H, W, 3).
        longer_side: px to scale the longer side to, aspect kept.
        sigma: px of the scaled image, of the neighbourhood.
    """
    grey = Image.fromarray(as_grey(image))
    scale = longer_side / max(grey.size)
    size = (max(8, round(grey.width * scale)), max(8, round(grey.height * scale)))
    pixels = np.asarray(grey.resize(size, Image.Resampling.LANCZOS), np.float32)
    return locally_normalised(pixels[None], sigma)[0]


def locally_normalised(stack: np.ndarray, sigma: float) -> np.ndarray:
    """Local mean taken off and local deviation divided out of every image of a stack (N, H, W) float32.

    Contrast below `_FLAT` grey levels is not amplified; `sigma` in px is the neighbourhood.
    """
    width = (0.0, sigma, sigma)
    centred = stack - ndimage.gaussian_filter(stack, width, mode="nearest")
    deviation = np.sqrt(ndimage.gaussian_filter(centred**2, width, mode="nearest"))
    return np.clip(centred / (deviation + _FLAT), -2.5, 2.5)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a template image lies in a target image, both measured in units of their longer side.

    A template point (y, x) lies at (scale[0] * y + offset[0], scale[1] * x + offset[1]) of the target.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A verified placement.

    Attributes:
        placement: of the template in the target.
        correlation: of the locally normalised images over their overlap, -1 … 1.
        overlap: area of the overlap over the area of the smaller of the two, 0 … 1.
    """

    placement: Placement
    correlation: float
    overlap: float


@dataclass(frozen=True)
class _CoarseFrame:
    """Target side of the coarse search: spectrum (C, C/2+1), integral images of values and squares (C+1, C+1)."""

    spectrum: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    shape: tuple[int, int]


class Registrar:
    """Registers pairs of a fixed set of images; what is needed of each image is computed once.

    Attributes:
        sides: px of the longer side of the fine levels: images are never enlarged for them, by the median.

    Memory: about 0.3 MB for each of at most 4096 images at a time.
    """

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._images = images
        native = int(np.median([max(image.shape[:2]) for image in images]))
        self.sides = tuple(sorted({max(_LEAST, min(side, native)) for side in _FINE}))
        self._coarse = functools.lru_cache(maxsize=_CACHED)(self._coarse_frame)
        self._fine = functools.lru_cache(maxsize=_CACHED)(self._fine_frame)
        self._templates = functools.lru_cache(maxsize=4)(self._template_spectra)

    def coarse(self, template: int, targets: Sequence[int]) -> list[tuple[float, Placement]]:
        """Best coarse correlation and placement of one image's centre in each of the targets."""
        best: list[tuple[float, Placement]] = [
            (-1.0, Placement(scale=(1.0, 1.0), offset=(0.0, 0.0))) for _ in targets
        ]
        frames = [self._coarse(target) for target in targets]
        for scale, start, (height, width), spectrum, norm in self._templates(template):
            usable = [k for k, f in enumerate(frames) if f.shape[0] >= height and f.shape[1] >= width]
            if not usable:
                continue
            scores = _correlate([frames[k] for k in usable], spectrum, norm, (height, width))
            for k, score in zip(usable, scores):
                y, x = np.unravel_index(int(score.argmax()), score.shape)
                if score[y, x] > best[k][0]:
                    offset = (float(y) / _COARSE - scale * start[0], float(x) / _COARSE - scale * start[1])
                    best[k] = (float(score[y, x]), Placement(scale=(scale, scale), offset=offset))
        return best

    def refine(self, template: int, target: int, placement: Placement) -> Match:
        """The placement improved at full detail, with correlation and overlap.

        Pairs without any correlation at the coarser of the two levels are not taken further.
        """
        match = Match(placement=placement, correlation=0.0, overlap=0.0)
        for level, side in enumerate(self.sides):
            first, second = self._fine(template)[level], self._fine(target)[level]
            match = _compare(first, second, _gauss_newton(first, second, match.placement, side), side)
            if match.correlation < _HOPELESS:
                break
        return match

    def _coarse_frame(self, index: int) -> _CoarseFrame:
        pixels = normalised(self._images[index], _COARSE, 4.0)
        square = np.zeros((_COARSE, _COARSE), np.float32)
        square[: pixels.shape[0], : pixels.shape[1]] = pixels
        sums, squares = (np.pad(s, ((1, 0), (1, 0))).cumsum(0).cumsum(1) for s in (square, square**2))
        return _CoarseFrame(fft.rfft2(square), sums, squares, pixels.shape)

    def _fine_frame(self, index: int) -> tuple[np.ndarray, ...]:
        return tuple(normalised(self._images[index], side, max(2.0, side / 22)) for side in self.sides)

    def _template_spectra(
        self, index: int
    ) -> list[tuple[float, tuple[float, float], tuple[int, int], np.ndarray, float]]:
        """Per scale: (scale, top left corner in units of the longer side, shape, spectrum, norm)."""
        found = []
        for scale in _SCALES:
            pixels = normalised(self._images[index], round(_COARSE * scale), 4.0)
            height, width = (round(_TEMPLATE * side) for side in pixels.shape)
            if max(height, width) > _COARSE:
                continue
            top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
            centre = pixels[top : top + height, left : left + width]
            centre = centre - centre.mean()
            exact = round(_COARSE * scale) / _COARSE
            start = (top / _COARSE / exact, left / _COARSE / exact)
            spectrum = np.conj(fft.rfft2(centre, (_COARSE, _COARSE)))
            found.append((exact, start, (height, width), spectrum, float(np.linalg.norm(centre))))
        return found


def _correlate(
    frames: list[_CoarseFrame], spectrum: np.ndarray, norm: float, shape: tuple[int, int]
) -> list[np.ndarray]:
    """Normalised cross-correlation at every placement that lies inside, per frame."""
    height, width = shape
    raw = fft.irfft2(np.stack([f.spectrum for f in frames]) * spectrum, (_COARSE, _COARSE))
    scores = []
    for frame, values in zip(frames, raw):
        rows, columns = frame.shape[0] - height + 1, frame.shape[1] - width + 1
        mean, square = (
            i[height : height + rows, width : width + columns] - i[:rows, width : width + columns]
            - i[height : height + rows, :columns] + i[:rows, :columns]
            for i in (frame.sums, frame.squares)
        )  # fmt: skip
        energy = np.maximum(square - mean**2 / (height * width), 1e-3)
        scores.append(values[:rows, :columns] / (norm * np.sqrt(energy) + 1e-6))
    return scores


def _grid(shape: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (H, 1), (1, W) of pixel centres in units of the longer side."""
    return (np.arange(shape[0])[:, None] + 0.5) / side, (np.arange(shape[1])[None, :] + 0.5) / side


def _warp(
    target: np.ndarray, shape: tuple[int, int], placement: Placement, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The target as seen in the template's frame (H, W), and where it is defined.

    Axes scale separately, so bilinear interpolation is two sparse matrix products.
    """
    y, x = _grid(shape, side)
    rows = (placement.scale[0] * y[:, 0] + placement.offset[0]) * side - 0.5
    columns = (placement.scale[1] * x[0] + placement.offset[1]) * side - 0.5
    inside_rows = (rows >= 0) & (rows <= target.shape[0] - 1)
    inside_columns = (columns >= 0) & (columns <= target.shape[1] - 1)
    low_r, weight_r = _bracket(rows, target.shape[0])
    low_c, weight_c = _bracket(columns, target.shape[1])
    lines = target[low_r] * (1 - weight_r)[:, None] + target[low_r + 1] * weight_r[:, None]
    warped = lines[:, low_c] * (1 - weight_c) + lines[:, low_c + 1] * weight_c
    return warped, inside_rows[:, None] & inside_columns[None, :]


def _bracket(position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    low = np.clip(np.floor(position), 0, size - 2).astype(np.intp)
    return low, np.clip(position - low, 0, 1).astype(np.float32)


def _gauss_newton(
    template: np.ndarray, target: np.ndarray, placement: Placement, side: int, num_steps: int = 12
) -> Placement:
    """Least-squares steps on scale and offset of both axes; stops where they are below a tenth of a px."""
    y, x = _grid(template.shape, side)
    dy, dx = np.gradient(template)
    jacobian = np.stack([dy * y, dy, dx * x, dx]).astype(np.float32) * side
    scale, offset = np.array(placement.scale), np.array(placement.offset)
    for _ in range(num_steps):
        current = Placement(
            scale=(float(scale[0]), float(scale[1])), offset=(float(offset[0]), float(offset[1]))
        )
        warped, inside = _warp(target, template.shape, current, side)
        if inside.sum() < 200:
            break
        columns = jacobian[:, inside]
        seen, wanted = warped[inside], template[inside]
        gain = float(seen @ wanted) / max(float(seen @ seen), 1e-6)
        error = gain * seen - wanted
        normal = columns @ columns.T
        step = np.linalg.solve(normal + 1e-3 * np.diag(np.diag(normal)) + 1e-9 * np.eye(4), columns @ error)
        step = np.clip(step, -0.05, 0.05)
        # Inverse composition: the step moves the template's grid, so its inverse is applied first.
        grow, shift = 1 + step[[0, 2]], step[[1, 3]]
        scale, offset = scale / grow, offset - scale / grow * shift
        if not ((scale > 0.3) & (scale < 2.5)).all():
            return placement
        if np.abs(step).max() * side < 0.1:
            break
    return Placement(scale=(float(scale[0]), float(scale[1])), offset=(float(offset[0]), float(offset[1])))


def _compare(template: np.ndarray, target: np.ndarray, placement: Placement, side: int) -> Match:
    warped, inside = _warp(target, template.shape, placement, side)
    count = int(inside.sum())
    area = target.size / (placement.scale[0] * placement.scale[1])
    if count < 200:
        return Match(placement=placement, correlation=0.0, overlap=0.0)
    seen, wanted = warped[inside], template[inside]
    seen, wanted = seen - seen.mean(), wanted - wanted.mean()
    scale = float(np.linalg.norm(seen) * np.linalg.norm(wanted))
    correlation = float(seen @ wanted) / scale if scale > 0 else 0.0
    return Match(
        placement=placement, correlation=correlation, overlap=min(1.0, count / min(template.size, area))
    )
