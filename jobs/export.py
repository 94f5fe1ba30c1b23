"""Write accepted rows, alone or with real training rows, in a format that people train with.

    factory export synthetic.lance --format nnunet --out Dataset101_Breast
    factory export synthetic.lance --real real.lance --ratio 2 --format folder --out mixed
    factory export synthetic.lance --real real.lance --ratio 1 --balance --include-val --format webdataset --out shards
    factory export synthetic.lance --tag curated-1 --where "scores['contrast'] > 0.2" --format huggingface --out hf

Without --real, every accepted row of the table; with it, also the real rows of the train split (never of the test
split), and --ratio synthetic rows per real image. A larger ratio contains the smaller one. Near copies of real
images stay behind unless asked for. Every export has a manifest, checksums and a dataset card.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from tyro.conf import Positional

from factory.imaging import decode_png

if TYPE_CHECKING:
    from factory.export.items import Channels
    from factory.export.write import ExportResult
    from factory.storage import Table

_DATASET_FOLDER = "Dataset"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory export`."""

    table: Positional[str]
    """Synthetic table."""
    format: Literal["folder", "nnunet", "huggingface", "webdataset", "coco"]
    """folder: PNG files and a CSV; nnunet: raw data of nnU-Net v2; huggingface: datasets.load_from_disk;
    webdataset: tar shards; coco: instances with run-length masks."""
    out: str
    """Folder to write."""
    real: str | None = None
    """Real table to mix in: its train split, never its test split."""
    ratio: float | None = None
    """Synthetic rows per real training image, class by class; all accepted ones without it."""
    balance: bool = False
    """Share the synthetic rows of --ratio out so that real + synthetic become even over the classes."""
    include_val: bool = False
    """The real validation rows too, as a split of their own."""
    where: str = ""
    """SQL over the columns of the synthetic table, beside the verdict."""
    include_near_copies: bool = False
    """Let out rows that are near copies of real images: they may show a patient."""
    tag: str | None = None
    """Version of the synthetic table by tag, such as curated-1."""
    version: int | None = None
    """Version of the synthetic table by number."""
    name: str = ""
    """Of the dataset, in the card; the folder's name by default."""
    channels: Literal["auto", "as-stored", "grey", "rgb"] = "auto"
    """Write every image as grey or as rgb; auto: as stored, and for nnunet, which wants one kind, as the synthetic ones."""
    mask_values: Literal["stored", "class"] = "stored"
    """stored: label maps as in the table (lesion 1); class: a lesion has 1 + the index of its class."""
    rows_per_shard: int = 1000
    """Rows of a WebDataset shard."""
    overwrite: bool = False
    """Replace an earlier export in --out; other files are never removed."""
    plan: bool = False
    """Say what would be written, and stop."""


def run(args: Args) -> "ExportResult":
    """Export; prints nothing but progress.

    Raises:
        FileNotFoundError: a table, or the folder above --out, is not there.
        FileExistsError: --out holds something.
        ValueError: bad arguments, nothing to export, or a row that the format cannot hold.
    """
    from factory.export.destination import check_destination
    from factory.export.selection import Choice
    from factory.export.write import ExportResult, ExportSettings, plan_export, write_export
    from factory.storage import open_table
    from factory.tracking import track
    from jobs.progress import progress_bar

    table = open_table(args.table, version=args.version, tag=args.tag)
    choice = Choice(
        where=args.where,
        include_near_copies=args.include_near_copies,
        ratio=args.ratio,
        balance=args.balance,
        include_val=args.include_val,
    )
    settings = ExportSettings(
        format=args.format,
        out=args.out,
        overwrite=args.overwrite,
        name=args.name,
        channels=_channels(args, table),
        mask_values=args.mask_values,
        rows_per_shard=args.rows_per_shard,
        command=portable_command(args),
        tag=args.tag,
    )
    check_destination(args.out, overwrite=args.overwrite)
    real = None if args.real is None else open_table(args.real)
    selection = plan_export(table, real, choice, settings)
    if args.plan:
        return ExportResult(
            folder="",
            num_rows=selection.num_rows,
            counts=selection.counts,
            left_out=selection.left_out,
            notes=selection.notes,
        )
    inputs = {"synthetic": f"{args.table}@{table.version}"}
    if real is not None:
        inputs["real"] = f"{args.real}@{real.version}"
    with track("export", execution_parameters=dataclasses.asdict(args), inputs=inputs) as tracked:
        result = write_export(selection, settings, progress_bar)
        tracked.metrics(_metrics(result))
        tracked.set({"output": result.folder})
        tracked.artifact("counts.json", {"rows": _counts(result), "left_out": result.left_out})
        for name in ("README.md", "croissant.json"):
            tracked.artifact(Path(result.folder) / name)
    return result


