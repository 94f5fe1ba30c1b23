"""The committer: what is committed, adopted, dropped and refused; reconciliation."""

import threading

import lance
import numpy as np
import pyarrow as pa
import pytest
from storage_rows import plan_of, synthetic_rows, synthetic_table

from factory.storage import (
    Committer,
    DuplicateRequests,
    LeaseHeld,
    LeaseLost,
    QuarantineLog,
    open_table,
    write_fragment,
)
from factory.storage.ledger import Ledger
from factory.storage.reconciliation import Reconciliation, check_distinct, hash_strings
from factory.storage.writer import write_record
from schemas.request import ATTEMPT_SHIFT

PLAN = plan_of()


@pytest.fixture
def uri(tmp_path):
    return synthetic_table(tmp_path).uri


def committer(uri, run_id="run", plan=PLAN, **settings):
    return Committer(uri, plan_id=plan.plan_id, run_id=run_id, **settings)


def write(uri, indices, run_id="run", plan=PLAN):
    return write_fragment(uri, synthetic_rows(plan, indices), run_id=run_id)


def indices_in(uri, plan=PLAN):
    return sorted(
        open_table(uri).read(["request_index"], f"plan_id = '{plan.plan_id}'")["request_index"].to_pylist()
    )


def data_file(uri, record, tmp_path):
    return tmp_path / uri / "data" / record.fragment["files"][0]["path"]


def test_a_commit_makes_rows_visible_and_removes_their_records(uri):
    with committer(uri) as c:
        c.add(write(uri, [0, 1]))
        c.add(write(uri, [5]))
        assert (open_table(uri).count(), c.waiting_rows) == (0, 3)
        assert c.commit() == 3
        assert (c.commit(), c.waiting_rows, c.committed_rows) == (0, 0, 3)
    assert indices_in(uri) == [0, 1, 5]
    assert Ledger(uri, PLAN.plan_id).names("records") == []


def test_leaving_normally_commits_and_leaving_by_an_error_leaves_it_to_the_next_run(uri):
    with committer(uri) as c:
        c.add(write(uri, [0]))
    with pytest.raises(RuntimeError, match="the job failed"), committer(uri) as c:
        c.add(write(uri, [1]))
        raise RuntimeError("the job failed")
    assert indices_in(uri) == [0]
    with committer(uri) as c:
        assert c.adopt() == 1
        assert c.missing(np.arange(4)).to_array().tolist() == [2, 3]
    assert indices_in(uri) == [0, 1]


def test_commits_come_by_rows(uri):
    with committer(uri, rows_per_commit=4) as c:
        versions = []
        for index in range(6):
            c.add(write(uri, [index]))
            versions.append(open_table(uri).count())
        assert versions == [0, 0, 0, 4, 4, 4]


def test_commits_come_by_seconds(uri):
    with committer(uri, rows_per_commit=1000, seconds_per_commit=0.0) as c:
        c.add(write(uri, [0]))
        assert open_table(uri).count() == 1


def test_a_task_that_ran_twice_counts_once(uri):
    with committer(uri) as c:
        first, second = write(uri, [0, 1]), write(uri, [0, 1])
        assert (c.add(first), c.add(second)) == (True, False)
        c.commit()
        assert Ledger(uri, PLAN.plan_id).names("records") == []
        assert c.add(write(uri, [1, 0])) is False
        assert c.add(write(uri, [2, 1])) is False  # batched otherwise: 2 stays missing
        assert c.missing(np.arange(3)).to_array().tolist() == [2]
        assert [item.reason for item in c.dropped] == [
            "some of its requests are committed or waiting already"
        ] * 3
    assert indices_in(uri) == [0, 1]


def test_a_record_is_adopted_only_if_none_of_its_ids_is_committed(uri):
    with committer(uri) as c:
        c.add(write(uri, [0, 1]))
    write(uri, [1, 2], "died")
    write(uri, [3, 4], "died")
    write(uri, [4, 5], "died-too")
    with committer(uri) as c:
        assert c.adopt() == 2
        assert sorted(item.reason for item in c.dropped) == [
            "another record holds some of its requests",
            "some of its requests are committed already",
        ]
        missing = c.missing(np.arange(6)).to_array().tolist()
    adopted = indices_in(uri)
    assert (
        len(adopted) == 4 and set(adopted) | set(missing) == set(range(6)) and not set(adopted) & set(missing)
    )


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_record_without_its_whole_data_file_is_dropped(uri, tmp_path, damage):
    whole, broken = write(uri, [0]), write(uri, [1, 2])
    path = data_file(uri, broken, tmp_path)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with committer(uri, "next") as c:
        assert c.adopt() == whole.num_rows
        assert (
            "missing" in c.dropped[0].reason if damage == "missing" else "bytes, not" in c.dropped[0].reason
        )
        assert c.missing(np.arange(3)).to_array().tolist() == [1, 2]
    assert len(open_table(uri).read()) == 1


