"""How well a classifier or a segmenter does on real images: numpy in, floats out.

Labels are int (N,), probabilities float (N, C). Masks are (H, W), anything above 0 is lesion. A number that cannot
be defined on the rows at hand is NaN where the docstring says so, and an error elsewhere; never 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage, stats
from scipy.spatial import KDTree


def binary_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; NaN where a class is missing.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) larger means positive.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if labels.shape != scores.shape or labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"labels, scores: want 0 or 1 and numbers (N,), got {labels.shape} and {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores: some are not finite")
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = stats.rankdata(scores)[labels == 1].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def class_aucs(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Each class against the rest, float64 (C,); NaN for a class that no row or every row has."""
    labels, probabilities = _checked(labels, probabilities)
    columns = range(probabilities.shape[1])
    return np.array([binary_auc((labels == c).astype(int), probabilities[:, c]) for c in columns])


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Of the second class where there are two, else the mean over classes one-versus-rest.

    NaN where a class has no row: a mean over fewer classes is another metric.
    """
    areas = class_aucs(labels, probabilities)
    return float(areas[1] if len(areas) == 2 else areas.mean())


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts int64 (C, C), rows are true classes."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.ndim != 1 or values.dtype.kind not in "iu" or len(values) != len(labels) or not len(values):
            raise ValueError(f"{name}: want int (N ≥ 1,), got {values.dtype} {values.shape}")
        if values.min() < 0 or values.max() >= num_classes:
            raise ValueError(f"{name}: want 0 … {num_classes - 1}, got {values.min()} … {values.max()}")
    flat = np.bincount(labels.astype(np.int64) * num_classes + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def class_recalls(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Share of each class's rows that are found, float64 (C,); NaN for a class without rows."""
    counts = confusion_matrix(labels, predictions, num_classes)
    rows = counts.sum(axis=1)
    return np.where(rows > 0, np.diag(counts) / np.maximum(rows, 1), np.nan)


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Mean recall of the classes that have rows."""
    return float(np.nanmean(class_recalls(labels, predictions, num_classes)))


def macro_scores(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> tuple[float, float, float]:
    """Unweighted means over classes of precision, recall and F1.

    As scikit-learn's defaults: over the classes that occur in labels or predictions, 0 where a ratio is 0 / 0
    (a class that is never predicted has precision 0).
    """
    counts = confusion_matrix(labels, predictions, num_classes)
    hits, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    seen = true + predicted > 0
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(true, 1)
    f1 = 2 * hits / np.maximum(true + predicted, 1)
    return float(precision[seen].mean()), float(recall[seen].mean()), float(f1[seen].mean())


def shot_accuracies(
    labels: np.ndarray,
    predictions: np.ndarray,
    train_counts: Sequence[int] | np.ndarray,
    *,
    more_than: int = 100,
    fewer_than: int = 20,
) -> dict[str, float]:
    """Mean recall of classes with many, medium and few training rows (Liu et al. 2019: > 100, 20 … 100, < 20).

    Args:
        train_counts: (C,) real training rows of each class.

    Returns:
        "many", "medium", "few"; NaN where no class with test rows is of that kind.
    """
    counts = np.asarray(train_counts)
    if counts.ndim != 1 or (counts < 0).any() or not 0 < fewer_than <= more_than:
        raise ValueError(
            f"train_counts: want counts (C,) and 0 < {fewer_than} ≤ {more_than}, got {train_counts}"
        )
    recalls = class_recalls(labels, predictions, len(counts))
    kinds = {"many": counts > more_than, "few": counts < fewer_than}
    kinds["medium"] = ~(kinds["many"] | kinds["few"])
    held = {name: recalls[kind & np.isfinite(recalls)] for name, kind in kinds.items()}
    return {
        name: float(held[name].mean()) if len(held[name]) else float("nan")
        for name in ("many", "medium", "few")
    }


def expected_calibration_error(
    labels: np.ndarray,
    probabilities: np.ndarray,
    *,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    """Mean over bins of |accuracy − confidence| of the most probable class, weighted by rows (Guo et al. 2017).

    Args:
        binning: "width" cuts 0 … 1 into equal intervals, closed on the right; "mass" at quantiles of the
            confidences, rows of equal confidence staying together (Nixon et al. 2019).
    """
    labels, probabilities = _checked(labels, probabilities)
    if num_bins < 1 or binning not in ("width", "mass"):
        raise ValueError(f"num_bins, binning: want ≥ 1 and 'width' or 'mass', got {num_bins} and {binning!r}")
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    if binning == "width":
        bins = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidence, side="left")
    else:
        edges = np.quantile(confidence, np.linspace(0, 1, num_bins + 1)[1:-1], method="inverted_cdf")
        bins = np.searchsorted(edges, confidence, side="left")
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared error of the probabilities: summed over classes (Brier 1950), halved where there are two.

    The half makes the two-class value the usual (p − y)², 0 … 1; with more classes it is 0 … 2.
    """
    labels, probabilities = _checked(labels, probabilities)
    target = np.eye(probabilities.shape[1])[labels]
    total = float(((probabilities - target) ** 2).sum(axis=1).mean())
    return total / 2 if probabilities.shape[1] == 2 else total


