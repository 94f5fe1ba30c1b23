"""The committer: makes written fragments part of the table, every request exactly once.

A plain object in the driver's loop. What is committed is decided by the committed ids in the table, never
by transaction history: Lance commits are not idempotent and its Append has no compare-and-swap, so one
process at a time commits a plan (`lease`), and rechecks that before each commit.

    wanted = IndexSet.of(plan.index_blocks(counts))
    with Committer(uri, plan_id=plan.plan_id, run_id=run_id) as committer:
        committer.adopt()
        todo = committer.missing(wanted)
        for record in run(todo):            # records made by `write_fragment` in the write tasks
            committer.add(record)
        committer.commit()
        print(committer.audit(wanted).line())
"""

import dataclasses
import json
import logging
import time
from types import TracebackType
from typing import Any, Self

import lance
import numpy as np
from lance.commit import CommitConflictError
from lance.dataset import Transaction
from lance.fragment import FragmentMetadata

from factory.storage.errors import (
    RETRY_SECONDS,
    DuplicateRequests,
    StorageUnreachable,
    TableDamaged,
    reliably,
    storage_faults,
)
from factory.storage.files import sync
from factory.storage.index_set import IndexSet, Indices, index_set
from factory.storage.lease import Lease, LeaseKind, take_lease
from factory.storage.ledger import Ledger
from factory.storage.location import StorageOptions, local_path
from factory.storage.quarantine import QuarantineLog
from factory.storage.reconciliation import (
    Reconciliation,
    check_distinct,
    committed_indices,
)
from factory.storage.status import reconcile
from factory.storage.table import open_table
from factory.storage.writer import RECORDS, FragmentRecord, data_files, missing_data_file

_LOG = logging.getLogger(__name__)
_CONFLICT_RETRIES = 10
_CROWDED = "Too many concurrent writers"
"""What Lance says when other writers were faster for half a minute."""


