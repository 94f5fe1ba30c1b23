"""Near-duplicates by image embedding: among synthetic images, and nearest real training images.

Exact inner products by FAISS in blocks of queries; images above a similarity threshold are linked, connected
components are one picture each, and of each the best member is kept. Memory is bounded whatever the number of
links: links found in a block are reduced to a spanning forest before the next block is searched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

MAX_LINKS = 1 << 24
"""Links held at a time: 200 MB of FAISS results in the worst case."""
MAX_NEIGHBOURS_GPU = 2048
"""Neighbours that FAISS returns per query on a GPU, where it has no range search."""
QUERIES_PER_BLOCK = 4096


def check_unit(embeddings: np.ndarray, name: str = "embeddings") -> np.ndarray:
    """`embeddings` as contiguous float32 (N, D).

    Raises:
        ValueError: another number of axes, or rows that are not finite and of unit norm.
    """
    vectors = np.ascontiguousarray(embeddings, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"{name}: want (N, D), got shape {vectors.shape}")
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if bad.size:
        raise ValueError(f"{name}: row {bad[0]} has norm {norms[bad[0]]:.4g}, want unit norm")
    return vectors


def flat_index(embeddings: np.ndarray, num_threads: int | None = None) -> tuple[Any, bool]:
    """Exact inner-product index over float32 (N, D), and whether it lies on GPUs.

    All GPUs that FAISS sees are used (none with faiss-cpu); `num_threads` caps its OpenMP threads.
    """
    import faiss

    if num_threads is not None:
        faiss.omp_set_num_threads(num_threads)
    index: Any = faiss.IndexFlatIP(embeddings.shape[1])
    on_gpu = getattr(faiss, "get_num_gpus", int)() > 0
    if on_gpu:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(embeddings)
    return index, on_gpu


def nearest(
    queries: np.ndarray,
    references: np.ndarray,
    k: int,
    *,
    query_groups: Sequence[str | None] | None = None,
    reference_groups: Sequence[str] | None = None,
    num_threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar references of each query; those of the query's own group are left out.

    Args:
        queries: (N, D) unit norm.
        references: (M, D) unit norm.
        k: how many.
        query_groups: group of each query, None where it has none; without it nothing is left out.
        reference_groups: group of each reference.
        num_threads: cap on FAISS's threads.

    Returns:
        Similarity, float32 (N, k), falling, -inf where there is none; position, int64 (N, k), -1 likewise.
        Equal similarities are ordered by position.
    """
    if k < 1:
        raise ValueError(f"k: {k} must be at least 1")
    queries, references = check_unit(queries, "queries"), check_unit(references, "references")
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    position = np.full((len(queries), k), -1, np.int64)
    if not len(queries) or not len(references):
        return similarity, position
    codes, own_codes, largest = _group_codes(query_groups, reference_groups, len(queries), len(references))
    index, _ = flat_index(references, num_threads)
    depth = min(k + largest, len(references))
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        found, where = index.search(queries[block], depth)
        found = np.where((codes[where] == own_codes[block, None]) | (where < 0), -np.inf, found)
        order = np.lexsort((where, -found), axis=1)[:, :k]
        found, where = np.take_along_axis(found, order, 1), np.take_along_axis(where, order, 1)
        width = found.shape[1]
        similarity[block, :width] = found
        position[block, :width] = np.where(np.isfinite(found), where, -1)
    return similarity, position


