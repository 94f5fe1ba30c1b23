"""The copy test over whole tables: fitted on real training images, measured, and run on synthetic ones.

Real images are kept as small frames, synthetic ones are read in batches: memory does not grow with their pixels.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.curation.memorisation import REGIONS, CopyMatch, CopyTest, FittedCopyTest, Frame, Region
from factory.curation.planted import PLANTED, Power, detection_power
from factory.imaging import decode_png
from jobs.curation_rows import RealRows, SyntheticRows
from jobs.progress import progress_bar
from schemas.sample import RejectReason

if TYPE_CHECKING:
    from factory.embedding import EmbedderSpec
    from factory.storage import Table

_IMAGES_AT_ONCE = 64
_CALIBRATION_ROWS = 300
_VALIDATION_ROWS = 100
_TESTED = "stream_reject_reason IS NULL OR stream_reject_reason = 'too_similar_to_real'"


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyFindings:
    """Outcome of the copy test: a match per tested request_id, and how good the test is."""

    matches: Mapping[str, CopyMatch]
    thresholds: Mapping[Region, float]
    power: Power | None
    false_alarm: float | None


def find_copies(
    source: CopyTest,
    spec: "EmbedderSpec",
    table: "Table",
    real_table: "Table",
    real: RealRows,
    rows: SyntheticRows,
    *,
    num_planted: int,
    threads: int,
    rejudged: bool = False,
) -> CopyFindings:
    """Fit the copy test on training rows, say how good it is, and test the rows.

    Args:
        source: settings; its side is lowered to that of the synthetic images.
        spec: the embedder of both tables.
        table, real_table: the tables.
        real, rows: what was read of them.
        num_planted: training images to plant copies of; 0: the power is not measured.
        threads: images compared at a time.
        rejudged: whether the stream's reasons of `rows` are others than the table's.

    Raises:
        ValueError: synthetic images of less than 32 px, or too few training rows to calibrate on.
    """
    size = _synthetic_size(table)
    if size < 32:
        raise ValueError(f"{table.uri}: images of {size} px are too small for the copy test; --no-copy-test")
    source = dataclasses.replace(source, side=min(source.side, size))
    frames = _real_frames(source, real_table, real)
    rows_used = min(_CALIBRATION_ROWS, len(frames)) if source.correlation is None else 0
    with progress_bar("calibrate", rows_used) as advance:
        test = source.fit(
            frames,
            real.embeddings,
            real.groups,
            calibrated_on=_CALIBRATION_ROWS,
            num_threads=threads,
            progress=advance,
        )
    power = _power(num_planted, spec, test, real_table, real, size) if num_planted else None
    false_alarm = _false_alarm(test, real_table, threads)
    position = {request_id: row for row, request_id in enumerate(rows.request_ids)}
    tested = {
        request_id
        for request_id, reason in zip(rows.request_ids, rows.stream_reasons)
        if reason is None or reason == RejectReason.TOO_SIMILAR_TO_REAL
    }
    where = None if rejudged else _TESTED
    matches: dict[str, CopyMatch] = {}
    with ThreadPoolExecutor(threads) as pool, progress_bar("copies", len(tested)) as advance:
        for batch in table.batches(["request_id", "image", "mask"], where, batch_size=_IMAGES_AT_ONCE):

            def match(row: Mapping[str, Any]) -> CopyMatch:
                place = position[row["request_id"]]
                group = rows.groups[place]
                # The background of a derived row is a real image: only its lesion could be a copy.
                regions = REGIONS if group is None else REGIONS[1:]
                return test.match(_frame(source, row), rows.embeddings[place], group, regions)

            items = [item for item in batch.to_pylist() if item["request_id"] in tested]
            matches.update(zip((item["request_id"] for item in items), pool.map(match, items)))
            advance(len(items))
    return CopyFindings(matches=matches, thresholds=test.thresholds, power=power, false_alarm=false_alarm)


def _synthetic_size(table: "Table") -> int:
    """px of the longer side of the smallest image: no more detail than that is compared."""
    smallest = 1 << 30
    for batch in table.batches(["height", "width"], batch_size=1 << 16):
        for row in batch.to_pylist():
            smallest = min(smallest, max(row["height"], row["width"]))
    return smallest


def _frame(source: CopyTest, row: Mapping[str, Any]) -> Frame:
    return source.frame(decode_png(row["image"]), None if row["mask"] is None else decode_png(row["mask"]))


def _real_images(table: "Table", filter: str) -> Iterator[dict[str, Any]]:
    names = ["image_id", "image", "mask", "embedding"]
    for batch in table.batches(names, filter=filter, batch_size=_IMAGES_AT_ONCE):
        yield from batch.to_pylist()


def _real_frames(source: CopyTest, table: "Table", real: RealRows) -> list[Frame]:
    position = {image_id: k for k, image_id in enumerate(real.image_ids)}
    frames: list[Any] = [None] * len(position)
    with progress_bar("read real images", len(frames)) as advance:
        for row in _real_images(table, "split = 'train'"):
            frames[position[row["image_id"]]] = _frame(source, row)
            advance(1)
    return frames


def _power(
    num_planted: int, spec: "EmbedderSpec", test: FittedCopyTest, table: "Table", real: RealRows, size: int
) -> Power:
    loaded = spec.embedder().load()
    spec.check_same(loaded.spec, "planted copies")
    picked = np.unique(np.linspace(0, len(real.image_ids) - 1, num_planted).astype(int))
    position = {real.image_ids[k]: int(k) for k in picked}
    names = ", ".join(f"'{image_id}'" for image_id in position)
    sources = [
        (
            position[row["image_id"]],
            decode_png(row["image"]),
            None if row["mask"] is None else decode_png(row["mask"]),
        )
        for row in _real_images(table, f"split = 'train' AND image_id IN ({names})")
    ]
    with progress_bar("planted copies", len(sources) * len(PLANTED)) as advance:
        return detection_power(test, sources, loaded.embed, size=size, progress=advance)


def _false_alarm(test: FittedCopyTest, table: "Table", threads: int) -> float | None:
    """Share of validation images, which the generator never saw, that are called copies."""
    rows = list(itertools.islice(_real_images(table, "split = 'val'"), _VALIDATION_ROWS))
    if len(rows) < 20:
        return None

    def is_copy(row: Mapping[str, Any]) -> bool:
        return test.match(_frame(test.source, row), np.asarray(row["embedding"], np.float32)).is_copy

    with ThreadPoolExecutor(threads) as pool:
        return float(np.mean(list(pool.map(is_copy, rows))))
