"""Compaction, indexes and clean-up change nothing that a table says."""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from storage_rows import DIM, plan_of, synthetic_rows, synthetic_table, unit

from factory.storage import Committer, LeaseHeld, open_table, write_fragment
from factory.storage.maintenance import maintain

NOW = datetime.timedelta(0)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A table of 12 fragments of 10 rows, as synthesis leaves it."""
    plan = plan_of()
    table = synthetic_table(tmp_path)
    table.set_metadata({f"plan.{plan.plan_id}": "{}"})
    with Committer(table.uri, plan_id=plan.plan_id, run_id="run", rows_per_commit=20) as committer:
        for start in range(0, 120, 10):
            rows = synthetic_rows(plan, np.arange(start, start + 10))
            committer.add(write_fragment(table.uri, rows, run_id="run"))
        committer.commit()
    return table.uri


def content(uri: str) -> list[dict]:
    return open_table(uri).read().sort_by("request_index").to_pylist()


def test_fewer_fragments_say_the_same(uri: str) -> None:
    before, version = content(uri), open_table(uri).version
    done = maintain(uri, run_id="m")
    assert done.fragments_before == 12 and done.fragments_after == 1
    assert content(uri) == before
    assert open_table(uri, version=version).count() == 120, "older versions stay"
    again = maintain(uri, run_id="m")
    assert again.fragments_before == again.fragments_after == 1


def test_indexes_answer_as_scans_do(uri: str) -> None:
    questions = ["label_name = 'malignant'", "stream_reject_reason IS NULL AND recipe = 'tiny'"]
    questions.append(f"request_id = '{content(uri)[7]['request_id']}'")
    before = [open_table(uri).count(question) for question in questions]
    done = maintain(uri, run_id="m", vector_index_rows=100)
    assert {"request_id", "label_name", "recipe", "stream_reject_reason", "embedding"} <= set(done.indexed)
    assert [open_table(uri).count(question) for question in questions] == before
    assert before[2] == 1 and 0 < before[0] < 120
    for wanted in (0, 50, 119):
        row = content(uri)[wanted]
        found = open_table(uri).nearest(np.array(row["embedding"], np.float32), 1).to_pylist()[0]
        assert found["request_id"] == row["request_id"] and found["similarity"] == pytest.approx(1, abs=1e-3)
    assert len(unit(0)) == DIM


def test_verdicts_written_after_indexing_are_found(uri: str) -> None:
    """An index must not answer with what a column held before it was rewritten."""

    def curate(accepted: bool) -> None:
        ids = [row["request_id"] for row in content(uri)]
        values = pa.table({"request_id": ids, "accepted": pa.array([accepted] * len(ids), pa.bool_())})
        open_table(uri).write_columns(values, "request_id")

    curate(True)
    maintain(uri, run_id="m")
    assert open_table(uri).count("accepted = true") == 120
    curate(False)
    assert open_table(uri).count("accepted = true") == 0
    assert open_table(uri).count("accepted = false") == 120


def test_synthesis_goes_on_after_compaction(uri: str) -> None:
    plan = plan_of()
    maintain(uri, run_id="m")
    with Committer(uri, plan_id=plan.plan_id, run_id="run-2") as committer:
        missing = committer.missing(np.arange(140)).to_array()
        assert missing.tolist() == list(range(120, 140))
        committer.add(write_fragment(uri, synthetic_rows(plan, missing), run_id="run-2"))
        committer.commit()
        assert committer.audit(np.arange(140)).committed == 140
    assert open_table(uri).count("label_name IN ('benign', 'malignant')") == 140


def test_old_versions_and_orphans_go_and_tags_stay(uri: str) -> None:
    table = open_table(uri)
    table.tag("curated-1")
    tagged = table.version
    orphan = write_fragment(uri, synthetic_rows(plan_of(seed=9), [0, 1]), run_id="killed")
    assert orphan.num_rows == 2
    done = maintain(uri, run_id="m", clean_older_than=NOW)
    assert done.versions_removed > 0 and done.bytes_removed > 0
    assert open_table(uri, tag="curated-1").count() == 120 and tagged in table.tags().values()
    assert open_table(uri).count() == 120
    with pytest.raises(Exception, match=r"(?i)not|version"):
        open_table(uri, version=1).count()


def test_a_table_that_is_being_written_is_left_alone(uri: str) -> None:
    plan = plan_of()
    with (
        Committer(uri, plan_id=plan.plan_id, run_id="busy"),
        pytest.raises(LeaseHeld, match="is being written by"),
    ):
        maintain(uri, run_id="m")
    assert maintain(uri, run_id="m", index=False).fragments_after == 1
