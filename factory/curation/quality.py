"""Quality scores: where a synthetic row lies among the real training images. They describe; they are no verdicts.

Each kind is fitted on real training rows only, keeps the digest of their ids, and is computed from what a table already
stores, on a CPU: `density` from embeddings, `shape` from masks, `texture` from images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from factory import geometry
from factory.curation.dedup import nearest
from factory.imaging import as_grey
from schemas.identity import hash_parts

DENSITY_SCORES = ("density", "covers_real")
SHAPE_SCORES = ("area_z", "elongation_z", "solidity_z")
TEXTURE_SCORES = ("sharpness_z", "speckle_z")
_ROWS_AT_ONCE = 1024
_LEAST_ROWS = 5
"""Real rows below which a mean and a standard deviation say nothing."""

# ------------------------------------------------------------------------------------------ embeddings


@dataclass(frozen=True, kw_only=True)
class EmbeddingDensity:
    """How densely real images surround a row, and which real images it covers (Naeem et al. 2020, Eq. 3 and 4).

    A real image's ball reaches to its `k`-th nearest real image of another patient.
    """

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"EmbeddingDensity.k: want at least 1, got {self.k}")

    def fit(
        self, ids: Sequence[str], groups: Sequence[str], embeddings: np.ndarray
    ) -> "FittedEmbeddingDensity":
        """The balls of the real training images; embeddings float32 (M, D), unit norm.

        Raises:
            ValueError: fewer than k + 1 groups.
        """
        similarity, _ = nearest(embeddings, embeddings, self.k, query_groups=groups, reference_groups=groups)
        reach = similarity[:, -1]
        if not len(reach) or not np.isfinite(reach).all():
            raise ValueError(
                f"density: the nearest {self.k} real images of other patients are wanted, and there are too few; use more "
                "real images, or a smaller k"
            )
        return FittedEmbeddingDensity(
            k=self.k,
            embeddings=np.ascontiguousarray(embeddings, np.float32),
            reach=reach,
            fitted_on=hash_parts("rows", *sorted(ids)),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedEmbeddingDensity:
    """Real embeddings (M, D) and the least cosine `reach` (M,) at which a row lies inside each one's ball."""

    k: int
    embeddings: np.ndarray
    reach: np.ndarray
    fitted_on: str

    def density(self, embeddings: np.ndarray) -> np.ndarray:
        """Balls that hold each row, over k: float32 (N,). About 1 where real images are; 0 outside all balls."""
        found = np.empty(len(embeddings), np.float32)
        for start in range(0, len(embeddings), _ROWS_AT_ONCE):
            block = slice(start, start + _ROWS_AT_ONCE)
            found[block] = (embeddings[block] @ self.embeddings.T >= self.reach).sum(axis=1) / self.k
        return found


@dataclass(eq=False)
class Coverage:
    """Which real images have a synthetic one inside their ball, gathered over a stream of rows in any order."""

    fitted: FittedEmbeddingDensity
    _best: np.ndarray = field(init=False)
    _row: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._best = np.full(len(self.fitted.reach), -np.inf, np.float32)
        self._row = [""] * len(self.fitted.reach)

    def add(self, request_ids: Sequence[str], embeddings: np.ndarray) -> None:
        """More rows; of equally near ones the first by request_id stays."""
        for start in range(0, len(request_ids), _ROWS_AT_ONCE):
            ids = np.asarray(request_ids[start : start + _ROWS_AT_ONCE])
            order = np.argsort(ids, kind="stable")
            similarity = self.fitted.embeddings @ embeddings[start : start + _ROWS_AT_ONCE][order].T
            places = similarity.argmax(axis=1)
            values = similarity[np.arange(len(places)), places]
            for real in np.flatnonzero((values >= self._best) & (values >= self.fitted.reach)):
                name = str(ids[order][places[real]])
                if values[real] > self._best[real] or name < self._row[real]:
                    self._best[real], self._row[real] = values[real], name

    @property
    def share(self) -> float:
        """Of the real images, covered: 0 … 1."""
        return float(np.mean([bool(name) for name in self._row]))

    def covers_real(self) -> dict[str, int]:
        """How many real images each row is the nearest cover of; rows that cover none are left out."""
        counts: dict[str, int] = {}
        for name in self._row:
            if name:
                counts[name] = counts.get(name, 0) + 1
        return counts


# ------------------------------------------------------------------------------------------ z-scores


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation of measures over real rows, (k,) each; NaN where they cannot be told."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Of the rows (n, k); NaN for fewer than five rows or a measure that does not vary."""
        if len(values) < _LEAST_ROWS:
            unknown = (float("nan"),) * values.shape[1]
            return cls(mean=unknown, deviation=unknown)
        deviation = values.std(axis=0, ddof=1)
        deviation = np.where(deviation > 1e-9, deviation, np.nan)
        return cls(mean=tuple(values.mean(axis=0).tolist()), deviation=tuple(deviation.tolist()))

    def z(self, values: np.ndarray) -> np.ndarray:
        """(value − mean) / deviation, float32."""
        return ((values - np.array(self.mean)) / np.array(self.deviation)).astype(np.float32)


