"""`factory status`: done, running, dead, and with quarantined requests."""

import datetime
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "storage"))
from storage_rows import LABELS, plan_of, synthetic_rows, synthetic_table

from factory.storage import Committer, QuarantineLog, open_table, write_fragment
from jobs.cli import main
from jobs.observing import Stage, StageState, StreamObserver
from jobs.stream_log import duration, last_report, log_file

PLAN = plan_of()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """10 of 16 requests committed, two more written and not committed, one quarantined."""
    table = synthetic_table(tmp_path)
    record = {
        "recipe": "tiny", "fingerprint": PLAN.fingerprint, "weights": dict(PLAN.weights),
        "real_digest": PLAN.real_digest, "seed": PLAN.seed, "labels": list(LABELS),
    }  # fmt: skip
    asked = {"benign": 8, "malignant": 8}
    table.set_metadata(
        {f"plan.{PLAN.plan_id}": json.dumps(record), f"requested.{PLAN.plan_id}": json.dumps(asked)}
    )
    with Committer(table.uri, plan_id=PLAN.plan_id, run_id="run") as committer:
        committer.add(write_fragment(table.uri, synthetic_rows(PLAN, np.arange(10)), run_id="run"))
        committer.commit()
    write_fragment(table.uri, synthetic_rows(PLAN, [10, 11]), run_id="killed")
    request = PLAN.request_at(15)
    QuarantineLog(table.uri, PLAN.plan_id).add(
        request.request_id, 15, "not_finite", "values that are not finite", 1
    )
    return table.uri


def test_what_a_dead_job_left_is_told(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    version = open_table(uri).version
    assert main(["status", uri]) == 1
    out = capsys.readouterr().out
    assert f"plan {PLAN.plan_id}: recipe tiny, seed 0, 69% done" in out
    assert "requested 16 = committed 10 (accepted 8 + rejected 2: blank_image 2)" in out
    assert (
        "quarantined 1: not_finite 1 + pending 5" in out and "not_finite: values that are not finite" in out
    )
    assert "1 written fragments will be adopted" in out and "nobody works on it" in out
    assert open_table(uri).version == version, "looking changes nothing"


def test_a_running_job_is_named_and_not_disturbed(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Committer(uri, plan_id=PLAN.plan_id, run_id="busy") as committer:
        assert main(["status", uri]) == 1
        out = capsys.readouterr().out
        assert "being written by process" in out and "run busy" in out and "wait for the committer" in out
        committer.adopt()
        missing = committer.missing(np.arange(16)).to_array()
        assert missing.tolist() == [12, 13, 14]
        committer.add(write_fragment(uri, synthetic_rows(PLAN, missing), run_id="busy"))
        committer.commit()
    assert main(["status", uri]) == 0
    out = capsys.readouterr().out
    assert "100% done" in out and "pending 0" in out and "being written" not in out


def test_tables_without_plans_and_other_tables(
    tmp_path: Path, real_table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", synthetic_table(tmp_path).uri]) == 0
    assert "no plan yet" in capsys.readouterr().out
    assert main(["status", real_table]) == 2
    assert "not a synthetic table" in capsys.readouterr().err


def observed(uri: str, run_id: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a run that reported after 60 s and again after 120 s, by when `rows` were made."""
    clock = [time.perf_counter()]
    stages = (Stage(name="requests", operator="R"), Stage(name="synthesizer", operator="S", num_workers=1))
    log = log_file(uri, PLAN.plan_id, run_id)
    assert log is not None
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock[0])
        observer = StreamObserver("synthesize", 16, stages, log=log, prometheus=False)
        for made, busy in ((rows // 2, 60.0), (rows, 90.0)):
            clock[0] += 60
            observer.add(rows // 2, {"blank_image": 1})
            assert observer.observe(
                {"synthesizer": StageState(rows=made, busy_seconds=busy, queued=3, running=1)}
            )
    return log


def test_the_last_report_of_a_dead_or_running_job_is_shown_with_its_age(
    uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = observed(uri, "dead", 12, monkeypatch)
    with log.open("a") as stream:
        stream.write(
            '{"time": "2026-01-01T00:00:00+00:00", "job": "synthesize", "stage": "requ'
        )  # killed here
    assert main(["status", uri]) == 1
    out = capsys.readouterr().out
    assert "s ago, of run dead:" in out
    assert "whole stream: 12 of 16 rows, 0.10 rows/s, 40 s left then, blank_image 2" in out
    assert "synthesizer: 12 rows, 0.10 rows/s, busy 50%, 1 running, 3 queued" in out
    assert out.count("synthesizer:") == 1 and "requests: 0 rows" in out
    with Committer(uri, plan_id=PLAN.plan_id, run_id="busy") as committer:
        observed(uri, "busy", 2, monkeypatch)
        assert main(["status", uri]) == 1
        out = capsys.readouterr().out
        assert "of run busy:" in out and "2 of 16 rows" in out and "run dead" not in out
        committer.adopt()
        missing = committer.missing(np.arange(16)).to_array()
        committer.add(write_fragment(uri, synthetic_rows(PLAN, missing), run_id="busy"))
    assert main(["status", uri]) == 0
    assert "last report" not in capsys.readouterr().out, "nothing more is to be said of a plan that is done"


def test_a_report_is_aged_and_another_plan_or_an_unfinished_one_is_none(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert last_report(uri, PLAN.plan_id) is None and last_report("s3://b/t.lance", PLAN.plan_id) is None
    log = observed(uri, "run", 4, monkeypatch)
    report = last_report(uri, PLAN.plan_id)
    assert report is not None and last_report(uri, "another") is None
    later = report.time + datetime.timedelta(hours=3)
    assert next(report.lines(later)) == "last report 3.0 h ago, of run run:"
    log.write_text("\n".join(log.read_text().splitlines()[:2]))
    assert last_report(uri, PLAN.plan_id) is None, "the line of the whole stream is not there yet"
    assert [duration(s) for s in (-1, 89, 600, 7200, 300_000)] == ["0 s", "89 s", "10 min", "2.0 h", "3.5 d"]
