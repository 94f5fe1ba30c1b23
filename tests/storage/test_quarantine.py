"""Quarantine and intents: which request kills its process, found by real deaths."""

import subprocess
import sys

import pytest
from storage_rows import plan_of, synthetic_table

from factory.storage import IntentLog, QuarantineLog
from factory.storage.ledger import Ledger

PLAN = plan_of().plan_id
WORK = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from factory.storage import IntentLog
intents = IntentLog({uri!r}, {plan!r}, max_tries=2)
for group in intents.begin({batch!r}):
    if set(group) & set({deadly!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    print(",".join(group), flush=True)
    intents.finish(group)
"""


@pytest.fixture
def uri(tmp_path):
    return synthetic_table(tmp_path).uri


@pytest.fixture
def work(uri, pytestconfig):
    """Make `batch` in a process of its own that dies at one of `deadly`; the groups that were made."""

    def run(batch, deadly=()):
        root = str(pytestconfig.rootpath)
        code = WORK.format(root=root, uri=uri, plan=PLAN, batch=list(batch), deadly=list(deadly))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, -9), done.stderr
        return done.stdout.split()

    return run


def left_over(uri):
    ledger = Ledger(uri, PLAN)
    return ledger.names("intents"), ledger.names("suspects")


def test_a_deadly_request_is_found_and_only_its_lone_deaths_count(uri, work):
    log = IntentLog(uri, PLAN, max_tries=2)
    assert work("abcd", "c") == []  # all four were running
    assert [log.tries(i) for i in "abcd"] == [0, 0, 0, 0]
    assert work("abcd", "c") == ["a", "b"]  # one at a time now; c dies alone
    assert [log.tries(i) for i in "abcd"] == [0, 0, 1, 0]
    assert not log.exhausted("c")
    assert work("cdab", "c") == []  # suspects first
    assert log.exhausted("c") and not log.exhausted("d")
    assert work("abcd", "c") == ["d", "a,b"]  # c does not come again


def test_an_exhausted_request_does_not_come_again(uri, work):
    for _ in range(2):
        work("a", "a")
    assert IntentLog(uri, PLAN, max_tries=1).begin(["a", "b"]) == [["b"]]
    assert IntentLog(uri, PLAN, max_tries=3).tries("a") == 2


def test_requests_that_were_not_running_are_not_suspected(uri, work):
    work("ab", "b")
    assert work("ab", "a") == []  # a dies alone, b had not begun
    log = IntentLog(uri, PLAN)
    assert (log.tries("a"), log.tries("b")) == (1, 0)
    assert log.begin(["c", "b", "d"]) == [["b"], ["c", "d"]]  # b is a suspect still; c and d are not


def test_finished_work_leaves_nothing_behind(uri, work):
    assert work("abc", "b") == []
    assert work("abc") == ["a", "b", "c"]
    assert left_over(uri) == ([], [])
    assert IntentLog(uri, PLAN).begin(list("abc")) == [list("abc")]


def test_an_exception_is_not_a_death(uri):
    log = IntentLog(uri, PLAN)
    assert log.begin(["a", "b"]) == [["a", "b"]]
    assert log.begin(["a", "b"]) == [["a", "b"]]  # tried again by the process that lives
    log.finish(["a", "b"])
    assert left_over(uri) == ([], [])
    assert log.tries("a") == 0


def test_a_partly_finished_batch_blames_only_what_was_left(uri, pytestconfig):
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(pytestconfig.rootpath)!r}]
from factory.storage import IntentLog
intents = IntentLog({uri!r}, {PLAN!r})
intents.begin(["a", "b", "c"])
intents.finish(["a"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60)
    log = IntentLog(uri, PLAN)
    assert log.begin(["a", "b", "c"]) == [["b"], ["c"], ["a"]]
    assert [log.tries(i) for i in "abc"] == [0, 0, 0]


def test_quarantined_requests_are_listed_once_in_order(uri):
    log = QuarantineLog(uri, PLAN)
    log.add("id7", 7, "not_finite", "nan in latents", 1)
    log.add("id3", 3, "process_died", "killed", 3)
    log.add("id7", 7, "out_of_memory", "x" * 9000, 2)
    assert [(e.request_id, e.reason, e.tries) for e in log.entries()] == [
        ("id3", "process_died", 3),
        ("id7", "out_of_memory", 2),
    ]
    assert log.indices().tolist() == [3, 7]
    assert len(log.entries()[1].error) == 4000
    log.remove("id3")
    assert QuarantineLog(uri, PLAN).indices().tolist() == [7]
    assert QuarantineLog(uri, plan_of(1).plan_id).entries() == []
    with pytest.raises(ValueError, match="reason 'bad luck' is none of source_failed"):
        log.add("id1", 1, "bad luck", "", 1)
