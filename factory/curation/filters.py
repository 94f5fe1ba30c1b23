"""Filters that look at one row at a time: they score and give a verdict, they never drop a row.

A filter is fitted on the real training rows; what comes out is small, picklable and names the rows it was
fitted on. `score` needs the pixels or embeddings, `verdict` only the scores: they are stored with every row,
so thresholds can change without making an image again. Scores are therefore relative to the row's class
wherever a bound depends on the class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from factory import geometry
from factory.imaging import TrainingRow, as_grey
from schemas.identity import hash_parts
from schemas.sample import RejectReason

Scores = Mapping[str, np.ndarray]
"""Name of a score → float32 (N,). NaN where a score does not apply to a row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FilterBatch:
    """N synthetic rows as the filters see them.

    Attributes:
        images: uint8 (S, S) or (S, S, 3) each.
        requested_masks: the conditions, uint8 (S, S) each; None where the recipe has none.
        masks: the labels, uint8 (S, S) each; None where there is none.
        labels: (N,) index into the class names.
        embeddings: float32 (N, D), unit norm.
    """

    images: Sequence[np.ndarray]
    requested_masks: Sequence[np.ndarray | None]
    masks: Sequence[np.ndarray | None]
    labels: np.ndarray
    embeddings: np.ndarray

    def __post_init__(self) -> None:
        lengths = {
            f: len(getattr(self, f)) for f in ("images", "requested_masks", "masks", "labels", "embeddings")
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"FilterBatch: fields differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.images)


class FittedFilter(Protocol):
    """What a filter's `fit(rows, embeddings)` gives back."""

    fitted_on: str

    def score(self, batch: FilterBatch) -> dict[str, np.ndarray]:
        """Every score of every row."""
        ...

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """Reason or None for every row, from the scores alone."""
        ...


def first_reasons(filters: Sequence[FittedFilter], scores: Scores) -> list[RejectReason | None]:
    """The verdict of several filters: for each row the reason of the first filter that has one."""
    verdicts = [item.verdict(scores) for item in filters]
    return [next((reason for reason in row if reason is not None), None) for row in zip(*verdicts)]


def _digest(rows: Sequence[TrainingRow]) -> str:
    return hash_parts("rows", *sorted(row.image_id for row in rows))


def _column(scores: Scores, name: str) -> np.ndarray:
    if name not in scores:
        raise ValueError(f"scores: {name!r} is missing; this table was scored without that filter")
    return np.asarray(scores[name])


# ------------------------------------------------------------------------------------------ masks


@dataclass(frozen=True, kw_only=True)
class DegenerateMask:
    """Masks that no lesion of the class has: empty, out of the area range, in fragments, cut by the border.

    Attributes:
        quantile: the class's area range is its `quantile` … 1 − `quantile` over the training rows.
        area_margin: factor by which an area may leave that range.
        max_fragments: pieces allowed that are too small to be a lesion of the class, or beyond the number
            of lesions that a training row of the class has.
        max_border_contact: fraction of the mask's boundary on the image border, above the greatest that a
            training row of the class has.
    """

    quantile: float = 0.01
    area_margin: float = 1.5
    max_fragments: int = 0
    max_border_contact: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 0.5 or not self.area_margin >= 1:
            raise ValueError(
                f"want 0 ≤ quantile < .5, area_margin ≥ 1: got {self.quantile}, {self.area_margin}"
            )
        if self.max_fragments < 0 or self.max_border_contact < 0:
            raise ValueError(
                f"want max_fragments ≥ 0, max_border_contact ≥ 0: got {self.max_fragments}, {self.max_border_contact}"
            )

    def fit(self, rows: Sequence[TrainingRow], embeddings: np.ndarray) -> "FittedDegenerateMask":
        """Ranges per class from the rows that have a mask; `embeddings` are not used."""
        ranges = {}
        for label in sorted({row.label for row in rows}):
            masks = [row.mask for row in rows if row.label == label and row.mask is not None]
            if masks:
                ranges[label] = self._range([mask for mask in masks if mask.any()])
        return FittedDegenerateMask(source=self, ranges=ranges, fitted_on=_digest(rows))

    def _range(self, lesions: Sequence[np.ndarray]) -> "MaskRange":
        if not lesions:
            return MaskRange(least_area=0.0, greatest_area=0.0, num_lesions=0, border_contact=0.0)
        areas = np.array([geometry.area(mask) / mask.size for mask in lesions])
        least, greatest = np.quantile(areas, [self.quantile, 1 - self.quantile])
        lesion = least / self.area_margin
        counts = [int((geometry.component_areas(mask) / mask.size >= lesion).sum()) for mask in lesions]
        return MaskRange(
            least_area=float(least),
            greatest_area=float(greatest),
            num_lesions=max(1, *counts),
            border_contact=max(geometry.border_contact(mask) for mask in lesions),
        )


@dataclass(frozen=True, kw_only=True)
class MaskRange:
    """What the masks of one class look like; areas as fractions of the frame, all 0 without lesions."""

    least_area: float
    greatest_area: float
    num_lesions: int
    border_contact: float


@dataclass(frozen=True, kw_only=True)
class FittedDegenerateMask:
    """`DegenerateMask` with its ranges. Scores:

    - mask_area: fraction of the frame; 0 for an empty mask.
    - mask_area_low, mask_area_high: that over the class's least and greatest area; where the class has no
      lesions 1 and the number of pixels set.
    - mask_fragments: pieces too small to be a lesion, or one too many.
    - mask_border_excess: border contact above the greatest of the class.

    All NaN where a row has no mask or its class had none in training.
    """

    source: DegenerateMask
    ranges: Mapping[int, MaskRange]
    fitted_on: str

    def score(self, batch: FilterBatch) -> dict[str, np.ndarray]:
        """See the class."""
        names = ("mask_area", "mask_area_low", "mask_area_high", "mask_fragments", "mask_border_excess")
        rows = [self._scores(mask, int(label)) for mask, label in zip(batch.masks, batch.labels)]
        values = np.array(rows, np.float32).reshape(-1, len(names))
        return {name: values[:, k].copy() for k, name in enumerate(names)}

    def _scores(self, mask: np.ndarray | None, label: int) -> tuple[float, ...]:
        usual = self.ranges.get(label)
        if mask is None or usual is None:
            return (np.nan,) * 5
        area = geometry.area(mask) / mask.size
        if usual.num_lesions == 0:
            return area, 1.0, area * mask.size, 0.0, 0.0
        pieces = geometry.component_areas(mask) / mask.size
        lesions = int((pieces >= usual.least_area / self.source.area_margin).sum())
        specks = len(pieces) - max(lesions, min(1, len(pieces)))
        return (
            area,
            area / usual.least_area,
            area / usual.greatest_area,
            specks + max(0, lesions - usual.num_lesions),
            geometry.border_contact(mask) - usual.border_contact,
        )

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """Empty, too small, too large, fragmented, at the border: the first that holds."""
        low, high = _column(scores, "mask_area_low"), _column(scores, "mask_area_high")
        margin = self.source.area_margin
        checks = (
            (RejectReason.EMPTY_MASK, low == 0),
            (RejectReason.MASK_TOO_SMALL, low < 1 / margin),
            (RejectReason.MASK_TOO_LARGE, high > margin),
            (RejectReason.MASK_FRAGMENTED, _column(scores, "mask_fragments") > self.source.max_fragments),
            (
                RejectReason.MASK_TOUCHES_BORDER,
                _column(scores, "mask_border_excess") > self.source.max_border_contact,
            ),
        )
        return [next((reason for reason, hit in checks if hit[i]), None) for i in range(len(low))]


# ------------------------------------------------------------------------------------------ pixels


@dataclass(frozen=True, kw_only=True)
class BlankImage:
    """Images that carry no picture: near-constant, saturated, or noise without structure.

    Attributes:
        quantile: bounds start at this quantile (or 1 − it) of the training images.
        margin: factor by which an image may fall below the training images' dynamic range or deviation.
        saturation_margin: fraction of pixels at 0 or 255 above that of the training images.
        roughness_margin: how far the roughness may go from the training images' towards white noise, 0 … 1.
    """

    quantile: float = 0.01
    margin: float = 3.0
    saturation_margin: float = 0.2
    roughness_margin: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 0.5 or not self.margin >= 1:
            raise ValueError(f"want 0 ≤ quantile < .5 and margin ≥ 1: got {self.quantile}, {self.margin}")
        if not 0 <= self.saturation_margin <= 1 or not 0 <= self.roughness_margin <= 1:
            raise ValueError(
                f"want margins of 0 … 1: saturation {self.saturation_margin}, roughness {self.roughness_margin}"
            )

    def fit(self, rows: Sequence[TrainingRow], embeddings: np.ndarray) -> "FittedBlankImage":
        """Bounds from the training images; `embeddings` are not used.

        Raises:
            ValueError: no rows.
        """
        if not rows:
            raise ValueError("BlankImage: no training rows to fit on")
        measured = np.array([_measure_pixels(row.image) for row in rows])
        low = np.quantile(measured, self.quantile, axis=0)
        high = np.quantile(measured, 1 - self.quantile, axis=0)
        return FittedBlankImage(
            source=self,
            deviation=float(low[0]),
            dynamic_range=float(low[1]),
            saturated=float(high[2]),
            roughness=float(high[3]),
            fitted_on=_digest(rows),
        )


def _measure_pixels(image: np.ndarray) -> tuple[float, float, float, float]:
    """Standard deviation, 1 … 99 % range, saturated fraction, roughness of the grey image.

    Roughness is the mean squared difference of neighbours over twice the variance: 0 smooth, 1 white noise.
    """
    grey = as_grey(image).astype(np.float32)
    variance = float(grey.var())
    counts = np.bincount(as_grey(image).ravel(), minlength=256)
    cumulative = np.cumsum(counts)
    low, high = np.searchsorted(cumulative, [0.01 * cumulative[-1], 0.99 * cumulative[-1]])
    saturated = (counts[0] + counts[255]) / cumulative[-1]
    differences = (
        float((np.diff(grey, axis=0) ** 2).mean()) + float((np.diff(grey, axis=1) ** 2).mean())
    ) / 2
    roughness = differences / (2 * variance) if variance > 0 else 0.0
    return variance**0.5, float(high - low), float(saturated), roughness


@dataclass(frozen=True, kw_only=True)
class FittedBlankImage:
    """`BlankImage` with the training images' bounds. Scores: image_deviation and image_dynamic_range (grey
    levels), image_saturated (fraction at 0 or 255), image_roughness (0 smooth … 1 white noise)."""

    source: BlankImage
    deviation: float
    dynamic_range: float
    saturated: float
    roughness: float
    fitted_on: str

    def score(self, batch: FilterBatch) -> dict[str, np.ndarray]:
        """See the class."""
        names = ("image_deviation", "image_dynamic_range", "image_saturated", "image_roughness")
        values = np.array([_measure_pixels(image) for image in batch.images], np.float32).reshape(-1, 4)
        return {name: values[:, k].copy() for k, name in enumerate(names)}

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """BLANK_IMAGE where any bound is left."""
        source = self.source
        blank = (
            (_column(scores, "image_deviation") < self.deviation / source.margin)
            | (_column(scores, "image_dynamic_range") < self.dynamic_range / source.margin)
            | (_column(scores, "image_saturated") > self.saturated + source.saturation_margin)
            | (
                _column(scores, "image_roughness")
                > self.roughness + source.roughness_margin * max(0.0, 1 - self.roughness)
            )
        )
        return [RejectReason.BLANK_IMAGE if hit else None for hit in blank]


# ------------------------------------------------------------------------------------------ embeddings


@dataclass(frozen=True, kw_only=True)
class SimilarityBand:
    """Images too far from every real training image of their class, or closer than real images are.

    The nearest cosine similarity to the class's references is placed within the distribution that real
    images of other patients have: leave one out, own group excluded, with as many references as scoring uses
    (the nearest similarity grows with the number of references). Deviates from Xie et al. 2025, who state
    neither reference nor thresholds. The band cannot detect copies (most true twins fall below its upper
    bound): that is a test of its own on registered crops.

    Attributes:
        lower, upper: accepted positions: quantiles of the real distribution in 0 … 1; below 0 and above 1
            count interquartile ranges beyond its ends.
        min_references: classes with fewer independent references are not judged, and say so.
    """

    lower: float = 0.005
    upper: float = 0.995
    min_references: int = 20

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise ValueError(f"want lower < upper, got {self.lower} and {self.upper}")
        if self.min_references < 2:
            raise ValueError(f"min_references: want ≥ 2, got {self.min_references}")

    def fit(self, rows: Sequence[TrainingRow], embeddings: np.ndarray) -> "FittedSimilarityBand":
        """References and the real-to-real distribution per class.

        Args:
            rows: real training rows.
            embeddings: float32 (n, D), unit norm, of the same rows in the same order.

        Raises:
            ValueError: numbers differ, or an embedding is not of unit norm.
        """
        embeddings = np.asarray(embeddings, np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(rows):
            raise ValueError(f"embeddings: want ({len(rows)}, D), one per row, got {embeddings.shape}")
        if len(rows) and not np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3):
            raise ValueError("embeddings: want unit norm")
        classes = {
            label: self._fit_class([k for k, row in enumerate(rows) if row.label == label], rows, embeddings)
            for label in sorted({row.label for row in rows})
        }
        return FittedSimilarityBand(source=self, classes=classes, fitted_on=_digest(rows))

    def _fit_class(
        self, members: Sequence[int], rows: Sequence[TrainingRow], embeddings: np.ndarray
    ) -> "RealNeighbours":
        # Order by a hash of the id: which rows are references depends neither on table order nor on names.
        order = sorted(members, key=lambda k: hash_parts("reference", rows[k].image_id))
        vectors = embeddings[order]
        groups = np.array([rows[k].group_id for k in order])
        _, group_index, group_sizes = np.unique(groups, return_inverse=True, return_counts=True)
        size = len(order) - int(group_sizes.max())  # references left for every row once its group is out
        if size < self.min_references:
            off = (
                f"class {rows[members[0]].label_name!r} has {size} references outside a row's own group, "
                f"{self.min_references} are needed: not judged"
            )
            return RealNeighbours(references=vectors, nearest=np.empty(0, np.float32), off=off)
        similarity = vectors @ vectors.T
        other = group_index[:, None] != group_index[None, :]
        usable = other & (np.cumsum(other, axis=1) <= size)
        nearest = np.sort(np.where(usable, similarity, -np.inf).max(axis=1))
        return RealNeighbours(references=vectors[:size].copy(), nearest=nearest, off="")


@dataclass(frozen=True, kw_only=True, eq=False)
class RealNeighbours:
    """One class: references (m, D), sorted nearest similarities of real rows (n,), why it is off ("" if on)."""

    references: np.ndarray = field(repr=False)
    nearest: np.ndarray = field(repr=False)
    off: str = ""

    def position(self, similarity: np.ndarray) -> np.ndarray:
        """Quantile of `similarity` among real rows, continued beyond the ends in interquartile ranges."""
        low, high = self.nearest[0], self.nearest[-1]
        first, third = np.quantile(self.nearest, [0.25, 0.75])
        unit = max(float(third - first), 1e-6)
        inside = np.interp(similarity, self.nearest, np.linspace(0.0, 1.0, len(self.nearest)))
        return inside + np.minimum(similarity - low, 0) / unit + np.maximum(similarity - high, 0) / unit


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedSimilarityBand:
    """`SimilarityBand` with its references. Scores:

    - similarity: cosine to the nearest reference of the row's class; NaN where the class has none.
    - similarity_position: see `SimilarityBand`; NaN where the class is not judged.
    """

    source: SimilarityBand
    classes: Mapping[int, RealNeighbours] = field(repr=False)
    fitted_on: str

    @property
    def off(self) -> dict[int, str]:
        """Why a class is not judged, for the classes that are not: to be recorded and shown."""
        return {label: item.off for label, item in self.classes.items() if item.off}

    def score(self, batch: FilterBatch) -> dict[str, np.ndarray]:
        """See the class."""
        similarity = np.full(len(batch), np.nan, np.float32)
        position = similarity.copy()
        for label, item in self.classes.items():
            chosen = np.flatnonzero(np.asarray(batch.labels) == label)
            if chosen.size:
                similarity[chosen] = (batch.embeddings[chosen] @ item.references.T).max(axis=1)
                if not item.off:
                    position[chosen] = item.position(similarity[chosen])
        return {"similarity": similarity, "similarity_position": position}

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """TOO_FAR_FROM_REAL below the band, TOO_SIMILAR_TO_REAL above it."""
        position = _column(scores, "similarity_position")
        return [
            RejectReason.TOO_FAR_FROM_REAL
            if value < self.source.lower
            else RejectReason.TOO_SIMILAR_TO_REAL
            if value > self.source.upper
            else None
            for value in position
        ]
