"""Leases: held by one process, gone with it, never taken from one that lives."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import lance
import pytest
from storage_rows import plan_of, synthetic_table

from factory.storage.lease import ConfigLease, LeaseHeld, LeaseLost, take_lease
from factory.storage.process import ProcessIdentity, this_process

PLAN = plan_of().plan_id
HOLD = """
import sys, time
sys.path[:0] = [{root!r}]
from factory.storage.lease import take_lease
lease = take_lease({uri!r}, {plan!r}, run_id="other-run", kind={kind!r})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def uri(tmp_path):
    return synthetic_table(tmp_path).uri


@pytest.fixture
def hold(uri, pytestconfig):
    """Start processes that hold the lease; they are killed at the end."""
    started = []

    def start(kind):
        code = HOLD.format(root=str(pytestconfig.rootpath), uri=uri, plan=PLAN, kind=kind)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["file", "config"])
def test_the_lease_of_another_process_is_refused_until_that_is_killed(uri, hold, kind):
    process = hold(kind)
    with pytest.raises(LeaseHeld) as caught:
        take_lease(uri, PLAN, run_id="mine", kind=kind)
    assert f"process {process.pid} on {os.uname().nodename}" in str(caught.value)
    assert "run other-run" in str(caught.value) and f"plan {PLAN}" in str(caught.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lease = take_lease(uri, PLAN, run_id="mine", kind=kind)
    lease.check()
    lease.release()


@pytest.mark.parametrize("kind", ["file", "config"])
def test_a_released_lease_can_be_taken_and_not_used(uri, kind):
    first = take_lease(uri, PLAN, run_id="first", kind=kind)
    with pytest.raises(LeaseHeld, match="run first"):
        take_lease(uri, PLAN, run_id="second", kind=kind)
    take_lease(uri, "another plan", run_id="second", kind=kind).release()
    first.release()
    first.release()
    second = take_lease(uri, PLAN, run_id="second", kind=kind)
    with pytest.raises(LeaseLost):
        first.check()
    second.check()
    second.release()


def rewritten(uri, **changes):
    """Change what the config key says about its holder."""
    key = f"lease.{PLAN}"
    stored = json.loads(lance.dataset(uri).config()[key])
    lance.dataset(uri).update_config({key: json.dumps(stored | changes)})


def test_a_config_lease_from_another_machine_is_taken_over_only_when_it_was_not_renewed(uri):
    first = ConfigLease(uri, PLAN, run_id="first", seconds_to_live=30)
    elsewhere = dataclasses.asdict(dataclasses.replace(this_process(), host="node7", machine="another boot"))
    rewritten(uri, process=elsewhere)
    with pytest.raises(LeaseHeld, match="on node7"):
        ConfigLease(uri, PLAN, run_id="second", seconds_to_live=30)
    rewritten(uri, renewed=time.time() - 31)
    second = ConfigLease(uri, PLAN, run_id="second", seconds_to_live=30)
    with pytest.raises(LeaseLost, match="now held by process"):
        first.check()
    second.check()
    first.release()
    second.check()  # the first did not remove what is not its own


def test_a_config_lease_is_renewed_while_it_is_used(uri):
    lease = ConfigLease(uri, PLAN, run_id="first", seconds_to_live=30)
    rewritten(uri, renewed=time.time() - 20)
    lease.check()
    assert json.loads(lance.dataset(uri).config()[f"lease.{PLAN}"])["renewed"] > time.time() - 5
    version = lance.dataset(uri).version
    lease.check()
    assert lance.dataset(uri).version == version  # a check that renews nothing writes nothing


def test_of_two_that_saw_no_holder_one_gets_the_config_lease(uri, monkeypatch):
    stale = lance.dataset(uri)
    ConfigLease(uri, PLAN, run_id="first")
    opened = iter([stale])
    original = ConfigLease._open
    monkeypatch.setattr(ConfigLease, "_open", lambda self: next(opened, None) or original(self))
    with pytest.raises(LeaseHeld, match="run first"):
        ConfigLease(uri, PLAN, run_id="second")


def test_a_process_is_known_dead_only_where_its_pid_means_something():
    me = this_process()
    assert me.is_same_process(ProcessIdentity.from_dict(me.to_dict()))
    assert not me.is_known_dead()
    assert dataclasses.replace(me, clock=me.clock + 1).is_known_dead()  # the pid is used by another process
    assert not dataclasses.replace(me, pid=2**22 + 1, machine="elsewhere").is_known_dead()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert dataclasses.replace(me, pid=child.pid, clock=1).is_known_dead()
