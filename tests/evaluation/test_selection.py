"""Adjusted p-values against their definitions, the ratio rule on curves with a known answer."""

import numpy as np
import pytest
from scipy import stats

from factory.evaluation.selection import (
    benjamini_hochberg,
    holm,
    minimum_detectable_effect,
    one_standard_error,
    oracle_fraction,
)

P = [0.01, 0.04, 0.03, 0.005]


def test_adjusted_p_values_by_hand_and_against_scipy() -> None:
    assert holm(P) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(P) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    many = np.random.default_rng(0).random(40) ** 3
    assert benjamini_hochberg(many) == pytest.approx(stats.false_discovery_control(many))
    assert (holm(many) >= benjamini_hochberg(many) - 1e-12).all()
    assert holm([0.9, 0.8]).max() <= 1
    with pytest.raises(ValueError, match="p_values"):
        holm([0.1, 1.2])


def test_holm_rarely_finds_anything_among_nulls() -> None:
    rng = np.random.default_rng(0)
    found = sum(holm(rng.random(10)).min() <= 0.05 for _ in range(1000))
    assert 25 <= found <= 75


def curve(means: list[float], spread: float, folds: int = 5, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(len(means), folds))
    noise -= noise.mean(axis=1, keepdims=True)
    noise /= noise.std(axis=1, ddof=1, keepdims=True)
    return np.array(means)[:, None] + spread * noise


def test_the_smallest_ratio_within_one_standard_error_is_chosen() -> None:
    means = [0.70, 0.78, 0.80, 0.81]
    # Standard error of the best mean is spread / √5.
    choice = one_standard_error([0, 1, 2, 4], curve(means, 0.04 * np.sqrt(5) * 0.8))
    assert (choice.ratio, choice.best) == (1, 4)
    assert choice.threshold == pytest.approx(0.81 - 0.032)
    assert choice.standard_errors == pytest.approx([0.032] * 4)
    assert one_standard_error([0, 1, 2, 4], curve(means, 0.005)).ratio == 4
    assert one_standard_error([0, 1, 2, 4], curve(means, 0.5)).ratio == 0


def test_ties_go_to_the_smaller_ratio_whatever_the_order_and_synthetic_only_is_last() -> None:
    scores = np.array([[0.8, 0.8], [0.8, 0.8], [0.8, 0.8]])
    choice = one_standard_error([np.inf, 0.5, 0], scores)
    assert (choice.ratio, choice.best, choice.ratios) == (0, 0, (0.0, 0.5, np.inf))


def test_no_effect_seldom_gives_a_ratio_above_zero_and_harm_never() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=(300, 1, 5)) * 0.06
    null = difficulty + 0.01 * rng.normal(size=(300, 4, 5))
    chosen = [one_standard_error([0, 1, 2, 4], scores).ratio for scores in null]
    assert np.mean(np.array(chosen) > 0) <= 0.05
    harm = null - np.array([0, 0.1, 0.2, 0.3])[:, None]
    assert all(one_standard_error([0, 1, 2, 4], scores).ratio == 0 for scores in harm)


def test_paired_errors_see_a_gain_that_the_difficulty_of_folds_hides() -> None:
    rng = np.random.default_rng(0)
    gains = np.array([[0.0], [0.03], [0.03]])
    scores = np.linspace(-0.2, 0.2, 5) + 0.002 * rng.normal(size=(3, 5)) + gains
    assert one_standard_error([0, 1, 2], scores).ratio == 0
    assert one_standard_error([0, 1, 2], scores, error_of="difference").ratio >= 1


@pytest.mark.parametrize(
    ("ratios", "scores", "message"),
    [
        ([1, 2], np.ones((2, 3)), "want 0"),
        ([0, 0], np.ones((2, 3)), "different"),
        ([0, 1], np.ones((2, 1)), "scores"),
        ([0, 1], np.full((2, 3), np.nan), "scores"),
    ],
)
def test_a_curve_that_says_nothing_is_refused(ratios: list, scores: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_standard_error(ratios, scores)


def test_minimum_detectable_effect_is_found_with_the_stated_power() -> None:
    effect = minimum_detectable_effect(0.02)
    assert effect == pytest.approx(0.02 * 2.8016, rel=1e-4)
    draws = np.random.default_rng(0).normal(effect, 0.02, 20_000)
    assert (np.abs(draws) > 1.96 * 0.02).mean() == pytest.approx(0.8, abs=0.01)
    assert minimum_detectable_effect(0.02, degrees_of_freedom=4) > 1.3 * effect
    with pytest.raises(ValueError, match="standard_error"):
        minimum_detectable_effect(0.0)


def test_oracle_fraction() -> None:
    assert oracle_fraction(0.80, 0.82, 0.84) == pytest.approx(0.5)
    assert oracle_fraction(0.80, 0.79, 0.84) == pytest.approx(-0.25)
    assert oracle_fraction(0.80, 0.82, 0.80) is None
