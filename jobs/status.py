"""How far the plans of a synthetic table are: from the table and its ledger, so also while a job runs or after it died.

    factory status synthetic.lance

Of a plan that is not done, also what its job reported last, and how long ago: rows per second, time left, and how busy
and how long the queue of each stage was. Jobs report once a minute, beside tables in a file system.
"""

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from factory.storage import PlanStatus, Table
    from jobs.stream_log import Report


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory status`."""

    table: tyro.conf.Positional[str]
    """Synthetic table."""


def run(args: Args) -> "list[tuple[dict[str, Any], PlanStatus]]":
    """Record and state of every plan in the table, by plan_id; changes nothing.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it is no synthetic table.
    """
    from factory.storage import open_table, plan_status

    table = open_table(args.table)
    if not {"plan_id", "request_index"} <= set(table.schema.names):
        raise ValueError(f"{args.table} is not a synthetic table; `factory synthesize` makes one")
    found = []
    for name in sorted(table.metadata):
        if name.startswith("plan."):
            record = json.loads(table.metadata[name])
            plan_id = name.removeprefix("plan.")
            found.append((record, plan_status(table, plan_id, _requested(table, plan_id, record))))
    return found


def _requested(table: "Table", plan_id: str, record: dict[str, Any]) -> Any:
    """Indices of the requests that were last asked for; of tables that do not say, those that are committed."""
    import numpy as np

    from factory.storage import IndexSet, QuarantineLog
    from jobs.fidelity import attempts_of, recorded_regeneration
    from schemas.request import SynthesisPlan

    asked = table.metadata.get(f"requested.{plan_id}")
    if asked is None:
        rows = table.read(["request_index"], filter=f"plan_id = '{plan_id}'")
        return np.sort(rows["request_index"].to_numpy())
    plan = SynthesisPlan(
        recipe="",
        fingerprint=record["fingerprint"],
        weights=record["weights"],
        real_digest=record["real_digest"],
        seed=record["seed"],
        labels=tuple(record["labels"]),
    )
    requested = IndexSet.of(plan.index_blocks(json.loads(asked)))
    rule = recorded_regeneration(table, plan_id)
    if rule is not None:
        given_up = QuarantineLog(table.uri, plan_id).indices()
        requested.add(attempts_of(table, plan_id, requested, rule, given_up).indices)
    return requested


def lines(record: dict[str, Any], status: "PlanStatus", report: "Report | None" = None) -> Iterator[str]:
    """What is printed of one plan; of one that is not done, also the latest report of its job."""
    found = status.reconciliation
    share = 1.0 if not found.requested else 1 - found.pending / found.requested
    yield f"plan {status.plan_id}: recipe {record['recipe']}, seed {record['seed']}, {share:.0%} done"
    yield f"  {found.line()}"
    if status.uncommitted:
        waits = "wait for the committer" if status.writer else "will be adopted by the next run"
        yield f"  {status.uncommitted} written fragments {waits}"
    for reason, error in sorted(status.errors.items()):
        yield f"  {reason}: {error}"
    if status.writer:
        yield f"  being written by {status.writer}"
    elif found.pending:
        yield "  nobody works on it: the same `factory synthesize` command makes what is missing"
    if report is not None and (status.writer or found.pending):
        yield from (f"  {line}" for line in report.lines(datetime.datetime.now(datetime.UTC)))


def command(argv: Sequence[str]) -> int:
    """`factory status`; exit status 1 where requests are pending."""
    from jobs.stream_log import last_report

    args = tyro.cli(Args, args=list(argv), prog="factory status", description=__doc__)
    plans = run(args)
    if not plans:
        print(f"{args.table}: no plan yet")
    for record, status in plans:
        print("\n".join(lines(record, status, last_report(args.table, status.plan_id))))
    return 0 if all(status.reconciliation.complete for _, status in plans) else 1
