"""Is the difference more than noise? Bootstrap and subsampling intervals, paired permutation tests.

Rows of one patient, or of one near-duplicate group, are not independent: whatever takes `groups` resamples, swaps or
flips whole groups. Closed-form tests of classifiers are in `classifier_tests.py`, the choice of a ratio and the
correction for several endpoints in `selection.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
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
        self.sorted, self.sizes = np.concatenate(self.rows), np.array([len(rows) for rows in self.rows])
        self.starts, self.is_single = self.sizes.cumsum() - self.sizes, bool((self.sizes == 1).all())
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
        drawn = np.concatenate(
            [stratum[rng.integers(len(stratum), size=len(stratum))] for stratum in self.strata]
        )
        if self.is_single:
            return self.sorted[drawn]
        sizes = self.sizes[drawn]
        ends = sizes.cumsum()
        return self.sorted[np.arange(ends[-1]) + np.repeat(self.starts[drawn] - (ends - sizes), sizes)]

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
        left = np.array(
            [_defined(statistic(cluster.without(g)), f"rows without group {g}") for g in stratum.tolist()]
        )
        influence = (len(stratum) - 1) * (left.mean() - left)
        cubes += float((influence**3).sum()) / len(stratum) ** 3
        squares += float((influence**2).sum()) / len(stratum) ** 2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _bca_tails(value: float, draws: np.ndarray, tails: np.ndarray, acceleration: float) -> np.ndarray:
    below = float((draws < value).mean() + (draws == value).mean() / 2)
    if not 0 < below < 1:
        raise ValueError(
            "method: BCa is undefined, every resample lies on one side of the value; use percentile"
        )
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
        counts = np.bincount(seeds)
        values = [
            _defined(statistic(kind, rows), where) * counts[kind] for kind in np.flatnonzero(counts).tolist()
        ]
        return float(sum(values) / len(seeds))

    value = mean(np.arange(num_generator_seeds), np.arange(len(cluster.of_row)), "all rows")
    draws = np.array(
        [
            mean(
                rng.integers(num_generator_seeds, size=num_generator_seeds),
                cluster.resample(rng),
                "a resample",
            )
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


def subsample_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    one_groups: Sequence | np.ndarray,
    two_groups: Sequence | np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic of two sets from random halves of their groups, without replacement.

    For Fréchet distance and nearest-neighbour statistics, which repeated rows distort (Politis & Romano 1994).
    A half of n rows drawn without replacement varies as the whole varies over samples of n, so the deviations of the
    halves from their own mean are put around the value of all rows. The bias of the statistic at N stays in it.

    Args:
        statistic: (rows of the first set, rows of the second) to a number.
        one_groups, two_groups: (N,), (M,) the group of each row.

    Raises:
        ValueError: a set with fewer than four groups, or an undefined statistic.
    """
    _check_level(level, num_resamples)
    sets = [_Groups(groups, None) for groups in (one_groups, two_groups)]
    for cluster in sets:
        if len(cluster.rows) < 4:
            raise ValueError(f"groups: want at least 4 to halve, got {len(cluster.rows)}")
    rng = np.random.default_rng(seed)

    def half(cluster: _Groups) -> np.ndarray:
        chosen = rng.permutation(len(cluster.rows))[: len(cluster.rows) // 2]
        return np.sort(np.concatenate([cluster.rows[group] for group in chosen]))

    value = _defined(statistic(np.arange(len(sets[0].of_row)), np.arange(len(sets[1].of_row))), "all rows")
    draws = np.array(
        [_defined(statistic(half(sets[0]), half(sets[1])), "a random half") for _ in range(num_resamples)]
    )
    deviations = draws - draws.mean()
    low, high = value + np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        level=level,
        standard_error=float(draws.std(ddof=1)),
        method="half subsamples without replacement",
        num_groups=min(len(cluster.rows) for cluster in sets),
    )


def sign_flip_test(
    differences: np.ndarray,
    groups: Sequence | np.ndarray | None = None,
    *,
    num_flips: int = 9_999,
    seed: int = 0,
) -> Comparison:
    """Is the mean paired difference zero? Signs are flipped group by group.

    All 2^G flips are counted where there are at most 16 groups, so that the smallest p-value is 2 / 2^G (six seeds
    can at best give .031); random flips with the observed one counted otherwise (Phipson & Smyth 2010).

    Args:
        differences: (N,) second arm minus first, per row, per fold or per seed.
        groups: (N,); None makes each difference its own group.

    Raises:
        ValueError: fewer than two groups, or values that are not finite.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"differences: want finite (N,), got shape {values.shape}")
    cluster = _Groups(np.arange(len(values)) if groups is None else groups, None)
    if len(cluster.of_row) != len(values):
        raise ValueError(f"groups: want one for each of {len(values)} differences, got {len(cluster.of_row)}")
    sums = np.array([values[rows].sum() for rows in cluster.rows])
    exact = len(sums) <= MOST_EXACT_GROUPS
    if exact:
        signs = np.array(list(product((1.0, -1.0), repeat=len(sums))))
    else:
        signs = 1.0 - 2.0 * np.random.default_rng(seed).integers(0, 2, (num_flips, len(sums)))
    extreme = int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9 * np.abs(sums).sum()).sum())
    return Comparison(
        difference=float(values.mean()),
        p_value=extreme / len(signs) if exact else (extreme + 1) / (num_flips + 1),
        standard_error=float(np.sqrt((sums**2).sum()) / len(values)),
        method=f"sign flip, {'exact' if exact else f'{num_flips} random'}",
        num_groups=len(sums),
    )


def paired_permutation_test(
    metric: Callable[[np.ndarray, np.ndarray], float],
    targets: np.ndarray,
    one: np.ndarray,
    two: np.ndarray,
    groups: Sequence | np.ndarray,
    *,
    num_permutations: int = 9_999,
    seed: int = 0,
) -> Comparison:
    """Do two arms score alike in a metric that is no mean over rows (AUC, macro-F1)? Arms are swapped by group.

    Args:
        metric: (targets (N, …), predictions (N, …)) to a number.
        targets, one, two: (N, …) what is true and the two arms' predictions of the same rows. Predictions must be
            on one scale in both arms (probabilities, ranks), since swapping mixes them.
    """
    one, two = np.asarray(one), np.asarray(two)
    cluster = _Groups(groups, None)
    if not len(targets) == len(one) == len(two) == len(cluster.of_row) or one.shape != two.shape:
        raise ValueError(
            f"one, two: want predictions of the same {len(targets)} rows, got {one.shape}, {two.shape}"
        )

    def difference(swapped: np.ndarray) -> float:
        rows = swapped[cluster.of_row].reshape(-1, *[1] * (one.ndim - 1))
        value = metric(targets, np.where(rows, one, two)) - metric(targets, np.where(rows, two, one))
        return _defined(value, "a permutation")

    rng = np.random.default_rng(seed)
    observed = difference(np.zeros(len(cluster.rows), bool))
    draws = np.array([difference(rng.random(len(cluster.rows)) < 0.5) for _ in range(num_permutations)])
    extreme = int((np.abs(draws) >= abs(observed) - 1e-12).sum())
    return Comparison(
        difference=observed,
        p_value=(extreme + 1) / (num_permutations + 1),
        standard_error=float(draws.std(ddof=1)),
        method=f"paired permutation, {num_permutations} random",
        num_groups=len(cluster.rows),
    )
