"""One export from tables to folder: rows selected, streamed through a writer, listed, described, put in place."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.export import FORMATS, NEEDS_MASK
from factory.export.card import CardFacts, write_card
from factory.export.destination import check_destination, staged_folder
from factory.export.items import Channels, ExportLayout, MaskValues
from factory.export.manifest import SAMPLES, Manifest
from factory.export.rows import Provenance, read_items, safe_name
from factory.export.selection import Choice, Selection, select
from factory.storage import Table
from factory.version import code_version

_MAX_CLASSES = 255


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How to write what was chosen.

    Attributes:
        format: a name of `FORMATS`.
        out: folder to write.
        overwrite: replace an earlier export there.
        name: of the dataset in the card; the folder's name by default.
        channels: "as-stored", or every image as grey or as rgb.
        mask_values: "stored", or "class": a lesion's value is 1 + its class.
        rows_per_shard: for formats with shards.
        command: how to make the export again, for the card.
        tag: of the synthetic table, where it was opened by one.
    """

    format: str
    out: str
    overwrite: bool = False
    name: str = ""
    channels: Channels = "as-stored"
    mask_values: MaskValues = "stored"
    rows_per_shard: int = 1000
    command: str = ""
    tag: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"--format {self.format!r}: there are {', '.join(FORMATS)}")
        if self.rows_per_shard < 1:
            raise ValueError(f"--rows-per-shard {self.rows_per_shard} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written.

    Attributes:
        folder: where.
        num_rows: all rows.
        counts: (split, origin, class) → rows; origin is real, synthetic or derived.
        left_out: reason → class → rows.
        notes: what the operator should know.
    """

    folder: str
    num_rows: int
    counts: Mapping[tuple[str, str, str], int]
    left_out: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]


def write_export(
    selection: Selection,
    settings: ExportSettings,
    progress: Callable[[str, int], Any] | None = None,
) -> ExportResult:
    """Export; the folder is there whole afterwards, or as it was.

    Args:
        selection: which rows, from `plan_export` with the same settings.
        settings: how.
        progress: (name, total rows) → context manager that gives a function to call with rows done.

    Raises:
        FileExistsError, FileNotFoundError: the folder may not be written.
        ValueError: a row that the format cannot hold; names it.
    """
    path = check_destination(settings.out, overwrite=settings.overwrite)
    layout = ExportLayout(
        name=safe_name(settings.name or path.name),
        class_names=selection.class_names,
        splits=selection.splits,
        num_items=selection.num_rows,
        mask_values=settings.mask_values,
        rows_per_shard=settings.rows_per_shard,
    )
    seen = Provenance()
    with (
        staged_folder(settings.out, overwrite=settings.overwrite) as staging,
        Manifest(staging, _head(selection, settings, layout)) as manifest,
    ):
        writer = FORMATS[settings.format](staging, layout)
        items = read_items(selection, seen, channels=settings.channels, mask_values=settings.mask_values)
        with _progress(progress, selection.num_rows) as advance:
            for item in items:
                manifest.add(item, writer.add(item))
                advance(1)
        writer.finish()
        _check_counts(selection, seen)
        facts = CardFacts(
            name=layout.name,
            format=settings.format,
            selection=selection,
            seen=seen,
            tag=settings.tag,
            command=settings.command,
            samples_sha256=manifest.close_samples(),
            samples_bytes=(staging / SAMPLES).stat().st_size,
        )
        write_card(staging, facts)
        manifest.finish()
    return ExportResult(
        folder=str(path),
        num_rows=selection.num_rows,
        counts=dict(sorted(seen.origins.items())),
        left_out=selection.left_out,
        notes=selection.notes,
    )


def plan_export(synthetic: Table, real: Table | None, choice: Choice, settings: ExportSettings) -> Selection:
    """Which rows will leave; no image is read, nothing is written.

    Args:
        synthetic, real: tables at the version to export.
        choice: which rows; `needs_mask` follows from the format.
        settings: how.

    Raises:
        ValueError: bad choice, or nothing to export.
    """
    choice = dataclasses.replace(choice, needs_mask=settings.format in NEEDS_MASK)
    selection = select(synthetic, real, choice)
    if settings.mask_values == "class" and len(selection.class_names) > _MAX_CLASSES:
        raise ValueError(
            f"--mask-values class: {len(selection.class_names)} classes do not fit into an 8-bit mask"
        )
    return selection


def _head(selection: Selection, settings: ExportSettings, layout: ExportLayout) -> dict[str, Any]:
    tables = {"synthetic": selection.synthetic, "real": selection.real}
    return {
        "export_format": settings.format,
        "manifest_version": 1,
        "name": layout.name,
        "code_version": code_version(),
        "class_names": list(selection.class_names),
        "tables": {
            name: {"name": Path(table.uri).name, "version": table.version}
            for name, table in tables.items()
            if table is not None
        },
        "tag": settings.tag,
        "num_rows": selection.num_rows,
        "left_out": selection.left_out,
    }


def _check_counts(selection: Selection, seen: Provenance) -> None:
    """What went by is what was planned: a row that is lost or doubled must not go unnoticed."""
    written: Counter[tuple[str, str, str]] = Counter()
    for (split, origin, label), number in seen.origins.items():
        written[split, "real" if origin == "real" else "synthetic", label] += number
    assert dict(written) == dict(selection.counts), f"planned {selection.counts}, written {dict(written)}"


def _progress(progress: Callable[[str, int], Any] | None, total: int) -> Any:
    if progress is not None:
        return progress("export", total)
    return contextlib.nullcontext(lambda rows: None)
