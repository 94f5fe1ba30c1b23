"""Sketches of training images, drawn once and kept in a table beside the real one.

    REAL.cache/sketches-<digest of the extractor>-<resolution>.lance      key, sketch

The name says what was computed, so a table never goes stale: rows are found by image_id, a hash of the pixels, and
what is missing is added.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from factory.imaging import TrainingRow, decode_png, encode_png
from factory.sketches import Extractor
from factory.training.latent_cache import add_latents as add_rows
from factory.training.latent_cache import locked

_ROWS_PER_BATCH = 32
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False, metadata={"description": "image_id"}),
        pa.field(
            "sketch", pa.binary(), nullable=False, metadata={"description": "PNG, uint8 (R, R), 255 = edge"}
        ),
    ]
)


def sketches_uri(real: str, extractor: Extractor, resolution: int) -> str:
    """Where the sketches of the rows of `real` lie for this extractor and resolution."""
    from factory.storage import cache_folder

    return str(cache_folder(real) / f"sketches-{extractor.digest()}-{resolution}.lance")


def sketches_of(
    real: str,
    extractor: Extractor,
    rows: Sequence[TrainingRow],
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Sketches uint8 (R, R) of decoded rows, in their order; those that the table lacks are drawn and added.

    `progress` is called with (sketches drawn, sketches to draw). One process at a time adds rows.

    Raises:
        ValueError: rows of several sizes.
        FileNotFoundError: the extractor's weights are missing.
    """
    if not rows:
        return []
    sides = {row.image.shape[:2] for row in rows}
    if len(sides) > 1:
        raise ValueError(f"rows: want images of one size, got {sorted(sides)}; letterbox the rows first")
    uri = sketches_uri(real, extractor, next(iter(sides))[0])
    found = _read(uri, rows)
    if len(found) < len({row.image_id for row in rows}):
        with locked(uri):
            found = _read(uri, rows)  # another process may have been faster
            missing = {row.image_id: row for row in rows if row.image_id not in found}
            add_rows(uri, _drawn(list(missing.values()), extractor, found, progress))
    return [found[row.image_id] for row in rows]


def _drawn(
    rows: Sequence[TrainingRow],
    extractor: Extractor,
    found: dict[str, np.ndarray],
    progress: Callable[[int, int], None] | None,
) -> Iterator[pa.Table]:
    for start in range(0, len(rows), _ROWS_PER_BATCH):
        batch = rows[start : start + _ROWS_PER_BATCH]
        sketches = [extractor.draw(row.image) for row in batch]
        found |= {row.image_id: sketch for row, sketch in zip(batch, sketches)}
        columns = {
            "key": [row.image_id for row in batch],
            "sketch": [encode_png(sketch) for sketch in sketches],
        }
        yield pa.table(columns, schema=SCHEMA)
        if progress is not None:
            progress(start + len(batch), len(rows))


def _read(uri: str, rows: Sequence[TrainingRow]) -> dict[str, np.ndarray]:
    from factory.storage import open_table

    try:
        table = open_table(uri)
    except FileNotFoundError:
        return {}
    wanted = {row.image_id for row in rows}
    found = {}
    for batch in table.batches():
        for row in batch.to_pylist():
            if row["key"] in wanted:
                found[row["key"]] = decode_png(row["sketch"])
    return found
