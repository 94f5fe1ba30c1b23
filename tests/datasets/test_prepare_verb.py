import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factory.datasets.phantom import PhantomConfig, phantom_sample
from factory.storage import TestAccess, class_names, open_table
from jobs import prepare
from jobs.cli import main


def _folder(root: Path, count: int = 16) -> Path:
    for index in range(count):
        sample = phantom_sample(PhantomConfig(size=96), 11, index)
        for kind, pixels in (("images", sample.image), ("masks", sample.mask * 255)):
            path = root / kind / sample.label_name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


WHOLE = TestAccess(opened_by="tests", reason="the whole table")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for this file: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def shared_store(tracking_in_tmp: None, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@pytest.fixture(scope="module")
def phantom_table(tmp_path_factory: pytest.TempPathFactory, store: str) -> prepare.PrepareResult:
    folder = tmp_path_factory.mktemp("phantom")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        return prepare.run(
            prepare.Args(layout="phantom", out=str(folder / "real.lance"), num_images=30, seed=4)
        )


def test_the_table_says_all_about_itself(phantom_table: prepare.PrepareResult) -> None:
    table = open_table(phantom_table.uri, test_access=WHOLE)
    assert table.count() == 30 and class_names(table) == ("benign", "malignant")
    metadata = table.metadata
    assert json.loads(metadata["embedder"])["name"] == "tiny"
    assert metadata["dataset"] == "phantom" and metadata["licence"] == "Apache-2.0" and metadata["citation"]
    assert json.loads(metadata["summary"])["num_images"] == 30
    assert json.loads(metadata["quarantined"]) == []
    vectors = np.array(table.read(["embedding"])["embedding"].to_pylist())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_same_command_makes_the_same_rows(phantom_table: prepare.PrepareResult, tmp_path: Path) -> None:
    again = prepare.run(prepare.Args(layout="phantom", out=str(tmp_path / "b.lance"), num_images=30, seed=4))
    columns = ["image_id", "group_id", "split", "label", "image", "mask", "source_path"]
    first = open_table(phantom_table.uri, test_access=WHOLE).read(columns)
    assert first.equals(open_table(again.uri, test_access=WHOLE).read(columns))
    more = prepare.run(prepare.Args(layout="phantom", out=str(tmp_path / "c.lance"), num_images=40, seed=4))
    first = open_table(more.uri).read(["image_id"], limit=30)
    assert first.equals(open_table(phantom_table.uri).read(["image_id"]))


def test_an_existing_table_is_replaced_only_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "folder", str(_folder(tmp_path / "d")), "--out", str(tmp_path / "r.lance")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "image-group level, patients unknown" in printed and "next: factory train" in printed
    assert main(words) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert open_table(str(tmp_path / "r.lance")).count() == 16


def test_bad_files_stop_it_or_are_quarantined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path / "d")
    bad = next((folder / "images" / "benign").iterdir())
    bad.write_bytes(bad.read_bytes()[:300])
    words = ["prepare", "folder", str(folder), "--out", str(tmp_path / "r.lance")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"images/benign/{bad.name}: damaged" in error and "--on-error quarantine" in error
    assert not (tmp_path / "r.lance").exists()
    assert main([*words, "--on-error", "quarantine"]) == 0
    assert f"images/benign/{bad.name}" in capsys.readouterr().out
    kept = json.loads(open_table(str(tmp_path / "r.lance")).metadata["quarantined"])
    assert [problem["source_path"] for problem in kept] == [f"images/benign/{bad.name}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["busi", "/nowhere/at/all"], "no such folder; expected the folder Dataset_BUSI_with_GT"),
        (["busi"], "PATH is missing"),
        (["bussi", "x"], "did you mean 'busi'"),
        (["phantom", "x"], "reads no path"),
        (["phantom", "--num-images", "0"], "--num-images 0: want at least 1"),
        (["phantom", "--num-images", "2"], "cannot fill 3 splits"),
        (["phantom", "--split-fractions", "0.5", "0.1", "0.1"], "sum to 1"),
        (["folder", "x", "--num-images", "3"], "--num-images is for phantom"),
        (["phantom", "--embedder", "clip"], "embedder 'clip'"),
    ],
)  # fmt: skip
def test_bad_commands_are_answered_clearly(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *words, "--out", str(tmp_path / "r.lance")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.lance").exists()


def test_a_planted_copy_is_found_through_the_verb(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "d")
    source = next((folder / "images" / "malignant").iterdir())
    target = folder / "images" / "benign" / "copy.png"
    Image.fromarray(np.asarray(Image.open(source))[4:, :]).resize((130, 124)).save(target)
    mask = np.zeros((124, 130), np.uint8)
    mask[20:40, 30:60] = 255
    Image.fromarray(mask).save(folder / "masks" / "benign" / "copy.png")
    result = prepare.run(prepare.Args(layout="folder", path=str(folder), out=str(tmp_path / "r.lance")))
    assert len(result.summary.conflicts) == 1
    rows = {
        row["source_path"]: row
        for row in open_table(result.uri).read(["source_path", "group_id", "split"]).to_pylist()
    }
    copy, real = rows["images/benign/copy.png"], rows[f"images/malignant/{source.name}"]
    assert copy["group_id"] == real["group_id"] and copy["split"] == real["split"]
    shutil.rmtree(folder)
    assert open_table(result.uri).count() == 17
