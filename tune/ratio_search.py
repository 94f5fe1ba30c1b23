"""The search over ratios: which trials there are, and how one is trained. Runs without Ray; `ratio_tune.py` adds it.

A trial is one training: a point (an arm and a filter of the synthetic rows), a model, a task seed and a fold. In an
Optuna search it is one vector of per-class ratios, trained over all seeds and folds. The test split is never read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.evaluation.arms import Arm, make_training_set
from factory.evaluation.downstream import fit_and_judge
from factory.evaluation.leakage import check_disjoint, check_parts_disjoint
from factory.evaluation.scores import lesion_shares, mean_auc
from factory.predictors.examples import Examples
from schemas.identity import canonical, hash_parts

if TYPE_CHECKING:
    from factory.predictors.fitted import Predictor
    from factory.predictors.settings import FitSettings

REAL_ONLY = Arm(kind="real")


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """Rows of one fold: disjoint parts train, stop the training early, and score it.

    Attributes:
        real: real training rows.
        stop: validation rows that choose the step.
        score: rows that judge the point.
        synthetic: synthetic rows under each filter, in the order of drawing.
    """

    real: Examples
    stop: Examples
    score: Examples
    synthetic: tuple[Examples, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place on a curve: an arm under one of the filters.

    Attributes:
        arm: what trains.
        filter_index: which filter of the synthetic rows; 0 for arms without them.
        is_candidate: whether it may be chosen; a baseline is only shown.
    """

    arm: Arm
    filter_index: int = 0
    is_candidate: bool = True


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of the grid; numbers are positions in the search."""

    model: int
    point: int
    seed: int
    fold: int


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A finished, stopped or failed training.

    Attributes:
        model: name; point: position in the search's points; arm: its name; seed, fold: of the training.
        score: primary metric on the scoring rows; None where a scheduler stopped it.
        best_step, seconds, weights_digest, rows_digest, stop_score: see `Judged`.
    """

    model: str
    point: int
    arm: str
    seed: int
    fold: int
    score: float | None
    stop_score: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    weights_digest: str = ""
    rows_digest: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchData:
    """All that a trial needs beside its configuration; goes to the workers once.

    Attributes:
        folds: rows of each fold.
        points: of the grid.
        models: predictors by name.
        settings: of every training.
        device: torch device.
        num_threads: of torch in a trial.
    """

    folds: tuple[Fold, ...]
    points: tuple[Point, ...]
    models: Mapping[str, "Predictor"]
    settings: "FitSettings"
    device: str = "cpu"
    num_threads: int = 1

    def trials(self, num_seeds: int) -> list[Trial]:
        """Every model × point × seed × fold; the folds of a point come last, so that curves fill evenly."""
        return [
            Trial(model=model, point=point, seed=seed, fold=fold)
            for seed in range(num_seeds)
            for fold in range(len(self.folds))
            for model in range(len(self.models))
            for point in range(len(self.points))
        ]

    def check(self, wheres: Sequence[str] = ()) -> tuple[str, ...]:
        """Look for leaks and missing rows in every training set, before compute is spent.

        Args:
            wheres: the filters that `filter_index` counts, for messages.

        Returns:
            What the reader of the result should know.

        Raises:
            ValueError: naming the fold and the rows, or a network that cannot be built at this size.
        """
        real = self.folds[0].real
        for predictor in self.models.values():
            predictor.build(real.num_classes, real.channels, real.size)
        notes: dict[str, None] = {}
        for number, fold in enumerate(self.folds):
            parts = {"train": fold.real, "early stopping": fold.stop, f"fold {number}": fold.score}
            check_parts_disjoint(parts)
            _check_scorable(fold.score, next(iter(self.models.values())).task, number)
            for point in self.points:
                try:
                    training = make_training_set(
                        point.arm, fold.real, fold.synthetic[point.filter_index], seed=0
                    )
                except ValueError as fault:
                    where = wheres[point.filter_index] if point.filter_index < len(wheres) else ""
                    behind = f", behind --where {where!r}" if where else ""
                    raise ValueError(f"fold {number}{behind}: {fault}") from fault
                held_out = {"early stopping": fold.stop, f"fold {number}": fold.score}
                check_disjoint(training.examples, **held_out)
                notes |= dict.fromkeys(training.notes)
        return tuple(notes)

    def identity(self) -> str:
        """Hash of all that decides the results: rows, points, models, settings."""
        rows = [
            part.content_digest()
            for fold in self.folds
            for part in (fold.real, fold.stop, fold.score, *fold.synthetic)
        ]
        what = canonical((dict(self.models), self.settings, self.points))
        return hash_parts(json.dumps(what, sort_keys=True), *rows)


def _check_scorable(rows: Examples, task: str, fold: int) -> None:
    if task == "segmentation":
        if not (lesion_shares(rows) > 0).any():
            raise ValueError(f"fold {fold}: no row with a lesion to score Dice on; use fewer folds")
    elif (rows.counts() == 0).any():
        lacking = rows.class_names[int((rows.counts() == 0).argmax())]
        raise ValueError(f"fold {fold}: no row of class {lacking}, so AUC is undefined; use fewer folds")


def primary_score(rows: Examples, values: np.ndarray, task: str) -> float:
    """AUC of the rows, or mean Dice of those with a lesion."""
    if task == "classification":
        return mean_auc(rows.labels, values[None], np.zeros(len(rows), np.int64))
    return float(values[lesion_shares(rows) > 0, 0].mean())


def train_trial(
    data: SearchData,
    trial: Trial,
    *,
    arm: Arm | None = None,
    on_progress: Callable[..., Any] | None = None,
) -> TrialRecord:
    """Train and score one trial: a function of its arguments alone, the same under Tune and without.

    Args:
        arm: instead of the point's own, for a vector that is no point of the grid.
        on_progress: see `fit`.
    """
    point, fold = data.points[trial.point], data.folds[trial.fold]
    used = point.arm if arm is None else arm
    name, predictor = list(data.models.items())[trial.model]
    judged = fit_and_judge(
        predictor,
        data.settings,
        make_training_set(used, fold.real, fold.synthetic[point.filter_index], seed=trial.seed),
        validation=fold.stop,
        evaluation=fold.score,
        seed=trial.seed,
        device=data.device,
        on_progress=on_progress,
    )
    return TrialRecord(
        model=name,
        point=trial.point,
        arm=used.name,
        seed=trial.seed,
        fold=trial.fold,
        score=primary_score(fold.score, judged.values, predictor.task),
        stop_score=judged.stop_score,
        best_step=judged.best_step,
        seconds=judged.seconds,
        weights_digest=judged.weights_digest,
        rows_digest=judged.rows_digest,
    )
