"""Connected components of links that come in parts, in bounded memory and whatever the order of the parts.

Links are collected and merged a batch at a time. As long as there are no more than a budget of them all are kept, for
the next curation of the same table; beyond it only what joins the members is kept: a spanning forest.
"""

import numpy as np
from scipy import sparse

MERGE_AT = 1 << 20
"""Links that are collected before components are merged: one merge costs a pass over all rows."""


def spanning_forest(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Links (first, second) that join the same rows as those given: fewer than rows among them."""
    nodes, compact = np.unique(np.concatenate([first, second]), return_inverse=True)
    one, other = compact[: len(first)], compact[len(first) :]
    shape = (len(nodes), len(nodes))
    links = sparse.csr_array((np.ones(len(first), np.float32), (one, other)), shape=shape)
    forest = sparse.csgraph.minimum_spanning_tree(links).tocoo()
    return nodes[forest.row].astype(np.int64), nodes[forest.col].astype(np.int64)


class Links:
    """Links between N rows as they come, and the components of those rows that are members.

    Attributes:
        num_links: links added in all.
        complete: whether `arrays` still holds all of them.
    """

    def __init__(self, members: np.ndarray, max_links: int) -> None:
        """Args:
        members: bool (N,): rows whose components are wanted; links of others are only kept.
        max_links: links kept; 16 bytes each.
        """
        self.num_links, self.complete = 0, True
        self._members, self._max_links = members, max_links
        self._component = np.arange(len(members), dtype=np.int64)
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_kept = 0
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def add(
        self, first: np.ndarray, second: np.ndarray, *, total: int | None = None, complete: bool = True
    ) -> None:
        """Add links between row numbers (n,).

        Args:
            first, second: ends of each link, in any order; each link once in all calls.
            total: links found where those given are only a spanning forest of the members' ones.
            complete: False where some were left out.
        """
        self.num_links += len(first) if total is None else total
        self.complete &= complete and self._num_kept + len(first) <= self._max_links
        if self.complete:
            self._kept.append((first, second))
            self._num_kept += len(first)
        else:
            self._kept.clear()
        both = self._members[first] & self._members[second]
        self._pending.append((first[both], second[both]))
        self._num_pending += int(both.sum())
        if self._num_pending >= MERGE_AT:
            self._merge()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All links, int64 (n,) each.

        Raises:
            ValueError: there were more than the budget.
        """
        if not self.complete:
            raise ValueError(f"{self.num_links} links are more than the {self._max_links} that are kept")
        empty = np.empty(0, np.int64)
        return tuple(np.concatenate([empty, *(pair[end] for pair in self._kept)]) for end in (0, 1))  # type: ignore[return-value]

    def components(self) -> np.ndarray:
        """Number of each row's component, int64 (N,); rows that are no members are alone."""
        self._merge()
        return self._component

    def _merge(self) -> None:
        first = self._component[np.concatenate([np.empty(0, np.int64), *(p[0] for p in self._pending)])]
        second = self._component[np.concatenate([np.empty(0, np.int64), *(p[1] for p in self._pending)])]
        self._pending.clear()
        self._num_pending = 0
        apart = first != second
        if not apart.any():
            return
        size = int(self._component.max()) + 1
        links = sparse.coo_array(
            (np.ones(int(apart.sum()), np.int8), (first[apart], second[apart])), shape=(size, size)
        )
        _, merged = sparse.csgraph.connected_components(links, directed=False)
        self._component = merged[self._component].astype(np.int64)


def best_members(component: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The row of lowest rank in the component of each row, int64 (N,).

    Args:
        component: int64 (N,).
        rank: (N,) distinct numbers.
    """
    if not len(component):
        return np.empty(0, np.int64)
    order = np.argsort(rank, kind="stable")
    best = np.full(int(component.max()) + 1, -1, np.int64)
    best[component[order][::-1]] = order[::-1]  # the last write, of the lowest rank, stays
    return best[component]
