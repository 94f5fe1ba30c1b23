"""Mark copies of real images and duplicates in a synthetic table; no row is dropped, no image rewritten.

    factory curate synthetic.lance --real real.lance
    factory curate synthetic.lance --real real.lance --duplicate-similarity 0.97 --copy-correlation 0.6

The verdict of a row is the first of these that holds:

1. near_copy_of_real: the registered-crop test finds a real training image in it. Tested are rows that the stream
   accepted or found too similar to real ones, for which this is the more telling reason.
2. The stream's own verdict, as it stands in `stream_reject_reason`.
3. duplicate_of_synthetic: among the remaining rows, all but the best of each set of near-duplicates.

Thresholds come from real training images against those of other patients, unless given. Every run writes the
nullable columns of all rows anew, as a new version with a tag of its own.
"""

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro
from tyro.conf import Positional

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from factory.curation.memorisation import Region
    from factory.curation.planted import Power
    from factory.embedding import EmbedderSpec
    from factory.storage import Table
    from jobs.curation_closeness import ClosenessFinding
    from jobs.curation_copies import CopyFindings
    from jobs.curation_rows import RealRows, SyntheticRows


LEAST_POWER = 0.5
"""Share of planted copies below which the copy test's silence is not to be trusted."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory curate`."""

    table: Positional[str]
    """Synthetic table to curate."""
    real: str
    """Real table whose training rows are compared with."""
    duplicate_similarity: float | None = None
    """Cosine from which two synthetic rows are duplicates; taken from real images by default."""
    duplicate_quantile: float = 0.999
    """Share of real images that are less alike to the nearest one of another patient than duplicates are."""
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
    num_threads: int | None = None
    """Threads; all cores of this process by default, at most 8."""


@dataclass(frozen=True, kw_only=True)
class NearestPair:
    """A synthetic row and the real image nearest to it; `correlation` is None where it was not tested."""

    request_id: str
    image_id: str
    similarity: float
    correlation: float | None


@dataclass(frozen=True, kw_only=True)
class CurationResult:
    """What a curation found.

    Attributes:
        uri, version, tag: the table and the version made.
        total, accepted: rows, and those without a reject reason.
        rejected: rows per reject reason.
        by_class: the same per class name, with "accepted" among the reasons.
        pairs: the most telling nearest-real pairs, copies first.
        duplicate_similarity: cosine in force.
        copy_thresholds: correlation in force per region; empty without the copy test.
        power: what the copy test finds of planted copies, where measured.
        false_alarm: share of validation images called copies, where there are at least 20.
        closeness: whether the generator lies closer to its training images than to held-out ones.
        seconds: of the whole run.
    """

    uri: str
    version: int
    tag: str
    total: int
    accepted: int
    rejected: Mapping[str, int]
    by_class: Mapping[str, Mapping[str, int]]
    pairs: Sequence[NearestPair]
    duplicate_similarity: float | None
    copy_thresholds: "Mapping[Region, float]"
    power: "Power | None"
    false_alarm: float | None
    closeness: "ClosenessFinding"
    seconds: float


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
    with track(
        "curate",
        execution_parameters=dataclasses.asdict(args),
        inputs={"synthetic": f"{args.table}@{table.version}", "real": f"{args.real}@{real_table.version}"},
    ) as tracked:
        real, rows = read_real(real_table), read_synthetic(table)
        result = _curate(args, spec, table, real_table, real, rows)
        result = dataclasses.replace(result, seconds=time.perf_counter() - start)
        tracked.set({"table": args.table, "table_version": str(result.version), "table_tag": result.tag})
        tracked.metrics(_metrics(result))
        tracked.artifact("nearest_real.json", [dataclasses.asdict(pair) for pair in result.pairs])
    return result


