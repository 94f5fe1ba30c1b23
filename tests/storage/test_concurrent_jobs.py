"""Several jobs and one table: other plans side by side, the same plan never twice."""

import os
import subprocess
import sys
from pathlib import Path

from crash_job import run_job
from storage_rows import plan_of
from test_kills import JOB

from factory.storage import Committer, open_table

NUM_REQUESTS = 60


def start(uri: str, run_id: str, seed: int) -> subprocess.Popen:
    command = [sys.executable, str(JOB), uri, str(NUM_REQUESTS), run_id, "", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(JOB.parents[2])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_jobs_of_other_plans_write_at_once_and_no_commit_is_lost(tmp_path: Path) -> None:
    uri = str(tmp_path / "synthetic.lance")
    jobs = [start(uri, f"run{seed}", seed) for seed in range(3)]
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        assert f"requested {NUM_REQUESTS} = committed {NUM_REQUESTS} " in out
    rows = open_table(uri).read(["plan_id", "request_index", "request_id"])
    assert rows.num_rows == 3 * NUM_REQUESTS
    for seed in range(3):
        plan = plan_of(seed)
        ids = sorted(
            request_id
            for request_id, plan_id in zip(rows["request_id"].to_pylist(), rows["plan_id"].to_pylist())
            if plan_id == plan.plan_id
        )
        assert ids == sorted(plan.request_at(index).request_id for index in range(NUM_REQUESTS))


def test_a_second_job_of_the_same_plan_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    uri = str(tmp_path / "synthetic.lance")
    run_job(uri, 2, "zeroth")
    with Committer(uri, plan_id=plan_of().plan_id, run_id="first"):
        second = start(uri, "second", seed=0)
        _, err = second.communicate(timeout=60)
        assert second.returncode != 0
        assert "LeaseHeld" in err and f"process {os.getpid()} on" in err and "run first" in err
    assert run_job(uri, NUM_REQUESTS, "third").startswith(
        f"requested {NUM_REQUESTS} = committed {NUM_REQUESTS} "
    )
