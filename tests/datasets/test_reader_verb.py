import json
from pathlib import Path

import pytest
from layout_fixtures import FIXTURES, bus_bra, ddti

from factory.datasets.layout import ListingOptions
from factory.datasets.layouts import LAYOUTS
from factory.storage import TestAccess, class_names, open_table
from jobs import datasets, prepare


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for this file: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.mark.parametrize("name", FIXTURES)
def test_a_reader_states_its_terms_and_names_what_is_missing(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    assert all(
        (layout.licence, layout.allowed_use, layout.citation, layout.contents, layout.obtain, layout.tree)
    )
    root = FIXTURES[name](tmp_path / "data")
    listing = layout.listing(root, ListingOptions())
    assert listing.items and not listing.problems
    assert all((root / item.source_path).is_file() for item in listing.items), (
        "paths are relative to the folder"
    )
    assert len({item.source_path for item in listing.items}) == len(listing.items)
    with pytest.raises(FileNotFoundError, match="no such folder; expected"):
        layout.listing(tmp_path / "absent", ListingOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        layout.listing(tmp_path / "empty", ListingOptions())


def test_every_layout_describes_itself() -> None:
    for name, layout in LAYOUTS.items():
        text = datasets.description(name)
        assert layout.licence in text and layout.citation in text and layout.obtain in text, name
        assert layout.contents and f"factory prepare {name}" in text and text.count("\n\n") >= 3


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert datasets.command([]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in LAYOUTS) and "7fvgj4jsp7" in table and "CC0" in table
    assert datasets.command(["show", "ham10000"]) == 0
    assert "HAM10000_images_part_1/ISIC_0024306.jpg" in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean 'ham10000'"):
        datasets.command(["show", "ham1000"])
    with pytest.raises(ValueError, match="want nothing or `show NAME`"):
        datasets.command(["list"])


@pytest.mark.parametrize("name", ["bus_bra", "ddti"])
def test_prepare_end_to_end(
    name: str, tmp_path: Path, tracking_in_tmp: None, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    folder = (
        bus_bra(tmp_path / "d", num_cases=12) if name == "bus_bra" else ddti(tmp_path / "d", num_cases=15)
    )
    result = prepare.run(prepare.Args(layout=name, path=str(folder), out=str(tmp_path / "real.lance")))
    table = open_table(result.uri, test_access=TestAccess(opened_by="tests", reason="the whole table"))
    layout = LAYOUTS[name]
    assert table.metadata["licence"] == layout.licence and table.metadata["allowed_use"] == layout.allowed_use
    assert table.metadata["citation"] == layout.citation and json.loads(table.metadata["quarantined"]) == []
    rows = table.read(
        ["label", "label_name", "patient_id", "split", "group_id", "mask", "dataset", "licence"]
    ).to_pylist()
    assert len(rows) == (24 if name == "bus_bra" else 16)
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert {row["label_name"] for row in rows} == set(class_names(table))
    assert all(row["mask"] and row["dataset"] == name and row["licence"] == layout.licence for row in rows)
    by_patient: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        by_patient.setdefault(row["patient_id"], set()).add((row["split"], row["group_id"]))
    assert all(len(places) == 1 for places in by_patient.values()), "a patient stays in one split"
