"""A set of request indices in one bit each."""

import numpy as np

_BITS = 20
_PAGE = 1 << _BITS


class IndexSet:
    """Non-negative int64 request indices, kept as bitmaps of 2^20 bits each that are made when first used.

    A request_index carries the attempt in its high bits, so each attempt has pages of its own. 10^7 indices
    of one attempt take 1.25 MB.
    """

    def __init__(self) -> None:
        self._pages: dict[int, np.ndarray] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, indices: np.ndarray) -> int:
        """Add `indices` (N,) int64; how many were new (repeats within `indices` count once)."""
        added = 0
        for page_number, offsets, _ in self._by_page(indices):
            page = self._pages.setdefault(page_number, np.zeros(_PAGE >> 3, np.uint8))
            new = np.unique(offsets[~_bits(page, offsets)])
            np.bitwise_or.at(page, new >> 3, np.left_shift(1, new & 7).astype(np.uint8))
            added += len(new)
        self._size += added
        return added

    def contains(self, indices: np.ndarray) -> np.ndarray:
        """Which of `indices` (N,) int64 are in the set: (N,) bool."""
        found = np.zeros(len(indices), bool)
        for page_number, offsets, where in self._by_page(indices):
            page = self._pages.get(page_number)
            if page is not None:
                found[where] = _bits(page, offsets)
        return found

    @staticmethod
    def _by_page(indices: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray | slice]]:
        """(page, offsets within it, where they stand in `indices`) for each page concerned."""
        indices = np.asarray(indices, np.int64)
        if len(indices) == 0:
            return []
        if indices.min() < 0:
            raise ValueError(f"request_index {indices.min()} is negative")
        pages = indices >> _BITS
        offsets = indices & (_PAGE - 1)
        if pages[0] == pages[-1] and (pages == pages[0]).all():
            return [(int(pages[0]), offsets, slice(None))]
        return [(int(p), offsets[w], w) for p in np.unique(pages) if len(w := np.flatnonzero(pages == p))]


def _bits(page: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return ((page[offsets >> 3] >> (offsets & 7).astype(np.uint8)) & 1).astype(bool)