def threshold_at_specificity(labels: np.ndarray, scores: np.ndarray, specificity: float) -> float:
    """The lowest threshold with at least this specificity, positive meaning score ≥ threshold.

    Fit it on validation rows and apply it to test rows with `sensitivity_specificity`. Infinity where only calling
    every row negative is specific enough.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if not 0 < specificity <= 1:
        raise ValueError(f"specificity: want a share above 0 and at most 1, got {specificity}")
    if not np.isfinite(binary_auc(labels, scores)):
        raise ValueError("labels: want both classes")
    negatives = np.sort(scores[labels == 0])
    candidates = np.append(np.unique(scores), np.inf)
    specific = np.searchsorted(negatives, candidates, side="left") / len(negatives)
    return float(candidates[specific >= specificity - 1e-12][0])


def sensitivity_specificity(labels: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[float, float]:
    """Shares of positives with score ≥ threshold and of negatives below it; NaN for a class without rows."""
    labels, called = np.asarray(labels), np.asarray(scores, np.float64) >= threshold
    found, passed = called[labels == 1], ~called[labels == 0]
    return (
        float(found.mean()) if len(found) else float("nan"),
        float(passed.mean()) if len(passed) else float("nan"),
    )


def sensitivity_at_specificity(labels: np.ndarray, scores: np.ndarray, specificity: float) -> float:
    """Highest sensitivity on the ROC curve at this specificity or more; its threshold is fitted on these rows."""
    return sensitivity_specificity(labels, scores, threshold_at_specificity(labels, scores, specificity))[0]


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(f"labels: want int (N ≥ 1,), got {labels.dtype} {labels.shape}")
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or probabilities.shape[1] < 2:
        raise ValueError(f"probabilities: want ({len(labels)}, C ≥ 2), got {probabilities.shape}")
    off = ~np.isfinite(probabilities).all(axis=1) | (np.abs(probabilities.sum(axis=1) - 1) > 1e-3)
    off |= (probabilities < 0).any(axis=1)
    if off.any():
        row = int(np.flatnonzero(off)[0])
        raise ValueError(f"probabilities: row {row} is no distribution (apply softmax): {probabilities[row]}")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels: want 0 … {probabilities.shape[1] - 1}, got {labels.min()} … {labels.max()}"
        )
    return labels.astype(np.int64), probabilities


def classification_report(
    labels: np.ndarray, probabilities: np.ndarray, *, train_counts: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """Every classification metric by name, for a table or MLflow; `recall_class_0` … are per class.

    Args:
        train_counts: (C,) real training rows of each class, for many, medium and few shot.
    """
    labels, probabilities = _checked(labels, probabilities)
    num_classes = probabilities.shape[1]
    if len(np.asarray(train_counts)) != num_classes:
        raise ValueError(f"train_counts: want one of each of {num_classes} classes, got {train_counts}")
    predictions = probabilities.argmax(axis=1)
    precision, recall, f1 = macro_scores(labels, predictions, num_classes)
    shots = shot_accuracies(labels, predictions, train_counts)
    recalls = class_recalls(labels, predictions, num_classes)
    return {
        "auc": auc(labels, probabilities),
        "accuracy": float((predictions == labels).mean()),
        "balanced_accuracy": balanced_accuracy(labels, predictions, num_classes),
        "macro_f1": f1,
        "macro_precision": precision,
        "macro_recall": recall,
        **{f"{name}_shot_accuracy": value for name, value in shots.items()},
        "ece_width": expected_calibration_error(labels, probabilities),
        "ece_mass": expected_calibration_error(labels, probabilities, binning="mass"),
        "brier": brier_score(labels, probabilities),
        **{f"recall_class_{c}": float(value) for c, value in enumerate(recalls)},
    }


def _masks(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, two = np.asarray(truth) > 0, np.asarray(prediction) > 0
    if one.ndim != 2 or one.shape != two.shape:
        raise ValueError(f"masks: want two of one shape (H, W), got {one.shape} and {two.shape}")
    if not one.any():
        raise ValueError("masks: the truth is empty; such images count in the false-positive rate, not here")
    return one, two


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of a truth that is not empty; an empty prediction scores 0."""
    one, two = _masks(truth, prediction)
    return float(2 * (one & two).sum() / (one.sum() + two.sum()))


