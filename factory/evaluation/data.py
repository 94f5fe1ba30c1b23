"""The only readers of the evaluation: rows of a real or a synthetic table as `Examples`.

Rows come in an order that depends on their ids alone, so that nothing downstream hangs on how a table was written.
Test rows need a `TestAccess`, which the storage layer records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from factory.evaluation.arms import Task
from factory.imaging import Letterbox, as_grey, as_rgb, decode_png
from factory.predictors.examples import Examples, NativeTruth
from factory.storage import Table, TestAccess, open_table, real_rows, whole_filter
from factory.storage import class_names as names_of
from schemas.draws import draw_order

_REAL = ["image_id", "group_id", "label", "label_name", "image", "mask", "height", "width", "pixel_spacing"]
_SYNTHETIC = ["request_id", "group_id", "derived", "label", "label_name", "image", "mask"]
_AT_ONCE = 256
UNKNOWN = "unknown"
"""Class of rows of an external table whose class is none of the training table's."""


def read_real(
    uri: str,
    splits: Sequence[str],
    *,
    size: int,
    channels: int,
    access: TestAccess | None = None,
    version: int | None = None,
    native: bool = False,
) -> Examples:
    """Real rows of `splits`, in the order of their image_id.

    Args:
        uri: a table made by `factory prepare`.
        splits: of "train", "val", "reserve"; "test" with `access`.
        size: side of the letterboxed images, px.
        channels: 1 grey (the mean of a colour image) or 3 RGB (a grey image replicated).
        access: leave to read test rows.
        version: of the table; the latest by default.
        native: keep masks and pixel spacing at native size too, for rows that judge.

    Raises:
        PermissionError: test rows without `access`.
        ValueError: no such rows, an unknown class, or a picture that cannot be decoded.
    """
    names = names_of(open_table(uri, version=version))
    rows = real_rows(uri, splits=splits, columns=_REAL, access=access, version=version)
    if not rows.num_rows:
        raise ValueError(f"{uri}: no row in the split(s) {', '.join(splits)}")
    rows = rows.sort_by("image_id")
    labels = _labels(uri, rows["label_name"].to_pylist(), names)
    images, masks, truths = _pixels(uri, rows, "image_id", size, channels)
    return _examples(
        images,
        masks,
        labels=labels,
        class_names=names,
        ids=tuple(rows["image_id"].to_pylist()),
        groups=tuple(rows["group_id"].to_pylist()),
        is_real=True,
        native=tuple(truths) if native else None,
    )


@dataclass(frozen=True, kw_only=True)
class ClassMatch:
    """How the classes of an external table fit those of the training table, by name.

    Attributes:
        shared: classes in both, in the training table's order.
        lacking: of the training table, without a row out there.
        foreign: of the external table, unknown to the training table; their rows can judge a segmentation only.
        judges_classes: whether it is a classification that the table judges.
    """

    shared: tuple[str, ...]
    lacking: tuple[str, ...]
    foreign: tuple[str, ...]
    judges_classes: bool = True

    def note(self) -> str:
        """One line for the report; "" where the classes are the same."""
        if not self.judges_classes:
            if self.foreign or not self.shared:
                told = ", ".join(self.foreign) or "no class"
                return f"the external table has {told}: its masks judge, without class"
            return ""
        parts = []
        if self.lacking:
            parts.append(f"the external table has no {', '.join(self.lacking)}")
        if self.foreign:
            parts.append(f"its {', '.join(self.foreign)} are unknown to the training table and left out")
        return "; ".join(parts)


def match_classes(train_uri: str, external_uri: str, task: Task = "classification") -> ClassMatch:
    """Compare class tables by name. The masks of a table without class names, or of others, can judge a segmentation.

    Raises:
        ValueError: for classification, no class in common.
    """
    names, table = names_of(open_table(train_uri)), open_table(external_uri)
    others = names_of(table) if "class_names" in table.metadata else ()
    shared = tuple(name for name in names if name in others)
    if not shared and task == "classification":
        told = f"its classes {', '.join(others)} have none" if others else "it has no classes, so none"
        raise ValueError(
            f"{external_uri}: {told} in common with {', '.join(names)} of {train_uri}; classes are matched by name. "
            "Its masks can judge --task segmentation"
        )
    return ClassMatch(
        shared=shared,
        lacking=tuple(name for name in names if name not in others),
        foreign=tuple(name for name in others if name not in names),
        judges_classes=task == "classification",
    )


