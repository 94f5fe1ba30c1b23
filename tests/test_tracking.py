"""Tracking against a real sqlite store in a temporary folder."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from factory import tracking
from factory.redaction import REDACTED, flatten, is_secret_name, redact
from factory.tracking import outbox as outbox_module
from factory.tracking import run as run_module
from factory.tracking import store as store_module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.warm_up()
        yield folder


@pytest.fixture(autouse=True)
def tracking_in_tmp() -> None:
    """In place of the shared fixture of this name: here one store serves the whole module."""


def client(store: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store}/runs/mlflow.db")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    bound: float = 0.5


def test_a_finished_run_keeps_parameters_metrics_tags_and_artifacts(store: Path) -> None:
    settings = {"mask": Threshold(), "labels": ["a", "b"], "nested": {"deep": {"n": 1}}}
    with tracking.track("train", recipe_parameters=settings, execution_parameters={"workers": 2}) as run:
        for step in range(450):
            run.metrics({"loss": 1.0 / (step + 1), "grad norm (l2)": 2.0}, step=step)
        run.set({"recipe": "tiny"})
        run.artifact("summary.txt", "hello")
        run.artifact("summary.json", {"counts": {"benign": 3}})
        run.artifact("sheet.png", Image.new("L", (4, 4), 9))
        (store / "file.csv").write_text("a,b")
        run.artifact(store / "file.csv")
    recorded = client(store).get_run(run.run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params == {
        "recipe.mask": "Threshold",
        "recipe.mask.bound": "0.5",
        "recipe.labels": '["a", "b"]',
        "recipe.nested.deep.n": "1",
        "execution.workers": "2",
    }
    history = client(store).get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(s, 1.0 / (s + 1)) for s in range(450)]
    assert "grad norm _l2_" in recorded.data.metrics
    assert recorded.data.tags["recipe"] == "tiny"
    folder = store / "runs/artifacts" / run.run_id / "artifacts"
    assert {p.name for p in folder.iterdir()} == {"summary.txt", "summary.json", "sheet.png", "file.csv"}
    assert json.loads((folder / "summary.json").read_text()) == {"counts": {"benign": 3}}
    assert Image.open(folder / "sheet.png").getpixel((0, 0)) == 9


def test_runs_opened_inside_a_run_are_nested_under_it(store: Path) -> None:
    with tracking.track("demo") as parent:
        with tracking.track("train") as first:
            pass
        with tracking.track("curate") as second:
            pass
    with tracking.track("query") as alone:
        pass
    tags = {r.run_id: client(store).get_run(r.run_id).data.tags for r in (first, second, alone)}
    assert tags[first.run_id]["mlflow.parentRunId"] == parent.run_id
    assert tags[second.run_id]["mlflow.parentRunId"] == parent.run_id
    assert "mlflow.parentRunId" not in tags[alone.run_id]


def test_a_failure_marks_the_run_and_its_parent_failed_and_keeps_the_error(store: Path) -> None:
    with (
        pytest.raises(ValueError, match="no such label"),
        tracking.track("demo") as parent,
        tracking.track("train") as child,
    ):
        child.metrics({"loss": 1.0}, step=3)
        raise ValueError("no such label at https://me:hunter2@host/x")
    for run in (parent, child):
        recorded = client(store).get_run(run.run_id)
        assert recorded.info.status == "FAILED"
        assert recorded.data.tags["error"] == f"ValueError: no such label at https://{REDACTED}@host/x"
    text = (store / "runs/artifacts" / child.run_id / "artifacts/error.txt").read_text()
    assert "Traceback" in text and "hunter2" not in text
    assert client(store).get_metric_history(child.run_id, "loss")[0].step == 3


@pytest.mark.parametrize(
    ("raised", "status"),
    [(KeyboardInterrupt(), "KILLED"), (SystemExit(2), "FAILED"), (SystemExit(0), "FINISHED")],
)
def test_leaving_early_never_leaves_a_run_open(store: Path, raised: BaseException, status: str) -> None:
    with pytest.raises(type(raised)), tracking.track("synthesize") as run:
        raise raised
    assert client(store).get_run(run.run_id).info.status == status


def test_bad_parameters_fail_the_run_rather_than_leave_it_open(store: Path) -> None:
    with pytest.raises(ValueError, match="real needs a uri"), tracking.track("train", inputs={"real": "@3"}):
        pytest.fail("the body must not run")
    last = client(store).search_runs(
        [client(store).get_experiment_by_name(tracking.EXPERIMENT).experiment_id]
    )[0]
    assert last.info.status == "FAILED"


def test_inputs_name_the_table_its_version_and_digest(store: Path) -> None:
    inputs = {
        "real": "data/real.lance@7",
        "synthetic": {"uri": "s3://k:s@b/s.lance", "digest": "abc", "rows": 3},
    }
    with tracking.track("curate", inputs=inputs) as run:
        pass
    recorded = client(store).get_run(run.run_id).inputs.dataset_inputs
    by_name = {item.dataset.name: item for item in recorded}
    assert json.loads(by_name["real"].dataset.source) == {"uri": "data/real.lance", "version": "7"}
    assert {t.key: t.value for t in by_name["real"].tags} == {
        "mlflow.data.context": "real",
        "factory.version": "7",
    }
    assert by_name["synthetic"].dataset.digest == "abc"
    assert json.loads(by_name["synthetic"].dataset.source)["uri"] == f"s3://{REDACTED}@b/s.lance"


def test_a_generator_is_a_registered_model_whose_versions_count_up(store: Path) -> None:
    (store / "generator").mkdir(exist_ok=True)
    with tracking.track("train") as run:
        assert run.register_generator(store / "generator", "tiny", {"digest": "d1"}) == ("tiny", "1")
        assert run.register_generator(store / "generator", "tiny", {"digest": "d2"}) == ("tiny", "2")
        with pytest.raises(FileNotFoundError, match="missing"):
            run.register_generator(store / "missing", "tiny")
        with pytest.raises(ValueError, match="a/b"):
            run.register_generator(store / "generator", "a/b")
    version = client(store).get_model_version("tiny", "2")
    assert version.source == (store / "generator").as_uri()
    assert version.run_id == run.run_id
    assert version.tags == {"digest": "d2"}


def test_secrets_are_redacted_and_long_values_cut_with_a_note(store: Path) -> None:
    parameters = {
        "hf_token": "abc",
        "tokenizer": "clip",
        "uri": "postgresql://u:p@db/x",
        "prompts": "x" * 9000,
    }
    with tracking.track("train", execution_parameters=parameters) as run:
        pass
    recorded = client(store).get_run(run.run_id).data.params
    assert recorded["execution.hf_token"] == REDACTED
    assert recorded["execution.tokenizer"] == "clip"
    assert recorded["execution.uri"] == f"postgresql://{REDACTED}@db/x"
    assert len(recorded["execution.prompts"]) == 6000
    assert recorded["execution.prompts"].endswith("9000 characters in all]")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("token=abc123 steps=3", f"token={REDACTED} steps=3"),
        ("--hf-token abc123 --steps 3", f"--hf-token {REDACTED} --steps 3"),
        ('{"password": "abc123"}', f'{{"password": "{REDACTED}"}}'),
        ("https://h/x?X-Amz-Signature=abc123&y=1", f"https://h/x?X-Amz-Signature={REDACTED}&y=1"),
        ("AWS_SECRET_ACCESS_KEY=abc123", f"AWS_SECRET_ACCESS_KEY={REDACTED}"),
        ("hf_" + "a" * 30, REDACTED),
        ("sigma=0.5 num_tokens=77 tokenizer: clip", "sigma=0.5 num_tokens=77 tokenizer: clip"),
        ("s3://bucket/real.lance@7", "s3://bucket/real.lance@7"),
    ],
)
def test_redact_takes_credentials_and_leaves_the_rest(text: str, kept: str) -> None:
    assert redact(text) == kept


def test_secret_names_are_whole_words() -> None:
    assert all(map(is_secret_name, ["hf_token", "apiKey", "PASSWORD", "aws.secret", "api-key"]))
    assert not any(map(is_secret_name, ["tokenizer", "num_tokens", "keypoints", "monkey", "secretion"]))


def test_secrets_nested_in_sequences_are_redacted() -> None:
    assert flatten({"stores": [{"uri": "x", "password": "y"}]}) == {
        "stores": json.dumps([{"uri": "x", "password": REDACTED}])
    }


def test_runs_that_a_killed_process_left_open_are_closed_by_the_next_one(store: Path) -> None:
    script = (
        "import os, signal\nfrom factory.tracking import track\n"
        "with track('synthesize') as run:\n    print(run.run_id, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(Path(tracking.__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    run_id = killed.stdout.strip()
    assert killed.returncode == -9
    assert killed.stderr == "", "opening the store must not chatter"
    assert client(store).get_run(run_id).info.status == "RUNNING"
    run_module._stores.clear()
    with tracking.track("synthesize"):
        pass
    assert client(store).get_run(run_id).info.status == "KILLED"


def test_a_database_that_is_away_keeps_metrics_until_it_is_back(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "RETRY_SECONDS", 0.0)
    database = store / "runs/mlflow.db"
    with tracking.track("train") as run:
        client(store).get_run(run.run_id)
        moved = database.rename(store / "away.db")
        with caplog.at_level(logging.WARNING):
            run.metrics({"loss": 0.25} | {f"m{i}": 0.0 for i in range(300)}, step=1)
        assert "wait for the MLflow store" in caplog.text
        database.unlink(missing_ok=True)
        moved.rename(database)
    assert client(store).get_run(run.run_id).data.metrics["loss"] == 0.25
    assert not list((store / "runs/mlflow-outbox").glob("*"))


def test_a_wrong_address_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with pytest.raises(ValueError, match="sqlite:///"), tracking.track("train"):
        pytest.fail("the body must not run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://no-such-host.invalid:5000")
    with pytest.raises(ValueError, match="there is no host 'no-such-host.invalid'"):
        tracking.check_store()
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers everything with 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            BaseHTTPRequestHandler, "do_GET", lambda self: self.send_error(404), raising=False
        )
        monkeypatch.setattr(
            BaseHTTPRequestHandler, "do_POST", lambda self: self.send_error(404), raising=False
        )
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ValueError, match="no MLflow server"), tracking.track("train"):
            pytest.fail("the body must not run")
        server.shutdown()


def test_the_environment_chooses_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(tracking.StoreAway, match="nothing answers at 127.0.0.1:9"):
        tracking.check_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other/store.db")
    assert tracking.check_store() == f"sqlite:///{tmp_path}/other/store.db"
    assert (tmp_path / "other").is_dir()


class MlflowServer:
    """A real `mlflow server` on loopback that can be started late, killed, and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self._folder}/server.db",
            "--artifacts-destination", str(self._folder / "kept"), "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1",
        ]  # fmt: skip
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("the MLflow server did not start")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_module, "RETRY_SECONDS", 0.0)
    server = MlflowServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


