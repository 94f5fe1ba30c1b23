"""What `factory prepare` prints: a table of counts and remarks in plain words."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from factory.datasets.layout import Problem
from factory.datasets.summary import Summary
from schemas.sample import SPLITS

_SHOWN = 12


def counts_table(summary: Summary) -> Table:
    """Images per class and split, lesion areas, empty masks and burned-in marks."""
    title = f"{summary.dataset}: {summary.num_images} images, {summary.unit}"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    present = [split for split in SPLITS if any(splits.get(split) for splits in summary.counts.values())]
    for split in present:
        table.add_column(split, justify="right")
    for heading in ("total", "lesion area % (min / median / max)", "empty masks", "with marks"):
        table.add_column(heading, justify="right")
    for name, splits in summary.counts.items():
        area = summary.lesion_area[name]
        shown = f"{100 * area[0]:.1f} / {100 * area[2]:.1f} / {100 * area[4]:.1f}" if area else "–"
        table.add_row(
            name,
            *(str(splits.get(split, 0)) for split in present),
            str(sum(splits.values())),
            shown,
            str(summary.num_empty_masks[name]),
            f"{100 * summary.marks[name]:.0f} %",
        )
    return table


def remarks(summary: Summary, quarantined: Sequence[Problem]) -> Iterator[str]:
    """Sizes, near-duplicates, conflicts, shortcuts, quarantine: one line each, conflicts and problems listed."""
    width, height = summary.width, summary.height
    yield (
        f"size: width {width[0]:.0f} … {width[4]:.0f} px (median {width[2]:.0f}), height {height[0]:.0f} … "
        f"{height[4]:.0f} px (median {height[2]:.0f}); {summary.num_colour} image(s) in colour"
    )
    yield from _duplicates(summary)
    for conflict in summary.conflicts[:_SHOWN]:
        yield f"  {conflict.first} = {conflict.second} ({conflict.kind}, correlation {conflict.correlation:.2f})"
    if len(summary.conflicts) > _SHOWN:
        yield f"  … and {len(summary.conflicts) - _SHOWN} more in the table's summary"
    yield _shortcuts(summary)
    if quarantined:
        yield f"quarantined: {len(quarantined)} item(s) are left out"
        yield from (f"  {problem}" for problem in quarantined[:_SHOWN])
        if len(quarantined) > _SHOWN:
            yield f"  … and {len(quarantined) - _SHOWN} more in the table's metadata"


def _duplicates(summary: Summary) -> Iterator[str]:
    found = summary.duplicates
    if not found.searched:
        yield "near-duplicates: not searched, images are independent by construction"
        return
    pairs = found.num_pairs
    yield (
        f"near-duplicates: {pairs['frame']} pairs of the same frame, {pairs['examination']} of the same examination, "
        f"{pairs['neighbour']} alike file neighbours; {found.num_grouped} of {summary.num_images} images "
        f"have one; largest group {found.largest_group}"
    )
    counts = ", ".join(f"{name}: {count}" for name, count in found.sensitivity.items())
    yield f"groups: {found.num_groups} as used; {counts}"
    if summary.conflicts:
        yield f"conflicts: {len(summary.conflicts)} pair(s) show the same picture under two labels; each pair is in one split"


def _shortcuts(summary: Summary) -> str:
    found = summary.shortcuts
    if found.all is None:
        return f"shortcuts: not computed ({found.reason or 'a fold lacks a class'})"
    parts = {
        "frame size": found.frame_size,
        "intensity": found.intensity,
        "colour": found.colour,
        "marks": found.marks,
    }
    alone = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value is not None)
    verdict = "the label leaks into them" if found.all >= 0.6 else "no strong shortcut"
    return f"shortcuts: AUC {found.all:.2f} from frame size, intensity and colour alone ({alone}): {verdict}"
