"""Things killed for real on a several-node Ray: what was asked for is there in the end, of the same content."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory.training.metrics import read_metrics
from tests.cluster.faults import (
    JOB_SECONDS,
    NUM_REQUESTS,
    FaultCluster,
    Kind,
    check_equal,
    committed,
    run_with_fault,
    synthesize_args,
)
from tests.cluster.local_head import LocalHead

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "training"))

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[Any]", log: Path) -> None:
    """Until `condition` holds; fails where the process ends before."""
    deadline = time.monotonic() + JOB_SECONDS
    while not condition():
        assert process.poll() is None, f"it ended before: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"too slow: {log.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["node", "every_n_batches", "memory"])
def test_exactly_the_planned_rows(
    kind: Kind,
    fault_cluster: FaultCluster,
    reference: dict[str, dict[str, Any]],
    real_table: str,
    generator_folder: Path,
) -> None:
    outcome = run_with_fault(
        fault_cluster,
        kind,
        after_rows=4,
        seed=0,
        real=real_table,
        generator=str(generator_folder),
        reference=reference,
    )
    assert outcome.rows == NUM_REQUESTS - sum(outcome.quarantined.values())
    assert outcome.rows_at_fault < outcome.rows, "it struck before the end"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small base and real table whose latents are cached already."""
    from real_table import make_rows, write_base, write_real

    from jobs.train import command

    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base")
    write_real(folder / "real.lance", make_rows())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        assert command([*train_args(folder, "warm", 1), "--num-workers", "0"]) == 0
    return folder


def train_args(folder: Path, out: str, max_steps: int) -> list[str]:
    return [
        "--recipe", "tiny", "--real", str(folder / "real.lance"), "--out", str(folder / out), "--no-use-gpu",
        "--max-steps", str(max_steps), "--generator.base", str(folder / "base"), "--generator.resolution", "64",
        "--training.batch-size", "4", "--training.log-every", "1", "--training.checkpoint-every", "2",
        "--training.sample-every", "0", "--training.validate-every", "0", "--training.warmup-steps", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("elastic", [False, True], ids=["replaced", "elastic"])
def test_a_node_killed_during_training_costs_the_steps_since_the_last_checkpoint(
    elastic: bool, fault_cluster: FaultCluster, training: Path
) -> None:
    """Two workers on two nodes. One node dies; with its replacement, or with the other alone, training goes on."""
    from factory.training.checkpoints import checkpoint_steps

    max_steps = 150
    name = "elastic" if elastic else "replaced"
    out, log = training / name, training / f"{name}.log"
    head = fault_cluster.heal()
    workers = ["--num-workers", "2", "--cpus-per-worker", str(2)]
    if elastic:
        workers += ["--min-workers", "1"]
    driver = fault_cluster.start_verb("train", [*train_args(training, name, max_steps), *workers], log)
    try:
        wait_for(lambda: max(checkpoint_steps(out), default=0) >= 4, driver, log)
        before = read_metrics(out)[:3]
        head.kill_node(head.nodes[0])
        at_fault = max(checkpoint_steps(out))
        if not elastic:
            fault_cluster.heal()
        status = driver.wait(timeout=JOB_SECONDS)
    finally:
        driver.kill()
        driver.wait()
    assert status == 0, log.read_text()[-4000:]
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, max_steps + 1))
    assert at_fault < max_steps, "it struck before the end"
    assert read_metrics(out)[:3] == before, "the first steps were not taken again: their times are the same"
    assert max(checkpoint_steps(out)) == max_steps and (out / "generator.json").is_file()


def test_a_lost_head_and_the_same_submission_again(
    tmp_path: Path, reference: dict[str, dict[str, Any]], real_table: str, generator_folder: Path
) -> None:
    """The head of a submitted job is killed. The submission says so with status 75; to a new head, it goes on."""
    uri, log = str(tmp_path / "out.lance"), tmp_path / "submit.log"
    argv = ["submit", "synthesize", *synthesize_args(real_table, str(generator_folder), uri)]
    program = "import sys, jobs.job_server as j; j.LOST_SECONDS = 3.0; from jobs.cli import main; sys.exit(main(sys.argv[1:]))"
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}

    def submit(head: LocalHead) -> "subprocess.Popen[Any]":
        env = head.environment() | {"RAY_API_SERVER_ADDRESS": head.url}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-c", program, *argv], cwd=ROOT, env=env, stdout=output, stderr=output
            )

    with LocalHead(variables=variables) as head:
        first = submit(head)
        wait_for(lambda: committed(uri) >= 2, first, log)
        head.kill()
        kept = committed(uri)
        assert first.wait(120) == 75 and "to go on: factory submit" in log.read_text()
    assert 0 < kept < NUM_REQUESTS
    with LocalHead(variables=variables) as head:
        assert submit(head).wait(JOB_SECONDS) == 0, log.read_text()[-4000:]
    check_equal(uri, reference)
