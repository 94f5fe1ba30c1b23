"""What leaves and what stays behind: verdicts, splits, ratios, and that a larger ratio contains the smaller."""

from pathlib import Path

import pytest
from export_tables import (
    HOSTILE,
    LABELS,
    NEAR_COPIES,
    NUM_SYNTHETIC,
    OF_VAL_BACKGROUND,
    PLAN,
    STREAM_REJECTED,
    WITHOUT_MASK,
    real_sample,
    write_synthetic,
)

from factory.export.rows import Provenance, interleave, read_items
from factory.export.selection import Choice, Selection, select
from factory.storage import open_table
from schemas.draws import share_out

GOOD = set(range(NUM_SYNTHETIC)) - set(STREAM_REJECTED) - set(NEAR_COPIES) - set(OF_VAL_BACKGROUND)
TRAIN = {index for index in range(30) if index % 5 < 3}
VAL = {index for index in range(30) if index % 5 == 3}


def chosen(selection: Selection) -> tuple[list[str], list[str]]:
    """Ids that leave: (synthetic, real)."""
    items = list(read_items(selection, Provenance(), channels="as-stored", mask_values="stored"))
    assert len(items) == selection.num_rows
    return (
        [item.row_id for item in items if item.origin != "real"],
        [item.row_id for item in items if item.origin == "real"],
    )


def request_ids(indices: set[int]) -> list[str]:
    return sorted(PLAN.request_at(index).request_id for index in indices)


def test_accepted_rows_of_the_train_split_leave(synthetic_uri: str) -> None:
    selection = select(open_table(synthetic_uri), None, Choice())
    assert sorted(chosen(selection)[0]) == request_ids(GOOD)
    assert selection.left_out == {
        "rejected as blank_image": {HOSTILE: len(STREAM_REJECTED)},
        "rejected as near_copy_of_real": {"benign": 1, HOSTILE: 1},
        "split of its background is not train": {HOSTILE: 1},
    }
    assert selection.num_rows + sum(sum(of.values()) for of in selection.left_out.values()) == NUM_SYNTHETIC
    assert selection.notes == ()


def test_before_curation_the_verdict_of_the_stream_holds_and_is_said(tmp_path: Path) -> None:
    selection = select(open_table(write_synthetic(tmp_path, curated=False)), None, Choice())
    assert sorted(chosen(selection)[0]) == request_ids(GOOD | set(NEAR_COPIES))
    assert "60 rows have not been curated" in selection.notes[0]


def test_near_copies_leave_only_when_asked(synthetic_uri: str) -> None:
    selection = select(open_table(synthetic_uri), None, Choice(include_near_copies=True))
    assert sorted(chosen(selection)[0]) == request_ids(GOOD | set(NEAR_COPIES))
    assert "2 rows are near copies" in selection.notes[0]
    sneaky = select(open_table(synthetic_uri), None, Choice(where="request_index < 5 OR true"))
    assert sorted(chosen(sneaky)[0]) == request_ids(GOOD)


def test_where_narrows_and_is_counted(synthetic_uri: str) -> None:
    selection = select(open_table(synthetic_uri), None, Choice(where="scores['contrast'] < 0.65"))
    kept = {index for index in GOOD if index <= 6}
    assert sorted(chosen(selection)[0]) == request_ids(kept)
    assert sum(selection.left_out["not in --where"].values()) == len(GOOD) - len(kept)


