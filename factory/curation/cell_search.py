"""Search of k-means cells for linked pairs; which cells and rows can hold one is found in `factory.curation.cells`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from factory.curation.cells import ROUNDING, CellFolder
from factory.curation.components import spanning_forest
from factory.curation.dedup import confirm

_BLOCK_ROWS = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class CellLinks:
    """What a search of some cells found.

    Attributes:
        first, second: int64 (n,) row numbers, first < second.
        total: pairs found; more than n where only a spanning forest of the members' links is given.
        complete: whether all are given.
        degrees: row number → links of a sampled row.
    """

    first: np.ndarray
    second: np.ndarray
    total: int
    complete: bool
    degrees: dict[int, int]


class _Found:
    """Links as the search finds them, never more than a budget."""

    def __init__(self, max_links: int) -> None:
        self.max_links, self.total, self.complete = max_links, 0, True
        self.links: list[tuple[np.ndarray, np.ndarray]] = []
        self.held = 0
        self.degrees: dict[int, int] = {}

    def add(self, folder: CellFolder, first: np.ndarray, second: np.ndarray) -> None:
        """Links between slots."""
        if not len(first):
            return
        self.total += len(first)
        for ends in (first, second):
            sampled, counts = np.unique(ends[folder.sampled[ends]], return_counts=True)
            for slot, count in zip(sampled.tolist(), counts.tolist()):
                row = int(folder.rows[slot])
                self.degrees[row] = self.degrees.get(row, 0) + count
        if not self.complete:
            first, second = _of_members(folder, first, second)
        self.links.append((first, second))
        self.held += len(first)
        if self.held > self.max_links:
            first, second = (np.concatenate([pair[end] for pair in self.links]) for end in (0, 1))
            if self.complete:
                first, second = _of_members(folder, first, second)
            self.complete = False
            self.links = [spanning_forest(first, second)]
            self.held = len(self.links[0][0])
            # A forest is what must be kept: the next one is made when as much has come again.
            self.max_links = max(self.max_links, 2 * self.held)


def _of_members(folder: CellFolder, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = folder.members[first] & folder.members[second]
    return first[both], second[both]


def search_cells(
    folder: CellFolder,
    cells: Sequence[int],
    *,
    max_links: int = 1 << 22,
    progress: Callable[[int], None] = lambda cells: None,
) -> CellLinks:
    """Links inside the given cells, and between each of them and the rows that reach it.

    Over all cells every linked pair is found once. Memory: blocks of a few thousand rows and `max_links`.
    """
    found = _Found(max_links)
    for cell in cells:
        own = np.arange(folder.offsets[cell], folder.offsets[cell + 1])
        for start in range(0, len(own), _BLOCK_ROWS):
            mine = own[start : start + _BLOCK_ROWS]
            for other in range(start, len(own), _BLOCK_ROWS):
                _compare(folder, mine, own[other : other + _BLOCK_ROWS], found, inside=start == other)
            reaching = folder.reaching[folder.reach_offsets[cell] : folder.reach_offsets[cell + 1]]
            for other in range(0, len(reaching), _BLOCK_ROWS):
                _compare(folder, mine, reaching[other : other + _BLOCK_ROWS], found, inside=False)
        progress(1)
    empty = np.empty(0, np.int64)
    ends = [np.concatenate([empty, *(pair[end] for pair in found.links)]) for end in (0, 1)]
    first, second = (folder.rows[slots] for slots in ends)
    return CellLinks(
        first=np.minimum(first, second),
        second=np.maximum(first, second),
        total=found.total,
        complete=found.complete,
        degrees=found.degrees,
    )


def _compare(
    folder: CellFolder, mine: np.ndarray, theirs: np.ndarray, found: _Found, *, inside: bool
) -> None:
    """Add the linked pairs of two sets of slots, of which at least one row is fresh; each pair once."""
    fresh, other_fresh = folder.fresh[mine], folder.fresh[theirs]
    if inside or fresh.all() or other_fresh.all():
        if fresh.any() or other_fresh.any():
            _link(folder, mine, theirs, found, inside=inside)
        return
    for rows, others in ((mine[fresh], theirs), (mine[~fresh], theirs[other_fresh])):
        if rows.size and others.size:
            _link(folder, rows, others, found, inside=False)


def _link(folder: CellFolder, mine: np.ndarray, theirs: np.ndarray, found: _Found, *, inside: bool) -> None:
    vectors = folder.vectors[mine]
    others = vectors if inside else folder.vectors[theirs]
    similarity = vectors @ others.T
    limits, other_limits = folder.limits[mine], folder.limits[theirs]
    lowest = max(float(limits.min()), float(other_limits.min())) - 2 * ROUNDING
    row, other = np.nonzero(similarity >= np.float32(lowest))
    if inside:
        once = (row < other) & (folder.fresh[mine[row]] | folder.fresh[theirs[other]])
        row, other = row[once], other[once]
    linked = confirm(similarity[row, other], limits[row], other_limits[other], vectors, row, others, other)
    found.add(folder, mine[row[linked]], theirs[other[linked]])
