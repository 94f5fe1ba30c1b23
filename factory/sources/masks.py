"""Sources of masks: where the shape of a requested lesion comes from.

A source is fitted on the decoded training rows once and then draws one mask per request. All randomness
comes from the `numpy.random.Generator` given to `draw`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy import ndimage

from factory import geometry
from factory.imaging import TrainingRow, decode_png, encode_png
from factory.sources.rows import lesion_rows_by_label, mask_size, rows_digest
from schemas.request import SynthesisRequest

CITED_DEFORMATION = {4: (0.5, 1.0), 8: (1.0, 2.0), 16: (3.0, 6.0), 32: (5.0, 10.0)}
"""Radius → range of σ, both px, in the code that Pan et al. 2025 cite (Hu et al. 2023): σ/radius .125 … .375."""
NEARLY_ROUND = 0.05
"""|log(a/b)| below which an ellipse has no side that a deformation could flip."""
FINE_POINTS = 9
"""Control points per axis of the second, finer deformation: spacing of half a semi-axis."""
FINE_SIGMAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""σ/radius of the finer deformation at which solidity is calibrated; beyond, shapes fall apart."""
SOLIDITY_SLACK = 0.06
"""How far below the solidity asked for a mask may be: the tail of the finer deformation is in shreds."""
CALIBRATION_DRAWS = 24
TRIES_PER_ELLIPSE = 8
"""Deformations tried before the ellipse itself is drawn anew; keeps large lesions from being crowded out."""


@dataclass(frozen=True, kw_only=True)
class MaskDraw:
    """A requested mask and what was drawn to make it.

    Attributes:
        mask: uint8 (S, S), lesion = 1 (`RealMasks`: the row's label map).
        parameters: numbers and strings, enough to see how the mask came about; lengths in px.
    """

    mask: np.ndarray
    parameters: Mapping[str, float | int | str]


@dataclass(frozen=True, kw_only=True)
class DeformedEllipse:
    """Elastically deformed ellipses (Pan et al. 2025, MICCAI, Eq. 6–7).

    The paper gives no sizes. Area, aspect and position are drawn jointly from the masks of the label's
    training rows (smoothed bootstrap); σ is drawn relative to the radius, so that the deformation does not
    depend on resolution. After the deformation: largest component, hole fill, and rejection where the aspect
    flipped, the area went astray or the shape came too near to the border.

    Deviates twice. Three by three control points leave every shape as smooth as an ellipse, where malignant
    masks are irregular (BUSI: median solidity .87, deformed ellipses .97), so by default a second deformation
    on a finer grid follows, with σ such that the solidity is that of a training row; `irregularity="none"` is
    Eq. 7 alone. And the paper makes benign lesions wider and malignant ones taller than
    wide, against its own training data (88 % of BUSI's malignant masks are wider than tall), so the default
    takes the aspect from the training rows; `orientation="strict"` is the paper's rule.

    Attributes:
        orientation: "empirical", or "strict": semi-axes are exchanged where they break `orientations`, and a
            mask whose bounding box breaks it is rejected.
        orientations: (class name, "wide" | "tall"), read by "strict" only.
        deformation: least and greatest σ/√(ab) on the 3 × 3 grid; σ is uniform between.
        irregularity: "empirical", or "none": no second deformation. With deformation (0, 0): plain ellipses.
        jitter: bandwidth of the bootstrap kernel in units of the class's own covariance, 0 … 1; mean and
            covariance of the class are preserved.
        area_tolerance: greatest |log(area of the mask / πab)|.
        border: least distance to the image border, px.
        max_tries: deformations tried per request before it fails.
    """

    orientation: Literal["empirical", "strict"] = "empirical"
    orientations: tuple[tuple[str, str], ...] = (("benign", "wide"), ("malignant", "tall"))
    deformation: tuple[float, float] = (0.125, 0.3125)
    irregularity: Literal["empirical", "none"] = "empirical"
    jitter: float = 0.2
    area_tolerance: float = 0.7
    border: int = 1
    max_tries: int = 400

    def __post_init__(self) -> None:
        if self.orientation not in ("empirical", "strict"):
            raise ValueError(f"orientation: {self.orientation!r} is none of empirical, strict")
        if self.irregularity not in ("empirical", "none"):
            raise ValueError(f"irregularity: {self.irregularity!r} is none of empirical, none")
        if any(side not in ("wide", "tall") for _, side in self.orientations):
            raise ValueError(f"orientations: want wide or tall for each class, got {self.orientations}")
        low, high = self.deformation
        if not 0 <= low <= high:
            raise ValueError(f"deformation: want 0 ≤ least ≤ greatest, got {self.deformation}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter: want 0 … 1, got {self.jitter}")
        if not self.area_tolerance > 0:
            raise ValueError(f"area_tolerance: want > 0, got {self.area_tolerance}")
        if self.border < 0 or self.max_tries < 1:
            raise ValueError(f"want border ≥ 0 and max_tries ≥ 1, got {self.border} and {self.max_tries}")

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedDeformedEllipse":
        """Sizes, aspects and positions of the rows' lesions (the largest component of each mask).

        Raises:
            ValueError: no rows, a label without any mask, masks of several sizes, or a lesion class that
                "strict" has no rule for.
        """
        size = mask_size(rows)
        shapes = {label: _shapes(members, size) for label, members in lesion_rows_by_label(rows).items()}
        if self.orientation == "strict":
            for label, shape in shapes.items():
                if len(shape) and label not in dict(self.orientations):
                    raise ValueError(f"orientations: no rule for class {label!r}; add it or use 'empirical'")
        solidity = {}
        if self.irregularity == "empirical":
            solidity = {k: self._calibrate(shape, size) for k, shape in shapes.items() if len(shape)}
        return FittedDeformedEllipse(
            source=self, size=size, shapes=shapes, solidity=solidity, fitted_on=rows_digest(rows)
        )

    def _calibrate(self, shapes: np.ndarray, size: int) -> tuple[float, ...]:
        """Mean solidity at each of `FINE_SIGMAS` of the class's median ellipse, made non-increasing."""
        rng = np.random.default_rng(0)
        log_radius, log_aspect = np.median(shapes[:, :2], axis=0).tolist()
        radius = max(2.0, math.exp(log_radius) * size)
        a, b = radius * math.exp(log_aspect / 2), radius * math.exp(-log_aspect / 2)
        means = []
        for fine in FINE_SIGMAS:
            coarse = rng.uniform(*self.deformation, CALIBRATION_DRAWS) * radius
            drawn = [_deform(a, b, 0.3, 0.6, sigma, fine * radius, rng) for sigma in coarse]
            means.append(float(np.mean([geometry.solidity(patch) for patch in drawn if patch.any()])))
        return tuple(np.minimum.accumulate(means).tolist())