class _Preempted(Exception):
    """Another change of the table came first; the commit can be tried again on what is there now."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DroppedRecord:
    """A record that was not committed, and why; its requests are made again unless committed already."""

    name: str
    num_rows: int
    reason: str


class Committer:
    """Commits the fragments of one plan to one table; holds the lease from construction to `close`.

    Args:
        uri: the table; it must exist (`create_table`).
        plan_id: whose requests.
        run_id: of this run of the job; written into every commit.
        rows_per_commit: commit when so many rows wait …
        seconds_per_commit: … or the first has waited for so long. Rows that wait are not lost in a crash
            (their records are adopted by the next run), only not visible yet; for 10^7 rows use 50,000.
        lease: "file" (flock), or "config" (a Lance config key, for storage without locks); by default what the
            storage can do.

    Attributes:
        dropped: records that were not committed, and why.

    Raises:
        LeaseHeld: another process commits this plan.
        FileNotFoundError: no table there.
        DuplicateRequests: a request_index of this plan stands twice in the table.
    """

    def __init__(
        self,
        uri: str,
        *,
        plan_id: str,
        run_id: str,
        rows_per_commit: int = 256,
        seconds_per_commit: float = 10.0,
        lease: LeaseKind | None = None,
        storage_options: StorageOptions = None,
    ) -> None:
        if rows_per_commit < 1 or seconds_per_commit < 0:
            raise ValueError(
                f"rows_per_commit {rows_per_commit} must be ≥ 1, seconds_per_commit {seconds_per_commit} ≥ 0"
            )
        self.uri, self.plan_id, self.run_id = str(uri), plan_id, run_id
        self.rows_per_commit, self.seconds_per_commit = rows_per_commit, seconds_per_commit
        self.dropped: list[DroppedRecord] = []
        self._storage_options = storage_options
        self._ledger = Ledger(self.uri, plan_id, storage_options=storage_options)
        self._data = data_files(self.uri, storage_options)
        self._waiting: list[FragmentRecord] = []
        self._waiting_indices = IndexSet()
        self._stale_names: set[str] = set()
        self._oldest = 0.0
        self._planned = False
        self._lease: Lease | None = take_lease(
            self.uri, plan_id, run_id=run_id, kind=lease, storage_options=storage_options
        )
        try:
            self._reload()
        except BaseException:
            self._lease.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()  # the records stay in the ledger; the next run adopts them

    @property
    def committed_rows(self) -> int:
        """Rows of this plan in the table."""
        return len(self._committed)

    @property
    def waiting_rows(self) -> int:
        """Rows added and not yet committed."""
        return len(self._waiting_indices)

    @property
    def version(self) -> int:
        """Table version after the latest commit seen here."""
        return self._dataset.version

    def adopt(self) -> int:
        """Commit what earlier runs wrote and did not commit; how many rows. Only before planning.

        A record is committed only if none of its ids is committed and its data file has the recorded size;
        otherwise it is dropped, and those of its requests that have no row count as missing.
        """
        if self._planned:
            raise RuntimeError("adopt() must come before missing() and add(): their requests may run already")
        adopted = 0
        for name, value in self._ledger.items(RECORDS):
            record = self._adoptable(name, value)
            if record is None:
                self._ledger.delete(RECORDS, name)
            else:
                self._wait(record)
                if record.name != name:
                    self._stale_names.add(name)
                adopted += record.num_rows
                if self.waiting_rows >= max(self.rows_per_commit, 4096):
                    self._commit()
        self._commit()
        self._reload()
        return adopted

    def missing(self, wanted: Indices) -> IndexSet:
        """Those of `wanted` that are not committed, not waiting and not quarantined."""
        self._planned = True
        given_up = QuarantineLog(self.uri, self.plan_id, self._storage_options).indices()
        settled = (self._committed, self._waiting_indices, IndexSet.of([given_up]))
        return index_set(wanted).without(*settled)

    def add(self, record: FragmentRecord) -> bool:
        """Take a record of this run; commits when enough rows wait. Whether it was taken.

        A record any of whose requests is committed or waits already (its task was run again) is dropped.
        """
        self._planned = True
        if record.plan_id != self.plan_id:
            raise ValueError(f"record of plan {record.plan_id}, this is the committer of plan {self.plan_id}")
        indices = _indices(record)
        taken = not (self._committed.contains(indices) | self._waiting_indices.contains(indices)).any()
        if taken:
            self._wait(record)
        else:
            self._drop(record.name, record.num_rows, "some of its requests are committed or waiting already")
            if any(other.name == record.name for other in self._waiting):
                self._stale_names.add(record.name)
            else:
                self._ledger.delete(RECORDS, record.name)
        if self.waiting_rows >= self.rows_per_commit or (
            self._waiting and time.monotonic() - self._oldest >= self.seconds_per_commit
        ):
            self._commit()
        return taken

    def commit(self) -> int:
        """Commit everything that waits, in one version; how many rows.

        Raises:
            LeaseLost: another process took over; nothing was committed.
            StorageFull, StorageFailed, StorageUnreachable, PermissionError: the table is as it was, or has the rows;
                the records stay for the next run, which looks.
        """
        return self._commit()

    def close(self) -> None:
        """Commit what waits and let the lease go."""
        try:
            if self._lease is not None:
                self._commit()
        finally:
            self._release()

    def audit(self, wanted: Indices) -> Reconciliation:
        """What became of each of `wanted`, read from the table; checks distinctness.

        Raises:
            DuplicateRequests: a request_id, or a request_index of this plan, stands twice in the table.
        """
        self._reload()
        check_distinct(self._dataset, self.plan_id)
        log = QuarantineLog(self.uri, self.plan_id, self._storage_options)
        return reconcile(self._dataset, self.plan_id, wanted, self._committed, log)

    def _reload(self) -> None:
        """Read from the table which requests are committed, and which columns its rows must have."""
        reliably(self.uri, "read the requests of", self._read_committed)

    def _read_committed(self) -> None:
        dataset = open_table(self.uri, storage_options=self._storage_options).dataset
        committed = IndexSet()
        for indices in committed_indices(dataset, self.plan_id):
            if committed.add(indices) != len(indices):
                raise DuplicateRequests(
                    f"{self.uri}: a request_index of plan {self.plan_id} stands twice; two committers must "
                    "have run without a lease"
                )
        nullable = {field.name: field.nullable for field in dataset.schema}
        fields = dataset.lance_schema.fields()
        self._required = {field.name(): _numbers(field) for field in fields if not nullable[field.name()]}
        self._dataset, self._committed = dataset, committed

    def _adoptable(self, name: str, value: dict[str, Any]) -> FragmentRecord | None:
        """The record if it may be committed; None, and why in `dropped`, if not."""
        try:
            record = FragmentRecord.from_dict(value)
        except (TableDamaged, KeyError, TypeError) as fault:
            self._drop(name, 0, f"not a valid record: {fault}")
            return None
        reason = self._why_not(record)
        if reason is None:
            return record
        self._drop(name, record.num_rows, reason)
        return None

    def _why_not(self, record: FragmentRecord) -> str | None:
        indices = _indices(record)
        if record.plan_id != self.plan_id:
            return f"it belongs to plan {record.plan_id}"
        if len(np.unique(indices)) != len(indices) or len(set(record.request_ids)) != len(indices):
            return "it names a request twice"
        if self._committed.contains(indices).any():
            return "some of its requests are committed already"
        if self._waiting_indices.contains(indices).any():
            return "another record holds some of its requests"
        return self._unfit(record)

    def _unfit(self, record: FragmentRecord) -> str | None:
        """Why Lance may not be given the data of `record`: it would commit it and not be able to read it."""
        written = {number for item in record.fragment["files"] for number in item["fields"]}
        lacking = [name for name, numbers in self._required.items() if not numbers & written]
        if lacking:
            return f"it lacks column {lacking[0]!r}, which may not be null in the table"
        return missing_data_file(self._data, record)

    def _wait(self, record: FragmentRecord) -> None:
        if not self._waiting:
            self._oldest = time.monotonic()
        self._waiting.append(record)
        self._waiting_indices.add(_indices(record))

    def _commit(self, tries_left: int = _CONFLICT_RETRIES) -> int:
        if self._lease is None:
            raise RuntimeError("this committer is closed")
        ready = self._fit_records()
        if not ready:
            self._acknowledge([])
            return 0
        self._lease.check()
        operation = lance.LanceOperation.Append([_fragment(record) for record in ready])
        num_rows = sum(record.num_rows for record in ready)
        properties = {"plan_id": self.plan_id, "run_id": self.run_id, "rows": str(num_rows)}
        try:
            with storage_faults(self.uri, "commit to"):
                self._append(operation, properties, may_retry=tries_left > 0)
        except _Preempted:
            self._reload()
            return self._commit(tries_left - 1)
        except Exception as fault:
            # The commit may have happened although it reported a fault: only the table can tell.
            waiting = np.concatenate([_indices(record) for record in ready])
            if isinstance(fault, StorageUnreachable):
                time.sleep(RETRY_SECONDS[0])  # a request that is still under way may arrive
            self._reload()
            if not self._committed.contains(waiting).all():
                if tries_left > 0 and (isinstance(fault, StorageUnreachable) or _CROWDED in str(fault)):
                    return self._commit(tries_left - 1)
                raise
        for record in ready:
            self._committed.add(_indices(record))
        self._acknowledge(ready)
        return num_rows

    def _append(
        self, operation: lance.LanceOperation.Append, properties: dict[str, str], *, may_retry: bool
    ) -> None:
        """One commit. Lance rebases it over the appends of other plans, not over every change of columns."""
        transaction = Transaction(
            read_version=self._dataset.version, operation=operation, transaction_properties=properties
        )
        try:
            self._dataset = lance.LanceDataset.commit(self._dataset, transaction)
        except CommitConflictError as fault:
            if may_retry and "Retryable" in str(fault):
                raise _Preempted from fault
            raise  # e.g. the table was overwritten: these fragments are not of its columns
        _sync_manifest(self.uri, self._dataset.version)

    def _fit_records(self) -> list[FragmentRecord]:
        """What waits and can be committed; the rest is dropped."""
        ready = []
        for record, fault_text in zip(
            self._waiting, self._data.each(self._unfit, self._waiting), strict=True
        ):
            if fault_text is None:
                ready.append(record)
            else:
                self._drop(record.name, record.num_rows, fault_text)
                self._stale_names.add(record.name)
        return ready

    def _acknowledge(self, committed: list[FragmentRecord]) -> None:
        """Forget what waited; remove the records of what is committed or dropped."""
        self._ledger.delete(RECORDS, *[record.name for record in committed], *sorted(self._stale_names))
        self._waiting, self._waiting_indices, self._stale_names = [], IndexSet(), set()

    def _drop(self, name: str, num_rows: int, reason: str) -> None:
        self.dropped.append(DroppedRecord(name=name, num_rows=num_rows, reason=reason))
        _LOG.warning("%s: record %s of %d rows is not committed: %s", self.uri, name, num_rows, reason)

    def _release(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def _numbers(field: Any) -> set[int]:
    """Lance's ids of a column: its own and those of what is nested in it; data files name some of them."""
    return {field.id()}.union(*map(_numbers, field.children()))


def _indices(record: FragmentRecord) -> np.ndarray:
    return np.array(record.request_indices, np.int64)


def _fragment(record: FragmentRecord) -> FragmentMetadata:
    return FragmentMetadata.from_json(json.dumps(record.fragment))


def _sync_manifest(uri: str, version: int) -> None:
    """Make the commit durable before its records are removed; Lance itself does not sync local files."""
    root = local_path(uri)
    if root is not None:
        # Lance's v2 naming: the newest version sorts first.
        sync(root / "_versions" / f"{2**64 - 1 - version:020d}.manifest")
        sync(root / "_versions")
