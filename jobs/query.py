"""Ask a table: filter rows, find the nearest to an image, write rows or a contact sheet.

    factory query synthetic.lance "label_name = 'malignant' AND accepted"
    factory query synthetic.lance --like 0f3a… -k 12 --contact-sheet similar.png
    factory query synthetic.lance "accepted" --tag curated-1 --format parquet --out accepted.parquet
    factory query synthetic.lance --describe

The filter is SQL over the table's columns. `accepted` and `reject_reason` are the effective verdicts: those of
the latest curation, or of the stream's filters for rows that no curation has seen.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from jobs.query_output import JsonLines, Rows, cell, text_table, write_parquet

if TYPE_CHECKING:
    import numpy as np

    from factory.storage import Table

TABLE_ROWS = 20
SHEET_ROWS = 64
_KEYS = ("request_id", "image_id")
_SHOWN = (
    "similarity",
    "request_id",
    "image_id",
    "recipe",
    "label_name",
    "split",
    "width",
    "height",
    "accepted",
    "reject_reason",
    "nearest_real_similarity",
    "prompt",
)
_BULKY = ("image", "mask", "requested_mask", "embedding")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory query`."""

    table: Positional[str]
    """Synthetic or real table."""
    filter: Positional[str] = ""
    """SQL over the columns, such as "label_name = 'malignant' AND accepted"; all rows without it."""
    like: str | None = None
    """Rows nearest to this one: the id of a row (or a unique beginning of it), or an image file."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many rows, with --like."""
    columns: str | None = None
    """Columns to return, separated by commas."""
    format: Literal["table", "json", "parquet"] = "table"
    """table: for people; json: an array with one row per line; parquet: all columns, images included."""
    out: str | None = None
    """File to write instead of standard output; parquet needs it."""
    contact_sheet: str | None = None
    """Write the images with mask contours and verdicts as a PNG."""
    limit: int | None = None
    """At most so many rows; a table for people shows 20 unless told otherwise."""
    tag: str | None = None
    """Version by tag, such as curated-1."""
    version: int | None = None
    """Version by number."""
    describe: bool = False
    """Say what the table holds: columns with their units, versions, tags, counts."""


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """What was asked of which version, how many rows came, and what was written.

    Attributes:
        uri, version: the table.
        matching: rows that pass the filter, whatever the limit.
        rows: rows returned.
        text: what to print, for formats that go to standard output.
        written: files written.
        notes: what the operator should know.
    """

    uri: str
    version: int
    matching: int
    rows: int
    text: str = ""
    written: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def run(args: Args) -> QueryResult:
    """Answer the question; print nothing.

    Raises:
        FileNotFoundError: no table there, or no folder to write into.
        ValueError: bad filter, column, tag or --like, or parquet without --out.
    """
    from factory.storage import open_table

    _check(args)
    table = open_table(args.table, version=args.version, tag=args.tag)
    if args.describe:
        return QueryResult(
            uri=table.uri, version=table.version, matching=table.count(), rows=0, text=describe(table)
        )
    filter, notes = without_test_rows(table, args.filter)
    columns = [name.strip() for name in args.columns.split(",")] if args.columns else None
    vector, filter = (None, filter) if args.like is None else _like(table, args.like, filter)
    limit = TABLE_ROWS if args.limit is None and args.format == "table" and vector is None else args.limit
    source = Rows(table=table, filter=filter, vector=vector, k=args.k, limit=limit)
    text, rows, written = _deliver(args, source, columns)
    if args.contact_sheet:
        _write_sheet(args, replace(source, limit=args.limit))
        written = (*written, args.contact_sheet)
    return QueryResult(
        uri=table.uri,
        version=table.version,
        matching=table.count(filter),
        rows=rows,
        text=text,
        written=written,
        notes=tuple(notes),
    )


