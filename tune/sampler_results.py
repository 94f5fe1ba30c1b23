"""What a class-adaptive search found: a summary over policies and seeds, and a plot of each search."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#2463c9", "#b4540a", "#2a8a4a", "#8a2a7a", "#7a7a1a", "#1b2130")


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per policy over its seeds: the score of the kept epoch, the counts there and at the end, and the steps.

    The score is that of the fold which picked the epoch, so it is too good, for every policy alike. "difference" is
    the policy's minus that of random actions, paired by seed, where both are there.
    """
    by_policy: dict[str, dict[int, Mapping[str, Any]]] = {}
    for result in results.values():
        by_policy.setdefault(result["settings"]["policy"], {})[result["settings"]["seed"]] = result
    summary: dict[str, dict[str, Any]] = {}
    for policy, seeds in by_policy.items():
        scores = np.array([result["stop_score"] for result in seeds.values()])
        entry: dict[str, Any] = {
            "num_seeds": len(seeds),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std(ddof=1)) if len(seeds) > 1 else None,
            "best_counts": [result["best_counts"] for result in seeds.values()],
            "num_steps": [result["num_steps"] for result in seeds.values()],
        }
        shared = sorted(seeds.keys() & by_policy.get("random", {}).keys())
        if policy != "random" and shared:
            pairs = [seeds[seed]["stop_score"] - by_policy["random"][seed]["stop_score"] for seed in shared]
            entry["difference_to_random"] = pairs
        summary[policy] = entry
    return summary


def counts_plot(result: Mapping[str, Any]) -> "Figure":
    """Synthetic images of each class in a batch, and the validation scores, over the epochs of one search.

    Args:
        result: of `SamplerSearch.result`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    epochs = result["epochs"]
    steps = range(1, len(epochs) + 1)
    for place, name in enumerate(result["classes_with_agent"]):
        counts = [epoch["record"]["counts"][place] for epoch in epochs]
        # Lines of equal counts lie on each other; a small offset keeps each visible.
        shifted = [count + 0.08 * place for count in counts]
        upper.plot(
            steps, shifted, color=_COLOURS[place % len(_COLOURS)], marker="o", markersize=3, label=name
        )
    upper.set_ylabel("synthetic per batch")
    upper.legend(frameon=False, ncols=4, loc="upper left")
    upper.set_title(f"policy {result['settings']['policy']}, seed {result['settings']['seed']}", loc="left")
    for step, epoch in zip(steps, epochs):
        paid = [score[epoch["record"]["reward_fold"]] for score in epoch["record"]["scores"]]
        lower.plot([step] * len(paid), paid, ".", color="#1b2130", alpha=0.3)
    lower.plot(
        steps, [epoch["stop_score"] for epoch in epochs], color=_COLOURS[0], label="third fold, carried over"
    )
    lower.axvline(result["best_epoch"] + 1, color=_COLOURS[1], linewidth=0.9, label="kept")
    lower.plot([], [], ".", color="#1b2130", alpha=0.3, label="reward fold, each episode")
    lower.set_xlabel("epoch")
    lower.set_ylabel("validation score")
    lower.legend(frameon=False, ncols=3, loc="lower right")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
