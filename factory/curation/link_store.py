"""Links of a curation, kept for the next one: a grown table is then searched for pairs with new rows only.

What is kept is every link between any two rows, rejected ones too, as a list of neighbours per row. A spanning forest
would be smaller and wrong: verdicts change between curations, and the links that join what is left once a row in the
middle is rejected are not in a forest. With all links, components of any set of rows are exact.

One Parquet file per set of thresholds, `links-<settings>-<content>.parquet`: request_id, a checksum of the embedding,
and the numbers of the later rows that it is linked to. A row counts as known where id and checksum agree.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.identity import hash_parts

MAX_LINKS = 20_000_000
"""Links kept: 320 MB while they are found, about half of that on disk. A table with more starts from scratch."""
_FILES_KEPT = 3
_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """What makes links comparable.

    Attributes:
        embedder: identity of the embedder.
        limits: class name → least cosine.
    """

    embedder: str
    limits: Mapping[str, float]

    @property
    def digest(self) -> str:
        """12 hex characters."""
        parts = [f"{name}={np.float32(value)!r}" for name, value in sorted(self.limits.items())]
        return hash_parts("links", _VERSION, self.embedder, *parts)[:12]


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownLinks:
    """Links of an earlier curation, in the row numbers of this one.

    Attributes:
        first, second: int64 (n,), first < second.
        known: bool (N,): all links between two such rows are given.
        exact: whether they were found by exact search throughout.
        note: why there are none; "" where there are.
    """

    first: np.ndarray
    second: np.ndarray
    known: np.ndarray
    exact: bool
    note: str = ""


def row_checksums(embeddings: np.ndarray, block_rows: int = 1 << 14) -> np.ndarray:
    """uint64 (N,): of the bits of each float32 row (D,)."""
    width = embeddings.shape[1]
    weights = np.random.default_rng(20260).integers(1 << 63, size=width, dtype=np.uint64) * 2 + 1
    sums = np.empty(len(embeddings), np.uint64)
    for start in range(0, len(embeddings), block_rows):
        rows = np.ascontiguousarray(embeddings[start : start + block_rows], np.float32)
        sums[start : start + block_rows] = (rows.view(np.uint32).astype(np.uint64) * weights).sum(axis=1)
    return sums


def load_links(
    folder: Path, settings: LinkSettings, request_ids: Sequence[str], checksums: np.ndarray
) -> KnownLinks:
    """What an earlier curation with the same settings found among these rows.

    Args:
        folder: where `save_links` wrote.
        settings: of this curation.
        request_ids: of the rows now, N, distinct.
        checksums: uint64 (N,), of their embeddings.
    """
    count = len(request_ids)
    paths = sorted(folder.glob("links-*.parquet"), key=lambda path: path.stat().st_mtime)
    fitting = [path for path in paths if path.name.startswith(f"links-{settings.digest}-")]
    if not fitting:
        why = "other thresholds or another embedder" if paths else ""
        return _nothing(count, f"links of an earlier curation are not used: {why}" if why else "")
    path = fitting[-1]
    try:
        stored = pq.read_table(path)
        ids, neighbours = stored["request_id"].combine_chunks(), stored["neighbours"].combine_chunks()
        sums = stored["checksum"].to_numpy()
        offsets = neighbours.offsets.to_numpy().astype(np.int64)
        second = neighbours.flatten().to_numpy().astype(np.int64)
        exact = (stored.schema.metadata or {})[b"exact"] == b"1"
    except (pa.ArrowException, OSError, KeyError) as fault:
        return _nothing(count, f"{path.name} cannot be read and is not used: {fault}")
    if path.stem.rpartition("-")[2] != _content(ids, sums, offsets, second, exact):
        return _nothing(count, f"{path.name} is damaged and is not used")
    where = pc.index_in(ids, value_set=pa.array(request_ids, pa.string())).fill_null(-1).to_numpy()
    same = where >= 0
    same[same] = checksums[where[same]] == sums[same]
    if not same.any():
        return _nothing(count, f"{path.name} is of other rows and is not used")
    first = np.repeat(np.arange(len(sums)), np.diff(offsets))
    both = same[first] & same[second]
    one, other = where[first[both]].astype(np.int64), where[second[both]].astype(np.int64)
    known = np.zeros(count, bool)
    known[where[same]] = True
    return KnownLinks(
        first=np.minimum(one, other), second=np.maximum(one, other), known=known, exact=exact, note=""
    )


def save_links(
    folder: Path,
    settings: LinkSettings,
    request_ids: Sequence[str],
    checksums: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    exact: bool,
) -> Path:
    """Write all links between the rows, whole or not at all; older files of the same settings are removed.

    Args:
        folder: made where it is not there.
        settings: that the links were found with.
        request_ids, checksums: of the rows, N.
        first, second: int64 (n,) row numbers, first < second.
        exact: whether they were found by exact search throughout.
    """
    order = np.lexsort((second, first))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(first, minlength=len(request_ids)))]).astype(
        np.int64
    )
    values = second[order].astype(np.int64)
    ids = pa.array(request_ids, pa.string())
    table = pa.table(
        {
            "request_id": ids,
            "checksum": pa.array(checksums, pa.uint64()),
            "neighbours": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
        }
    ).replace_schema_metadata({"exact": "1" if exact else "0"})
    folder.mkdir(parents=True, exist_ok=True)
    content = _content(ids, checksums, offsets, values, exact)
    target = folder / f"links-{settings.digest}-{content}.parquet"
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    try:
        pq.write_table(table, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    _remove_old(folder, target, settings)
    return target


def _remove_old(folder: Path, target: Path, settings: LinkSettings) -> None:
    others = [path for path in folder.glob("links-*.parquet") if path != target]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    same = [path for path in others if path.name.startswith(f"links-{settings.digest}-")]
    different = [path for path in others if path not in same]
    for path in (*same, *different[_FILES_KEPT - 1 :]):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _content(
    ids: pa.Array, checksums: np.ndarray, offsets: np.ndarray, values: np.ndarray, exact: bool
) -> str:
    digest = hashlib.blake2b(digest_size=6)
    digest.update(b"1" if exact else b"0")
    for part in (checksums.astype(np.uint64), offsets, values):
        digest.update(np.ascontiguousarray(part).tobytes())
    for text in ids.to_pylist():
        digest.update(text.encode())
    return digest.hexdigest()


def _nothing(count: int, note: str) -> KnownLinks:
    empty = np.empty(0, np.int64)
    return KnownLinks(first=empty, second=empty, known=np.zeros(count, bool), exact=True, note=note)
