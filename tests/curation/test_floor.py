"""The diversity floor: what falls below it is told, and only duplicates are kept for it, the best first."""

import numpy as np
import pytest

from factory.curation.floor import apply_floor

DUPLICATE, COPY, BLANK = "duplicate_of_synthetic", "near_copy_of_real", "blank_image"
LABELS = ["a"] * 10 + ["b"] * 4
REASONS = [
    None,
    DUPLICATE,
    DUPLICATE,
    DUPLICATE,
    DUPLICATE,
    COPY,
    COPY,
    BLANK,
    BLANK,
    DUPLICATE,
    None,
    None,
    BLANK,
    None,
]
RANK = np.array([0, 9, 3, 7, 1, 2, 4, 5, 6, 8, 10, 11, 12, 13])


def test_a_class_below_its_share_is_told_and_nothing_is_changed() -> None:
    restored, floors = apply_floor(LABELS, REASONS, RANK, 0.25, keep=False)
    assert restored == [] and [floor.label for floor in floors] == ["a"]
    floor = floors[0]
    assert (floor.rows, floor.accepted, floor.kept, floor.is_met) == (10, 1, 0, False)
    assert floor.reasons == {DUPLICATE: 5, COPY: 2, BLANK: 2}
    assert "class a: 1 of 10 rows accepted (10%), less than --min-share 25%" in floor.line()


def test_the_best_duplicates_are_kept_until_the_share_is_reached() -> None:
    restored, floors = apply_floor(LABELS, REASONS, RANK, 0.3, keep=True)
    assert restored == [2, 4] and floors[0].kept == 2 and floors[0].is_met
    assert "the best 2 duplicates are kept" in floors[0].line() and "still" not in floors[0].line()


def test_copies_and_rejected_rows_are_never_kept() -> None:
    restored, floors = apply_floor(LABELS, REASONS, RANK, 1.0, keep=True)
    assert restored == [1, 2, 3, 4, 9] and not floors[0].is_met and not floors[1].is_met
    assert "still not reached" in floors[0].line()
    assert floors[1].label == "b" and floors[1].kept == 0


def test_the_share_itself_is_enough() -> None:
    assert apply_floor(["a"] * 4, [None, None, None, BLANK], np.arange(4), 0.75, keep=True) == ([], [])
    assert apply_floor([], [], np.arange(0), 0.5, keep=True) == ([], [])
    with pytest.raises(ValueError, match="min-share"):
        apply_floor(["a"], [None], np.arange(1), 1.5, keep=True)
