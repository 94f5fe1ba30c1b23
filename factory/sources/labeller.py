"""Automatic BI-RADS descriptors, echogenicity and boundary, from an image and its lesion mask.

Pan et al. 2025 (MICCAI) train on prompts with these two descriptors, but BUSI has no such labels and the paper
does not say where they came from. Here they are measured, and cut at the median of the training rows; a
row's own `attributes` win where it has them. They are relative to the training set and no clinical reading.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy import ndimage

from factory import geometry
from factory.imaging import TrainingRow, as_grey
from factory.sources.rows import rows_digest

Echogenicity = Literal["homogeneous", "heterogeneous"]
Boundary = Literal["clear", "unclear"]

TEXTURE_BLUR = 0.1
"""Gaussian blur before the dispersion, in equivalent radii: averages speckle, keeps lesion-scale echo."""
GRADIENT_BLUR = 0.07
"""Gaussian blur before the gradient, in equivalent radii."""
INTERIOR_MARGIN = 0.12
"""Rim left out of the interior, in equivalent radii."""
CONTOUR_REACH = 0.5
"""What counts as the surroundings of the contour, either way, in equivalent radii."""


@dataclass(frozen=True, kw_only=True)
class BiradsDescriptor:
    """The two descriptors of a lesion that the prompts speak of."""

    echogenicity: Echogenicity
    boundary: Boundary


@dataclass(frozen=True, kw_only=True)
class LesionAppearance:
    """What the descriptors are cut from.

    Attributes:
        texture_dispersion: standard deviation of the blurred interior after its linear trend along depth is
            removed, grey levels. High: heterogeneous.
        boundary_gradient: mean absolute derivative across the contour per equivalent radius, in standard
            deviations of the grey levels around the contour, so that gain and contrast cancel. High: clear.
    """

    texture_dispersion: float
    boundary_gradient: float


def measure_appearance(image: np.ndarray, mask: np.ndarray) -> LesionAppearance:
    """Measurements of the mask's largest component.

    Args:
        image: uint8 (S, S) or (S, S, 3).
        mask: (S, S), not empty.

    Raises:
        ValueError: the mask is empty.
    """
    lesion = geometry.largest_component(mask)
    box = geometry.bounding_box(lesion)
    if box is None:
        raise ValueError("labeller: the mask is empty, a row without lesion has no descriptors")
    radius = geometry.equivalent_radius(lesion)
    margin = math.ceil(0.6 * radius) + 4
    around = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in box.slices)
    inside = lesion[around] != 0
    grey = as_grey(image)[around].astype(np.float64)
    # Distance to the contour, positive inside; the image border is no contour.
    distance = ndimage.distance_transform_edt(inside) - 0.5
    if not inside.all():
        distance = np.where(inside, distance, 0.5 - ndimage.distance_transform_edt(~inside))
    return LesionAppearance(
        texture_dispersion=_texture_dispersion(grey, inside, distance, radius),
        boundary_gradient=_boundary_gradient(grey, distance, radius),
    )


def _texture_dispersion(grey: np.ndarray, inside: np.ndarray, distance: np.ndarray, radius: float) -> float:
    interior = distance > max(1.0, INTERIOR_MARGIN * radius)
    if interior.sum() < 12:
        interior = inside
    sigma = TEXTURE_BLUR * radius
    weight = ndimage.gaussian_filter(interior.astype(np.float64), sigma)
    blurred = ndimage.gaussian_filter(np.where(interior, grey, 0.0), sigma)[interior] / weight[interior]
    depth = np.nonzero(interior)[0].astype(np.float64)
    depth -= depth.mean()
    variance = depth @ depth
    trend = depth * (depth @ blurred / variance) if variance > 0 else 0.0
    return float((blurred - trend).std())


def _boundary_gradient(grey: np.ndarray, distance: np.ndarray, radius: float) -> float:
    blurred = ndimage.gaussian_filter(grey, max(0.7, GRADIENT_BLUR * radius))
    smooth = ndimage.gaussian_filter(distance, 1.0)
    dy, dx = np.gradient(blurred)
    ny, nx = np.gradient(smooth)
    band = np.abs(distance) < 1.0
    across = (dy[band] * ny[band] + dx[band] * nx[band]) / (np.hypot(ny[band], nx[band]) + 1e-6)
    spread = grey[np.abs(distance) < max(2.0, CONTOUR_REACH * radius)].std()
    return float(np.abs(across).mean() * radius / max(float(spread), 1.0))


@dataclass(frozen=True, kw_only=True)
class BiradsLabeller:
    """Labels by thresholds at the medians over the training rows with a lesion.

    A row's `attributes["echogenicity"]` and `attributes["boundary"]` win over the measurement: this is how a
    reader's labels come in, from the CSV of the `folder` layout.
    """

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedBiradsLabeller":
        """Thresholds from `rows`.

        Raises:
            ValueError: no row has a lesion, or an attribute has a value that is no descriptor.
        """
        lesions = [row for row in rows if row.mask is not None and row.mask.any()]
        if not lesions:
            raise ValueError(f"labeller: none of the {len(rows)} training rows has a lesion mask")
        for row in lesions:
            _attribute(row, "echogenicity", get_args(Echogenicity))
            _attribute(row, "boundary", get_args(Boundary))
        measured = [measure_appearance(row.image, row.mask) for row in lesions if row.mask is not None]
        return FittedBiradsLabeller(
            texture_dispersion=float(np.median([m.texture_dispersion for m in measured])),
            boundary_gradient=float(np.median([m.boundary_gradient for m in measured])),
            fitted_on=rows_digest(rows),
        )


@dataclass(frozen=True, kw_only=True)
class FittedBiradsLabeller:
    """The thresholds: dispersion above `texture_dispersion` is heterogeneous, gradient above
    `boundary_gradient` is clear (units as in `LesionAppearance`)."""

    texture_dispersion: float
    boundary_gradient: float
    fitted_on: str

    def describe(self, row: TrainingRow) -> BiradsDescriptor:
        """Descriptors of a row with a lesion.

        Raises:
            ValueError: the row has no lesion, or an attribute has a value that is no descriptor.
        """
        echogenicity = _attribute(row, "echogenicity", get_args(Echogenicity))
        boundary = _attribute(row, "boundary", get_args(Boundary))
        if echogenicity is None or boundary is None:
            if row.mask is None or not row.mask.any():
                raise ValueError(f"{row.image_id}: no lesion mask, and no descriptors in its attributes")
            measured = measure_appearance(row.image, row.mask)
            heterogeneous = measured.texture_dispersion > self.texture_dispersion
            clear = measured.boundary_gradient > self.boundary_gradient
            echogenicity = echogenicity or ("heterogeneous" if heterogeneous else "homogeneous")
            boundary = boundary or ("clear" if clear else "unclear")
        return BiradsDescriptor(echogenicity=echogenicity, boundary=boundary)  # type: ignore[arg-type]


def _attribute(row: TrainingRow, name: str, allowed: Sequence[str]) -> str | None:
    """A row's own descriptor, None where it has none.

    Raises:
        ValueError: a value that is not allowed.
    """
    attributes: Mapping[str, str] = row.attributes
    value = attributes.get(name, "").strip().lower()
    if value and value not in allowed:
        raise ValueError(
            f"{row.image_id}: attribute {name}={attributes[name]!r} is none of {', '.join(allowed)}; "
            "correct it in the labels CSV, or leave it empty to have it measured"
        )
    return value or None
