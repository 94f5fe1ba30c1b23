"""Write tasks: one data file and one record each, safe to run again."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from storage_rows import plan_of, synthetic_rows, synthetic_table

from factory.storage import DuplicateRequests, FragmentRecord, TableDamaged, open_table, write_fragment
from factory.storage.files import files_at, write_whole
from factory.storage.ledger import Ledger

PLAN = plan_of()


def test_a_fragment_is_recorded_and_not_visible(tmp_path):
    table = synthetic_table(tmp_path)
    rows = synthetic_rows(PLAN, np.arange(8))
    record = write_fragment(table.uri, rows, run_id="run1")
    assert open_table(table.uri).count() == 0
    stored = Ledger(table.uri, PLAN.plan_id).get("records", record.name)
    assert FragmentRecord.from_dict(stored) == record == FragmentRecord.from_json(record.to_json())
    assert record.request_ids == tuple(rows["request_id"].to_pylist())
    assert (record.num_rows, record.accepted, record.rejected) == (8, 6, {"blank_image": 2})
    size = record.fragment["files"][0]["file_size_bytes"]
    assert (
        tmp_path / "synthetic.lance" / "data" / record.fragment["files"][0]["path"]
    ).stat().st_size == size


def test_writing_again_leaves_one_record_and_another_data_file(tmp_path):
    table = synthetic_table(tmp_path)
    rows = synthetic_rows(PLAN, [4, 1, 9])
    first = write_fragment(table.uri, rows, run_id="run1")
    second = write_fragment(table.uri, rows.take([2, 0, 1]), run_id="run1")
    assert first.name == second.name
    assert Ledger(table.uri, PLAN.plan_id).names("records") == [first.name]
    assert first.fragment["files"][0]["path"] != second.fragment["files"][0]["path"]
    assert write_fragment(table.uri, rows, run_id="run2").name != first.name


@pytest.mark.parametrize(
    ("rows", "fault", "message"),
    [
        (lambda: synthetic_rows(PLAN, [1, 2, 1]), DuplicateRequests, "request_id .* stands twice"),
        (lambda: synthetic_rows(PLAN, []), ValueError, "at least one row"),
        (
            lambda: pa.concat_tables([synthetic_rows(PLAN, [1]), synthetic_rows(plan_of(1), [2])]),
            ValueError,
            "one plan per fragment, got 2",
        ),
        (lambda: synthetic_rows(PLAN, [1]).drop_columns(["image"]), ValueError, "image"),
    ],
)
def test_rows_that_cannot_be_written_leave_no_record(tmp_path, rows, fault, message):
    table = synthetic_table(tmp_path)
    with pytest.raises(fault, match=message):
        write_fragment(table.uri, rows(), run_id="run1")
    assert Ledger(table.uri, PLAN.plan_id).names("records") == []


def test_the_same_index_with_another_id_is_refused(tmp_path):
    rows = synthetic_rows(PLAN, [1, 2])
    rows = rows.set_column(2, rows.schema.field("request_index"), pa.array([1, 1]))
    with pytest.raises(DuplicateRequests, match="request_index 1"):
        write_fragment(synthetic_table(tmp_path).uri, rows, run_id="run1")


def test_a_record_that_contradicts_itself_is_refused(tmp_path):
    record = write_fragment(synthetic_table(tmp_path).uri, synthetic_rows(PLAN, [1, 2]), run_id="run1")
    with pytest.raises(TableDamaged, match="1 ids, 2 indices"):
        dataclasses.replace(record, request_ids=record.request_ids[:1])


def test_a_file_of_the_ledger_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "value.json"
    write_whole(target, b"first")
    target.chmod(0o600)
    with pytest.raises(TypeError):
        write_whole(target, "not bytes")
    assert target.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_the_ledger_refuses_what_it_cannot_keep(tmp_path):
    with pytest.raises(ValueError, match="s3:// and gs://, not az://"):
        files_at("az://bucket/synthetic.lance.ledger", "az://bucket/synthetic.lance")
    with pytest.raises(FileNotFoundError, match="create it before"):
        Ledger(str(tmp_path / "none.lance"), PLAN.plan_id)
    with pytest.raises(ValueError, match="plan_id '../x'"):
        Ledger(synthetic_table(tmp_path).uri, "../x")


def test_a_table_made_anew_has_a_ledger_of_its_own(tmp_path):
    table = synthetic_table(tmp_path)
    write_fragment(table.uri, synthetic_rows(PLAN, [1]), run_id="run1")
    (tmp_path / "synthetic.lance").rename(tmp_path / "old.lance")
    assert Ledger(synthetic_table(tmp_path).uri, PLAN.plan_id).names("records") == []


FULL_DISK = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths}
import numpy as np
from storage_rows import plan_of, synthetic_rows, synthetic_table
from factory.storage import Committer, StorageFull, open_table, write_fragment
from factory.storage.ledger import Ledger

folder, plan, report = Path(sys.argv[1]), plan_of(), {{}}
table = synthetic_table(folder)
with Committer(table.uri, plan_id=plan.plan_id, run_id="a") as committer:
    committer.add(write_fragment(table.uri, synthetic_rows(plan, np.arange(4)), run_id="a"))
waiting = write_fragment(table.uri, synthetic_rows(plan, np.arange(4, 8)), run_id="a")
filler = (folder / "filler").open("wb", buffering=0)
try:
    while True:
        filler.write(b"x" * 4096)
except OSError:
    pass
try:
    write_fragment(table.uri, synthetic_rows(plan, np.arange(8, 12), image_size=64), run_id="a")
except StorageFull as fault:
    report["write"] = str(fault)
try:
    with Committer(table.uri, plan_id=plan.plan_id, run_id="b") as committer:
        committer.adopt()
except StorageFull as fault:
    report["commit"] = str(fault)
report["rows_when_full"] = open_table(table.uri).count()
filler.close()
(folder / "filler").unlink()
with Committer(table.uri, plan_id=plan.plan_id, run_id="c") as committer:
    report["adopted"] = committer.adopt()
report["rows_after"] = open_table(table.uri).count()
print(json.dumps(report))
"""