def _curate(
    args: Args,
    spec: "EmbedderSpec",
    table: "Table",
    real_table: "Table",
    real: "RealRows",
    rows: "SyntheticRows",
) -> CurationResult:
    import numpy as np

    from factory.curation import dedup
    from factory.curation.memorisation import CopyTest
    from jobs.curation_closeness import find_closeness
    from jobs.curation_copies import CopyFindings, find_copies
    from schemas.sample import RejectReason

    threads = args.num_threads or min(8, len(os.sched_getaffinity(0)))
    similarity, nearest = dedup.nearest(
        rows.embeddings,
        real.embeddings,
        1,
        query_groups=rows.groups,
        reference_groups=real.groups,
        num_threads=threads,
    )
    copies = CopyFindings(matches={}, thresholds={}, power=None, false_alarm=None)
    if args.copy_test and rows.request_ids:
        source = CopyTest(candidates=args.copy_candidates, correlation=args.copy_correlation)
        copies = find_copies(
            source, spec, table, real_table, real, rows, num_planted=args.planted, threads=threads
        )
    reasons: list[str | None] = list(rows.stream_reasons)
    correlations: list[float | None] = [None] * len(reasons)
    for row, request_id in enumerate(rows.request_ids):
        match = copies.matches.get(request_id)
        if match is None or match.reference < 0:
            continue
        correlations[row] = match.correlation
        if match.is_copy:
            # The pair to look at is the one that registration found, whatever the embedding prefers.
            reasons[row] = RejectReason.NEAR_COPY_OF_REAL
            nearest[row, 0] = match.reference
            similarity[row, 0] = real.embeddings[match.reference] @ rows.embeddings[row]
    rest = np.flatnonzero([reason is None for reason in reasons])
    duplicate_of: list[str | None] = [None] * len(reasons)
    threshold = None
    if rest.size > 1:
        threshold = args.duplicate_similarity
        if threshold is None:
            threshold = dedup.real_similarity_quantile(
                real.embeddings, real.groups, args.duplicate_quantile, threads
            )
        for row, kept in _duplicates(rows, rest, threshold, threads).items():
            reasons[row] = RejectReason.DUPLICATE_OF_SYNTHETIC
            duplicate_of[row] = rows.request_ids[kept]
    values = _columns(rows, reasons, duplicate_of, real, similarity, nearest)
    table = table.write_columns(values, key="request_id")
    tag = table.next_tag()
    record = {
        "real": f"{args.real}@{real.version}",
        "duplicate_similarity": threshold,
        "copy_thresholds": dict(copies.thresholds),
        "power": None if copies.power is None else dataclasses.asdict(copies.power),
        "false_alarm": copies.false_alarm,
    }
    closeness = find_closeness(real_table, real, rows)
    table.set_metadata(
        {f"curation.{tag}": json.dumps(record, sort_keys=True), f"memorisation.{tag}": closeness.to_json()}
    )
    table.tag(tag)
    counts = Counter(zip(rows.labels, (reason or "accepted" for reason in reasons)))
    return CurationResult(
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
        pairs=_pairs(args, rows, real, similarity, nearest, correlations, copies),
        duplicate_similarity=threshold,
        copy_thresholds=copies.thresholds,
        power=copies.power,
        false_alarm=copies.false_alarm,
        closeness=closeness,
        seconds=0.0,
    )


# ------------------------------------------------------------------------------------------ reading


def _check(args: Args, table: "Table", real_table: "Table") -> "EmbedderSpec":
    """The embedder of both tables."""
    from factory.embedding import EmbedderSpec

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
    if not 0 <= args.duplicate_quantile <= 1:
        raise ValueError(f"--duplicate-quantile {args.duplicate_quantile} is outside 0 … 1")
    if args.duplicate_similarity is not None and not 0 < args.duplicate_similarity <= 1:
        raise ValueError(f"--duplicate-similarity {args.duplicate_similarity} is outside (0, 1]")
    return specs[1]


# ------------------------------------------------------------------------------------------ verdicts


def _duplicates(rows: "SyntheticRows", rest: "np.ndarray", threshold: float, threads: int) -> dict[int, int]:
    """Row → kept row, for the rows of `rest` that duplicate another of them.

    Of a set of duplicates the row deepest inside the similarity band is kept, then that of lowest request_index.
    """
    import numpy as np

    from factory.curation.dedup import find_duplicates

    quality = np.nan_to_num(rows.quality[rest], nan=-np.inf)
    rank = np.empty(len(rest), np.int64)
    rank[np.lexsort((rest, rows.indices[rest], -quality))] = np.arange(len(rest))
    found = find_duplicates(rows.embeddings[rest], rank, threshold, num_threads=threads)
    return {int(rest[k]): int(rest[found.kept[k]]) for k in np.flatnonzero(found.is_duplicate)}


