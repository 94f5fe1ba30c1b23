"""`factory query`: answers, formats, neighbours, contact sheets, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from factory.imaging import decode_png, encode_png
from factory.storage import Committer, create_table, open_table, write_fragment, write_table
from jobs import cli
from jobs.query import Args, run
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

DIM = 8
LABELS = ("benign", "it's malignant")
PLAN = SynthesisPlan(recipe="tiny", fingerprint="f", weights={}, real_digest="r", labels=LABELS)


def vector(index: int) -> tuple[float, ...]:
    """Unit vectors that turn slowly: neighbours by number are neighbours."""
    return tuple(np.array([np.cos(index / 40), np.sin(index / 40), *[0] * (DIM - 2)], np.float32).tolist())


def picture(index: int, size: int = 24) -> bytes:
    return encode_png(np.full((size, size), index * 5, np.uint8))


def sample(index: int) -> SyntheticSample:
    request = PLAN.request_at(index)
    mask = np.zeros((24, 24), np.uint8)
    mask[6:12, 6:12] = 1
    return SyntheticSample(
        request_id=request.request_id,
        plan_id=PLAN.plan_id,
        request_index=index,
        attempt=0,
        recipe="tiny",
        fingerprint="f",
        weights={"unet": "w"},
        seed=0,
        label=request.label_index,
        label_name=request.label,
        prompt="a prompt " * 10,
        requested_mask=None,
        mask=encode_png(mask) if index % 2 else None,
        image=picture(index),
        height=24,
        width=24,
        licence="CC0",
        num_inference_steps=4,
        guidance_scale=1.5,
        batch_size=4,
        embedding=vector(index),
        scores={"contrast": float("nan") if index == 0 else index / 10},
        stream_reject_reason="blank_image" if index % 5 == 4 else None,
        code_version="0",
    )


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 rows, six of them rejected by the stream; the first two curated and tagged."""
    path = str(tmp_path_factory.mktemp("query") / "synthetic.lance")
    metadata = {"class_names": json.dumps(LABELS)}
    create_table(path, synthetic_schema(DIM), metadata=metadata)
    with Committer(path, plan_id=PLAN.plan_id, run_id="r") as committer:
        rows = table_of([sample(index) for index in range(30)], synthetic_schema(DIM))
        committer.add(write_fragment(path, rows, run_id="r"))
    values = pa.table(
        {
            "request_id": [PLAN.request_at(index).request_id for index in (0, 4)],
            "accepted": [False, True],
            "reject_reason": pa.array(["near_copy_of_real", None], pa.string()),
        }
    )
    table = open_table(path).write_columns(values, "request_id")
    table.tag(table.next_tag())
    return path


