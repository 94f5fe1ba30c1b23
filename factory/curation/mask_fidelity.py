"""Mask fidelity: an image is rejected where a segmenter of real images does not find in it the mask that was asked for.

The segmenter (`factory train --part segmenter`) is no better on synthetic images than on real ones, so its Dice on a
synthetic image is judged against its own out-of-fold Dice on real training images of the same class and lesion size: an
image passes unless it does worse than nearly all of them. No number is set by hand.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from factory import geometry
from factory.curation.filter_batch import FilterBatch, Scores, column
from factory.imaging import letterbox
from factory.predictors.segmenter_folder import RowDice, SegmenterRecord, dice_scores, read_record
from schemas.sample import RejectReason

MASK_SCORES = ("mask_dice", "mask_fidelity", "segmented_area", "size_quartile")
NUM_QUARTILES = 4
_ALL = -2
"""Stratum of all lesions of a class."""
_EMPTY = -1
"""Stratum of images without a lesion."""
_ANY_CLASS = ""


@dataclass(frozen=True, kw_only=True)
class MaskFidelity:
    """Rejects an image whose re-segmented mask agrees worse with the requested one than nearly all real images' do.

    Attributes:
        quantile: an image is rejected where less than this share of the comparable real training images was segmented
            as badly or worse; so about this share of faithful images is rejected as well.
        min_dice: reject below this Dice too, whatever real images do; None for no such bound.
        min_rows: real images that a class and size quartile must have to be compared with; below, all lesions of the
            class are, and below that all lesions.
    """

    ENTERS_SCORES: ClassVar[tuple[str, ...]] = ("min_rows",)

    quantile: float = 0.05
    min_dice: float | None = None
    min_rows: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"MaskFidelity.quantile: want a share in 0 … 1, got {self.quantile}")
        if self.min_dice is not None and not 0 <= self.min_dice <= 1:
            raise ValueError(f"MaskFidelity.min_dice: want 0 … 1 or None, got {self.min_dice}")
        if self.min_rows < 1:
            raise ValueError(f"MaskFidelity.min_rows: want at least 1, got {self.min_rows}")

    def fit(self, record: SegmenterRecord, folder: str) -> "FittedMaskFidelity":
        """Calibrate by the out-of-fold Dice of the segmenter in `folder`.

        Raises:
            ValueError: it was measured on fewer than `min_rows` real lesions.
        """
        lesions = [row for row in record.out_of_fold if row.dice is not None]
        if len(lesions) < self.min_rows:
            raise ValueError(
                f"{folder}: the segmenter was measured on {len(lesions)} real lesions, and MaskFidelity.min_rows = "
                f"{self.min_rows} are wanted to calibrate on; use more real images with masks"
            )
        bounds, references = {}, {}
        for name in (_ANY_CLASS, *record.class_names):
            rows = [row for row in record.out_of_fold if name in (_ANY_CLASS, row.label_name)]
            areas = np.array([row.area for row in rows if row.dice is not None])
            inner = np.arange(1, NUM_QUARTILES) / NUM_QUARTILES
            bounds[name] = tuple(np.quantile(areas, inner).tolist()) if len(areas) >= NUM_QUARTILES else ()
            for stratum, values in _by_stratum(rows, bounds[name]).items():
                references[name, stratum] = tuple(sorted(values))
        return FittedMaskFidelity(
            source=self,
            class_names=record.class_names,
            bounds=bounds,
            references=references,
            segmenter=folder,
            segmenter_digest=record.weights_digest,
            architecture=record.architecture,
            fitted_on=record.rows_digest,
        )

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """MASK_NOT_OBEYED where a bound is left; None where nothing was asked for or nothing can be compared with."""
        bad = column(scores, "mask_fidelity") < self.quantile  # NaN is not below
        if self.min_dice is not None:
            bad = bad | (column(scores, "mask_dice") < self.min_dice)
        return [RejectReason.MASK_NOT_OBEYED if hit else None for hit in bad]


def _by_stratum(rows: Sequence[RowDice], bounds: Sequence[float]) -> dict[int, list[float]]:
    """What real rows reached: Dice of each size quartile and of all lesions; minus the false area of empty masks."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.dice is None:
            found.setdefault(_EMPTY, []).append(-row.segmented_area)
            continue
        found.setdefault(_ALL, []).append(row.dice)
        if bounds:
            found.setdefault(_quartile(row.area, bounds), []).append(row.dice)
    return found


