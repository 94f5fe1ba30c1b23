"""Reconciliation: what became of every request that was asked for, and whether any row stands twice."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory.storage.errors import DuplicateRequests
from factory.storage.index_set import IndexSet
from factory.storage.verdicts import STREAM_VERDICT, effective_expressions

SCAN_ROWS = 1 << 16
_HASHES_AT_ONCE = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """Requested = committed (accepted + rejected by reason) + quarantined by reason + pending.

    Attributes:
        requested: distinct requests asked for.
        committed: of these, rows in the table.
        accepted: of the committed, those with no reject reason (effective verdict).
        rejected: of the committed, by reason.
        quarantined: of those without a row, given up, by reason.
        pending: the rest: not made yet.
    """

    requested: int
    committed: int
    accepted: int
    rejected: Mapping[str, int]
    quarantined: Mapping[str, int]
    pending: int

    def __post_init__(self) -> None:
        quarantined, rejected = sum(self.quarantined.values()), sum(self.rejected.values())
        assert self.committed == self.accepted + rejected, self
        assert self.requested == self.committed + quarantined + self.pending, self

    @property
    def complete(self) -> bool:
        """Whether nothing is pending."""
        return self.pending == 0

    def line(self) -> str:
        """The reconciliation line that ends every job."""
        rejected, quarantined = sum(self.rejected.values()), sum(self.quarantined.values())
        return (
            f"requested {self.requested} = committed {self.committed} (accepted {self.accepted} + rejected "
            f"{rejected}{_by_reason(self.rejected)}) + quarantined {quarantined}{_by_reason(self.quarantined)} "
            f"+ pending {self.pending}"
        )


def plan_filter(plan_id: str) -> str:
    """SQL that keeps the rows of one plan."""
    return f"plan_id = '{plan_id.replace(chr(39), chr(39) * 2)}'"


def committed_indices(dataset: lance.LanceDataset, plan_id: str) -> Iterator[np.ndarray]:
    """Request indices of the committed rows of a plan, int64, in chunks."""
    for batch in dataset.to_batches(
        columns=["request_index"], filter=plan_filter(plan_id), batch_size=SCAN_ROWS
    ):
        yield batch.column(0).to_numpy()


def count_verdicts(dataset: lance.LanceDataset, plan_id: str, wanted: IndexSet) -> Counter[str]:
    """Committed rows of a plan whose index is in `wanted`, by effective reject reason; "" where accepted."""
    columns = {"request_index": "request_index"} | effective_expressions(dataset.schema)
    counts: Counter[str] = Counter()
    for batch in dataset.to_batches(columns=columns, filter=plan_filter(plan_id), batch_size=SCAN_ROWS):
        batch = batch.filter(pa.array(wanted.contains(batch["request_index"].to_numpy())))
        if STREAM_VERDICT not in dataset.schema.names:
            counts[""] += batch.num_rows
            continue
        unnamed = pc.if_else(batch["accepted"], "", pc.fill_null(batch["reject_reason"], "unnamed"))
        for item in pc.value_counts(unnamed).to_pylist():
            counts[item["values"]] += item["counts"]
    return counts


def check_distinct(dataset: lance.LanceDataset, plan_id: str) -> int:
    """Number of rows of the plan, after checking that no request_id stands twice.

    Ids are compared by a 64-bit hash, 2^22 of them at a time, so memory stays below about 100 MB whatever the
    size of the table, for one scan of the ids per 2^22 rows; hashes that meet are compared in full.

    Raises:
        DuplicateRequests: names the first of them.
    """
    rows = dataset.count_rows(filter=plan_filter(plan_id))
    passes = max(1, -(-rows // _HASHES_AT_ONCE))
    for number in range(passes):
        suspicious = _met_hashes(dataset, plan_id, number, passes)
        if len(suspicious):
            _compare_in_full(dataset, plan_id, suspicious)
    return rows


def hash_strings(values: pa.Array) -> np.ndarray:
    """64-bit hashes (N,) uint64 of strings, the same in every process."""
    offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
    data = values.buffers()[2]
    lengths = np.diff(offsets)
    out = np.zeros(len(values), np.uint64)
    content = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    for length in np.unique(lengths):
        where = np.flatnonzero(lengths == length)
        padded = np.zeros((len(where), -(-int(length) // 8) * 8), np.uint8)
        padded[:, :length] = content[offsets[where][:, None] + np.arange(length)]
        out[where] = _mix(padded.view(np.uint64), int(length))
    return out


def _mix(words: np.ndarray, length: int) -> np.ndarray:
    """splitmix64's finaliser over the words of each row."""
    state = np.full(len(words), (length + 1) * 0x9E3779B97F4A7C15 % 2**64, np.uint64)
    for word in words.T:
        state = state ^ word
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _id_hashes(dataset: lance.LanceDataset, plan_id: str) -> Iterator[tuple[pa.Array, np.ndarray]]:
    for batch in dataset.to_batches(
        columns=["request_id"], filter=plan_filter(plan_id), batch_size=SCAN_ROWS
    ):
        if batch.num_rows:
            yield batch.column(0), hash_strings(batch.column(0))


def _met_hashes(dataset: lance.LanceDataset, plan_id: str, number: int, passes: int) -> np.ndarray:
    kept = [h[h % np.uint64(passes) == number] for _, h in _id_hashes(dataset, plan_id)]
    hashes = np.sort(np.concatenate(kept)) if kept else np.empty(0, np.uint64)
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _compare_in_full(dataset: lance.LanceDataset, plan_id: str, suspicious: np.ndarray) -> None:
    counts: Counter[str] = Counter()
    for ids, hashes in _id_hashes(dataset, plan_id):
        counts.update(ids.filter(pa.array(np.isin(hashes, suspicious))).to_pylist())
    twice = [(name, count) for name, count in counts.most_common() if count > 1]
    if twice:
        name, count = twice[0]
        raise DuplicateRequests(
            f"{dataset.uri}: {len(twice)} request_id(s) of plan {plan_id} stand more than once, e.g. {name} "
            f"{count} times; two committers must have run without a lease"
        )


def _by_reason(counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ": " + ", ".join(f"{reason} {count}" for reason, count in ordered)
