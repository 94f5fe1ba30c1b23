"""Rows, plans and tables for the storage tests: real schemas, small random pictures."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from factory.imaging import encode_png
from factory.storage import Table, create_table
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

DIM = 8
LABELS = ("benign", "malignant")
METADATA = {"class_names": '["benign", "malignant"]', "embedder": f'{{"name": "tiny", "dim": {DIM}}}'}


def plan_of(seed: int = 0) -> SynthesisPlan:
    """A plan; another seed is another plan."""
    return SynthesisPlan(
        recipe="tiny", fingerprint="f" * 32, weights={"unet": "w"}, real_digest="r", seed=seed, labels=LABELS
    )


def unit(index: int) -> np.ndarray:
    """A unit-norm embedding (DIM,) float32 that differs by index."""
    vector = np.random.default_rng(index).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def picture(size: int = 16) -> bytes:
    """A PNG of random pixels that no other call gives."""
    return encode_png(np.frombuffer(os.urandom(size * size), np.uint8).reshape(size, size))


def square_mask(size: int = 16) -> bytes:
    """A PNG label map with a square lesion."""
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : size // 2, size // 4 : size // 2] = 1
    return encode_png(mask)


def synthetic_rows(plan: SynthesisPlan, indices: np.ndarray | list[int], image_size: int = 16) -> pa.Table:
    """One row per request index; every fourth is rejected by the stream as blank."""
    samples = []
    for index in np.asarray(indices).tolist():
        request = plan.request_at(index)
        samples.append(
            SyntheticSample(
                request_id=request.request_id,
                plan_id=plan.plan_id,
                request_index=index,
                attempt=request.attempt,
                recipe=plan.recipe,
                fingerprint=plan.fingerprint,
                weights=dict(plan.weights),
                seed=plan.seed,
                label=request.label_index,
                label_name=request.label,
                prompt="",
                requested_mask=square_mask(),
                mask=square_mask(),
                image=picture(image_size),
                height=image_size,
                width=image_size,
                licence="CC0",
                num_inference_steps=4,
                guidance_scale=1.0,
                batch_size=4,
                embedding=tuple(unit(index).tolist()),
                scores={"contrast": index / 100},
                stream_reject_reason="blank_image" if index % 4 == 3 else None,
                code_version="0",
            )
        )
    return table_of(samples, synthetic_schema(DIM))


def synthetic_table(folder: Path, name: str = "synthetic.lance") -> Table:
    """An empty table of synthetic rows."""
    return create_table(str(folder / name), synthetic_schema(DIM), metadata=METADATA)


def real_samples(count: int) -> pa.Table:
    """Real rows whose splits go round train, train, val, test."""
    samples = [
        RealSample(
            image_id=f"{index:032x}",
            dataset="phantom",
            source_path=f"images/{index} (a).png",
            group_id=f"g{index}",
            split=("train", "train", "val", "test")[index % 4],
            label=index % 2,
            label_name=LABELS[index % 2],
            image=picture(),
            mask=square_mask() if index % 3 else None,
            height=16,
            width=16,
            attributes={"echogenicity": "hypoechoic"},
            licence="CC0",
            allowed_use="any",
            embedding=tuple(unit(index).tolist()),
        )
        for index in range(count)
    ]
    return table_of(samples, real_schema(DIM))
