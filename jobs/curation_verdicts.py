"""From what was found to the verdict of every row: copies, duplicates, the diversity floor, and the columns written."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.curation_result import NearestPair
from schemas.sample import RejectReason, curation_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from factory.curation.floor import ClassFloor
    from factory.embedding import EmbedderSpec
    from jobs.curate import Args
    from jobs.curation_copies import CopyFindings
    from jobs.curation_duplicates import DuplicateFindings, Search
    from jobs.curation_rows import RealRows, SyntheticRows


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """What is written of every row: reject reason and the row it duplicates; and how that came about.

    Attributes:
        reasons: None where accepted.
        duplicate_of: request_id of the kept row; also of duplicates that the floor kept.
        limits: cosine of duplicates per class; empty where nothing was compared.
        duplicates: how they were searched; None likewise.
        floors: classes below --min-share.
        notes: for the operator.
    """

    reasons: list[str | None]
    duplicate_of: list[str | None]
    limits: Mapping[str, float]
    duplicates: "DuplicateFindings | None"
    floors: "Sequence[ClassFloor]"
    notes: Sequence[str]


def mark_copies(
    rows: "SyntheticRows",
    real: "RealRows",
    copies: "CopyFindings",
    similarity: np.ndarray,
    nearest: np.ndarray,
) -> tuple[list[str | None], list[float | None]]:
    """Reasons so far and correlations; the nearest real image of a copy becomes the one it was found in."""
    reasons: list[str | None] = list(rows.stream_reasons)
    correlations: list[float | None] = [None] * len(reasons)
    for row, request_id in enumerate(rows.request_ids):
        match = copies.matches.get(request_id)
        if match is None or match.reference < 0:
            continue
        correlations[row] = match.correlation
        if match.is_copy:
            # The pair to look at is the one that registration found, whatever the embedding prefers.
            reasons[row] = RejectReason.NEAR_COPY_OF_REAL
            nearest[row, 0] = match.reference
            similarity[row, 0] = real.embeddings[match.reference] @ rows.embeddings[row]
    return reasons, correlations


def mark_duplicates(
    args: "Args",
    spec: "EmbedderSpec",
    rows: "SyntheticRows",
    real: "RealRows",
    reasons: Sequence[str | None],
    search: "Search",
    folder: Path,
) -> Verdicts:
    """Duplicates among the rows without a reason, and the diversity floor.

    Of a set of duplicates the row deepest inside the similarity band is kept, then that of lowest request_index.
    """
    from factory.curation.floor import apply_floor
    from factory.curation.link_store import LinkSettings
    from jobs.curation_duplicates import find_duplicates_among
    from jobs.curation_thresholds import duplicate_limits, parse_similarity

    count = len(reasons)
    reasons = list(reasons)
    duplicate_of: list[str | None] = [None] * count
    quality = np.nan_to_num(rows.quality, nan=-np.inf)
    rank = np.empty(count, np.int64)
    rank[np.lexsort((np.arange(count), rows.indices, -quality))] = np.arange(count)
    members = np.array([reason is None for reason in reasons], bool)
    limits: dict[str, float] = {}
    notes: list[str] = []
    found = None
    if members.sum() > 1:
        classes = sorted(set(rows.labels))
        limits, notes = duplicate_limits(
            parse_similarity(args.duplicate_similarity),
            classes,
            real,
            quantile=args.duplicate_quantile,
            per_class=args.duplicate_per_class,
            num_threads=search.num_threads,
        )
        found = find_duplicates_among(
            rows.request_ids,
            rows.embeddings,
            members,
            rank,
            np.array([limits[label] for label in rows.labels], np.float32),
            LinkSettings(embedder=dataclasses.replace(spec, weights=None).to_json(), limits=limits),
            search,
            folder,
        )
        for row in np.flatnonzero(found.kept != np.arange(count)).tolist():
            reasons[row] = RejectReason.DUPLICATE_OF_SYNTHETIC
            duplicate_of[row] = rows.request_ids[found.kept[row]]
    restored, floors = apply_floor(rows.labels, reasons, rank, args.min_share, keep=args.floor == "keep")
    for row in restored:
        reasons[row] = None
    return Verdicts(
        reasons=reasons,
        duplicate_of=duplicate_of,
        limits=limits,
        duplicates=found,
        floors=floors,
        notes=notes,
    )


def curation_columns(
    rows: "SyntheticRows",
    verdicts: Verdicts,
    real: "RealRows",
    similarity: np.ndarray,
    nearest: np.ndarray,
) -> "pa.Table":
    """The curation columns of every row."""
    import pyarrow as pa

    ids = [None if k < 0 else real.image_ids[k] for k in nearest[:, 0]]
    values = [float(s) if k >= 0 else None for s, k in zip(similarity[:, 0], nearest[:, 0])]
    columns = {
        "request_id": rows.request_ids,
        "reject_reason": [None if reason is None else str(reason) for reason in verdicts.reasons],
        "accepted": [reason is None for reason in verdicts.reasons],
        "duplicate_of": verdicts.duplicate_of,
        "nearest_real": ids,
        "nearest_real_similarity": values,
    }
    schema = pa.schema([pa.field("request_id", pa.string(), nullable=False), *curation_schema()])
    return pa.table(columns, schema=schema)


def telling_pairs(
    num_pairs: int,
    rows: "SyntheticRows",
    real: "RealRows",
    similarity: np.ndarray,
    nearest: np.ndarray,
    correlations: Sequence[float | None],
    copies: "CopyFindings",
) -> list[NearestPair]:
    """The most telling pairs: by excess over the copy threshold, then by similarity."""

    def telling(row: int) -> tuple[float, float, str]:
        match = copies.matches.get(rows.request_ids[row])
        excess = match.excess if match is not None and match.is_copy else 0.0
        return -excess, -float(similarity[row, 0]), rows.request_ids[row]

    there = [row for row in range(len(rows.request_ids)) if nearest[row, 0] >= 0]
    return [
        NearestPair(
            request_id=rows.request_ids[row],
            image_id=real.image_ids[nearest[row, 0]],
            similarity=float(similarity[row, 0]),
            correlation=correlations[row],
        )
        for row in sorted(there, key=telling)[:num_pairs]
    ]
