"""What every source reads off the training rows: their digest, mask size and lesions by label."""

from collections.abc import Sequence

from factory.imaging import TrainingRow
from schemas.identity import hash_parts


def rows_digest(rows: Sequence[TrainingRow]) -> str:
    """Digest of the rows' ids, independent of their order: recorded with every fitted constant."""
    return hash_parts("rows", *sorted(row.image_id for row in rows))


def mask_size(rows: Sequence[TrainingRow]) -> int:
    """Side of the rows' square masks, px.

    Raises:
        ValueError: no row has a mask, or they differ in size or are not square.
    """
    shapes = {row.mask.shape for row in rows if row.mask is not None}
    if not shapes:
        raise ValueError(f"masks: none of the {len(rows)} training rows has a mask")
    if len(shapes) > 1 or len(set(next(iter(shapes)))) > 1:
        raise ValueError(f"masks: want one square size, got {sorted(shapes)}; letterbox the rows first")
    return next(iter(shapes))[0]


def lesion_rows_by_label(rows: Sequence[TrainingRow]) -> dict[str, list[TrainingRow]]:
    """The rows with a non-empty mask, by label name; an empty list for a class without lesions.

    Rows are ordered by image_id, so that what is fitted does not depend on the order of the table.

    Raises:
        ValueError: a label has rows but none of them has a mask.
    """
    grouped: dict[str, list[TrainingRow]] = {}
    masked: set[str] = set()
    for row in sorted(rows, key=lambda row: row.image_id):
        members = grouped.setdefault(row.label_name, [])
        if row.mask is not None:
            masked.add(row.label_name)
            if row.mask.any():
                members.append(row)
    for label in grouped:
        if label not in masked:
            raise ValueError(f"label {label!r}: no training row has a mask (empty masks say: no lesion)")
    return grouped
