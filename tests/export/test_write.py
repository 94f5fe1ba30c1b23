"""A folder is there whole or as it was; the card says what the tables say; Croissant validates."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from export_tables import HOSTILE, LABELS, PLAN, write_synthetic

from factory.export import FORMATS
from factory.export.destination import staged_folder
from factory.export.selection import Choice
from factory.export.write import ExportResult, ExportSettings, plan_export, write_export
from factory.imaging import encode_png
from factory.storage import open_table, write_table


def export(uri: str, out: Path | str, real: str | None = None, **settings: object) -> ExportResult:
    wanted = ExportSettings(**({"format": "folder", "out": str(out)} | settings))  # type: ignore[arg-type]
    tables = open_table(uri), None if real is None else open_table(real)
    return write_export(plan_export(*tables, Choice(), wanted), wanted)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, synthetic_uri: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(synthetic_uri, out)  # an empty folder is fine
    before = contents(out)
    with pytest.raises(FileExistsError, match="not empty.*--overwrite"):
        export(synthetic_uri, out)
    assert contents(out) == before
    assert export(synthetic_uri, out, overwrite=True).num_rows == 51
    assert contents(out) == before
    export(synthetic_uri, out, overwrite=True, format="coco")
    assert (out / "annotations").is_dir() and not (out / "train" / "images").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_removes_only_exports(tmp_path: Path, synthetic_uri: str) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.tex").write_text("years of work")
    (precious / "manifest.json").write_text('{"name": "of something else"}')
    with pytest.raises(FileExistsError, match="--overwrite does not remove it"):
        export(synthetic_uri, precious, overwrite=True)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        export(synthetic_uri, file, overwrite=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        export(synthetic_uri, tmp_path / "no" / "out")
    with pytest.raises(ValueError, match="local or mounted"):
        export(synthetic_uri, "s3://bucket/x")
    assert (precious / "chapter.tex").read_text() == "years of work" and file.read_text() == "x"


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_damaged_row_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    from export_tables import DIM, synthetic_sample

    from schemas.sample import synthetic_schema, table_of

    rows = [synthetic_sample(index) for index in (10, 20, 30)]
    object.__setattr__(rows[2], "image", b"not a PNG")
    schema = synthetic_schema(DIM)
    metadata = {"class_names": json.dumps(LABELS)}
    uri = write_table(str(tmp_path / "s.lance"), table_of(rows, schema), schema, metadata=metadata).uri
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"row {rows[2].request_id}: image or mask cannot be decoded"):
        export(uri, tmp_path / "out", format=name, channels="rgb")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_interrupted_export_keeps_the_earlier_one(tmp_path: Path, synthetic_uri: str) -> None:
    out = tmp_path / "out"
    export(synthetic_uri, out)
    before = contents(out)
    with pytest.raises(KeyboardInterrupt), staged_folder(str(out), overwrite=True) as staging:
        (staging / "half").write_text("x")
        raise KeyboardInterrupt
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tag_gives_the_rows_of_its_version(tmp_path: Path) -> None:
    import pyarrow as pa

    uri = write_synthetic(tmp_path, count=12)
    ids = [PLAN.request_at(index).request_id for index in range(12)]
    open_table(uri).write_columns(pa.table({"request_id": ids, "accepted": [False] * 12}), "request_id")
    with pytest.raises(ValueError, match="no row of"):
        export(uri, tmp_path / "latest")
    settings = ExportSettings(format="folder", out=str(tmp_path / "tagged"), tag="curated-1")
    result = write_export(plan_export(open_table(uri, tag="curated-1"), None, Choice(), settings), settings)
    assert result.num_rows == 8  # of 12: a near copy of each class, a validation background, a blank image
    assert json.loads((tmp_path / "tagged" / "manifest.json").read_text())["tag"] == "curated-1"


def test_the_card_says_what_the_tables_say(tmp_path: Path, synthetic_uri: str, real_uri: str) -> None:
    result = export(synthetic_uri, tmp_path / "out", real_uri, command="factory export synthetic.lance")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license_name"] == "CC-BY-4.0; CC0-1.0" and front["size_categories"] == ["n<1K"]
    derived = sum(n for (_, origin, _), n in result.counts.items() if origin == "derived")
    for said in (
        f"Derived rows (synthetic, with pixels of a real image): {derived}.",
        "| phantom | CC0-1.0 | research | 18 |",
        "| rejected as near_copy_of_real | 1 | 1 | 2 |",
        f"- plan `{PLAN.plan_id}`: 51 rows",
        "recipe `tiny`, fingerprint `f1`, seed 7",
        "weights unet `w1`",
        "Curated tag: `curated-1`",
        "2 rows of the table are near copies of a real training image; they stayed behind",
        "planted copies found: jpeg 75%",
        "Cite: A. Author, Phantoms, 2026",
        "factory export synthetic.lance",
        "factory reproduce synthetic.lance REQUEST_ID",
    ):
        assert said in text, said
    assert str(Path(synthetic_uri).parent) not in text and "not checked" not in text
    assert "patient-secret" not in text


def test_without_a_copy_test_the_card_says_not_checked(tmp_path: Path) -> None:
    uri = write_synthetic(tmp_path, curated=False, count=10)
    export(uri, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    section = text.split("## Copies of real images")[1].split("##")[0]
    assert section.strip() == "not checked" and "Curated tag: not curated." in text
    open_table(uri).set_metadata({"memorisation": '{"p_value": 0.4}'})
    export(uri, tmp_path / "again")
    section = (tmp_path / "again" / "README.md").read_text().split("## Copies of real images")[1]
    assert '{"p_value": 0.4}' in section and "not checked" not in section


def test_the_card_tells_how_the_table_was_curated(tmp_path: Path) -> None:
    uri = write_synthetic(tmp_path)
    found = json.loads(open_table(uri).metadata["curation.curated-1"])
    floor = {"label": "benign", "rows": 20, "accepted": 3, "kept": 2, "min_share": 0.25, "met": True}
    searched = {"method": "clustered", "recall": 0.987, "recall_pairs": 457, "recall_rows": 1000}
    found |= {
        "deduplication": searched, "duplicate_limits": {"benign": 0.95},
        "floors": [floor, floor | {"label": "mal|ignant", "kept": 0, "met": False}],
        "rejudged": {"thresholds": ["BlankImage.margin=5"], "changed": 4},
    }  # fmt: skip

    def section(name: str, record: dict) -> str:
        open_table(uri).set_metadata({"curation.curated-1": json.dumps(record)})
        export(uri, tmp_path / name)
        return (tmp_path / name / "README.md").read_text().split("## Curation")[1].split("\n##")[0]

    text = section("all", found)
    for said in (
        "clustered search, recall 0.987, of 457 pairs that an exact search of 1000 sampled rows finds",
        "duplicates of class benign: cosine of 0.9500 or more",
        "class benign fell below the floor of 25% accepted rows: 3 of 20, 2 duplicates kept for it; met",
        "class mal\\|ignant fell below the floor of 25% accepted rows: 3 of 20; not met",
        "judged again from stored scores with thresholds `BlankImage.margin=5`: 4 verdicts changed",
    ):
        assert said in text, said
    exact = section("exact", found | {"deduplication": {"method": "exact", "recall": None}, "rejudged": None})
    assert "exact search, recall not measured: exact" in exact and "judged again" not in exact
    unknown = {"method": "clustered", "recall": None, "recall_rows": 900, "recall_pairs": 0}
    assert "recall unknown: 900 sampled rows" in section("unknown", found | {"deduplication": unknown})
    assert "not searched, or not recorded" in section("old", {})


def test_hostile_names_stay_inside_their_cells(tmp_path: Path) -> None:
    from export_tables import DIM, synthetic_sample

    from schemas.sample import synthetic_schema, table_of

    name = "a|b\n# <script>`x`"
    sample = synthetic_sample(10)
    object.__setattr__(sample, "label_name", name)
    object.__setattr__(sample, "licence", "x\n---\nlicense: mit")
    schema = synthetic_schema(DIM)
    metadata = {"class_names": json.dumps([name])}
    uri = write_table(str(tmp_path / "s.lance"), table_of([sample], schema), schema, metadata=metadata).uri
    export(uri, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("\n---\n")[0])["license"] == "other"
    assert "<script>" not in text and "\n# <" not in text and "a\\|b # &lt;script>'x'" in text


@pytest.mark.parametrize("name", list(FORMATS))
def test_croissant_validates_and_its_records_are_the_rows(
    name: str, tmp_path: Path, synthetic_uri: str, real_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    import mlcroissant

    result = export(synthetic_uri, tmp_path / "out", real_uri, format=name)
    with caplog.at_level(logging.WARNING):
        dataset = mlcroissant.Dataset(jsonld=str(tmp_path / "out" / "croissant.json"))
    assert not dataset.metadata.issues.errors and not dataset.metadata.issues.warnings
    assert not [record.message for record in caplog.records if record.name == "absl"]
    records = list(dataset.records("samples"))
    assert len(records) == result.num_rows
    assert {record["samples/label_name"] for record in records} == {b"benign", HOSTILE.encode()}
    includes = json.loads((tmp_path / "out" / "croissant.json").read_text())["distribution"][1]["includes"]
    assert list((tmp_path / "out").glob(includes))


def test_a_plan_writes_nothing_and_counts_the_same(tmp_path: Path, synthetic_uri: str, real_uri: str) -> None:
    tables = open_table(synthetic_uri), open_table(real_uri)
    settings = ExportSettings(format="coco", out=str(tmp_path / "out"))
    planned = plan_export(*tables, Choice(ratio=1), settings)
    assert not list(tmp_path.iterdir())
    result = write_export(planned, settings)
    assert planned.num_rows == result.num_rows == sum(result.counts.values())


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Rows are asked for a few at a time: what is held is far less than what is exported."""
    import tracemalloc

    import numpy as np
    from export_tables import DIM, synthetic_sample

    from schemas.sample import synthetic_schema, table_of

    rows = [synthetic_sample(index) for index in range(10, 210) if index % 10 not in (3, 9)]
    noise = np.random.default_rng(0)
    for row in rows:
        object.__setattr__(row, "image", encode_png(noise.integers(0, 256, (200, 200), np.uint8)))
        object.__setattr__(row, "mask", encode_png(np.zeros((200, 200), np.uint8)))
    schema = synthetic_schema(DIM)
    metadata = {"class_names": json.dumps(LABELS)}
    uri = write_table(str(tmp_path / "s.lance"), table_of(rows, schema), schema, metadata=metadata).uri
    exported = sum(len(row.image) for row in rows)
    del rows
    export(uri, tmp_path / "warm")
    tracemalloc.start()
    export(uri, tmp_path / "out", format="webdataset")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert exported > 6e6 and peak < exported / 2