@pytest.mark.soak
def test_a_server_that_is_started_late_and_dies_for_a_while_loses_nothing(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "generator").mkdir()
    (tmp_path / "generator" / "weights.bin").write_text("w")
    outbox = tmp_path / "runs/mlflow-outbox"
    with tracking.track("demo") as parent, tracking.track("train", execution_parameters={"n": 2}) as run:
        assert (parent.run_id, run.run_id) == ("pending", "pending")
        assert "wait for the MLflow store" in caplog.text
        run.inputs({"real": "real.lance@7"})
        run.artifact("notes/summary.txt", "hello")
        assert run.register_generator(tmp_path / "generator", "tiny") == ("tiny", "pending")
        server.start()
        run.set({"recipe": "tiny"})
        assert len(run.run_id) == 32 and not list(outbox.glob("*")), "all was sent when the server came"
        server.kill()
        for step in range(400):
            run.metrics({"loss": 1.0 / (step + 1)}, step=step)
        assert len(list(outbox.glob("*.jsonl"))) == 1
    assert len(list(outbox.glob("*.jsonl"))) == 2, "the ends of both runs wait, too"
    server.start()
    with tracking.track("query"):
        pass
    assert not list(outbox.glob("*")), "the next verb sends what is left"
    client = MlflowClient(server.uri)
    recorded = client.get_run(run.run_id)
    assert recorded.info.status == client.get_run(parent.run_id).info.status == "FINISHED"
    assert recorded.data.tags["mlflow.parentRunId"] == parent.run_id
    assert recorded.data.params["execution.n"] == "2" and recorded.data.tags["recipe"] == "tiny"
    assert [m.step for m in client.get_metric_history(run.run_id, "loss")] == list(range(400))
    assert recorded.inputs.dataset_inputs[0].dataset.name == "real"
    assert client.get_model_version("tiny", "1").run_id == run.run_id
    assert [f.path for f in client.list_artifacts(run.run_id, "notes")] == ["notes/summary.txt"]
    runs = client.search_runs([recorded.info.experiment_id])
    assert len(runs) == 3, "no run was made twice"


def test_a_run_that_never_reaches_the_server_is_left_to_a_later_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(ValueError, match="no such label"), tracking.track("train") as run:
        run.metrics({"loss": 0.5}, step=1)
        raise ValueError("no such label")
    (kept,) = (tmp_path / "runs/mlflow-outbox").glob("*.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert "hunter2" not in kept.read_text()
    assert [line["op"] for line in lines[1:]] == ["create", "tags", "artifact", "metrics", "end"]
    assert lines[-1]["status"] == "FAILED"
    (found,) = list(outbox_module.leftovers("http://me:hunter2@127.0.0.1:9"))
    assert len(found[0]) == len(lines) - 1 and found[1] is None
    assert not list(outbox_module.leftovers("http://me:hunter2@127.0.0.1:9")), "one process at a time"
    found[0].close()
    assert not list(outbox_module.leftovers("http://elsewhere:5000")), "another store's"


def test_importing_the_module_leaves_mlflow_out() -> None:
    script = "import sys, factory.tracking; sys.exit('mlflow' in sys.modules)"
    root = str(Path(tracking.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": root}).returncode == 0