@pytest.fixture(scope="module")
def real_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 real rows, four of each split."""
    samples = [
        RealSample(
            image_id=f"{index:032x}",
            dataset="phantom",
            source_path=f"{index}.png",
            group_id=f"g{index}",
            split=("train", "val", "test")[index % 3],
            label=0,
            label_name="benign",
            image=picture(index),
            mask=None,
            height=24,
            width=24,
            attributes={"echogenicity": "hypoechoic"},
            licence="CC0",
            allowed_use="any",
            embedding=vector(index),
        )
        for index in range(12)
    ]
    schema = real_schema(DIM)
    return write_table(
        str(tmp_path_factory.mktemp("query") / "real.lance"), table_of(samples, schema), schema
    ).uri


def rows(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict]:
    assert cli.main(["query", *argv, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_filter_uses_the_effective_verdicts(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    rejected = rows(capsys, uri, "NOT accepted")
    assert [row["request_index"] for row in rejected] == [0, 9, 14, 19, 24, 29]
    assert [row["reject_reason"] for row in rejected[:2]] == ["near_copy_of_real", "blank_image"]
    assert "image" not in rejected[0] and "embedding" not in rejected[0]
    assert rejected[0]["scores"] == {"contrast": None}  # not a number has no place in JSON
    assert [r["request_index"] for r in rows(capsys, uri, "scores['contrast'] < 0.25")] == [1, 2]


def test_columns_are_those_asked_for(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, uri, "request_index = 3", "--columns", "request_index, image,accepted")
    assert list(found[0]) == ["request_index", "image", "accepted"]
    assert found[0]["image"].startswith("iVBOR")  # base64 of a PNG


def test_a_table_for_people_shows_twenty_and_says_how_to_see_all(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["query", uri]) == 0
    out, err = capsys.readouterr()
    header, _, *lines = out.splitlines()
    assert header.split()[:3] == ["request_id", "recipe", "label_name"]
    assert len(lines) == 20 and lines[1].split()[0] == PLAN.request_at(1).request_id
    assert "20 rows of 30 of" in err and "--limit 30" in err
    assert cli.main(["query", uri, "accepted", "--limit", "3"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5 and "3 rows of 24 of" in err


def test_nothing_found_is_an_answer(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(capsys, uri, "label_name = 'cyst'") == []
    assert cli.main(["query", uri, "label_name = 'cyst'"]) == 0
    assert "0 rows of" in capsys.readouterr().err


def test_parquet_holds_every_column_and_the_metadata(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    result = run(Args(table=uri, filter="accepted", format="parquet", out=str(out)))
    written = parquet.read_table(out)
    assert (result.rows, written.num_rows, result.written) == (24, 24, (str(out),))
    assert {"image", "embedding", "accepted", "scores"} <= set(written.column_names)
    assert (decode_png(written["image"][1].as_py()) == 10).all()
    assert json.loads(written.schema.metadata[b"class_names"]) == list(LABELS)


def test_neighbours_of_a_row_leave_the_row_itself_out(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    beginning = PLAN.request_at(10).request_id[:12]
    found = rows(capsys, uri, "--like", beginning, "-k", "4", "--columns", "request_index")
    assert {row["request_index"] for row in found[:2]} == {9, 11}
    assert {row["request_index"] for row in found} == {8, 9, 11, 12}
    assert found[0]["similarity"] == pytest.approx(np.cos(1 / 40), abs=1e-6)
    accepted = rows(capsys, uri, "accepted", "--like", beginning, "-k", "4", "--columns", "request_index")
    assert {row["request_index"] for row in accepted} == {8, 11, 12, 7}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--like", "0" * 32], "neither an image file nor an id"),
        (["--like", "no/such.png"], "neither an image file nor the id"),
        (["--columns", "labl"], "column(s) 'labl' not in"),
        (["labl = 1"], "No field named labl"),
        (["--tag", "curated-9"], "tags: curated-1"),
        (["--format", "parquet"], "--format parquet needs --out FILE"),
        (["--out", "/no/such/folder/rows.txt"], "no such folder"),
        (["--limit", "0"], "at least 1"),
        (["label_name = 'cyst'", "--contact-sheet", "sheet.png"], "nothing to put on a contact sheet"),
    ],
)
def test_bad_questions_are_answered_in_one_line(
    uri: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["query", uri, *argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert list(tmp_path.iterdir()) == []


def test_a_missing_table_says_what_makes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", str(tmp_path / "synthetic.lance")]) == 2
    assert "factory synthesize" in capsys.readouterr().err


def test_a_tag_gives_the_verdicts_of_its_version(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    again = pa.table({"request_id": [PLAN.request_at(0).request_id], "accepted": [True]})
    table = open_table(uri)
    tagged = rows(capsys, uri, "NOT accepted", "--tag", "curated-1")
    table.write_columns(again, "request_id")
    assert rows(capsys, uri, "NOT accepted", "--tag", "curated-1") == tagged
    assert len(rows(capsys, uri, "NOT accepted")) == len(tagged) - 1
    undo = again.set_column(1, "accepted", pa.array([False]))
    open_table(uri).write_columns(undo, "request_id")


@pytest.mark.parametrize("text", ["label = 0) OR (true", "label = 0) x", "true /* ", "true) -- ("])
def test_no_filter_undoes_the_guard_of_the_test_split(
    real_uri: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["query", real_uri, text]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_test_split_of_real_rows_is_left_out(real_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([real_uri], [real_uri, "split = 'test' OR label = 0"], [real_uri, "--like", f"{3:032x}"]):
        found = rows(capsys, *argv)
        assert found and {row["split"] for row in found} == {"train", "val"}
    assert cli.main(["query", real_uri, "--like", f"{2:032x}"]) == 2  # a row of the test split
    assert cli.main(["query", real_uri, "attributes['echogenicity'] = 'hypoechoic'"]) == 0
    assert "test split are left out" in capsys.readouterr().err


def test_a_contact_sheet_shows_every_row_and_is_recorded(uri: str, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    result = run(Args(table=uri, filter="request_index < 24", contact_sheet=str(sheet)))
    assert result.rows == 20 and result.written == (str(sheet),)  # the text is cut, the sheet is not
    pixels = np.asarray(Image.open(sheet))
    per_row = 8
    height = pixels.shape[0] / 3
    cell = pixels.shape[1] // per_row
    last = pixels[int(2 * height) :, (per_row - 1) * cell :]
    assert last.shape[0] >= 100 and (last == 23 * 5).any()  # image 23 stands in the last cell
    import mlflow

    found = mlflow.MlflowClient().search_runs(["1"])
    assert [run.data.tags["factory.verb"] for run in found] == ["query"]


def test_describe_names_columns_units_tags_and_counts(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", uri, "--describe"]) == 0
    out = capsys.readouterr().out
    assert "30 rows" in out and "curated-1 (version" in out
    assert "it's malignant: 15 rows, 12 accepted" in out
    assert "rejected as near_copy_of_real: 1" in out
    assert any(
        line.split()[0] == "height" and line.endswith("image height [px]") for line in out.splitlines()
    )


def test_a_question_imports_nothing_heavy(uri: str, tmp_path: Path) -> None:
    beginning = PLAN.request_at(10).request_id[:12]
    questions = [
        [uri, "accepted"],
        [uri, "--like", beginning],
        [uri, "--describe"],
        [uri, "--format", "parquet", "--out", str(tmp_path / "rows.parquet")],
    ]
    script = (
        "import sys, json\nfrom jobs.cli import main\n"
        f"codes = [main(['query', *question]) for question in {questions!r}]\n"
        "heavy = {'torch', 'ray', 'mlflow', 'diffusers', 'transformers', 'timm', 'faiss', 'matplotlib'} & set(sys.modules)\n"
        "print(json.dumps([codes, sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0, 0, 0], []]


def test_an_image_file_finds_the_row_made_from_it(
    real_table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = open_table(real_table).read(["image_id", "image"], "split = 'train'", limit=1).to_pylist()[0]
    path = tmp_path / "like this.png"
    path.write_bytes(row["image"])
    found = rows(capsys, real_table, "--like", str(path), "-k", "3", "--columns", "image_id")
    assert found[0]["image_id"] == row["image_id"] and found[0]["similarity"] > 0.999
    path.write_bytes(row["image"][:40])
    assert cli.main(["query", real_table, "--like", str(path)]) == 2
    assert "not an image file that can be read" in capsys.readouterr().err
