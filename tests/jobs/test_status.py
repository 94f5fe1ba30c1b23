"""`factory status`: done, running, dead, and with quarantined requests."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "storage"))
from storage_rows import LABELS, plan_of, synthetic_rows, synthetic_table

from factory.storage import Committer, QuarantineLog, open_table, write_fragment
from jobs.cli import main

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
