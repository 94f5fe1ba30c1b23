"""From the trials of a ratio search to an answer: curves with intervals, the chosen point, and first the power.

The choice is the one-standard-error rule over the folds (seeds averaged within a fold), ties to the smaller ratio, real
data only included. Curves are exploratory: only a test evaluation of the chosen point says whether it helps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from factory.evaluation.selection import minimum_detectable_effect, one_standard_error
from tune.ratio_plot import plot
from tune.ratio_search import Point, TrialRecord

RESULT_FILE, PLOT_FILE, SUMMARY_FILE = "results.json", "curve.png", "summary.txt"


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One point of a curve.

    Attributes:
        name: of the arm.
        ratio: synthetic rows per real row in all; infinity for synthetic only.
        per_class: (class, ratio) pairs where it is no single ratio.
        only: synthetic rows only.
        folds: mean score over seeds in each fold; empty where a scheduler stopped a trial.
        num_trainings: behind the mean, folds × seeds; 0 where stopped.
        mean, standard_error: over folds; NaN where stopped.
        low, high: 95 % interval of the mean over folds, Student's t, within 0 … 1 as AUC and Dice are.
        difference: mean minus that of real data only.
    """

    name: str
    ratio: float
    per_class: tuple[tuple[str, float], ...]
    only: bool
    folds: tuple[float, ...]
    num_trainings: int
    mean: float
    standard_error: float
    low: float
    high: float
    difference: float

    @property
    def is_complete(self) -> bool:
        """Whether every fold and seed was trained to the end."""
        return bool(self.folds)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The points of one model under one filter.

    Attributes:
        model, where: which.
        points: candidates, smaller ratios first.
        baselines: shown beside, never chosen.
        chosen: name of the point that the rule takes.
        best: name of the point with the highest mean.
        threshold: means of at least this count as good as the best.
        minimum_detectable_effect: change against real data only that these folds can show, at 5 % and power 80 %.
    """

    model: str
    where: str
    points: tuple[CurvePoint, ...]
    baselines: tuple[CurvePoint, ...]
    chosen: str
    best: str
    threshold: float
    minimum_detectable_effect: float

    def point(self, name: str) -> CurvePoint:
        """The candidate of that name."""
        return next(point for point in self.points if point.name == name)


@dataclass(frozen=True, kw_only=True)
class RatioAnswer:
    """What the search says.

    Attributes:
        metric: of the scores, larger is better.
        curves: of every model and filter.
        chosen: the curve whose chosen point has the highest mean: the first of equals.
        notes: what the reader should know.
    """

    metric: str
    curves: tuple[Curve, ...]
    chosen: Curve
    notes: tuple[str, ...]

    @property
    def chosen_point(self) -> CurvePoint:
        """The point to evaluate on the test split."""
        return self.chosen.point(self.chosen.chosen)


def answer(
    metric: str,
    points: Sequence[Point],
    ratios: Sequence[float],
    trials: Sequence[TrialRecord],
    *,
    wheres: Sequence[str],
    notes: Sequence[str] = (),
) -> RatioAnswer:
    """Curves and choice.

    Args:
        points: of the search.
        ratios: synthetic rows per real row of each point, averaged over folds.
        trials: all of them.
        wheres: filters that `filter_index` counts.

    Raises:
        ValueError: real data only was not trained, or in fewer than two folds.
    """
    curves = []
    for model in dict.fromkeys(trial.model for trial in trials):
        mine = [trial for trial in trials if trial.model == model]
        for number, where in enumerate(wheres):
            curves.append(_curve(model, where, number, points, ratios, mine))
    means = [curve.point(curve.chosen).mean for curve in curves]
    return RatioAnswer(
        metric=metric, curves=tuple(curves), chosen=curves[int(np.argmax(means))], notes=tuple(notes)
    )


def _curve(
    model: str,
    where: str,
    filter_index: int,
    points: Sequence[Point],
    ratios: Sequence[float],
    trials: Sequence[TrialRecord],
) -> Curve:
    real = next(n for n, point in enumerate(points) if point.arm.kind == "real")
    reference = _fold_means(trials, real)
    if len(reference) < 2:
        raise ValueError(
            "real data only: want scores of at least two folds; a search needs two folds or more"
        )
    shown: list[CurvePoint] = []
    candidates: list[CurvePoint] = []
    for number, point in enumerate(points):
        if point.arm.uses_generator and point.filter_index != filter_index:
            continue
        made = _point(number, point, ratios[number], trials, reference)
        (candidates if point.is_candidate else shown).append(made)
    complete = _one_per_ratio([p for p in candidates if p.is_complete])
    rule = one_standard_error([p.ratio for p in complete], np.array([p.folds for p in complete]))
    by_ratio = {p.ratio: p for p in complete}
    return Curve(
        model=model,
        where=where,
        points=tuple(sorted(candidates, key=lambda p: p.ratio)),
        baselines=tuple(shown),
        chosen=by_ratio[rule.ratio].name,
        best=by_ratio[rule.best].name,
        threshold=rule.threshold,
        minimum_detectable_effect=_detectable(complete, reference),
    )


def _fold_means(trials: Sequence[TrialRecord], point: int) -> list[float]:
    """Mean over seeds of each fold; empty where a trial was stopped."""
    folds: dict[int, list[float]] = {}
    for trial in trials:
        if trial.point == point:
            if trial.score is None:
                return []
            folds.setdefault(trial.fold, []).append(trial.score)
    return [float(np.mean(folds[fold])) for fold in sorted(folds)]


def _point(
    number: int, point: Point, ratio: float, trials: Sequence[TrialRecord], reference: Sequence[float]
) -> CurvePoint:
    folds = _fold_means(trials, number)
    count = len(folds)
    mean = float(np.mean(folds)) if count else math.nan
    error = float(np.std(folds, ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    half = error * float(stats.t(count - 1).ppf(0.975)) if count > 1 else math.nan
    return CurvePoint(
        name=point.arm.name,
        ratio=ratio,
        per_class=point.arm.per_class,
        only=point.arm.only,
        folds=tuple(folds),
        num_trainings=sum(trial.point == number for trial in trials) if count else 0,
        mean=mean,
        standard_error=error,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        difference=mean - float(np.mean(reference)),
    )


def _one_per_ratio(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Of points with the same number of synthetic rows (per-class ratios) the one with the highest mean."""
    best: dict[float, CurvePoint] = {}
    for point in points:
        if point.ratio not in best or point.mean > best[point.ratio].mean:
            best[point.ratio] = point
    return [best[ratio] for ratio in sorted(best)]


