"""Shapes of binary masks: ellipses, components, boxes, moments, elastic deformation, curvature, erosion.

Numpy and scipy only, no state. A mask is an (H, W) array, 0 = background, anything else = inside; masks that
come back are uint8 with inside = 1. Coordinates are pixel centres: x to the right, y downwards, the top left
pixel at (0, 0). Lengths are in px, areas in px².
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

_NEIGHBOURS = {4: ndimage.generate_binary_structure(2, 1), 8: ndimage.generate_binary_structure(2, 2)}
REFERENCE_RADIUS = 32.0
"""Equivalent radius, px, to which a shape is resampled before its curvature is measured."""
CURVATURE_BLUR = 3.0
"""Gaussian blur, px at the reference radius: σ = 0.094·√(A/π)."""
STAIRCASE_BLUR = 1.8
"""Least Gaussian blur, px of the mask itself: below radius 16 the pixel staircase needs more."""


# ------------------------------------------------------------------------------------------ making shapes


def ellipse(
    shape: tuple[int, int], *, x: float, y: float, a: float, b: float, angle: float = 0.0
) -> np.ndarray:
    """Filled ellipse: uint8 (H, W), clipped at the border (Pan et al. 2025, MICCAI, Eq. 6: the interior).

    The round(πab) pixels nearest to the centre in the ellipse's own metric are set, so that the area is right
    to half a pixel; the rule "centre of the pixel inside" is off by up to 3 % at radius 10.

    Args:
        shape: (H, W).
        x, y: centre.
        a, b: horizontal and vertical semi-axis (before rotation).
        angle: rotation in radians, from x towards y.

    Raises:
        ValueError: a semi-axis is not positive.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"ellipse: semi-axes must be positive, got a={a}, b={b}")
    cos, sin = math.cos(angle), math.sin(angle)
    half_width = math.ceil(math.hypot(a * cos, b * sin)) + 2
    half_height = math.ceil(math.hypot(a * sin, b * cos)) + 2
    left, top = round(x) - half_width, round(y) - half_height
    dx = np.arange(left, left + 2 * half_width + 1) - x
    dy = np.arange(top, top + 2 * half_height + 1)[:, None] - y
    level = ((dx * cos + dy * sin) / a) ** 2 + ((dy * cos - dx * sin) / b) ** 2
    count = max(1, round(math.pi * a * b))
    limit = np.partition(level, count - 1, axis=None)[count - 1]
    patch = (level < limit).astype(np.uint8)
    ties = np.flatnonzero(level == limit)  # in reading order, so that every machine takes the same ones
    patch.ravel()[ties[: count - int(patch.sum())]] = 1
    return paste(shape, patch, top=top, left=left)


def paste(shape: tuple[int, int], patch: np.ndarray, *, top: int, left: int) -> np.ndarray:
    """`patch` on an empty uint8 (H, W) canvas, its first pixel at (top, left), clipped at the border."""
    canvas = np.zeros(shape, np.uint8)
    bottom, right = min(shape[0], top + patch.shape[0]), min(shape[1], left + patch.shape[1])
    if bottom > max(top, 0) and right > max(left, 0):
        inside = patch[max(-top, 0) : bottom - top, max(-left, 0) : right - left]
        canvas[max(top, 0) : bottom, max(left, 0) : right] = inside
    return canvas


@functools.lru_cache(maxsize=256)
def _spline_basis(points: int, length: int) -> np.ndarray:
    """(length, points): row i holds the weights of the control points at pixel i, ends on ends."""
    positions = np.linspace(0.0, points - 1.0, length)[None]
    columns = [ndimage.map_coordinates(unit, positions, order=3, mode="mirror") for unit in np.eye(points)]
    basis = np.stack(columns, axis=1)
    basis.setflags(write=False)
    return basis