def _quartile(area: float, bounds: Sequence[float]) -> int:
    """0 smallest … 3 largest; −1 for no lesion."""
    return _EMPTY if area <= 0 else int(np.searchsorted(bounds, area, side="right"))


@dataclass(frozen=True, kw_only=True)
class FittedMaskFidelity:
    """`MaskFidelity` with the real images' results. Scores of a row with a requested mask, else NaN:

    - mask_dice: of the requested and the re-segmented mask; NaN where an empty mask was asked for.
    - segmented_area: fraction of the frame that the segmenter takes for lesion.
    - mask_fidelity: share of comparable real images that the segmenter does no better on, 0 … 1.
    - size_quartile: of the requested lesion among the real ones of its class, 0 … 3; −1 for none.

    Attributes:
        bounds: inner quartiles of the real lesions' areas, by class name; "" is all classes.
        references: sorted results of the real images by (class name, stratum).
        segmenter, segmenter_digest, architecture: folder, weights and network of the segmenter.
    """

    source: MaskFidelity
    class_names: tuple[str, ...]
    bounds: Mapping[str, tuple[float, ...]]
    references: Mapping[tuple[str, int], tuple[float, ...]]
    segmenter: str
    segmenter_digest: str
    architecture: str
    fitted_on: str

    def score(self, batch: FilterBatch) -> dict[str, np.ndarray]:
        """See the class.

        Raises:
            ValueError: the batch was not segmented.
        """
        if batch.segmented_masks is None:
            raise ValueError(
                "MaskFidelity: the batch has no segmented_masks; run the segmenter over its images"
            )
        rows = [
            self._scores(requested, segmented, self.class_names[int(label)])
            for requested, segmented, label in zip(batch.requested_masks, batch.segmented_masks, batch.labels)
        ]
        values = np.array(rows, np.float32).reshape(-1, len(MASK_SCORES))
        return {name: values[:, k].copy() for k, name in enumerate(MASK_SCORES)}

    def _scores(self, requested: np.ndarray | None, segmented: np.ndarray, label: str) -> tuple[float, ...]:
        found_area = geometry.area(segmented) / segmented.size
        if requested is None:
            return np.nan, np.nan, found_area, np.nan
        frame = len(segmented)
        if requested.shape != segmented.shape:
            requested = letterbox(requested, frame, is_mask=True)
        dice = float(dice_scores(requested[None], segmented[None])[0])
        area = geometry.area(requested) / requested.size
        stratum = _quartile(area, self.bounds[label] or self.bounds[_ANY_CLASS])
        reference = self.reference(label, stratum)
        reached = -found_area if stratum == _EMPTY else dice
        share = (
            np.searchsorted(reference, reached, side="right") / len(reference) if len(reference) else np.nan
        )
        return dice, float(share), found_area, float(stratum)

    def reference(self, label: str, quartile: int) -> tuple[float, ...]:
        """Sorted results of the real images that a row of this class and size quartile (−1: no lesion) is compared with.

        Of images without a lesion, minus the area segmented. Empty where there are too few of these.
        """
        if quartile == _EMPTY:
            wanted = [(label, _EMPTY), (_ANY_CLASS, _EMPTY)]
        else:
            wanted = [(label, quartile), (label, _ALL), (_ANY_CLASS, _ALL)]
        for key in wanted:
            found = self.references.get(key, ())
            if len(found) >= self.source.min_rows:
                return found
        return ()

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """As `MaskFidelity.verdict`."""
        return self.source.verdict(scores)

    def thresholds(self) -> dict[str, list[float]]:
        """Least Dice that passes in each size quartile, per class with lesions."""
        return {
            name: [self._threshold(self.reference(name, quartile)) for quartile in range(NUM_QUARTILES)]
            for name in self.class_names
            if self.references.get((name, _ALL))
        }

    def _threshold(self, reference: Sequence[float]) -> float:
        rank = int(np.ceil(self.source.quantile * len(reference) - 1e-9))
        return max(reference[max(rank - 1, 0)], self.source.min_dice or 0.0)

    def record(self) -> dict[str, Any]:
        """Whose weights judge, and calibrated how, as plain data: provenance of the scores."""
        return {
            "segmenter": self.segmenter,
            "segmenter_digest": self.segmenter_digest,
            "architecture": self.architecture,
            "fitted_on": self.fitted_on,
            "quantile": self.source.quantile,
            "min_dice": self.source.min_dice,
            "thresholds": self.thresholds(),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "FittedMaskFidelity":
        """From `record()`, for verdicts on stored scores alone: without the real images' results it scores nothing."""
        return cls(
            source=MaskFidelity(quantile=record["quantile"], min_dice=record["min_dice"]),
            class_names=(),
            bounds={},
            references={},
            segmenter=record["segmenter"],
            segmenter_digest=record["segmenter_digest"],
            architecture=record["architecture"],
            fitted_on=record["fitted_on"],
        )

    def notes(self) -> list[str]:
        """Where the gate cannot judge, in words."""
        return [
            f"mask fidelity does not judge {name} of size quartile {quartile + 1}: the segmenter misses more than "
            f"{self.source.quantile:.0%} of such real lesions altogether"
            for name, values in self.thresholds().items()
            for quartile, value in enumerate(values)
            if value <= 0
        ]


def load_mask_fidelity(
    source: MaskFidelity, folder: str, class_names: Sequence[str], real: str
) -> FittedMaskFidelity:
    """The filter, calibrated by the segmenter in `folder`.

    Args:
        source: the filter.
        folder: what `factory train --part segmenter` wrote.
        class_names: of the real table.
        real: content digest of its train split: rows outside it have no say in a gate.

    Raises:
        FileNotFoundError, ValueError: no segmenter there, damaged, of other rows or classes, or measured on too few.
    """
    record = read_record(Path(folder))
    if record.class_names != tuple(class_names):
        raise ValueError(
            f"{folder}: the segmenter knows the classes {', '.join(record.class_names)}, the real table has "
            f"{', '.join(class_names)}; train one on this table"
        )
    if record.real != real:
        raise ValueError(
            f"{folder}: the segmenter was trained on other real rows than the training split of the real table; train one "
            "on that table (`factory train --part segmenter`)"
        )
    return source.fit(record, str(Path(folder).expanduser().resolve()))


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Rows of one class and size quartile (−1: empty masks), and how many of them obey the mask."""

    label_name: str
    size_quartile: int
    rows: int
    obeyed: int

    def line(self) -> str:
        """In words."""
        size = "no lesion" if self.size_quartile < 0 else f"size quartile {self.size_quartile + 1}"
        return f"{self.label_name}, {size}: {self.obeyed} of {self.rows} obey the mask ({self.obeyed / self.rows:.0%})"


def acceptance(
    label_names: Sequence[str], quartiles: np.ndarray, verdicts: Sequence[RejectReason | str | None]
) -> list[Acceptance]:
    """Acceptance by class and size quartile; rows without a requested mask (quartile NaN) are left out."""
    rows: Counter[tuple[str, int]] = Counter()
    obeyed: Counter[tuple[str, int]] = Counter()
    for name, quartile, verdict in zip(label_names, quartiles, verdicts, strict=True):
        if np.isnan(quartile):
            continue
        rows[name, int(quartile)] += 1
        obeyed[name, int(quartile)] += verdict is None
    return [
        Acceptance(label_name=name, size_quartile=quartile, rows=count, obeyed=obeyed[name, quartile])
        for (name, quartile), count in sorted(rows.items())
    ]
