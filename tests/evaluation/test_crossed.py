"""Interval and p-value over seeds and rows: right about as often as promised, where flipping rows alone is not."""

import numpy as np
import pytest

from factory.evaluation.crossed import crossed_estimate, seed_variance
from factory.evaluation.statistics import sign_flip_test

ROWS = 60


def _differences(rng: np.random.Generator, shape: tuple[int, int], sizes: tuple[float, float]) -> np.ndarray:
    """(G, T, n) differences of two equal arms: each generator and each training has an offset of its own."""
    generator = rng.normal(0, sizes[0], (shape[0], 1, 1))
    task = rng.normal(0, sizes[1], (1, shape[1], 1))
    return generator + task + rng.normal(0, 0.1, (*shape, ROWS)) + rng.normal(0, 0.05, ROWS)


def _estimate(values: np.ndarray):
    flat = values.reshape(-1, ROWS)
    return crossed_estimate(
        values.mean(axis=2), lambda rows: float(flat[:, rows].mean()), np.arange(ROWS), num_resamples=100
    )


@pytest.mark.parametrize(
    ("shape", "sizes"), [((1, 3), (0.0, 0.1)), ((3, 3), (0.1, 0.05)), ((4, 1), (0.1, 0)), ((3, 5), (0, 0))]
)
def test_equal_arms_are_called_different_as_rarely_as_promised(
    shape: tuple[int, int], sizes: tuple[float, float]
) -> None:
    rng = np.random.default_rng(0)
    found = [_estimate(_differences(rng, shape, sizes)) for _ in range(60)]
    wrong = np.mean([estimate.p_value < 0.05 for estimate in found])
    missed = np.mean([not e.interval.low <= 0 <= e.interval.high for e in found])
    assert wrong == missed <= 0.17  # 60 trials at 5 %: above it once in 5,000 times


def test_flipping_rows_alone_calls_another_seed_an_effect() -> None:
    rng = np.random.default_rng(1)
    values = [_differences(rng, (1, 3), (0.0, 0.1)) for _ in range(40)]
    flipped = [sign_flip_test(v.mean(axis=(0, 1)), np.arange(ROWS)).p_value < 0.05 for v in values]
    assert np.mean(flipped) > 0.3
    assert np.mean([_estimate(v).p_value < 0.05 for v in values]) < 0.2


def test_a_difference_beyond_the_seeds_is_found() -> None:
    rng = np.random.default_rng(2)
    found = [_estimate(_differences(rng, (3, 5), (0.02, 0.02)) + 0.2) for _ in range(20)]
    assert np.mean([estimate.p_value < 0.05 for estimate in found]) > 0.9
    assert np.mean([estimate.interval.value for estimate in found]) == pytest.approx(0.2, abs=0.01)


def test_the_variance_over_seeds_is_that_of_crossed_random_effects() -> None:
    rng = np.random.default_rng(3)
    models = [
        rng.normal(0, 0.3, (4, 1)) + rng.normal(0, 0.2, (1, 5)) + rng.normal(0, 0.1, (4, 5))
        for _ in range(4000)
    ]
    true = 0.3**2 / 4 + 0.2**2 / 5 + 0.1**2 / 20
    assert np.var([m.mean() for m in models]) == pytest.approx(true, rel=0.08)
    assert np.mean([seed_variance(m)[0] for m in models]) == pytest.approx(true, rel=0.08)


def test_equal_models_differ_by_nothing() -> None:
    estimate = _estimate(np.zeros((2, 3, ROWS)))
    assert estimate.p_value == 1 and estimate.interval.low == estimate.interval.high == 0


def test_one_model_has_the_variance_of_the_rows_alone() -> None:
    values = np.random.default_rng(4).normal(size=(1, 1, ROWS))
    estimate = _estimate(values)
    assert estimate.interval.standard_error == pytest.approx(values.std() / np.sqrt(ROWS), rel=0.25)
    assert estimate.degrees_of_freedom == pytest.approx(ROWS - 1)