def test_a_full_disk_is_said_and_the_table_stays_intact(tmp_path, pytestconfig):
    """On a file system of 2 MB, mounted in a namespace of its own."""
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK.format(paths=[str(pytestconfig.rootpath), os.path.dirname(__file__)]))  # noqa: PTH120
    folder = tmp_path / "small"
    folder.mkdir()
    inside = f"mount -t tmpfs -o size=1m none {folder} && exec {sys.executable} {script} {folder}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "the device is full" in report["write"]
    assert "the device is full" in report["commit"]
    assert (report["rows_when_full"], report["adopted"], report["rows_after"]) == (4, 4, 8)


def test_a_forbidden_table_is_said(tmp_path, pytestconfig):
    """As an unprivileged user, because root may write anywhere."""
    table = synthetic_table(tmp_path)
    rows_file = tmp_path / "rows.arrow"
    rows = synthetic_rows(PLAN, [1])
    with pa.OSFile(str(rows_file), "wb") as stream, pa.ipc.new_file(stream, rows.schema) as writer:
        writer.write_table(rows)
    code = f"""
import os, sys
sys.path[:0] = [{str(pytestconfig.rootpath)!r}]
import pyarrow as pa
from factory.storage import write_fragment
rows = pa.ipc.open_file({str(rows_file)!r}).read_all()
if os.getuid() == 0:
    os.setuid(65534)
try:
    write_fragment({table.uri!r}, rows, run_id="a")
except PermissionError as fault:
    print("refused:", fault)
"""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder.owner() == tmp_path.owner():
            folder.chmod(folder.stat().st_mode | 0o055)
    for folder in [p for p in tmp_path.rglob("*") if p.is_dir()]:
        folder.chmod(0o555)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "refused: " in done.stdout and "permission denied" in done.stdout, done.stderr
    assert open_table(table.uri).count() == 0
