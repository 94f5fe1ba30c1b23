"""The bitmap of request indices against Python's own sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.storage.index_set import IndexSet
from schemas.request import ATTEMPT_SHIFT

INDICES = st.builds(
    lambda attempt, position: (attempt << ATTEMPT_SHIFT) + position,
    st.integers(0, 3),
    st.integers(0, 100)
    | st.integers((1 << 20) - 3, (1 << 20) + 3)
    | st.integers(0, (1 << ATTEMPT_SHIFT) - 1),
)


@given(st.lists(st.lists(INDICES, max_size=40), max_size=5), st.lists(INDICES, max_size=40))
def test_it_is_a_set(chunks, asked):
    bitmap, reference = IndexSet(), set()
    for chunk in chunks:
        new = len(set(chunk) - reference)
        assert bitmap.add(np.array(chunk, np.int64)) == new
        reference |= set(chunk)
    assert len(bitmap) == len(reference)
    asked = asked + sorted(reference)
    assert bitmap.contains(np.array(asked, np.int64)).tolist() == [index in reference for index in asked]


def test_a_million_indices_take_one_bit_each():
    bitmap = IndexSet()
    bitmap.add(np.random.default_rng(0).permutation(1 << 20))
    assert sum(page.nbytes for page in bitmap._pages.values()) == (1 << 20) // 8
    assert bitmap.contains(np.arange(1 << 20)).all()
    assert not bitmap.contains(np.array([1 << 20, 1 << ATTEMPT_SHIFT])).any()


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="request_index -1 is negative"):
        IndexSet().add(np.array([3, -1]))


@given(st.lists(INDICES, max_size=60), st.lists(INDICES, max_size=60), st.integers(1, 20))
def test_it_is_subtracted_and_read_in_blocks_like_a_set(kept, taken, size):
    some, other = IndexSet.of([np.array(kept, np.int64)]), IndexSet.of([np.array(taken, np.int64)])
    left = some.without(other, IndexSet())
    expected = sorted(set(kept) - set(taken))
    assert (len(left), left.to_array().tolist()) == (len(expected), expected)
    blocks = list(left.blocks(size))
    assert [index for block in blocks for index in block.tolist()] == expected
    assert all(len(block) == size for block in blocks[:-1])
    copy = IndexSet.of(some)
    copy.add(np.array([7], np.int64))
    assert sorted(set(kept)) == some.to_array().tolist()  # the set it was copied from is as it was


def test_many_at_once_are_counted_as_few_are():
    rng = np.random.default_rng(0)
    bitmap, reference = IndexSet(), set()
    for count in (3, 40_000, 100, 40_000):
        chunk = rng.integers(0, 1 << 21, count)
        assert bitmap.add(chunk) == len(set(chunk.tolist()) - reference)
        reference |= set(chunk.tolist())
    assert bitmap.to_array().tolist() == sorted(reference)
