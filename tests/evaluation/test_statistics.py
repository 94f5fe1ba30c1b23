"""Intervals and paired tests: coverage, clustering, closed forms, reference implementations."""

import math

import numpy as np
import pytest
from scipy import stats

from factory.evaluation.statistics import (
    bootstrap,
    hierarchical_bootstrap,
    paired_bootstrap,
    paired_permutation_test,
    sign_flip_test,
    subsample_interval,
    wilson_interval,
)
from factory.evaluation.task_metrics import binary_auc


def values(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


@pytest.mark.parametrize(("method", "scipy_method"), [("percentile", "percentile"), ("BCa", "BCa")])
def test_bootstrap_of_single_rows_is_that_of_scipy(method: str, scipy_method: str) -> None:
    x = np.random.default_rng(3).exponential(size=60)
    ours = bootstrap(lambda rows: x[rows].mean(), np.arange(60), method=method, num_resamples=6000)
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=6000, method=scipy_method, rng=np.random.default_rng(1)
    )
    error = ours.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * error)
    assert ours.value == pytest.approx(x.mean())


def test_bca_leans_to_the_side_of_the_skew() -> None:
    x = np.random.default_rng(3).exponential(size=40)
    plain, corrected = (
        bootstrap(lambda rows: x[rows].mean(), np.arange(40), method=method, num_resamples=2000)
        for method in ("percentile", "BCa")
    )
    assert corrected.low > plain.low
    assert corrected.high > plain.high


def test_repeated_rows_of_a_patient_add_no_evidence() -> None:
    x = values(40)
    alone = bootstrap(lambda rows: x[rows].mean(), np.arange(40), num_resamples=2000)
    many, patients = np.repeat(x, 5), np.repeat(np.arange(40), 5)
    grouped = bootstrap(lambda rows: many[rows].mean(), patients, num_resamples=2000)
    naive = bootstrap(lambda rows: many[rows].mean(), np.arange(200), num_resamples=2000)
    assert grouped.standard_error == pytest.approx(alone.standard_error, rel=0.05)
    assert naive.standard_error == pytest.approx(alone.standard_error / math.sqrt(5), rel=0.08)
    assert (grouped.num_groups, naive.num_groups) == (40, 200)


