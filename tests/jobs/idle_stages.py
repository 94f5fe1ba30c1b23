"""Stages that compute nothing, for tests of the stream itself: the real source, pools, writers and committer around them."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from factory.synthesis.stages import PIXEL_SCHEMA, stream_schema
from schemas.request import SynthesisPlan

DIM = 8
LABELS = ("benign", "malignant")
PLAN = SynthesisPlan(recipe="tiny", fingerprint="idle", weights={"none": "0"}, real_digest="0", labels=LABELS)
WAIT_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class IdleRequests:
    """Requests without masks and prompts."""

    plan: SynthesisPlan

    def __call__(self, indices: np.ndarray) -> pa.Table:
        ids = [self.plan.request_at(int(index)).request_id for index in indices]
        known = {"request_index": pa.array(indices, pa.int64()), "request_id": pa.array(ids)}
        columns = [known.get(field.name, pa.nulls(len(ids), field.type)) for field in PIXEL_SCHEMA]
        return pa.table(columns, schema=PIXEL_SCHEMA)


@dataclass(frozen=True, kw_only=True)
class IdleSynthesizer:
    """Takes no time, but for the batch with request 0, which is made when the file `until` is there.

    Attributes:
        until: file to wait for; "" waits for nothing.
    """

    until: str = ""

    def stage(self, plan: SynthesisPlan, intents: Any = None) -> "IdleSynthesizer":
        return self

    def __call__(self, requests: pa.Table) -> pa.Table:
        started = time.time()
        if self.until and 0 in requests["request_index"].to_pylist():
            while not Path(self.until).exists() and time.time() - started < WAIT_SECONDS:
                time.sleep(0.1)
        for name, value in (("started", started), ("seconds", 0.01)):
            place = requests.schema.get_field_index(name)
            column = pa.array([value] * requests.num_rows, requests.schema.field(name).type)
            requests = requests.set_column(place, name, column)
        return requests


@dataclass(frozen=True, kw_only=True)
class IdleFinish:
    """Rows whose image is `image_bytes` of noise."""

    plan: SynthesisPlan
    image_bytes: int = 8

    def stage(self) -> "IdleFinish":
        return self

    def __call__(self, pixels: pa.Table) -> pa.Table:
        rows = []
        for item in pixels.select(["request_index", "seconds", "started"]).to_pylist():
            request = self.plan.request_at(item["request_index"])
            image = np.random.default_rng(item["request_index"]).bytes(self.image_bytes)
            rows.append(
                {
                    "request_id": request.request_id, "plan_id": self.plan.plan_id, "recipe": "tiny", "image": image,
                    "request_index": request.request_index, "attempt": request.attempt, "label": request.label_index,
                    "label_name": request.label, "fingerprint": "idle", "weights": [("none", "0")], "seed": 0,
                    "height": 1, "width": 1, "split": "train", "num_inference_steps": 1, "guidance_scale": 1.0,
                    "embedding": [1.0] + [0.0] * (DIM - 1), "code_version": "idle", "derived": False,
                    "licence": "none", "source_parameters": "{}", "batch_size": pixels.num_rows, "scores": [],
                    "prompt": "", "seconds": item["seconds"], "started": item["started"],
                }
            )  # fmt: skip
        return pa.Table.from_pylist(rows, schema=stream_schema(DIM))
