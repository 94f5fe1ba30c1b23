"""Make synthetic images: a stream of mask and prompt requests through pooled synthesis actors into Lance.

    factory synthesize --recipe tiny --generator runs/generator --real real.lance \\
        --num-requests 128 --out synthetic.lance

Running the same command again after any interruption makes what is missing, nothing twice. Asking for more
adds rows to the same plan. `--plan` prints what would be done and checks it without starting.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.recipe_args import parse_args
from jobs.synthesis_plan import (
    Args,
    Prepared,
    execution,
    plan_record,
    prepare,
    print_plan,
    table_metadata,
)

if TYPE_CHECKING:
    from factory.storage import Committer, IndexSet
    from factory.tracking import Run
    from jobs.cluster import RayHandle
    from jobs.synthesis_stream import StreamSettings
    from schemas.regeneration import Attempts


@dataclass(frozen=True, kw_only=True)
class SynthesisResult:
    """What a run did: the reconciliation and the accounts."""

    uri: str
    plan_id: str
    version: int
    line: str
    requested: int
    committed: int
    accepted: int
    rejected: Mapping[str, int]
    quarantined: Mapping[str, int]
    pending: int
    made: int
    seconds: float
    startup_seconds: float
    busy_seconds: float
    regeneration: str = ""
    first_attempts: int = 0

    @property
    def images_per_second(self) -> float:
        """Rate of this run without the start of Ray and the loading of the models."""
        return self.made / max(self.seconds - self.startup_seconds, 1e-9)

    @property
    def seconds_per_accepted(self) -> float:
        """Busy synthesizer seconds per accepted image, scaled from what this run made."""
        return self.busy_seconds / max(self.made, 1) * self.committed / max(self.accepted, 1)


def run(args: Args) -> SynthesisResult | None:
    """Make every missing request of the plan; None with `--plan`.

    Raises:
        ValueError, FileNotFoundError: bad input, before anything is written.
        LeaseHeld: another driver works on this plan in this table.
        RuntimeError: more requests failed than --max-quarantined allows; what is committed stays.
    """
    from factory.storage import absolute_uri, create_table, open_table
    from schemas.sample import synthetic_schema

    start = time.perf_counter()
    # Workers have working directories of their own.
    args = dataclasses.replace(args, out=absolute_uri(args.out), real=absolute_uri(args.real))
    prepared = prepare(args)
    if args.plan:
        print_plan(args, prepared, _count_missing(args, prepared))
        return None
    schema = synthetic_schema(prepared.embedder_spec.dim)
    create_table(args.out, schema, metadata=table_metadata(prepared))
    key = f"plan.{prepared.plan.plan_id}"
    table = open_table(args.out)
    if key not in table.metadata:
        table.set_metadata({key: json.dumps(plan_record(args, prepared), sort_keys=True)})
    asked = json.dumps(dict(prepared.counts), sort_keys=True)
    if open_table(args.out).metadata.get(f"requested.{prepared.plan.plan_id}") != asked:
        open_table(args.out).set_metadata({f"requested.{prepared.plan.plan_id}": asked})
    notes = _record_rules(args, prepared)
    return _run_stream(args, dataclasses.replace(prepared, notes=(*prepared.notes, *notes)), start)


def _record_rules(args: Args, prepared: Prepared) -> list[str]:
    """Who judges and what is tried again, into the table's metadata; notes for the operator."""
    from factory.storage import open_table
    from jobs.fidelity import record_gate, record_regeneration

    plan_id = prepared.plan.plan_id
    record_regeneration(open_table(args.out), plan_id, prepared.regeneration)
    return record_gate(open_table(args.out), plan_id, prepared.fidelity)


def _count_missing(args: Args, prepared: Prepared) -> int:
    """Requests that are neither committed nor quarantined; takes no lease, so a running job is not disturbed."""
    from factory.storage import create_table, open_table, plan_status
    from schemas.sample import synthetic_schema

    try:
        open_table(args.out)
    except FileNotFoundError:
        return prepared.num_requests
    # The table is there, so this only checks that its schema, classes and embedder are this plan's.
    schema = synthetic_schema(prepared.embedder_spec.dim)
    table = create_table(args.out, schema, metadata=table_metadata(prepared))
    requested = prepared.requested
    _add_attempts(args, prepared, requested)
    return plan_status(table, prepared.plan.plan_id, requested).reconciliation.pending


