"""Whether a synthetic table may be released: what must be known of it, and what stands in the way."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from factory.export.card import curation_record
from factory.storage import Table

UNKNOWN_USE = ("", "unknown")


@dataclass(frozen=True, kw_only=True)
class ReleaseRecord:
    """What is written down of a release, in the table's metadata and in release.json.

    Attributes:
        name: of the release, also the tag.
        curation: tag of the curation in force.
        memorisation: record of the test for closeness to training images.
        copy_test: power, thresholds and false alarms of the search for copies.
        near_copies: rows called near copies of real images; they never leave.
        derived: accepted rows that keep pixels of a real image.
        real_licences: licence and allowed use of the real training rows, with their number.
        base_licence: licence of the base weights, as the operator gave it.
        weights: digests of all weights used, by name.
        obstacles: what stood in the way, where the release was forced.
        forced: the operator's reason.
    """

    name: str
    curation: str | None
    memorisation: Mapping[str, Any]
    copy_test: Mapping[str, Any]
    near_copies: int
    derived: int
    real_licences: Mapping[str, int]
    base_licence: str
    weights: Mapping[str, str]
    obstacles: tuple[str, ...]
    forced: str | None


def examine(table: Table, real: Table, *, name: str, base_licence: str, forced: str | None) -> ReleaseRecord:
    """Everything a release record says, obstacles included; nothing is written.

    Args:
        table: the synthetic table, at the version to release.
        real: the real table that its generator was trained on.
        name: of the release.
        base_licence: of the base weights; "" where the operator gave none.
        forced: reason for releasing in spite of obstacles, or None.
    """
    found = curation_record(table, None)
    tag, record = found if found is not None else (None, {})
    memorisation = json.loads(table.metadata.get(f"memorisation.{tag}", "{}"))
    licences = _licences(real)
    derived = table.count("accepted AND derived")
    obstacles = tuple(_obstacles(tag, record, memorisation, licences, base_licence, derived))
    rows = table.read(["weights"], limit=1)["weights"].to_pylist()
    return ReleaseRecord(
        name=name,
        curation=tag,
        memorisation=memorisation,
        copy_test={k: record.get(k) for k in ("copy_thresholds", "power", "false_alarm")},
        near_copies=table.count("reject_reason = 'near_copy_of_real'"),
        derived=derived,
        real_licences={" — ".join(key): number for key, number in sorted(licences.items())},
        base_licence=base_licence,
        weights=dict(rows[0]) if rows else {},
        obstacles=obstacles,
        forced=forced,
    )


def _licences(real: Table) -> dict[tuple[str, str, str], int]:
    """(dataset, licence, allowed use) → training rows."""
    counts: dict[tuple[str, str, str], int] = {}
    for batch in real.batches(["dataset", "licence", "allowed_use"], filter="split = 'train'"):
        for row in batch.to_pylist():
            key = (row["dataset"], row["licence"], row["allowed_use"])
            counts[key] = counts.get(key, 0) + 1
    return counts


def _obstacles(
    tag: str | None,
    record: Mapping[str, Any],
    memorisation: Mapping[str, Any],
    licences: Mapping[tuple[str, str, str], int],
    base_licence: str,
    derived: int,
) -> Iterator[str]:
    if tag is None:
        yield "the table was not curated (`factory curate`)"
    elif not record.get("copy_thresholds"):
        yield f"{tag} searched for no copies of real images (`factory curate` without --no-copy-test)"
    if memorisation.get("verdict") == "memorising":
        yield f"the generator memorises: {tag} finds it closer to its training images, p {memorisation['p_value']:.3f}"
    elif tag is not None and "verdict" not in memorisation:
        why = memorisation.get("not_done", "it was curated by an older version")
        yield f"memorisation was not tested: {why}"
    if derived:
        yield f"{derived} accepted rows keep pixels of real images: their licence and consent must allow it"
    for (dataset, licence, use), number in sorted(licences.items()):
        if use.strip().lower() in UNKNOWN_USE:
            yield f"{number} real training rows of {dataset} ({licence}) have an unknown allowed_use"
    if not base_licence.strip():
        yield "the licence of the base weights is not given (--base-licence)"