def test_a_data_file_that_vanishes_in_the_run_is_not_committed(uri, tmp_path):
    with committer(uri) as c:
        broken = write(uri, [0])
        c.add(broken)
        c.add(write(uri, [1]))
        data_file(uri, broken, tmp_path).unlink()
        assert c.commit() == 1
        assert c.missing(np.arange(2)).to_array().tolist() == [0]
    assert indices_in(uri) == [1]
    assert Ledger(uri, PLAN.plan_id).names("records") == []


def test_records_that_are_no_records_are_dropped(uri):
    ledger = Ledger(uri, PLAN.plan_id)
    ledger.put("records", "a.json", {"plan_id": PLAN.plan_id})
    foreign = write(uri, [0], plan=plan_of(1))
    write_record(ledger, foreign)
    with committer(uri) as c:
        assert c.adopt() == 0
        assert ["not a valid record" in c.dropped[0].reason, "belongs to plan" in c.dropped[1].reason] == [
            True
        ] * 2
        with pytest.raises(ValueError, match="this is the committer of plan"):
            c.add(foreign)
    assert ledger.names("records") == []


def test_adopting_after_planning_is_refused(uri):
    with committer(uri) as c:
        c.missing(np.arange(2))
        with pytest.raises(RuntimeError, match="before missing"):
            c.adopt()


def test_missing_knows_attempts_waiting_and_quarantined(uri):
    second = (1 << ATTEMPT_SHIFT) + 1
    QuarantineLog(uri, PLAN.plan_id).add(PLAN.request_at(2).request_id, 2, "not_finite", "nan", 1)
    with committer(uri) as c:
        c.add(write(uri, [0]))
        c.commit()
        c.add(write(uri, [second]))
        asked = np.array([0, 1, 2, 3, second, second + 1])
        assert c.missing(asked).to_array().tolist() == [1, 3, second + 1]


def test_a_second_committer_of_the_plan_is_refused_and_another_plan_is_not(uri):
    with committer(uri, "first"):
        with pytest.raises(LeaseHeld, match=r"is being written by process \d+ on .*, run first"):
            committer(uri, "second")
        with committer(uri, plan=plan_of(1)) as other:
            other.add(write(uri, [0], plan=plan_of(1)))
    with committer(uri, "second"):
        pass


@pytest.mark.parametrize("kind", ["file", "config"])
def test_nothing_is_committed_after_the_lease_is_lost(uri, kind):
    c = committer(uri, lease=kind)
    c.add(write(uri, [0]))
    if kind == "file":
        (Ledger(uri, PLAN.plan_id).folder / "lease").unlink()
    else:
        lance.dataset(uri).update_config({f"lease.{PLAN.plan_id}": None})
    with committer(uri, "thief", lease=kind), pytest.raises(LeaseLost):
        c.commit()
    assert open_table(uri).count() == 0
    with pytest.raises(LeaseLost):
        c.close()
    with pytest.raises(RuntimeError, match="closed"):
        c.commit()


def test_jobs_of_different_plans_into_one_table_lose_nothing(uri):
    plans = [plan_of(seed) for seed in range(3)]
    start, faults = threading.Barrier(len(plans)), []

    def job(plan):
        try:
            with committer(uri, plan=plan, rows_per_commit=2) as c:
                start.wait()
                for index in range(0, 24, 2):
                    c.add(write(uri, [index, index + 1], plan=plan))
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=job, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    for plan in plans:
        assert indices_in(uri, plan) == list(range(24))


def test_a_curation_that_adds_columns_meanwhile_does_not_stop_the_commits(uri):
    with committer(uri) as c:
        c.add(write(uri, [0, 1]))
        c.commit()
        late = write(uri, [2, 3])
        ids = open_table(uri).read(["request_id"])["request_id"]
        open_table(uri).write_columns(pa.table({"request_id": ids, "accepted": [True, False]}), "request_id")
        c.add(late)
        c.commit()
        c.add(write(uri, [4]))
    assert open_table(uri).read(["accepted"])["accepted"].to_pylist() == [True, False, None, None, None]


def test_a_commit_that_another_change_pre_empts_is_tried_again(uri):
    with committer(uri) as c:
        c.add(write(uri, [0]))
        c.commit()
        c.add(write(uri, [1]))
        lance.dataset(uri).add_columns({"copy": "nullif(prompt, 'x')"})  # Lance lets this pre-empt an Append
        assert c.commit() == 1
    assert open_table(uri).read(["copy"])["copy"].to_pylist() == ["", None]


def test_rows_without_a_column_that_may_not_be_null_are_not_committed(uri):
    with committer(uri) as c:
        c.add(write(uri, [0]))
        c.commit()
        c.add(write(uri, [1]))
        left = write(uri, [2])
        lance.dataset(uri).add_columns({"twice": "label * 2"})
        assert c.commit() == 0  # Lance would take the rows, and the table could not be read any more
        assert "lacks column 'twice'" in c.dropped[0].reason
        assert c.missing(np.arange(2)).to_array().tolist() == [1]
    with committer(uri) as c:
        assert c.adopt() == 0 and c.dropped[0].num_rows == left.num_rows
    assert open_table(uri).read().num_rows == 1


