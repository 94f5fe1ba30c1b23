"""Distances of feature sets against closed forms and literal formulas."""

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from factory.evaluation.image_metrics import (
    MS_SSIM_WEIGHTS,
    fid,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    kid,
    manifold,
    manifold_with_floor,
    ms_ssim,
    ms_ssim_similarity,
    per_class,
)


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


def test_gaussian_distance_is_the_mean_over_pairs_of_unit_features() -> None:
    a, b = features(7), features(5, mean=1.0, seed=1)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        return float(np.exp(-((x - y) ** 2).sum() / (2 * 0.7**2)))

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    expected = 1000 * (within_a + within_b - 2 * between)
    assert gaussian_distance(a, b, sigma=0.7) == pytest.approx(expected)
    assert gaussian_distance(3 * a, b, sigma=0.7) == pytest.approx(expected)
    with pytest.raises(ValueError, match="sigma"):
        gaussian_distance(a, b, sigma=0)


def literal_manifold(real: np.ndarray, made: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    inside = [[np.linalg.norm(r - s) <= radius(real, i) for s in made] for i, r in enumerate(real)]
    reached = [[np.linalg.norm(r - s) <= radius(made, j) for j, s in enumerate(made)] for r in real]
    return (
        np.mean(np.any(inside, axis=0)),
        np.mean(np.any(reached, axis=1)),
        np.sum(inside) / (k * len(made)),
        np.mean(np.any(inside, axis=1)),
    )


@pytest.mark.parametrize("k", [1, 3])
def test_manifold_is_its_definition(k: int) -> None:
    real, made = features(14), features(11, mean=0.6, seed=1)
    found = manifold(real, made, k=k)
    expected = literal_manifold(real, made, k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected)


def test_manifold_tells_lack_of_variety_from_lack_of_realism() -> None:
    real = features(200, width=4)
    narrow, noisy = 0.2 * features(200, width=4, seed=1), 4 * features(200, width=4, seed=2)
    few, wide = manifold(real, narrow), manifold(real, noisy)
    assert few.precision > 0.95 and few.recall < 0.4 and few.density > 1 and few.coverage < 0.5
    assert wide.precision < 0.5 and wide.recall > 0.8
    # One far outlier makes noise look precise and hardly adds density: why density was proposed.
    poisoned = manifold(np.vstack([real, np.full((1, 4), 60.0)]), noisy)
    assert poisoned.precision > wide.precision + 0.15
    assert poisoned.density < wide.density + 0.08
    with pytest.raises(ValueError, match="k: want"):
        manifold(real, noisy[:5])


def test_manifold_floor_is_what_a_perfect_generator_gets() -> None:
    real, made = features(80, width=3), features(80, width=3, seed=5)
    for name, distance in manifold_with_floor(real, made, num_resamples=100).items():
        assert distance.value == pytest.approx(distance.floor, abs=0.15), name
        assert distance.low < distance.value < distance.high


def test_floor_and_interval_take_whole_groups() -> None:
    twins, groups = np.repeat(features(40), 2, axis=0), np.arange(80) // 2
    made = features(60, seed=1)
    blind, aware = kid(twins, made), kid(twins, made, real_groups=groups)
    assert blind.floor < aware.floor  # twins in both halves make the halves look closer than they are
    assert aware.high - aware.low > blind.high - blind.low
    alone = manifold_with_floor(twins, made, real_groups=groups)["coverage"].floor
    assert manifold_with_floor(twins, made)["coverage"].floor > alone + 0.2
    with pytest.raises(ValueError, match="real_groups"):
        kid(twins, made, real_groups=groups[:5])


def test_interval_of_the_kernel_distance_covers_its_expectation() -> None:
    # E[KID] of N(0, I) against N(μ, I): by a large sample.
    truth = kernel_distance(features(4000, seed=90), features(4000, mean=0.5, seed=91))
    covered = 0
    for seed in range(40):
        found = kid(features(60, seed=2 * seed), features(60, mean=0.5, seed=2 * seed + 1), num_halves=1)
        covered += found.low <= truth <= found.high
    assert covered >= 33


def test_frechet_distance_of_few_images_carries_a_caution_and_kernel_distance_none() -> None:
    few, many = features(12), features(13)
    assert "12 images for 6 features" in fid(few, many).caution
    assert fid(features(13), many).caution == ""
    assert kid(few, many).caution == ""


def test_per_class_compares_like_with_like_and_says_what_it_leaves_out() -> None:
    real = np.vstack([features(30), features(30, mean=5.0, seed=1), features(4, seed=2)])
    made = np.vstack([features(25, mean=5.0, seed=3), features(25, seed=4)])
    real_labels, made_labels = np.repeat([0, 1, 2], [30, 30, 4]), np.repeat([1, 0], 25)
    found = per_class(
        lambda a, b, groups: kid(a, b, real_groups=groups), real, real_labels, made, made_labels
    )
    assert sorted(found.values) == [0, 1]
    crossed = kid(real[:30], made[:25]).value
    for distance in found.values.values():
        assert abs(distance.value) < 0.05 * crossed
        assert (distance.num_real, distance.num_synthetic) == (30, 25)
    assert found.left_out == {2: "4 real images of 4 groups, 0 synthetic: want 10"}


def literal_ms_ssim(one: np.ndarray, two: np.ndarray, scales: int) -> float:
    """By scikit-image's single-scale index; a huge K1 leaves its contrast-structure term alone."""
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    value = 1.0
    for scale, weight in enumerate(weights):
        options = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5, "data_range": 255}
        k1 = 0.01 if scale == scales - 1 else 1e6
        value *= structural_similarity(one, two, K1=k1, **options) ** weight
        one, two = (
            torch.nn.functional.avg_pool2d(torch.as_tensor(x)[None], 2)[0].numpy() for x in (one, two)
        )
    return value