def _detectable(points: Sequence[CurvePoint], reference: Sequence[float]) -> float:
    """From the paired differences to real data only, pooled over the points; 0 where nothing varies."""
    base = np.asarray(reference)
    spreads = [np.var(np.asarray(point.folds) - base, ddof=1) for point in points if point.name != "real"]
    if not spreads or not np.mean(spreads) > 0:
        return 0.0
    error = math.sqrt(float(np.mean(spreads)) / len(base))
    return minimum_detectable_effect(error, degrees_of_freedom=len(base) - 1)


# ------------------------------------------------------------------------------------------ text and files


def summary_lines(found: RatioAnswer, *, num_seeds: int) -> list[str]:
    """The answer in plain text, what could be seen at all first."""
    out = []
    for curve in found.curves:
        folds = len(curve.point("real").folds)
        head = f"{curve.model}" + (f", where {curve.where}" if curve.where else "")
        out.append(
            f"{head}: smallest detectable change of {found.metric} {curve.minimum_detectable_effect:.3f} "
            f"(5 %, power 80 %; {folds} folds, {num_seeds} seed(s) each)"
        )
        width = max(len(point.name) for point in (*curve.points, *curve.baselines))
        for point in (*curve.points, *curve.baselines):
            marks = "  chosen" if point.name == curve.chosen else ""
            marks += "  best" if point.name == curve.best else ""
            marks += "" if point in curve.points else "  (baseline)"
            out.append(f"  {point.name:<{width}}  {_told(point)}{marks}")
    curve, point = found.chosen, found.chosen_point
    where = f" where {curve.where}" if curve.where else ""
    out.append(
        f"chosen by the one-standard-error rule: {point.name}{where} with {curve.model} "
        f"({found.metric} {point.mean:.3f}, {point.difference:+.3f} to real data only; exploratory, no test row was read)"
    )
    return [*out, *(f"note: {note}" for note in found.notes)]


def _told(point: CurvePoint) -> str:
    if not point.is_complete:
        return "stopped early"
    interval = f"{point.mean:.3f} [{point.low:.3f}, {point.high:.3f}]"
    return f"{interval}  Δ {point.difference:+.3f}  n {point.num_trainings} in {len(point.folds)} folds"


def as_json(found: RatioAnswer, trials: Sequence[TrialRecord], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as plain JSON; infinity is written as "only", NaN as null."""
    return {
        **_plain(dict(about)),
        "metric": found.metric,
        "chosen": {
            "model": found.chosen.model,
            "where": found.chosen.where,
            **_plain(asdict(found.chosen_point)),
        },
        "curves": [_plain(asdict(curve)) for curve in found.curves],
        "notes": list(found.notes),
        "trials": [_plain(asdict(trial)) for trial in trials],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "only" if value == math.inf else None
    return value


def write_answer(
    found: RatioAnswer, trials: Sequence[TrialRecord], about: Mapping[str, Any], out: Path, *, num_seeds: int
) -> tuple[Path, ...]:
    """results.json, curve.png and summary.txt in `out`; results.json last."""
    plot(found).savefig(out / PLOT_FILE, dpi=130)
    (out / SUMMARY_FILE).write_text("\n".join(summary_lines(found, num_seeds=num_seeds)) + "\n")
    partial = out / f"{RESULT_FILE}.partial"
    partial.write_text(json.dumps(as_json(found, trials, about), indent=1, ensure_ascii=False))
    partial.replace(out / RESULT_FILE)
    return out / RESULT_FILE, out / PLOT_FILE, out / SUMMARY_FILE
