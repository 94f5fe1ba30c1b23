"""New tables: created empty for the exactly-once write path, or written whole by one writer."""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import lance
import pyarrow as pa

from factory.storage.errors import storage_faults
from factory.storage.ledger import TABLE_ID
from factory.storage.location import StorageOptions, lance_options
from factory.storage.table import Table, open_table

IDENTIFYING_METADATA = ("schema_version", "embedder", "class_names")
"""Metadata that says what columns mean: two tables that differ in one of them may not be mixed."""


def create_table(
    uri: str,
    schema: pa.Schema,
    *,
    metadata: Mapping[str, str] | None = None,
    storage_options: StorageOptions = None,
) -> Table:
    """An empty table at `uri`, or the one that is there if its schema and meaning are the same.

    Columns that curation added to an existing table are allowed. `IDENTIFYING_METADATA` must agree, so
    that rows of two embedders or two class tables are never mixed.

    Raises:
        ValueError: the existing table differs; names the column or the metadata.
    """
    schema = _with_metadata(schema, metadata)
    uri = str(uri)
    try:
        fresh = _with_metadata(schema, {TABLE_ID: uuid.uuid4().hex[:12]})
        with storage_faults(uri, "create"):
            dataset = lance.write_dataset(
                fresh.empty_table(),
                uri,
                schema=fresh,
                mode="create",
                enable_stable_row_ids=True,
                storage_options=lance_options(storage_options),
            )
    except OSError as fault:
        if "already exists" not in str(fault):
            raise
        table = open_table(uri, storage_options=storage_options)
        _check_same(table, schema)
        return table
    return Table(uri, dataset, storage_options)


def write_table(
    uri: str,
    data: pa.Table | Iterable[pa.RecordBatch],
    schema: pa.Schema,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    storage_options: StorageOptions = None,
) -> Table:
    """Write a whole table in one commit: for one writer (prepared datasets, caches).

    A process killed while it writes leaves no table, or the previous one with `overwrite`.

    Raises:
        FileExistsError: a table is there and `overwrite` is not asked for.
        ValueError: `data` does not have the columns of `schema`, or null where that is not allowed.
    """
    schema = _with_metadata(schema, metadata)
    uri = str(uri)
    if isinstance(data, pa.Table):
        batches: Iterable[pa.RecordBatch] = _conforming(data, schema, uri).to_batches()
    else:
        batches = data
    source = _Source(_conforming_batches(batches, schema, uri))
    reader = pa.RecordBatchReader.from_batches(schema, source)
    try:
        with storage_faults(uri, "write"):
            dataset = lance.write_dataset(
                reader,
                uri,
                schema=schema,
                mode="overwrite" if overwrite else "create",
                enable_stable_row_ids=True,
                storage_options=lance_options(storage_options),
            )
    except Exception as fault:
        if source.fault is not None:
            raise source.fault from None
        if "already exists" in str(fault):
            raise FileExistsError(
                f"{uri} exists already; choose another path or ask to overwrite it"
            ) from fault
        raise
    return Table(uri, dataset, storage_options)


def _with_metadata(schema: pa.Schema, metadata: Mapping[str, str] | None) -> pa.Schema:
    extra = {key.encode(): value.encode() for key, value in (metadata or {}).items()}
    return schema.with_metadata({**(schema.metadata or {}), **extra})


def _conforming(data: pa.Table, schema: pa.Schema, uri: str) -> pa.Table:
    """`data` with exactly the columns of `schema`, in its order."""
    missing = [name for name in schema.names if name not in data.column_names]
    extra = [name for name in data.column_names if name not in schema.names]
    if missing or extra:
        raise ValueError(f"{uri}: columns missing from the rows: {missing}; not in the schema: {extra}")
    nulls = [f.name for f in schema if not f.nullable and data[f.name].null_count]
    if nulls:
        raise ValueError(f"{uri}: null in column(s) {', '.join(nulls)}, which may not be null")
    return data.select(schema.names).cast(schema)


def _conforming_batches(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, uri: str
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield from _conforming(pa.Table.from_batches([batch]), schema, uri).to_batches()


class _Source:
    """An iterator that remembers what it raised: Lance reports only that its input failed."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.fault: Exception | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> pa.RecordBatch:
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except Exception as fault:
            self.fault = fault
            raise


def _check_same(table: Table, schema: pa.Schema) -> None:
    """Raise ValueError where rows of `schema` may not be added to `table`."""
    stored = table.schema
    for field in schema:
        if field.name not in stored.names:
            raise ValueError(
                f"{table.uri}: the table there has no column {field.name!r}; choose another path"
            )
        other = stored.field(field.name)
        if other.type != field.type or other.nullable != field.nullable:
            raise ValueError(
                f"{table.uri}: column {field.name!r} is {_type_text(other)} there, not {_type_text(field)}; "
                "choose another path"
            )
    for name in stored.names:
        if name not in schema.names and not stored.field(name).nullable:
            raise ValueError(f"{table.uri}: the table there has a column {name!r} that these rows lack")
    wanted = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    for key in IDENTIFYING_METADATA:
        if key in wanted and _parsed(wanted[key]) != _parsed(table.metadata.get(key)):
            raise ValueError(
                f"{table.uri}: {key} is {table.metadata.get(key)} there, not {wanted[key]}; rows of the two "
                "may not be mixed: choose another path"
            )


def _type_text(field: pa.Field) -> str:
    return f"{field.type}{'' if field.nullable else ' not null'}"


def _parsed(text: str | None) -> Any:
    """Metadata by content; without where an embedder's weights were found, which is not what they are."""
    try:
        value = None if text is None else json.loads(text)
    except json.JSONDecodeError:
        return text
    if isinstance(value, dict) and "weights_digest" in value:
        value.pop("weights", None)
    return value
