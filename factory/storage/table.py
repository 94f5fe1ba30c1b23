"""Tables: open, read, query. Lance datasets behind the few verbs that the factory needs.

A `Table` is a snapshot at one version. Schema-level metadata holds what is true of all rows: class names,
the embedder, the summary of a prepared dataset.
"""

import datetime
import difflib
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import lance
import numpy as np
import pyarrow as pa

from factory.storage.access import TestAccess, TestGuard, record_access
from factory.storage.errors import reliably, storage_faults
from factory.storage.location import StorageOptions, lance_options
from factory.storage.verdicts import effective_expressions, expand_filter

_CONFLICT_TRIES = 50
_BAD_QUERY = ("Invalid user input", "Query Execution error")


class Table:
    """One version of a Lance dataset.

    Attributes:
        uri: where it is, as given.
        storage_options: how to reach it, for object stores.
    """

    def __init__(
        self,
        uri: str,
        dataset: lance.LanceDataset,
        storage_options: StorageOptions = None,
        test_access: TestAccess | None = None,
    ) -> None:
        self.uri = uri
        self.storage_options = storage_options
        self._dataset = dataset
        self._test_access = test_access

    def __repr__(self) -> str:
        return f"Table({self.uri!r}, version={self.version}, rows={self.count()})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.uri, self.version, self.storage_options, self._test_access)

    @property
    def version(self) -> int:
        """The version that is read."""
        return self._dataset.version

    @property
    def schema(self) -> pa.Schema:
        """Stored columns, with units in field metadata."""
        return self._dataset.schema

    @property
    def metadata(self) -> dict[str, str]:
        """Schema-level key/value pairs."""
        return dict(self._dataset.schema_metadata)

    @property
    def dataset(self) -> lance.LanceDataset:
        """The Lance dataset behind; for code of `factory.storage` only."""
        return self._dataset

    def count(self, filter: str | None = None) -> int:
        """Number of rows, of those that pass `filter` where given (effective verdicts, as in `query`)."""
        with self._explained(filter, None):
            return self._dataset.count_rows(filter=self._expanded(filter))

    def read(
        self,
        columns: Sequence[str] | None = None,
        filter: str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> pa.Table:
        """Stored values of `columns` (all by default), of the rows that pass the SQL `filter`.

        In `filter`, `accepted` and `reject_reason` are the effective verdicts; as columns they are what is
        stored (null: not curated).

        Raises:
            ValueError: a column does not exist or the filter cannot be understood; names the columns.
            PermissionError: what test images of a real table show is asked for without `test_access`.
        """
        with self._explained(filter, columns):
            guard = self._guard(columns)
            found = self._dataset.to_table(
                columns=guard.columns, filter=self._expanded(filter), limit=limit, offset=offset
            )
            return guard.released(found)

    def batches(
        self, columns: Sequence[str] | None = None, filter: str | None = None, batch_size: int = 1024
    ) -> Iterator[pa.RecordBatch]:
        """The same as `read`, streamed in batches of at most `batch_size` rows."""
        with self._explained(filter, columns):
            guard = self._guard(columns)
            for batch in self._dataset.to_batches(
                columns=guard.columns, filter=self._expanded(filter), batch_size=batch_size
            ):
                yield guard.released(batch)

    def nearest(
        self,
        vector: np.ndarray,
        k: int = 10,
        filter: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The `k` rows whose embedding is nearest to `vector`, best first, with a column `similarity`.

        The filter applies before the search. `similarity` is the cosine, float32, -1 … 1.

        Raises:
            ValueError: `vector` is not a finite, non-zero vector of the table's embedding dimension.
        """
        return self.query(filter, columns=columns, like=vector, k=k)

    def query(
        self,
        filter: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        like: np.ndarray | None = None,
        k: int = 10,
    ) -> pa.Table:
        """Rows that pass the SQL `filter`, or of these the `k` most like the embedding `like`.

        Where the table has stream verdicts, `accepted` and `reject_reason` are effective in filter and
        output: the verdict of curation, or the stream's for rows that were not curated.

        Args:
            filter: e.g. ``"label_name = 'malignant' AND accepted AND width >= 128"``.
            columns: which to return; all, and the effective verdicts, by default.
            limit: at most so many rows.
            like: (dim,) float32 embedding; adds the column `similarity`, best first.
            k: how many, with `like`.

        Raises:
            ValueError: unknown column, bad filter, or bad vector; names the columns that exist.
            PermissionError: see `read`.
        """
        names = [name for name in self._query_names(columns) if name != "similarity" or like is None]
        with self._explained(filter, names):
            guard = self._guard(names, like=like is not None)
            projection, expanded = self._projection(guard.columns or ()), self._expanded(filter)
            if like is None:
                found = self._dataset.to_table(columns=projection, filter=expanded, limit=limit)
                return self._described(guard.released(found))
            search = {"column": "embedding", "q": self._checked_vector(like), "k": k, "metric": "cosine"}
            projection["_distance"] = "_distance"
            found = self._dataset.to_table(
                columns=projection, filter=expanded, nearest=search, prefilter=True, limit=limit
            )
        found = guard.released(found)
        distance = found["_distance"].to_numpy()
        found = found.drop_columns(["_distance"])
        similarity = pa.array(1.0 - distance, pa.float32())
        return self._described(found.append_column("similarity", similarity))

    def query_batches(
        self,
        filter: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        batch_size: int = 1024,
    ) -> Iterator[pa.RecordBatch]:
        """The same rows as `query` without `like`, streamed: for tables that do not fit into memory."""
        names = self._query_names(columns)
        with self._explained(filter, names):
            guard = self._guard(names)
            for batch in self._dataset.to_batches(
                columns=self._projection(guard.columns or ()),
                filter=self._expanded(filter),
                limit=limit,
                batch_size=batch_size,
            ):
                yield guard.released(batch)

    def numpy_batches(
        self,
        filter: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        batch_size: int = 1024,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The rows of `query_batches` as arrays by column, which torch takes by `torch.from_numpy`.

        Numbers are (B,), with NaN for null; vectors (B, dim); text, bytes and the rest (B,) of Python objects.
        """
        for batch in self.query_batches(filter, columns=columns, limit=limit, batch_size=batch_size):
            yield {name: _as_array(batch.column(name)) for name in batch.schema.names}

    def query_schema(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """Fields of what `query` returns without `like`: the stored columns and the effective verdicts."""
        extra = {"accepted": pa.bool_(), "reject_reason": pa.string()}
        stored = self.schema
        names = self._query_names(columns)
        with self._explained(None, names):
            fields = [stored.field(n) if n in stored.names else pa.field(n, extra[n]) for n in names]
        return pa.schema(fields)

    def set_metadata(self, values: Mapping[str, str]) -> Self:
        """Add or replace metadata; a new version, which this object then reads."""
        for tries_left in reversed(range(_CONFLICT_TRIES)):
            latest = open_table(self.uri, storage_options=self.storage_options)._dataset
            try:
                with storage_faults(self.uri, "set the metadata of"):
                    latest.update_schema_metadata(dict(values))
                break
            except OSError as fault:
                # Lance refuses two changes of metadata at once, also of different keys.
                if not tries_left or "Incompatible transaction" not in str(fault):
                    raise
                time.sleep(random.uniform(0, 0.05))
        self._dataset = latest
        return self

    def tags(self) -> dict[str, int]:
        """Version of every tag."""
        return {name: int(tag["version"]) for name, tag in self._dataset.tags.list().items()}

    def tag(self, name: str) -> None:
        """Name this version; a tag is never moved.

        Raises:
            ValueError: the name exists, or has characters other than letters, digits, '.', '-' and '_'.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise ValueError(f"tag {name!r}: only letters, digits, '.', '-' and '_' may be used")
        existing = self.tags()
        if name in existing:
            raise ValueError(f"tag {name!r} of {self.uri} exists already, for version {existing[name]}")
        with storage_faults(self.uri, "tag a version of"):
            self._dataset.tags.create(name, self.version)

    def next_tag(self, prefix: str = "curated") -> str:
        """`prefix-1`, `prefix-2`, …: the first number after the highest in use."""
        numbers = [
            int(m[1]) for name in self.tags() if (m := re.fullmatch(rf"{re.escape(prefix)}-(\d+)", name))
        ]
        return f"{prefix}-{max(numbers, default=0) + 1}"

    def versions(self) -> list[tuple[int, datetime.datetime]]:
        """Number and time of every version, oldest first."""
        found: list[Any] = self._dataset.versions()
        return [(int(version["version"]), version["timestamp"]) for version in found]

    def write_columns(self, values: pa.Table, key: str) -> "Table":
        """Nullable columns of the rows named by `key`, without rewriting any other column.

        See `factory.storage.columns.write_columns`.
        """
        from factory.storage.columns import write_columns

        return write_columns(self, values, key)

    def _query_names(self, columns: Sequence[str] | None) -> list[str]:
        if columns is not None:
            return list(columns)
        return list(dict.fromkeys([*self.schema.names, *effective_expressions(self.schema)]))

    def _projection(self, names: Sequence[str]) -> dict[str, str]:
        expressions = effective_expressions(self.schema)
        return {name: expressions.get(name, f"`{name}`") for name in names}

    def _expanded(self, filter: str | None) -> str | None:
        if filter is None or not filter.strip():
            return None
        return expand_filter(filter, self.schema)

    def _guard(self, columns: Sequence[str] | None, *, like: bool = False) -> TestGuard:
        return TestGuard(self.uri, self.schema, self._test_access, columns, like=like)

    def _explained(self, filter: str | None, columns: Sequence[str] | None) -> "_Explained":
        return _Explained(self, filter, columns)

    def _checked_vector(self, vector: np.ndarray) -> np.ndarray:
        if "embedding" not in self.schema.names:
            raise ValueError(f"{self.uri} has no column 'embedding'; columns: {', '.join(self.schema.names)}")
        dim = self.schema.field("embedding").type.list_size
        flat = np.asarray(vector, np.float32).reshape(-1)
        if flat.shape != (dim,) or not np.isfinite(flat).all() or not flat.any():
            raise ValueError(
                f"embedding: {self.uri} wants one finite, non-zero vector of {dim} numbers, got shape "
                f"{np.shape(vector)}; use the embedder recorded in the table"
            )
        return flat

    def _described(self, found: pa.Table) -> pa.Table:
        """`found` without Lance's own schema metadata on computed columns, with the table's."""
        return found.replace_schema_metadata(self.schema.metadata)


class _Explained:
    """Turns Lance's errors about filters and columns into ones that name the columns that exist."""

    def __init__(self, table: Table, filter: str | None, columns: Sequence[str] | None) -> None:
        self._table, self._filter, self._columns = table, filter, columns

    def __enter__(self) -> None:
        known = self._known()
        unknown = [name for name in self._columns or () if name not in known and not name.startswith("_row")]
        if unknown:
            raise ValueError(
                f"column(s) {', '.join(map(repr, unknown))} not in {self._table.uri}; {self._names()}"
            )

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        if isinstance(fault, (ValueError, OSError)) and any(sign in str(fault) for sign in _BAD_QUERY):
            message = re.sub(r", /\S+\.rs:\d+:\d+", "", str(fault)).replace("Invalid user input: ", "")
            message = re.sub(r"\s*Valid fields are .*", "", message, flags=re.DOTALL)
            named = re.search(r"No field named (\w+)", message)
            near = difflib.get_close_matches(named[1], self._known(), n=1) if named else []
            hint = f" (did you mean {near[0]!r}?)" if near and "Did you mean" not in message else ""
            raise ValueError(f"filter {self._filter!r}: {message.strip()}{hint}; {self._names()}") from fault

    def _names(self) -> str:
        return "columns: " + ", ".join(self._known())

    def _known(self) -> list[str]:
        schema = self._table.schema
        return list(dict.fromkeys([*schema.names, *effective_expressions(schema)]))


def open_table(
    uri: str,
    *,
    version: int | None = None,
    tag: str | None = None,
    storage_options: StorageOptions = None,
    test_access: TestAccess | None = None,
) -> Table:
    """The table at `uri`: its latest version, or the one named by number or tag.

    Args:
        uri: a path, or `s3://bucket/path` or `gs://bucket/path`.
        version, tag: which version, if not the latest.
        storage_options: how to reach an object store; those of the environment hold without them.
        test_access: leave to read what the test images of a real table show; recorded beside the table.

    Raises:
        FileNotFoundError: no table there, or no such bucket.
        StorageUnreachable: the object store does not answer.
        ValueError: both `version` and `tag` given, or no such version or tag.
    """
    if version is not None and tag is not None:
        raise ValueError(f"open {uri} by version or by tag, not both ({version}, {tag!r})")
    uri = str(uri)
    try:
        options = lance_options(storage_options)
        dataset = reliably(uri, "open", lambda: lance.dataset(uri, storage_options=options))
    except ValueError as fault:
        if "was not found" not in str(fault):
            raise
        raise FileNotFoundError(f"no table at {uri}; {_made_by(uri)}") from fault
    table = Table(uri, _at_version(uri, dataset, version, tag), storage_options, test_access)
    if test_access is not None:
        record_access(uri, table.version, test_access, storage_options)
    return table


def _at_version(
    uri: str, dataset: lance.LanceDataset, version: int | None, tag: str | None
) -> lance.LanceDataset:
    table = Table(uri, dataset)
    if tag is not None:
        tags = table.tags()
        if tag not in tags:
            raise ValueError(f"tag {tag!r} is not in {uri}; tags: {', '.join(sorted(tags)) or 'none yet'}")
        version = tags[tag]
    if version is None:
        return dataset
    try:
        return dataset.checkout_version(version)
    except (ValueError, OSError) as fault:
        if "was not found" not in str(fault):
            raise
        known = [number for number, _ in table.versions()]
        raise ValueError(f"version {version} is not in {uri}; versions: {known[0]} … {known[-1]}") from fault


def _reopen(uri: str, version: int, storage_options: StorageOptions, test_access: TestAccess | None) -> Table:
    """In another process: the leave that was recorded when the table was opened is not recorded again."""
    table = open_table(uri, version=version, storage_options=storage_options)
    return Table(uri, table.dataset, storage_options, test_access)


def _as_array(column: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type) and not column.null_count:
        flat = column.flatten().to_numpy(zero_copy_only=False, writable=True)
        return flat.reshape(len(column), column.type.list_size)
    return column.to_numpy(zero_copy_only=False, writable=True)


def _made_by(uri: str) -> str:
    if "synthetic" in uri:
        return "`factory synthesize … --out` makes one"
    return (
        "`factory prepare LAYOUT PATH --out` makes one of real images, `factory synthesize` of synthetic ones"
    )