def _columns(
    rows: "SyntheticRows",
    reasons: Sequence[str | None],
    duplicate_of: Sequence[str | None],
    real: "RealRows",
    similarity: "np.ndarray",
    nearest: "np.ndarray",
) -> "pa.Table":
    """The curation columns of every row."""
    import pyarrow as pa

    from schemas.sample import curation_schema

    ids = [None if k < 0 else real.image_ids[k] for k in nearest[:, 0]]
    values = [float(s) if k >= 0 else None for s, k in zip(similarity[:, 0], nearest[:, 0])]
    columns = {
        "request_id": rows.request_ids,
        "reject_reason": [None if reason is None else str(reason) for reason in reasons],
        "accepted": [reason is None for reason in reasons],
        "duplicate_of": list(duplicate_of),
        "nearest_real": ids,
        "nearest_real_similarity": values,
    }
    schema = pa.schema([pa.field("request_id", pa.string(), nullable=False), *curation_schema()])
    return pa.table(columns, schema=schema)


def _pairs(
    args: Args,
    rows: "SyntheticRows",
    real: "RealRows",
    similarity: "np.ndarray",
    nearest: "np.ndarray",
    correlations: Sequence[float | None],
    copies: "CopyFindings",
) -> list[NearestPair]:
    """The most telling pairs: by excess over the copy threshold, then by similarity."""

    def telling(row: int) -> tuple[float, float, str]:
        match = copies.matches.get(rows.request_ids[row])
        excess = match.excess if match is not None and match.is_copy else 0.0
        return -excess, -float(similarity[row, 0]), rows.request_ids[row]

    there = [row for row in range(len(rows.request_ids)) if nearest[row, 0] >= 0]
    return [
        NearestPair(
            request_id=rows.request_ids[row],
            image_id=real.image_ids[nearest[row, 0]],
            similarity=float(similarity[row, 0]),
            correlation=correlations[row],
        )
        for row in sorted(there, key=telling)[: args.num_pairs]
    ]


# ------------------------------------------------------------------------------------------ telling


def _metrics(result: CurationResult) -> dict[str, float]:
    values: dict[str, float] = {
        "total": result.total,
        "accepted": result.accepted,
        **{f"rejected.{reason}": count for reason, count in result.rejected.items()},
        **{f"copy_threshold.{region}": value for region, value in result.copy_thresholds.items()},
    }
    if result.duplicate_similarity is not None:
        values["duplicate_similarity"] = result.duplicate_similarity
    if result.false_alarm is not None:
        values["copy_false_alarm"] = result.false_alarm
    if result.closeness.outcome is not None:
        values["closeness_difference"] = result.closeness.outcome.difference
        values["closeness_p_value"] = result.closeness.outcome.p_value
    if result.power is not None:
        values |= {f"planted_detected.{kind}": share for kind, share in result.power.detected.items()}
    return values


def print_result(result: CurationResult) -> None:
    """Counts per reason and class, thresholds, what the copy test is worth, and what to do next."""
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(title=f"{result.total} rows")
    grid.add_column("verdict")
    for label in (*result.by_class, "all"):
        grid.add_column(label, justify="right")
    for reason in ("accepted", *result.rejected):
        counts = [by_reason.get(reason, 0) for by_reason in result.by_class.values()]
        grid.add_row(reason, *map(str, counts), str(sum(counts)))
    Console().print(grid)
    if result.duplicate_similarity is not None:
        print(f"duplicates: cosine ≥ {result.duplicate_similarity:.4f}")
    if result.copy_thresholds:
        parts = ", ".join(f"{region} ≥ {value:.2f}" for region, value in result.copy_thresholds.items())
        alarm = "" if result.false_alarm is None else f"; {result.false_alarm:.1%} of validation images alarm"
        print(f"copies of real images: correlation of {parts}{alarm}")
    if result.power is not None:
        found = ", ".join(f"{kind} {share:.0%}" for kind, share in result.power.detected.items())
        print(f"of planted copies of {result.power.num_images} training images it finds: {found}")
        missed = [kind for kind, share in result.power.detected.items() if share < LEAST_POWER]
        if missed:
            print(
                f"WARNING: the copy test misses most planted copies of kind {', '.join(missed)}, so finding none says "
                "little. The usual cause: near-duplicates among the real images that share no group_id; let "
                "`factory prepare` find them, or give patient ids"
            )
        elif not result.rejected.get("near_copy_of_real"):
            print("copies: not detected, at that power")
    for line in result.closeness.lines():
        print(line)
    share = result.accepted / max(result.total, 1)
    print(f"accepted {result.accepted} of {result.total} ({share:.0%})")
    print(
        f"wrote {result.uri} (version {result.version}, tag {result.tag}); "
        f'next: factory query {result.uri} "accepted" --tag {result.tag}'
    )


def command(argv: Sequence[str]) -> int:
    """`factory curate`."""
    args = tyro.cli(Args, args=list(argv), prog="factory curate", description=__doc__)
    print_result(run(args))
    return 0