@pytest.mark.parametrize(
    "where", ["label = 0) OR (true", "(label = 0", "true) -- (", "true --", "labl = 1", "label = "]
)
def test_a_bad_where_is_an_error(synthetic_uri: str, where: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        select(open_table(synthetic_uri), None, Choice(where=where))


def test_masks_that_a_format_needs(synthetic_uri: str) -> None:
    selection = select(open_table(synthetic_uri), None, Choice(needs_mask=True))
    assert sorted(chosen(selection)[0]) == request_ids(GOOD - set(WITHOUT_MASK))
    assert sum(selection.left_out["synthetic row without mask"].values()) == len(WITHOUT_MASK)


def test_real_rows_are_those_of_train_and_never_of_test(synthetic_uri: str, real_uri: str) -> None:
    tables = open_table(synthetic_uri), open_table(real_uri)
    _, real = chosen(select(*tables, Choice()))
    assert sorted(real) == [real_sample(index).image_id for index in sorted(TRAIN)]
    with_val = select(*tables, Choice(include_val=True))
    _, real = chosen(with_val)
    assert sorted(real) == [real_sample(index).image_id for index in sorted(TRAIN | VAL)]
    assert with_val.splits == ("train", "val")


def test_the_ratio_is_per_class_and_the_choice_is_nested(synthetic_uri: str, real_uri: str) -> None:
    tables = open_table(synthetic_uri), open_table(real_uri)
    of_real = {label: sum(real_sample(i).label_name == label for i in TRAIN) for label in LABELS}
    assert of_real == {"benign": 12, HOSTILE: 6}
    smaller: set[str] = set()
    for ratio in (0.0, 0.5, 1.0, 1.5):
        selection = select(*tables, Choice(ratio=ratio))
        for label in LABELS:
            expected = round(ratio * of_real[label])
            assert selection.counts.get(("train", "synthetic", label), 0) == expected
        ids = set(chosen(selection)[0])
        assert len(ids) == selection.num_of("synthetic") and smaller <= ids
        assert ids <= set(request_ids(GOOD))
        smaller = ids
    in_table_order = {PLAN.request_at(index).request_id for index in sorted(GOOD)[: len(smaller)]}
    assert smaller != in_table_order


def test_too_few_rows_for_a_ratio_are_said(synthetic_uri: str, real_uri: str) -> None:
    tables = open_table(synthetic_uri), open_table(real_uri)
    selection = select(*tables, Choice(ratio=100))
    assert sorted(chosen(selection)[0]) == request_ids(GOOD)
    assert any(note.startswith("benign: 1200 synthetic rows asked for, 29 there") for note in selection.notes)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.7])
def test_balance_evens_out_and_grows_in_every_class(ratio: float) -> None:
    of_real = {"a": 10, "b": 3, "c": 0}
    targets = share_out(of_real, ratio, balance=True)
    assert sum(targets.values()) == round(13 * ratio)
    more = share_out(of_real, ratio + 0.4, balance=True)
    assert all(more[label] >= targets[label] for label in of_real)
    filled = [of_real[label] + targets[label] for label in of_real if targets[label]]
    assert max(filled) - min(filled) <= 1
    assert all(of_real[label] >= max(filled) - 1 for label in of_real if not targets[label])


def test_what_cannot_be_chosen(synthetic_uri: str, real_uri: str) -> None:
    synthetic, real = open_table(synthetic_uri), open_table(real_uri)
    with pytest.raises(ValueError, match="need --real"):
        select(synthetic, None, Choice(ratio=1))
    with pytest.raises(ValueError, match="--real .* is not a table of real images"):
        select(synthetic, synthetic, Choice())
    with pytest.raises(ValueError, match="is not a synthetic table"):
        select(real, None, Choice())
    with pytest.raises(ValueError, match="give --ratio too"):
        Choice(balance=True)
    with pytest.raises(ValueError, match="at least 0"):
        Choice(ratio=-1)
    with pytest.raises(ValueError, match="no row of .*rejected as blank_image: 6.*not in --where: 51"):
        select(synthetic, None, Choice(where="label = 99"))


def test_other_classes_are_not_mixed(synthetic_uri: str, real_uri: str) -> None:
    import json

    real = open_table(real_uri)
    changed = real.set_metadata({"class_names": json.dumps(["benign", "other"])})
    try:
        with pytest.raises(ValueError, match="cannot be mixed"):
            select(open_table(synthetic_uri), changed, Choice())
    finally:
        changed.set_metadata({"class_names": json.dumps(LABELS)})


@pytest.mark.parametrize(("few", "many"), [(0, 5), (3, 10), (7, 7), (10, 3), (1, 0)])
def test_interleaving_keeps_all_and_spreads_evenly(few: int, many: int) -> None:
    mixed = list(interleave(iter(f"r{i}" for i in range(few)), few, iter(f"s{i}" for i in range(many)), many))
    assert [x for x in mixed if x[0] == "r"] == [f"r{i}" for i in range(few)]
    assert [x for x in mixed if x[0] == "s"] == [f"s{i}" for i in range(many)]
    for end in range(len(mixed) + 1):
        share = sum(x[0] == "r" for x in mixed[:end])
        assert abs(share - end * few / len(mixed)) < 1
