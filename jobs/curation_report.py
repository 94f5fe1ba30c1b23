"""The page of `factory curate --report`: what a curation says of memorisation and of duplicates, with the worst pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory import report
from factory.curation.closeness import reference_similarities
from factory.curation.memorisation import CopyMatch, CopyTest
from factory.curation.registered_pairs import difference, registered_pair
from factory.imaging import as_grey, decode_png, letterbox
from jobs.curation_closeness import LEVEL, own_rows
from jobs.curation_result import LEAST_POWER, CurationResult, NearestPair
from jobs.curation_rows import RealRows, SyntheticRows, read_real

if TYPE_CHECKING:
    from factory.storage import Table
    from jobs.curation_copies import CopyFindings

PAGE = "memorisation.html"
NUM_WORST = 24
_SIDE = 192
_SHOWN = 160


def verdict(result: CurationResult) -> str:
    """What the title says: of the worst that was found, or how little the silence means."""
    copies = result.rejected.get("near_copy_of_real", 0)
    if result.closeness.outcome is not None and result.closeness.outcome.is_detected(LEVEL):
        return "memorising: closer to training than to held-out images"
    if copies:
        return f"{copies} near-copies of training images found"
    if not result.copy_thresholds and result.closeness.outcome is None:
        return "not tested"
    return "not detected"


def write_report(
    folder: Path,
    result: CurationResult,
    table: "Table",
    real_table: "Table",
    real: RealRows,
    rows: SyntheticRows,
    similarity: np.ndarray,
    copies: "CopyFindings",
) -> Path:
    """Write `memorisation.html` into a folder, self-contained, and return its path.

    Args:
        folder: made where it is not there.
        result: of the curation.
        table, real_table: the tables.
        real, rows: what was read of them.
        similarity: (N, 1) of each row to its nearest training image.
        copies: matches of the copy test.
    """
    sections: list[report.Section] = [
        _summary(result, rows),
        _worst(result, table, real_table, copies),
        *_distances(result, real_table, real, rows),
        _counts(result),
        *_duplicates(result),
        report.Facts(
            title="Provenance",
            facts={
                "synthetic table": f"{table.uri}, version {result.version}, tag {result.tag}",
                "real table": f"{real_table.uri}, version {real.version}, training split; held-out: validation",
                "nearest similarity": _quartiles(similarity),
            },
        ),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    return report.html_report(
        folder / PAGE,
        sections,
        title=f"Memorisation: {verdict(result)}",
        subtitle=f"{result.uri} · {result.tag} · {result.total} rows",
        footer="Silence of a test says no more than its power: see the share of planted copies that it finds.",
    )


def _quartiles(similarity: np.ndarray) -> str:
    there = similarity[np.isfinite(similarity)]
    if not there.size:
        return "none"
    low, middle, high = np.quantile(there, [0.25, 0.5, 0.75])
    return f"median {middle:.3f}, quartiles {low:.3f} … {high:.3f}"


def _summary(result: CurationResult, rows: SyntheticRows) -> report.Cards:
    copies = result.rejected.get("near_copy_of_real", 0)
    tested = bool(result.copy_thresholds)
    cards = [
        report.Card(
            label="near-copies of training images",
            value=f"{copies / max(result.total, 1):.2%}" if tested else "not tested",
            about=f"{copies} of {result.total} rows, rejected"
            if copies
            else "not detected"
            if tested
            else "",
            tone="bad" if copies else "",
        )
    ]
    found = result.closeness.outcome
    cards.append(
        report.Card(
            label="closeness to training images",
            value="not tested" if found is None else f"p {found.p_value:.3f}",
            about=result.closeness.note
            if found is None
            else f"cosine {found.difference:+.4f} nearer than to held-out images; "
            + ("memorising" if found.is_detected(LEVEL) else f"not detected at level {LEVEL}"),
            tone="bad" if found is not None and found.is_detected(LEVEL) else "",
        )
    )
    if result.power is not None:
        least = min(result.power.detected.values(), default=0.0)
        cards.append(
            report.Card(
                label="planted copies found",
                value=f"{least:.0%} at least",
                about=", ".join(f"{kind} {share:.0%}" for kind, share in result.power.detected.items()),
                tone="warn" if least < LEAST_POWER else "",
            )
        )
    recall = None if result.duplicates is None else result.duplicates.recall
    if result.duplicates is not None:
        value = (
            "exact"
            if recall is None
            else "no pair sampled"
            if recall.value is None
            else f"{recall.value:.3f}"
        )
        about = f"{result.duplicates.method}, {result.duplicates.num_links} links"
        cards.append(report.Card(label="recall of duplicate pairs", value=value, about=about))
    derived = sum(group is not None for group in rows.groups)
    if derived:
        about = (
            "keep a patient's pixels: their lesion alone was tested, and they are not in the closeness test"
        )
        cards.append(report.Card(label="derived rows", value=str(derived), about=about, tone="warn"))
    return report.Cards(title="Summary", cards=cards)


# ------------------------------------------------------------------------------------------ pairs


def _worst(
    result: CurationResult, table: "Table", real_table: "Table", copies: "CopyFindings"
) -> report.Gallery:
    pairs = result.pairs[:NUM_WORST]
    synthetic = _images(table, "request_id", [pair.request_id for pair in pairs])
    real = _images(real_table, "image_id", [pair.image_id for pair in pairs])
    images = []
    for pair in pairs:
        match = copies.matches.get(pair.request_id)
        images.append(_triple(synthetic[pair.request_id], real[pair.image_id], match, pair, copies))
    return report.Gallery(
        title="Worst pairs",
        note="Synthetic crop, the part of the nearest training image that it was registered to, and their difference "
        "(black: equal) after matching brightness and contrast. Copies first. Whole frames where nothing was registered.",
        images=images,
        captions=[_caption(pair, copies.matches.get(pair.request_id)) for pair in pairs],
    )


def _caption(pair: NearestPair, match: CopyMatch | None) -> str:
    said = f"cosine {pair.similarity:.3f}"
    if match is not None and pair.correlation is not None:
        kind = "COPY" if match.is_copy else "below the threshold"
        said += f" · {match.region} correlates {pair.correlation:.2f}, {kind}"
    return f"{said}\n{pair.request_id[:8]} | {pair.image_id[:8]}"


def _images(table: "Table", key: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    if not ids:
        return {}
    names = ", ".join(f"'{each}'" for each in sorted(set(ids)))
    found = table.read([key, "image", "mask"], f"{key} IN ({names})").to_pylist()
    return {row[key]: row for row in found}


def _triple(
    synthetic: Mapping[str, Any],
    real: Mapping[str, Any],
    match: CopyMatch | None,
    pair: NearestPair,
    copies: "CopyFindings",
) -> np.ndarray:
    """Three crops side by side, uint8 (H, W) grey."""
    one, other = decode_png(synthetic["image"]), decode_png(real["image"])
    crops = None
    if (
        match is not None and match.is_copy
    ):  # of other rows the match may be with another image than the nearest
        source = CopyTest(side=min(_SIDE, max(one.shape[:2])))
        mask = None if synthetic["mask"] is None else decode_png(synthetic["mask"])
        frame = source.frame(one, mask)
        if match.region == "frame" or frame.lesion is not None:
            crops = registered_pair(frame, source.frame(other, None), match, source.side)
    if crops is not None:
        shown = [crops.synthetic, crops.real, crops.difference]
    else:
        left, right = (letterbox(as_grey(image), _SIDE) for image in (one, other))
        shown = [left, right, difference(left, right)]
    gap = np.full((_SHOWN, 4), 255, np.uint8)
    first, second, third = (letterbox(image, _SHOWN) for image in shown)
    return np.concatenate([first, gap, second, gap, third], axis=1)


# ------------------------------------------------------------------------------------------ numbers


def _distances(
    result: CurationResult, real_table: "Table", real: RealRows, rows: SyntheticRows
) -> list[report.Section]:
    found = result.closeness.outcome
    if found is None:
        return []
    held_out = read_real(real_table, "val")
    similarities = reference_similarities(
        rows.embeddings[own_rows(rows)], real.embeddings, real.groups, held_out.embeddings, held_out.groups
    )
    assert similarities is not None  # the test was done on the same rows
    to_training, to_held_out = similarities
    figure = report.similarity_histogram(
        to_training,
        to_held_out,
        names=("to training images", "to held-out images"),
        ylabel="share of synthetic images",
    )
    planted = ", ".join(f"{share:.0%} copies p {p:.3f}" for share, p in found.planted.items())
    control = (
        ""
        if found.control != found.control
        else f" Real images in the place of synthetic ones: p {found.control:.3f}."
    )
    return [
        report.Plot(
            title="Distance to training and to held-out images",
            note=f"Cosine of each of {found.num_synthetic} synthetic images to the nearest of {found.num_references} "
            f"training and of {found.num_references} held-out images, one per patient or group. Mean difference "
            f"{found.difference:+.4f}, one-sided permutation test over groups p {found.p_value:.3f}; with planted "
            f"{planted}.{control}",
            figure=figure,
        )
    ]


def _counts(result: CurationResult) -> report.Grid:
    labels = list(result.by_class)
    lines: list[list[str | int | float]] = []
    for reason in ("accepted", *result.rejected):
        counts = [by_reason.get(reason, 0) for by_reason in result.by_class.values()]
        lines.append([reason, *counts, sum(counts)])
    note = " ".join(floor.line().removeprefix("WARNING: ") + "." for floor in result.floors)
    return report.Grid(title="Verdicts per class", note=note, header=("verdict", *labels, "all"), rows=lines)


def _duplicates(result: CurationResult) -> list[report.Section]:
    if result.duplicates is None:
        return []
    facts: dict[str, object] = {
        f"cosine, {name}": f"{value:.4f}" for name, value in result.duplicate_limits.items()
    }
    facts |= {name: value for name, value in result.duplicates.record().items() if value is not None}
    return [report.Facts(title="Duplicates among synthetic images", facts=facts)]
