"""Is the difference more than noise? Intervals, paired tests and the rule that picks a ratio.

Rows of one patient, or of one near-duplicate group, are not independent: whatever takes `groups` resamples or flips
whole groups. `delong` and `mcnemar` follow the same rule: the first uses clustered variances, the second refuses
groups of more than one row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Statistic = Callable[[np.ndarray], float]
"""From row numbers, int64 (n,) with repeats, to a number: a metric closed over labels and predictions."""

MOST_EXACT_GROUPS = 16
"""Sign flips of up to this many groups are enumerated, 2¹⁶ of them; above it they are drawn at random."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its confidence interval, in the unit of the value.

    Attributes:
        value: the statistic of all rows.
        low, high: ends of the interval; method "BCa" and "percentile" need not contain a biased value.
        level: coverage asked for, for example .95.
        standard_error: standard deviation of the resampled values, or the formula's.
        method: how it was made.
        num_groups: independent units behind it.
        is_pilot: a source of variation was seen only once (one generator seed), so the interval is too narrow.
    """

    value: float
    low: float
    high: float
    level: float
    standard_error: float
    method: str
    num_groups: int
    is_pilot: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A two-sided test of one arm against another.

    Attributes:
        difference: second arm minus first, in the unit of the metric.
        p_value: probability under no difference of one at least as large in size.
        standard_error: of the difference; NaN where the test has none.
        method: the test, with exact or random enumeration.
        num_groups: independent units compared.
    """

    difference: float
    p_value: float
    standard_error: float
    method: str
    num_groups: int


class _Groups:
    """Rows by group, and groups by stratum.

    A group whose rows lie in several strata (a duplicate with another label) makes a stratum of that combination.
    """

    def __init__(self, groups: Sequence | np.ndarray, strata: Sequence | np.ndarray | None) -> None:
        names = np.asarray(groups)
        if names.ndim != 1 or len(names) < 2:
            raise ValueError(f"groups: want one name for each of at least two rows, got shape {names.shape}")
        _, self.of_row = np.unique(names, return_inverse=True)
        self.rows = [np.flatnonzero(self.of_row == group) for group in range(self.of_row.max() + 1)]
        if len(self.rows) < 2:
            raise ValueError("groups: all rows are of one group; nothing can be resampled")
        if strata is None:
            self.strata = [np.arange(len(self.rows))]
            return
        kinds = np.asarray(strata)
        if kinds.shape != names.shape:
            raise ValueError(f"strata: want one for each of {len(names)} rows, got shape {kinds.shape}")
        members: dict[tuple, list[int]] = {}
        for group, rows in enumerate(self.rows):
            members.setdefault(tuple(np.unique(kinds[rows]).tolist()), []).append(group)
        self.strata = [np.array(members[key]) for key in sorted(members, key=str)]

    def resample(self, rng: np.random.Generator) -> np.ndarray:
        """Rows of as many groups of each stratum as there are, drawn with replacement."""
        drawn = [rng.choice(stratum, len(stratum)) for stratum in self.strata]
        return np.concatenate([self.rows[group] for group in np.concatenate(drawn)])

    def without(self, group: int) -> np.ndarray:
        return np.flatnonzero(self.of_row != group)


