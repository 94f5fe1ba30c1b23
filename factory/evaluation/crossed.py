"""Two arms over many trained models: what another training and another test set would change, both at once.

Resampling or flipping evaluation rows alone takes the trained models as given. Two arms without any true difference,
trained a few times each, then differ "significantly" far too often: what varies most is the training
(benchmarks/evaluator_proof.py --part null measures it). So the variance over seeds and that over groups of rows are added,
with Satterthwaite's degrees of freedom, and interval and p-value come from the same Student's t.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from factory.evaluation.statistics import Interval, bootstrap


@dataclass(frozen=True, kw_only=True)
class CrossedEstimate:
    """A value over G generator seeds × T task seeds × evaluation rows.

    Attributes:
        interval: Student's t; its standard error holds seeds and rows.
        p_value: two-sided, of the value being 0.
        degrees_of_freedom: of the t, by Satterthwaite.
    """

    interval: Interval
    p_value: float
    degrees_of_freedom: float


def crossed_estimate(
    of_models: np.ndarray,
    of_rows: Callable[[np.ndarray], float],
    groups: Sequence | np.ndarray,
    *,
    strata: Sequence | np.ndarray | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    is_pilot: bool = False,
) -> CrossedEstimate:
    """Estimate, interval and p-value of a statistic averaged over models.

    The variance over generator seeds is that of their means over task seeds, and the other way round; where both
    vary, the interaction, which is in both, is taken out once (two-way random effects). A factor with one level
    adds nothing: then the interval leaves out its variation, and the caller says so.

    Args:
        of_models: (G, T) the statistic of each trained model on all rows.
        of_rows: from row numbers to the statistic averaged over all models.
        groups: (N,) patient or near-duplicate group of each row.
        strata: (N,) inside which groups are resampled.
        num_resamples: bootstraps of groups, for the rows' standard error.
        is_pilot: mark the interval as made with one generator seed only.

    Raises:
        ValueError: as `bootstrap`.
    """
    models = np.asarray(of_models, np.float64)
    rows = bootstrap(of_rows, groups, strata=strata, level=level, num_resamples=num_resamples, seed=seed)
    over_seeds, parts = seed_variance(models)
    parts = [*parts, (rows.standard_error**2, rows.num_groups - 1)]
    total = over_seeds + rows.standard_error**2
    value, error = float(models.mean()), float(np.sqrt(total))
    freedom = _satterthwaite(parts)
    law = stats.t(freedom)
    reach = float(law.ppf((1 + level) / 2)) * error
    interval = Interval(
        value=value,
        low=value - reach,
        high=value + reach,
        level=level,
        standard_error=error,
        method="Student's t, variance over seeds and groups",
        num_groups=rows.num_groups,
        is_pilot=is_pilot,
    )
    p_value = float(2 * law.sf(abs(value) / error)) if error > 0 else float(value == 0)
    return CrossedEstimate(interval=interval, p_value=p_value, degrees_of_freedom=freedom)


def seed_variance(models: np.ndarray) -> tuple[float, list[tuple[float, int]]]:
    """Variance of the mean over (G, T) models that other seeds would give, and its parts with degrees of freedom."""
    num_generators, num_tasks = models.shape
    parts = []
    for count, means in ((num_generators, models.mean(axis=1)), (num_tasks, models.mean(axis=0))):
        if count > 1:
            parts.append((float(means.var(ddof=1)) / count, count - 1))
    if len(parts) < 2:
        return sum(part for part, _ in parts), parts
    residuals = models - models.mean(axis=1, keepdims=True) - models.mean(axis=0) + models.mean()
    freedom = (num_generators - 1) * (num_tasks - 1)
    interaction = float((residuals**2).sum()) / freedom / models.size
    found = [part for part, _ in parts]
    return max(sum(found) - interaction, *found), parts


def _satterthwaite(parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a sum of variances; that of the first factor where all are 0."""
    total = sum(part for part, _ in parts)
    if total == 0:
        return float(parts[0][1])
    return total**2 / sum(part**2 / freedom for part, freedom in parts)
