"""A set of request indices in one bit each."""

from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np

_BITS = 20
_PAGE = 1 << _BITS
_FEW = 1 << 14


class IndexSet:
    """Non-negative int64 request indices, kept as bitmaps of 2^20 bits each that are made when first used.

    A request_index carries the attempt in its high bits, so each attempt has pages of its own. 10^7 indices
    of one attempt take 1.25 MB.
    """

    def __init__(self) -> None:
        self._pages: dict[int, np.ndarray] = {}
        self._size = 0

    @classmethod
    def of(cls, blocks: "Iterable[np.ndarray] | IndexSet") -> Self:
        """The union of arrays of indices, which come one at a time; a set gives a copy of itself."""
        made = cls()
        if isinstance(blocks, IndexSet):
            made._pages = {number: page.copy() for number, page in blocks._pages.items()}
            made._size = blocks._size
            return made
        for block in blocks:
            made.add(block)
        return made

    def __len__(self) -> int:
        return self._size

    def without(self, *others: "IndexSet") -> "IndexSet":
        """The indices of this set that are in none of `others`."""
        left = IndexSet()
        for number, page in self._pages.items():
            kept = page.copy()
            for other in others:
                if (taken := other._pages.get(number)) is not None:
                    kept &= ~taken
            count = int(np.bitwise_count(kept).sum())
            if count:
                left._pages[number] = kept
                left._size += count
        return left

    def blocks(self, size: int = _PAGE) -> Iterator[np.ndarray]:
        """The indices in increasing order, int64, in arrays of `size` (the last may be shorter)."""
        if size < 1:
            raise ValueError(f"size {size}: a block holds at least one index")
        kept: list[np.ndarray] = []
        num_kept = 0
        for number in sorted(self._pages):
            found = np.flatnonzero(np.unpackbits(self._pages[number], bitorder="little")) + (number << _BITS)
            start = 0
            while num_kept + len(found) - start >= size:
                stop = start + size - num_kept
                yield np.concatenate([*kept, found[start:stop]])
                kept, num_kept, start = [], 0, stop
            if start < len(found):
                kept.append(found[start:])
                num_kept += len(found) - start
        if kept:
            yield np.concatenate(kept)

    def to_array(self) -> np.ndarray:
        """The indices in increasing order, (N,) int64: 8 bytes each, so for small sets."""
        return np.concatenate([np.empty(0, np.int64), *self.blocks()])

    def add(self, indices: np.ndarray) -> int:
        """Add `indices` (N,) int64; how many were new (repeats within `indices` count once)."""
        added = 0
        for page_number, offsets, _ in self._by_page(indices):
            page = self._pages.setdefault(page_number, np.zeros(_PAGE >> 3, np.uint8))
            if len(offsets) < _FEW:
                new = np.unique(offsets[~_bits(page, offsets)])
                np.bitwise_or.at(page, new >> 3, np.left_shift(1, new & 7).astype(np.uint8))
                added += len(new)
            else:  # sorting many costs more than spreading the page out
                bits = np.unpackbits(page, bitorder="little")
                bits[offsets] = 1
                before = int(np.bitwise_count(page).sum())
                page[:] = np.packbits(bits, bitorder="little")
                added += int(np.bitwise_count(page).sum()) - before
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


Indices = np.ndarray | IndexSet
"""Request indices: an array (N,) int64 of few, or a set of many."""


def index_set(indices: Indices) -> IndexSet:
    """`indices` as a set; a set is given back as it is."""
    return indices if isinstance(indices, IndexSet) else IndexSet.of([np.asarray(indices, np.int64)])


def _bits(page: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return ((page[offsets >> 3] >> (offsets & 7).astype(np.uint8)) & 1).astype(bool)
