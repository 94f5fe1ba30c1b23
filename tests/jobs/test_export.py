"""`factory export`: from the command line to a folder, what is printed, recorded and refused."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
from export_tables import write_real, write_synthetic

from factory.storage import TestAccess, open_table
from jobs import export
from jobs.export import Args, command, portable_command, run


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tables")
    return write_synthetic(folder), write_real(folder)


@pytest.fixture(autouse=True)
def tracking_in_tmp(tables: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One store for all tests here: making one takes longer than they do."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path(tables[0]).parent}/mlflow.db")


def test_a_mix_is_written_printed_and_recorded(
    tables: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic, real = tables
    out = tmp_path / "mixed"
    argv = [synthetic, "--format", "nnunet", "--out", str(out), "--real", real, "--ratio", "2", "--balance"]
    assert command(argv) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert ["train, real", "6", "12", "18"] in cells
    assert ["left out: rejected as near_copy_of_real", "1", "1", "2"] in cells
    with (out / "samples.csv").open(newline="") as stream:
        labels = [row["label"] for row in csv.DictReader(stream)]
    assert (labels.count("0"), labels.count("1")) == (27, 27)  # 12 and 6 real, 36 synthetic to even out
    assert f"wrote {out} (" in printed.splitlines()[-1] and "Dataset101_Breast" in printed
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == len(
        list((out / "labelsTr").iterdir())
    )
    import mlflow

    (recorded,) = mlflow.MlflowClient().search_runs(["1"])
    assert recorded.data.tags["factory.verb"] == "export"
    assert recorded.data.metrics["rows.train.real"] == 18
    assert recorded.data.metrics["rows"] == json.loads((out / "manifest.json").read_text())["num_rows"]
    inputs = {each.dataset.name for each in recorded.inputs.dataset_inputs}
    assert inputs == {"synthetic", "real"}


def test_real_images_in_colour_follow_the_synthetic_ones_where_one_kind_is_wanted(
    tables: tuple[str, str], tmp_path: Path
) -> None:
    """A few images with coloured marks must not stop an export of grey ultrasound."""
    import numpy as np
    import pyarrow as pa

    from factory.export.items import image_shape
    from factory.imaging import encode_png
    from factory.storage import write_table

    synthetic, real = tables
    table = open_table(real, test_access=TestAccess(opened_by="tests", reason="a copy of the table"))
    rows = table.read().to_pylist()
    first = next(row for row in rows if row["split"] == "train")
    colour = np.zeros((first["height"], first["width"], 3), np.uint8)
    colour[:, :, 0] = 200
    first["image"] = encode_png(colour)
    mixed = str(tmp_path / "mixed.lance")
    write_table(mixed, pa.Table.from_pylist(rows, schema=table.schema), table.schema, metadata=table.metadata)
    run(Args(table=synthetic, real=mixed, ratio=1.0, format="nnunet", out=str(tmp_path / "nnunet")))
    shapes = {image_shape(path.read_bytes())[2] for path in (tmp_path / "nnunet" / "imagesTr").iterdir()}
    assert shapes == {1}
    run(Args(table=synthetic, real=mixed, ratio=1.0, format="folder", out=str(tmp_path / "folder")))
    stored = {
        image_shape(path.read_bytes())[2]
        for path in (tmp_path / "folder" / "train" / "images").rglob("*.png")
    }
    assert stored == {1, 3}, "folders keep what is stored"


def test_a_plan_writes_nothing(
    tables: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command([tables[0], "--format", "folder", "--out", str(out), "--plan"]) == 0
    assert "nothing written; without --plan: 51 rows" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_tag_and_a_filter(tables: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        Args(
            table=tables[0], format="folder", out=str(out), tag="curated-1", where="label = 0", name="my set"
        )
    )
    with (out / "samples.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == result.num_rows == 29 and {row["label"] for row in rows} == {"0"}
    text = (out / "README.md").read_text()
    assert "# my-set" in text
    assert (
        "factory export synthetic.lance --format folder --out out --where 'label = 0' --tag curated-1" in text
    )


def test_the_command_in_the_card_names_no_folder() -> None:
    args = Args(
        table="/data/a/synthetic.lance",
        format="coco",
        out="/data/b/out",
        real="/data/c/real.lance",
        ratio=0.5,
        include_val=True,
        overwrite=True,
    )
    assert portable_command(args) == (
        "factory export synthetic.lance --format coco --out out --real real.lance --ratio 0.5 --include-val"
    )


@pytest.mark.parametrize(
    ("changes", "fault", "message"),
    [
        ({"ratio": 1.0}, ValueError, "need --real"),
        ({"balance": True}, ValueError, "give --ratio too"),
        ({"ratio": float("nan")}, ValueError, "--ratio nan"),
        ({"rows_per_shard": 0}, ValueError, "--rows-per-shard 0"),
        ({"tag": "curated-9"}, ValueError, "tags: curated-1"),
        ({"tag": "curated-1", "version": 1}, ValueError, "not both"),
        ({"where": "labl = 1"}, ValueError, "No field named labl"),
        ({"table": "no.lance"}, FileNotFoundError, "no table at no.lance"),
        ({"out": "no/such/out"}, FileNotFoundError, "no such folder"),
        ({"out": "."}, FileExistsError, "not empty"),
    ],
)
def test_bad_wishes_are_refused_before_anything_is_written(
    tables: tuple[str, str], tmp_path: Path, monkeypatch, changes: dict, fault: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(fault, match=message):
        run(Args(**({"table": tables[0], "format": "folder", "out": "out"} | changes)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_opens_no_test_row(tables: tuple[str, str], tmp_path: Path) -> None:
    synthetic, real = tables
    run(Args(table=synthetic, real=real, format="folder", out=str(tmp_path / "out"), include_val=True))
    test_ids = set(open_table(real).read(["image_id"], "split = 'test'")["image_id"].to_pylist())
    assert len(test_ids) == 6
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    names = {path.stem for path in (tmp_path / "out").rglob("*")}
    assert not test_ids & names and not any(each.encode() in everything for each in test_ids)


def test_help_is_quick_to_import() -> None:
    script = (
        "import sys, jobs.export, factory.export\n"
        "heavy = {'torch', 'ray', 'lance', 'mlflow', 'datasets', 'webdataset'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    root = Path(export.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