def _add_attempts(args: Args, prepared: Prepared, requested: "IndexSet") -> "Attempts | None":
    """Further attempts by what is committed, added to `requested`; None without --regenerate."""
    from factory.storage import QuarantineLog, open_table
    from jobs.fidelity import attempts_of

    if prepared.regeneration is None:
        return None
    plan_id = prepared.plan.plan_id
    given_up = QuarantineLog(args.out, plan_id).indices()
    attempts = attempts_of(open_table(args.out), plan_id, prepared.requested, prepared.regeneration, given_up)
    requested.add(attempts.indices)
    return attempts


def _release_quarantined(uri: str, plan_id: str) -> None:
    from factory.storage import QuarantineLog

    log = QuarantineLog(uri, plan_id)
    log.remove(*(entry.request_id for entry in log.entries()))


@dataclass(kw_only=True)
class _Accounts:
    """What the rows of a run add up to; `limit` is the number of failed requests from which the job stops."""

    limit: float
    made: int = 0
    quarantined: int = 0
    busy_seconds: float = 0.0
    first_batch: float = math.inf


def _make(
    args: Args,
    prepared: Prepared,
    missing: "IndexSet",
    stage_settings: tuple[Any, Any, Any],
    committer: "Committer",
    tracked: "Run",
    accounts: _Accounts,
    run_id: str,
) -> None:
    """One pass of the stream over `missing`, observed and committed.

    Raises:
        OSError: the storage is full, fails or stays away; what is committed stays.
        RuntimeError: more requests failed than the accounts allow; what is committed stays.
    """
    from factory.storage import FragmentRecord, resolve_options
    from jobs.observing import StreamObserver, observing
    from jobs.progress import progress_bar
    from jobs.stream_faults import storage_faults_of_tasks
    from jobs.stream_log import log_file
    from jobs.synthesis_stream import stages, stream

    settings, synthesizer, finish = stage_settings
    lines = None if sys.stderr.isatty() else sys.stderr
    log = log_file(args.out, prepared.plan.plan_id, run_id)
    observer = StreamObserver("synthesize", len(missing), stages(settings), log=log, lines=lines)
    begin = time.perf_counter()
    stream_rows = stream(
        missing,
        prepared.request_stage,
        synthesizer,
        finish,
        settings,
        uri=args.out,
        run_id=run_id,
        storage_options=resolve_options(None),
    )
    # Closed here, after an error too: a stream that ends after Ray did would start another.
    with (
        storage_faults_of_tasks(),
        contextlib.closing(stream_rows) as rows,
        observing(observer),
        progress_bar("synthesize", len(missing)) as advance,
    ):
        for row in rows:
            accounts.first_batch = min(accounts.first_batch, row["started"] or accounts.first_batch)
            if row["record"]:
                committer.add(FragmentRecord.from_json(row["record"]))
            accounts.busy_seconds += row["busy_seconds"]
            accounts.made += row["made"]
            accounts.quarantined += row["quarantined"]
            observer.add(row["made"] + row["quarantined"], json.loads(row["rejected"]))
            if metrics := observer.take_metrics():
                tracked.metrics(metrics, step=round(time.perf_counter() - begin))
            advance(row["made"] + row["quarantined"])
            if accounts.quarantined > accounts.limit:
                committer.commit()
                raise RuntimeError(
                    f"{accounts.quarantined} requests failed, more than --max-quarantined "
                    f"{args.max_quarantined:.0%} allows; the last error: {row['last_error']}"
                )
    committer.commit()


def fit_to(handle: "RayHandle", settings: "StreamSettings") -> "StreamSettings":
    """The settings for that cluster: where it grows, the pool begins with one synthesizer and asks for the others.

    Raises:
        ValueError: the pools would wait for ever, also when the cluster is at its largest.
    """
    settings.check(handle.max_cpus, handle.max_gpus, handle.node_cpus)
    return dataclasses.replace(settings, min_synthesizers=1) if handle.grows else settings


