"""Real rows by split: no test row without a recorded leave."""

import copy

import pytest
from storage_rows import DIM, METADATA, real_samples, synthetic_table, unit

from factory.storage import (
    TestAccess,
    class_names,
    open_table,
    real_digest,
    real_rows,
    test_accesses,
    write_table,
)
from schemas.sample import real_schema

ACCESS = TestAccess(opened_by="evaluate downstream", reason="report")


@pytest.fixture
def real(tmp_path):
    return write_table(str(tmp_path / "real.lance"), real_samples(20), real_schema(DIM), metadata=METADATA)


def test_rows_come_by_split(real):
    assert set(real_rows(real.uri)["split"].to_pylist()) == {"train"}
    assert real_rows(real.uri, splits=("train", "val"), columns=["image_id"]).num_rows == 15


def test_test_rows_are_refused_without_access_and_recorded_with_it(real):
    with pytest.raises(PermissionError, match="evaluate downstream"):
        real_rows(real.uri, splits=("train", "test"))
    assert test_accesses(real.uri) == []
    assert set(real_rows(real.uri, splits=("test",), access=ACCESS)["split"].to_pylist()) == {"test"}
    entry = test_accesses(real.uri)[0]
    assert (entry["opened_by"], entry["reason"], entry["version"]) == ("evaluate downstream", "report", "1")
    with pytest.raises(ValueError, match="who reads"):
        TestAccess(opened_by="", reason="x")


def test_an_unknown_split_and_another_kind_of_table_are_refused(real, tmp_path):
    with pytest.raises(ValueError, match="splits: valid; there are train, val, test"):
        real_rows(real.uri, splits=("valid",))
    with pytest.raises(ValueError, match="not a table of real images"):
        real_rows(synthetic_table(tmp_path).uri)


def test_the_digest_depends_on_rows_of_the_split_and_not_on_their_order(real, tmp_path):
    rows = real_rows(real.uri, splits=("train", "val", "test"), access=ACCESS)
    turned = write_table(str(tmp_path / "t.lance"), rows.take(list(range(19, -1, -1))), real_schema(DIM))
    fewer = write_table(str(tmp_path / "f.lance"), rows.slice(1), real_schema(DIM))
    no_test = write_table(
        str(tmp_path / "n.lance"),
        rows.filter([s != "test" for s in rows["split"].to_pylist()]),
        real_schema(DIM),
    )
    assert real_digest(real) == real_digest(turned) == real_digest(no_test)
    assert real_digest(real) != real_digest(fewer)
    assert real_digest(real) != real_digest(real, ("val",))


def test_class_names_come_from_the_metadata(real, tmp_path):
    assert class_names(open_table(real.uri)) == ("benign", "malignant")
    bare = write_table(str(tmp_path / "bare.lance"), real_samples(2), real_schema(DIM))
    with pytest.raises(ValueError, match="records no class_names"):
        class_names(bare)


def test_what_test_images_show_is_guarded_in_every_way_of_reading(real):
    table = open_table(real.uri)
    reads = [
        lambda: table.read(),
        lambda: table.read(["embedding"], "label = 1"),
        lambda: list(table.batches(["mask"])),
        lambda: table.query("split = 'test'", columns=["image"]),
        lambda: list(table.query_batches(columns=["attributes"])),
        lambda: next(table.numpy_batches()),
        lambda: table.query(columns=["image_id"], like=unit(0)),
        lambda: table.nearest(unit(0), columns=["image_id"]),
    ]
    for read in reads:
        with pytest.raises(PermissionError, match="the test split of .* add split IN"):
            read()
    assert table.read(["image"], "split <> 'test'").num_rows == 15
    assert table.query("split = 'train'", like=unit(0), k=3).num_rows == 3
    assert table.count() == 20 and table.read(["image_id", "split", "label_name"]).num_rows == 20


def test_a_table_opened_with_leave_is_read_whole_and_its_opening_recorded(real):
    table = open_table(real.uri, test_access=ACCESS)
    assert table.read().num_rows == 20 and table.query("split = 'test'").num_rows == 5
    assert copy.copy(table).read().num_rows == 20  # as it goes to another process
    assert [entry["opened_by"] for entry in test_accesses(real.uri)] == ["evaluate downstream"]


def test_batches_of_arrays_fit_torch(real):
    torch = pytest.importorskip("torch")
    batches = list(
        real.numpy_batches("split <> 'test'", columns=["embedding", "label", "image"], batch_size=8)
    )
    assert sum(len(batch["label"]) for batch in batches) == 15
    first = torch.from_numpy(batches[0]["embedding"])
    assert first.shape == (len(batches[0]["label"]), DIM) and torch.from_numpy(batches[0]["label"]).ndim == 1
    assert isinstance(batches[0]["image"][0], bytes)
