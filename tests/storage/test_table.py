"""Tables: create, write, open, read, query; errors that name what is wrong."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from storage_rows import DIM, METADATA, plan_of, real_samples, synthetic_rows, synthetic_table, unit

from factory.storage import TestAccess, create_table, open_table, write_fragment, write_table
from factory.storage.committer import Committer
from schemas.sample import real_schema, synthetic_schema


def whole(table):
    """The table with leave to read its test rows."""
    return open_table(table.uri, test_access=TestAccess(opened_by="tests", reason="whole tables"))


@pytest.fixture
def real(tmp_path):
    return whole(
        write_table(str(tmp_path / "real.lance"), real_samples(20), real_schema(DIM), metadata=METADATA)
    )


@pytest.fixture
def synthetic(tmp_path):
    table, plan = synthetic_table(tmp_path), plan_of()
    with Committer(table.uri, plan_id=plan.plan_id, run_id="r") as committer:
        committer.add(write_fragment(table.uri, synthetic_rows(plan, np.arange(20)), run_id="r"))
    return open_table(table.uri)


def test_what_is_written_is_read_back(tmp_path):
    rows = real_samples(7)
    table = write_table(str(tmp_path / "real.lance"), rows, real_schema(DIM), metadata=METADATA)
    again = whole(table)
    assert again.read().equals(rows.cast(again.schema))
    assert again.schema.field("pixel_spacing").metadata[b"unit"] == b"mm"
    assert again.metadata["embedder"] == METADATA["embedder"]


def test_batches_stream_the_same_rows(tmp_path, real):
    streamed = write_table(str(tmp_path / "b.lance"), real.batches(batch_size=3), real_schema(DIM))
    assert whole(streamed).read().equals(real.read())
    assert [b.num_rows for b in streamed.batches(["image_id"], "label = 1", batch_size=4)] == [4, 4, 2]


def test_write_table_refuses_to_replace_unless_asked(real):
    with pytest.raises(FileExistsError, match="real.lance exists already"):
        write_table(real.uri, real_samples(2), real_schema(DIM))
    assert write_table(real.uri, real_samples(2), real_schema(DIM), overwrite=True).count() == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop_columns(["label"]), r"missing from the rows: \['label'\]"),
        (lambda t: t.append_column("extra", t["label"]), r"not in the schema: \['extra'\]"),
        (lambda t: t.set_column(0, "image_id", pa.array([None] * len(t), pa.string())), "null in .*image_id"),
    ],
)
def test_write_table_names_columns_that_do_not_fit(tmp_path, spoil, message):
    with pytest.raises(ValueError, match=message):
        write_table(str(tmp_path / "x.lance"), spoil(real_samples(3)), real_schema(DIM))
    with pytest.raises(ValueError, match=message):
        batches = spoil(real_samples(3)).to_batches()
        write_table(str(tmp_path / "x.lance"), iter(batches), real_schema(DIM))
    with pytest.raises(FileNotFoundError):
        open_table(str(tmp_path / "x.lance"))


def test_create_opens_an_existing_table_of_the_same_schema(tmp_path):
    first = synthetic_table(tmp_path)
    second = synthetic_table(tmp_path)
    assert (first.version, second.version) == (1, 1)
    assert first.metadata["table_id"] == second.metadata["table_id"]


@pytest.mark.parametrize(
    ("schema", "metadata", "message"),
    [
        (synthetic_schema(DIM + 1), METADATA, "column 'embedding' is fixed_size_list"),
        (real_schema(DIM), METADATA, "has no column 'image_id'"),
        (
            synthetic_schema(DIM),
            METADATA | {"embedder": '{"name": "dinov2"}'},
            "embedder is .*tiny.* not .*dinov2",
        ),
        (synthetic_schema(DIM), METADATA | {"class_names": '["malignant", "benign"]'}, "class_names is"),
    ],
)
def test_create_refuses_a_table_of_another_kind(tmp_path, schema, metadata, message):
    table = synthetic_table(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_table(table.uri, schema, metadata=metadata)


def test_create_compares_embedders_by_content_not_by_spelling(tmp_path):
    table = synthetic_table(tmp_path)
    respelt = f'{{"dim":{DIM},"name":"tiny"}}'
    assert (
        create_table(table.uri, synthetic_schema(DIM), metadata=METADATA | {"embedder": respelt}).version == 1
    )


def test_where_an_embedders_weights_lie_does_not_matter_and_what_they_are_does(tmp_path):
    uri, schema = str(tmp_path / "t.lance"), synthetic_schema(DIM)
    here, there = ({"embedder": f'{{"weights_digest": "d1", "weights": "{path}"}}'} for path in ("/a", "/b"))
    create_table(uri, schema, metadata=here)
    assert create_table(uri, schema, metadata=there).version == 1
    with pytest.raises(ValueError, match="embedder is"):
        create_table(uri, schema, metadata={"embedder": '{"weights_digest": "d2", "weights": "/a"}'})


def test_open_says_what_makes_a_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no table at .*real.lance.*factory prepare"):
        open_table(str(tmp_path / "real.lance"))
    (tmp_path / "synthetic.lance" / "data").mkdir(parents=True)  # what a killed create leaves
    with pytest.raises(FileNotFoundError, match="factory synthesize"):
        open_table(str(tmp_path / "synthetic.lance"))
    assert synthetic_table(tmp_path).count() == 0


def test_versions_and_tags_open_what_they_name(real):
    real.tag("curated-1")
    real.set_metadata({"summary": "{}"})
    assert (real.next_tag(), real.next_tag("other")) == ("curated-2", "other-1")
    assert "summary" not in open_table(real.uri, tag="curated-1").metadata
    assert "summary" in open_table(real.uri).metadata
    assert [number for number, _ in real.versions()] == [1, 2]
    assert pickle.loads(pickle.dumps(open_table(real.uri, version=1))).version == 1  # noqa: S301
    for wrong, message in [({"tag": "curated-7"}, "tags: curated-1"), ({"version": 9}, r"versions: 1 … 2")]:
        with pytest.raises(ValueError, match=message):
            open_table(real.uri, **wrong)
    with pytest.raises(ValueError, match="exists already, for version 1"):
        real.tag("curated-1")
    with pytest.raises(ValueError, match="only letters"):
        real.tag("a/b")


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("labl = 1", "No field named labl"),
        ("label = ", "parsing"),
        ("label = 'benign'", "could not convert"),
        ("nofunction(label) = 1", "nofunction"),
    ],
)
def test_a_bad_filter_is_explained_with_the_columns_there_are(real, filter, message):
    for ask in (real.read, real.query, real.count):
        with pytest.raises(ValueError, match=f"(?s){message}.*columns: image_id, dataset") as caught:
            ask(filter=filter)
        assert ".rs:" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        list(real.batches(filter=filter))


def test_an_unknown_column_is_named(real):
    for ask in (
        lambda: real.read(["nope"]),
        lambda: real.query(columns=["nope"]),
        lambda: list(real.batches(["nope"])),
    ):
        with pytest.raises(ValueError, match=r"column\(s\) 'nope' not in .*columns: image_id"):
            ask()


def test_nearest_ranks_by_cosine(real):
    found = real.nearest(unit(5) * 3, k=4, columns=["image_id"])
    expected = real.read(["image_id", "embedding"])
    vectors = np.array(expected["embedding"].to_pylist())
    order = np.argsort(-(vectors @ unit(5)))[:4]
    assert found["image_id"].to_pylist() == [expected["image_id"][int(i)].as_py() for i in order]
    np.testing.assert_allclose(found["similarity"], np.sort(vectors @ unit(5))[::-1][:4], atol=1e-6)


def test_nearest_filters_before_it_searches(real):
    found = real.nearest(unit(5), k=10, filter="label = 0", columns=["label", "similarity"])
    assert found["label"].to_pylist() == [0] * 10


@pytest.mark.parametrize("vector", [np.ones(DIM + 1), np.zeros(DIM), np.full(DIM, np.nan)])
def test_nearest_refuses_a_vector_of_another_embedder(real, vector):
    with pytest.raises(ValueError, match=f"vector of {DIM} numbers"):
        real.nearest(vector)


def test_before_curation_the_streams_verdict_is_the_effective_one(synthetic):
    assert "accepted" not in synthetic.schema.names
    found = synthetic.query("NOT accepted", columns=["request_index", "accepted", "reject_reason"])
    assert found["request_index"].to_pylist() == [3, 7, 11, 15, 19]
    assert set(found["reject_reason"].to_pylist()) == {"blank_image"}
    assert synthetic.count("reject_reason = 'blank_image'") == 5
    assert {"accepted", "reject_reason"} <= set(synthetic.query(limit=1).column_names)


def test_after_curation_its_verdict_replaces_the_streams_and_new_rows_keep_theirs(synthetic):
    ids = dict(zip(synthetic.read()["request_index"].to_pylist(), synthetic.read()["request_id"].to_pylist()))
    values = pa.table(
        {
            "request_id": [ids[0], ids[3]],
            "accepted": [False, True],
            "reject_reason": pa.array(["duplicate_of_synthetic", None], pa.string()),
        }
    )
    curated = synthetic.write_columns(values, "request_id")
    rejected = curated.query("NOT accepted", columns=["request_index", "reject_reason"]).to_pydict()
    assert rejected["request_index"] == [0, 7, 11, 15, 19]
    assert rejected["reject_reason"] == ["duplicate_of_synthetic"] + ["blank_image"] * 4
    assert curated.count("accepted") == 15
    assert curated.read(["accepted"], "request_index = 7")["accepted"].to_pylist() == [None]  # as stored


def test_text_that_looks_like_a_verdict_is_left_alone(synthetic):
    assert synthetic.count("prompt <> 'accepted' AND `accepted`") == 15
    assert synthetic.count("stream_reject_reason IS NULL") == 15


def test_a_key_of_a_map_can_be_asked_for(synthetic, real):
    assert synthetic.count("scores['contrast'] > 0.145") == 5
    assert synthetic.count("scores['none'] IS NULL AND weights['unet'] = 'w'") == 20
    assert real.count("attributes['echogenicity'] = 'hypoechoic'") == 20
    assert real.count("source_path = 'attributes[x]'") == 0


def test_a_misspelt_verdict_is_recognised(synthetic):
    with pytest.raises(ValueError, match=r"No field named acceptd.*did you mean 'accepted'\?"):
        synthetic.query("acceptd")


def test_query_streams_what_it_reads_at_once(synthetic):
    for columns in (None, ["accepted", "request_id"]):
        streamed = pa.Table.from_batches(synthetic.query_batches("accepted", columns=columns, batch_size=4))
        whole = synthetic.query("accepted", columns=columns)
        assert streamed.to_pydict() == whole.to_pydict()
        assert synthetic.query_schema(columns).names == whole.column_names


def test_metadata_set_by_several_jobs_at_once_is_all_kept(synthetic):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: open_table(synthetic.uri).set_metadata({f"plan.{i}": str(i)}), range(8)))
    assert {f"plan.{i}": str(i) for i in range(8)}.items() <= open_table(synthetic.uri).metadata.items()


def test_an_error_of_the_source_is_raised_as_it_is(tmp_path):
    def batches():
        yield from real_samples(3).to_batches()
        raise KeyError("image 7 is truncated")

    with pytest.raises(KeyError, match="image 7 is truncated"):
        write_table(str(tmp_path / "x.lance"), batches(), real_schema(DIM))


@pytest.mark.parametrize(
    "text",
    [
        "label = 0) OR (true",
        "(label = 0",
        "true) -- (",
        "true -- ",
        "label = 0 /* x */",
        "label = 0; x",
        "label = 0 x",
    ],
)
def test_a_filter_that_is_not_whole_is_refused(tmp_path: Path, text: str) -> None:
    """Lance ignores what follows a complete expression; joined to a guard it would undo that."""
    table = synthetic_table(tmp_path)
    with pytest.raises(ValueError, match="filter|Lance|parsing|Query"):
        table.count(text)


def test_brackets_and_marks_inside_literals_are_no_brackets(tmp_path: Path) -> None:
    table = synthetic_table(tmp_path)
    assert table.count("label_name = ')--;/*' OR label_name = '('") == 0
