"""What curation reads of its two tables: everything but pixels, ordered by id so that row order changes nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from factory.storage import Table


@dataclass(frozen=True, kw_only=True, eq=False)
class RealRows:
    """Rows of one split by image_id: ids, groups, class names, embeddings (n, D); the version read."""

    image_ids: list[str]
    groups: list[str]
    labels: list[str]
    embeddings: np.ndarray
    version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticRows:
    """Rows by request_id: what verdicts need, without pixels.

    `embeddings` (N, D) float32 are in memory, or mapped from a file where there are many.
    """

    request_ids: list[str]
    indices: np.ndarray
    labels: list[str]
    stream_reasons: list[str | None]
    quality: np.ndarray
    groups: list[str | None]
    embeddings: np.ndarray


def _vectors(column: pa.Array, dim: int) -> np.ndarray:
    return column.flatten().to_numpy().reshape(-1, dim).astype(np.float32)


def read_real(table: "Table", split: Literal["train", "val"] = "train") -> RealRows:
    """The rows of a split.

    Raises:
        ValueError: there is none.
    """
    dim = table.schema.field("embedding").type.list_size
    image_ids: list[str] = []
    groups: list[str] = []
    labels: list[str] = []
    vectors = [np.empty((0, dim), np.float32)]
    names = ["image_id", "group_id", "label_name", "embedding"]
    for batch in table.batches(names, filter=f"split = '{split}'"):
        image_ids += batch.column("image_id").to_pylist()
        groups += batch.column("group_id").to_pylist()
        labels += batch.column("label_name").to_pylist()
        vectors.append(_vectors(batch.column("embedding"), dim))
    if not image_ids:
        raise ValueError(f"--real {table.uri} has no rows of split {split}")
    order = np.argsort(image_ids, kind="stable")
    return RealRows(
        image_ids=[image_ids[k] for k in order],
        groups=[groups[k] for k in order],
        labels=[labels[k] for k in order],
        embeddings=np.concatenate(vectors)[order],
        version=table.version,
    )


def read_synthetic(table: "Table", embeddings_file: Path | None = None) -> SyntheticRows:
    """All rows, ordered by request_id.

    Args:
        table: a synthetic table.
        embeddings_file: a .npy file to write the embeddings to as they are read, so that they are never all in
            memory; None: they are.
    """
    names = ("request_id", "request_index", "label_name", "stream_reject_reason", "derived", "group_id")
    values: dict[str, list[Any]] = {name: [] for name in names}
    quality = []
    for batch in table.batches([*names, "scores"], batch_size=1 << 14):
        for name in names:
            values[name] += batch.column(name).to_pylist()
        # How far inside the band of real similarities; where the band was off, rows are equally good.
        positions = [dict(s or ()).get("similarity_position") for s in batch.column("scores").to_pylist()]
        quality += [np.nan if p is None else -abs(p - 0.5) for p in positions]
    order = np.argsort(np.array(values["request_id"], dtype=str), kind="stable")
    groups = [g if d else None for g, d in zip(values["group_id"], values["derived"])]
    return SyntheticRows(
        request_ids=[values["request_id"][k] for k in order],
        indices=np.array(values["request_index"], np.int64)[order],
        labels=[values["label_name"][k] for k in order],
        stream_reasons=[values["stream_reject_reason"][k] for k in order],
        quality=np.array(quality, np.float64)[order],
        groups=[groups[k] for k in order],
        embeddings=_read_embeddings(table, order, embeddings_file),
    )


def _read_embeddings(table: "Table", order: np.ndarray, path: Path | None) -> np.ndarray:
    """Embeddings with row `order[k]` of the table at place k, float32 (N, D)."""
    shape = (len(order), table.schema.field("embedding").type.list_size)
    if path is None or not len(order):
        target = np.empty(shape, np.float32)
    else:
        target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    start = 0
    for batch in table.batches(["embedding"], batch_size=1 << 14):
        target[place[start : start + len(batch)]] = _vectors(batch.column("embedding"), shape[1])
        start += len(batch)
    if isinstance(target, np.memmap):
        target.flush()  # other processes map the file
    return target
