"""How the rows of `factory query` leave it: a table for people, JSON, Parquet."""

import base64
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import numpy as np

    from factory.storage import Table


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One question, which can be asked for several sets of columns."""

    table: "Table"
    filter: str | None
    vector: "np.ndarray | None"
    k: int
    limit: int | None

    def columns(self, columns: Sequence[str] | None, leave_out: Sequence[str] = ()) -> list[str]:
        """The columns asked for, or all but `leave_out`; with `similarity` where there is one."""
        names = (
            list(columns) if columns else [n for n in self.table.query_schema().names if n not in leave_out]
        )
        if self.vector is not None and "similarity" not in names:
            names.append("similarity")
        return names

    def batches(self, names: Sequence[str], limit: int | None = None) -> Iterator[pa.RecordBatch]:
        """Rows with columns `names`, streamed; of the first `limit` where that is less."""
        limits = [number for number in (self.limit, limit) if number is not None]
        most = min(limits) if limits else None
        if self.vector is None:
            yield from self.table.query_batches(self.filter, columns=names, limit=most, batch_size=256)
        else:
            found = self.table.query(self.filter, columns=names, like=self.vector, k=self.k, limit=most)
            yield from found.select(list(names)).to_batches()

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """Fields of `names`."""
        stored = self.table.query_schema([n for n in names if n != "similarity" or self.vector is None])
        similar = pa.field("similarity", pa.float32())
        return pa.schema([similar if n not in stored.names else stored.field(n) for n in names])


class JsonLines:
    """The pieces of a JSON array with one row per line; counts the rows that went through."""

    def __init__(self, source: Rows, names: Sequence[str]) -> None:
        self._source, self._names = source, names
        self._schema = source.schema(names)
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        yield "["
        for batch in self._source.batches(self._names):
            for row in batch.to_pylist():
                values = {name: plain(row[name], self._schema.field(name).type) for name in self._names}
                yield (",\n" if self.count else "\n") + json.dumps(values)
                self.count += 1
        yield "\n]\n"


def write_parquet(source: Rows, names: Sequence[str], path: Path) -> int:
    """Write columns `names` to one Parquet file with the table's metadata; how many rows."""
    import pyarrow.parquet as parquet

    count = 0
    schema = source.schema(names)
    with parquet.ParquetWriter(path, schema.with_metadata(source.table.schema.metadata)) as writer:
        for batch in source.batches(names):
            writer.write_batch(batch.cast(schema))
            count += batch.num_rows
    return count


def plain(value: Any, kind: pa.DataType) -> Any:
    """A value as JSON data: bytes in base64, maps as objects, numbers that are not finite as null."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if pa.types.is_map(kind):
        return {name: plain(item, kind.item_type) for name, item in value or ()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cell(value: Any, kind: pa.DataType) -> str:
    """A value as short text for people."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if pa.types.is_map(kind):
        return ", ".join(f"{name}={cell(item, pa.null())}" for name, item in value)
    if isinstance(value, list):
        return f"<{len(value)} numbers>"
    text = str(value)
    return text if len(text) <= 48 else text[:47] + "…"


def text_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns aligned with two spaces between them."""
    widths = [max([len(name), *(len(row[i]) for row in rows)]) for i, name in enumerate(header)]

    def line(cells: Iterable[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return "\n".join([line(header), line("-" * width for width in widths), *map(line, rows)]) + "\n"