@pytest.mark.parametrize(("size", "scales"), [(192, 5), (97, 4), (64, 3), (20, 1)])
def test_ms_ssim_is_that_of_scikit_image_and_near_that_of_torchmetrics(size: int, scales: int) -> None:
    rng = np.random.default_rng(0)
    one = ndimage.gaussian_filter(rng.uniform(0, 255, (size, size + 8)), 2)
    one = (one - one.min()) / np.ptp(one) * 255
    two = np.clip(one + rng.normal(0, 25, one.shape), 0, 255)
    assert ms_ssim(one, two, num_scales=scales) == pytest.approx(literal_ms_ssim(one, two, scales), rel=1e-9)
    assert ms_ssim(one, one, num_scales=scales) == pytest.approx(1.0)
    assert ms_ssim(one, two, num_scales=scales) == pytest.approx(ms_ssim(two, one, num_scales=scales))
    if scales == 5:  # torchmetrics averages the last scale over a reflected border too
        pair = [torch.as_tensor(x)[None, None] for x in (two, one)]
        theirs = multiscale_structural_similarity_index_measure(*pair, data_range=255.0)
        assert ms_ssim(one, two) == pytest.approx(float(theirs), abs=2e-3)


def test_varied_images_are_less_alike_than_copies_and_small_ones_need_fewer_scales() -> None:
    rng = np.random.default_rng(0)
    varied = [rng.integers(0, 256, (48, 48)).astype(np.uint8) for _ in range(6)]
    assert ms_ssim_similarity([varied[0]] * 3, num_scales=3) == pytest.approx(1.0)
    assert ms_ssim_similarity(varied, num_scales=3) < 0.3
    assert ms_ssim_similarity(varied, num_scales=3, num_pairs=4, seed=1) == pytest.approx(
        ms_ssim_similarity(varied, num_scales=3, num_pairs=4, seed=1)
    )
    with pytest.raises(ValueError, match="lower num_scales"):
        ms_ssim(varied[0], varied[1])
    with pytest.raises(ValueError, match="grey"):
        ms_ssim(np.zeros((200, 200, 3)), np.zeros((200, 200, 3)))