def _run_stream(args: Args, prepared: Prepared, start: float) -> SynthesisResult:
    from factory.storage import Committer, open_table
    from factory.tracking import track
    from jobs.cluster import configure_data, start_ray

    run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    requested = prepared.requested
    first_attempts = len(requested)
    accounts = _Accounts(limit=max(args.max_quarantined * len(requested), 1))
    with (
        track(
            "synthesize",
            recipe_parameters=dataclasses.asdict(prepared.recipe),
            execution_parameters=dataclasses.asdict(args),
            inputs={"real": f"{args.real}@{prepared.real_version}"},
        ) as tracked,
        Committer(
            args.out,
            plan_id=prepared.plan.plan_id,
            run_id=run_id,
            rows_per_commit=args.rows_per_commit,
            seconds_per_commit=args.seconds_per_commit,
        ) as committer,
    ):
        adopted = committer.adopt()
        if args.retry_quarantined:
            _release_quarantined(args.out, prepared.plan.plan_id)
        attempts = _add_attempts(args, prepared, requested)
        missing = committer.missing(requested)
        for note in prepared.notes:
            print(f"note: {note}")
        print(
            f"plan {prepared.plan.plan_id}: {len(requested)} requested, {len(requested) - len(missing)} done before"
            + (f" ({adopted} adopted from an interrupted run)" if adopted else "")
        )
        began, before = time.time(), time.perf_counter() - start
        if len(missing):
            with start_ray(args.address, args.num_cpus) as handle:
                configure_data()
                settings, synthesizer, finish = execution(args, prepared, handle.max_cpus, handle.max_gpus)
                stages = (fit_to(handle, settings), synthesizer, finish)
                while len(missing):
                    _make(args, prepared, missing, stages, committer, tracked, accounts, run_id)
                    if len(committer.missing(requested)):
                        break  # what the stream left behind is pending: a further round would not end
                    attempts = _add_attempts(args, prepared, requested)
                    missing = committer.missing(requested)
                    if len(missing):
                        print(f"regenerate: {len(missing)} further attempts of rejected requests")
        committer.commit()
        audit = committer.audit(requested)
        end = time.perf_counter()
        result = SynthesisResult(
            uri=args.out,
            plan_id=prepared.plan.plan_id,
            version=open_table(args.out).version,
            line=audit.line(),
            regeneration="" if attempts is None else attempts.line(),
            first_attempts=first_attempts,
            requested=audit.requested,
            committed=audit.committed,
            accepted=audit.accepted,
            rejected=audit.rejected,
            quarantined=audit.quarantined,
            pending=audit.pending,
            made=accounts.made,
            seconds=end - start,
            startup_seconds=before + (max(accounts.first_batch - began, 0.0) if accounts.made else 0.0),
            busy_seconds=accounts.busy_seconds,
        )
        tracked.set({"plan_id": result.plan_id, "table": args.out, "table_version": str(result.version)})
        tracked.metrics(
            {
                "requested": result.requested,
                "committed": result.committed,
                "accepted": result.accepted,
                "quarantined": sum(result.quarantined.values()),
                "images_per_second": result.images_per_second,
                "seconds_per_accepted": result.seconds_per_accepted,
                **{f"rejected.{reason}": count for reason, count in result.rejected.items()},
            }
        )
    return result


def print_result(args: Args, result: SynthesisResult) -> None:
    """The reconciliation line, the acceptance funnel and the accounts."""
    from factory.storage import open_table
    from jobs.fidelity import acceptance_of

    print(result.line)
    if result.regeneration:
        print(result.regeneration)
    if args.segmenter is not None:
        for item in acceptance_of(open_table(result.uri), result.plan_id):
            print(item.line())
    print(
        f"funnel: {result.first_attempts or result.requested} requested → {result.committed} made → {result.accepted} accepted"
        f" ({result.accepted / max(result.committed, 1):.0%})"
    )
    if result.made:
        bare = result.made / max(result.busy_seconds, 1e-9)
        print(
            f"this run: {result.made} images in {result.seconds:.0f} s ({result.startup_seconds:.0f} s of it start-up), "
            f"{result.images_per_second:.2f} images/s, {result.seconds_per_accepted:.2f} synthesizer-seconds per "
            f"accepted image; one synthesizer alone: {bare:.2f} images/s"
        )
    print(
        f"wrote {result.uri} (version {result.version}); next: factory curate {result.uri} --real {args.real}"
    )


def command(argv: Sequence[str]) -> int:
    """`factory synthesize`; exit status 1 where requests are still pending."""
    args = parse_args(Args, argv, "factory synthesize", __doc__ or "")
    result = run(args)
    if result is None:
        return 0
    print_result(args, result)
    return 0 if result.pending == 0 else 1
