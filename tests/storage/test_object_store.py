"""Tables, ledger and lease on an S3-compatible store: a real server on loopback."""

import json
import os
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from crash_job import run_job
from storage_rows import DIM, METADATA, plan_of, real_samples, synthetic_rows, unit
from test_kills import JOB

from factory.storage import (
    Committer,
    LeaseHeld,
    StorageUnreachable,
    TestAccess,
    check_table,
    create_table,
    errors,
    maintain,
    open_table,
    plan_status,
    real_digest,
    real_rows,
    test_accesses,
    write_fragment,
    write_table,
)
from factory.storage.ledger import Ledger
from factory.storage.location import OPTIONS_VARIABLE, arrow_filesystem
from schemas.sample import real_schema, synthetic_schema

SECRET = "a-secret-that-is-written-nowhere"
PLAN = plan_of()


class Server:
    """The server, as its tests drive it."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str) -> bytes:
        """The answer to a request without a body."""
        with urllib.request.urlopen(urllib.request.Request(self.address + path, method=method)) as answer:
            return answer.read()

    def fail(
        self, count: int, *, match: str, when: str = "before", status: int = 503, code: str = "SlowDown"
    ):
        """Let the next `count` requests with `match` in their method and path fail."""
        settings = {"count": count, "match": match, "when": when, "status": status, "code": code}
        self.ask("PUT", f"/--faults?{urllib.parse.urlencode(settings)}")

    def failed(self) -> int:
        """How many requests have failed since."""
        return int(self.ask("GET", "/--faults"))


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("s3_server.py"))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        server = Server(int(process.stdout.readline()))
        server.ask("PUT", "/bucket")
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, reached by the environment as a worker of a cluster reaches it."""
    options = {"aws_endpoint": running.address, "aws_region": "us-east-1"}
    monkeypatch.setenv(OPTIONS_VARIABLE, json.dumps(options))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(errors, "RETRY_SECONDS", (0.05,) * 4)
    running.fail(0, match="")
    return running


@pytest.fixture
def uri(server: Server, request: pytest.FixtureRequest) -> str:
    """An empty table of synthetic rows in a prefix of its own."""
    uri = f"s3://bucket/{abs(hash(request.node.name))}/synthetic.lance"
    create_table(uri, synthetic_schema(DIM), metadata=METADATA)
    return uri


def committer(uri: str, run_id: str = "run", **settings) -> Committer:
    return Committer(uri, plan_id=PLAN.plan_id, run_id=run_id, **settings)


def write(uri: str, indices) -> object:
    return write_fragment(uri, synthetic_rows(PLAN, indices), run_id="run")


def indices_in(uri: str, plan=PLAN) -> list[int]:
    rows = open_table(uri).read(["request_index"], f"plan_id = '{plan.plan_id}'")
    return sorted(rows["request_index"].to_pylist())


def objects(prefix: str) -> dict[str, bytes]:
    """Content of every object below a URI."""
    from pyarrow.fs import FileSelector

    filesystem, root = arrow_filesystem(prefix, None)
    found = filesystem.get_file_info(FileSelector(root, recursive=True))
    return {item.path: filesystem.open_input_stream(item.path).read() for item in found if item.is_file}


def test_a_real_table_is_written_read_by_split_and_its_readings_recorded(server: Server) -> None:
    uri = "s3://bucket/prepared/real.lance"
    rows = real_samples(12)
    table = write_table(uri, rows, real_schema(DIM), metadata=METADATA)
    with pytest.raises(FileExistsError):
        write_table(uri, rows, real_schema(DIM), metadata=METADATA)
    assert real_rows(uri, splits=("train", "val")).num_rows == 9
    with pytest.raises(PermissionError, match="evaluate downstream"):
        table.read()
    access = TestAccess(opened_by="evaluate downstream", reason="report")
    assert real_rows(uri, splits=("test",), access=access).num_rows == 3
    assert [entry["reason"] for entry in test_accesses(uri)] == ["report"]
    assert len(real_digest(table)) == 32


def test_rows_are_committed_queried_curated_and_compacted(uri: str) -> None:
    open_table(uri).set_metadata({f"plan.{PLAN.plan_id}": "{}"})
    with committer(uri) as c:
        for start in range(0, 20, 4):
            c.add(write(uri, np.arange(start, start + 4)))
        c.commit()
        assert (
            c.audit(np.arange(24)).line().startswith("requested 24 = committed 20 (accepted 15 + rejected 5")
        )
        status = plan_status(open_table(uri), PLAN.plan_id, np.arange(24))
        assert status.writer is not None and f"process {os.getpid()}" in status.writer
        assert (status.reconciliation.pending, status.uncommitted) == (4, 0)
    assert plan_status(open_table(uri), PLAN.plan_id, np.arange(24)).writer is None
    table = open_table(uri)
    assert table.count("accepted AND label_name = 'benign'") == 10
    assert table.nearest(unit(3), 1, columns=["request_index"])["request_index"].to_pylist() == [3]
    ids = table.read(["request_id"])["request_id"]
    table.write_columns(pa.table({"request_id": ids, "accepted": [True] * 20}), "request_id")
    assert open_table(uri).count("accepted") == 20
    assert maintain(uri, run_id="m").fragments_after == 1
    assert indices_in(uri) == list(range(20)) and list(check_table(open_table(uri))) == []