def test_percentile_interval_of_groups_covers_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = np.repeat(rng.normal(size=30), 3) + 0.3 * rng.normal(size=90)
        interval = bootstrap(lambda rows, x=x: x[rows].mean(), np.arange(90) // 3, num_resamples=300)
        covered += interval.low <= 0 <= interval.high
    assert 87 <= covered <= 99


def test_strata_keep_their_numbers_of_groups_in_every_draw() -> None:
    labels = np.array([0] * 20 + [1] * 3 + [0, 1])
    groups = np.array([*range(23), 23, 23])
    seen = []
    bootstrap(
        lambda rows: seen.append(np.bincount(labels[rows])) or 0.5 + len(seen) * 1e-6,
        groups,
        strata=labels,
        num_resamples=100,
    )
    assert all(tuple(counts) == (21, 4) for counts in seen)


def test_a_statistic_that_some_draws_do_not_define_is_refused_without_strata() -> None:
    labels, scores = np.array([1, 1] + [0] * 20), values(22)

    def area(rows: np.ndarray) -> float:
        return binary_auc(labels[rows], scores[rows])

    with pytest.raises(ValueError, match="strata=labels"):
        bootstrap(area, np.arange(22), num_resamples=500)
    assert bootstrap(area, np.arange(22), strata=labels, num_resamples=500).low >= 0


def test_pairing_removes_what_both_arms_share() -> None:
    shared = values(80)
    one, two = shared + 0.1 * values(80, 1), shared + 0.2 + 0.1 * values(80, 2)
    groups = np.arange(80)

    def mean(targets: np.ndarray, predictions: np.ndarray) -> float:
        return float(predictions.mean())

    interval = paired_bootstrap(mean, shared, one, two, groups, num_resamples=1000)
    alone = bootstrap(lambda rows: two[rows].mean(), groups, num_resamples=1000)
    assert interval.low > 0
    assert interval.value == pytest.approx((two - one).mean())
    assert interval.standard_error < 0.3 * alone.standard_error
    with pytest.raises(ValueError, match="same 80 rows"):
        paired_bootstrap(mean, shared, one[:70], two, groups)


def test_hierarchical_interval_holds_the_generators_variation_and_one_seed_is_a_pilot() -> None:
    shifts, x = np.array([-0.8, 0.0, 0.8, 0.1]), values(50)

    def scored(seed: int, rows: np.ndarray) -> float:
        return float(x[rows].mean() + shifts[seed])

    several = hierarchical_bootstrap(scored, np.arange(50), num_generator_seeds=4, num_resamples=2000)
    expected = math.sqrt(shifts.var() / 4 + x.var() / 50)
    assert several.standard_error == pytest.approx(expected, rel=0.06)
    assert several.value == pytest.approx(x.mean() + shifts.mean())
    pilot = hierarchical_bootstrap(scored, np.arange(50), num_generator_seeds=1, num_resamples=500)
    assert pilot.is_pilot and not several.is_pilot
    assert pilot.standard_error < several.standard_error


def test_half_subsamples_give_the_standard_error_of_a_difference_of_means() -> None:
    one, two = values(120), values(80, 1)
    interval = subsample_interval(
        lambda a, b: one[a].mean() - two[b].mean(), np.arange(120), np.arange(80), num_resamples=3000
    )
    expected = math.sqrt(one.var(ddof=1) / 120 + two.var(ddof=1) / 80)
    assert interval.standard_error == pytest.approx(expected, rel=0.05)
    assert interval.low < interval.value < interval.high
    seen: list[int] = []
    subsample_interval(
        lambda a, b: seen.append(len(set(a))) or float(len(a)), np.arange(10), np.arange(8), num_resamples=100
    )
    assert seen == [10] + [5] * 100
    with pytest.raises(ValueError, match="at least 4"):
        subsample_interval(lambda a, b: 0.0, [0, 0, 1, 2], np.arange(9))


def test_wilson_interval_of_published_counts() -> None:
    interval = wilson_interval(139, 156)
    assert (round(interval.low, 3), round(interval.high, 3)) == (0.832, 0.931)
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29.
    for counts, ends in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        found = wilson_interval(*counts)
        assert (found.low, found.high) == pytest.approx(ends, abs=6e-5)
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(3, 2)


def test_sign_flips_are_exact_for_few_seeds() -> None:
    all_up = sign_flip_test(np.array([0.1, 0.2, 0.05, 0.3, 0.15, 0.2]))
    assert all_up.p_value == pytest.approx(2 / 64)
    assert all_up.difference == pytest.approx(1 / 6)
    x = values(9) + 0.4
    reference = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(x).p_value == pytest.approx(reference.pvalue)
    assert sign_flip_test(np.zeros(5)).p_value == 1.0


def test_sign_flips_go_by_group_and_keep_their_level() -> None:
    rejected_grouped = rejected_naive = 0
    for seed in range(100):
        x = np.repeat(np.random.default_rng(seed).normal(size=12), 6)
        rejected_grouped += sign_flip_test(x, np.arange(72) // 6).p_value <= 0.05
        rejected_naive += sign_flip_test(x, num_flips=199, seed=seed).p_value <= 0.05
    assert rejected_grouped <= 12
    assert rejected_naive >= 25


def test_random_sign_flips_agree_with_enumeration() -> None:
    x = values(17, 5) + 0.45
    reference = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(x).p_value == pytest.approx(reference.pvalue, abs=0.012)


def test_swapping_arms_finds_a_better_arm_and_no_difference_between_equals() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2
    noise = rng.normal(size=100)
    good, poor = labels * 2.0 + noise, labels * 0.2 + noise
    better = paired_permutation_test(binary_auc, labels, poor, good, np.arange(100), num_permutations=199)
    assert better.difference == pytest.approx(binary_auc(labels, good) - binary_auc(labels, poor))
    assert better.p_value == pytest.approx(1 / 200)
    same = paired_permutation_test(binary_auc, labels, good, good, np.arange(100), num_permutations=99)
    assert (same.difference, same.p_value) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "level"),
        ({"num_resamples": 10}, "num_resamples"),
        ({"method": "basic"}, "method"),
        ({"strata": [0, 1]}, "strata"),
    ],
)
def test_bootstrap_refuses_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda rows: float(rows.mean()), np.arange(9), **{"num_resamples": 100, **options})


def test_one_group_cannot_be_resampled() -> None:
    with pytest.raises(ValueError, match="one group"):
        bootstrap(lambda rows: 1.0, [7, 7, 7])