def measure_shape(mask: np.ndarray | None) -> np.ndarray | None:
    """Log₂ of the area fraction, log₂ of the axis ratio, solidity of the lesion: float64 (3,); None without one."""
    moments = None if mask is None else geometry.moments(mask)
    if mask is None or moments is None:
        return None
    covariance = np.array([[moments.var_x, moments.cov_xy], [moments.cov_xy, moments.var_y]])
    least, greatest = np.linalg.eigvalsh(covariance)
    return np.array(
        [np.log2(moments.area / mask.size), 0.5 * np.log2(greatest / least), geometry.solidity(mask)]
    )


@dataclass(frozen=True, kw_only=True)
class MaskShape:
    """z-scores of the lesion's size and shape among the real training lesions of its class, by class name."""

    spreads: Mapping[str, Spread]
    fitted_on: str

    @classmethod
    def fit(cls, masks: Iterable[tuple[str, np.ndarray | None]], *, fitted_on: str) -> "MaskShape":
        """Over the real rows that have a lesion.

        Args:
            masks: class name and mask (S, S) of each real row, in any order, read once.
            fitted_on: digest of the rows' ids.
        """
        measured: dict[str, list[np.ndarray]] = {}
        for name, mask in masks:
            found = measure_shape(mask)
            if found is not None:
                measured.setdefault(name, []).append(found)
        spreads = {name: Spread.of(np.array(values)) for name, values in measured.items()}
        return cls(spreads=spreads, fitted_on=fitted_on)

    def score(self, masks: Sequence[np.ndarray | None], label_names: Sequence[str]) -> dict[str, np.ndarray]:
        """`SHAPE_SCORES`, float32 (N,); NaN without a lesion, or where the class has too few real ones."""
        out = np.full((len(masks), len(SHAPE_SCORES)), np.nan, np.float32)
        for place, (mask, name) in enumerate(zip(masks, label_names, strict=True)):
            found = measure_shape(mask)
            if found is not None and name in self.spreads:
                out[place] = self.spreads[name].z(found)
        return {name: out[:, k].copy() for k, name in enumerate(SHAPE_SCORES)}


_WINDOW = 7
_LIT_SHARE = 0.9
"""Share of a window's pixels above 0 from which it lies in the picture."""
_LEAST_MEAN = 8.0
"""Grey level below which a window is shadow, where the ratio of deviation to mean is noise."""


def measure_texture(image: np.ndarray) -> np.ndarray:
    """Sharpness and speckle of the grey image, float64 (2,): NaN where it has none.

    Both are means over windows of 7 × 7 px that lie in the picture, not in its padding: sharpness log₁₀ of the squared
    Laplacian, speckle the ratio of standard deviation to mean (Goodman 1976: .52 for fully developed speckle in the
    uncompressed amplitude; less after log compression).
    """
    grey = as_grey(image).astype(np.float64)
    mean = ndimage.uniform_filter(grey, _WINDOW)
    variance = np.maximum(ndimage.uniform_filter(grey**2, _WINDOW) - mean**2, 0.0)
    lit = (mean >= _LEAST_MEAN) & (
        ndimage.uniform_filter((grey > 0).astype(np.float64), _WINDOW) > _LIT_SHARE
    )
    if not lit.any():
        return np.full(2, np.nan)
    energy = float((ndimage.laplace(grey)[lit] ** 2).mean())
    speckle = float((np.sqrt(variance[lit]) / mean[lit]).mean())
    return np.array([np.log10(energy) if energy > 0 else np.nan, speckle])


@dataclass(frozen=True, kw_only=True)
class ImageTexture:
    """z-scores of sharpness and speckle among the real training images at one size; both depend on it.

    Attributes:
        size: px that real images were letterboxed to, and synthetic ones must have.
    """

    size: int
    spread: Spread
    fitted_on: str

    @classmethod
    def fit(cls, images: Iterable[np.ndarray], *, size: int, fitted_on: str) -> "ImageTexture":
        """Over real images letterboxed to `size`, in any order, read once; `fitted_on` is the digest of the rows' ids."""
        found = [measure_texture(image) for image in images]
        measures = np.array(found, np.float64).reshape(-1, len(TEXTURE_SCORES))
        return cls(
            size=size, spread=Spread.of(measures[np.isfinite(measures).all(axis=1)]), fitted_on=fitted_on
        )

    def score(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """`TEXTURE_SCORES`, float32 (N,).

        Raises:
            ValueError: an image has another size.
        """
        out = np.full((len(images), len(TEXTURE_SCORES)), np.nan, np.float32)
        for place, image in enumerate(images):
            if image.shape[:2] != (self.size, self.size):
                raise ValueError(f"texture: want images of {self.size} px, got {image.shape}")
            out[place] = self.spread.z(measure_texture(image))
        return {name: out[:, k].copy() for k, name in enumerate(TEXTURE_SCORES)}