def spline_field(displacement: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Cubic-spline interpolation of a control grid over the pixels: (2, n, m) → float64 (2, H, W).

    Equals `scipy.ndimage.map_coordinates(grid, …, order=3, mode="mirror")` with the outer control points on
    the outer pixels, evaluated as a product of two one-dimensional splines, which is many times faster. Summed in
    a fixed order without BLAS, so that threads and machines do not change the last bit.
    """
    rows = _spline_basis(displacement.shape[1], shape[0])
    columns = _spline_basis(displacement.shape[2], shape[1])
    along_x = (displacement[..., None] * columns.T).sum(axis=2)  # (2, n, W)
    field = np.zeros((2, *shape))
    for k in range(displacement.shape[1]):
        field += rows[:, k, None] * along_x[:, k, None, :]
    return field


def elastic_deform(mask: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """The mask sampled at displaced pixels, nearest neighbour, 0 outside (Pan et al. 2025, MICCAI, Eq. 7).

    Args:
        mask: (H, W).
        displacement: (2, n, m) displacement of control points in px, first along y, then along x; the grid
            spans the whole array. Zero displacement gives the mask back.

    Returns:
        Array of the mask's dtype and shape. As elasticdeform 0.5.1 with order=0 and this displacement.
    """
    height, width = mask.shape
    y, x = spline_field(displacement, (height, width))
    # Nearest pixel, counted in a frame one pixel wider: + 0.5 to round, + 1 for the frame. Truncation is floor
    # once negative positions are clipped to the frame.
    y += np.arange(height)[:, None] + 1.5
    x += np.arange(width) + 1.5
    np.clip(y, 0, height + 1, out=y)
    np.clip(x, 0, width + 1, out=x)
    position = y.astype(np.int32)
    position *= width + 2
    position += x.astype(np.int32)
    return np.pad(mask, 1).ravel()[position]


def draw_displacement(rng: np.random.Generator, sigma: float, points: int = 3) -> np.ndarray:
    """Control-point displacements ~ N(0, sigma²) px: float64 (2, points, points)."""
    return rng.standard_normal((2, points, points)) * sigma


# ------------------------------------------------------------------------------------------ components


@dataclass(frozen=True, kw_only=True)
class Box:
    """Bounding box in px: rows top … bottom − 1, columns left … right − 1."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def bounding_box(mask: np.ndarray) -> Box | None:
    """Smallest box around the inside; None for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return Box(top=top, bottom=bottom, left=int(columns[0]), right=int(columns[-1]) + 1)


def component_areas(mask: np.ndarray, connectivity: Literal[4, 8] = 8) -> np.ndarray:
    """Areas of the connected components, px², largest first; empty for an empty mask."""
    box = bounding_box(mask)
    if box is None:
        return np.empty(0, np.int64)
    labels, _ = ndimage.label(mask[box.slices], _NEIGHBOURS[connectivity])
    return np.sort(np.bincount(labels.ravel())[1:])[::-1]


def largest_component(mask: np.ndarray, connectivity: Literal[4, 8] = 8) -> np.ndarray:
    """The largest connected component: uint8 (H, W); the first in reading order among equals."""
    out = np.zeros(mask.shape, np.uint8)
    box = bounding_box(mask)
    if box is not None:
        labels, count = ndimage.label(mask[box.slices], _NEIGHBOURS[connectivity])
        best = 1 if count == 1 else int(np.argmax(np.bincount(labels.ravel())[1:])) + 1
        out[box.slices] = labels == best
    return out


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Background regions (4-connected) that do not reach the border are set: uint8 (H, W)."""
    out = np.zeros(mask.shape, np.uint8)
    box = bounding_box(mask)
    if box is not None:
        background = np.pad(mask[box.slices] == 0, 1, constant_values=True)
        labels, _ = ndimage.label(background)
        out[box.slices] = labels[1:-1, 1:-1] != labels[0, 0]
    return out


# ------------------------------------------------------------------------------------------ measures


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Area, centroid and second central moments of a shape made of unit squares (px, px²)."""

    area: int
    x: float
    y: float
    var_x: float
    var_y: float
    cov_xy: float

    @property
    def aspect(self) -> float:
        """Width over height from the marginal variances: a/b of an upright ellipse."""
        return math.sqrt(self.var_x / self.var_y)

    @property
    def semi_axes(self) -> tuple[float, float]:
        """(a, b), horizontal and vertical, of the upright ellipse with this area and aspect."""
        radius, root = math.sqrt(self.area / math.pi), math.sqrt(self.aspect)
        return radius * root, radius / root


def moments(mask: np.ndarray) -> Moments | None:
    """Moments of the inside; None for an empty mask."""
    box = bounding_box(mask)
    if box is None:
        return None
    inside = (mask[box.slices] != 0).astype(np.float64)
    per_column, per_row = inside.sum(axis=0), inside.sum(axis=1)
    area = per_row.sum()
    columns, rows = np.arange(box.width), np.arange(box.height)
    x, y = per_column @ columns / area, per_row @ rows / area
    return Moments(
        area=int(area),
        x=float(x + box.left),
        y=float(y + box.top),
        var_x=float(per_column @ (columns - x) ** 2 / area + 1 / 12),
        var_y=float(per_row @ (rows - y) ** 2 / area + 1 / 12),
        cov_xy=float((rows - y) @ inside @ (columns - x) / area),
    )


def area(mask: np.ndarray) -> int:
    """Number of pixels inside."""
    return int(np.count_nonzero(mask))


def equivalent_radius(mask: np.ndarray) -> float:
    """Radius of the disc of equal area, px; 0 for an empty mask."""
    return math.sqrt(area(mask) / math.pi)


def box_aspect(mask: np.ndarray) -> float:
    """Width over height of the bounding box: > 1 is "wider than tall". NaN for an empty mask."""
    box = bounding_box(mask)
    return math.nan if box is None else box.width / box.height


def boundary(mask: np.ndarray) -> np.ndarray:
    """Inside pixels with a 4-neighbour outside, or on the border of the image: bool (H, W)."""
    inside = np.pad(mask != 0, 1)
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return inside[1:-1, 1:-1] & ~core


def solidity(mask: np.ndarray) -> float:
    """Area over the area of the convex hull of the pixel squares, 0 … 1; NaN for an empty mask."""
    box = bounding_box(mask)
    if box is None:
        return math.nan
    y, x = np.nonzero(boundary(mask[box.slices]))
    corners = np.concatenate([np.stack([x + dx, y + dy], 1) for dx in (0, 1) for dy in (0, 1)])
    return area(mask[box.slices]) / float(ConvexHull(corners).volume)


def border_contact(mask: np.ndarray) -> float:
    """Fraction of the shape's boundary pixels that lie on the image border; 0 for an empty mask."""
    inside = mask != 0
    on_border = int(inside[0].sum() + inside[-1].sum() + inside[1:-1, 0].sum() + inside[1:-1, -1].sum())
    return 0.0 if on_border == 0 else on_border / int(boundary(mask).sum())


def contour(mask: np.ndarray) -> np.ndarray:
    """Outer contour of the largest component as a closed polygon on pixel corners.

    Returns:
        float64 (K, 2) of (x, y), clockwise on the screen, first vertex not repeated; (0, 2) for an empty
        mask. Pixel (row, column) covers (column ± .5, row ± .5); the polygon encloses exactly the pixels of
        the component with its holes filled.
    """
    inside = np.pad(fill_holes(largest_component(mask)), 1).astype(bool)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sides = (
        ((-1, 0), (0, 0), (0, 1)),
        ((0, 1), (0, 1), (1, 1)),
        ((1, 0), (1, 1), (1, 0)),
        ((0, -1), (1, 0), (0, 0)),
    )
    for (dy, dx), start, end in sides:
        ys, xs = np.nonzero(inside & ~np.roll(inside, (-dy, -dx), (0, 1)))
        for y, x in zip(ys.tolist(), xs.tolist()):
            following.setdefault((y + start[0], x + start[1]), []).append((y + end[0], x + end[1]))
    if not following:
        return np.empty((0, 2))
    first = min(following)
    path, step, corner = [first], (0, 1), following[first].pop()
    while corner != first:
        path.append(corner)
        before = path[-2]
        step = (corner[0] - before[0], corner[1] - before[1])
        # Where two pixels meet at a corner only (8-connected), turn left to stay on the outer side.
        left = (corner[0] - step[1], corner[1] + step[0])
        options = following[corner]
        corner = options.pop(options.index(left)) if left in options else options.pop()
    return np.array([(x - 1.5, y - 1.5) for y, x in path])


# ------------------------------------------------------------------------------------------ curvature


def _level_set_curvature(
    dx: np.ndarray, dy: np.ndarray, dxx: np.ndarray, dxy: np.ndarray, dyy: np.ndarray, eps: float
) -> np.ndarray:
    """κ = div(∇M / |∇M|), 1/px (Pan et al. 2025, Medical Image Analysis, Eq. 10)."""
    return (dxx * dy**2 - 2 * dxy * dx * dy + dyy * dx**2) / (dx**2 + dy**2 + eps) ** 1.5


def _blurred_at_reference_radius(mask: np.ndarray) -> np.ndarray:
    """Bounding-box crop resampled to the reference radius and blurred: float64 in 0 … 1."""
    box = bounding_box(mask)
    if box is None:
        raise ValueError("curvature: the mask is empty")
    crop = (mask[box.slices] != 0).astype(np.float64)
    step = math.sqrt(crop.sum() / math.pi) / REFERENCE_RADIUS  # source px per resampled px
    blur = max(CURVATURE_BLUR, STAIRCASE_BLUR / step)
    margin = 4 * blur + 2
    half = [math.ceil(n / (2 * step) + margin) for n in crop.shape]
    pad = [math.ceil(h * step - (n - 1) / 2) + 1 for h, n in zip(half, crop.shape)]
    crop = np.pad(crop, [(p, p) for p in pad])
    if step > 1:
        crop = ndimage.gaussian_filter(crop, 0.5 * step)
    offset = [(n - 1) / 2 - h * step for h, n in zip(half, crop.shape)]
    out = ndimage.affine_transform(
        crop, [step, step], offset, output_shape=tuple(2 * h + 1 for h in half), order=1
    )
    return np.asarray(ndimage.gaussian_filter(out, blur))


def curvature(
    mask: np.ndarray, *, operator: Literal["scale_normalised", "sobel"] = "scale_normalised"
) -> float:
    """Mean absolute level-set curvature along the contour of one shape.

    Args:
        mask: (H, W), not empty; of several components pass one.
        operator: "scale_normalised" (default) gives mean |κ|·√(A/π), without unit, 1 for a disc of any size:
            the bounding-box crop is resampled to equivalent radius 32, blurred (σ = 3) and differentiated by
            central differences; the mean is weighted by |∇M| where it exceeds half of its maximum.
            "sobel" is the literal reading of the paper's statistic, 1/px up to a gain: unnormalised Sobel of
            Sobel (gain 8) on the binary mask as it is, mean over the inner boundary. It depends on the
            resolution and does not measure 1/radius (κ·r of a disc grows with r); for ablation only.

    Source: Pan et al. 2025, Medical Image Analysis, Eq. 10; deviates: the default is scale-normalised.

    Raises:
        ValueError: empty mask, unknown operator.
    """
    if operator == "sobel":
        return _sobel_curvature(mask)
    if operator != "scale_normalised":
        raise ValueError(f"curvature: operator {operator!r} is none of scale_normalised, sobel")
    m = _blurred_at_reference_radius(mask)
    dy, dx = (np.gradient(m, axis=axis) for axis in (0, 1))
    dyy, dxy, dxx = np.gradient(dy, axis=0), np.gradient(dx, axis=0), np.gradient(dx, axis=1)
    slope = np.hypot(dx, dy)
    band = slope > 0.5 * slope.max()
    kappa = _level_set_curvature(dx[band], dy[band], dxx[band], dxy[band], dyy[band], 1e-12)
    return float(np.average(np.abs(kappa), weights=slope[band]) * REFERENCE_RADIUS)


def _sobel_curvature(mask: np.ndarray) -> float:
    if not mask.any():
        raise ValueError("curvature: the mask is empty")
    m = np.pad((mask != 0).astype(np.float64), 3)
    dx, dy = ndimage.sobel(m, axis=1), ndimage.sobel(m, axis=0)
    dxx, dxy, dyy = ndimage.sobel(dx, axis=1), ndimage.sobel(dx, axis=0), ndimage.sobel(dy, axis=0)
    kappa = _level_set_curvature(dx, dy, dxx, dxy, dyy, 1e-8)
    return float(np.abs(kappa[boundary(m)]).mean())


# ------------------------------------------------------------------------------------------ erosion


def erode(mask: np.ndarray, radius: float, *, max_area_loss: float = 0.2) -> tuple[np.ndarray, bool]:
    """Erosion by a disc, left out where it would take too much of a small lesion.

    Args:
        mask: (H, W).
        radius: of the disc, px. The image border does not erode.
        max_area_loss: fraction of the area above which the mask is returned as it was.

    Returns:
        (uint8 (H, W), whether it was eroded). The result lies inside the mask.

    Source: Xie et al. 2025 (kernel unstated there; the disc and the guard are ours).
    """
    if radius < 0 or not 0 <= max_area_loss <= 1:
        raise ValueError(f"erode: want radius ≥ 0 and 0 ≤ max_area_loss ≤ 1, got {radius}, {max_area_loss}")
    inside = (mask != 0).astype(np.uint8)
    before = int(inside.sum())
    if radius == 0 or before == 0 or before == inside.size:
        return inside, False
    eroded = (ndimage.distance_transform_edt(inside) > radius).astype(np.uint8)
    if before - int(eroded.sum()) > max_area_loss * before:
        return inside, False
    return eroded, True
