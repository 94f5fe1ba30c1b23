import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.training.mixture import BatchSampler, global_batch

SAMPLERS = st.builds(
    BatchSampler,
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 24),
    seed=st.integers(0, 2**31),
)


@given(SAMPLERS, st.integers(1, 4))
def test_every_row_comes_once_per_epoch(sampler: BatchSampler, epochs: int) -> None:
    steps = -(-epochs * sampler.num_rows // sampler.batch_size)
    stream = np.concatenate([sampler.rows(step) for step in range(steps)])[: epochs * sampler.num_rows]
    for epoch in stream.reshape(epochs, sampler.num_rows):
        assert sorted(epoch) == list(range(sampler.num_rows))


@given(SAMPLERS, st.integers(0, 1000))
def test_a_batch_is_a_function_of_seed_and_step(sampler: BatchSampler, step: int) -> None:
    again = BatchSampler(num_rows=sampler.num_rows, batch_size=sampler.batch_size, seed=sampler.seed)
    for other in (5, 0, step):  # whatever was asked before
        again.rows(other)
    np.testing.assert_array_equal(sampler.rows(step), again.rows(step))


@given(st.integers(0, 50), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2]))
def test_workers_and_micro_batches_partition_the_global_batch(step: int, workers: int, parts: int) -> None:
    sampler = BatchSampler(num_rows=17, batch_size=24, seed=3)
    whole = global_batch(sampler, step)
    pieces = [part for shard in whole.split(workers) for part in shard.split(parts)]
    np.testing.assert_array_equal(np.concatenate([p.rows for p in pieces]), whole.rows)
    np.testing.assert_array_equal(np.concatenate([p.positions for p in pieces]), np.arange(24))
    assert {p.step for p in pieces} == {step}


def test_epochs_are_shuffled_differently_and_seeds_too() -> None:
    sampler = BatchSampler(num_rows=50, batch_size=50)
    assert not np.array_equal(sampler.rows(0), sampler.rows(1))
    assert not np.array_equal(sampler.rows(0), BatchSampler(num_rows=50, batch_size=50, seed=1).rows(0))
    assert sampler.epoch(3) == 3.0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_rows"):
        BatchSampler(num_rows=0, batch_size=1)
    with pytest.raises(ValueError, match="cannot be split into 3"):
        global_batch(BatchSampler(num_rows=5, batch_size=4), 0).split(3)
