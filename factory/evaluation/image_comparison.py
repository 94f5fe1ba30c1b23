"""The table of `factory evaluate images`: every image metric with all that is needed to read it.

A line says what was compared in which features, how many images, the interval from half subsamples without
replacement, and the same number between two halves of the real set. Diversity is measured among images of one class,
and stands beside that of the real images of the class.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.evaluation.image_metrics import (
    Distance,
    fid,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    kid,
    manifold_with_floor,
    ms_ssim,
    with_floor,
)
from factory.evaluation.statistics import Interval, subsample_interval
from factory.imaging import as_grey, letterbox

if TYPE_CHECKING:
    from factory.evaluation.lpips import LoadedLpips

K_NEAREST = 5
LEAST = 2 * (K_NEAREST + 1)
"""Images, and groups of real ones, that a comparison needs: halves must have more than k neighbours."""
SHARES = ("precision", "recall", "coverage")
UNBOUNDED = ("kid", "cmmd")
"""Unbiased estimates, which may be negative; intervals of the other metrics are cut at 0, of shares at 1 too."""


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """One line of the table.

    Attributes:
        metric: "fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "ms_ssim" or "lpips".
        label: class, or "all".
        features: what was compared: "tiny", "inception:fid-2015", "grey pixels", "vgg16".
        preprocessing: of the images before it.
        value, low, high: with the interval at `level`; None where it could not be computed, see `note`.
        floor: the same between two halves of the real images (for precision, recall, density and coverage the value
            a perfect generator gets); for ms_ssim and lpips the value among the real images themselves.
        autoencoder: of distances, between the real images and the same images through the generator's autoencoder.
        num_real, num_synthetic: images compared.
        note: cautions, or why there is no value.
    """

    metric: str
    label: str
    features: str
    preprocessing: str
    value: float | None
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    floor: float | None = None
    autoencoder: float | None = None
    num_real: int
    num_synthetic: int
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; no NaN."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """Features (N, D) of images, their class names (N,) and groups (N,)."""

    vectors: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def of(self, label: str | None) -> "FeatureSet":
        """The rows of one class; all for None."""
        rows = np.ones(len(self.labels), bool) if label is None else self.labels == label
        return FeatureSet(vectors=self.vectors[rows], labels=self.labels[rows], groups=self.groups[rows])


def classes_of(real: np.ndarray, synthetic: np.ndarray) -> list[str]:
    """Class names in both sets.

    Raises:
        ValueError: they have none in common.
    """
    both = sorted(set(real.tolist()) & set(synthetic.tolist()))
    if not both:
        raise ValueError(
            f"the real images are {', '.join(sorted(set(real.tolist())))}, the synthetic ones "
            f"{', '.join(sorted(set(synthetic.tolist())))}: no class in common to compare"
        )
    return both


def distances(
    real: FeatureSet,
    synthetic: FeatureSet,
    *,
    features: str,
    preprocessing: str,
    is_clip: bool = False,
    round_trip: np.ndarray | None = None,
    labels: Sequence[str | None] = (None,),
    num_resamples: int = 100,
    seed: int = 0,
) -> Iterator[ImageScore]:
    """Every distance in one kind of features.

    Args:
        is_clip: whether CMMD may be called so.
        round_trip: features of the real images after the generator's autoencoder, in the order of `real`.
        labels: classes to compare; None for all images.
        num_resamples: half subsamples behind the intervals.

    Raises:
        ValueError: fewer than 12 images on a side, or 12 real groups, where all images are compared.
    """
    for label in labels:
        one, two = real.of(label), synthetic.of(label)
        counts = (len(one.vectors), len(np.unique(one.groups)), len(two.vectors), len(np.unique(two.groups)))
        common: dict[str, Any] = {
            "label": label or "all", "features": features, "preprocessing": preprocessing,
            "num_real": counts[0], "num_synthetic": counts[2],
        }  # fmt: skip
        if min(counts) < LEAST:
            told = (
                f"{counts[0]} real image(s) of {counts[1]} group(s) and {counts[2]} synthetic of {counts[3]} backgrounds "
                f"or images of their own: want {LEAST} of each"
            )
            if label is None:
                raise ValueError(f"images to compare: {told}")
            yield ImageScore(metric="all distances", value=None, note=told, **common)
            continue
        passed = None
        if round_trip is not None:
            passed = round_trip if label is None else round_trip[real.labels == label]
        yield from _of_class(one, two, passed, common, is_clip, num_resamples, seed)


def _of_class(
    real: FeatureSet,
    synthetic: FeatureSet,
    passed: np.ndarray | None,
    common: dict[str, Any],
    is_clip: bool,
    num_resamples: int,
    seed: int,
) -> Iterator[ImageScore]:
    options: dict[str, Any] = {
        "real_groups": real.groups, "synthetic_groups": synthetic.groups,
        "num_resamples": num_resamples, "seed": seed,
    }  # fmt: skip
    sets = real.vectors, synthetic.vectors
    found: dict[str, tuple[Distance, Callable[[np.ndarray, np.ndarray], float] | None]] = {
        "kid": (kid(*sets, **options), kernel_distance),
        "cmmd": (with_floor(gaussian_distance, *sets, **options), gaussian_distance),
        "fid": (fid(*sets, **options), frechet_distance),
    }
    found |= {
        name: (value, None) for name, value in manifold_with_floor(*sets, k=K_NEAREST, **options).items()
    }
    for name, (distance, metric) in found.items():
        note = distance.caution
        if name == "cmmd" and not is_clip:
            note = "CMMD's kernel on other features than CLIP's: not the published CMMD"
        yield ImageScore(
            metric=name,
            value=distance.value,
            low=distance.low if name in UNBOUNDED else max(0.0, distance.low),
            high=min(1.0, distance.high) if name in SHARES else distance.high,
            level=distance.level,
            floor=distance.floor,
            autoencoder=None if passed is None or metric is None else metric(real.vectors, passed),
            note=note,
            **common,
        )


def num_scales_of(side: int) -> int:
    """Scales of MS-SSIM that images of this side allow, at most five; 0 below 11 px."""
    return next((scales for scales in (5, 4, 3, 2, 1) if side >= 11 * 2 ** (scales - 1)), 0)


def diversity(
    real: Sequence[np.ndarray],
    synthetic: Sequence[np.ndarray],
    *,
    real_groups: np.ndarray,
    synthetic_groups: np.ndarray,
    label: str,
    size: int,
    lpips: "LoadedLpips | None" = None,
    num_resamples: int = 200,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[ImageScore]:
    """How alike images of one class are among themselves: mean over pairs of different groups.

    A low MS-SSIM and a high LPIPS are varied; what is varied enough is what the real images are.

    Args:
        real, synthetic: uint8 images of the class, letterboxed here to `size` px.
        lpips: None: its line says that no weights were given.
        progress: called with 1 after each set and metric.
    """
    counts: dict[str, Any] = {"label": label, "num_real": len(real), "num_synthetic": len(synthetic)}
    how = f"letterbox {size} px, Lanczos"
    scales = num_scales_of(size)
    fewest = min(len(np.unique(real_groups)), len(np.unique(synthetic_groups)))
    squares = [[letterbox(image, size) for image in images] for images in (real, synthetic)]

    def score(metric: str, features: str, matrix: Callable[[list[np.ndarray]], np.ndarray]) -> ImageScore:
        values = []
        for images, groups in zip(squares, (real_groups, synthetic_groups), strict=True):
            values.append(_mean_of_pairs(matrix(images), groups, num_resamples, seed))
            progress(1)
        return ImageScore(
            metric=metric, features=features, preprocessing=how, value=values[1].value, low=values[1].low,
            high=values[1].high, floor=values[0].value, **counts,
        )  # fmt: skip

    if fewest < 4:
        told = f"{fewest} group(s) on one side: want at least 4"
        for metric in ("ms_ssim", "lpips"):
            yield ImageScore(metric=metric, features="-", preprocessing=how, value=None, note=told, **counts)
        return
    if not scales:
        note = f"{size} px is too small for MS-SSIM (11 px)"
        yield ImageScore(metric="ms_ssim", features="-", preprocessing=how, value=None, note=note, **counts)
    else:
        yield score(
            "ms_ssim", f"grey pixels, {scales} scales", lambda images: _ms_ssim_matrix(images, scales)
        )
    if lpips is None:
        note = "no weights given (--lpips-backbone, --lpips-linear)"
        yield ImageScore(metric="lpips", features="-", preprocessing=how, value=None, note=note, **counts)
    else:
        yield score("lpips", lpips.name, lpips.matrix)


def _ms_ssim_matrix(images: list[np.ndarray], num_scales: int) -> np.ndarray:
    grey = [as_grey(image) for image in images]
    out = np.ones((len(grey), len(grey)))
    for row in range(len(grey)):
        for column in range(row):
            out[row, column] = out[column, row] = ms_ssim(grey[row], grey[column], num_scales=num_scales)
    return out


def _mean_of_pairs(matrix: np.ndarray, groups: np.ndarray, num_resamples: int, seed: int) -> Interval:
    """Mean over pairs of different groups, with the interval of half subsamples of the groups."""

    def mean(rows: np.ndarray, _: np.ndarray) -> float:
        apart = groups[rows][:, None] != groups[rows][None]
        return float(matrix[np.ix_(rows, rows)][apart].mean())

    # The second set of the two-sample interval plays no part in the statistic.
    return subsample_interval(mean, groups, np.arange(4), num_resamples=num_resamples, seed=seed)
