"""How near an image, or its lesion, is to real ones: neither farther nor closer than real ones are to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from factory.curation.filter_batch import FilterBatch, Scores, column, digest_rows
from factory.curation.lesion_crops import Embed, embed_crops, lesion_area
from factory.imaging import TrainingRow
from schemas.identity import hash_parts
from schemas.sample import RejectReason

_SIZE_BINS = 3


@dataclass(frozen=True, kw_only=True)
class SimilarityBand:
    """Images too far from every real training image of their class, or closer than real images are.

    The nearest cosine similarity to the class's references is placed within the distribution that real
    images of other patients have: leave one out, own group excluded, with as many references as scoring uses
    (the nearest similarity grows with the number of references). Deviates from Xie et al. 2025, who state
    neither reference nor thresholds. The band cannot detect copies (most true twins fall below its upper
    bound): that is a test of its own on registered crops.

    Where a generated lesion stands in a real background, whole frames always resemble each other: region "lesion"
    compares crops around the mask instead. The distribution is then per class and size of the lesion (thirds of
    the class's areas; halves, or all together, where a third would have fewer than `min_references` lesions).

    Attributes:
        lower, upper: accepted positions: quantiles of the real distribution in 0 … 1; below 0 and above 1
            count interquartile ranges beyond its ends.
        min_references: classes with fewer independent references are not judged, and say so.
        region: "frame", or "lesion" for the crop around the mask.
    """

    ENTERS_SCORES: ClassVar[tuple[str, ...]] = ("min_references", "region")

    lower: float = 0.005
    upper: float = 0.995
    min_references: int = 20
    region: Literal["frame", "lesion"] = "frame"

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise ValueError(f"want lower < upper, got {self.lower} and {self.upper}")
        if self.min_references < 2:
            raise ValueError(f"min_references: want ≥ 2, got {self.min_references}")
        if self.region not in ("frame", "lesion"):
            raise ValueError(f"region={self.region!r}: want frame or lesion")

    @property
    def needs_crops(self) -> bool:
        """Whether `fit` must be given `embed`, and batches `crop_embeddings`."""
        return self.region == "lesion"

    def fit(
        self, rows: Sequence[TrainingRow], embeddings: np.ndarray, embed: Embed | None = None
    ) -> "FittedSimilarityBand":
        """References and the real-to-real distribution per class.

        Args:
            rows: real training rows.
            embeddings: float32 (n, D), unit norm, of the same rows in the same order.
            embed: the embedder of the table, for crops; needed for region "lesion" alone.

        Raises:
            ValueError: numbers differ, an embedding is not of unit norm, or `embed` is missing.
        """
        embeddings = np.asarray(embeddings, np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(rows):
            raise ValueError(f"embeddings: want ({len(rows)}, D), one per row, got {embeddings.shape}")
        areas = np.zeros(len(rows))
        usable = list(range(len(rows)))
        if self.needs_crops:
            if embed is None:
                raise ValueError(
                    "SimilarityBand: region='lesion' wants the embedder that made the embeddings"
                )
            areas = np.array([lesion_area(row.mask) for row in rows])
            usable = [k for k in range(len(rows)) if np.isfinite(areas[k])]
            masks, images = [row.mask for row in rows], [row.image for row in rows]
            embeddings = embed_crops(images, masks, embed, embeddings.shape[1])
        if len(usable) and not np.allclose(np.linalg.norm(embeddings[usable], axis=1), 1, atol=1e-3):
            raise ValueError("embeddings: want unit norm")
        classes = {}
        for label in sorted({row.label for row in rows}):
            members = [k for k in usable if rows[k].label == label]
            name = next(row.label_name for row in rows if row.label == label)
            classes[label] = self._fit_class(name, members, rows, embeddings, areas)
        return FittedSimilarityBand(source=self, classes=classes, fitted_on=digest_rows(rows))

    def _fit_class(
        self,
        name: str,
        members: Sequence[int],
        rows: Sequence[TrainingRow],
        embeddings: np.ndarray,
        areas: np.ndarray,
    ) -> "RealNeighbours":
        # Order by a hash of the id: which rows are references depends neither on table order nor on names.
        order = sorted(members, key=lambda k: hash_parts("reference", rows[k].image_id))
        vectors = embeddings[order]
        groups = np.array([rows[k].group_id for k in order])
        _, group_index, group_sizes = np.unique(groups, return_inverse=True, return_counts=True)
        size = len(order) - int(group_sizes.max(initial=0))  # left for every row once its group is out
        if size < self.min_references:
            off = (
                f"class {name!r} has {size} references outside a row's own group, {self.min_references} are needed: "
                "not judged"
            )
            return RealNeighbours(references=vectors, nearest=np.empty(0, np.float32), off=off)
        similarity = vectors @ vectors.T
        other = group_index[:, None] != group_index[None, :]
        usable = other & (np.cumsum(other, axis=1) <= size)
        nearest = np.where(usable, similarity, -np.inf).max(axis=1)
        item = RealNeighbours(references=vectors[:size].copy(), nearest=np.sort(nearest))
        return self._by_size(item, nearest, areas[order]) if self.needs_crops else item

    def _by_size(self, item: "RealNeighbours", nearest: np.ndarray, areas: np.ndarray) -> "RealNeighbours":
        count = min(_SIZE_BINS, max(1, len(areas) // self.min_references))
        edges = np.unique(np.quantile(areas, np.arange(1, count) / count))
        bins = np.searchsorted(edges, areas, side="right")
        if len(np.unique(bins)) <= len(edges):  # lesions of one size leave a bin empty
            edges, bins = np.empty(0), np.zeros(len(areas), np.int64)
        return RealNeighbours(
            references=item.references,
            nearest=item.nearest,
            edges=edges,
            by_size=tuple(np.sort(nearest[bins == k]) for k in range(len(edges) + 1)),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RealNeighbours:
    """One class: what is near to what among its real rows.

    Attributes:
        references: (m, D), unit norm.
        nearest: sorted nearest similarities of real rows, (n,).
        off: why the class is not judged; "" where it is.
        edges: areas between the bins of lesion size, fractions of the frame, ascending.
        by_size: `nearest` of each bin; empty where size does not matter.
    """

    references: np.ndarray = field(repr=False)
    nearest: np.ndarray = field(repr=False)
    off: str = ""
    edges: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    by_size: tuple[np.ndarray, ...] = field(default=(), repr=False)

    def position(self, similarity: np.ndarray, areas: np.ndarray | None = None) -> np.ndarray:
        """Quantile of `similarity` (N,) among real rows, continued beyond the ends in interquartile ranges.

        `areas` (N,) are lesion sizes as fractions of the frame, for those with bins.
        """
        if areas is None or not self.by_size:
            return _position(self.nearest, similarity)
        bins = np.searchsorted(self.edges, areas, side="right")
        out = np.empty(len(similarity), np.float64)
        for number, nearest in enumerate(self.by_size):
            out[bins == number] = _position(nearest, similarity[bins == number])
        return out


def _position(nearest: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    low, high = nearest[0], nearest[-1]
    first, third = np.quantile(nearest, [0.25, 0.75])
    unit = max(float(third - first), 1e-6)
    inside = np.interp(similarity, nearest, np.linspace(0.0, 1.0, len(nearest)))
    return inside + np.minimum(similarity - low, 0) / unit + np.maximum(similarity - high, 0) / unit


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedSimilarityBand:
    """`SimilarityBand` with its references. Scores, with the prefix "lesion_" for region "lesion":

    - similarity: cosine to the nearest reference of the row's class; NaN where the class or the lesion is missing.
    - similarity_position: see `SimilarityBand`; NaN where the class is not judged.
    """

    source: SimilarityBand
    classes: Mapping[int, RealNeighbours] = field(repr=False)
    fitted_on: str

    @property
    def needs_crops(self) -> bool:
        """Whether batches must have `crop_embeddings`."""
        return self.source.needs_crops

    @property
    def off(self) -> dict[int, str]:
        """Why a class is not judged, for the classes that are not: to be recorded and shown."""
        return {label: item.off for label, item in self.classes.items() if item.off}

    @property
    def _prefix(self) -> str:
        return "lesion_" if self.source.needs_crops else ""

    def score(self, batch: FilterBatch) -> dict[str, np.ndarray]:
        """See the class.

        Raises:
            ValueError: region "lesion" and a batch without `crop_embeddings`.
        """
        vectors, areas = batch.embeddings, None
        if self.needs_crops:
            if batch.crop_embeddings is None:
                raise ValueError("FilterBatch.crop_embeddings: SimilarityBand(region='lesion') needs them")
            vectors, areas = batch.crop_embeddings, np.array([lesion_area(mask) for mask in batch.masks])
        present = np.isfinite(vectors).all(axis=1)
        similarity = np.full(len(batch), np.nan, np.float32)
        position = similarity.copy()
        for label, item in self.classes.items():
            chosen = np.flatnonzero((np.asarray(batch.labels) == label) & present)
            if chosen.size and len(item.references):
                similarity[chosen] = (vectors[chosen] @ item.references.T).max(axis=1)
                if not item.off:
                    sizes = None if areas is None else areas[chosen]
                    position[chosen] = item.position(similarity[chosen], sizes)
        return {f"{self._prefix}similarity": similarity, f"{self._prefix}similarity_position": position}

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """TOO_FAR_FROM_REAL below the band, TOO_SIMILAR_TO_REAL above it."""
        position = column(scores, f"{self._prefix}similarity_position")
        return [
            RejectReason.TOO_FAR_FROM_REAL
            if value < self.source.lower
            else RejectReason.TOO_SIMILAR_TO_REAL
            if value > self.source.upper
            else None
            for value in position
        ]
