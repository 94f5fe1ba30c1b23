"""Tracking against a real sqlite store in a temporary folder."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from factory import tracking
from factory.redaction import REDACTED, flatten, is_secret_name, redact


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
    environment["PYTHONPATH"] = str(Path(tracking.__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    run_id = killed.stdout.strip()
    assert killed.returncode == -9
    assert killed.stderr == "", "opening the store must not chatter"
    assert client(store).get_run(run_id).info.status == "RUNNING"
    tracking._clients.clear()
    with tracking.track("synthesize"):
        pass
    assert client(store).get_run(run_id).info.status == "KILLED"


def test_an_unreachable_store_keeps_metrics_until_it_is_back(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = store / "runs/mlflow.db"
    with tracking.track("train") as run:
        run._client.get_run(run.run_id)
        moved = database.rename(store / "away.db")
        with caplog.at_level(logging.WARNING):
            run.metrics({"loss": 0.25} | {f"m{i}": 0.0 for i in range(300)}, step=1)
        assert "wait for the MLflow store" in caplog.text
        database.unlink(missing_ok=True)
        moved.rename(database)
    assert client(store).get_run(run.run_id).data.metrics["loss"] == 0.25


def test_the_environment_chooses_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="nothing answers at 127.0.0.1:9"), tracking.track("train"):
        pytest.fail("the body must not run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with pytest.raises(ValueError, match="sqlite:///"):
        tracking.check_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other/store.db")
    assert tracking.check_store() == f"sqlite:///{tmp_path}/other/store.db"
    assert (tmp_path / "other").is_dir()


def test_importing_the_module_leaves_mlflow_out() -> None:
    script = "import sys, factory.tracking; sys.exit('mlflow' in sys.modules)"
    root = str(Path(tracking.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": root}).returncode == 0
