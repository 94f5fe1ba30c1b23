"""Composition of batches: what is promised per epoch, per class, per step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.predictors.batches import Batches, ComposedBatches, UnionBatches

LABELS = np.array([0] * 12 + [1] * 5 + [2] * 3)
IS_REAL = np.array([True] * 8 + [False] * 4 + [True] * 4 + [False] * 1 + [True] * 2 + [False] * 1)


def drawn(batches: Batches, steps: int) -> np.ndarray:
    rows = np.concatenate([batches.rows(step) for step in range(steps)])
    return np.bincount(rows, minlength=len(batches.row_weights))


@settings(deadline=None, max_examples=30)
@given(batch_size=st.integers(1, 45), seed=st.integers(0, 3))
def test_every_row_comes_once_per_epoch(batch_size: int, seed: int) -> None:
    batches = UnionBatches(LABELS, 3, batch_size, seed)
    np.testing.assert_array_equal(drawn(batches, len(LABELS)), batch_size)
    stream = np.concatenate([batches.rows(step) for step in range(len(LABELS))])
    for epoch in range(batch_size):
        assert len(set(stream[epoch * len(LABELS) : (epoch + 1) * len(LABELS)].tolist())) == len(LABELS)


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    for batches in (
        UnionBatches(LABELS, 3, 7, 1),
        UnionBatches(LABELS, 3, 7, 1, sampling="class_balanced"),
        ComposedBatches(LABELS, IS_REAL, 3, 5, (0, 2, 1), 1),
    ):
        forward = [batches.rows(step) for step in range(12)]
        for step in (11, 3, 0, 7):
            np.testing.assert_array_equal(batches.rows(step), forward[step])
    orders = {tuple(UnionBatches(LABELS, 3, 20, seed).rows(0).tolist()) for seed in range(3)}
    assert len(orders) == 3


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        ("plain", np.array([12, 5, 3]) / 20),
        ("class_balanced", np.ones(3) / 3),
        ("square_root", np.sqrt([12, 5, 3]) / np.sqrt([12, 5, 3]).sum()),
    ],
)
def test_counts_are_what_is_drawn(sampling: str, shares: np.ndarray) -> None:
    batches = UnionBatches(LABELS, 3, 10, 0, sampling)  # type: ignore[arg-type]
    np.testing.assert_allclose(batches.counts, 10 * shares)
    found = np.bincount(LABELS, weights=drawn(batches, 2000), minlength=3) / 2000
    # Five standard errors of a share of 20,000 draws.
    np.testing.assert_allclose(found, 10 * shares, atol=10 * 5 * 0.5 / np.sqrt(20_000))


def test_a_composed_batch_holds_what_it_says() -> None:
    batches = ComposedBatches(LABELS, IS_REAL, 3, 7, (2, 0, 3), 0)
    for step in range(30):
        rows = batches.rows(step)
        synthetic = rows[~IS_REAL[rows]]
        assert len(rows) == 12
        np.testing.assert_array_equal(np.bincount(LABELS[synthetic], minlength=3), [2, 0, 3])
    np.testing.assert_allclose(batches.counts, 7 * np.array([8, 4, 2]) / 14 + [2, 0, 3])
    # After 28 steps: 14 epochs of the 14 real rows, 14 of the four rows of class 0, 84 of the one of class 2.
    np.testing.assert_allclose(drawn(batches, 28) / 28, batches.row_weights)
    np.testing.assert_allclose(np.bincount(LABELS, weights=batches.row_weights), batches.counts)


def test_no_synthetic_rows_are_allowed() -> None:
    batches = ComposedBatches(LABELS, IS_REAL, 3, 7, (0, 0, 0), 0)
    assert IS_REAL[batches.rows(5)].all() and len(batches.rows(5)) == 7


def test_bad_compositions_are_refused() -> None:
    real_only = np.ones(len(LABELS), np.bool_)
    with pytest.raises(ValueError, match="2 of class 1, which has no synthetic row"):
        ComposedBatches(LABELS, real_only, 3, 7, (0, 2, 0), 0)
    with pytest.raises(
        ValueError, match="real_per_batch: want at least 1 of at least one real row, got 7 of 0"
    ):
        ComposedBatches(LABELS, ~real_only, 3, 7, (1, 0, 0), 0)
    with pytest.raises(ValueError, match=r"synthetic_per_class: want 3 numbers ≥ 0, got \(1, -1, 0\)"):
        ComposedBatches(LABELS, IS_REAL, 3, 7, (1, -1, 0), 0)
    with pytest.raises(ValueError, match="labels: want 0 … 1, got 0 … 2"):
        UnionBatches(LABELS, 2, 7, 0)
    with pytest.raises(ValueError, match="sampling: want one of plain"):
        UnionBatches(LABELS, 3, 7, 0, "balanced")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class 3 has 0 rows"):
        UnionBatches(LABELS, 4, 7, 0, "class_balanced")
