"""Distances of feature sets against closed forms and literal formulas."""

import numpy as np
import pytest
from scipy import linalg

from factory.evaluation.image_metrics import fid, frechet_distance, kernel_distance, kid


def features(count: int, width: int = 6, *, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, (count, width))


@pytest.mark.parametrize(("one", "two"), [(40, 60), (5, 30), (4, 4)])
def test_frechet_distance_is_that_of_the_matrix_square_root(one: int, two: int) -> None:
    a, b = features(one), features(two, mean=0.5, seed=1) * 1.7
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))


def test_frechet_distance_of_equal_sets_is_zero_and_of_a_shift_its_square() -> None:
    a = features(50)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(4 * 6)


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    a, b = features(7), features(5, mean=1.0, seed=1)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 6 + 1) ** 3

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_kernel_distance_is_unbiased_and_frechet_distance_is_not() -> None:
    pairs = [(features(20, seed=2 * i), features(20, seed=2 * i + 1)) for i in range(200)]
    distances = np.array([kernel_distance(a, b) for a, b in pairs])
    assert abs(distances.mean()) < 3 * distances.std() / np.sqrt(len(pairs))
    small = np.mean([frechet_distance(a, b) for a, b in pairs])
    large = np.mean([frechet_distance(features(200, seed=i), features(200, seed=999 + i)) for i in range(20)])
    assert small > 5 * large > 0


def test_results_carry_counts_and_a_floor() -> None:
    real, synthetic = features(60), features(40, mean=1.0, seed=3)
    for distance in (fid(real, synthetic), kid(real, synthetic)):
        assert distance.value > 5 * abs(distance.floor)
        assert (distance.num_real, distance.num_synthetic) == (60, 40)
    assert fid(real, synthetic) == fid(real, synthetic)


@pytest.mark.parametrize("bad", [features(1), features(5, width=3), np.full((4, 6), np.nan), np.zeros(6)])
def test_features_that_cannot_be_compared_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features: want finite"):
        frechet_distance(features(9), bad)
