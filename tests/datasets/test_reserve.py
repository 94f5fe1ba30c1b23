import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.datasets.layouts import LAYOUTS
from factory.datasets.layouts.phantom import phantom_listing
from factory.datasets.preparation import PreparedDataset, prepare_dataset
from factory.datasets.splits import group_folds, keep_training_groups
from factory.datasets.verification import VerifiedImage, verify_items
from jobs.prepare import parse_fold


def _rows(seed: int, num_groups: int) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    members = np.concatenate([np.arange(num_groups), rng.integers(num_groups, size=num_groups // 2)])
    return [f"group-{number}" for number in members], rng.choice(2, num_groups, p=(0.6, 0.4))[members]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(40, 100), st.integers(2, 5))
def test_folds_hold_whole_groups_and_do_not_hang_on_row_order(seed: int, count: int, num_folds: int) -> None:
    names, labels = _rows(seed, count)
    folds = group_folds(names, labels, num_folds)
    assert set(folds.tolist()) == set(range(num_folds))
    assert len({(name, fold) for name, fold in zip(names, folds.tolist())}) == len(set(names))
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = group_folds([names[k] for k in order], labels[order], num_folds)
    assert np.array_equal(shuffled, folds[order])
    groups = np.array([len({n for n, f in zip(names, folds.tolist()) if f == k}) for k in range(num_folds)])
    assert groups.max() - groups.min() <= 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_the_reserve_takes_whole_groups_and_leaves_the_class_shares(seed: int, num_train: int) -> None:
    names, labels = _rows(seed, 80)
    kept = keep_training_groups(names, labels, num_train)
    assert num_train - 4 <= kept.sum() <= num_train
    assert set(np.array(names)[kept]).isdisjoint(np.array(names)[~kept])
    share = (labels[kept] == 1).mean() - (labels == 1).mean()
    assert abs(share) <= 0.6 / num_train + 4 / num_train


def test_all_rows_may_stay_and_bad_numbers_are_named() -> None:
    names, labels = _rows(0, 30)
    assert keep_training_groups(names, labels, len(names)).all()
    for count in (1, len(names) + 1):
        with pytest.raises(ValueError, match="--num-train"):
            keep_training_groups(names, labels, count)
    with pytest.raises(ValueError, match=r"class 1 has 2 group\(s\)"):
        group_folds(["a", "b", "c", "d", "e"], np.array([0, 0, 0, 1, 1]), 3)
    assert parse_fold("1/5") == (1, 5) and parse_fold(None) is None
    for text in ("5/5", "1", "-1/3", "0/1", "a/b"):
        with pytest.raises(ValueError, match="--reserve-fold"):
            parse_fold(text)


@pytest.fixture(scope="module")
def phantoms() -> list[VerifiedImage]:
    return verify_items(phantom_listing(num_images=40).items)[0]


def _prepared(
    images: list[VerifiedImage], num_train: int | None = None, reserve_fold: tuple[int, int] | None = None
) -> PreparedDataset:
    vectors = np.eye(len(images), dtype=np.float32)
    return prepare_dataset(
        images, vectors, LAYOUTS["phantom"], ("benign", "malignant"), search=None, fractions=(0.6, 0.2, 0.2),
        seed=0, num_train=num_train, reserve_fold=reserve_fold,
    )  # fmt: skip


def test_prepare_moves_only_training_rows_into_the_reserve(phantoms: list[VerifiedImage]) -> None:
    whole, small = _prepared(phantoms), _prepared(phantoms, num_train=12)
    assert whole.splits.count("reserve") == 0 and small.splits.count("train") == 12
    for before, after in zip(whole.splits, small.splits):
        assert after == before or (before, after) == ("train", "reserve")
    assert (
        sum(counts["reserve"] for counts in small.summary.counts.values()) == whole.splits.count("train") - 12
    )


def test_reserved_folds_are_those_a_search_leaves_out(phantoms: list[VerifiedImage]) -> None:
    whole = _prepared(phantoms, num_train=18)
    rows = [k for k, split in enumerate(whole.splits) if split == "train"]
    labels = np.array([phantoms[k].item.label_name == "malignant" for k in rows]).astype(int)
    folds = group_folds([whole.group_ids[k] for k in rows], labels, 3)
    for number in range(3):
        part = _prepared(phantoms, num_train=18, reserve_fold=(number, 3))
        gone = [k for k in rows if part.splits[k] == "reserve"]
        assert gone == [k for k, fold in zip(rows, folds.tolist()) if fold == number]
