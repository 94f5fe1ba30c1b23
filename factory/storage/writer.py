"""What a write task does: rows become one data file, and one record of it in the ledger.

Nothing becomes visible here; the committer makes it so. A task may be run again at any time: each call
writes a new data file, and the record of the same requests of the same run replaces the earlier one.
"""

import dataclasses
import json
import time
from collections import Counter
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from factory.storage.errors import DuplicateRequests, TableDamaged, reliably, table_gone
from factory.storage.files import Files, files_at, sync
from factory.storage.ledger import Ledger
from factory.storage.location import StorageOptions, lance_options, local_path
from factory.storage.verdicts import STREAM_VERDICT
from schemas.identity import hash_parts

RECORDS = "records"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FragmentRecord:
    """One written, not yet committed fragment.

    Attributes:
        plan_id: the plan its rows belong to.
        run_id: the run of the job that wrote it.
        request_indices: index of every row within the plan, in row order.
        request_ids: id of every row, in row order.
        num_rows: rows in the data file.
        fragment: Lance's metadata of the fragment, as plain JSON data.
        rejected: number of rows per stream_reject_reason.
        seconds: time it took to write.
    """

    plan_id: str
    run_id: str
    request_indices: tuple[int, ...]
    request_ids: tuple[str, ...]
    num_rows: int
    fragment: dict[str, Any]
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        counts = {len(self.request_ids), len(self.request_indices), self.num_rows}
        if len(counts) != 1 or self.fragment.get("physical_rows") != self.num_rows:
            raise TableDamaged(
                f"record of run {self.run_id}: {len(self.request_ids)} ids, {len(self.request_indices)} indices, "
                f"{self.num_rows} rows, {self.fragment.get('physical_rows')} rows in the data file"
            )

    @property
    def name(self) -> str:
        """File name in the ledger: the same for the same requests of the same run."""
        return f"{self.run_id}-{hash_parts(*sorted(self.request_ids))}.json"

    @property
    def accepted(self) -> int:
        """Rows that the stream's filters accept."""
        return self.num_rows - sum(self.rejected.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FragmentRecord":
        """The inverse of `to_dict`."""
        lists = {name: tuple(values[name]) for name in ("request_indices", "request_ids")}
        return cls(**{**values, **lists})

    def to_json(self) -> str:
        """One string, for a column that carries records from the write tasks to the driver."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "FragmentRecord":
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def write_fragment(
    uri: str, rows: pa.Table, *, run_id: str, storage_options: StorageOptions = None
) -> FragmentRecord:
    """Write `rows` of one plan as one fragment of the table at `uri`, and its record in the ledger.

    Args:
        rows: at least one row of the table's stream schema, all of one plan, no request twice.
        run_id: of this run of the job; letters, digits, '-' and '_'.

    Raises:
        DuplicateRequests: a request_id or request_index stands twice in `rows`.
        ValueError: no rows, rows of several plans, or columns that do not fit the table.
        StorageFull, StorageFailed, StorageUnreachable, PermissionError: nothing was recorded; the rows count as not
            made.
    """
    started = time.monotonic()
    plan_id, ids, indices = _checked(rows)
    if not run_id or not all(c.isalnum() or c in "-_" for c in run_id):
        raise ValueError(f"run_id {run_id!r}: only letters, digits, '-' and '_' may be used")
    options = lance_options(storage_options)
    try:
        dataset = reliably(uri, "open", lambda: lance.dataset(uri, storage_options=options))
    except ValueError as fault:
        if "was not found" not in str(fault):
            raise
        raise table_gone(uri, "write a fragment of") from fault
    ledger = Ledger(uri, plan_id, storage_options=storage_options, dataset=dataset)
    fragment = _write_data_file(uri, dataset, rows)
    record = FragmentRecord(
        plan_id=plan_id,
        run_id=run_id,
        request_indices=tuple(indices.tolist()),
        request_ids=tuple(ids),
        num_rows=rows.num_rows,
        fragment=fragment.to_json(),
        rejected=_rejected(rows),
        seconds=time.monotonic() - started,
    )
    write_record(ledger, record)
    return record


def write_record(ledger: Ledger, record: FragmentRecord) -> None:
    """Put `record` into the ledger, durably."""
    ledger.put(RECORDS, record.name, record.to_dict())


def data_files(uri: str, storage_options: StorageOptions = None) -> Files:
    """The files that hold the rows of the table at `uri`."""
    return files_at(f"{str(uri).rstrip('/')}/data", str(uri), storage_options)


def missing_data_file(files: Files, record: FragmentRecord) -> str | None:
    """Why the data of `record` cannot be committed: a file is missing or has another size. None if it can.

    Lance commits a fragment whose file is gone, and the table is then unreadable.
    """
    for item in record.fragment["files"]:
        name, size = item["path"], files.size(item["path"])
        if size is None:
            return f"data file {name} is missing"
        if size != item["file_size_bytes"]:
            return f"data file {name} has {size} bytes, not {item['file_size_bytes']}"
    return None


def _checked(rows: pa.Table) -> tuple[str, list[str], np.ndarray]:
    if rows.num_rows == 0:
        raise ValueError("rows: a fragment needs at least one row")
    plans = set(rows["plan_id"].to_pylist())
    if len(plans) != 1:
        raise ValueError(f"rows: one plan per fragment, got {len(plans)} plans")
    ids = rows["request_id"].to_pylist()
    indices = rows["request_index"].to_numpy()
    for name, values in (("request_id", ids), ("request_index", indices.tolist())):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise DuplicateRequests(f"rows: {name} {twice[0]} stands twice in one fragment")
    return plans.pop(), ids, indices


def _write_data_file(
    uri: str, dataset: lance.LanceDataset, rows: pa.Table
) -> lance.fragment.FragmentMetadata:
    schema = _stored_schema(uri, dataset.schema, rows)
    rows = rows.cast(schema)

    def write() -> list[lance.fragment.FragmentMetadata]:
        """Each try makes a data file of its own; one that was written in vain is an orphan."""
        return lance.fragment.write_fragments(
            rows, dataset, schema=schema, mode="append", max_rows_per_file=max(rows.num_rows, 1)
        )

    fragments = reliably(uri, "write a fragment of", write)
    root = local_path(uri)
    if root is not None:
        for fragment in fragments:
            for item in fragment.files:
                sync(root / "data" / str(item.path))
        sync(root / "data")
    if len(fragments) != 1 or fragments[0].num_rows != rows.num_rows:
        written = [fragment.num_rows for fragment in fragments]
        raise TableDamaged(f"{uri}: {rows.num_rows} rows were to be written, data files have {written}")
    return fragments[0]


def _stored_schema(uri: str, stored: pa.Schema, rows: pa.Table) -> pa.Schema:
    """The table's fields that `rows` have; only nullable ones may be absent."""
    extra = [name for name in rows.column_names if name not in stored.names]
    missing = [field.name for field in stored if not field.nullable and field.name not in rows.column_names]
    if extra or missing:
        raise ValueError(f"{uri}: columns missing from the rows: {missing}; not in the table: {extra}")
    nulls = [name for name in rows.column_names if not stored.field(name).nullable and rows[name].null_count]
    if nulls:
        raise ValueError(f"{uri}: null in column(s) {', '.join(nulls)}, which may not be null")
    return pa.schema([stored.field(name) for name in rows.column_names])


def _rejected(rows: pa.Table) -> dict[str, int]:
    if STREAM_VERDICT not in rows.column_names:
        return {}
    reasons = Counter(reason for reason in rows[STREAM_VERDICT].to_pylist() if reason is not None)
    return dict(sorted(reasons.items()))