def test_nothing_is_appended_to_a_table_that_was_overwritten(uri):
    c = committer(uri)
    c.add(write(uri, [0]))
    lance.write_dataset(synthetic_rows(PLAN, [8, 9]), uri, mode="overwrite")
    with pytest.raises(OSError, match="incompatible"):
        c.commit()
    assert indices_in(uri) == [8, 9]


def test_reconciliation_accounts_for_every_request(uri):
    quarantine = QuarantineLog(uri, PLAN.plan_id)
    for index, reason in [
        (20, "process_died"),
        (21, "process_died"),
        (22, "not_finite"),
        (0, "not_finite"),
        (90, "not_finite"),
    ]:
        quarantine.add(PLAN.request_at(index).request_id, index, reason, "…", 3)
    with committer(uri) as c:
        c.add(write(uri, np.arange(20)))
        c.commit()
        c.add(write(uri, [50]))
        c.commit()
        result = c.audit(np.arange(30))
    assert result == Reconciliation(
        requested=30,
        committed=20,
        accepted=15,
        rejected={"blank_image": 5},
        quarantined={"not_finite": 1, "process_died": 2},
        pending=7,
    )
    assert result.line() == (
        "requested 30 = committed 20 (accepted 15 + rejected 5: blank_image 5) "
        "+ quarantined 3: process_died 2, not_finite 1 + pending 7"
    )
    assert not result.complete


def test_reconciliation_uses_the_verdict_of_curation_where_there_is_one(uri):
    with committer(uri) as c:
        c.add(write(uri, np.arange(8)))
        c.commit()
        values = pa.table(
            {
                "request_id": [PLAN.request_at(0).request_id, PLAN.request_at(3).request_id],
                "accepted": [False, True],
                "reject_reason": pa.array(["near_copy_of_real", None], pa.string()),
            }
        )
        open_table(uri).write_columns(values, "request_id")
        result = c.audit(np.arange(8))
    assert (result.accepted, result.rejected) == (6, {"blank_image": 1, "near_copy_of_real": 1})


def test_a_row_that_stands_twice_is_found(uri):
    with committer(uri) as c:
        record = write(uri, [0, 1])
        c.add(record)
        c.commit()
        rows = open_table(uri).read()
        lance.write_dataset(rows.slice(1), uri, mode="append")  # what a second committer would do
        with pytest.raises(DuplicateRequests, match="request_index"):
            c.audit(np.arange(2))
    with pytest.raises(DuplicateRequests, match="request_index"):
        committer(uri)
    with pytest.raises(DuplicateRequests, match=PLAN.request_at(1).request_id):
        check_distinct(lance.dataset(uri), PLAN.plan_id)


def test_a_request_id_that_stands_twice_under_two_indices_is_found(uri):
    rows = synthetic_rows(PLAN, [0, 1])
    twice = rows.set_column(0, rows.schema.field("request_id"), pa.array([PLAN.request_at(7).request_id] * 2))
    lance.write_dataset(twice.cast(open_table(uri).schema), uri, mode="append")
    with (
        committer(uri) as c,
        pytest.raises(DuplicateRequests, match=f"{PLAN.request_at(7).request_id} 2 times"),
    ):
        c.audit(np.arange(2))


def test_a_commit_that_reports_a_fault_after_it_happened_is_recognised(uri, monkeypatch):
    append = Committer._append

    def append_and_fail(self, *args, **settings):
        append(self, *args, **settings)
        raise OSError("connection lost")

    with committer(uri) as c:
        c.add(write(uri, [0]))
        monkeypatch.setattr(Committer, "_append", append_and_fail)
        assert c.commit() == 1
        monkeypatch.setattr(
            Committer, "_append", lambda self, *args, **settings: (_ for _ in ()).throw(OSError("refused"))
        )
        c.add(write(uri, [1]))
        with pytest.raises(OSError, match="refused"):
            c.commit()
        monkeypatch.undo()
        assert c.commit() == 1
    assert indices_in(uri) == [0, 1]


def test_hashes_of_strings_differ_and_do_not_depend_on_the_slice():
    values = pa.array(["", "a", "b", "ab", "ba", "x" * 8, "x" * 9, "é"] + [f"{i:032x}" for i in range(1000)])
    hashes = hash_strings(values)
    assert len(np.unique(hashes)) == len(values)
    np.testing.assert_array_equal(hash_strings(values.slice(3, 900)), hashes[3:903])


def test_settings_that_make_no_sense_are_refused(uri):
    with pytest.raises(ValueError, match="rows_per_commit 0"):
        committer(uri, rows_per_commit=0)
    with pytest.raises(FileNotFoundError):
        committer(uri + "x")
