"""What trained models said of the evaluation rows, and the metrics of it that arms are compared by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from factory.evaluation.arms import Arm, Task
from factory.evaluation.task_metrics import size_bounds, size_strata
from factory.predictors.examples import Examples

PRIMARY_METRIC: dict[Task, str] = {"classification": "auc", "segmentation": "dice"}
SEGMENTATION_COLUMNS = ("dice", "iou", "hd95", "false_positive")
"""Of the values of an evaluation row; the first three are NaN where the truth is empty, the last where it is not."""
SIZE_NAMES = ("small", "medium", "large")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What each trained model said of each evaluation row.

    Attributes:
        task: "classification": values are probabilities float64 (N, C). "segmentation": (N, 4), SEGMENTATION_COLUMNS.
        class_names: in label order.
        ids, groups: of the evaluation rows, (N,).
        labels: int64 (N,).
        areas: float64 (N,), lesion share of the native frame; NaN without a mask.
        folds: int64 (N,), outer fold each row was judged in; metrics are averaged over folds.
        arms: all arms.
        generator_seeds, task_seeds: crossed.
        values: (arm name, generator seed or None where the arm has no generator, task seed) → (N, V).
        train_counts: real training rows of each class, int64 (C,).
        train_areas: lesion shares of the real training rows, for size strata.
        subgroups: name → value of each row, beside class and lesion size.
        notes: what the reader should know.
    """

    task: Task
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray
    areas: np.ndarray
    folds: np.ndarray
    arms: tuple[Arm, ...]
    generator_seeds: tuple[int, ...]
    task_seeds: tuple[int, ...]
    values: Mapping[tuple[str, int | None, int], np.ndarray]
    train_counts: np.ndarray
    train_areas: np.ndarray
    subgroups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, arm: Arm) -> np.ndarray:
        """Values of an arm, float64 (G, T, N, V): G generator seeds (1 where it has no generator), T task seeds."""
        generators = self.generator_seeds if arm.uses_generator else (None,)
        return np.stack(
            [np.stack([self.values[arm.name, g, t] for t in self.task_seeds]) for g in generators]
        )

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            ValueError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"arm {name!r} is none of {', '.join(arm.name for arm in self.arms)}")


