"""The curves of a ratio search as one figure that is readable with many models, filters and per-class ratios."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tune.ratio_results import Curve, CurvePoint, RatioAnswer

MOST_VECTORS = 12
"""Per-class ratios listed beside a curve: those with the highest means; results.json has all."""
_INK, _ACCENTS = "#1b2130", ("#2463c9", "#b4540a", "#2a8a4a", "#8a2a7a", "#7a7a1a")
_ROW, _LINE = 2.9, 0.27
"""Height of a row of panels, and of a line of a list, inches."""


def plot(found: "RatioAnswer") -> "Figure":
    """One row per curve: score over ratio with intervals and folds; beside it the per-class ratios, by mean.

    All rows share one scale of the score, and all lists another.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    listed = [_listed(curve) for curve in found.curves]
    heights = [max(_ROW, 1.1 + _LINE * len(vectors)) for vectors in listed]
    columns = 2 if any(listed) else 1
    figure = Figure(figsize=(7.2 if columns == 1 else 12.5, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(heights),
        columns,
        squeeze=False,
        gridspec_kw={"height_ratios": heights, "width_ratios": [1.25, 1][:columns]},
    )
    every = [p for curve in found.curves for p in (*curve.points, *curve.baselines) if p.is_complete]
    limits = _limits([value for p in every for value in (p.low, p.high, *p.folds)])
    reals = [curve.point("real").mean for curve in found.curves]
    list_limits = _limits([*reals, *(end for vectors in listed for p in vectors for end in (p.low, p.high))])
    for row, curve, vectors in zip(panels, found.curves, listed, strict=True):
        _draw_panel(row[0], curve, found.metric)
        row[0].set_ylim(limits)
        if vectors:
            _draw_list(row[1], curve, vectors, found.metric)
            row[1].set_xlim(list_limits)
        elif columns == 2:
            row[1].set_axis_off()
    handles: dict[str, Any] = {}
    for row in panels:
        for handle, label in zip(*row[0].get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    return figure


def _complete(curve: "Curve") -> "list[CurvePoint]":
    return [point for point in curve.points if point.is_complete]


def _listed(curve: "Curve") -> "list[CurvePoint]":
    """Per-class points by their mean, the best ones; the chosen one is among them."""
    vectors = sorted((p for p in _complete(curve) if p.per_class), key=lambda p: p.mean, reverse=True)
    kept = vectors[:MOST_VECTORS]
    chosen = [p for p in vectors[MOST_VECTORS:] if p.name == curve.chosen]
    return [*kept[: MOST_VECTORS - len(chosen)], *chosen]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis that shows them all, with a margin."""
    low, high = min(values), max(values)
    margin = 0.04 * max(high - low, 1e-3)
    return low - margin, high + margin


def _draw_panel(axes: Any, curve: "Curve", metric: str) -> None:
    points = _complete(curve)
    finite = [point.ratio for point in points if math.isfinite(point.ratio)]
    beyond = 2 * max(max(finite), 0.5)
    smallest = min((ratio for ratio in finite if ratio > 0), default=1.0)
    places = {p.name: p.ratio if math.isfinite(p.ratio) else beyond for p in points}
    single = [p for p in points if not p.per_class]
    _draw_curve(axes, single, places)
    for point in single:
        axes.plot(
            [places[point.name]] * len(point.folds), point.folds, ".", markersize=4, color=_INK, alpha=0.45
        )
    vectors = [p for p in points if p.per_class]
    if vectors:
        axes.plot(
            [places[p.name] for p in vectors],
            [p.mean for p in vectors],
            "D",
            markersize=4,
            color=_ACCENTS[3],
            alpha=0.7,
            label="per-class ratios, by all rows together",
        )
    axes.axhline(curve.point("real").mean, color=_INK, linewidth=0.9, linestyle="--", label="real data only")
    for number, baseline in enumerate(p for p in curve.baselines if p.is_complete):
        colour = _ACCENTS[1 + number % 4]
        axes.axhline(baseline.mean, color=colour, linewidth=1.0, linestyle=":", label=baseline.name)
    chosen = curve.point(curve.chosen)
    axes.plot(places[chosen.name], chosen.mean, "o", markersize=12, markerfacecolor="none",
              markeredgecolor=_ACCENTS[1], markeredgewidth=2, linestyle="", label="chosen")  # fmt: skip
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.6)
    ticks = sorted({places[p.name] for p in single})
    names = ["only" if place == beyond else f"{place:g}" for place in ticks]
    axes.set_xticks(ticks, names, rotation=0 if len(ticks) < 9 else 45)
    axes.minorticks_off()
    axes.set_xlim(-0.15 * smallest, 1.25 * max(places.values(), default=1.0) or 1.0)
    axes.set(xlabel="synthetic rows per real row", ylabel=metric)
    axes.set_title(_title(curve), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _title(curve: "Curve") -> str:
    where = f", where {curve.where}" if curve.where else ""
    count = curve.point("real").num_trainings
    power = f"detectable change {curve.minimum_detectable_effect:.3f}, {count} trainings a point"
    return "\n".join([*textwrap.wrap(f"{curve.model}{where}", 78), power])


def _draw_curve(axes: Any, points: "Sequence[CurvePoint]", places: Mapping[str, float]) -> None:
    """Mean and interval over the ratios; synthetic only stands apart, without real rows it is no larger ratio."""
    joined = [point for point in points if not point.only]
    xs = [places[point.name] for point in joined]
    axes.fill_between(xs, [p.low for p in joined], [p.high for p in joined], color=_ACCENTS[0], alpha=0.15,
                      label="95 % interval over folds")  # fmt: skip
    axes.plot(xs, [p.mean for p in joined], "o-", color=_ACCENTS[0], markersize=4, label="mean (dots: folds)")
    for point in (p for p in points if p.only):
        whiskers = [[point.mean - point.low], [point.high - point.mean]]
        axes.errorbar([places[point.name]], [point.mean], yerr=whiskers, fmt="o", markersize=4,
                      color=_ACCENTS[0], capsize=3)  # fmt: skip


def _draw_list(axes: Any, curve: "Curve", vectors: "Sequence[CurvePoint]", metric: str) -> None:
    """Per-class ratios, a line each: mean and interval, the best on top."""
    for place, point in enumerate(vectors):
        colour = _ACCENTS[1] if point.name == curve.chosen else _ACCENTS[3]
        axes.plot([point.low, point.high], [-place, -place], color=colour, linewidth=1.6)
        axes.plot([point.mean], [-place], "D", color=colour, markersize=5)
    axes.axvline(curve.point("real").mean, color=_INK, linewidth=0.9, linestyle="--")
    names = [" ".join(f"{name} {ratio:g}×" for name, ratio in point.per_class) for point in vectors]
    axes.set_yticks([-place for place in range(len(vectors))], names, fontsize=8)
    axes.set_ylim(-len(vectors) + 0.4, 0.6)
    axes.set_xlabel(metric)
    count = sum(bool(point.per_class) for point in _complete(curve))
    shown = f"the {len(vectors)} best of {count}" if count > len(vectors) else f"all {count}"
    axes.set_title(f"per-class ratios, {shown}: mean and 95 % interval", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
