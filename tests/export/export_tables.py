"""A small synthetic table with curated verdicts, and the real table it belongs to; made row by row."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from factory.imaging import encode_png
from factory.storage import TestAccess, open_table, write_table
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

ACCESS = TestAccess(opened_by="tests", reason="the whole table")
DIM = 4
HOSTILE = "../../etc/passwd"
LABELS = ("benign", HOSTILE)
PLAN = SynthesisPlan(recipe="tiny", fingerprint="f1", weights={"unet": "w1"}, real_digest="r", labels=LABELS)
NUM_SYNTHETIC = 60
NUM_REAL = 30
SIZE = 16
VECTOR = (1.0, 0.0, 0.0, 0.0)
STREAM_REJECTED = range(9, NUM_SYNTHETIC, 10)
NEAR_COPIES = (0, 1)
OF_VAL_BACKGROUND = (3,)
WITHOUT_MASK = (12, 13)


def pixels(number: int, size: int = SIZE) -> np.ndarray:
    """Noise that belongs to one row: uint8 (size, size)."""
    return np.random.default_rng(number).integers(0, 256, (size, size), np.uint8)


def two_lesions(size: int = SIZE) -> np.ndarray:
    """A square and an L, apart: uint8 (size, size)."""
    mask = np.zeros((size, size), np.uint8)
    mask[0:3, 0:4] = 1
    mask[8:14, 8:10] = 1
    mask[12:14, 8:15] = 1
    return mask


def synthetic_sample(index: int) -> SyntheticSample:
    """Row `index`; every fifth is derived from a real background."""
    request = PLAN.request_at(index)
    is_derived = index % 5 == 3
    return SyntheticSample(
        request_id=request.request_id,
        plan_id=PLAN.plan_id,
        request_index=index,
        attempt=0,
        recipe="tiny",
        fingerprint="f1",
        weights={"unet": "w1"},
        seed=7,
        label=request.label_index,
        label_name=request.label,
        prompt="an image",
        requested_mask=None,
        mask=None if index in WITHOUT_MASK else encode_png(two_lesions()),
        image=encode_png(pixels(index)),
        height=SIZE,
        width=SIZE,
        background_id="b" if is_derived else None,
        derived=is_derived,
        split="val" if index in OF_VAL_BACKGROUND else "train",
        group_id="patient-secret" if is_derived else None,
        licence="CC-BY-4.0",
        num_inference_steps=4,
        guidance_scale=1.5,
        batch_size=4,
        embedding=VECTOR,
        scores={"contrast": index / 10},
        stream_reject_reason="blank_image" if index in STREAM_REJECTED else None,
        code_version="0",
    )


def real_sample(index: int) -> RealSample:
    """Row `index`: 18 train, 6 val, 6 test; every third has the second label; sizes differ."""
    return RealSample(
        image_id=f"{index:032x}",
        dataset="phantom",
        source_path=f"{index}.png",
        patient_id=f"patient-secret-{index}",
        group_id=f"patient-secret-{index}",
        split=("train", "train", "train", "val", "test")[index % 5],
        label=int(index % 3 == 0),
        label_name=LABELS[int(index % 3 == 0)],
        image=encode_png(pixels(1000 + index, SIZE + index)),
        mask=encode_png(two_lesions(SIZE + index)),
        height=SIZE + index,
        width=SIZE + index,
        licence="CC0-1.0",
        allowed_use="research",
        embedding=VECTOR,
    )


def write_synthetic(path: Path, *, curated: bool = True, count: int = NUM_SYNTHETIC) -> str:
    """`synthetic.lance` below `path`; curated and tagged `curated-1` unless told otherwise."""
    schema = synthetic_schema(DIM)
    rows = [synthetic_sample(index) for index in range(count)]
    metadata = {"class_names": json.dumps(LABELS)}
    table = write_table(str(path / "synthetic.lance"), table_of(rows, schema), schema, metadata=metadata)
    if curated:
        reasons = [
            "near_copy_of_real" if index in NEAR_COPIES else row.stream_reject_reason
            for index, row in enumerate(rows)
        ]
        values = {
            "request_id": [row.request_id for row in rows],
            "accepted": [reason is None for reason in reasons],
            "reject_reason": pa.array(reasons, pa.string()),
        }
        table = table.write_columns(pa.table(values), "request_id")
        record = {
            "copy_thresholds": {"middle": 0.8, "lesion": 0.7},
            "power": {"num_images": 12, "detected": {"jpeg": 0.75}},
            "false_alarm": 0.02,
        }
        table.set_metadata({"curation.curated-1": json.dumps(record)})
        table.tag("curated-1")
    return table.uri


def write_real(path: Path) -> str:
    """`real.lance` below `path`."""
    schema = real_schema(DIM)
    rows = table_of([real_sample(index) for index in range(NUM_REAL)], schema)
    metadata = {
        "class_names": json.dumps(LABELS),
        "dataset": "phantom",
        "licence": "CC0-1.0",
        "allowed_use": "research",
        "citation": "A. Author, Phantoms, 2026",
    }
    return write_table(str(path / "real.lance"), rows, schema, metadata=metadata).uri


def stored_rows(uri: str, key: str) -> dict[str, dict]:
    """All rows of a table by id, read without the code under test."""
    return {row[key]: row for row in open_table(uri, test_access=ACCESS).read().to_pylist()}
