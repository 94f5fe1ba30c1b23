"""How requests reach the stream: as shares of a bitmap, never as one list."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.storage import IndexSet
from jobs.synthesis_stream import (
    MAX_BLOCKS,
    MAX_READ_TASKS,
    IndexShare,
    StreamSettings,
    request_source,
    rows_per_block,
)
from schemas.request import ATTEMPT_SHIFT


@given(st.sets(st.integers(0, 1 << ATTEMPT_SHIFT + 2), min_size=1, max_size=50))
def test_a_share_is_its_indices(indices: set[int]) -> None:
    wanted = np.array(sorted(indices), np.int64)
    share = IndexShare.of(wanted)
    np.testing.assert_array_equal(share.indices(), wanted)
    np.testing.assert_array_equal(IndexShare.of_row(share.row()).indices(), wanted)


@given(st.integers(1, 10**8), st.integers(1, 512))
def test_blocks_are_batches_or_whole_batches(num_requests: int, batch_size: int) -> None:
    rows = rows_per_block(num_requests, batch_size)
    assert -(-num_requests // rows) <= MAX_BLOCKS
    assert rows <= batch_size or rows % batch_size == 0


@pytest.mark.parametrize("block_rows", [64, 100_000, 2_000_000])
def test_few_read_tasks_cover_what_is_missing_once_in_small_messages(block_rows: int) -> None:
    """10^6 requests in 15,624 blocks are 500 read tasks of about a byte per request, not eight."""
    missing = IndexSet.of([np.arange(1_000_000)]).without(IndexSet.of([np.arange(500, 600)]))
    tasks = request_source(missing, block_rows).get_read_tasks(1)
    assert len(tasks) <= MAX_READ_TASKS
    tables = [table for task in tasks for table in task()]
    shares = [IndexShare.of_row(row) for table in tables for row in table.to_pylist()]
    assert len(shares) == -(-len(missing) // block_rows)
    assert {1 + len(share.steps) for share in shares[:-1]} <= {block_rows}
    made = np.concatenate([share.indices() for share in shares])
    np.testing.assert_array_equal(made, missing.to_array())
    assert max(table.nbytes for table in tables) < 2.1 * 10**6 / min(len(tasks), 100)


def test_a_block_of_the_source_becomes_the_requests_of_its_share() -> None:
    """Ray's split of a read task leaves one row to a block, whatever the numbers of blocks and tasks."""
    from ray.data._internal.execution.operators.map_operator import _split_blocks

    missing = IndexSet.of([np.arange(3 * 1201)])  # 1201 blocks in 401 tasks
    tasks = request_source(missing, 3).get_read_tasks(1)
    split_factor = -(-1201 // len(tasks))
    sizes = [block.num_rows for task in tasks for block in _split_blocks(task(), split_factor)]
    assert sizes == [1] * 1201


def test_actors_must_fit_into_nodes_and_not_only_into_their_sum() -> None:
    settings = StreamSettings(
        num_synthesizers=2, cpus_per_synthesizer=0.8, cpus_per_embedder=0.3, batch_size=4
    )
    settings.check(2, 0)
    settings.check(2, 0, (2.0,))
    with pytest.raises(ValueError, match="do not fit into nodes of 1, 1 CPUs"):
        settings.check(2, 0, (1.0, 1.0))
    settings.check(3, 0, (1.0, 1.0, 1.0))
