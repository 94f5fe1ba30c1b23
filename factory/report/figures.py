"""Figures drawn with matplotlib's object interface (no display, no global state), and their inline SVG."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _ACCENT, _SECOND = "#1b2130", "#2463c9", "#b4540a"


def _axes(width: float, height: float, xlabel: str, ylabel: str) -> tuple["Figure", "Axes"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.tick_params(colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    return figure, axes


def loss_curve(steps: Sequence[int], losses: Sequence[float], *, ylabel: str = "loss") -> "Figure":
    """Loss per step, with a running median over a twentieth of the run.

    Raises:
        ValueError: nothing to draw, or as many steps as losses are not given.
    """
    if not steps or len(steps) != len(losses):
        raise ValueError(f"losses: {len(losses)} given for {len(steps)} steps")
    figure, axes = _axes(8.4, 2.9, "step", ylabel)
    values = np.asarray(losses, float)
    window = max(len(values) // 20, 1)
    if window == 1:
        axes.plot(steps, values, color=_ACCENT, linewidth=2.0, marker="o", markersize=3.5)
    else:
        axes.plot(steps, values, color=_ACCENT, alpha=0.35, linewidth=0.9, label="as reported")
        padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
        median = np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
        axes.plot(steps, median, color=_ACCENT, linewidth=2.0, label=f"median of {window}")
        axes.legend(frameon=False, labelcolor=_INK)
    return figure


def similarity_histogram(
    synthetic: np.ndarray,
    real: np.ndarray,
    *,
    names: tuple[str, str] = ("synthetic", "real, left out"),
    xlabel: str = "cosine",
    ylabel: str = "share of images",
) -> "Figure":
    """Similarity to the nearest real training image: synthetic images against real ones left out.

    Args:
        synthetic: (N,) cosine of each synthetic image to its nearest real training image.
        real: (M,) the same of each real training image to the nearest of another group.
        names: of both in the legend.
    """
    figure, axes = _axes(8.4, 2.6, xlabel, ylabel)
    both = np.concatenate([synthetic, real])
    bins = np.linspace(both.min(), max(both.max(), both.min() + 1e-3), 33)
    for values, colour, name in ((real, _SECOND, names[1]), (synthetic, _ACCENT, names[0])):
        weights = np.full(len(values), 1 / max(len(values), 1))
        axes.hist(
            values, bins.tolist(), weights=weights, color=colour, alpha=0.55, label=f"{name} ({len(values)})"
        )
    axes.legend(frameon=False, labelcolor=_INK, loc="upper left")
    return figure


def forest_plot(
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    *,
    xlabel: str,
    highlight: str = "",
) -> "Figure":
    """Differences with their intervals, one line per name, and a line at zero.

    Args:
        highlight: the name drawn in the second colour.
    """
    figure, axes = _axes(8.4, 0.9 + 0.34 * len(names), xlabel, "")
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=_INK, linewidth=0.8, alpha=0.6)
    for place, (name, value, (low, high)) in enumerate(zip(names, values, intervals, strict=True)):
        colour = _SECOND if name == highlight else _ACCENT
        axes.plot([low, high], [-place, -place], color=colour, linewidth=2.0)
        axes.plot([value], [-place], color=colour, marker="s", markersize=6)
    axes.set_yticks([-place for place in range(len(names))], list(names))
    axes.set_ylim(-len(names) + 0.4, 0.6)
    return figure


def reliability_diagram(curves: Mapping[str, Sequence[tuple[float, float]]]) -> "Figure":
    """Accuracy over confidence, one line per name; on the diagonal a model is as often right as it says.

    Args:
        curves: name → (confidence, accuracy) of bins; at most three are drawn.
    """
    figure, axes = _axes(5.6, 4.2, "confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, alpha=0.6, linestyle="--")
    styles = ((_ACCENT, "-"), (_SECOND, "-"), (_INK, ":"))
    for (name, points), (colour, style) in zip(curves.items(), styles):
        x, y = zip(*points)
        axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=4, label=name)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, labelcolor=_INK, loc="upper left")
    return figure


def ratio_curve(
    ratios: Sequence[float],
    means: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    *,
    ylabel: str,
    chosen: float | None = None,
) -> "Figure":
    """A score over synthetic rows per real row, with intervals; 0 is real data only.

    Args:
        ratios: finite, in increasing order.
        chosen: the ratio to mark.
    """
    figure, axes = _axes(8.4, 3.2, "synthetic rows per real row", ylabel)
    axes.set_xscale("symlog", base=2, linthresh=0.25)
    low, high = zip(*intervals)
    axes.fill_between(ratios, low, high, color=_ACCENT, alpha=0.18, linewidth=0)
    axes.plot(ratios, means, color=_ACCENT, linewidth=2.0, marker="o", markersize=4.5)
    for ratio, mean in zip(ratios, means):
        if ratio == chosen:
            axes.plot([ratio], [mean], color=_SECOND, marker="D", markersize=9, linestyle="", label="chosen")
            axes.legend(frameon=False, labelcolor=_INK)
    axes.set_xticks(list(ratios), [f"{ratio:g}" for ratio in ratios])
    return figure


def figure_svg(figure: "Figure", name: str) -> str:
    """A figure as inline SVG whose ink and accents follow the page's colours, light or dark."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.5}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in ((_INK, "--ink"), (_ACCENT, "--accent"), (_SECOND, "--second")):
        svg = svg.replace(colour, f"var({variable})")
    return svg
