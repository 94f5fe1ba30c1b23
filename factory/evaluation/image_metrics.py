"""How far a set of synthetic images lies from a set of real ones, in the features of an embedder, and how varied it is.

A value says nothing without the number of images, the features, and the same value between two halves of the real set
(the floor): FID falls with N, and on small sets most of it is bias. Features come from the table's embedder, after the
same resizer on both sides; grey images are replicated to three channels before it. MS-SSIM measures diversity without
weights; LPIPS (`factory.evaluation.lpips`) needs files of weights that are not part of this package.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from factory.evaluation.statistics import subsample_interval

Groups = Sequence | np.ndarray
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales, finest first (Wang et al. 2003, §3.2)."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A comparison of real and synthetic images with what is needed to read it.

    Attributes:
        value: between real and synthetic images.
        floor: mean over random halves of the real set, each half against the other, so at half the number of images.
        low, high: interval at `level` from half subsamples without replacement; it holds the spread of the value and
            not its bias at this number of images.
        level: coverage of the interval.
        num_real, num_synthetic: images compared.
        width: of the features.
        caution: why the value should not be a headline, empty if nothing speaks against it.
    """

    value: float
    floor: float
    low: float
    high: float
    level: float
    num_real: int
    num_synthetic: int
    width: int
    caution: str = ""


def frechet_distance(one: np.ndarray, two: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017, FID).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½). The last trace is the sum of the singular values of A₁ A₂ᵀ with
    Σ = Aᵀ A, which is exact also where N < D and Σ has no full rank; no matrix square root, no added ε.

    Raises:
        ValueError: fewer than two rows, different widths, or values that are not finite.
    """
    one, two = _checked(one, two)
    difference = one.mean(axis=0) - two.mean(axis=0)
    roots = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (one, two)]
    spread = sum(float((root**2).sum()) for root in roots)
    overlap = np.linalg.svd(_small(roots[0]) @ _small(roots[1]).T, compute_uv=False).sum()
    return max(0.0, float(difference @ difference + spread - 2 * overlap))


def _small(root: np.ndarray) -> np.ndarray:
    """A factor of Aᵀ A with at most D rows."""
    return root if len(root) <= root.shape[1] else np.asarray(np.linalg.qr(root, mode="r"))


def kernel_distance(one: np.ndarray, two: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, KID).

    Over all pairs, not over random subsets, so there is no subset size to choose; may be negative.

    Raises:
        ValueError: as `frechet_distance`.
    """
    one, two = _checked(one, two)
    width = one.shape[1]
    return _discrepancy(one, two, lambda a, b: (a @ b.T / width + 1.0) ** 3)


def gaussian_distance(one: np.ndarray, two: np.ndarray, *, sigma: float = 10.0) -> float:
    """1000 · unbiased squared maximum mean discrepancy of unit features, Gaussian kernel (Jayasumana et al. 2024, CMMD).

    Deviates: the unbiased estimator, where theirs keeps the diagonal; CMMD by name only on CLIP features.

    Args:
        sigma: of exp(−|x − y|² / 2σ²).

    Raises:
        ValueError: as `frechet_distance`; a feature of zero length, or a sigma that is not positive.
    """
    one, two = _checked(one, two)
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: want a positive number, got {sigma}")
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (one, two)]
    if min(float(x.min()) for x in lengths) == 0:
        raise ValueError("features: one has length zero and no direction")
    unit = [x / length for x, length in zip((one, two), lengths)]
    # |x − y|² = 2 − 2 x·y on unit features; expm1 keeps the digits that 1 − exp(−tiny) would lose.
    return 1000 * _discrepancy(unit[0], unit[1], lambda a, b: np.expm1((a @ b.T - 1.0) / sigma**2))


