"""What may be concluded from several results: the ratio to use, the endpoints that hold, the effect one could see."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusted p-values, float64 (M,), that control the chance of any false finding (Holm 1979)."""
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return _in_order(np.minimum(steps, 1.0), order)


def benjamini_hochberg(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusted p-values, float64 (M,), that control the expected share of false findings (1995)."""
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    steps = p[order] * len(p) / np.arange(1, len(p) + 1)
    return _in_order(np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1.0), order)


def _p_values(values: Sequence[float] | np.ndarray) -> np.ndarray:
    p = np.asarray(values, np.float64)
    if p.ndim != 1 or not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values: want at least one number in 0 … 1, got {values}")
    return p


def _in_order(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    out = np.empty_like(values)
    out[order] = values
    return out


@dataclass(frozen=True, kw_only=True)
class RatioChoice:
    """A ratio curve and what the one-standard-error rule makes of it; all in increasing order of ratio.

    Attributes:
        ratio: the one chosen.
        best: the one with the highest mean, the smaller of equals.
        ratios: `synthetic_ratio` of each point; infinity is synthetic only.
        means, standard_errors: of the folds' scores at each point.
        threshold: points with a mean of at least this are as good as the best.
    """

    ratio: float
    best: float
    ratios: tuple[float, ...]
    means: tuple[float, ...]
    standard_errors: tuple[float, ...]
    threshold: float


def one_standard_error(
    ratios: Sequence[float],
    scores: np.ndarray,
    *,
    error_of: Literal["mean", "difference"] = "mean",
) -> RatioChoice:
    """The smallest ratio whose mean is within one standard error of the best (Breiman et al. 1984, §3.4.3).

    Args:
        ratios: (R,) with 0 among them.
        scores: (R, F) validation score of each ratio in the same F folds of the inner grouped cross-validation,
            larger is better; seeds averaged within a fold.
        error_of: "mean" takes the standard error of the best point's mean; "difference" that of its paired
            difference to the point at hand, which leaves out how hard the folds are and so picks larger ratios,
            also by mistake.

    Raises:
        ValueError: no 0, a ratio twice, fewer than two folds, or scores that are not finite.
    """
    values, curve = np.asarray(ratios, np.float64), np.asarray(scores, np.float64)
    if values.ndim != 1 or (values < 0).any() or np.isnan(values).any() or len(set(values)) < len(values):
        raise ValueError(f"ratios: want different numbers ≥ 0, got {list(ratios)}")
    if 0.0 not in values:
        raise ValueError(f"ratios: want 0 (real data only) among them, got {list(ratios)}")
    if curve.ndim != 2 or len(curve) != len(values) or curve.shape[1] < 2 or not np.isfinite(curve).all():
        raise ValueError(f"scores: want finite ({len(values)}, F ≥ 2), got shape {curve.shape}")
    if error_of not in ("mean", "difference"):
        raise ValueError(f"error_of: want 'mean' or 'difference', got {error_of!r}")
    order = np.argsort(values)
    values, curve = values[order], curve[order]
    means, root = curve.mean(axis=1), math.sqrt(curve.shape[1])
    best = int(means.argmax())
    spread = curve if error_of == "mean" else curve[best] - curve
    allowed = spread.std(axis=1, ddof=1) / root
    tolerance = allowed if error_of == "difference" else np.full(len(means), allowed[best])
    chosen = int(np.flatnonzero(means >= means[best] - tolerance)[0])
    return RatioChoice(
        ratio=float(values[chosen]),
        best=float(values[best]),
        ratios=tuple(values.tolist()),
        means=tuple(means.tolist()),
        standard_errors=tuple((curve.std(axis=1, ddof=1) / root).tolist()),
        threshold=float(means[best] - tolerance[chosen]),
    )


def minimum_detectable_effect(
    standard_error: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    degrees_of_freedom: int | None = None,
) -> float:
    """Smallest true difference that a two-sided test at `alpha` finds with probability `power`, in its unit.

    To be printed before the result: standard_error · (quantile(1 − α/2) + quantile(power)), of Student's t where
    `degrees_of_freedom` is given, as with few seeds or folds.

    Raises:
        ValueError: a standard error that is not positive, or probabilities outside 0 … 1.
    """
    if not (math.isfinite(standard_error) and standard_error > 0):
        raise ValueError(f"standard_error: want a positive number, got {standard_error}")
    if not (0 < alpha < 1 and 0 < power < 1):
        raise ValueError(f"alpha, power: want probabilities between 0 and 1, got {alpha} and {power}")
    law = stats.norm if degrees_of_freedom is None else stats.t(degrees_of_freedom)
    return float(standard_error * (law.ppf(1 - alpha / 2) + law.ppf(power)))


def oracle_fraction(real: float, synthetic: float, oracle: float) -> float | None:
    """Share of the gain of as many extra real images that the synthetic ones give: (synthetic − real) / (oracle − real).

    None where the oracle does not beat the real arm: then the task cannot show what more data would bring.
    """
    return (synthetic - real) / (oracle - real) if oracle > real else None