def iou(truth: np.ndarray, prediction: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of a truth that is not empty; an empty prediction scores 0."""
    one, two = _masks(truth, prediction)
    return float((one & two).sum() / (one | two).sum())


def _edge(mask: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Places of edge pixels (those with a 4-neighbour outside, the frame's rim included), (P, 2)."""
    return np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(spacing, np.float64)


def _spacing(spacing: tuple[float, float] | None) -> tuple[float, float]:
    if spacing is None:
        return (1.0, 1.0)
    if len(spacing) != 2 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing: want (row, column) mm per px, both positive, got {spacing}")
    return (float(spacing[0]), float(spacing[1]))


def _edge_distances(
    one: np.ndarray, two: np.ndarray, spacing: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    edges = _edge(one, spacing), _edge(two, spacing)
    return KDTree(edges[1]).query(edges[0])[0], KDTree(edges[0]).query(edges[1])[0]


def hausdorff95(
    truth: np.ndarray, prediction: np.ndarray, *, spacing: tuple[float, float] | None = None
) -> float:
    """The larger of the two 95th percentiles of edge-to-edge distances, MONAI's convention.

    An empty prediction scores the image diagonal, and is to be counted (`SegmentationReport.num_empty`).

    Args:
        spacing: (row, column) mm per px; None gives px.
    """
    one, two = _masks(truth, prediction)
    scale = _spacing(spacing)
    if not two.any():
        return float(np.hypot(one.shape[0] * scale[0], one.shape[1] * scale[1]))
    return float(max(np.percentile(distances, 95) for distances in _edge_distances(one, two, scale)))


def surface_dice(
    truth: np.ndarray, prediction: np.ndarray, *, tolerance: float, spacing: tuple[float, float] | None = None
) -> float:
    """Normalised surface distance: share of both edges within `tolerance` of the other (Nikolov et al. 2018).

    Edge pixels are counted, not weighted by length. An empty prediction scores 0.

    Args:
        tolerance: in mm with `spacing`, else in px; that of the annotators' disagreement.
    """
    one, two = _masks(truth, prediction)
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: want a number ≥ 0, got {tolerance}")
    if not two.any():
        return 0.0
    near = [distances <= tolerance for distances in _edge_distances(one, two, _spacing(spacing))]
    return float(sum(n.sum() for n in near) / sum(len(n) for n in near))


@dataclass(frozen=True, kw_only=True)
class SegmentationReport:
    """Scores of each image at native size; NaN where the truth is empty.

    Attributes:
        dice, iou, hd95, surface_dice: float64 (N,).
        areas: lesion px of the truth, int64 (N,).
        unit: of hd95, "mm" or "px".
        num_empty: lesion images with an empty prediction, whose hd95 is the image diagonal.
        num_without_lesion: images with an empty truth.
        false_positive_rate: share of those with any predicted pixel; NaN where there are none.
    """

    dice: np.ndarray
    iou: np.ndarray
    hd95: np.ndarray
    surface_dice: np.ndarray
    areas: np.ndarray
    unit: str
    num_empty: int
    num_without_lesion: int
    false_positive_rate: float

    def means(self, rows: np.ndarray | None = None) -> dict[str, float]:
        """Mean scores of the lesion images among `rows` (bool (N,), for example a size stratum); all if None."""
        chosen = (self.areas > 0) & (np.ones(len(self.areas), bool) if rows is None else rows)
        names = ("dice", "iou", "hd95", "surface_dice")
        return {
            name: float(getattr(self, name)[chosen].mean()) if chosen.any() else float("nan")
            for name in names
        }


def segmentation_report(
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    *,
    tolerance: float,
    spacings: Sequence[tuple[float, float] | None] | None = None,
) -> SegmentationReport:
    """Scores of every image.

    Args:
        truths, predictions: masks of one shape per image.
        tolerance: of the surface Dice, in mm or px as the spacings say.
        spacings: (row, column) mm per px of each image; None, or all None, for px.

    Raises:
        ValueError: lengths differ, or only some images have a spacing (their distances have no common unit).
    """
    if len(truths) != len(predictions) or not len(truths):
        raise ValueError(f"predictions: want one for each of {len(truths)} truths, got {len(predictions)}")
    scales = [None] * len(truths) if spacings is None else list(spacings)
    unknown = [row for row, scale in enumerate(scales) if scale is None]
    if len(scales) != len(truths) or 0 < len(unknown) < len(scales):
        raise ValueError(
            f"spacings: want one for each of {len(truths)} images or none, got {len(scales)} with "
            f"{len(unknown)} unknown (first: row {unknown[0] if unknown else '-'}); report px, or those in mm apart"
        )
    scorers: dict[str, Callable[[np.ndarray, np.ndarray, tuple[float, float] | None], float]] = {
        "dice": lambda one, two, scale: dice(one, two),
        "iou": lambda one, two, scale: iou(one, two),
        "hd95": lambda one, two, scale: hausdorff95(one, two, spacing=scale),
        "surface_dice": lambda one, two, scale: surface_dice(one, two, tolerance=tolerance, spacing=scale),
    }
    scores = {name: np.full(len(truths), np.nan) for name in scorers}
    areas = np.array([int((np.asarray(truth) > 0).sum()) for truth in truths])
    called = np.array([bool((np.asarray(prediction) > 0).any()) for prediction in predictions])
    for row in np.flatnonzero(areas).tolist():
        for name, scorer in scorers.items():
            scores[name][row] = scorer(truths[row], predictions[row], scales[row])
    healthy = areas == 0
    return SegmentationReport(
        **scores,
        areas=areas,
        unit="px" if unknown else "mm",
        num_empty=int((~healthy & ~called).sum()),
        num_without_lesion=int(healthy.sum()),
        false_positive_rate=float(called[healthy].mean()) if healthy.any() else float("nan"),
    )


def size_bounds(train_areas: Sequence[float] | np.ndarray, *, num_strata: int = 3) -> tuple[float, ...]:
    """Inner quantiles of training lesions' areas (empty masks left out): the bounds of `size_strata`."""
    areas = np.asarray(train_areas, np.float64)
    areas = areas[areas > 0]
    if num_strata < 2 or len(areas) < num_strata:
        raise ValueError(
            f"train_areas: want at least {max(2, num_strata)} lesions and strata ≥ 2, got {len(areas)}"
        )
    return tuple(np.quantile(areas, np.arange(1, num_strata) / num_strata).tolist())


def size_strata(areas: Sequence[float] | np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """Stratum of each lesion, int64 (N,): 0 smallest … len(bounds) largest; −1 for an empty mask.

    Bounds come from training rows; areas of both are in one unit (a share of the frame, or mm²).
    """
    values = np.asarray(areas, np.float64)
    return np.where(values > 0, np.searchsorted(np.asarray(bounds), values, side="right"), -1)