def bootstrap(
    statistic: Statistic,
    groups: Sequence | np.ndarray,
    *,
    strata: Sequence | np.ndarray | None = None,
    method: Literal["percentile", "BCa"] = "percentile",
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic by resampling whole groups with replacement inside strata.

    For a paired difference the statistic takes the difference of both arms on the same rows (see `paired_bootstrap`).

    Args:
        statistic: from row numbers to a number.
        groups: (N,) the patient or near-duplicate group of each row.
        strata: (N,) for example the label, so that each resample holds every class; None for no strata.
        method: "BCa" corrects bias and skewness (Efron 1987), with acceleration from leaving out one group
            at a time, weighted over strata (Davison & Hinkley 1997, §5.3).
        level: coverage, 0 … 1.

    Raises:
        ValueError: one group only, or a resample on which the statistic is undefined (stratify by label).
    """
    _check_level(level, num_resamples)
    cluster = _Groups(groups, strata)
    rng = np.random.default_rng(seed)
    value = _defined(statistic(np.arange(len(cluster.of_row))), "all rows")
    draws = np.array([_defined(statistic(cluster.resample(rng)), "a resample") for _ in range(num_resamples)])
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "BCa":
        tails = _bca_tails(value, draws, tails, _acceleration(statistic, cluster))
    elif method != "percentile":
        raise ValueError(f"method: want 'percentile' or 'BCa', got {method!r}")
    low, high = np.quantile(draws, tails)
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        level=level,
        standard_error=float(draws.std(ddof=1)),
        method=f"group bootstrap, {method}",
        num_groups=len(cluster.rows),
    )


def _check_level(level: float, num_resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: want a coverage between 0 and 1, got {level}")
    if num_resamples < 100:
        raise ValueError(f"num_resamples: want at least 100, got {num_resamples}")


def _defined(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ValueError(
            f"statistic: {value} on {where}; it needs rows that some draws lack (pass strata=labels, "
            "or use a statistic that is defined on every draw)"
        )
    return float(value)


def _acceleration(statistic: Statistic, cluster: _Groups) -> float:
    cubes = squares = 0.0
    for stratum in cluster.strata:
        if len(stratum) < 2:
            continue
        left = np.array([_defined(statistic(cluster.without(g)), f"rows without group {g}") for g in stratum])
        influence = (len(stratum) - 1) * (left.mean() - left)
        cubes += float((influence**3).sum()) / len(stratum) ** 3
        squares += float((influence**2).sum()) / len(stratum) ** 2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _bca_tails(value: float, draws: np.ndarray, tails: np.ndarray, acceleration: float) -> np.ndarray:
    below = float((draws < value).mean() + (draws == value).mean() / 2)
    if not 0 < below < 1:
        raise ValueError("method: BCa is undefined, every resample lies on one side of the value; use percentile")
    bias = stats.norm.ppf(below)
    shifted = bias + stats.norm.ppf(tails)
    return np.asarray(stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))


def paired_bootstrap(
    metric: Callable[[np.ndarray, np.ndarray], float],
    targets: np.ndarray,
    one: np.ndarray,
    two: np.ndarray,
    groups: Sequence | np.ndarray,
    *,
    strata: Sequence | np.ndarray | None = None,
    method: Literal["percentile", "BCa"] = "percentile",
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`bootstrap` of metric(targets, two) − metric(targets, one), both arms on the same resampled groups.

    Args:
        metric: (targets (n, …), predictions (n, …)) to a number.
        targets, one, two: (N, …) what is true and the two arms' predictions of the same rows.
    """
    if not len(targets) == len(one) == len(two) == len(np.asarray(groups)):
        raise ValueError(
            f"one, two: want predictions of the same {len(targets)} rows, got {len(one)} and {len(two)} "
            f"with {len(np.asarray(groups))} groups"
        )
    return bootstrap(
        lambda rows: metric(targets[rows], two[rows]) - metric(targets[rows], one[rows]),
        groups,
        strata=strata,
        method=method,
        level=level,
        num_resamples=num_resamples,
        seed=seed,
    )


def hierarchical_bootstrap(
    statistic: Callable[[int, np.ndarray], float],
    groups: Sequence | np.ndarray,
    *,
    num_generator_seeds: int,
    strata: Sequence | np.ndarray | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval over groups and generator seeds, crossed: each resample redraws both with replacement.

    The percentile interval over S seeds understates their variance by (S − 1)/S: with three it is narrow, with one
    it holds no variation of the generator at all and is marked `is_pilot`.

    Args:
        statistic: (generator seed 0 … S − 1, row numbers) to a number, averaged over the task seeds.
        num_generator_seeds: S, generators trained with different seeds and tested on the same rows.
    """
    _check_level(level, num_resamples)
    if num_generator_seeds < 1:
        raise ValueError(f"num_generator_seeds: want 1 or more, got {num_generator_seeds}")
    cluster = _Groups(groups, strata)
    rng = np.random.default_rng(seed)

    def mean(seeds: np.ndarray, rows: np.ndarray, where: str) -> float:
        kinds, counts = np.unique(seeds, return_counts=True)
        values = [_defined(statistic(int(kind), rows), where) for kind in kinds]
        return float(np.average(values, weights=counts))

    value = mean(np.arange(num_generator_seeds), np.arange(len(cluster.of_row)), "all rows")
    draws = np.array(
        [
            mean(rng.integers(num_generator_seeds, size=num_generator_seeds), cluster.resample(rng), "a resample")
            for _ in range(num_resamples)
        ]
    )
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        level=level,
        standard_error=float(draws.std(ddof=1)),
        method=f"hierarchical bootstrap, {num_generator_seeds} generator seeds",
        num_groups=len(cluster.rows),
        is_pilot=num_generator_seeds == 1,
    )


def wilson_interval(successes: int, total: int, *, level: float = 0.95) -> Interval:
    """Interval of a share of independent rows (Wilson 1927); never leaves [0, 1], holds at 0 and at `total`."""
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"successes: want 0 … total with total ≥ 1, got {successes} of {total}")
    _check_level(level, 100)
    z = float(stats.norm.ppf((1 + level) / 2))
    share = successes / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return Interval(
        value=share,
        low=max(0.0, centre - half),
        high=min(1.0, centre + half),
        level=level,
        standard_error=math.sqrt(share * (1 - share) / total),
        method="Wilson",
        num_groups=total,
    )


@dataclass(frozen=True, kw_only=True)
class AreaUnderCurve:
    """Areas under the ROC curves of M score columns on the same rows, with their covariance.

    Attributes:
        areas: float64 (M,).
        covariance: float64 (M, M).
        num_groups: independent units.
    """

    areas: np.ndarray
    covariance: np.ndarray
    num_groups: int

    def interval(self, column: int = 0, *, level: float = 0.95) -> Interval:
        """Interval of one area on the logit scale, so it stays inside (0, 1).

        Raises:
            ValueError: an area of 0 or 1 has no variance estimate; use the bootstrap or more rows.
        """
        area, error = float(self.areas[column]), math.sqrt(max(0.0, float(self.covariance[column, column])))
        if not 0 < area < 1:
            raise ValueError(f"areas: an area of {area} has no DeLong interval; report the counts instead")
        half = float(stats.norm.ppf((1 + level) / 2)) * error / (area * (1 - area))
        centre = math.log(area / (1 - area))
        return Interval(
            value=area,
            low=float(1 / (1 + math.exp(-(centre - half)))),
            high=float(1 / (1 + math.exp(-(centre + half)))),
            level=level,
            standard_error=error,
            method="DeLong, logit",
            num_groups=self.num_groups,
        )

    def compare(self, one: int = 0, two: int = 1) -> Comparison:
        """z test of areas[two] − areas[one]; p is 1 where both arms rank every pair alike."""
        difference = float(self.areas[two] - self.areas[one])
        c = self.covariance
        error = math.sqrt(max(0.0, float(c[one, one] + c[two, two] - 2 * c[one, two])))
        if error > 1e-12:
            p = float(2 * stats.norm.sf(abs(difference) / error))
        elif abs(difference) < 1e-12:
            p = 1.0
        else:
            raise ValueError(f"scores: areas differ by {difference} with zero variance; use the sign-flip test")
        return Comparison(
            difference=difference,
            p_value=p,
            standard_error=error,
            method="DeLong",
            num_groups=self.num_groups,
        )


def delong(
    labels: np.ndarray, scores: np.ndarray, *, groups: Sequence | np.ndarray | None = None
) -> AreaUnderCurve:
    """Areas under ROC curves and their covariance, by midranks (DeLong 1988; Sun & Xu 2014, O(n log n)).

    With groups of several rows the variance is that of clustered data (Obuchowski 1997); groups of one row each give
    DeLong's exactly.

    Args:
        labels: (N,) 0 or 1.
        scores: (M, N), or (N,) for one column; larger means positive.
        groups: (N,) patient or near-duplicate group; None only where each row is its own.

    Raises:
        ValueError: another label, wrong shapes, or fewer than two groups in a class.
    """
    labels, scores = np.asarray(labels), np.atleast_2d(np.asarray(scores, np.float64))
    if scores.shape[1:] != labels.shape or not np.isin(labels, (0, 1)).all() or not np.isfinite(scores).all():
        raise ValueError(f"scores: want finite (M, N) with labels 0 or 1 (N,), got {scores.shape}, {labels.shape}")
    positive = labels == 1
    names = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if names.shape != labels.shape:
        raise ValueError(f"groups: want one for each of {len(labels)} rows, got shape {names.shape}")
    _, group = np.unique(names, return_inverse=True)
    num = int(group.max()) + 1
    with_positive, with_negative = len(set(group[positive])), len(set(group[~positive]))
    if min(with_positive, with_negative) < 2:
        raise ValueError(f"labels: want ≥ 2 groups of each class, got {with_positive} and {with_negative}")
    positives, negatives = int(positive.sum()), int((~positive).sum())
    all_ranks = stats.rankdata(scores, axis=1)
    above = (all_ranks[:, positive] - stats.rankdata(scores[:, positive], axis=1)) / negatives
    below = 1 - (all_ranks[:, ~positive] - stats.rankdata(scores[:, ~positive], axis=1)) / positives
    areas = above.mean(axis=1)

    def sums(components: np.ndarray, of: np.ndarray) -> np.ndarray:
        centred = components - areas[:, None]
        return np.stack([np.bincount(of, weights=row, minlength=num) for row in centred])

    one, two = sums(above, group[positive]), sums(below, group[~positive])
    cross = num / (num - 1) * (one @ two.T) / (positives * negatives)
    covariance = (
        with_positive / (with_positive - 1) * (one @ one.T) / positives**2
        + with_negative / (with_negative - 1) * (two @ two.T) / negatives**2
        + cross
        + cross.T
    )
    return AreaUnderCurve(areas=areas, covariance=covariance, num_groups=num)


def mcnemar(
    one_correct: np.ndarray,
    two_correct: np.ndarray,
    *,
    groups: Sequence | np.ndarray,
    method: Literal["exact", "mid-p"] = "mid-p",
) -> Comparison:
    """Do two classifiers err equally often on the same rows? (McNemar 1947; mid-p as Fagerland et al. 2013.)

    Args:
        one_correct, two_correct: bool (N,).
        groups: (N,); each row must be a group of its own.

    Raises:
        ValueError: a group of several rows (use `sign_flip_test` there).
    """
    one, two = np.asarray(one_correct, bool), np.asarray(two_correct, bool)
    names = np.asarray(groups)
    if not one.shape == two.shape == names.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"one_correct, two_correct, groups: want (N,), got {one.shape} {two.shape} {names.shape}")
    if len(np.unique(names)) < len(names):
        raise ValueError("groups: some hold several rows, which are not independent; use sign_flip_test")
    if method not in ("exact", "mid-p"):
        raise ValueError(f"method: want 'exact' or 'mid-p', got {method!r}")
    gained, lost = int((two & ~one).sum()), int((one & ~two).sum())
    fewer, discordant = min(gained, lost), gained + lost
    p = 2 * float(stats.binom.cdf(fewer, discordant, 0.5))
    if method == "mid-p":
        p -= float(stats.binom.pmf(fewer, discordant, 0.5))
    return Comparison(
        difference=(gained - lost) / len(one),
        p_value=min(1.0, p),
        standard_error=math.sqrt(discordant - (gained - lost) ** 2 / len(one)) / len(one),
        method=f"McNemar, {method}",
        num_groups=len(one),
    )
