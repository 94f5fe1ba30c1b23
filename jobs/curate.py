"""Mark copies of real images and duplicates in a synthetic table; no row is dropped, no image rewritten.

    factory curate synthetic.lance --real real.lance
    factory curate synthetic.lance --real real.lance --duplicate-similarity benign=0.97,malignant=0.95
    factory curate synthetic.lance --real real.lance --min-share 0.5 --floor keep --report reports
    factory curate synthetic.lance --real real.lance --rejudge --threshold SimilarityBand.upper=1.2

The verdict of a row is the first of these that holds:

1. near_copy_of_real: the registered-crop test finds a real training image in it. Tested are rows that the stream
   accepted or found too similar to real ones, for which this is the more telling reason.
2. The stream's own verdict, as it stands in `stream_reject_reason`, or judged again from stored scores (--rejudge).
3. duplicate_of_synthetic: among the remaining rows, all but the best of each set of near-duplicates.

Thresholds come from real training images against those of other patients, unless given. Every run writes the
nullable columns of all rows anew, as a new version with a tag of its own. Links between rows are kept beside the
table, so that a grown table is searched for pairs with new rows only. docs/deduplication.md says how it scales.
"""

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from jobs.curation_result import CurationResult, NearestPair, metrics, print_result

if TYPE_CHECKING:
    from factory.embedding import EmbedderSpec
    from factory.storage import Table
    from jobs.curation_copies import CopyFindings
    from jobs.curation_duplicates import Search
    from jobs.curation_rows import RealRows, SyntheticRows
    from jobs.curation_verdicts import Verdicts