def _group_codes(
    query_groups: Sequence[str | None] | None,
    reference_groups: Sequence[str] | None,
    num_queries: int,
    num_references: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Number of each reference's group, of each query's (-1: none), size of the largest group to leave out."""
    none = np.full(num_queries, -1, np.int64)
    if query_groups is None or reference_groups is None:
        return np.zeros(num_references, np.int64), none, 0
    if len(query_groups) != num_queries or len(reference_groups) != num_references:
        raise ValueError(
            f"groups: want {num_queries} and {num_references}, got {len(query_groups)} and {len(reference_groups)}"
        )
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(group, len(numbers)) for group in reference_groups], np.int64)
    own = np.array([-1 if g is None else numbers.get(g, -1) for g in query_groups], np.int64)
    sizes = np.bincount(codes, minlength=1)
    used = own[own >= 0]
    return codes, own, int(sizes[used].max()) if used.size else 0


def real_similarity_quantile(
    embeddings: np.ndarray, groups: Sequence[str], quantile: float, num_threads: int | None = None
) -> float:
    """Quantile of the similarity of each real image to its nearest of another group.

    Two synthetic images that are more alike than this are more alike than real images of different patients
    are, and count as one. Groups hold a patient's images and near-duplicates, so twins do not move it.

    Args:
        embeddings: (n, D) unit norm, training rows only.
        groups: group_id of each.
        quantile: 0 … 1.

    Raises:
        ValueError: fewer than two groups, or a quantile outside 0 … 1.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: {quantile} is outside 0 … 1")
    if len(set(groups)) < 2:
        raise ValueError(
            f"{len(set(groups))} group(s) among {len(groups)} real training images: no threshold can be derived "
            "from them; give --duplicate-similarity"
        )
    similarity, _ = nearest(
        embeddings, embeddings, 1, query_groups=groups, reference_groups=groups, num_threads=num_threads
    )
    return float(np.quantile(similarity[:, 0], quantile))


@dataclass(frozen=True, kw_only=True, eq=False)
class Duplicates:
    """Result of a search among N images.

    Attributes:
        kept: (N,) int64, position of the member that is kept of each image's component; its own where alone.
        num_links: pairs at or above the threshold.
        threshold: cosine similarity.
    """

    kept: np.ndarray
    num_links: int
    threshold: float

    @property
    def is_duplicate(self) -> np.ndarray:
        """(N,) bool: another member of its component is kept."""
        return self.kept != np.arange(len(self.kept))


def find_duplicates(
    embeddings: np.ndarray, rank: np.ndarray, threshold: float, *, num_threads: int | None = None
) -> Duplicates:
    """Link images with cosine ≥ `threshold`; of each connected component keep the member of lowest rank.

    The order of the rows changes nothing but positions: pass rows in an order of their own (by id) where
    similarities that equal the threshold to the last bit must not depend on it either.

    Args:
        embeddings: (N, D) unit norm.
        rank: (N,) distinct integers, the best member lowest.
        threshold: -1 … 1.
        num_threads: cap on FAISS's threads.

    Raises:
        ValueError: threshold out of range, or ranks that are not distinct.
    """
    vectors = check_unit(embeddings)
    count = len(vectors)
    if not -1 < threshold <= 1.001:
        raise ValueError(f"duplicate similarity: {threshold} is outside -1 … 1")
    if len(np.unique(rank)) != count:
        raise ValueError(f"rank: want {count} distinct numbers, one per row")
    if count == 0:
        return Duplicates(kept=np.empty(0, np.int64), num_links=0, threshold=threshold)
    component = np.arange(count)
    num_links = 0
    for first, second in linked_pairs(vectors, threshold, num_threads):
        num_links += len(first)
        component = _merge(component, first, second)
    order = np.argsort(rank, kind="stable")
    best = np.full(component.max() + 1, -1, np.int64)
    best[component[order][::-1]] = order[::-1]  # the last write, of the lowest rank, stays
    return Duplicates(kept=best[component], num_links=num_links, threshold=threshold)


def _merge(component: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Component numbers after linking positions `first` with `second`."""
    one, other = component[first], component[second]
    apart = one != other
    if not apart.any():
        return component
    size = int(component.max()) + 1
    links = sparse.coo_array(
        (np.ones(int(apart.sum()), np.int8), (one[apart], other[apart])), shape=(size, size)
    )
    _, merged = sparse.csgraph.connected_components(links, directed=False)
    return merged[component]


def linked_pairs(
    vectors: np.ndarray, threshold: float, num_threads: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (first, second), first < second, of pairs with inner product ≥ `threshold`, in blocks."""
    index, on_gpu = flat_index(vectors, num_threads)
    radius = float(np.nextafter(np.float32(threshold), np.float32(-2)))  # FAISS compares with >
    block = max(1, min(QUERIES_PER_BLOCK, MAX_LINKS // len(vectors)))
    for start in range(0, len(vectors), block):
        queries = vectors[start : start + block]
        if on_gpu:
            rows, others = pairs_by_search(index, queries, vectors, radius, MAX_NEIGHBOURS_GPU)
        else:
            rows, others = _pairs_in_range(index, queries, radius)
        first = rows + start
        later = others > first
        yield first[later], others[later]


def _pairs_in_range(index: Any, queries: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    limits, _, others = index.range_search(queries, radius)
    return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), others


def pairs_by_search(
    index: Any, queries: np.ndarray, vectors: np.ndarray, radius: float, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same pairs by nearest-neighbour search, for indexes without range search.

    The number of neighbours is doubled for the queries whose last one is still in range; queries with more
    than `most` go to a CPU index.

    Args:
        index: over `vectors`.
        queries: (n, D).
        vectors: (N, D).
        radius: pairs with an inner product above it are wanted.
        most: greatest number of neighbours that the index returns.
    """
    rows, others = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    left = np.arange(len(queries))
    depth = min(32, most, len(vectors))
    while left.size:
        found, where = index.search(queries[left], depth)
        complete = (found[:, -1] <= radius) | (depth == len(vectors))
        hit, column = np.nonzero((found > radius) & complete[:, None])
        rows.append(left[hit])
        others.append(where[hit, column].astype(np.int64))
        left = left[~complete]
        if depth == most and left.size:
            import faiss

            exact = faiss.IndexFlatIP(vectors.shape[1])
            exact.add(vectors)
            more, their = _pairs_in_range(exact, queries[left], radius)
            rows.append(left[more])
            others.append(their)
            break
        depth = min(depth * 2, most, len(vectors))
    return np.concatenate(rows), np.concatenate(others)
