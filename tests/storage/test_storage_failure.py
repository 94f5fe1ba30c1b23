"""A file system that breaks for good: the job stops with a line that says how to go on, and does once it is mended."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from storage_rows import plan_of, synthetic_rows, synthetic_table

from factory.storage import Committer, StorageFailed, ledger_folder, open_table, write_fragment
from jobs.cli import describe, is_operator_error
from jobs.stream_faults import storage_fault

PLAN = plan_of()
PLACES = ("data", "ledger", "whole table")


def place(uri: str, name: str) -> Path:
    return {"data": Path(uri) / "data", "ledger": Path(ledger_folder(uri)), "whole table": Path(uri)}[name]


@contextmanager
def broken(path: Path) -> Iterator[None]:
    """`path` is away, and nothing can be made in its place; it comes back as it was."""
    away = path.with_name(path.name + ".away")
    path.rename(away)
    path.write_text("")
    try:
        yield
    finally:
        path.unlink()
        away.rename(path)


def write(uri: str, indices: list[int], run_id: str = "first"):
    return write_fragment(uri, synthetic_rows(PLAN, indices), run_id=run_id)


@pytest.mark.parametrize("name", PLACES)
def test_a_job_stops_and_the_same_command_goes_on_when_the_storage_is_mended(
    tmp_path: Path, name: str
) -> None:
    uri = synthetic_table(tmp_path).uri
    with (
        pytest.raises(StorageFailed, match="run the same command again") as stopped,
        Committer(uri, plan_id=PLAN.plan_id, run_id="first", rows_per_commit=2) as committer,
    ):
        committer.add(write(uri, [0, 1]))
        committer.add(write(uri, [2]))  # recorded, not committed
        with broken(place(uri, name)):
            write(uri, [3, 4])
    assert uri in str(stopped.value) and is_operator_error(stopped.value)
    assert open_table(uri).count() == 2, "what was committed is there"
    with Committer(uri, plan_id=PLAN.plan_id, run_id="again") as committer:
        assert committer.adopt() == 1
        missing = committer.missing(np.arange(6)).to_array().tolist()
        assert missing == [3, 4, 5]
        committer.add(write(uri, missing, "again"))
        committer.commit()
        assert committer.audit(np.arange(6)).complete
    assert sorted(open_table(uri).read(["request_index"])["request_index"].to_pylist()) == list(range(6))


def test_a_commit_to_broken_storage_leaves_its_records_for_the_next_run(tmp_path: Path) -> None:
    uri = synthetic_table(tmp_path).uri
    with (
        pytest.raises(StorageFailed, match="run the same command again"),
        Committer(uri, plan_id=PLAN.plan_id, run_id="first") as committer,
    ):
        committer.add(write(uri, [0, 1]))
        with broken(place(uri, "data")):
            committer.commit()
    with Committer(uri, plan_id=PLAN.plan_id, run_id="again") as committer:
        assert committer.adopt() == 2 and not committer.dropped
        assert committer.missing(np.arange(3)).to_array().tolist() == [2]


def test_a_fault_of_a_task_is_told_as_what_it_was(tmp_path: Path) -> None:
    """The text of an error of Ray holds the traceback of the task, which ends with the error that our storage raised."""
    uri = synthetic_table(tmp_path).uri
    write(uri, [1])
    with broken(place(uri, "data")), pytest.raises(StorageFailed) as raised:
        write(uri, [0])
    frames = "".join(traceback.format_exception(raised.value))
    told = storage_fault(
        f"ray::write_rows()\n{frames}\nThe above exception was the direct cause of …\nUserCodeException: x"
    )
    assert told is not None and is_operator_error(told)
    assert describe(told) == describe(raised.value) and "run the same command again" in describe(told)
    assert "\n" not in describe(told)
    assert storage_fault("Traceback …\nPermissionError: [Errno 13] Permission denied: '/x'") is None, (
        "not the table's"
    )
    assert storage_fault("ZeroDivisionError: division by zero") is None