def _shapes(rows: Sequence[TrainingRow], size: int) -> np.ndarray:
    """(n, 5) float64: log(√(ab)/S), log(a/b), x/S, y/S, solidity of each row's largest component."""
    values = []
    for row in rows:
        assert row.mask is not None
        lesion = geometry.largest_component(row.mask)
        m = geometry.moments(lesion)
        assert m is not None
        a, b = m.semi_axes
        x, y = (m.x + 0.5) / size, (m.y + 0.5) / size
        values.append((math.log(math.sqrt(a * b) / size), math.log(a / b), x, y, geometry.solidity(lesion)))
    shapes = np.array(values, np.float64).reshape(-1, 5)
    shapes.setflags(write=False)
    return shapes


def _deform(
    a: float, b: float, dx: float, dy: float, sigma: float, fine_sigma: float, rng: np.random.Generator
) -> np.ndarray:
    """A deformed ellipse (σ in px), its largest piece, holes filled.

    The frame reaches twice as far as the ellipse, as in the cited code: uint8 (2⌈2b⌉ + 1, 2⌈2a⌉ + 1), with
    the ellipse's centre at the middle pixel plus (dx, dy). The control grids span it.
    """
    half_width, half_height = math.ceil(2 * a), math.ceil(2 * b)
    frame = (2 * half_height + 1, 2 * half_width + 1)
    patch = geometry.ellipse(frame, x=half_width + dx, y=half_height + dy, a=a, b=b)
    for deviation, points in ((sigma, 3), (fine_sigma, FINE_POINTS)):
        if deviation > 0:
            patch = geometry.elastic_deform(patch, geometry.draw_displacement(rng, deviation, points))
    return geometry.fill_holes(geometry.largest_component(patch, connectivity=4))


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedDeformedEllipse:
    """`DeformedEllipse` with the training rows' shapes: see there.

    Attributes:
        size: side of the square masks, px.
        shapes: per label (n, 5); n = 0 for classes without lesions.
        solidity: per label with lesions, mean solidity at each of `FINE_SIGMAS`; empty without irregularity.
        fitted_on: digest of the row ids.
    """

    source: DeformedEllipse
    size: int
    shapes: Mapping[str, np.ndarray] = field(repr=False)
    solidity: Mapping[str, tuple[float, ...]]
    fitted_on: str

    def draw(self, request: SynthesisRequest, rng: np.random.Generator) -> MaskDraw:
        """One mask: uint8 (size, size), lesion = 1, one 4-connected component; empty without lesions.

        Raises:
            ValueError: the label has no training rows, or no mask was acceptable within `max_tries`.
        """
        if request.label not in self.shapes:
            raise ValueError(f"label {request.label!r}: no training row to take shapes from")
        shapes = self.shapes[request.label]
        if not len(shapes):
            empty = np.zeros((self.size, self.size), np.uint8)
            return MaskDraw(mask=empty, parameters={"mask_source": "empty"})
        rejected: Counter[str] = Counter()
        ellipse: dict[str, float] = {}
        sigma = 0.0
        for tries in range(1, self.source.max_tries + 1):
            if tries % TRIES_PER_ELLIPSE == 1:
                ellipse = self._draw_ellipse(request.label, shapes, rng)
            radius = math.sqrt(ellipse["a"] * ellipse["b"])
            sigma = rng.uniform(*self.source.deformation) * radius
            fine_sigma = self._fine_sigma(request.label, ellipse["solidity"]) * radius
            mask, reason = self._place(request.label, ellipse, sigma, fine_sigma, rng)
            if mask is not None:
                drawn: dict[str, float | int | str] = {"mask_source": "deformed_ellipse", **ellipse}
                drawn |= {"sigma": sigma, "fine_sigma": fine_sigma, "tries": tries}
                return MaskDraw(mask=mask, parameters=drawn)
            rejected[reason] += 1
        counts = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
        raise ValueError(
            f"DeformedEllipse: no acceptable mask for label {request.label!r} in {tries} tries ({counts}); last: "
            + ", ".join(f"{k}={v:.4g}" for k, v in ellipse.items())
            + f", sigma={sigma:.4g}, size={self.size}; lower `deformation` {self.source.deformation} or `border` "
            f"{self.source.border}, raise `area_tolerance` {self.source.area_tolerance} or `max_tries`, or set "
            f"`irregularity` {self.source.irregularity!r} to 'none'"
        )

    def _draw_ellipse(self, label: str, shapes: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
        """Semi-axes a, b and centre x, y in px and the solidity to reach, by the smoothed bootstrap."""
        h = self.source.jitter
        values = shapes[rng.integers(len(shapes))]
        if len(shapes) > 1 and h > 0:
            mean = shapes.mean(axis=0)
            # A random combination of the centred rows has their covariance; no factorisation is needed,
            # whose signs could differ between machines.
            weights = rng.standard_normal((len(shapes), 1)) / math.sqrt(len(shapes) - 1)
            kernel = (weights * (shapes - mean)).sum(axis=0)
            values = mean + math.sqrt(1 - h**2) * (values - mean) + h * kernel
        log_radius, log_aspect, x, y, solidity = values.tolist()
        if self.source.orientation == "strict":
            side = dict(self.source.orientations)[label]
            log_aspect = abs(log_aspect) if side == "wide" else -abs(log_aspect)
        room = (self.size - 1) / 2 - self.source.border
        radius = math.exp(log_radius) * self.size
        a = min(max(1.0, radius * math.exp(log_aspect / 2)), room)
        b = min(max(1.0, radius * math.exp(-log_aspect / 2)), room)
        far = self.size - 1 - self.source.border
        x = min(max(x * self.size - 0.5, a + self.source.border), far - a)
        y = min(max(y * self.size - 0.5, b + self.source.border), far - b)
        return {"a": a, "b": b, "x": x, "y": y, "solidity": solidity}

    def _fine_sigma(self, label: str, solidity: float) -> float:
        """σ/radius of the finer deformation at which shapes have this solidity on average."""
        if label not in self.solidity:
            return 0.0
        return float(np.interp(-solidity, [-value for value in self.solidity[label]], FINE_SIGMAS))

    def _place(
        self,
        label: str,
        ellipse: Mapping[str, float],
        sigma: float,
        fine_sigma: float,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray | None, str]:
        """The deformed ellipse in the image, or None and why it is not acceptable."""
        a, b, x, y = (ellipse[name] for name in ("a", "b", "x", "y"))
        patch = _deform(a, b, x - round(x), y - round(y), sigma, fine_sigma, rng)
        top, left = round(y) - patch.shape[0] // 2, round(x) - patch.shape[1] // 2
        m, box = geometry.moments(patch), geometry.bounding_box(patch)
        if m is None or box is None or abs(math.log(m.area / (math.pi * a * b))) > self.source.area_tolerance:
            return None, "area"
        far_x, far_y = self.size - left - box.right, self.size - top - box.bottom
        distance = min(top + box.top, left + box.left, far_x, far_y)
        if distance < self.source.border or geometry.border_contact(patch):
            return None, "border"
        if self._flipped(label, a / b, m.aspect, box.width / box.height):
            return None, "aspect"
        if label in self.solidity:
            least = min(ellipse["solidity"], self.solidity[label][0]) - SOLIDITY_SLACK
            if geometry.solidity(patch) < least:
                return None, "solidity"
        return geometry.paste((self.size, self.size), patch, top=top, left=left), ""

    def _flipped(self, label: str, wanted: float, moment_aspect: float, box_aspect: float) -> bool:
        """Whether the deformation turned a wide shape tall or the reverse."""
        if self.source.orientation == "strict":
            wide = dict(self.source.orientations)[label] == "wide"
            return (
                (box_aspect <= 1 or moment_aspect <= 1) if wide else (box_aspect >= 1 or moment_aspect >= 1)
            )
        return abs(math.log(wanted)) > NEARLY_ROUND and (moment_aspect > 1) != (wanted > 1)


@dataclass(frozen=True, kw_only=True)
class RealMasks:
    """A training mask of the label, optionally flipped and moved a little.

    Attributes:
        flip: mirror left and right with probability one half (depth is never mirrored).
        rotation: standard deviation, degrees.
        scale: standard deviation of the log of the scale factor.
        shift: standard deviation of the shift along each axis, as a fraction of the side.
        min_area: least area that must remain, as a fraction of what the scale alone would leave.
        max_tries: jitters tried per request before it fails.
    """

    flip: bool = True
    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    min_area: float = 0.95
    max_tries: int = 100

    def __post_init__(self) -> None:
        for name in ("rotation", "scale", "shift"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: want ≥ 0, got {getattr(self, name)}")
        if not 0 < self.min_area <= 1 or self.max_tries < 1:
            raise ValueError(
                f"want 0 < min_area ≤ 1 and max_tries ≥ 1, got {self.min_area}, {self.max_tries}"
            )

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedRealMasks":
        """The rows' masks by label.

        Raises:
            ValueError: no rows, a label without any mask, or masks of several sizes.
        """
        size = mask_size(rows)
        masks = {
            label: tuple((row.image_id, encode_png(row.mask)) for row in members if row.mask is not None)
            for label, members in lesion_rows_by_label(rows).items()
        }
        return FittedRealMasks(source=self, size=size, masks=masks, fitted_on=rows_digest(rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRealMasks:
    """`RealMasks` with the training masks as PNG, a kilobyte each: see there."""

    source: RealMasks
    size: int
    masks: Mapping[str, tuple[tuple[str, bytes], ...]] = field(repr=False)
    fitted_on: str

    def draw(self, request: SynthesisRequest, rng: np.random.Generator) -> MaskDraw:
        """One mask: the label map of a training row, uint8 (size, size); empty without lesions.

        Raises:
            ValueError: the label has no training rows, or jitter pushed every try out of the frame.
        """
        if request.label not in self.masks:
            raise ValueError(f"label {request.label!r}: no training row to take masks from")
        choices = self.masks[request.label]
        if not choices:
            empty = np.zeros((self.size, self.size), np.uint8)
            return MaskDraw(mask=empty, parameters={"mask_source": "empty"})
        source = self.source
        for tries in range(1, source.max_tries + 1):
            image_id, png = choices[rng.integers(len(choices))]
            mask = decode_png(png)
            flipped = bool(source.flip and rng.random() < 0.5)
            deviations = (source.rotation, source.scale, source.shift * self.size, source.shift * self.size)
            angle, log_scale, dy, dx = (rng.standard_normal(4) * deviations).tolist()
            scale, before = math.exp(log_scale), geometry.area(mask)
            mask = _move(mask[:, ::-1] if flipped else mask, math.radians(angle), scale, dy, dx)
            if geometry.area(mask) >= source.min_area * before * scale**2:
                drawn: dict[str, float | int | str] = {"image_id": image_id, "flipped": int(flipped)}
                drawn |= {"angle": angle, "scale": scale, "dy": dy, "dx": dx, "tries": tries}
                return MaskDraw(mask=mask, parameters={"mask_source": "real_mask", **drawn})
        raise ValueError(
            f"RealMasks: no mask of label {request.label!r} stayed in the frame in {source.max_tries} tries; "
            f"lower rotation {source.rotation}, scale {source.scale} or shift {source.shift}"
        )


def _move(mask: np.ndarray, angle: float, scale: float, dy: float, dx: float) -> np.ndarray:
    """Rotation and scaling about the shape's centroid, then a shift; nearest neighbour, same frame."""
    if angle == dy == dx == 0 and scale == 1:
        return np.ascontiguousarray(mask)
    m = geometry.moments(mask)
    assert m is not None
    centre = np.array([m.y, m.x])
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    inverse = np.array([[cos, -sin], [sin, cos]])
    offset = centre - inverse @ (centre + np.array([dy, dx]))
    return np.asarray(ndimage.affine_transform(mask, inverse, offset, order=0))
