"""How far a plan is, read from the table and its ledger alone: also while a job runs, and after it died."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np

from factory.storage.index_set import IndexSet
from factory.storage.lease import Holder
from factory.storage.ledger import Ledger
from factory.storage.quarantine import QuarantineLog
from factory.storage.reconciliation import Reconciliation, committed_indices, count_verdicts
from factory.storage.table import Table

_RECORDS = "records"


@dataclass(frozen=True, kw_only=True)
class PlanStatus:
    """The state of one plan in a table.

    Attributes:
        plan_id: which.
        reconciliation: what became of the requests that were last asked for.
        uncommitted: fragments that are written and wait for the committer, or for the next run to adopt them.
        writer: who commits at this moment, in words; None where nobody does or it cannot be told.
        errors: the last error of each reason among the quarantined requests.
    """

    plan_id: str
    reconciliation: Reconciliation
    uncommitted: int
    writer: str | None
    errors: Mapping[str, str]


def plan_status(table: Table, plan_id: str, indices: np.ndarray) -> PlanStatus:
    """The state of a plan whose requests are `indices` (N,) int64; takes no lease and changes nothing."""
    committed = IndexSet()
    for some in committed_indices(table.dataset, plan_id):
        committed.add(some)
    ledger = Ledger(table.uri, plan_id)
    entries = QuarantineLog(table.uri, plan_id).entries()
    return PlanStatus(
        plan_id=plan_id,
        reconciliation=reconcile(table.dataset, table.uri, plan_id, indices, committed),
        uncommitted=len(ledger.names(_RECORDS)),
        writer=_writer(ledger.folder / "lease"),
        errors={entry.reason: entry.error for entry in entries},
    )


def reconcile(
    dataset: lance.LanceDataset, uri: str, plan_id: str, indices: np.ndarray, committed: IndexSet
) -> Reconciliation:
    """What became of each of `indices` (N,) int64, given which requests of the plan are committed."""
    wanted = IndexSet()
    wanted.add(np.asarray(indices, np.int64))
    verdicts = count_verdicts(dataset, plan_id, wanted)
    quarantined = [
        entry.reason
        for entry in QuarantineLog(uri, plan_id).entries()
        if wanted.contains(index := np.array([entry.request_index], np.int64))[0]
        and not committed.contains(index)[0]
    ]
    number = verdicts.total()
    return Reconciliation(
        requested=len(wanted),
        committed=number,
        accepted=verdicts.pop("", 0),
        rejected=dict(sorted(verdicts.items())),
        quarantined=dict(sorted(Counter(quarantined).items())),
        pending=len(wanted) - number - len(quarantined),
    )


def _writer(lease: Path) -> str | None:
    """Who holds a lease file's lock, without touching the lock: taking it for a moment could stop a job that starts."""
    try:
        text, inode = lease.read_text(errors="replace"), lease.stat()
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    place = f"{os.major(inode.st_dev):02x}:{os.minor(inode.st_dev):02x}:{inode.st_ino}"
    held = any("FLOCK" in line and place in line.split() for line in locks)
    holder = Holder.from_json(text) if held else None
    return None if not held else ("a process that is just starting" if holder is None else str(holder))
