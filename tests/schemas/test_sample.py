"""Rows survive the way through Arrow and Lance unchanged."""

from pathlib import Path

import lance
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.sample import (
    RealSample,
    SyntheticSample,
    curation_schema,
    real_schema,
    synthetic_schema,
    table_of,
)

DIM = 4
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
embeddings = st.tuples(*[floats] * DIM)
text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
maybe_text = st.none() | text
int32 = st.integers(0, 2**31 - 1)

real_samples = st.builds(
    RealSample,
    image_id=text, dataset=text, source_path=text, patient_id=maybe_text, group_id=text,
    split=st.sampled_from(["train", "val", "test"]), label=int32, label_name=text, image=st.binary(),
    mask=st.none() | st.binary(), height=int32, width=int32, photometric=text, pixel_spacing=st.none() | floats,
    device=maybe_text, has_marks=st.booleans(), attributes=st.dictionaries(text, text, max_size=3), licence=text,
    allowed_use=text, embedding=embeddings,
)  # fmt: skip
synthetic_samples = st.builds(
    SyntheticSample,
    request_id=text, plan_id=text, request_index=st.integers(0, 2**63 - 1), attempt=int32, recipe=text,
    fingerprint=text, weights=st.dictionaries(text, text, max_size=3), seed=st.integers(0, 2**63 - 1), label=int32,
    label_name=text, prompt=text, requested_mask=st.none() | st.binary(), mask=st.none() | st.binary(),
    image=st.binary(), height=int32, width=int32, licence=text, num_inference_steps=int32, guidance_scale=floats,
    batch_size=int32, embedding=embeddings, scores=st.dictionaries(text, floats, max_size=3),
    stream_reject_reason=maybe_text, code_version=text,
)  # fmt: skip


@given(st.lists(real_samples, max_size=3))
def test_real_rows_round_trip(samples: list[RealSample]) -> None:
    table = table_of(samples, real_schema(DIM))
    assert table.schema.equals(real_schema(DIM), check_metadata=True)
    assert [RealSample.from_row(row) for row in table.to_pylist()] == samples


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(samples=st.lists(synthetic_samples, min_size=1, max_size=3))
def test_synthetic_rows_round_trip_through_lance(samples: list[SyntheticSample], tmp_path: Path) -> None:
    uri = str(tmp_path / "table.lance")
    lance.write_dataset(table_of(samples, synthetic_schema(DIM)), uri, mode="overwrite")
    rows = lance.dataset(uri).to_table().to_pylist()
    assert [SyntheticSample.from_row(row) for row in rows] == samples


SAMPLE = RealSample(
    image_id="a", dataset="d", source_path="a.png", group_id="g", split="train", label=0, label_name="benign",
    image=b"", mask=None, height=1, width=1, licence="none", allowed_use="any", embedding=(0.0,) * DIM,
)  # fmt: skip


def test_every_field_says_what_it_is() -> None:
    for schema in (real_schema(DIM), synthetic_schema(DIM), curation_schema()):
        assert all(field.metadata[b"description"] for field in schema)


def test_curation_columns_are_nullable() -> None:
    assert all(field.nullable for field in curation_schema())


def test_unknown_split_and_missing_column_are_refused() -> None:
    with pytest.raises(ValueError, match="split 'holdout'"):
        RealSample.from_row({**SAMPLE.to_row(), "split": "holdout"})
    row = SAMPLE.to_row()
    del row["licence"]
    with pytest.raises(ValueError, match="licence"):
        RealSample.from_row(row)


def test_an_embedding_of_another_dimension_is_refused() -> None:
    sample = RealSample.from_row({**SAMPLE.to_row(), "embedding": [0.0] * (DIM + 1)})
    with pytest.raises((pa.ArrowInvalid, ValueError)):
        table_of([sample], real_schema(DIM))
