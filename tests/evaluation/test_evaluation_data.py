from pathlib import Path

import numpy as np
import pytest
from planted import CLASSES, write_real, write_synthetic

from factory.evaluation.data import match_classes, plan_ids, read_external, read_real, read_synthetic
from factory.imaging import decode_png
from factory.storage import TestAccess, open_table
from factory.storage import test_accesses as recorded_accesses


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tables")
    real = write_real(folder / "real.lance", {"train": 10, "val": 6, "test": 4, "reserve": 4}, 0)
    return real, write_synthetic(folder / "synthetic.lance", real, 30, 1)


def test_splits_are_kept_apart_and_test_rows_are_guarded(tables: tuple[str, str]) -> None:
    real, _ = tables
    train = read_real(real, ("train",), size=24, channels=1)
    assert train.ids == tuple(f"train-{k:03d}" for k in range(10)) and train.native is None
    assert read_real(real, ("reserve",), size=24, channels=1).ids[0] == "reserve-000"
    with pytest.raises(PermissionError, match="test split"):
        read_real(real, ("test",), size=24, channels=1)
    access = TestAccess(opened_by="a test", reason="checking the guard")
    assert len(read_real(real, ("test",), size=24, channels=1, access=access)) == 4
    assert recorded_accesses(real)[-1]["opened_by"] == "a test"


def test_pixels_are_letterboxed_and_truth_is_kept_at_native_size(tables: tuple[str, str]) -> None:
    rows = read_real(tables[0], ("val",), size=48, channels=3, native=True)
    assert rows.images.shape == (6, 48, 48, 3) and (rows.images[..., 0] == rows.images[..., 2]).all()
    stored = open_table(tables[0]).read(["image_id", "mask"], filter="split = 'val'").to_pylist()
    assert rows.native is not None and rows.masks is not None
    for row, truth in zip(sorted(stored, key=lambda row: row["image_id"]), rows.native):
        assert np.array_equal(truth.mask, decode_png(row["mask"]))
    same = read_real(tables[0], ("val",), size=24, channels=1)
    assert np.array_equal(rows.masks[:, ::2, ::2], same.masks)


def test_synthetic_rows_come_in_the_order_of_drawing(tables: tuple[str, str]) -> None:
    whole = read_synthetic(tables[1], size=24, channels=1, class_names=CLASSES)
    few = read_synthetic(
        tables[1], size=24, channels=1, class_names=CLASSES, limits={"bright": 3, "striped": 5}
    )
    assert few.counts().tolist() == [3, 5] and set(few.ids) < set(whole.ids)
    for label in range(2):
        rows = [name for name, found in zip(whole.ids, whole.labels) if found == label]
        assert [n for n, found in zip(few.ids, few.labels) if found == label] == rows[: (3, 5)[label]]
    assert whole.groups == whole.ids and not whole.is_real.any()
    assert len(whole) == 54  # every tenth of 60 was rejected
    everything = read_synthetic(tables[1], size=24, channels=1, class_names=CLASSES, accepted_only=False)
    assert len(everything) == 60
    bright = read_synthetic(
        tables[1], size=24, channels=1, class_names=CLASSES, where="scores['contrast'] < 10"
    )
    assert len(bright) == 9 and len(plan_ids(tables[1])) == 1
    none = read_synthetic(tables[1], size=24, channels=1, class_names=CLASSES, where="seed = 99")
    assert len(none) == 0 and plan_ids(tables[1], where="seed = 99") == []


def test_wrong_tables_and_filters_are_named(tables: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="not a synthetic table"):
        read_synthetic(tables[0], size=24, channels=1, class_names=CLASSES)
    with pytest.raises(ValueError, match="classes of"):
        read_synthetic(tables[1], size=24, channels=1, class_names=("a", "b"))
    with pytest.raises(ValueError, match="contrst"):
        read_synthetic(tables[1], size=24, channels=1, class_names=CLASSES, where="contrst > 1")
    with pytest.raises(ValueError, match="channels"):
        read_real(tables[0], ("val",), size=24, channels=2)


def test_another_dataset_judges_by_class_names(tables: tuple[str, str], tmp_path: Path) -> None:
    import json

    from factory.storage import write_table
    from schemas.sample import RealSample, real_schema, table_of

    other = open_table(write_real(tmp_path / "b.lance", {"val": 6}, 9)).read().to_pylist()
    names = ("foreign", "striped", "bright")
    rows = [RealSample.from_row({**row, "image_id": f"b-{k}", "label_name": names[k % 3], "label": k % 3})
            for k, row in enumerate(other)]  # fmt: skip
    schema = real_schema(2)
    uri = str(tmp_path / "external.lance")
    write_table(uri, table_of(rows, schema), schema, metadata={"class_names": json.dumps(names)})
    found, match = read_external(tables[0], uri, ("val",), size=24, channels=1, left_out=("b-1",))
    assert dict(zip(found.ids, (CLASSES[k] for k in found.labels))) == {
        "b-2": "bright", "b-4": "striped", "b-5": "bright",
    }  # fmt: skip
    assert found.native is not None and match.foreign == ("foreign",) and "left out" in match.note()
    assert match_classes(tables[0], tables[0]).note() == ""
    judging, match = read_external(tables[0], uri, ("val",), size=24, channels=1, task="segmentation")
    names_of_rows = dict(zip(judging.ids, (judging.class_names[k] for k in judging.labels)))
    assert judging.class_names == (*CLASSES, "unknown") and "without class" in match.note()
    assert [names_of_rows[f"b-{k}"] for k in range(6)] == ["unknown", "striped", "bright"] * 2
    with pytest.raises(ValueError, match="none in common"):
        strange = str(tmp_path / "strange.lance")
        write_table(strange, table_of(rows, schema), schema, metadata={"class_names": json.dumps(["x"])})
        match_classes(tables[0], strange)
