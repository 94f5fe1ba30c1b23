"""Curation columns: kilobytes, never the images; again and again; while rows are added."""

import threading

import numpy as np
import pyarrow as pa
import pytest
from storage_rows import plan_of, synthetic_rows, synthetic_table

from factory.storage import Committer, LeaseHeld, open_table, write_fragment
from factory.storage.lease import take_lease
from schemas.sample import curation_schema

PLAN = plan_of()


@pytest.fixture
def table(tmp_path):
    """40 rows with images of 96 × 96 in four fragments."""
    table = synthetic_table(tmp_path)
    append(table.uri, np.arange(40))
    return open_table(table.uri)


def append(uri, indices, plan=PLAN):
    with Committer(uri, plan_id=plan.plan_id, run_id="r") as committer:
        for start in range(0, len(indices), 10):
            rows = synthetic_rows(plan, indices[start : start + 10], image_size=96)
            committer.add(write_fragment(uri, rows, run_id="r"))


def verdicts(indices, accepted):
    """Curation values for `indices`: every column of the contract."""
    reasons = [None if ok else "duplicate_of_synthetic" for ok in accepted]
    return pa.table(
        {
            "request_id": [PLAN.request_at(index).request_id for index in indices],
            "accepted": accepted,
            "reject_reason": pa.array(reasons, pa.string()),
            "duplicate_of": pa.array([reason and "x" * 32 for reason in reasons], pa.string()),
            "nearest_real": ["y" * 32 for _ in indices],
            "nearest_real_similarity": pa.array(np.linspace(0, 1, len(indices)), pa.float32()),
        }
    )


def stored(table, *columns):
    """Rows by request_index."""
    rows = table.read(["request_index", *columns]).sort_by("request_index").to_pydict()
    return rows[columns[0]] if len(columns) == 1 else rows


def files(tmp_path):
    """Size of every file of the table."""
    root = tmp_path / "synthetic.lance"
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def image_files(table):
    """The data file that holds the images, per fragment."""
    field = next(f for f in table.dataset.lance_schema.fields() if f.name() == "image").id()
    return [
        item.path
        for fragment in table.dataset.get_fragments()
        for item in fragment.data_files()
        if field in item.fields
    ]


def test_curation_writes_kilobytes_and_leaves_the_image_files_alone(table, tmp_path):
    images, before, names = stored(table, "image"), files(tmp_path), image_files(table)
    curated = table.write_columns(verdicts(range(40), [i % 3 > 0 for i in range(40)]), "request_id")
    after = files(tmp_path)
    assert {name: after[name] for name in before if name.startswith("data/")} == {
        name: size for name, size in before.items() if name.startswith("data/")
    }
    assert image_files(curated) == names
    assert stored(curated, "image") == images
    new_bytes = sum(size for name, size in after.items() if name not in before)
    image_bytes = sum(map(len, images))
    assert image_bytes > 350_000 and new_bytes < 50_000
    assert stored(curated, "accepted") == [i % 3 > 0 for i in range(40)]
    assert {f.name: f.type for f in curation_schema()}.items() <= {
        f.name: f.type for f in curated.schema
    }.items()


def test_rows_that_are_not_named_and_rows_that_come_later_are_null(table):
    table.write_columns(verdicts([3, 17], [True, False]), "request_id")
    append(table.uri, np.arange(40, 50))
    accepted = stored(open_table(table.uri), "accepted")
    assert [i for i, value in enumerate(accepted) if value is not None] == [3, 17]
    assert (accepted[3], accepted[17], len(accepted)) == (True, False, 50)


def test_curating_again_replaces_values_and_tags_keep_the_earlier_ones(table):
    first = table.write_columns(verdicts([1, 2], [False, False]), "request_id")
    first.tag(first.next_tag())
    again = verdicts([2, 3], [True, False])
    second = open_table(table.uri).write_columns(again, "request_id")
    second.tag(second.next_tag())
    assert second.tags() == {"curated-1": first.version, "curated-2": second.version}
    assert stored(second, "accepted")[:4] == [None, False, True, False]
    assert stored(second, "reject_reason")[:4] == [
        None,
        "duplicate_of_synthetic",
        None,
        "duplicate_of_synthetic",
    ]
    assert stored(open_table(table.uri, tag="curated-1"), "accepted")[:4] == [None, False, False, None]
    third = second.write_columns(verdicts([2], [False]).select(["request_id", "accepted"]), "request_id")
    assert stored(third, "accepted")[2] is False and stored(third, "nearest_real")[2] == "y" * 32


def test_a_null_in_the_values_is_written(table):
    table.write_columns(verdicts([5], [True]), "request_id")
    values = verdicts([5], [True]).set_column(1, "accepted", pa.nulls(1))
    assert stored(open_table(table.uri).write_columns(values, "request_id"), "accepted")[5] is None


def test_rows_appended_by_a_job_that_runs_meanwhile_are_kept(table):
    other, stop, faults = plan_of(1), threading.Event(), []

    def job():
        try:
            with Committer(table.uri, plan_id=other.plan_id, run_id="r", rows_per_commit=1) as committer:
                for index in range(400):
                    if stop.is_set():
                        break
                    committer.add(write_fragment(table.uri, synthetic_rows(other, [index]), run_id="r"))
                faults.append(committer.committed_rows)
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=job)
    thread.start()
    for turn in range(4):
        open_table(table.uri).write_columns(verdicts(range(40), [turn % 2 == 0] * 40), "request_id")
    stop.set()
    thread.join()
    final = open_table(table.uri)
    assert final.count(f"plan_id = '{other.plan_id}'") == faults[0] > 0
    assert final.count(f"plan_id = '{PLAN.plan_id}' AND reject_reason = 'duplicate_of_synthetic'") == 40


def test_a_second_curation_at_the_same_time_is_refused(table):
    lease = take_lease(table.uri, "curation", run_id="other")
    with pytest.raises(LeaseHeld, match="run other"):
        table.write_columns(verdicts([1], [True]), "request_id")
    lease.release()
    assert table.write_columns(verdicts([1], [True]), "request_id").version > table.version


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda: verdicts([1, 1], [True, True]), "distinct and not null"),
        (lambda: verdicts([1, 90], [True, True]), r"1 of 2 request_id\(s\) are not in the table"),
        (lambda: verdicts([1], [True]).drop_columns(["request_id"]), "key 'request_id' must be a column"),
        (lambda: verdicts([1], [True]).select(["request_id"]), "no columns to write"),
        (lambda: verdicts([1], [True]).append_column("image", pa.array([b"x"])), "'image' may not be null"),
        (
            lambda: verdicts([1], [True]).append_column("background_id", pa.array([1])),
            "'background_id' is string",
        ),
    ],
)
def test_values_that_do_not_fit_change_nothing(table, values, message):
    with pytest.raises(ValueError, match=message):
        table.write_columns(values(), "request_id")
    latest = open_table(table.uri)
    assert latest.version == table.version
    assert "accepted" not in latest.schema.names
