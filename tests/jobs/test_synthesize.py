"""The stream on a real Ray: exactly once, whatever dies; the same images, whatever the batching."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from factory.diffusion.guidance import DenoisingBatch
from factory.imaging import decode_png
from factory.recipes import RECIPES, Recipe
from factory.storage import QuarantineLog, class_names, open_table
from factory.synthesis.annotators import BoundRequestedMask, RequestedMask
from factory.synthesis.synthesizer import IMAGE_TOLERANCE
from jobs import reproduce
from jobs.synthesis_plan import Args, prepare, resolve_counts
from jobs.synthesize import SynthesisResult, command, run

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--sampling.num-inference-steps", "3")


@pytest.fixture(scope="module")
def base_args(real_table: str, generator_folder: Path) -> Args:
    return Args(
        recipe="tiny", generator=str(generator_folder), real=real_table, out="", overrides=FAST, batch_size=4
    )


def _rows(uri: str) -> dict[str, dict]:
    return {row["request_id"]: row for row in open_table(uri).read().to_pylist()}


def _run(args: Args) -> SynthesisResult:
    result = run(args)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def first_run(base_args: Args, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Args]:
    """Twelve requests of both classes by one synthesizer in batches of four."""
    folder = tmp_path_factory.mktemp("synthesize")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        args = dataclasses.replace(
            base_args, out=str(folder / "a.lance"), labels="benign=7,malignant=5", rows_per_fragment=8
        )
        result = _run(args)
        assert (result.requested, result.committed, result.pending) == (12, 12, 0)
        assert result.accepted + sum(result.rejected.values()) == 12
        yield args


@pytest.mark.slow
def test_every_row_is_whole(first_run: Args) -> None:
    rows = list(_rows(first_run.out).values())
    assert len(rows) == 12
    assert sorted(row["label_name"] for row in rows) == ["benign"] * 7 + ["malignant"] * 5
    for row in rows:
        assert decode_png(row["image"]).shape == (128, 128)
        assert decode_png(row["image"]).std() > 0
        assert set(np.unique(decode_png(row["mask"]))) == {0, 1}
        assert np.isclose(np.linalg.norm(row["embedding"]), 1, atol=1e-4)
        assert {name for name, _ in row["weights"]} >= {"base", "controlnet"}
        assert row["label_name"] in row["prompt"]
        assert row["code_version"] and row["fingerprint"] and row["source_parameters"] != "{}"
        assert row["num_inference_steps"] == 3


@pytest.fixture
def bucket() -> Iterator[str]:
    """Address of an S3-compatible server on loopback with an empty bucket named `bucket`."""
    script = ROOT / "tests" / "storage" / "s3_server.py"
    server = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{int(server.stdout.readline())}"
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_table_on_an_object_store_has_the_same_rows_and_no_secret_is_tracked(
    first_run: Args, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's workers, which started before, have the options from their tasks alone."""
    import sqlite3

    secret = "a-secret-for-the-driver"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    options = {
        "aws_endpoint": bucket,
        "aws_region": "us-east-1",
        "aws_access_key_id": "driver",
        "aws_secret_access_key": secret,
    }
    monkeypatch.setenv("FACTORY_STORAGE_OPTIONS", json.dumps(options))
    remote = dataclasses.replace(
        first_run, out="s3://bucket/runs/synthetic.lance", labels="benign=3,malignant=3"
    )
    assert _run(remote).committed == 6
    assert (again := _run(remote)).made == 0 and again.committed == 6
    local, stored = _rows(first_run.out), _rows(remote.out)
    assert len(stored) == 6 and set(stored) <= set(local)
    for request_id, row in stored.items():
        assert row["requested_mask"] == local[request_id]["requested_mask"]
    assert secret not in repr(open_table(remote.out).metadata)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert secret not in "\n".join(database.iterdump())


@pytest.mark.slow
def test_a_plan_counts_what_is_missing(first_run: Args, capsys: pytest.CaptureFixture[str]) -> None:
    more = dataclasses.replace(first_run, labels="benign=9,malignant=5", plan=True)
    assert run(more) is None
    assert "missing      2 " in capsys.readouterr().out


@pytest.mark.slow
def test_running_again_does_nothing(first_run: Args) -> None:
    before = open_table(first_run.out).version
    result = _run(first_run)
    assert (result.made, result.committed) == (0, 12)
    assert open_table(first_run.out).version == before


@pytest.mark.slow
def test_more_requests_other_batches_and_two_synthesizers_change_no_image(
    first_run: Args, tmp_path: Path
) -> None:
    other = dataclasses.replace(
        first_run,
        out=str(tmp_path / "b.lance"),
        labels="benign=8,malignant=8",
        batch_size=16,
        num_synthesizers=2,
    )
    assert _run(other).committed == 16
    first, second = _rows(first_run.out), _rows(other.out)
    assert set(first) < set(second), "a larger request extends the same plan"
    for request_id, row in first.items():
        again = second[request_id]
        assert again["requested_mask"] == row["requested_mask"], "requested masks are bit-equal"
        assert again["prompt"] == row["prompt"]
        difference = np.abs(decode_png(row["image"]).astype(int) - decode_png(again["image"]).astype(int))
        assert difference.max() <= IMAGE_TOLERANCE


@pytest.mark.slow
def test_a_row_is_reproduced_from_its_provenance(first_run: Args, capsys: pytest.CaptureFixture[str]) -> None:
    request_id = sorted(_rows(first_run.out))[0]
    assert reproduce.command([first_run.out, request_id[:12]]) == 0
    assert "reproduced" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not in"):
        reproduce.run(reproduce.Args(table=first_run.out, request_id="0" * 32))