def pool_folds(parts: Sequence[Scores]) -> Scores:
    """Scores of the outer folds of a cross-validation as one: each row judged once, by models that never saw it.

    Raises:
        ValueError: folds with other arms, seeds or classes, or a row or group judged in two.
    """
    first = parts[0]
    seen: dict[str, int] = {}
    for number, part in enumerate(parts):
        for name in ("task", "class_names", "arms", "generator_seeds", "task_seeds"):
            if getattr(part, name) != getattr(first, name):
                raise ValueError(f"fold {number}: {name} differ from fold 0")
        for group in part.groups:
            if seen.setdefault(group, number) != number:
                raise ValueError(f"fold {number}: group {group} was judged in fold {seen[group]} too")
    return replace(
        first,
        ids=tuple(name for part in parts for name in part.ids),
        groups=tuple(name for part in parts for name in part.groups),
        labels=np.concatenate([part.labels for part in parts]),
        areas=np.concatenate([part.areas for part in parts]),
        folds=np.concatenate([np.full(len(part.ids), number) for number, part in enumerate(parts)]),
        values={key: np.concatenate([part.values[key] for part in parts]) for key in first.values},
        train_counts=np.rint(np.stack([part.train_counts for part in parts]).mean(axis=0)).astype(np.int64),
        train_areas=np.concatenate([part.train_areas for part in parts]),
        subgroups={
            name: tuple(value for part in parts for value in part.subgroups[name]) for name in first.subgroups
        },
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def mean_auc(
    labels: np.ndarray, probabilities: np.ndarray, folds: np.ndarray, classes: Sequence[int] | None = None
) -> float:
    """AUC averaged over models and folds; of the second of two classes, else the mean one-versus-rest.

    Args:
        labels: (n,) classes.
        probabilities: (M, n, C) of M models.
        folds: (n,) rows of one fold are ranked among themselves.
        classes: to average over where there are more than two; all by default.

    Returns:
        NaN where a class is missing from a fold.
    """
    num_classes = probabilities.shape[2]
    chosen = [1] if num_classes == 2 else range(num_classes) if classes is None else classes
    areas = []
    for fold in np.unique(folds).tolist():
        inside = folds == fold
        for c in chosen:
            positive = labels[inside] == c
            positives = int(positive.sum())
            negatives = len(positive) - positives
            if not positives or not negatives:
                return float("nan")
            ranks = stats.rankdata(probabilities[:, inside, c], axis=1)[:, positive].sum(axis=1)
            areas.append((ranks - positives * (positives + 1) / 2) / (positives * negatives))
    return float(np.mean(areas))


class PrimaryMetric:
    """AUC or mean Dice over models, on the rows where it is defined.

    Attributes:
        rows: int64 (n,), evaluation rows that count: all, or those with a lesion.
        classes: that an AUC is averaged over: all, or of a subgroup those that it has (small lesions are of no healthy class).
        groups, strata: of these, for resampling: each class stays in each fold.
        is_mean: whether the metric is a mean over rows.
    """

    def __init__(self, scores: Scores, rows: np.ndarray | None = None) -> None:
        chosen = np.ones(len(scores.ids), bool) if rows is None else rows
        if scores.task == "segmentation":
            chosen = chosen & (scores.areas > 0)
        self.rows = np.flatnonzero(chosen)
        self.is_mean = scores.task == "segmentation"
        self.classes = None if rows is None else np.unique(scores.labels[self.rows]).tolist()
        self.labels, self.folds = scores.labels[self.rows], scores.folds[self.rows]
        self.groups = np.array(scores.groups)[self.rows]
        self.strata = self.folds if self.is_mean else self.folds * len(scores.class_names) + self.labels

    def values(self, scores: Scores, arm: Arm) -> np.ndarray:
        """(G, T, n, V) of the metric's rows."""
        return scores.of(arm)[:, :, self.rows]

    def __call__(self, values: np.ndarray, rows: np.ndarray) -> float:
        """Of models' values (M, n, V) on row numbers; the mean over models."""
        if self.is_mean:
            return float(values[:, rows, 0].mean())
        return mean_auc(self.labels[rows], values[:, rows], self.folds[rows], self.classes)

    def is_defined(self) -> bool:
        """Whether there are two groups, and of each class in each fold one."""
        if len(np.unique(self.groups)) < 2:
            return False
        if self.is_mean:
            return True
        pairs = {(int(f), int(c)) for f, c in zip(self.folds, self.labels)}
        return (
            len(pairs)
            == len(np.unique(self.folds)) * len(np.unique(self.labels))
            > len(np.unique(self.folds))
        )


def subgroup_rows(scores: Scores) -> dict[str, np.ndarray]:
    """Name → bool (N,): lesion size by thirds of the real training lesions, class, and the caller's own."""
    found: dict[str, np.ndarray] = {}
    if (scores.train_areas > 0).sum() >= len(SIZE_NAMES) and (scores.areas > 0).any():
        strata = size_strata(np.nan_to_num(scores.areas), size_bounds(scores.train_areas))
        found |= {f"size {name}": strata == number for number, name in enumerate(SIZE_NAMES)}
    if scores.task == "segmentation":
        found |= {f"class {name}": scores.labels == c for c, name in enumerate(scores.class_names)}
    for name, values in scores.subgroups.items():
        found |= {f"{name} {value}": np.array(values) == value for value in sorted(set(values))}
    return found


def lesion_shares(examples: Examples) -> np.ndarray:
    """Share of the letterboxed frame that is lesion, float64 (N,); NaN without a mask.

    A lesion that vanishes in the letterbox counts as one px, so that a share above 0 always means a lesion.
    """
    shares = np.full(len(examples), np.nan)
    if examples.masks is None or examples.has_mask is None:
        return shares
    rows = np.flatnonzero(examples.has_mask)
    shares[rows] = (examples.masks[rows] > 0).mean(axis=(1, 2))
    for row, truth in enumerate(examples.native or ()):
        if truth.mask is not None and shares[row] == 0 and truth.mask.any():
            shares[row] = 1 / examples.size**2
    return shares