def describe(table: "Table") -> str:
    """What a table holds, for people."""
    lines = [f"{table.uri}: version {table.version}, {table.count()} rows"]
    tags = ", ".join(f"{name} (version {number})" for name, number in sorted(table.tags().items()))
    lines.append(f"tags: {tags or 'none'}")
    schema = table.query_schema()
    if "accepted" in schema.names:
        for label in _distinct(table, "label_name"):
            of_label = f"label_name = '{_quoted(label)}'"
            accepted, total = table.count(f"{of_label} AND accepted"), table.count(of_label)
            lines.append(f"{label}: {total} rows, {accepted} accepted")
        for reason in _distinct(table, "reject_reason"):
            count = table.count(f"reject_reason = '{_quoted(reason)}'")
            lines.append(f"rejected as {reason}: {count}")
    lines.append("columns:")
    width = max(map(len, schema.names))
    for field in schema:
        about = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        unit = f" [{about['unit']}]" if "unit" in about else ""
        text = about.get("description") or (
            "effective verdict" if field.name in ("accepted", "reject_reason") else ""
        )
        lines.append(f"  {field.name:<{width}}  {field.type!s:<28}  {text}{unit}")
    return "\n".join(lines)


def _check(args: Args) -> None:
    if args.format == "parquet" and not args.out and not args.contact_sheet:
        raise ValueError("--format parquet needs --out FILE")
    if args.k < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError(f"-k {args.k} and --limit {args.limit} must be at least 1")
    for name in (args.out, args.contact_sheet):
        if name and not Path(name).absolute().parent.is_dir():
            raise FileNotFoundError(f"{Path(name).parent}: no such folder to write {Path(name).name} into")


def without_test_rows(table: "Table", filter: str) -> tuple[str | None, list[str]]:
    """The filter, and for tables of real images one that leaves the test split alone."""
    from factory.storage import whole_filter

    given = whole_filter(filter.strip()) if filter.strip() else None
    if not {"image_id", "split"} <= set(table.schema.names):
        return given, []
    rest = "split <> 'test'"
    note = "rows of the test split are left out; only `factory evaluate downstream` reads them"
    return (rest if given is None else f"{given} AND {rest}"), [note]


def _like(table: "Table", like: str, filter: str | None) -> "tuple[np.ndarray, str | None]":
    """The embedding of a row or an image file, and the filter without the row itself."""
    import numpy as np

    if Path(like).is_file():
        return _embed_file(table, Path(like)), filter
    key = next((name for name in _KEYS if name in table.schema.names), None)
    if key is None or not like or not all(c.isalnum() or c in "-_" for c in like):
        raise ValueError(f"--like {like!r} is neither an image file nor the id of a row of {table.uri}")
    beginning, guard = f"starts_with({key}, '{like}')", without_test_rows(table, "")[0]
    where = beginning if guard is None else f"{beginning} AND {guard}"
    found = table.read([key, "embedding"], where, limit=2)
    if found.num_rows != 1:
        what = "is the beginning of several ids" if found.num_rows else "is neither an image file nor an id"
        raise ValueError(f"--like {like!r} {what} of {table.uri}")
    others = f"{key} <> '{found[key][0].as_py()}'"
    vector = np.asarray(found["embedding"][0].as_py(), np.float32)
    return vector, others if filter is None else f"({filter}) AND {others}"


def _embed_file(table: "Table", path: Path) -> "np.ndarray":
    from PIL import Image

    from factory.embedding import EmbedderSpec

    if "embedder" not in table.metadata:
        raise ValueError(f"{table.uri} records no embedder, so --like takes the id of a row only")
    import numpy as np

    from factory.imaging import RASTER_FORMATS

    try:
        with Image.open(path, formats=RASTER_FORMATS) as image:
            if image.mode not in ("L", "1", "P", "RGB", "RGBA", "LA"):
                raise ValueError(f"--like {path}: {image.mode} pixels; want an 8-bit grey or RGB image")
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except OSError as fault:  # also what Pillow raises for a file that is no image, or truncated
        raise ValueError(f"--like {path}: not an image file that can be read") from fault
    spec = EmbedderSpec.from_json(table.metadata["embedder"])
    loaded = spec.embedder().load()
    spec.check_same(loaded.spec, f"--like {path}")
    return loaded.embed([pixels])[0]


