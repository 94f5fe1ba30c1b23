"""How far a plan is, read from the table and its ledger alone: also while a job runs, and after it died."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np

from factory.storage.index_set import IndexSet, Indices, index_set
from factory.storage.lease import SECONDS_TO_LIVE, Holder
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


def plan_status(table: Table, plan_id: str, wanted: Indices) -> PlanStatus:
    """The state of a plan whose requests are `wanted`; takes no lease and changes nothing."""
    committed = IndexSet.of(committed_indices(table.dataset, plan_id))
    ledger = Ledger(table.uri, plan_id, storage_options=table.storage_options)
    log = QuarantineLog(table.uri, plan_id, table.storage_options)
    return PlanStatus(
        plan_id=plan_id,
        reconciliation=reconcile(table.dataset, plan_id, wanted, committed, log),
        uncommitted=len(ledger.names(_RECORDS)),
        writer=_config_writer(table, plan_id) if ledger.folder is None else _writer(ledger.folder / "lease"),
        errors={entry.reason: entry.error for entry in log.entries()},
    )


def reconcile(
    dataset: lance.LanceDataset, plan_id: str, wanted: Indices, committed: IndexSet, log: QuarantineLog
) -> Reconciliation:
    """What became of each of `wanted`, given which requests of the plan are committed."""
    wanted = index_set(wanted)
    verdicts = count_verdicts(dataset, plan_id, wanted)
    quarantined = [
        entry.reason
        for entry in log.entries()
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


def _config_writer(table: Table, plan_id: str) -> str | None:
    """Who holds a config lease that has not run out."""
    holder = Holder.from_json(table.dataset.config().get(f"lease.{plan_id}", ""))
    if holder is None or holder.process.is_known_dead() or time.time() - holder.renewed > SECONDS_TO_LIVE:
        return None
    return str(holder)


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