def _channels(args: Args, table: "Table") -> "Channels":
    """How images are written: as stored, or as the first synthetic image is where the format wants one kind."""
    if args.channels != "auto":
        return args.channels
    first = table.read(["image"], limit=1)["image"].to_pylist() if args.format == "nnunet" else []
    if not first:
        return "as-stored"
    return "grey" if decode_png(first[0]).ndim == 2 else "rgb"


def portable_command(args: Args) -> str:
    """The command that makes this export again, with names of tables and folders but not where they lie."""
    words = [
        "factory",
        "export",
        Path(args.table).name,
        "--format",
        args.format,
        "--out",
        Path(args.out).name,
    ]
    for item in dataclasses.fields(Args):
        value = getattr(args, item.name)
        if item.name in ("table", "format", "out", "overwrite", "plan") or value == item.default:
            continue
        words.append(f"--{item.name.replace('_', '-')}")
        if value is not True:
            words.append(Path(value).name if item.name == "real" else str(value))
    return shlex.join(words)


def _metrics(result: "ExportResult") -> Mapping[str, float]:
    """Totals; class names, which MLflow may not take, stand in counts.json."""
    values: dict[str, float] = {"rows": result.num_rows}
    for (split, origin, _), number in result.counts.items():
        name = f"rows.{split}.{origin}"
        values[name] = values.get(name, 0) + number
    return values | {"left_out": sum(sum(of.values()) for of in result.left_out.values())}


def _counts(result: "ExportResult") -> list[dict[str, str | int]]:
    return [
        {"split": split, "origin": origin, "class": label, "rows": number}
        for (split, origin, label), number in result.counts.items()
    ]


def print_result(result: "ExportResult") -> None:
    """Rows per class and origin, and what stayed behind and why."""
    from rich.console import Console
    from rich.table import Table as Grid

    labels = sorted(
        {label for _, _, label in result.counts} | {name for of in result.left_out.values() for name in of}
    )
    grid = Grid(title=f"{result.num_rows} rows")
    for column in ("", *labels, "all"):
        grid.add_column(_plain(column), justify="right" if column else "left")
    for split, origin in dict.fromkeys((split, origin) for split, origin, _ in result.counts):
        numbers = [result.counts.get((split, origin, label), 0) for label in labels]
        grid.add_row(f"{split}, {origin}", *map(str, numbers), str(sum(numbers)))
    if result.left_out:
        grid.add_section()
    for reason, of in result.left_out.items():
        numbers = [of.get(label, 0) for label in labels]
        grid.add_row(_plain(f"left out: {reason}"), *map(str, numbers), str(sum(numbers)))
    Console(width=None if sys.stdout.isatty() else 120).print(grid)
    for note in result.notes:
        print(f"note: {note}")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def command(argv: Sequence[str]) -> int:
    """`factory export`."""
    args = tyro.cli(Args, args=list(argv), prog="factory export", description=__doc__)
    result = run(args)
    print_result(result)
    if args.plan:
        print(f"nothing written; without --plan: {result.num_rows} rows to {args.out}")
        return 0
    if args.format == "nnunet" and not _is_nnunet_name(Path(result.folder).name):
        print("note: nnU-Net finds a folder in nnUNet_raw by a name such as Dataset101_Breast; rename it")
    print(
        f"wrote {result.folder} ({result.num_rows} rows, {args.format}); next: read {result.folder}/README.md"
    )
    return 0


def _is_nnunet_name(name: str) -> bool:
    digits, _, rest = name.removeprefix(_DATASET_FOLDER).partition("_")
    return name.startswith(_DATASET_FOLDER) and len(digits) == 3 and digits.isdigit() and bool(rest)


if __name__ == "__main__":
    from jobs.cli import run_verb

    sys.exit(run_verb("export", sys.argv[1:]))