def test_a_second_driver_of_the_plan_is_refused_and_told_who_works(uri: str) -> None:
    with committer(uri, "first"):
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on .* run first"):
            committer(uri, "second")
        Committer(uri, plan_id=plan_of(1).plan_id, run_id="other").close()
    committer(uri, "second").close()


def start(uri: str, count: int, run_id: str, boundary: str = "", seed: int = 0) -> subprocess.Popen:
    command = [sys.executable, str(JOB), uri, str(count), run_id, boundary, str(seed)]
    environment = os.environ | {"PYTHONPATH": str(JOB.parents[2])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize(
    "boundary",
    [
        "between record and its arrival at the committer",
        "after commit before acknowledgement",
    ],
)
def test_a_killed_job_and_the_same_again_make_every_request_once(server: Server, boundary: str) -> None:
    uri = f"s3://bucket/killed/{boundary.replace(' ', '-')}.lance"
    job = start(uri, 40, "first", boundary)
    assert job.wait(60) == -signal.SIGKILL
    before = set(indices_in(uri))
    assert len(before) < 40
    assert run_job(uri, 40, "second").startswith("requested 40 = committed 40 ")
    assert indices_in(uri) == list(range(40))
    assert Ledger(uri, PLAN.plan_id).names("records") == []


def test_jobs_of_several_plans_write_one_table_at_once(server: Server) -> None:
    uri = "s3://bucket/shared/synthetic.lance"
    jobs = [start(uri, 40, f"run{seed}", seed=seed) for seed in range(3)]
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        assert "requested 40 = committed 40 " in out
    for seed in range(3):
        assert indices_in(uri, plan_of(seed)) == list(range(40))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_stumbles_costs_nothing(uri: str, server: Server, when: str) -> None:
    """Requests are refused, or done and their answer is lost: data files, records, and the commit itself."""
    with committer(uri) as c:
        for position, match in enumerate(("PUT", "records", ".manifest")):
            server.fail(3, match=match, when=when)
            c.add(write(uri, [position]))
            c.commit()
            assert server.failed() == 3
        assert c.audit(np.arange(3)).committed == 3
    assert indices_in(uri) == [0, 1, 2]


def test_a_store_that_stays_away_stops_the_job_with_one_line_and_loses_nothing(
    uri: str, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "RETRY_SECONDS", (0.05,))
    c = committer(uri, rows_per_commit=100)
    c.add(write(uri, [0]))
    server.fail(10_000, match="")
    with pytest.raises(StorageUnreachable, match="does not answer.*run the same command again"):
        c.commit()
    assert sum("trying again" in record.getMessage() for record in caplog.records) >= 1
    server.fail(0, match="")
    c._release()  # as a process that ends by this error does
    with committer(uri, "again") as c:
        c.adopt()
    assert indices_in(uri) == [0]


def test_what_is_refused_for_good_stops_at_once_and_says_so(uri: str, server: Server) -> None:
    for match in ("PUT", "records"):
        server.fail(1, match=match, status=403, code="AccessDenied")
        with pytest.raises(PermissionError, match="Mend the rights or credentials"):
            write(uri, [0])
        assert server.failed() == 1
    with pytest.raises(FileNotFoundError, match="there is no such bucket"):
        create_table("s3://nobody-has-this/x.lance", synthetic_schema(DIM))
    with pytest.raises(FileNotFoundError, match="no table at"):
        open_table("s3://bucket/none.lance")


def test_a_damaged_data_file_is_named(uri: str) -> None:
    with committer(uri) as c:
        for index in range(3):
            c.add(write(uri, [index]))
    victim = open_table(uri).dataset.get_fragments()[1].metadata.files[0].path
    filesystem, root = arrow_filesystem(uri, None)
    with filesystem.open_output_stream(f"{root}/data/{victim}") as stream:
        stream.write(b"cut")
    found = list(check_table(open_table(uri)))
    assert [(item.fragment, item.file) for item in found] == [(1, victim)] and "has 3 bytes" in str(found[0])


def test_options_may_be_given_and_secrets_are_stored_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (OPTIONS_VARIABLE, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = {
        "aws_endpoint": server.address,
        "aws_access_key_id": "somebody",
        "aws_secret_access_key": SECRET,
        "aws_region": "us-east-1",
    }
    uri = "s3://bucket/secret/synthetic.lance"
    table = create_table(uri, synthetic_schema(DIM), metadata=METADATA, storage_options=options)
    with committer(uri, storage_options=options) as c:
        rows = synthetic_rows(PLAN, [0, 1])
        c.add(write_fragment(uri, rows, run_id="run", storage_options=options))
        write_fragment(uri, synthetic_rows(PLAN, [2]), run_id="left", storage_options=options)
    assert open_table(uri, storage_options=options).count() == 2 and SECRET not in repr(table)
    monkeypatch.setenv(OPTIONS_VARIABLE, json.dumps(options))
    stored = objects("s3://bucket/secret")
    assert any("records" in name for name in stored) and any("manifest" in name for name in stored)
    assert not [name for name, content in stored.items() if SECRET.encode() in content]
