"""Keeping a large table fast: fewer and larger fragments, indexes for questions, old versions and orphans removed.

None of it changes what the table says. Nobody may write meanwhile: the lease of every plan in the table is held.
"""

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass

import lance
import pyarrow as pa

from factory.storage.errors import storage_faults
from factory.storage.lease import take_lease
from factory.storage.location import StorageOptions
from factory.storage.table import Table, open_table

FRAGMENT_BYTES = 512 << 20
"""Size that compaction aims at: large enough for fast scans, small enough to rewrite in seconds."""
SCALAR_INDEXES = {
    "request_id": "BTREE",
    "plan_id": "BITMAP",
    "image_id": "BTREE",
    "label_name": "BITMAP",
    "recipe": "BITMAP",
    "split": "BITMAP",
    "stream_reject_reason": "BITMAP",
    "reject_reason": "BITMAP",
    "accepted": "BITMAP",
}
"""Columns that questions filter by, and the index that suits each."""
VECTOR_INDEX_ROWS = 20_000
"""Below this, looking at every embedding is as fast and always exact."""


@dataclass(frozen=True, kw_only=True)
class Maintenance:
    """What was done.

    Attributes:
        fragments_before, fragments_after: data fragments of the table.
        indexed: columns with an index.
        bytes_removed: of old versions, and of files that no version names.
        versions_removed: old versions without a tag.
    """

    fragments_before: int
    fragments_after: int
    indexed: tuple[str, ...]
    bytes_removed: int
    versions_removed: int


def maintain(
    uri: str,
    *,
    run_id: str,
    compact: bool = True,
    index: bool = True,
    clean_older_than: datetime.timedelta | None = None,
    vector_index_rows: int = VECTOR_INDEX_ROWS,
    storage_options: StorageOptions = None,
) -> Maintenance:
    """Compact, index and clean a table, each where asked for.

    Args:
        uri: a real or synthetic table.
        run_id: of this job; written into the leases.
        compact: merge small fragments into fragments of about 512 MiB.
        index: make the indexes of `SCALAR_INDEXES` anew, and one of the embeddings from `vector_index_rows` rows.
        clean_older_than: remove versions older than this that have no tag, and files of that age that no version
            names, such as those of a killed job; None removes nothing.
        vector_index_rows: see `index`.
        storage_options: of an object store.

    Raises:
        FileNotFoundError: there is no such table.
        LeaseHeld: a job is writing to the table.
    """
    table = open_table(uri, storage_options=storage_options)
    with _nobody_writes(table, run_id), storage_faults(uri, "maintain"):
        dataset = open_table(uri, storage_options=storage_options).dataset
        before = len(dataset.get_fragments())
        if compact:
            dataset.optimize.compact_files(target_rows_per_fragment=_target_rows(dataset))
            dataset = open_table(uri, storage_options=storage_options).dataset
        indexed = _make_indexes(dataset, vector_index_rows) if index else ()
        removed = None
        if clean_older_than is not None:
            dataset = open_table(uri, storage_options=storage_options).dataset
            removed = dataset.cleanup_old_versions(clean_older_than, error_if_tagged_old_versions=False)
        after = open_table(uri, storage_options=storage_options).dataset
    return Maintenance(
        fragments_before=before,
        fragments_after=len(after.get_fragments()),
        indexed=indexed,
        bytes_removed=0 if removed is None else removed.bytes_removed,
        versions_removed=0 if removed is None else removed.old_versions,
    )


@contextlib.contextmanager
def _nobody_writes(table: Table, run_id: str) -> Iterator[None]:
    """Holds the lease of every plan that the table knows."""
    plans = sorted(
        name.removeprefix("plan.")
        for name in table.metadata
        if name.startswith("plan.") and name.count(".") == 1
    )
    with contextlib.ExitStack() as stack:
        for plan_id in plans:
            lease = take_lease(table.uri, plan_id, run_id=run_id, storage_options=table.storage_options)
            stack.callback(lease.release)
        yield


def _target_rows(dataset: lance.LanceDataset) -> int:
    """Rows that make about `FRAGMENT_BYTES`."""
    rows = dataset.count_rows()
    stored = sum(
        file.file_size_bytes or 0 for fragment in dataset.get_fragments() for file in fragment.metadata.files
    )
    per_row = max(1, stored // max(1, rows))
    return max(1024, FRAGMENT_BYTES // per_row)


def _make_indexes(dataset: lance.LanceDataset, vector_index_rows: int) -> tuple[str, ...]:
    done = []
    for column, kind in SCALAR_INDEXES.items():
        if column in dataset.schema.names:
            dataset.create_scalar_index(column, kind, replace=True)
            done.append(column)
    rows = dataset.count_rows()
    field = dataset.schema.field("embedding") if "embedding" in dataset.schema.names else None
    if field is not None and pa.types.is_fixed_size_list(field.type) and rows >= vector_index_rows:
        partitions = max(2, round(rows**0.5))
        dataset.create_index(
            "embedding", "IVF_FLAT", metric="cosine", num_partitions=partitions, replace=True
        )
        done.append("embedding")
    return tuple(done)
