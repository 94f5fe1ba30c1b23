"""How far a set of synthetic images lies from a set of real ones, in the features of an embedder.

A value says nothing without the number of images, the features, and the distance of two halves of the real set
(the floor): FID falls with N, and on small sets most of it is bias.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance with what is needed to read it.

    Attributes:
        value: between real and synthetic images.
        floor: mean over random halves of the real set, each half against the other.
        num_real, num_synthetic: images compared.
    """

    value: float
    floor: float
    num_real: int
    num_synthetic: int


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

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / width + 1.0) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(one) + within(two) - 2 * float(kernel(one, two).mean())


def _checked(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for x in (one, two):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != one.shape[1] or not np.isfinite(x).all():
            raise ValueError(
                f"features: want finite (N ≥ 2, D) of one width, got {one.shape} and {two.shape}"
            )
    return one.astype(np.float64), two.astype(np.float64)


def fid(real: np.ndarray, synthetic: np.ndarray, *, num_halves: int = 10, seed: int = 0) -> Distance:
    """Fréchet distance with its floor; see `Distance`."""
    return _with_floor(frechet_distance, real, synthetic, num_halves, seed)


def kid(real: np.ndarray, synthetic: np.ndarray, *, num_halves: int = 10, seed: int = 0) -> Distance:
    """Kernel distance with its floor; see `Distance`."""
    return _with_floor(kernel_distance, real, synthetic, num_halves, seed)


def _with_floor(
    distance: Callable[[np.ndarray, np.ndarray], float],
    real: np.ndarray,
    synthetic: np.ndarray,
    num_halves: int,
    seed: int,
) -> Distance:
    rng = np.random.default_rng(seed)
    floors = []
    for _ in range(num_halves):
        order = rng.permutation(len(real))
        half = len(real) // 2
        floors.append(distance(real[order[:half]], real[order[half:]]))
    return Distance(
        value=distance(real, synthetic),
        floor=float(np.mean(floors)),
        num_real=len(real),
        num_synthetic=len(synthetic),
    )