def _deliver(args: Args, source: Rows, columns: Sequence[str] | None) -> tuple[str, int, tuple[str, ...]]:
    """Text to print, number of rows, files written."""
    if args.format == "parquet":
        if args.out is None:
            return "", 0, ()
        return "", write_parquet(source, source.columns(columns), Path(args.out)), (args.out,)
    if args.format == "json":
        names = source.columns(columns, leave_out=_BULKY)
        lines = JsonLines(source, names)
        if args.out is None:
            return "".join(lines), lines.count, ()
        with Path(args.out).open("w") as stream:
            stream.writelines(lines)
        return "", lines.count, (args.out,)
    names = source.columns(columns)
    if not columns:
        names = [name for name in _SHOWN if name in names]
    schema = source.schema(names)
    rows = [row for batch in source.batches(names) for row in batch.to_pylist()]
    text = text_table([[cell(row[n], schema.field(n).type) for n in names] for row in rows], names)
    if args.out is None:
        return text, len(rows), ()
    Path(args.out).write_text(text)
    return "", len(rows), (args.out,)


def _write_sheet(args: Args, source: Rows) -> None:
    """The first images as one PNG, recorded as a run."""
    from factory.imaging import decode_png
    from factory.report import contact_sheet
    from factory.tracking import track

    wanted = ("image", "mask", "label_name", "accepted", "reject_reason", "similarity")
    there = source.columns(None)
    names = [name for name in wanted if name in there]
    rows = [row for batch in source.batches(names, limit=SHEET_ROWS) for row in batch.to_pylist()]
    if not rows:
        raise ValueError(
            f"no row of {source.table.uri} passes, so there is nothing to put on a contact sheet"
        )
    images = [decode_png(row["image"]) for row in rows]
    masks = [None if row.get("mask") is None else decode_png(row["mask"]) for row in rows]
    assert args.contact_sheet is not None
    contact_sheet(images, masks, captions=[_caption(row) for row in rows]).save(args.contact_sheet)
    inputs = {"table": f"{source.table.uri}@{source.table.version}"}
    with track("query", execution_parameters=asdict(args), inputs=inputs) as tracked:
        tracked.artifact(args.contact_sheet)


def _caption(row: Mapping[str, Any]) -> str:
    first = str(row.get("label_name", ""))
    if row.get("similarity") is not None:
        first += f" {row['similarity']:.3f}"
    if "accepted" not in row:
        return first
    return f"{first}\n{row['reject_reason'] or 'accepted' if not row['accepted'] else 'accepted'}"


def _distinct(table: "Table", column: str) -> list[str]:
    values: set[str] = set()
    for batch in table.query_batches(columns=[column], batch_size=1 << 16):
        values |= {value for value in batch.column(0).unique().to_pylist() if value is not None}
    return sorted(values)


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def command(argv: Sequence[str]) -> int:
    """`factory query`: rows on standard output, everything else on standard error."""
    args = tyro.cli(Args, args=list(argv), prog="factory query", description=__doc__)
    result = run(args)
    print(result.text, end="" if result.text.endswith("\n") or not result.text else "\n", flush=True)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.describe:
        return 0
    of = f" of {result.matching}" if args.like is None and result.matching > result.rows else ""
    print(f"{result.rows} rows{of} of {result.uri}, version {result.version}", file=sys.stderr)
    if of and args.limit is None:
        print(
            f"for all of them: --limit {result.matching}, or --format json|parquet --out FILE",
            file=sys.stderr,
        )
    for name in result.written:
        print(f"wrote {name}", file=sys.stderr)
    return 0
