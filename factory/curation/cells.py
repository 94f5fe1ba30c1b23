"""Near-duplicates among many rows: k-means cells, and search where two cells can hold a pair.

Every row lies in the cell of its nearest centroid (spherical k-means). Let a row y of cell k have a neighbour x of
cell j within the angle θ = arccos(threshold). As x is at least as near to c_j as to c_k, it lies beyond the hyperplane
between the two, so the angle from y to that hyperplane is at most θ:

    y · (c_k − c_j) ≤ sin θ ‖c_k − c_j‖.

So a cell is compared with itself and with the rows of cells of higher number that reach it in this sense, and no pair
is lost. A row may reach more cells than is worth the time: of those, the `max_probes` whose boundaries are nearest are
taken. In many dimensions neighbours seldom lie straight across a boundary, so that little is lost then; how much is
measured against exact search (`dedup.count_linked`).

Cells are searched in `factory.curation.cell_search`; `jobs/dedup_clusters.py` spreads all over Ray tasks. Which rows are linked depends
neither on the order of rows nor on how the work is split. Files of a work folder:

    part-*.npz     where a block of rows lies and what it reaches
    vectors.npy    float32 (N, D), ordered by cell, and beside it one file per field of `CellFolder`
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROWS_PER_CENTROID = 64
"""Rows of the sample that k-means sees per centroid."""
MAX_CELLS = 1 << 14
_ITERATIONS = 8
ROUNDING = 1e-5
"""Allowance for products of float32 matrices."""
_MATRIX_SIZE = 1 << 23
"""Similarities computed at a time: 32 MB."""


def num_cells_for(count: int) -> int:
    """Cells for `count` rows: assigning rows to cells and searching them then cost about the same."""
    return int(min(MAX_CELLS, max(1, round(2 * math.sqrt(count)), 1), max(1, count // 8)))


def train_centroids(
    sample: np.ndarray, num_cells: int, *, seed: int = 0, num_threads: int | None = None
) -> np.ndarray:
    """Centroids of spherical k-means by FAISS, on its GPUs where it sees any.

    Args:
        sample: float32 (n, D), unit norm, n ≥ num_cells.
        num_cells: how many.
        seed: of the first centroids.
        num_threads: cap on FAISS's threads.

    Returns:
        float32 (num_cells, D), unit norm.
    """
    import faiss

    if num_threads is not None:
        faiss.omp_set_num_threads(num_threads)
    kmeans = faiss.Kmeans(
        sample.shape[1],
        num_cells,
        niter=_ITERATIONS,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, -(-len(sample) // num_cells)),
        gpu=getattr(faiss, "get_num_gpus", int)() > 0,
    )
    kmeans.train(np.ascontiguousarray(sample, np.float32))
    centroids = np.asarray(kmeans.centroids, np.float32)
    return centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """How many other cells rows reach.

    Attributes:
        rows: looked at.
        within: cells within the angle of the threshold, summed over rows.
        taken: of these within `max_probes`.
        greatest: of one row, before the budget.
        cut: rows that reach more than `max_probes`.
    """

    rows: int = 0
    within: int = 0
    taken: int = 0
    greatest: int = 0
    cut: int = 0

    def __add__(self, other: "Probes") -> "Probes":
        return Probes(
            rows=self.rows + other.rows,
            within=self.within + other.within,
            taken=self.taken + other.taken,
            greatest=max(self.greatest, other.greatest),
            cut=self.cut + other.cut,
        )


def assign_rows(
    folder: Path,
    vectors: np.ndarray,
    limits: np.ndarray,
    centroids: np.ndarray,
    *,
    start: int,
    stop: int,
    max_probes: int,
) -> tuple[Path, Probes]:
    """Find the cell of the rows start … stop and the cells of lower number that they reach; write them as a part.

    Args:
        folder: where the part is written.
        vectors: float32 (N, D), unit norm, of all rows; may be a memory map.
        limits: float32 (N,), the least cosine at which each row is linked.
        centroids: float32 (K, D).
        start, stop: rows of this part.
        max_probes: greatest number of other cells that a row reaches.
    """
    separations = np.maximum(_separations(centroids), 1e-6)
    cells = np.empty(stop - start, np.int32)
    rows, targets = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    probes = Probes()
    step = max(16, _MATRIX_SIZE // len(centroids))
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        products = np.asarray(vectors[begin:end], np.float32) @ centroids.T
        own = products.argmax(axis=1)
        best = products[np.arange(len(own)), own]
        # Sine of the angle to the boundary of every other cell, in place.
        np.subtract(best[:, None], products, out=products)
        products /= separations[own]
        products[np.arange(len(own)), own] = np.inf
        near = products <= _reach(limits[begin:end])[:, None]
        within = near.sum(axis=1)
        cut = np.flatnonzero(within > max_probes)
        if cut.size:
            farthest = np.partition(products[cut], max_probes - 1, axis=1)[:, max_probes - 1]
            near[cut] &= products[cut] <= farthest[:, None]
        probes += Probes(
            rows=len(own),
            within=int(within.sum()),
            taken=int(near.sum()),
            greatest=int(within.max(initial=0)),
            cut=len(cut),
        )
        row, target = np.nonzero(near)
        lower = target < own[row]
        rows.append(row[lower] + begin)
        targets.append(target[lower].astype(np.int32))
        cells[begin - start : end - start] = own
    path = folder / f"part-{start:012d}.npz"
    np.savez(path, start=start, cells=cells, rows=np.concatenate(rows), targets=np.concatenate(targets))
    return path, probes


def _separations(centroids: np.ndarray) -> np.ndarray:
    """‖c_j − c_k‖ of all centroids, float32 (K, K)."""
    squared = 2 - 2 * (centroids @ centroids.T)
    return np.sqrt(np.maximum(squared, 0))


def _reach(limits: np.ndarray) -> np.ndarray:
    """Sine of the angle at which rows with these limits are linked, float32; from 90° on all cells are reached."""
    cosine = np.asarray(limits, np.float64)
    sine = np.sqrt(1 - np.clip(cosine, 0, 1) ** 2) + ROUNDING
    return np.where(cosine <= 0, np.inf, sine).astype(np.float32)


# ------------------------------------------------------------------------------------------ on disk


@dataclass(frozen=True, kw_only=True, eq=False)
class CellFolder:
    """Rows ordered by cell, as files that any number of processes map. N rows, K cells.

    Attributes:
        offsets: int64 (K + 1,): cell k holds the slots offsets[k] … offsets[k + 1].
        vectors: float32 (N, D), by slot.
        rows: int64 (N,), number of the row in each slot.
        reach_offsets: int64 (K + 1,): what reaches cell k stands in reaching[reach_offsets[k] … [k + 1]].
        reaching: int64, slots of cells of higher number.
        limits: float32 (N,), by slot, as the next three.
        fresh: bool (N,): pairs without such a row are not searched.
        members: bool (N,): see `components.Links`.
        sampled: bool (N,): links of these rows are counted.
    """

    offsets: np.ndarray
    vectors: np.ndarray
    rows: np.ndarray
    reach_offsets: np.ndarray
    reaching: np.ndarray
    limits: np.ndarray
    fresh: np.ndarray
    members: np.ndarray
    sampled: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "CellFolder":
        """The files that `write_cells` wrote, mapped."""
        return cls(**{name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _FILES})

    @property
    def num_cells(self) -> int:
        """Number of cells, empty ones included."""
        return len(self.offsets) - 1

    def work(self) -> np.ndarray:
        """Pairs of rows compared for each cell, int64 (K,), at least 1."""
        sizes = np.diff(self.offsets)
        return sizes * (sizes // 2 + np.diff(self.reach_offsets)) + 1


_FILES = ("offsets", "vectors", "rows", "reach_offsets", "reaching", "limits", "fresh", "members", "sampled")


def write_cells(
    folder: Path,
    vectors: np.ndarray,
    parts: Iterable[Path],
    *,
    num_cells: int,
    limits: np.ndarray,
    fresh: np.ndarray,
    members: np.ndarray,
    sampled: np.ndarray,
    block_rows: int = 1 << 14,
) -> CellFolder:
    """Lay the rows out by cell. Vectors are copied a block at a time, so they may be a memory map.

    Args:
        folder: to write into; not that of other rows.
        vectors: float32 (N, D).
        parts: what `assign_rows` wrote, together all rows.
        num_cells: K.
        limits, fresh, members, sampled: (N,) by row, see `CellFolder`.
    """
    parts = list(parts)
    cells = np.empty(len(vectors), np.int32)
    counts = np.zeros(num_cells, np.int64)
    for path in parts:
        with np.load(path) as part:
            start = int(part["start"])
            cells[start : start + len(part["cells"])] = part["cells"]
            counts += np.bincount(part["targets"], minlength=num_cells)
    order = np.argsort(cells, kind="stable")
    slot_of = np.empty(len(order), np.int64)
    slot_of[order] = np.arange(len(order))
    values = {
        "offsets": _starts(np.bincount(cells, minlength=num_cells)),
        "rows": order.astype(np.int64),
        "reach_offsets": _starts(counts),
        "limits": limits[order].astype(np.float32),
        "fresh": fresh[order],
        "members": members[order],
        "sampled": sampled[order],
    }
    for name, value in values.items():
        np.save(folder / f"{name}.npy", value)
    _write_reaching(folder, parts, slot_of, values["reach_offsets"])
    target = _new_file(folder / "vectors.npy", np.float32, (len(order), vectors.shape[1]))
    for start in range(0, len(order), block_rows):
        target[start : start + block_rows] = vectors[order[start : start + block_rows]]
    return CellFolder.open(folder)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _new_file(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # nothing can be mapped of an empty file
        np.save(path, np.empty(shape, dtype))
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _write_reaching(
    folder: Path, parts: Sequence[Path], slot_of: np.ndarray, reach_offsets: np.ndarray
) -> None:
    reaching = _new_file(folder / "reaching.npy", np.int64, (int(reach_offsets[-1]),))
    filled = reach_offsets[:-1].copy()
    for path in parts:
        with np.load(path) as part:
            rows, targets = part["rows"], part["targets"]
        order = np.argsort(targets, kind="stable")
        targets = targets[order]
        counts = np.bincount(targets, minlength=len(filled))
        inside = np.arange(len(targets)) - (_starts(counts)[:-1])[targets]
        reaching[filled[targets] + inside] = slot_of[rows[order]]
        filled += counts
