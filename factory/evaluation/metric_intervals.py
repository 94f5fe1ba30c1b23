"""Intervals of every metric of an arm, for tables; the comparison itself has those of the primary metric."""

from collections.abc import Callable
from typing import Any

import numpy as np

from factory.evaluation.arms import Arm
from factory.evaluation.scores import SEGMENTATION_COLUMNS, Scores
from factory.evaluation.statistics import Interval, bootstrap, hierarchical_bootstrap
from factory.evaluation.task_metrics import macro_scores, shot_accuracies

Named = dict[str, float]


def metric_intervals(
    scores: Scores, arm: Arm, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Accuracy, macro precision, recall and F1, many-, medium- and few-shot accuracy; or IoU and HD95.

    Means over task seeds; resampled over groups inside classes and, with several generators, over these. A metric that
    the rows do not define (no class of that kind) is left out.
    """
    rows = np.arange(len(scores.ids)) if scores.task == "classification" else np.flatnonzero(scores.areas > 0)
    if not len(rows):
        return {}
    values, labels = scores.of(arm)[:, :, rows], scores.labels[rows]
    known: dict[tuple[int, bytes], Named] = {}  # the metrics are asked for on the same draws

    def all_metrics(generator: int, drawn: np.ndarray) -> Named:
        key = generator, drawn.tobytes()
        if key not in known:
            known[key] = _metrics(scores, values[generator][:, drawn], labels[drawn])
        return known[key]

    whole = all_metrics(0, np.arange(len(rows)))
    options: dict[str, Any] = {"strata": labels if scores.task == "classification" else None,
                               "num_resamples": num_resamples, "seed": seed}  # fmt: skip
    groups = np.array(scores.groups)[rows]
    found = {}
    for name, value in whole.items():
        if not np.isfinite(value):
            continue
        statistic = _named(all_metrics, name)
        if arm.uses_generator:
            found[name] = hierarchical_bootstrap(
                statistic, groups, num_generator_seeds=len(values), **options
            )
        else:
            found[name] = bootstrap(lambda drawn, of=statistic: of(0, drawn), groups, **options)  # type: ignore[misc]
    return found


def _named(metrics: Callable[[int, np.ndarray], Named], name: str) -> Callable[[int, np.ndarray], float]:
    return lambda generator, drawn: metrics(generator, drawn)[name]


def _metrics(scores: Scores, values: np.ndarray, labels: np.ndarray) -> Named:
    """Means over models of values (T, n, V) on rows with these labels."""
    if scores.task == "segmentation":
        return {
            name: float(values[:, :, SEGMENTATION_COLUMNS.index(name)].mean()) for name in ("iou", "hd95")
        }
    made = []
    for model in values:
        called = model.argmax(axis=1)
        precision, recall, f1 = macro_scores(labels, called, len(scores.class_names))
        shots = shot_accuracies(labels, called, scores.train_counts)
        made.append(
            {"accuracy": float((called == labels).mean()), "macro_precision": precision, "macro_recall": recall,
             "macro_f1": f1, **{f"{kind}_shot_accuracy": value for kind, value in shots.items()}}
        )  # fmt: skip
    return {name: float(np.mean([one[name] for one in made])) for name in made[0]}
