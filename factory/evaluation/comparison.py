"""What may be said of the arms: intervals, paired differences, corrected p-values, and first of all the power.

`Scores` hold what every trained model said of every evaluation row. `compare` turns them into a table: mean and
interval of each arm, its paired difference to the real-only arm, the share of the oracle's gain it recovers. One
comparison is primary and declared beforehand; the others are corrected for being many (Holm).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from factory.evaluation.arms import Arm, Task
from factory.evaluation.crossed import CrossedEstimate, crossed_estimate
from factory.evaluation.scores import (
    PRIMARY_METRIC,
    SEGMENTATION_COLUMNS,
    PrimaryMetric,
    Scores,
    subgroup_rows,
)
from factory.evaluation.selection import holm, minimum_detectable_effect, oracle_fraction
from factory.evaluation.statistics import Interval
from factory.evaluation.task_metrics import classification_report


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """An arm among some of the rows: their number, its mean, and its difference to the reference where asked."""

    name: str
    num_rows: int
    value: float
    difference: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One line of the table.

    Attributes:
        name: of the arm.
        value: the primary metric and its interval.
        difference: to the reference arm, paired; None for the reference.
        p_value: two-sided, of the same variance over seeds and groups as the interval.
        adjusted_p: after Holm over all arms but the primary one, whose p-value needs no correction; None for the
            reference.
        oracle_fraction: share of the oracle's gain recovered; None without an oracle that surely gains.
        other: every other metric, averaged over seeds.
        subgroups: by class, lesion size and what the caller named.
    """

    name: str
    value: Interval
    difference: Interval | None
    p_value: float | None
    adjusted_p: float | None
    oracle_fraction: float | None
    other: Mapping[str, float]
    subgroups: tuple[Subgroup, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """What `compare` found.

    Attributes:
        task, metric: what was scored, larger is better.
        reference, primary: arm names; the primary comparison was declared before.
        minimum_detectable_effect: of the primary comparison, at 5 % and power 80 %: smaller gains cannot be seen here.
        num_rows, num_groups: that judged.
        generator_seeds, task_seeds: how many.
        is_pilot: one generator seed only: intervals hold no variation of the generator.
        arms: one line each.
        notes: what the reader should know.
    """

    task: Task
    metric: str
    reference: str
    primary: str
    minimum_detectable_effect: float
    num_rows: int
    num_groups: int
    generator_seeds: int
    task_seeds: int
    is_pilot: bool
    arms: tuple[ArmResult, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; NaN stays NaN."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The table in plain text, what could be seen at all first."""
        pilot = ", PILOT: one generator seed" if self.is_pilot else ""
        out = [
            f"smallest detectable change of {self.metric}: {self.minimum_detectable_effect:.3f} (5 %, power 80 %; "
            f"{self.num_rows} rows in {self.num_groups} groups, {self.generator_seeds} generator × {self.task_seeds} "
            f"task seeds{pilot})"
        ]
        width = max(len(arm.name) for arm in self.arms)
        for arm in self.arms:
            text = f"{arm.name:<{width}}  {self.metric} {_told(arm.value)}"
            if arm.difference is not None and arm.adjusted_p is not None:
                kind = "primary p" if arm.name == self.primary else "Holm p"
                text += f"  Δ {_told(arm.difference, sign=True)}  {kind} {arm.adjusted_p:.3f}"
            if arm.oracle_fraction is not None:
                text += f"  {100 * arm.oracle_fraction:.0f} % of the oracle's gain"
            out.append(text)
        return [*out, *(f"note: {note}" for note in self.notes)]


def _told(interval: Interval, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def compare(
    scores: Scores,
    *,
    primary: str,
    reference: str = "real",
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> ComparisonTable:
    """Compare every arm with the reference.

    Args:
        scores: of all arms on the same rows.
        primary: name of the one arm whose comparison was declared before the test was opened.
        reference: the arm that all are compared with.
        num_resamples: bootstraps over groups.
        progress: called with 1 after each arm.

    Raises:
        ValueError: an unknown arm, or rows on which the metric is undefined.
    """
    metric = PrimaryMetric(scores)
    if not metric.is_defined():
        raise ValueError(
            "evaluation rows: want two groups at least, and of each class one in every fold (lesions, for Dice)"
        )
    base, main = scores.arm(reference), scores.arm(primary)
    if base.uses_generator or base.name == main.name:
        raise ValueError(
            f"reference {reference!r}: want an arm without generator, other than the primary one"
        )
    draws = _Draws(num_resamples, level, seed)
    found = []
    for arm in scores.arms:
        difference = None if arm.name == reference else _estimate(scores, metric, arm, draws, base)
        found.append((arm, _estimate(scores, metric, arm, draws).interval, difference))
        progress(1)
    adjusted = _adjusted({arm.name: d.p_value for arm, _, d in found if d is not None}, primary)
    gains = [d.interval for arm, _, d in found if arm.kind == "oracle" and d is not None]
    oracle = real_gain(gains[0]) if gains else None
    real = next(value.value for arm, value, _ in found if arm.name == reference)
    of_primary = next(difference for arm, _, difference in found if arm.name == primary)
    assert of_primary is not None  # the primary arm is not the reference
    results = tuple(
        ArmResult(
            name=arm.name,
            value=value,
            difference=None if difference is None else difference.interval,
            p_value=None if difference is None else difference.p_value,
            adjusted_p=adjusted.get(arm.name),
            oracle_fraction=None
            if oracle is None or arm.name == reference or arm.kind == "oracle"
            else oracle_fraction(real, value.value, real + oracle),
            other=_other_metrics(scores, arm),
            subgroups=_subgroups(scores, base, arm, draws, with_interval=arm.name == primary),
        )
        for arm, value, difference in found
    )
    return ComparisonTable(
        task=scores.task,
        metric=PRIMARY_METRIC[scores.task],
        reference=reference,
        primary=primary,
        minimum_detectable_effect=_detectable(of_primary),
        num_rows=len(metric.rows),
        num_groups=len(np.unique(metric.groups)),
        generator_seeds=len(scores.generator_seeds),
        task_seeds=len(scores.task_seeds),
        is_pilot=any(arm.uses_generator for arm in scores.arms) and len(scores.generator_seeds) < 2,
        arms=results,
        notes=scores.notes,
    )


@dataclass(frozen=True)
class _Draws:
    num_resamples: int
    level: float
    seed: int


def _detectable(difference: CrossedEstimate) -> float:
    """Zero variation (equal models) lets every change be seen."""
    error = difference.interval.standard_error
    freedom = max(1, int(difference.degrees_of_freedom))
    return minimum_detectable_effect(error, degrees_of_freedom=freedom) if error > 0 else 0.0


def _estimate(
    scores: Scores, metric: PrimaryMetric, arm: Arm, draws: _Draws, base: Arm | None = None
) -> CrossedEstimate:
    """The metric of an arm, or its difference to `base`, paired by row and task seed."""
    two = metric.values(scores, arm)
    one = None if base is None else metric.values(scores, base)[0]

    def statistic(models: np.ndarray, others: np.ndarray | None, rows: np.ndarray) -> float:
        return metric(models, rows) - (0.0 if others is None else metric(others, rows))

    everything = np.arange(len(metric.rows))
    of_models = np.array(
        [
            [
                statistic(models[t : t + 1], None if one is None else one[t : t + 1], everything)
                for t in range(two.shape[1])
            ]
            for models in two
        ]
    )
    flat = two.reshape(-1, *two.shape[2:])
    return crossed_estimate(
        of_models,
        lambda rows: statistic(flat, one, rows),
        metric.groups,
        strata=metric.strata,
        level=draws.level,
        num_resamples=draws.num_resamples,
        seed=draws.seed,
        is_pilot=arm.uses_generator and len(two) < 2,
    )


def _adjusted(p_values: Mapping[str, float], primary: str) -> dict[str, float]:
    others = [name for name in p_values if name != primary]
    adjusted = {primary: p_values[primary]}
    if others:
        adjusted |= dict(zip(others, holm([p_values[name] for name in others]).tolist(), strict=True))
    return adjusted


def real_gain(difference: Interval) -> float | None:
    """What as many more real images gain, where the interval leaves no doubt that they do: shares of less mean nothing."""
    return difference.value if difference.low > 0 else None


def _other_metrics(scores: Scores, arm: Arm) -> dict[str, float]:
    values = scores.of(arm).reshape(-1, len(scores.ids), scores.of(arm).shape[-1])
    if scores.task == "segmentation":
        lesions, healthy = scores.areas > 0, scores.areas == 0
        named = {name: float(values[:, lesions, k].mean()) for k, name in enumerate(SEGMENTATION_COLUMNS[:3])}
        rate = float(values[:, healthy, 3].mean()) if healthy.any() else float("nan")
        return {**named, "false_positive_rate": rate}
    reports = [
        classification_report(scores.labels, model, train_counts=scores.train_counts) for model in values
    ]
    return {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}


def _subgroups(
    scores: Scores, base: Arm, arm: Arm, draws: _Draws, *, with_interval: bool
) -> tuple[Subgroup, ...]:
    found = []
    for name, rows in subgroup_rows(scores).items():
        metric = PrimaryMetric(scores, rows)
        if not metric.is_defined():
            continue
        values = metric.values(scores, arm)
        everything = np.arange(len(metric.rows))
        difference = _estimate(scores, metric, arm, draws, base).interval if with_interval else None
        mean = float(np.mean([metric(model, everything) for model in values]))
        found.append(Subgroup(name=name, num_rows=len(metric.rows), value=mean, difference=difference))
    return tuple(found)