@dataclass(frozen=True, kw_only=True)
class DiesOnLargeMasks(RequestedMask):
    """Kills its process whenever a mask is larger than `area` px: a request no retry can save."""

    area: int

    def bind(self, batch: DenoisingBatch) -> BoundRequestedMask:
        assert batch.masks is not None
        if batch.masks.flatten(1).count_nonzero(dim=1).max() > self.area:
            os._exit(1)
        return super().bind(batch)


def poisoned() -> Recipe:
    recipe = RECIPES["tiny"]()
    return dataclasses.replace(recipe, annotator=DiesOnLargeMasks(area=int(os.environ["POISON_AREA"])))


@pytest.mark.slow
def test_a_request_that_kills_its_process_is_quarantined_alone(
    base_args: Args, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = dataclasses.replace(
        base_args,
        out=str(tmp_path / "poison.lance"),
        labels="benign=4,malignant=4",
        max_quarantined=0.5,
        max_tries=2,
    )
    requests = prepare(args).request_stage(prepare(args).requested.to_array()).to_pylist()
    areas = {row["request_id"]: np.count_nonzero(decode_png(row["requested_mask"])) for row in requests}
    largest = max(areas, key=lambda request_id: areas[request_id])
    monkeypatch.setenv("POISON_AREA", str(areas[largest] - 1))
    monkeypatch.chdir(ROOT)
    args = dataclasses.replace(args, recipe="tests.jobs.test_synthesize:poisoned")
    result = _run(args)
    assert (result.committed, result.quarantined, result.pending) == (7, {"process_died": 1}, 0)
    entries = QuarantineLog(args.out, result.plan_id).entries()
    assert len(entries) == 1 and "alone" in entries[0].error


@pytest.mark.soak
@pytest.mark.cluster
def test_killed_driver_and_the_same_command_again(base_args: Args, tmp_path: Path) -> None:
    out = str(tmp_path / "killed.lance")
    command_line = [
        sys.executable, "-m", "jobs.cli", "synthesize", "--recipe", "tiny", "--generator", base_args.generator,
        "--real", base_args.real, "--out", out, "--num-requests", "40", "--batch-size", "2", "--rows-per-fragment", "2",
        "--rows-per-commit", "4", "--num-cpus", "2", *FAST,
    ]  # fmt: skip
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    driver = subprocess.Popen(
        command_line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 240
        committed: dict[str, dict] = {}
        while len(committed) < 4 and time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.2)
            committed = _rows(out) if Path(out).is_dir() else {}
        assert driver.poll() is None, (
            f"the job ended before it was killed: {driver.communicate()[0].decode()[-2000:]}"
        )
        assert committed, "nothing was committed in time"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    at_kill = _rows(out)
    assert 0 < len(at_kill) < 40
    done = subprocess.run(command_line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = open_table(out).read(columns=["request_id"])
    assert table.num_rows == len(set(table["request_id"].to_pylist())) == 40
    after = _rows(out)
    assert all(repr(after[request_id]) == repr(row) for request_id, row in at_kill.items()), (
        "committed rows are untouched"
    )


def test_the_plan_is_printed_without_writing(
    base_args: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.lance"
    code = command(
        ["--recipe", "tiny", "--generator", base_args.generator, "--real", base_args.real, "--out", str(out),
         "--num-requests", "10", "--balance", "--plan"]
    )  # fmt: skip
    assert code == 0 and not out.exists()
    assert "10: benign=5, malignant=5" in capsys.readouterr().out


def test_counts_by_training_share_or_balance(base_args: Args) -> None:
    args = dataclasses.replace(base_args, num_requests=10)
    assert resolve_counts(args, ["a", "b"], {"a": 2, "b": 1}) == {"a": 7, "b": 3}
    assert resolve_counts(dataclasses.replace(args, balance=True), ["a", "b"], {"a": 2, "b": 1}) == {
        "a": 5,
        "b": 5,
    }
    assert resolve_counts(dataclasses.replace(args, num_requests=0), ["a"], {"a": 2}) == {"a": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "cyst=3"}, "cyst"),
        ({"labels": "benign=many"}, "benign=many"),
        ({"num_requests": -1}, "-1"),
        ({}, "exactly one of"),
        ({"num_requests": 3, "labels": "benign=3"}, "exactly one of"),
        ({"num_requests": 3, "recipe": "tinny"}, "did you mean 'tiny'"),
        ({"num_requests": 3, "recipe": "clinical_prior"}, "clinical_prior"),
        ({"num_requests": 3, "generator": "nowhere"}, "nowhere"),
        ({"num_requests": 3, "real": "nowhere.lance"}, "nowhere.lance"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    base_args: Args, tmp_path: Path, change: dict, message: str
) -> None:
    out = tmp_path / "bad.lance"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(dataclasses.replace(base_args, out=str(out), overrides=(), **change))
    assert not out.exists()


def test_no_requests_make_an_empty_table(base_args: Args, tmp_path: Path) -> None:
    args = dataclasses.replace(base_args, out=str(tmp_path / "none.lance"), num_requests=0)
    result = _run(args)
    assert (result.requested, result.committed, result.pending) == (0, 0, 0)
    assert class_names(open_table(args.out)) == ("benign", "malignant")


def test_a_table_of_another_schema_or_embedder_is_refused(
    base_args: Args, real_table: str, tmp_path: Path
) -> None:
    for plan in (False, True):
        with pytest.raises(ValueError, match="schema|column"):
            run(dataclasses.replace(base_args, out=real_table, num_requests=1, plan=plan))
