"""Filters that look at one row at a time: they score and give a verdict, they never drop a row.

A filter is fitted on the real training rows; what comes out is small, picklable and names the rows it was
fitted on. `score` needs the pixels or embeddings, `verdict` only the scores: they are stored with every row,
so thresholds can change without making an image again. Scores are therefore relative to the row's class
wherever a bound depends on the class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from factory import geometry
from factory.curation.filter_batch import (
    FilterBatch,
    FittedFilter,
    Scores,
    column,
    digest_rows,
    first_reasons,
)
from factory.curation.similarity_band import FittedSimilarityBand, RealNeighbours, SimilarityBand
from factory.imaging import TrainingRow, as_grey
from schemas.sample import RejectReason

__all__ = [
    "BlankImage",
    "DegenerateMask",
    "FilterBatch",
    "FittedBlankImage",
    "FittedDegenerateMask",
    "FittedFilter",
    "FittedSimilarityBand",
    "RealNeighbours",
    "Scores",
    "SimilarityBand",
    "first_reasons",
]

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

    ENTERS_SCORES: ClassVar[tuple[str, ...]] = ("quantile", "area_margin")

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
        return FittedDegenerateMask(source=self, ranges=ranges, fitted_on=digest_rows(rows))

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
        low, high = column(scores, "mask_area_low"), column(scores, "mask_area_high")
        margin = self.source.area_margin
        checks = (
            (RejectReason.EMPTY_MASK, low == 0),
            (RejectReason.MASK_TOO_SMALL, low < 1 / margin),
            (RejectReason.MASK_TOO_LARGE, high > margin),
            (RejectReason.MASK_FRAGMENTED, column(scores, "mask_fragments") > self.source.max_fragments),
            (
                RejectReason.MASK_TOUCHES_BORDER,
                column(scores, "mask_border_excess") > self.source.max_border_contact,
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

    ENTERS_SCORES: ClassVar[tuple[str, ...]] = ()
    REFITTED: ClassVar[tuple[str, ...]] = ("quantile",)

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
            fitted_on=digest_rows(rows),
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
            (column(scores, "image_deviation") < self.deviation / source.margin)
            | (column(scores, "image_dynamic_range") < self.dynamic_range / source.margin)
            | (column(scores, "image_saturated") > self.saturated + source.saturation_margin)
            | (
                column(scores, "image_roughness")
                > self.roughness + source.roughness_margin * max(0.0, 1 - self.roughness)
            )
        )
        return [RejectReason.BLANK_IMAGE if hit else None for hit in blank]
