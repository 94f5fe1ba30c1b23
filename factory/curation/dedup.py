"""Near-duplicates by image embedding: among synthetic images, and nearest real training images.

Exact inner products by FAISS in blocks of queries; images above a similarity threshold are linked, connected
components are one picture each, and of each the best member is kept. Memory is bounded whatever the number of
links. The cost is the square of the number of rows: `factory.curation.cells` is for many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from factory.curation.components import Links, best_members

MAX_LINKS = 1 << 24
"""Links held at a time: 200 MB of FAISS results in the worst case."""
MAX_NEIGHBOURS_GPU = 2048
"""Neighbours that FAISS returns per query on a GPU, where it has no range search."""
QUERIES_PER_BLOCK = 4096
_ROWS_CHECKED = 1 << 16
_UNSURE = 1e-5
"""Similarities this near to a limit are computed again in double precision."""


def check_unit(embeddings: np.ndarray, name: str = "embeddings") -> np.ndarray:
    """`embeddings` as contiguous float32 (N, D).

    Raises:
        ValueError: another number of axes, or rows that are not finite and of unit norm.
    """
    vectors = np.ascontiguousarray(embeddings, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"{name}: want (N, D), got shape {vectors.shape}")
    for start in range(0, len(vectors), _ROWS_CHECKED):
        norms = np.linalg.norm(vectors[start : start + _ROWS_CHECKED], axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
        if bad.size:
            raise ValueError(f"{name}: row {start + bad[0]} has norm {norms[bad[0]]:.4g}, want unit norm")
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

    The order of the rows changes nothing but positions.

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
    links = Links(np.ones(count, bool), max_links=0)
    for first, second in linked_pairs(vectors, threshold, num_threads):
        links.add(first, second)
    kept = best_members(links.components(), rank)
    return Duplicates(kept=kept, num_links=links.num_links, threshold=threshold)


def linked_pairs(
    vectors: np.ndarray,
    threshold: float | np.ndarray,
    num_threads: int | None = None,
    *,
    fresh: np.ndarray | None = None,
    shard_rows: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (first, second), first < second, of linked pairs in blocks: exact, by FAISS.

    Args:
        vectors: float32 (N, D), unit norm; may be a memory map.
        threshold: cosine; or (N,), the limit of each row: a pair must reach that of both.
        num_threads: cap on FAISS's threads.
        fresh: bool (N,): only pairs with at least one of these rows are wanted; all by default.
        shard_rows: rows indexed at a time, so that memory is bounded; all by default.
    """
    count = len(vectors)
    limits = np.broadcast_to(np.asarray(threshold, np.float32), (count,))
    if not count:
        return
    new = np.arange(count) if fresh is None else np.flatnonzero(fresh)
    is_new = np.ones(count, bool) if fresh is None else fresh
    # Candidates reach a little below the limit; `confirm` decides.
    radius = float(limits.min()) - _UNSURE
    shard_rows = shard_rows or count
    for shard in range(0, count, shard_rows):
        references = np.ascontiguousarray(vectors[shard : shard + shard_rows], np.float32)
        index, on_gpu = flat_index(references, num_threads)
        block = max(1, min(QUERIES_PER_BLOCK, MAX_LINKS // len(references)))
        for start in range(0, len(new), block):
            chosen = new[start : start + block]
            queries = np.ascontiguousarray(vectors[chosen], np.float32)
            if on_gpu:
                rows, others, similarity = pairs_by_search(
                    index, queries, references, radius, MAX_NEIGHBOURS_GPU
                )
            else:
                rows, others, similarity = _pairs_in_range(index, queries, radius)
            first, second = chosen[rows], others + shard
            # A pair of two new rows is found twice, one of a new and an old row once.
            once = (first < second) | ~is_new[second]
            first, second = first[once], second[once]
            there = confirm(
                similarity[once], limits[first], limits[second], queries, rows[once], references, others[once]
            )
            first, second = first[there], second[there]
            yield np.minimum(first, second), np.maximum(first, second)


def confirm(
    similarity: np.ndarray,
    limits: np.ndarray,
    other_limits: np.ndarray,
    vectors: np.ndarray,
    rows: np.ndarray,
    others: np.ndarray,
    places: np.ndarray,
) -> np.ndarray:
    """Which candidate pairs are linked: bool (n,), the same whichever way they were found.

    Products of matrices differ in the last bits with their shapes. So where a similarity lies that near to its limit,
    it is computed again in double precision, from the two rows alone.

    Args:
        similarity: float32 (n,), of each pair, from a product of matrices.
        limits, other_limits: (n,) limits of the two rows: the greater one counts.
        vectors, rows: first rows of the pairs are `vectors[rows]`.
        others, places: second rows are `others[places]`.
    """
    limit = np.maximum(limits, other_limits)
    linked = similarity >= limit + np.float32(_UNSURE)
    unsure = np.flatnonzero((similarity >= limit - np.float32(_UNSURE)) & ~linked)
    for start in range(0, len(unsure), 1 << 16):
        part = unsure[start : start + (1 << 16)]
        one, other = vectors[rows[part]].astype(np.float64), others[places[part]].astype(np.float64)
        # Divided by the norms, which are 1 but for rounding, so that equal rows reach a limit of 1.
        norms = np.sqrt(np.einsum("ij,ij->i", one, one) * np.einsum("ij,ij->i", other, other))
        linked[part] = (np.einsum("ij,ij->i", one, other) / norms).astype(np.float32) >= limit[part]
    return linked


def _pairs_in_range(
    index: Any, queries: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    limits, similarity, others = index.range_search(queries, radius)
    return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), others, similarity


def pairs_by_search(
    index: Any, queries: np.ndarray, vectors: np.ndarray, radius: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same pairs by nearest-neighbour search, for indexes without range search.

    The number of neighbours is doubled for the queries whose last one is still in range; queries with more
    than `most` go to a CPU index.

    Args:
        index: over `vectors`.
        queries: (n, D).
        vectors: (N, D).
        radius: pairs with an inner product above it are wanted.
        most: greatest number of neighbours that the index returns.

    Returns:
        Row of the query, position of its neighbour, similarity, (m,) each.
    """
    rows, others = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    similarity = [np.empty(0, np.float32)]
    left = np.arange(len(queries))
    depth = min(32, most, len(vectors))
    while left.size:
        found, where = index.search(queries[left], depth)
        complete = (found[:, -1] <= radius) | (depth == len(vectors))
        hit, column = np.nonzero((found > radius) & complete[:, None])
        rows.append(left[hit])
        others.append(where[hit, column].astype(np.int64))
        similarity.append(found[hit, column])
        left = left[~complete]
        if depth == most and left.size:
            import faiss

            exact = faiss.IndexFlatIP(vectors.shape[1])
            exact.add(vectors)
            more, their, values = _pairs_in_range(exact, queries[left], radius)
            rows.append(left[more])
            others.append(their)
            similarity.append(values)
            break
        depth = min(depth * 2, most, len(vectors))
    return np.concatenate(rows), np.concatenate(others), np.concatenate(similarity)


def count_linked(
    rows: np.ndarray, vectors: np.ndarray, limits: np.ndarray, block_rows: int = 1 << 15
) -> np.ndarray:
    """Number of rows that each of `rows` is linked to, int64 (n,), by comparing it with all: exact.

    Args:
        rows: row numbers (n,).
        vectors: float32 (N, D), unit norm; read in blocks, so it may be a memory map.
        limits: float32 (N,), of each row.
        block_rows: rows compared at a time.
    """
    queries = np.ascontiguousarray(vectors[rows], np.float32)
    counts = np.zeros(len(rows), np.int64)
    lowest = limits[rows][:, None] - np.float32(_UNSURE)
    for start in range(0, len(vectors), block_rows):
        block = np.asarray(vectors[start : start + block_rows], np.float32)
        similarity = queries @ block.T
        one, other = np.nonzero(similarity >= lowest)
        apart = rows[one] != other + start
        one, other = one[apart], other[apart]
        linked = confirm(
            similarity[one, other], limits[rows[one]], limits[other + start], queries, one, block, other
        )
        counts += np.bincount(one[linked], minlength=len(rows))
    return counts