def read_external(
    train_uri: str,
    external_uri: str,
    splits: Sequence[str],
    *,
    size: int,
    channels: int,
    task: Task = "classification",
    access: TestAccess | None = None,
    left_out: Sequence[str] = (),
) -> tuple[Examples, ClassMatch]:
    """Rows of another dataset to judge a model of this one: train on A, test on B.

    Args:
        task: what is judged. For a segmentation the classes need not match: rows of a class that the training table
            does not know are of the class UNKNOWN, which then stands behind its classes.
        left_out: image_ids that show what the training table shows (`leakage.images_shared_between`).

    Returns:
        The rows that may judge, with native masks, and how the classes matched. For classification these are the
        rows whose class the training table knows.

    Raises:
        PermissionError: test rows without `access`.
        ValueError: for classification, no class in common; or no row is left.
    """
    match = match_classes(train_uri, external_uri, task)
    names = names_of(open_table(train_uri))
    gone = set(left_out)
    rows = real_rows(external_uri, splits=splits, columns=_REAL, access=access).sort_by("image_id")
    keep = [
        image_id not in gone and (task == "segmentation" or name in match.shared)
        for name, image_id in zip(rows["label_name"].to_pylist(), rows["image_id"].to_pylist(), strict=True)
    ]
    rows = rows.filter(pa.array(keep, pa.bool_()))
    if not rows.num_rows:
        raise ValueError(f"{external_uri}: no row in {', '.join(splits)} is left that may judge")
    found = [name if name in match.shared else UNKNOWN for name in rows["label_name"].to_pylist()]
    names = with_unknown(names) if UNKNOWN in found else names
    images, masks, truths = _pixels(external_uri, rows, "image_id", size, channels)
    examples = _examples(
        images,
        masks,
        labels=_labels(external_uri, found, names),
        class_names=names,
        ids=tuple(rows["image_id"].to_pylist()),
        groups=tuple(rows["group_id"].to_pylist()),
        is_real=True,
        native=tuple(truths),
    )
    return examples, match


