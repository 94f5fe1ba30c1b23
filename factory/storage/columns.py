"""Curation columns: nullable columns written beside the images, never through them.

Lance's `merge_insert` and `update` rewrite whole rows, images included. Here an absent column is added as
nulls (metadata only), and each fragment gets one small data file with the new values
(`fragment.update_columns`, committed as `Update`): kilobytes for thousands of rows. Rows appended by a job
that runs meanwhile read as null.
"""

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.commit import CommitConflictError

from factory.storage.errors import storage_faults
from factory.storage.lease import take_lease
from factory.storage.table import Table, open_table

_TRIES = 10
_ROWS_AT_ONCE = 1 << 20


def write_columns(table: Table, values: pa.Table, key: str) -> Table:
    """Write the columns of `values` into the rows of the latest version that `values[key]` names.

    Rows that `values` does not name keep what they have; a null in `values` is written as null. One
    new version for the values, and one before it where columns had to be added. A second curation of the
    same table at the same time is refused.

    Args:
        table: any version of the table; the latest is written.
        values: column `key` (distinct, all present in the table) and the columns to write.
        key: a column that names rows: request_id, image_id.

    Returns:
        The table at the new version.

    Raises:
        ValueError: key repeated or not in the table, or a column that may not be null, or has another type.
        LeaseHeld: another curation of this table is running.
    """
    names = [name for name in values.column_names if name != key]
    _check_values(table, values, key, names)
    with storage_faults(table.uri, "curate"):
        lease = take_lease(table.uri, "curation", run_id="curation", storage_options=table.storage_options)
        try:
            for tries_left in reversed(range(_TRIES)):
                try:
                    return _write_once(table, values, key, names)
                except CommitConflictError as fault:
                    if not tries_left or "Retryable" not in str(fault):
                        raise
        finally:
            lease.release()
    raise AssertionError("unreachable")


def _write_once(table: Table, values: pa.Table, key: str, names: list[str]) -> Table:
    dataset = _latest(table).dataset
    places = _rows_by_fragment(dataset, values, key)
    matched = sum(len(rows) for _, rows in places)
    if matched != values.num_rows:
        unknown = values.num_rows - matched
        raise ValueError(f"{table.uri}: {unknown} of {values.num_rows} {key}(s) are not in the table")
    absent = [
        values.schema.field(name).with_nullable(True) for name in names if name not in dataset.schema.names
    ]
    if absent:
        dataset.add_columns(pa.schema(absent))
        dataset = _latest(table).dataset
    typed = pa.schema([values.schema.field(key), *(dataset.schema.field(name) for name in names)])
    values = values.select([key, *names]).cast(typed).combine_chunks()  # take() is slow on many chunks
    updated, modified = [], set()
    for fragment_id, rows in places:
        fragment = dataset.get_fragment(fragment_id)
        if fragment is None:
            raise CommitConflictError(f"{table.uri}: Retryable: fragment {fragment_id} was compacted")
        metadata, fields = fragment.update_columns(values.take(rows), left_on=key, right_on=key)
        updated.append(metadata)
        modified.update(fields)
    if updated:
        operation = lance.LanceOperation.Update(updated_fragments=updated, fields_modified=sorted(modified))
        lance.LanceDataset.commit(dataset, operation, read_version=dataset.version)
    return _latest(table)


def _rows_by_fragment(
    dataset: lance.LanceDataset, values: pa.Table, key: str
) -> list[tuple[int, pa.ChunkedArray]]:
    """Fragment id, and which rows of `values` it holds, for each fragment concerned."""
    found = []
    value_set = values[key].combine_chunks()
    group: list[lance.LanceFragment] = []
    rows_in_group = 0
    fragments = dataset.get_fragments()
    for position, fragment in enumerate(fragments):
        group.append(fragment)
        rows_in_group += fragment.count_rows()
        if rows_in_group < _ROWS_AT_ONCE and position + 1 < len(fragments):
            continue
        keys = [f.to_table(columns=[key])[key] for f in group]
        where = pc.index_in(pa.chunked_array([c for k in keys for c in k.chunks], keys[0].type), value_set)
        start = 0
        for member, part in zip(group, keys, strict=True):
            rows = where.slice(start, len(part)).drop_null()
            start += len(part)
            if len(rows):
                found.append((member.fragment_id, rows))
        group, rows_in_group = [], 0
    return found


def _check_values(table: Table, values: pa.Table, key: str, names: list[str]) -> None:
    stored = table.schema
    if key not in values.column_names or key not in stored.names:
        raise ValueError(f"{table.uri}: key {key!r} must be a column of the values and of the table")
    if not names:
        raise ValueError(f"{table.uri}: no columns to write beside the key {key!r}")
    for name in names:
        if name not in stored.names:
            continue
        field = stored.field(name)
        if not field.nullable:
            raise ValueError(f"{table.uri}: column {name!r} may not be null and is never rewritten")
        if field.type != values.schema.field(name).type and not pa.types.is_null(
            values.schema.field(name).type
        ):
            raise ValueError(
                f"{table.uri}: column {name!r} is {field.type} there, not {values.schema.field(name).type}"
            )
    keys = values[key]
    if keys.null_count or pc.count_distinct(keys).as_py() != len(keys):
        raise ValueError(f"{table.uri}: values of {key!r} must be distinct and not null")


def _latest(table: Table) -> Table:
    return open_table(table.uri, storage_options=table.storage_options)
