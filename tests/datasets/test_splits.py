import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.datasets.splits import DRAWN_SPLITS, assign_splits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 120), st.integers(1, 4), st.integers(0, 5))
def test_groups_never_span_two_splits(seed: int, num_groups: int, num_classes: int, split_seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(num_groups), rng.integers(num_groups, size=num_groups)])
    labels = rng.integers(num_classes, size=len(groups))
    splits = assign_splits(groups, labels, seed=split_seed)
    assert set(splits) <= set(DRAWN_SPLITS)
    for group in range(num_groups):
        assert len(set(splits[groups == group])) == 1
    assert np.array_equal(splits, assign_splits(groups, labels, seed=split_seed))


def test_fractions_and_classes_are_balanced() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(400, size=700)
    labels = rng.choice(3, size=400, p=[0.6, 0.3, 0.1])[groups]
    splits = assign_splits(groups, labels)
    for label in range(3):
        total = (labels == label).sum()
        for split, fraction in zip(DRAWN_SPLITS, (0.7, 0.1, 0.2)):
            count = ((labels == label) & (splits == split)).sum()
            assert abs(count - fraction * total) <= max(2, 0.03 * total)


def test_another_seed_gives_another_split() -> None:
    groups, labels = np.arange(100), np.arange(100) % 2
    assert (assign_splits(groups, labels, seed=0) != assign_splits(groups, labels, seed=1)).any()


def test_a_group_larger_than_a_split_goes_to_train() -> None:
    groups = np.concatenate([np.zeros(60, int), np.arange(1, 41)])
    splits = assign_splits(groups, np.zeros(100, int))
    assert set(splits[:60]) == {"train"}
    assert {name: int((splits == name).sum()) for name in DRAWN_SPLITS} == {
        "train": 70,
        "val": 10,
        "test": 20,
    }


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="three positive numbers"):
        assign_splits(np.arange(9), np.zeros(9), (0.7, 0.3))
    with pytest.raises(ValueError, match="sum to 1"):
        assign_splits(np.arange(9), np.zeros(9), (0.7, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"2 group\(s\)"):
        assign_splits(np.array([0, 0, 1]), np.zeros(3))
