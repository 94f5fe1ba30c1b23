"""What a curation found, for the screen, the tracker and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factory.curation.floor import ClassFloor
    from factory.curation.memorisation import Region
    from factory.curation.planted import Power
    from jobs.curation_closeness import ClosenessFinding
    from jobs.curation_duplicates import DuplicateFindings

LEAST_POWER = 0.5
"""Share of planted copies below which the copy test's silence is not to be trusted."""


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
        duplicate_similarity: cosine in force for all classes; None where it differs, or nothing was compared.
        copy_thresholds: correlation in force per region; empty without the copy test.
        power: what the copy test finds of planted copies, where measured.
        false_alarm: share of validation images called copies, where there are at least 20.
        closeness: whether the generator lies closer to its training images than to held-out ones.
        seconds: of the whole run.
        duplicate_limits: cosine in force per class.
        duplicates: how duplicates were searched, and the recall; None where nothing was compared.
        floors: classes below --min-share.
        rejudged: rows whose stream verdict other thresholds changed; None without --rejudge.
        notes: what the operator should know.
        report: page that was written.
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
    duplicate_limits: Mapping[str, float] = field(default_factory=dict)
    duplicates: "DuplicateFindings | None" = None
    floors: Sequence["ClassFloor"] = ()
    rejudged: int | None = None
    notes: Sequence[str] = ()
    report: str | None = None


def metrics(result: CurationResult) -> dict[str, float]:
    """For the tracker."""
    values: dict[str, float] = {
        "total": result.total,
        "accepted": result.accepted,
        **{f"rejected.{reason}": count for reason, count in result.rejected.items()},
        **{f"copy_threshold.{region}": value for region, value in result.copy_thresholds.items()},
    }
    if result.duplicate_similarity is not None:
        values["duplicate_similarity"] = result.duplicate_similarity
    if result.duplicates is not None:
        values |= {
            "duplicate_links": result.duplicates.num_links,
            "duplicate_seconds": result.duplicates.seconds,
        }
        if result.duplicates.recall is not None and result.duplicates.recall.value is not None:
            values["duplicate_recall"] = result.duplicates.recall.value
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
    if result.rejudged is not None:
        print(f"judged again from stored scores: {result.rejudged} rows changed their verdict")
    if result.duplicate_similarity is not None:
        print(f"duplicates: cosine ≥ {result.duplicate_similarity:.4f}")
    elif result.duplicate_limits:
        print("duplicates: cosine ≥ " + ", ".join(f"{k} {v:.4f}" for k, v in result.duplicate_limits.items()))
    for line in (*(result.duplicates.lines() if result.duplicates else ()), *result.notes):
        print(line)
    for floor in result.floors:
        print(floor.line())
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
    if result.report is not None:
        print(f"report: {result.report}")
    share = result.accepted / max(result.total, 1)
    print(f"accepted {result.accepted} of {result.total} ({share:.0%})")
    print(
        f"wrote {result.uri} (version {result.version}, tag {result.tag}); "
        f'next: factory query {result.uri} "accepted" --tag {result.tag}'
    )
