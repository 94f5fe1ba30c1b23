"""The report of a demo: what the tables and the run's files say, as sections of one page.

Everything is read back from what the verbs wrote, so that the report shows what a user would find there.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory import report
from factory.imaging import decode_png
from schemas.sample import SPLITS

if TYPE_CHECKING:
    from factory.curation.planted import Power
    from jobs.curate import CurationResult
    from jobs.synthesize import SynthesisResult

NUM_REAL, NUM_ACCEPTED, NUM_REJECTED, NUM_PAIRS = 16, 32, 16, 6
NEAR_COPY = "near_copy_of_real"
_COLUMNS = [
    *("request_id", "plan_id", "label_name", "prompt", "image", "mask", "recipe", "fingerprint", "weights"),
    *("code_version", "num_inference_steps", "guidance_scale", "stream_reject_reason", "accepted"),
    *("reject_reason", "nearest_real", "nearest_real_similarity"),
]


@dataclass(frozen=True, kw_only=True)
class DemoPaths:
    """What the demo writes below its folder."""

    out: Path

    @property
    def real(self) -> Path:
        return self.out / "real.lance"

    @property
    def generator(self) -> Path:
        return self.out / "generator"

    @property
    def synthetic(self) -> Path:
        return self.out / "synthetic.lance"

    @property
    def sheet(self) -> Path:
        return self.out / "accepted.png"

    @property
    def report(self) -> Path:
        return self.out / "report.html"


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """What two of the verbs returned, for what no table holds: rates, correlations, the copy test's power."""

    synthesis: "SynthesisResult"
    curation: "CurationResult"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of the two tables that the report shows."""

    real: Sequence[Mapping[str, Any]]
    synthetic: Sequence[Mapping[str, Any]]
    split_counts: Mapping[tuple[str, str], int]
    embedder: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        """Names of the classes that have rows."""
        return sorted({label for label, _ in self.split_counts})

    @property
    def accepted(self) -> list[Mapping[str, Any]]:
        """Effective verdict: curation's where it has spoken, the stream's otherwise."""
        return [row for row in self.synthetic if row["accepted"]]

    @property
    def rejected(self) -> list[Mapping[str, Any]]:
        return [row for row in self.synthetic if not row["accepted"]]


def read_rows(paths: DemoPaths) -> Rows:
    """Training rows (never the test split) and all synthetic rows."""
    from factory.storage import open_table, real_rows

    real = open_table(str(paths.real))
    columns = ["image_id", "label_name", "group_id", "image", "mask", "embedding"]
    counts = real.read(columns=["split", "label_name"]).to_pylist()
    return Rows(
        real=real_rows(str(paths.real), splits=("train",), columns=columns).to_pylist(),
        synthetic=open_table(str(paths.synthetic)).query(columns=_COLUMNS).to_pylist(),
        split_counts=Counter((row["label_name"], row["split"]) for row in counts),
        embedder=json.loads(real.metadata["embedder"]),
    )


def sections(
    paths: DemoPaths,
    rows: Rows,
    stages: Sequence[report.StageTime],
    results: DemoResults,
    commands: Mapping[str, str],
) -> list[report.Section]:
    """Every section of the page.

    Args:
        paths: of the demo.
        rows: of its tables.
        stages: timings, in order.
        results: of the verbs.
        commands: what to run next.
    """
    synthesis = results.synthesis
    found: list[report.Section] = [
        _summary(rows, results, stages),
        _real_gallery(rows),
        _accepted_gallery(rows),
        _rejected_gallery(rows),
        report.Bars(
            title="Acceptance funnel",
            note="Rejected rows stay in the table with their reason; thresholds can change without making an "
            "image again.",
            counts={
                "requested": synthesis.requested,
                "made": synthesis.committed,
                "passed the stream's filters": sum(r["stream_reject_reason"] is None for r in rows.synthetic),
                "accepted after curation": len(rows.accepted),
            },
            total=synthesis.requested,
        ),
        report.Bars(
            title="Reject reasons",
            counts=dict(Counter(row["reject_reason"] for row in rows.rejected).most_common()),
            total=len(rows.synthetic),
            tone="bad",
        ),
        *_training(paths),
        *_similarity(rows, results.curation),
        report.Timings(
            title="Time",
            note="Fixed time does not grow with the number of images: imports, starting Ray, making the tracking "
            "store, loading models.",
            stages=stages,
        ),
        _split_table(rows),
        _provenance(paths, rows),
        report.Commands(title="What to run next", commands=commands),
    ]
    return found


def duration(seconds: float) -> str:
    """`3 min 41 s`, or `41 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _pixels(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    return decode_png(row["image"]), None if row["mask"] is None else decode_png(row["mask"])


def _gallery(title: str, note: str, rows: Sequence[Mapping[str, Any]], caption: Any) -> report.Gallery:
    decoded = [_pixels(row) for row in rows]
    return report.Gallery(
        title=title,
        note=note,
        images=[image for image, _ in decoded],
        masks=[mask for _, mask in decoded],
        captions=[caption(row) for row in rows],
    )


def balanced(
    rows: Sequence[Mapping[str, Any]], limit: int, key: str = "label_name"
) -> list[Mapping[str, Any]]:
    """Up to `limit` rows, one of each value of `key` in turn, otherwise in table order."""
    queues: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        queues.setdefault(row[key], []).append(row)
    chosen: list[Mapping[str, Any]] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        chosen += [queue[turn] for queue in queues.values() if turn < len(queue)]
    order = {id(row): position for position, row in enumerate(rows)}
    return sorted(chosen[:limit], key=lambda row: (str(row[key]), order[id(row)]))


def _summary(rows: Rows, results: DemoResults, stages: Sequence[report.StageTime]) -> report.Cards:
    synthesis, power = results.synthesis, results.curation.power
    share = len(rows.accepted) / max(len(rows.synthetic), 1)
    copies = sum(row["reject_reason"] == NEAR_COPY for row in rows.synthetic)
    quarantined = sum(synthesis.quarantined.values())
    cards = [
        report.Card(
            label="synthetic images",
            value=str(len(rows.synthetic)),
            about=f"{synthesis.requested} requested, {quarantined} quarantined, {synthesis.pending} pending",
        ),
        report.Card(
            label="accepted",
            value=str(len(rows.accepted)),
            about=f"{share:.0%}; every other row keeps its reason",
            tone="good" if share >= 0.5 else "warn",
        ),
        report.Card(
            label="real images",
            value=str(sum(rows.split_counts.values())),
            about=f"{len(rows.real)} to train on, the rest held out",
        ),
        report.Card(
            label="copies of real images",
            value=str(copies),
            about="found and rejected"
            + ("" if power is None else f"; planted copies found: {_found(power)}"),
            tone="warn" if copies else "good",
        ),
        report.Card(
            label="time",
            value=duration(sum(stage.seconds for stage in stages)),
            about=f"{duration(sum(stage.fixed for stage in stages))} of it fixed",
        ),
    ]
    if synthesis.made:
        per_accepted = (
            synthesis.busy_seconds / synthesis.made * len(rows.synthetic) / max(len(rows.accepted), 1)
        )
        cards.append(
            report.Card(
                label="per accepted image",
                value=f"{per_accepted:.2f} s",
                about=f"of a synthesizer; {synthesis.images_per_second:.1f} images/s",
            )
        )
    return report.Cards(title="Summary", cards=cards)


def _found(power: "Power") -> str:
    """Least and greatest share of planted copies found, over the kinds of change."""
    shares = power.detected.values()
    least, greatest = min(shares), max(shares)
    return f"{greatest:.0%}" if least == greatest else f"{least:.0%} to {greatest:.0%}"


def _real_gallery(rows: Rows) -> report.Gallery:
    return _gallery(
        "Real images",
        "From the training split. The contour is the annotated lesion; point at an image to hide it.",
        balanced(rows.real, NUM_REAL),
        lambda row: row["label_name"],
    )


def _accepted_gallery(rows: Rows) -> report.Gallery:
    return _gallery(
        "Synthetic images, accepted",
        "Each was made for the mask whose contour is drawn; that mask is its label. The number is the cosine of its "
        "embedding and that of the nearest real training image.",
        balanced(rows.accepted, NUM_ACCEPTED),
        lambda row: f"{row['label_name']} · {_cosine(row)}\n{row['request_id'][:8]}",
    )


def _rejected_gallery(rows: Rows) -> report.Gallery:
    return _gallery(
        "Synthetic images, rejected",
        "Some of each reason.",
        balanced(rows.rejected, NUM_REJECTED, key="reject_reason"),
        lambda row: f"{row['reject_reason']}\n{row['label_name']} · {_cosine(row)}\n{row['request_id'][:8]}",
    )


def _cosine(row: Mapping[str, Any]) -> str:
    similarity = row["nearest_real_similarity"]
    return "–" if similarity is None else f"{similarity:.3f}"


def _training(paths: DemoPaths) -> list[report.Section]:
    from factory.training.metrics import read_metrics

    lines = [line for line in read_metrics(paths.generator) if "loss" in line]
    if not lines:
        return []
    steps = [int(line["step"]) for line in lines]
    window = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    note = f"Each point is the mean over {window} steps."
    figure = report.loss_curve(steps, [line["loss"] for line in lines], ylabel="loss")
    return [report.Plot(title="Training loss", note=note, figure=figure)]


def leave_group_out(embeddings: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Greatest cosine of each unit embedding (N, D) to one of another group; (M,), M ≤ N where there is one."""
    similarity = embeddings @ embeddings.T
    names = np.asarray(groups)
    similarity[names[:, None] == names[None, :]] = -np.inf
    greatest = similarity.max(axis=1)
    return greatest[np.isfinite(greatest)]


def _similarity(rows: Rows, curation: "CurationResult") -> list[report.Section]:
    compared = [row for row in rows.synthetic if row["nearest_real_similarity"] is not None]
    if not compared:
        return []
    real_by_id = {row["image_id"]: row for row in rows.real}
    by_id = {row["request_id"]: row for row in compared}
    pairs = []
    for found in curation.pairs[:NUM_PAIRS]:
        row, real = by_id[found.request_id], real_by_id[found.image_id]
        image, mask = _pixels(row)
        real_image, real_mask = _pixels(real)
        verdict = "accepted" if row["accepted"] else row["reject_reason"]
        tested = "" if found.correlation is None else f"crops correlate {found.correlation:.2f} · "
        pairs.append(
            report.Pair(
                synthetic=image,
                synthetic_mask=mask,
                real=real_image,
                real_mask=real_mask,
                synthetic_caption=f"synthetic {row['label_name']}\n{row['request_id'][:8]}",
                real_caption=f"real {real['label_name']}\n{real['image_id'][:8]}",
                similarity=found.similarity,
                verdict=f"{tested}{verdict}",
            )
        )
    embeddings = np.array([row["embedding"] for row in rows.real], np.float32)
    left_out = leave_group_out(embeddings, [row["group_id"] for row in rows.real])
    similarity = np.array([row["nearest_real_similarity"] for row in compared], np.float32)
    return [
        report.Pairs(
            title="Nearest real images",
            note="The synthetic images that come nearest to a real training image, each beside that image: copies "
            "first, if there are any.",
            pairs=pairs,
        ),
        report.Plot(
            title="Similarity to real images",
            note="Cosine to the nearest real training image. Synthetic images should lie where real images of other "
            "groups lie: not to the right (copies), not far to the left (implausible).",
            figure=report.similarity_histogram(similarity, left_out),
        ),
    ]


def _split_table(rows: Rows) -> report.Grid:
    made = Counter(row["label_name"] for row in rows.synthetic)
    accepted = Counter(row["label_name"] for row in rows.accepted)
    lines: list[list[str | int | float]] = []
    shown = [split for split in SPLITS if any(name == split for _, name in rows.split_counts)]
    for label in rows.labels:
        splits = [rows.split_counts.get((label, split), 0) for split in shown]
        lines.append([label, *splits, made[label], accepted[label]])
    return report.Grid(
        title="Counts",
        note="Splits keep near-duplicates and patients together. The test split is not looked at.",
        header=("class", *(f"real {split}" for split in shown), "synthetic", "accepted"),
        rows=lines,
    )


def _provenance(paths: DemoPaths, rows: Rows) -> report.Facts:
    from factory.storage import open_table
    from factory.version import code_version

    synthetic = open_table(str(paths.synthetic))
    facts: dict[str, object] = {}
    for row in rows.synthetic[-1:]:
        facts |= {"recipe": row["recipe"], "fingerprint": row["fingerprint"], "plan": row["plan_id"]}
        facts |= {f"weights: {name}": digest for name, digest in row["weights"]}
        facts["denoising"] = f"{row['num_inference_steps']} steps, guidance scale {row['guidance_scale']:g}"
    facts["embedder"] = f"{rows.embedder.get('name')}, weights {rows.embedder.get('weights_digest')}"
    facts["real table"] = f"{paths.real}, version {open_table(str(paths.real)).version}"
    tags = ", ".join(sorted(synthetic.tags())) or "none"
    facts["synthetic table"] = f"{paths.synthetic}, version {synthetic.version}, tags: {tags}"
    facts["code"] = code_version()
    return report.Facts(
        title="Provenance",
        note="Every row names these, its prompt, its requested mask and what each source drew: enough to make it "
        "again.",
        facts=facts,
    )