def _discrepancy(
    one: np.ndarray, two: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> float:
    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(one) + within(two) - 2 * float(kernel(one, two).mean())


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """Neighbourhood statistics of two sets, all larger is better.

    Attributes:
        precision: share of synthetic images inside the neighbourhood of a real one (Kynkäänniemi et al. 2019).
        recall: share of real images inside the neighbourhood of a synthetic one.
        density: number of real neighbourhoods a synthetic image is in, over k; may exceed 1 (Naeem et al. 2020).
        coverage: share of real images whose neighbourhood holds a synthetic one (Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: np.ndarray, synthetic: np.ndarray, *, k: int = 5) -> Manifold:
    """Precision, recall, density and coverage of features (N, D) and (M, D).

    A neighbourhood is the ball to the k-th nearest other image of the same set, its rim included.

    Raises:
        ValueError: as `frechet_distance`, or a set of k images or fewer.
    """
    real, synthetic = _checked(real, synthetic)
    if k < 1 or min(len(real), len(synthetic)) <= k:
        raise ValueError(
            f"k: want 1 … fewer than the {min(len(real), len(synthetic))} images of a set, got {k}"
        )
    radius = _kth_distance(real, k), _kth_distance(synthetic, k)
    between = _distances(real, synthetic)
    in_real = between <= radius[0][:, None]
    return Manifold(
        precision=float(in_real.any(axis=0).mean()),
        recall=float((between <= radius[1][None]).any(axis=1).mean()),
        density=float(in_real.sum(axis=0).mean() / k),
        coverage=float(in_real.any(axis=1).mean()),
    )


def _distances(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    squares = (one**2).sum(1)[:, None] + (two**2).sum(1)[None] - 2 * one @ two.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _kth_distance(features: np.ndarray, k: int) -> np.ndarray:
    within = _distances(features, features)
    np.fill_diagonal(within, np.inf)
    return np.asarray(np.partition(within, k - 1, axis=1)[:, k - 1])


def _checked(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for x in (one, two):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != one.shape[1] or not np.isfinite(x).all():
            raise ValueError(
                f"features: want finite (N ≥ 2, D) of one width, got {one.shape} and {two.shape}"
            )
    return one.astype(np.float64), two.astype(np.float64)


def fid(
    real: np.ndarray,
    synthetic: np.ndarray,
    *,
    real_groups: Groups | None = None,
    synthetic_groups: Groups | None = None,
    num_halves: int = 10,
    num_resamples: int = 100,
    seed: int = 0,
) -> Distance:
    """Fréchet distance with floor and interval; arguments as `with_floor`. Cautions where N ≤ 2 D."""
    return with_floor(
        frechet_distance,
        real,
        synthetic,
        real_groups=real_groups,
        synthetic_groups=synthetic_groups,
        num_halves=num_halves,
        num_resamples=num_resamples,
        least_per_width=2,
        seed=seed,
    )


def kid(
    real: np.ndarray,
    synthetic: np.ndarray,
    *,
    real_groups: Groups | None = None,
    synthetic_groups: Groups | None = None,
    num_halves: int = 10,
    num_resamples: int = 100,
    seed: int = 0,
) -> Distance:
    """Kernel distance with floor and interval; arguments as `with_floor`."""
    return with_floor(
        kernel_distance,
        real,
        synthetic,
        real_groups=real_groups,
        synthetic_groups=synthetic_groups,
        num_halves=num_halves,
        num_resamples=num_resamples,
        seed=seed,
    )


def with_floor(
    metric: Callable[[np.ndarray, np.ndarray], float],
    real: np.ndarray,
    synthetic: np.ndarray,
    *,
    real_groups: Groups | None = None,
    synthetic_groups: Groups | None = None,
    num_halves: int = 10,
    num_resamples: int = 100,
    level: float = 0.95,
    least_per_width: int = 0,
    seed: int = 0,
) -> Distance:
    """Any metric of two feature sets with its half-split floor and its interval; see `Distance`.

    Args:
        metric: (real (N, D), synthetic (M, D)) to a number.
        real_groups: (N,) patient or near-duplicate group; halves and subsamples take whole groups, since twins
            in both halves would lower the floor. None only where each image is its own.
        synthetic_groups: (M,) the real image that a synthetic one keeps pixels of, its own id otherwise; None where
            none keeps any.
        num_halves: random halves behind the floor.
        num_resamples: subsamples behind the interval.
        least_per_width: a caution is written where a set has at most this many images per feature.

    Raises:
        ValueError: fewer than four groups or images, or what the metric refuses.
    """
    _checked(real, synthetic)
    groups = np.arange(len(real)) if real_groups is None else np.asarray(real_groups)
    if groups.shape != (len(real),):
        raise ValueError(f"real_groups: want one for each of {len(real)} images, got shape {groups.shape}")
    interval = subsample_interval(
        lambda one, two: metric(real[one], synthetic[two]),
        groups,
        np.arange(len(synthetic)) if synthetic_groups is None else np.asarray(synthetic_groups),
        level=level,
        num_resamples=num_resamples,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    names = np.unique(groups)
    floors = []
    for _ in range(num_halves):
        first = np.isin(groups, rng.permutation(names)[: len(names) // 2])
        floors.append(metric(real[first], real[~first]))
    fewest, width = min(len(real), len(synthetic)), real.shape[1]
    few = fewest <= least_per_width * width
    return Distance(
        value=interval.value,
        floor=float(np.mean(floors)),
        low=interval.low,
        high=interval.high,
        level=level,
        num_real=len(real),
        num_synthetic=len(synthetic),
        width=width,
        caution=f"{fewest} images for {width} features: mostly bias, read the kernel distance" if few else "",
    )


def manifold_with_floor(
    real: np.ndarray,
    synthetic: np.ndarray,
    *,
    k: int = 5,
    real_groups: Groups | None = None,
    synthetic_groups: Groups | None = None,
    num_halves: int = 10,
    num_resamples: int = 100,
    seed: int = 0,
) -> dict[str, Distance]:
    """Each number of `manifold` by name with its floor (here the value a perfect generator gets) and interval."""
    known: dict[bytes, Manifold] = {}  # the four numbers are asked for on the same halves

    def both(one: np.ndarray, two: np.ndarray) -> Manifold:
        key = b"".join(hashlib.blake2b(np.ascontiguousarray(x).tobytes()).digest() for x in (one, two))
        if key not in known:
            known[key] = manifold(one, two, k=k)
        return known[key]

    def part(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
        return lambda one, two: float(getattr(both(one, two), name))

    return {
        name: with_floor(
            part(name),
            real,
            synthetic,
            real_groups=real_groups,
            synthetic_groups=synthetic_groups,
            num_halves=num_halves,
            num_resamples=num_resamples,
            seed=seed,
        )
        for name in ("precision", "recall", "density", "coverage")
    }


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """A metric by class.

    Attributes:
        values: by label.
        left_out: by label, why a class has no value.
    """

    values: dict[int, Distance]
    left_out: dict[int, str]


def per_class(
    compare: Callable[[np.ndarray, np.ndarray, np.ndarray], Distance],
    real: np.ndarray,
    real_labels: np.ndarray,
    synthetic: np.ndarray,
    synthetic_labels: np.ndarray,
    *,
    real_groups: Groups | None = None,
    least: int = 10,
) -> PerClass:
    """A comparison within each class that either set has.

    Args:
        compare: (real, synthetic, groups of the real) of one class to a `Distance`.
        least: images of each set and groups of the real one that a class must have.
    """
    groups = np.arange(len(real)) if real_groups is None else np.asarray(real_groups)
    values, left_out = {}, {}
    for label in np.union1d(real_labels, synthetic_labels).tolist():
        here, made = real_labels == label, synthetic_labels == label
        numbers = int(here.sum()), len(np.unique(groups[here])), int(made.sum())
        if min(numbers) < least:
            left_out[int(label)] = (
                f"{numbers[0]} real images of {numbers[1]} groups, {numbers[2]} synthetic: want {least}"
            )
        else:
            values[int(label)] = compare(real[here], synthetic[made], groups[here])
    return PerClass(values=values, left_out=left_out)


def ms_ssim(one: np.ndarray, two: np.ndarray, *, num_scales: int = 5, data_range: float = 255.0) -> float:
    """Multi-scale structural similarity of two grey images (H, W), 1 for equal ones (Wang et al. 2003).

    Gaussian window 11 × 11, σ 1.5, over the places where it fits; means of 2 × 2 px between scales; negative terms
    count as 0. With fewer than five scales the finest weights are rescaled to sum to 1: another metric, to be named so.

    Raises:
        ValueError: colour images, different shapes, or sides below 11 · 2^(num_scales − 1) px.
    """
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    if one.ndim != 2 or one.shape != two.shape:
        raise ValueError(f"images: want two grey (H, W) of one shape, got {one.shape} and {two.shape}")
    if not 1 <= num_scales <= len(MS_SSIM_WEIGHTS):
        raise ValueError(f"num_scales: want 1 … {len(MS_SSIM_WEIGHTS)}, got {num_scales}")
    if min(one.shape) < 11 * 2 ** (num_scales - 1):
        raise ValueError(
            f"images: {one.shape} px allow no {num_scales} scales, which need {11 * 2 ** (num_scales - 1)}; "
            "lower num_scales"
        )
    weights = np.array(MS_SSIM_WEIGHTS[:num_scales]) / sum(MS_SSIM_WEIGHTS[:num_scales])
    value = 1.0
    for scale, weight in enumerate(weights):
        luminance, structure = _similarity(one, two, data_range)
        term = structure if scale < num_scales - 1 else luminance
        value *= max(0.0, term) ** weight
        one, two = _halved(one), _halved(two)
    return float(value)


def _halved(image: np.ndarray) -> np.ndarray:
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    return image[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2).mean(axis=(1, 3))


def _similarity(one: np.ndarray, two: np.ndarray, data_range: float) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure term."""
    low, mid = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def smooth(image: np.ndarray) -> np.ndarray:
        return np.asarray(ndimage.gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5])

    mean_one, mean_two = smooth(one), smooth(two)
    variances = smooth(one**2) - mean_one**2 + smooth(two**2) - mean_two**2
    structure = (2 * (smooth(one * two) - mean_one * mean_two) + mid) / (variances + mid)
    luminance = (2 * mean_one * mean_two + low) / (mean_one**2 + mean_two**2 + low)
    return float((luminance * structure).mean()), float(structure.mean())


def ms_ssim_similarity(
    images: Sequence[np.ndarray], *, num_pairs: int = 500, num_scales: int = 5, seed: int = 0
) -> float:
    """Mean MS-SSIM of random pairs of different images of one class; lower is more varied (Odena et al. 2017).

    To be read beside the same number of the real images of the class at the same size.

    Args:
        images: grey uint8 (H, W), all of one shape.
        num_pairs: drawn without repeats; all pairs where there are no more.
    """
    first, second = np.triu_indices(len(images), 1)
    if not len(first) or num_pairs < 1:
        raise ValueError(f"images: want at least two and num_pairs ≥ 1, got {len(images)} and {num_pairs}")
    chosen = np.random.default_rng(seed).permutation(len(first))[:num_pairs]
    return float(
        np.mean(
            [ms_ssim(images[first[p]], images[second[p]], num_scales=num_scales) for p in chosen.tolist()]
        )
    )
