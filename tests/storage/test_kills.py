"""Exactly once: whatever is killed, whenever, running again ends with exactly the planned requests.

FACTORY_KILL_RUNS sets how many seeded kills are tried (15 by default, 200 and more in the soak).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash_job import BOUNDARIES, run_job
from storage_rows import LABELS, plan_of

from factory.storage import open_table
from factory.storage.ledger import Ledger

JOB = Path(__file__).with_name("crash_job.py")
NUM_REQUESTS = 64
KILLS_PER_TABLE = 3
KILL_RUNS = int(os.environ.get("FACTORY_KILL_RUNS", "15"))
PLAN = plan_of()
WANTED = PLAN.indices({label: NUM_REQUESTS // len(LABELS) for label in LABELS})
PLANNED_IDS = sorted(PLAN.request_at(index).request_id for index in WANTED)


def start(uri, run_id, *boundary):
    command = [sys.executable, str(JOB), uri, str(NUM_REQUESTS), run_id, *boundary]
    environment = os.environ | {"PYTHONPATH": str(JOB.parents[2])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


def committed_images(uri):
    """Image of every committed request: random pixels, so a request made again has another."""
    if not Path(uri).exists():
        return {}
    rows = open_table(uri).read(["request_id", "image"])
    return dict(zip(rows["request_id"].to_pylist(), rows["image"].to_pylist(), strict=True))


def check_finished(uri, before):
    """Exactly the planned requests, none twice, those of `before` untouched."""
    rows = open_table(uri).read(["request_id", "request_index"])
    assert sorted(rows["request_id"].to_pylist()) == PLANNED_IDS
    assert sorted(rows["request_index"].to_pylist()) == WANTED.tolist()
    after = committed_images(uri)
    assert {name: after[name] for name in before} == before


@pytest.fixture(scope="module")
def job_seconds(tmp_path_factory):
    """How long the job takes here and now, from taking the lease to its last line; a list of one, so that it can follow
    a machine whose load changes."""
    job = start(str(tmp_path_factory.mktemp("whole") / "synthetic.lance"), "whole")
    assert job.stdout.readline() == "ready\n"
    begun = time.monotonic()
    job.wait()
    return [time.monotonic() - begun]


@pytest.fixture(scope="module")
def landed():
    """Kills that found the job still running; most must, or the moments say nothing."""
    counts = []
    yield counts
    assert 2 * sum(counts) >= len(counts), counts


@pytest.mark.parametrize("chain", range(-(-KILL_RUNS // KILLS_PER_TABLE)))
def test_killed_at_random_moments(tmp_path, chain, job_seconds, landed):
    uri, rng = str(tmp_path / "synthetic.lance"), random.Random(chain)
    before = {}
    for kill in range(KILLS_PER_TABLE):
        job = start(uri, f"run{kill}")
        assert job.stdout.readline() == "ready\n"
        # Later runs have less to do: what is left is adopted or committed.
        begun = time.monotonic()
        try:
            job.wait(rng.uniform(0, job_seconds[0] / (kill + 1)))
            job_seconds[0] = min(job_seconds[0], (kill + 1) * (time.monotonic() - begun))
            landed.append(False)
        except subprocess.TimeoutExpired:
            landed.append(True)
        job.send_signal(signal.SIGKILL)
        job.wait()
        after = committed_images(uri)
        assert {name: after[name] for name in before} == before
        before = after
    line = run_job(uri, NUM_REQUESTS, "last")
    assert line.startswith(f"requested {NUM_REQUESTS} = committed {NUM_REQUESTS} (accepted 48 + rejected 16")
    check_finished(uri, before)
    assert Ledger(uri, PLAN.plan_id).names("records") == []


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_killed_at_a_boundary(tmp_path, boundary):
    uri = str(tmp_path / "synthetic.lance")
    job = start(uri, "first", boundary)
    assert job.wait(60) == -signal.SIGKILL
    before = committed_images(uri)
    assert len(before) < NUM_REQUESTS
    run_job(uri, NUM_REQUESTS, "second")
    check_finished(uri, before)