def with_unknown(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes, and behind them that of rows whose class is none of them."""
    return class_names if UNKNOWN in class_names else (*class_names, UNKNOWN)


def read_synthetic(
    uri: str,
    *,
    size: int,
    channels: int,
    class_names: Sequence[str],
    tag: str | None = None,
    version: int | None = None,
    where: str = "",
    accepted_only: bool = True,
    limits: Mapping[str, int] | None = None,
) -> Examples:
    """Synthetic rows in the order of drawing, so that the first n of a class are what a ratio takes.

    Args:
        uri: a table made by `factory synthesize`.
        size, channels: as in `read_real`.
        class_names: of the real table; the synthetic table must have the same.
        tag, version: a curated tag, or a version; the latest by default.
        where: SQL that rows must pass too.
        accepted_only: leave out rejected rows; off for the ungated arm.
        limits: most rows of each class to read; all by default.

    Returns:
        Examples whose `groups` are the inherited group of a derived row and the row's own id otherwise. Rows that
        kept pixels of an image outside train are never read.

    Raises:
        ValueError: other classes, a bad `where`, or a picture that cannot be decoded.
    """
    table = open_table(uri, tag=tag, version=version)
    names = tuple(class_names)
    if not {"request_id", "stream_reject_reason"} <= set(table.schema.names):
        raise ValueError(f"{uri} is not a synthetic table; `factory synthesize` makes one")
    if names_of(table) != names:
        raise ValueError(
            f"classes of {uri} are {', '.join(names_of(table))}, those of the real table {', '.join(names)}"
        )
    chosen = _chosen_ids(table, synthetic_filter(where, accepted_only=accepted_only), limits)
    parts = []
    for start in range(0, len(chosen), _AT_ONCE):
        listed = ", ".join(map(str, chosen[start : start + _AT_ONCE]))
        found = table.read([*_SYNTHETIC, "_rowid"], f"_rowid IN ({listed})")
        place = {row: number for number, row in enumerate(chosen)}
        order = np.argsort([place[row] for row in found["_rowid"].to_pylist()], kind="stable")
        parts.append(found.take(order))
    if not parts:
        blank = np.empty((0, size, size, channels), np.uint8)
        return _examples(
            blank, [], labels=[], class_names=names, ids=(), groups=(), is_real=False, native=None
        )
    rows = pa.concat_tables(parts)
    images, masks, _ = _pixels(uri, rows, "request_id", size, channels)
    return _examples(
        images,
        masks,
        labels=_labels(uri, rows["label_name"].to_pylist(), names),
        class_names=names,
        ids=tuple(rows["request_id"].to_pylist()),
        groups=tuple(
            group if derived and group else own
            for own, group, derived in zip(
                rows["request_id"].to_pylist(), rows["group_id"].to_pylist(), rows["derived"].to_pylist()
            )
        ),
        is_real=False,
        native=None,
    )


def synthetic_filter(where: str, *, accepted_only: bool = True) -> str:
    """SQL of the synthetic rows that may train."""
    parts = ["split = 'train'"]
    if accepted_only:
        parts.append("accepted")
    if where.strip():
        parts.append(whole_filter(where))
    return " AND ".join(parts)


def plan_ids(
    uri: str,
    *,
    tag: str | None = None,
    version: int | None = None,
    where: str = "",
    accepted_only: bool = True,
) -> list[str]:
    """Plans of the rows that `read_synthetic` would read, sorted."""
    table = open_table(uri, tag=tag, version=version)
    found: set[str] = set()
    for batch in table.query_batches(
        synthetic_filter(where, accepted_only=accepted_only), columns=["plan_id"], batch_size=1 << 16
    ):
        found.update(batch.column(0).to_pylist())
    return sorted(found)


def _chosen_ids(table: Table, filter: str, limits: Mapping[str, int] | None) -> list[int]:
    """Row ids in the order of drawing, at most `limits` of each class."""
    table.count(filter)  # a filter that cannot be read is refused with its own words
    entries: list[tuple[int, str, str, int]] = []
    for batch in table.batches(["_rowid", "request_id", "label_name"], filter, batch_size=1 << 16):
        columns = (batch.column(name).to_pylist() for name in ("request_id", "label_name", "_rowid"))
        entries += [(draw_order(request), request, label, row) for request, label, row in zip(*columns)]
    entries.sort()
    taken: dict[str, int] = {}
    chosen = []
    for _, _, label, row in entries:
        taken[label] = taken.get(label, 0) + 1
        if limits is None or taken[label] <= limits.get(label, 0):
            chosen.append(row)
    return chosen


def _labels(uri: str, found: Sequence[str], names: Sequence[str]) -> list[int]:
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(f"{uri}: class {unknown[0]!r} is none of {', '.join(names)}")
    return [names.index(name) for name in found]


def _pixels(
    uri: str, rows: pa.Table, key: str, size: int, channels: int
) -> tuple[np.ndarray, list[np.ndarray | None], list[NativeTruth]]:
    """Letterboxed images (N, S, S, K), masks (S, S) or None, and native truths."""
    if channels not in (1, 3):
        raise ValueError(f"channels: want 1 (grey) or 3 (RGB), got {channels}")
    images = np.empty((rows.num_rows, size, size, channels), np.uint8)
    masks: list[np.ndarray | None] = []
    truths = []
    wanted = [name for name in (key, "image", "mask", "pixel_spacing") if name in rows.column_names]
    for number, row in enumerate(rows.select(wanted).to_pylist()):
        try:
            image = decode_png(row["image"])
            mask = None if row["mask"] is None else decode_png(row["mask"])
        except (OSError, SyntaxError) as fault:  # what Pillow raises for bytes that are no PNG
            raise ValueError(f"{uri}: row {row[key]}: image or mask cannot be decoded ({fault})") from fault
        box = Letterbox(height=image.shape[0], width=image.shape[1], size=size)
        pixels = box.apply(as_grey(image) if channels == 1 else as_rgb(image))
        images[number] = pixels.reshape(size, size, channels)
        masks.append(None if mask is None else box.apply(mask, is_mask=True))
        truths.append(NativeTruth(letterbox=box, mask=mask, pixel_spacing=row.get("pixel_spacing")))
    return images, masks, truths


def _examples(
    images: np.ndarray,
    masks: Sequence[np.ndarray | None],
    *,
    labels: Sequence[int],
    class_names: tuple[str, ...],
    ids: tuple[str, ...],
    groups: tuple[str, ...],
    is_real: bool,
    native: tuple[NativeTruth, ...] | None,
) -> Examples:
    has_mask = np.array([mask is not None for mask in masks], bool)
    stacked = None
    if has_mask.any():
        blank = np.zeros(images.shape[1:3], np.uint8)
        stacked = np.stack([blank if mask is None else mask for mask in masks])
    return Examples(
        images=images,
        labels=np.asarray(labels, np.int64),
        class_names=class_names,
        ids=ids,
        groups=groups,
        is_real=np.full(len(images), is_real),
        masks=stacked,
        has_mask=None if stacked is None else has_mask,
        native=native,
    )