__all__ = ["Args", "CurationResult", "NearestPair", "command", "print_result", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory curate`."""

    table: Positional[str]
    """Synthetic table to curate."""
    real: str
    """Real table whose training rows are compared with."""
    duplicate_similarity: float | str | None = None
    """Cosine from which two synthetic rows are duplicates, or one per class (benign=0.97,malignant=0.95; a pair of two
    classes must reach both); taken from real images by default."""
    duplicate_quantile: float = 0.999
    """Share of real images that are less alike to the nearest one of another patient than duplicates are."""
    duplicate_per_class: bool = False
    """Take that quantile among the real images of each class."""
    method: Literal["auto", "exact", "clustered"] = "auto"
    """Search for duplicates: exact, clustered (k-means cells as Ray tasks, recall measured), or by number of rows."""
    max_probes: int = 64
    """Other cells that a row is searched in at most, when clustered."""
    recall_rows: int = 512
    """Rows compared with all others to measure the recall of a clustered search."""
    memory_budget: float = 2.0
    """GB for embeddings in this process; more are mapped from files in the work folder."""
    work_dir: str | None = None
    """Folder for these files; beside the table by default. A cluster of several machines must see it."""
    from_scratch: bool = False
    """Do not use links that an earlier curation kept."""
    min_share: float = 0.25
    """Share of a class's rows below which it is told that fewer are accepted."""
    floor: Literal["warn", "keep"] = "warn"
    """Below that share: warn, or keep the best duplicates until it is reached."""
    rejudge: bool = False
    """Judge the stream's filters again from stored scores, with the thresholds given by --threshold."""
    threshold: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILTER.FIELD=NUMBER for --rejudge, such as SimilarityBand.upper=1.2; may be repeated."""
    copy_correlation: float | None = None
    """Correlation of registered crops from which a row is a copy; calibrated on real images by default."""
    copy_test: bool = True
    """Search for copies of real training images."""
    copy_candidates: int = 6
    """Real images that each row is registered against, nearest first."""
    planted: int = 12
    """Real images to plant copies of, to say what share the copy test finds; 0: do not measure."""
    num_pairs: int = 64
    """Nearest-real pairs to keep for a report."""
    report: str | None = None
    """Folder to write a page on memorisation and duplicates into."""
    seed: int = 0
    """Of the samples and of k-means."""
    num_threads: int | None = None
    """Threads; all cores of this process by default, at most 8."""
    address: str | None = None
    """Ray cluster to join for the clustered search; a private Ray is started without it."""
    num_cpus: int | None = None
    """CPUs of a private Ray."""


def run(args: Args) -> CurationResult:
    """Curate a table; prints nothing but progress.

    Raises:
        FileNotFoundError: a table, or the embedder's weights, is not there.
        ValueError: not a synthetic or real table, other embedders, or too few real rows to calibrate on.
        LeaseHeld: another curation of this table is running.
    """
    from factory.storage import open_table
    from factory.tracking import track
    from jobs.curation_rows import read_real, read_synthetic

    start = time.perf_counter()
    table, real_table = open_table(args.table), open_table(args.real)
    spec = _check(args, table, real_table)
    search = _search(args)
    with (
        search.working() as folder,
        track(
            "curate",
            execution_parameters=dataclasses.asdict(args),
            inputs={
                "synthetic": f"{args.table}@{table.version}",
                "real": f"{args.real}@{real_table.version}",
            },
        ) as tracked,
    ):
        in_memory = search.keeps_in_memory(table.count(), spec.dim)
        rows = read_synthetic(table, None if in_memory else folder / "embeddings.npy")
        result = _curate(args, spec, table, real_table, read_real(real_table), rows, search, folder)
        result = dataclasses.replace(result, seconds=time.perf_counter() - start)
        tracked.set({"table": args.table, "table_version": str(result.version), "table_tag": result.tag})
        tracked.metrics(metrics(result))
        tracked.artifact("nearest_real.json", [dataclasses.asdict(pair) for pair in result.pairs])
    return result


def _search(args: Args) -> "Search":
    """How duplicates are searched; work files and links lie beside the table where that is on a file system."""
    from factory.storage import ledger_folder
    from factory.storage.location import local_path
    from jobs.curation_duplicates import Search

    beside = local_path(ledger_folder(args.table))
    work = Path(args.work_dir).expanduser().resolve() if args.work_dir else beside
    return Search(
        method=args.method,
        memory_bytes=int(args.memory_budget * 2**30),
        work_folder=None if work is None else work.resolve(),
        links_folder=None if beside is None else beside / "curation",
        from_scratch=args.from_scratch,
        recall_rows=args.recall_rows,
        max_probes=args.max_probes,
        seed=args.seed,
        num_threads=_threads(args),
        address=args.address,
        num_cpus=args.num_cpus,
    )


def _threads(args: Args) -> int:
    return args.num_threads or min(8, len(os.sched_getaffinity(0)))


def _curate(
    args: Args,
    spec: "EmbedderSpec",
    table: "Table",
    real_table: "Table",
    real: "RealRows",
    rows: "SyntheticRows",
    search: "Search",
    folder: Path,
) -> CurationResult:
    from factory.curation import dedup
    from factory.curation.memorisation import CopyTest
    from jobs.curation_closeness import find_closeness
    from jobs.curation_copies import CopyFindings, find_copies
    from jobs.curation_verdicts import curation_columns, mark_copies, mark_duplicates, telling_pairs
    from jobs.fidelity import rejected_later
    from schemas.sample import RejectReason

    notes: list[str] = []
    rejudged = None
    if args.rejudge:
        from factory.curation.rejudge import Override
        from jobs.curation_rejudge import rejudge

        again = rejudge(table, real_table, rows, [Override.parse(text) for text in args.threshold])
        rows, rejudged = dataclasses.replace(rows, stream_reasons=again.reasons), again.changed
        notes += again.notes
    disobeying = rejected_later(table)
    if disobeying:
        later = [
            RejectReason.MASK_NOT_OBEYED if reason is None and request_id in disobeying else reason
            for request_id, reason in zip(rows.request_ids, rows.stream_reasons)
        ]
        rows = dataclasses.replace(rows, stream_reasons=later)
    similarity, nearest = dedup.nearest(
        rows.embeddings,
        real.embeddings,
        1,
        query_groups=rows.groups,
        reference_groups=real.groups,
        num_threads=_threads(args),
    )
    copies = CopyFindings(matches={}, thresholds={}, power=None, false_alarm=None)
    if args.copy_test and rows.request_ids:
        source = CopyTest(candidates=args.copy_candidates, correlation=args.copy_correlation)
        copies = find_copies(
            source,
            spec,
            table,
            real_table,
            real,
            rows,
            num_planted=args.planted,
            threads=_threads(args),
            rejudged=args.rejudge,
        )
    reasons, correlations = mark_copies(rows, real, copies, similarity, nearest)
    verdicts = mark_duplicates(args, spec, rows, real, reasons, search, folder)
    values = curation_columns(rows, verdicts, real, similarity, nearest)
    table = table.write_columns(values, key="request_id")
    tag = table.next_tag()
    closeness = find_closeness(real_table, real, rows)
    record = _record(args, real, copies, verdicts, rejudged)
    table.set_metadata(
        {f"curation.{tag}": json.dumps(record, sort_keys=True), f"memorisation.{tag}": closeness.to_json()}
    )
    table.tag(tag)
    reasons = verdicts.reasons
    counts = Counter(zip(rows.labels, (reason or "accepted" for reason in reasons)))
    result = CurationResult(
        uri=table.uri,
        version=table.version,
        tag=tag,
        total=len(reasons),
        accepted=sum(reason is None for reason in reasons),
        rejected=dict(Counter(str(reason) for reason in reasons if reason is not None).most_common()),
        by_class={
            label: {str(reason): n for (name, reason), n in sorted(counts.items()) if name == label}
            for label in sorted(set(rows.labels))
        },
        pairs=telling_pairs(args.num_pairs, rows, real, similarity, nearest, correlations, copies),
        duplicate_similarity=record["duplicate_similarity"],
        copy_thresholds=copies.thresholds,
        power=copies.power,
        false_alarm=copies.false_alarm,
        closeness=closeness,
        seconds=0.0,
        duplicate_limits=verdicts.limits,
        duplicates=verdicts.duplicates,
        floors=verdicts.floors,
        rejudged=rejudged,
        notes=(*notes, *verdicts.notes),
    )
    if args.report is None:
        return result
    from jobs.curation_report import write_report

    page = write_report(Path(args.report), result, table, real_table, real, rows, similarity, copies)
    return dataclasses.replace(result, report=str(page))


# ------------------------------------------------------------------------------------------ reading


def _check(args: Args, table: "Table", real_table: "Table") -> "EmbedderSpec":
    """The embedder of both tables."""
    from factory.embedding import EmbedderSpec
    from jobs.curation_thresholds import parse_similarity

    if not {"request_id", "stream_reject_reason"} <= set(table.schema.names):
        raise ValueError(f"{args.table} is not a synthetic table; `factory synthesize` makes one")
    if not {"image_id", "split", "group_id"} <= set(real_table.schema.names):
        raise ValueError(f"--real {args.real} is not a table of real images; `factory prepare` makes one")
    specs = []
    for each in (table, real_table):
        if "embedder" not in each.metadata:
            raise ValueError(f"{each.uri} records no embedder; make it again with `factory prepare`")
        specs.append(EmbedderSpec.from_json(each.metadata["embedder"]))
    specs[0].check_same(specs[1], args.real)
    if args.copy_candidates < 1 or args.planted < 0 or args.num_pairs < 0:
        raise ValueError(
            f"--copy-candidates {args.copy_candidates} must be at least 1, --planted {args.planted} and "
            f"--num-pairs {args.num_pairs} at least 0"
        )
    for name, value in (("duplicate-quantile", args.duplicate_quantile), ("min-share", args.min_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"--{name} {value} is outside 0 … 1")
    if args.threshold and not args.rejudge:
        raise ValueError(f"--threshold {args.threshold[0]}: only with --rejudge")
    parse_similarity(args.duplicate_similarity)
    return specs[1]


def _record(
    args: Args,
    real: "RealRows",
    copies: "CopyFindings",
    verdicts: "Verdicts",
    rejudged: int | None,
) -> dict[str, Any]:
    """What the tag's record says."""
    same = set(verdicts.limits.values())
    return {
        "real": f"{args.real}@{real.version}",
        "duplicate_similarity": same.pop() if len(same) == 1 else None,
        "duplicate_limits": dict(verdicts.limits),
        "deduplication": None if verdicts.duplicates is None else verdicts.duplicates.record(),
        "floors": [dataclasses.asdict(floor) | {"met": floor.is_met} for floor in verdicts.floors],
        "rejudged": None if rejudged is None else {"thresholds": list(args.threshold), "changed": rejudged},
        "copy_thresholds": dict(copies.thresholds),
        "power": None if copies.power is None else dataclasses.asdict(copies.power),
        "false_alarm": copies.false_alarm,
    }


def command(argv: Sequence[str]) -> int:
    """`factory curate`."""
    args = tyro.cli(Args, args=list(argv), prog="factory curate", description=__doc__)
    print_result(run(args))
    return 0
