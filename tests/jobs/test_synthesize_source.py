"""How requests reach the stream: as shares of a bitmap, never as one list."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.storage import IndexSet
from jobs.synthesis_stream import IndexShare, StreamSettings, request_source
from schemas.request import ATTEMPT_SHIFT


@given(st.sets(st.integers(0, 1 << ATTEMPT_SHIFT + 2), min_size=1, max_size=50))
def test_a_share_is_its_indices(indices: set[int]) -> None:
    wanted = np.array(sorted(indices), np.int64)
    share = IndexShare.of(wanted)
    np.testing.assert_array_equal(share.indices(), wanted)
    assert 1 + len(share.steps) == len(wanted)


def test_read_tasks_cover_what_is_missing_once_in_small_messages() -> None:
    """10^6 requests in 2,000 tasks: about a byte per request, not eight."""
    missing = IndexSet.of([np.arange(1_000_000)]).without(IndexSet.of([np.arange(500, 600)]))
    tasks = request_source(missing, stage=None).get_read_tasks(2000)
    assert sum(task.metadata.num_rows or 0 for task in tasks) == 999_900
    assert {task.metadata.num_rows for task in tasks[:-1]} == {500}
    assert len(pickle.dumps(IndexShare.of(np.arange(500)))) < 1000


def test_actors_must_fit_into_nodes_and_not_only_into_their_sum() -> None:
    settings = StreamSettings(
        num_synthesizers=2, cpus_per_synthesizer=0.8, cpus_per_embedder=0.3, batch_size=4
    )
    settings.check(2, 0)
    settings.check(2, 0, (2.0,))
    with pytest.raises(ValueError, match="do not fit into nodes of 1, 1 CPUs"):
        settings.check(2, 0, (1.0, 1.0))
    settings.check(3, 0, (1.0, 1.0, 1.0))
