"""Things killed for real on a several-node Ray: what was asked for is there in the end, of the same content.

Every kind of fault once, in one accident, since most of the time goes into starting processes: a synthesis is submitted,
whose process dies every few batches and which is given too little memory; a training runs beside it; a node that works
for both is lost and replaced; when the training is done, the head is lost, and the same submission goes to a new one.
Each kind alone, elastic training, and many seeded runs are for `make soak`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from factory.training.checkpoints import checkpoint_steps
from factory.training.metrics import read_metrics
from tests.cluster.faults import (
    JOB_SECONDS,
    NUM_REQUESTS,
    FaultCluster,
    Kind,
    check_equal,
    committed,
    largest_area,
    quarantined_in,
    run_with_fault,
    synthesize_args,
)
from tests.cluster.local_head import LocalHead

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "training"))
MAX_STEPS = 100

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[Any]", log: Path) -> None:
    """Until `condition` holds; fails where the process ends before."""
    deadline = time.monotonic() + JOB_SECONDS
    while not condition():
        assert process.poll() is None, f"it ended before: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"too slow: {log.read_text()[-3000:]}"
        time.sleep(0.1)


def submit(head: LocalHead, folder: Path, argv: list[str], log: Path) -> "subprocess.Popen[Any]":
    """`factory submit` that takes a head for lost after three seconds of silence."""
    program = "import sys, jobs.job_server as j; j.LOST_SECONDS = 3.0; from jobs.cli import main; sys.exit(main(sys.argv[1:]))"
    variables = {
        "RAY_API_SERVER_ADDRESS": head.url,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-c", program, "submit", *argv], cwd=ROOT, env=head.environment() | variables,
            stdout=output, stderr=output,
        )  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class Aftermath:
    """What the accident left.

    Attributes:
        uri, log: table of the synthesis, and what its two submissions said.
        rows: committed when the node was lost, when the head was lost, and in the end.
        first_status, second_status: exit statuses of the submissions.
        deaths, greeds: processes that died as ordered, and batches for which memory was lacking.
        trained: folder of the training, and `first_lines` of its metrics from before the node was lost.
        at_fault: step of its last checkpoint then.
    """

    uri: str
    log: Path
    rows: tuple[int, int, int]
    first_status: int
    second_status: int
    deaths: int
    greeds: int
    trained: Path
    first_lines: list[dict[str, Any]]
    at_fault: int


@pytest.fixture(scope="module")
def aftermath(
    fault_cluster: FaultCluster,
    training: Path,
    reference: Mapping[str, Mapping[str, Any]],
    real_table: str,
    generator_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Aftermath:
    folder = tmp_path_factory.mktemp("accident")
    uri, log, trained, train_log = (
        str(folder / "out.lance"), folder / "submit.log", training / "replaced", training / "replaced.log",
    )  # fmt: skip
    synthesis = ["synthesize", *synthesize_args(real_table, str(generator_folder), uri)]
    orders = fault_cluster.orders
    orders.give({"die_every": 7, "largest_batch": 1, "largest_area": largest_area(reference) - 1, "limit": 6})
    head = fault_cluster.heal()
    first = second = trainer = None
    try:
        first = submit(head, folder, synthesis, log)
        fault_cluster.actors(first)  # its actors have their places: the training takes what is left
        words = [*train_args(training, "replaced", MAX_STEPS), "--num-workers", "2", "--cpus-per-worker", "3"]
        trainer = fault_cluster.start_verb("train", words, train_log)
        wait_for(lambda: max(checkpoint_steps(trained), default=0) >= 4, trainer, train_log)
        wait_for(lambda: committed(uri) >= 1 and orders.count("batch") > 6, first, log)
        first_lines, at_fault = read_metrics(trained)[:3], max(checkpoint_steps(trained))
        at_node = committed(uri)
        head.kill_node(fault_cluster.actors(first)[0][0])
        orders.change(limit=14)
        fault_cluster.heal()
        assert trainer.wait(timeout=JOB_SECONDS) == 0, train_log.read_text()[-4000:]
        wait_for(lambda: committed(uri) > at_node and orders.count("batch") > 14, first, log)
        head.kill()
        at_head = committed(uri)
        first_status = first.wait(120)
        orders.change(limit=10**6)
        with LocalHead(2, variables=fault_cluster.variables) as new:
            second = submit(new, folder, synthesis, log)
            second_status = second.wait(JOB_SECONDS)
    finally:
        for process in filter(None, (first, second, trainer)):
            process.kill()
            process.wait()
    return Aftermath(
        uri=uri, log=log, rows=(at_node, at_head, committed(uri)), first_status=first_status,
        second_status=second_status, deaths=orders.count("death"), greeds=orders.count("greed"), trained=trained,
        first_lines=first_lines, at_fault=at_fault,
    )  # fmt: skip


def test_every_planned_row_is_there_once_whatever_died(
    aftermath: Aftermath, reference: dict[str, dict[str, Any]]
) -> None:
    """A lost node, a process that dies every seven batches, too little memory, a lost head: equal to a run without."""
    assert aftermath.second_status == 0, aftermath.log.read_text()[-4000:]
    check_equal(aftermath.uri, reference, missing=1)
    at_node, at_head, end = aftermath.rows
    assert 0 < at_node < at_head < end == NUM_REQUESTS - 1, "rows came after each loss"
    assert aftermath.deaths >= 2


def test_what_needs_too_much_memory_is_halved_and_alone_quarantined(aftermath: Aftermath) -> None:
    assert aftermath.greeds >= NUM_REQUESTS // 4, "every pair was too much"
    assert quarantined_in(aftermath.uri) == {"out_of_memory": 1}


def test_a_lost_head_is_told_and_the_same_submission_goes_on(aftermath: Aftermath) -> None:
    said = aftermath.log.read_text()
    assert aftermath.first_status == 75 and "to go on: factory submit" in said
    assert f"{NUM_REQUESTS} requested" in said and "succeeded, exit status 0" in said


def test_a_node_lost_in_training_costs_the_steps_since_the_last_checkpoint(aftermath: Aftermath) -> None:
    check_training(aftermath.trained, aftermath.first_lines, aftermath.at_fault, MAX_STEPS)


def check_training(out: Path, first_lines: list[dict[str, Any]], at_fault: int, max_steps: int) -> None:
    """Every step once, the first ones not taken again, the last checkpoint and the generator there."""
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, max_steps + 1))
    assert at_fault < max_steps, "it struck before the end"
    assert read_metrics(out)[:3] == first_lines, (
        "the first steps were not taken again: their times are the same"
    )
    assert max(checkpoint_steps(out)) == max_steps and (out / "generator.json").is_file()


# ------------------------------------------------------------------------------------------ one kind at a time


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["node", "every_n_batches", "memory", "straggler"])
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


@pytest.mark.soak
def test_elastic_training_goes_on_with_the_workers_that_are_left(
    fault_cluster: FaultCluster, training: Path
) -> None:
    """Two workers on two nodes. One node dies and is not replaced."""
    max_steps, out, log = 150, training / "elastic", training / "elastic.log"
    head = fault_cluster.heal()
    workers = ["--num-workers", "2", "--min-workers", "1", "--cpus-per-worker", "3"]
    driver = fault_cluster.start_verb("train", [*train_args(training, "elastic", max_steps), *workers], log)
    try:
        wait_for(lambda: max(checkpoint_steps(out), default=0) >= 4, driver, log)
        before, at_fault = read_metrics(out)[:3], max(checkpoint_steps(out))
        head.kill_node(head.nodes[0])
        status = driver.wait(timeout=JOB_SECONDS)
    finally:
        driver.kill()
        driver.wait()
    assert status == 0, log.read_text()[-4000:]
    check_training(out, before, at_fault, max_steps)
