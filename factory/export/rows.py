"""The chosen rows, read in batches and made into items: real ones spread evenly among synthetic ones."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from factory.export.items import Channels, ExportItem, MaskValues, with_channels, with_mask_values
from factory.export.selection import Selection
from schemas.identity import hash_parts

ROWS_AT_ONCE = 64
"""Rows read at a time, images included."""
_SYNTHETIC = (
    *("request_id", "label", "label_name", "image", "mask", "derived", "licence", "group_id"),
    *("recipe", "plan_id", "fingerprint", "weights", "seed", "code_version"),
)
_REAL = (
    *("image_id", "split", "label", "label_name", "image", "mask"),
    *("dataset", "licence", "allowed_use", "group_id"),
)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What was seen while rows went by; filled by `read_items`.

    Attributes:
        plans: plan_id → recipe, fingerprint, weights, seed, code_version.
        plan_rows: plan_id → rows.
        sources: (dataset, licence, allowed_use) → real rows.
        licences: licence → synthetic rows that inherited it.
        origins: (split, origin, class) → rows.
    """

    plans: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    plan_rows: Counter[str] = field(default_factory=Counter)
    sources: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    origins: Counter[tuple[str, str, str]] = field(default_factory=Counter)


def read_items(
    selection: Selection, seen: Provenance, *, channels: Channels, mask_values: MaskValues
) -> Iterator[ExportItem]:
    """Every chosen row once: train first, real ones spread evenly among synthetic ones, then val.

    Memory holds a few batches of `ROWS_AT_ONCE` rows. The order depends on the tables alone.

    Raises:
        ValueError: a row cannot be exported; names it.
    """
    real = _real_rows(selection, "train")
    synthetic = _synthetic_rows(selection)
    mixed = interleave(real, selection.num_of("real"), synthetic, selection.num_of("synthetic"))
    for row in itertools.chain(mixed, _real_rows(selection, "val")):
        item = _item(row, seen, channels, mask_values)
        seen.origins[item.split, item.origin, item.label_name] += 1
        yield item


def interleave(first: Iterator[Any], num_first: int, second: Iterator[Any], num_second: int) -> Iterator[Any]:
    """All of both iterators in their order, the elements of the shorter one evenly spread."""
    total, taken = num_first + num_second, 0
    for place in range(total):
        wanted = ((place + 1) * num_first) // total
        if wanted > taken:
            taken += 1
            yield next(first)
        else:
            yield next(second)


def group_pseudonym(group_id: str | None) -> str:
    """A group without the patient's id in it: equal for equal groups; "" for none."""
    return "" if group_id is None else hash_parts("export-group", group_id)[:16]


def _synthetic_rows(selection: Selection) -> Iterator[dict[str, Any]]:
    table = selection.synthetic
    if selection.row_ids is None:
        for batch in table.batches(_SYNTHETIC, selection.synthetic_filter, batch_size=ROWS_AT_ONCE):
            yield from batch.to_pylist()
        return
    for start in range(0, len(selection.row_ids), ROWS_AT_ONCE):
        part = selection.row_ids[start : start + ROWS_AT_ONCE]
        rows = table.read([*_SYNTHETIC, "_rowid"], f"_rowid IN ({', '.join(map(str, part))})")
        yield from sorted(rows.to_pylist(), key=lambda row: row["_rowid"])


def _real_rows(selection: Selection, split: str) -> Iterator[dict[str, Any]]:
    if selection.real is None or not selection.num_of("real", split):
        return
    where = f"{selection.real_filter} AND split = '{split}'"
    for batch in selection.real.batches(_REAL, where, batch_size=ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _item(
    row: Mapping[str, Any], seen: Provenance, channels: Channels, mask_values: MaskValues
) -> ExportItem:
    row_id = row.get("image_id") or row["request_id"]
    try:
        image = with_channels(row["image"], channels)
        mask = with_mask_values(row["mask"], row["label"], mask_values)
    except (OSError, SyntaxError) as fault:  # what Pillow raises for bytes that are no PNG
        raise ValueError(f"row {row_id}: image or mask cannot be decoded ({fault})") from fault
    facts = {"licence": row["licence"], "group": group_pseudonym(row["group_id"])}
    if "image_id" in row:
        seen.sources[row["dataset"], row["licence"], row["allowed_use"]] += 1
        facts["dataset"] = row["dataset"]
    else:
        _note_plan(row, seen)
        facts |= {"recipe": row["recipe"], "plan_id": row["plan_id"]}
    return ExportItem(
        row_id=row_id,
        origin="real" if "image_id" in row else "derived" if row["derived"] else "synthetic",
        split=row.get("split", "train"),
        label=row["label"],
        label_name=row["label_name"],
        image=image,
        mask=mask,
        facts=facts,
    )


def _note_plan(row: Mapping[str, Any], seen: Provenance) -> None:
    seen.plan_rows[row["plan_id"]] += 1
    seen.licences[row["licence"]] += 1
    if row["plan_id"] not in seen.plans:
        names = ("recipe", "fingerprint", "seed", "code_version")
        seen.plans[row["plan_id"]] = {name: row[name] for name in names} | {
            "weights": dict(row["weights"] or ())
        }


def safe_name(text: str) -> str:
    """`text` with only letters, digits, '.', '-' and '_': the name of a data set."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "export"
