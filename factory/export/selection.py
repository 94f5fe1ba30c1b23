"""Which rows leave: accepted synthetic ones, real ones of the train (and validation) split, mixed at a ratio.

Only small columns are read here, in batches. A ratio draws, per class, the synthetic rows with the lowest hash of
their request_id: the choice is the same on every machine, and a larger ratio contains the smaller one.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from factory.storage import Table, class_names, whole_filter
from schemas.draws import draw_order, share_out

NEAR_COPY = "near_copy_of_real"
_AT_ONCE = 1 << 16
_REAL_FILTERS = {False: "split = 'train'", True: "split IN ('train', 'val')"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the operator wants.

    Attributes:
        where: SQL over the synthetic table, beside the verdict; "" for all.
        include_near_copies: also rows whose verdict is near_copy_of_real.
        ratio: synthetic per real training image; None for all synthetic rows.
        balance: even out real + synthetic over the classes, instead of the classes' shares in the real split.
        include_val: the real validation rows too, as a split of their own.
        needs_mask: leave out rows without a mask.
    """

    where: str = ""
    include_near_copies: bool = False
    ratio: float | None = None
    balance: bool = False
    include_val: bool = False
    needs_mask: bool = False

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 <= self.ratio < float("inf"):
            raise ValueError(f"--ratio {self.ratio} must be a number of at least 0")
        if self.balance and self.ratio is None:
            raise ValueError("--balance says how --ratio is shared out; give --ratio too")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows that will leave, and what stays behind.

    Attributes:
        choice: what was wanted.
        class_names: the class table, the same in both tables.
        synthetic: the table, at one version.
        real: likewise, or None.
        synthetic_filter: SQL of the rows to draw from.
        row_ids: Lance row ids of the drawn rows, ascending; None: all that pass the filter.
        real_filter: SQL of the real rows; never lets a test row through.
        counts: (split, "real" | "synthetic", class) → rows that leave.
        left_out: reason → class → rows of the synthetic and real tables that stay behind.
        notes: what the operator should know.
    """

    choice: Choice
    class_names: tuple[str, ...]
    synthetic: Table
    real: Table | None
    synthetic_filter: str
    row_ids: Sequence[int] | None
    real_filter: str
    counts: Mapping[tuple[str, str, str], int]
    left_out: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = field(default=())

    @property
    def num_rows(self) -> int:
        """All rows that leave."""
        return sum(self.counts.values())

    def num_of(self, origin: str, split: str = "train") -> int:
        """Rows of one origin ("real" or "synthetic") and split."""
        return sum(n for (where, kind, _), n in self.counts.items() if (where, kind) == (split, origin))

    @property
    def splits(self) -> tuple[str, ...]:
        """train, and val where it has rows."""
        return ("train", "val") if self.num_of("real", "val") else ("train",)


def select(synthetic: Table, real: Table | None, choice: Choice) -> Selection:
    """Decide which rows leave.

    Raises:
        ValueError: not a synthetic (real) table, other classes, a bad `where`, a ratio without real rows, or
            nothing left to export.
    """
    names = _check(synthetic, real, choice)
    wanted, left_out = _filters(synthetic, choice)
    available = _by_class(synthetic, wanted)
    counts: dict[tuple[str, str, str], int] = {}
    notes = _notes(synthetic, choice)
    real_filter = _REAL_FILTERS[choice.include_val]
    if real is not None:
        if choice.needs_mask:
            _add(left_out, "real row without mask", _by_class(real, f"{real_filter} AND mask IS NULL"))
            real_filter += " AND mask IS NOT NULL"
        for split in ("train", "val") if choice.include_val else ("train",):
            for label, number in _by_class(real, f"{real_filter} AND split = '{split}'").items():
                counts[split, "real", label] = number
    row_ids = None
    if choice.ratio is not None:
        of_real = {label: counts.get(("train", "real", label), 0) for label in names}
        if not sum(of_real.values()):
            raise ValueError("--ratio counts synthetic per real image, and no real training row is left")
        targets = share_out(of_real, choice.ratio, balance=choice.balance)
        notes += _shortages(targets, available)
        row_ids = _draw(synthetic, wanted, targets)
        drawn = {label: min(targets[label], available.get(label, 0)) for label in names}
        undrawn = {label: number - drawn.get(label, 0) for label, number in available.items()}
        _add(left_out, "not drawn at this ratio", undrawn)
        available = drawn
    counts |= {("train", "synthetic", label): n for label, n in available.items() if n}
    counts = {key: n for key, n in sorted(counts.items()) if n}
    if not counts:
        reasons = "; ".join(f"{reason}: {sum(of.values())}" for reason, of in left_out.items())
        raise ValueError(f"no row of {synthetic.uri} is left to export ({reasons or 'the table is empty'})")
    return Selection(
        choice=choice,
        class_names=names,
        synthetic=synthetic,
        real=real,
        synthetic_filter=wanted,
        row_ids=row_ids,
        real_filter=real_filter,
        counts=counts,
        left_out=left_out,
        notes=tuple(notes),
    )


# ------------------------------------------------------------------------------------------ details


def _check(synthetic: Table, real: Table | None, choice: Choice) -> tuple[str, ...]:
    """The class table."""
    if not {"request_id", "stream_reject_reason"} <= set(synthetic.schema.names):
        raise ValueError(f"{synthetic.uri} is not a synthetic table; `factory synthesize` makes one")
    names = class_names(synthetic)
    if real is None:
        if choice.ratio is not None or choice.include_val:
            raise ValueError("--ratio and --include-val need --real, the table of real images")
        return names
    if not {"image_id", "split", "label"} <= set(real.schema.names):
        raise ValueError(f"--real {real.uri} is not a table of real images; `factory prepare` makes one")
    if class_names(real) != names:
        raise ValueError(
            f"classes of {synthetic.uri} are {', '.join(names)}, those of {real.uri} "
            f"{', '.join(class_names(real))}: the two cannot be mixed"
        )
    return names


def _filters(table: Table, choice: Choice) -> tuple[str, dict[str, dict[str, int]]]:
    """SQL of the rows to draw from, and what each step leaves out, in order, per class."""
    verdict = f"(accepted OR reject_reason = '{NEAR_COPY}')" if choice.include_near_copies else "accepted"
    left_out: dict[str, dict[str, int]] = {}
    rejected = _pairs(table, ["label_name", "reject_reason"], f"NOT {verdict}")
    for (label, reason), number in sorted(rejected.items(), key=str):
        _add(left_out, f"rejected as {reason}" if reason else "rejected without a reason", {label: number})
    steps = [("split of its background is not train", "split = 'train'")]
    if choice.where.strip():
        table.count(choice.where)  # a filter that cannot be read is refused with its own words
        steps.append(("not in --where", whole_filter(choice.where)))
    if choice.needs_mask:
        steps.append(("synthetic row without mask", "mask IS NOT NULL"))
    wanted = verdict
    before = _by_class(table, wanted)
    for reason, step in steps:
        wanted += f" AND {step}"
        after = _by_class(table, wanted)
        _add(left_out, reason, {label: number - after.get(label, 0) for label, number in before.items()})
        before = after
    return wanted, left_out


def _add(left_out: dict[str, dict[str, int]], reason: str, numbers: Mapping[str, int]) -> None:
    for label, number in numbers.items():
        if number:
            of_reason = left_out.setdefault(reason, {})
            of_reason[label] = of_reason.get(label, 0) + number


def _pairs(table: Table, columns: Sequence[str], filter: str) -> Counter[tuple[Any, ...]]:
    found: Counter[tuple[Any, ...]] = Counter()
    for batch in table.query_batches(filter, columns=columns, batch_size=_AT_ONCE):
        found.update(zip(*(batch.column(name).to_pylist() for name in columns)))
    return found


def _by_class(table: Table, filter: str) -> dict[str, int]:
    return {label: number for (label,), number in sorted(_pairs(table, ["label_name"], filter).items())}


def _draw(table: Table, filter: str, targets: Mapping[str, int]) -> list[int]:
    """Row ids of the rows that come first in the order of drawing, as many per class as wanted, ascending."""
    kept: dict[str, list[tuple[int, str, int]]] = {label: [] for label in targets}
    for row_id, request_id, label in _ids(table, filter):
        heap = kept[label]
        entry = (-draw_order(request_id), request_id, row_id)
        if len(heap) < targets[label]:
            heapq.heappush(heap, entry)
        elif heap and entry > heap[0]:
            heapq.heapreplace(heap, entry)
    return sorted(row_id for heap in kept.values() for _, _, row_id in heap)


def _ids(table: Table, filter: str) -> Iterator[tuple[int, str, str]]:
    names = ["_rowid", "request_id", "label_name"]
    for batch in table.batches(names, filter, batch_size=_AT_ONCE):
        yield from zip(*(batch.column(name).to_pylist() for name in names))


def _shortages(targets: Mapping[str, int], available: Mapping[str, int]) -> list[str]:
    return [
        f"{label}: {number} synthetic rows asked for, {available.get(label, 0)} there"
        for label, number in targets.items()
        if number > available.get(label, 0)
    ]


def _num_uncurated(table: Table) -> int:
    """Rows that no curation has seen: their stored verdict is null."""
    if "accepted" not in table.schema.names:
        return table.count()
    return sum(batch.column(0).null_count for batch in table.batches(["accepted"], batch_size=_AT_ONCE))


def _notes(table: Table, choice: Choice) -> list[str]:
    notes = []
    uncurated = _num_uncurated(table)
    if uncurated:
        notes.append(
            f"{uncurated} rows have not been curated: they were not searched for duplicates and copies of real "
            "images; `factory curate` does so"
        )
    if choice.include_near_copies:
        number = table.count(f"reject_reason = '{NEAR_COPY}'")
        notes.append(f"{number} rows are near copies of real images and are let out (--include-near-copies)")
    return notes
