"""What is in a prepared dataset, and what to beware of: stored with the table and printed by `prepare`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from factory.datasets.near_duplicates import DuplicateGroups, NearDuplicates
from factory.datasets.shortcuts import ShortcutCheck
from schemas.sample import SPLITS

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """The same picture under two labels: at least one label is wrong. Paths and class names, and how alike."""

    first: str
    second: str
    first_label: str
    second_label: str
    kind: str
    correlation: float


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What the search for near-duplicates found.

    Attributes:
        searched: False where images are independent by construction.
        num_pairs: links by kind: frame, examination, neighbour.
        num_groups: groups, single images included.
        num_grouped: images that share a group.
        largest_group: images in the largest.
        sensitivity: number of groups with thresholds lowered and raised: name of the setting → groups.
        settings: the thresholds used.
    """

    searched: bool
    num_pairs: dict[str, int] = field(default_factory=dict)
    num_groups: int
    num_grouped: int
    largest_group: int
    sensitivity: dict[str, int] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts and warnings; every value is JSON.

    Attributes:
        dataset: name of the layout.
        unit: what the splits keep apart.
        num_images: rows.
        counts: class → split → images.
        height, width: px; minimum, quartiles, maximum.
        lesion_area: class → minimum, quartiles, maximum of the share of the image, lesion images only.
        num_empty_masks: class → images whose mask is empty.
        marks: class → share of images with burned-in marks.
        num_colour: images that are not grey.
        duplicates: near-duplicates.
        conflicts: the same picture under two labels.
        shortcuts: whether frame size and intensity alone predict the label.
        num_quarantined: items left out.
    """

    dataset: str
    unit: str
    num_images: int
    counts: dict[str, dict[str, int]]
    height: list[float]
    width: list[float]
    lesion_area: dict[str, list[float]]
    num_empty_masks: dict[str, int]
    marks: dict[str, float]
    num_colour: int
    duplicates: Duplicates
    conflicts: list[Conflict]
    shortcuts: ShortcutCheck
    num_quarantined: int

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Per-image columns that a summary counts; all of the same length.

    Attributes:
        source_path, label_name, split: as in the table.
        image: uint8 (H, W) or (H, W, 3).
        mask: uint8 (H, W) or None.
        has_marks: burned-in marks.
    """

    source_path: Sequence[str]
    label_name: Sequence[str]
    split: Sequence[str]
    image: Sequence[np.ndarray]
    mask: Sequence[np.ndarray | None]
    has_marks: Sequence[bool]


def _spread(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in np.quantile(values, _QUANTILES)] if len(values) else []


def find_conflicts(facts: Facts, groups: DuplicateGroups) -> list[Conflict]:
    """Pairs of the same picture (same frame or examination) whose labels differ."""
    found = []
    for pair in groups.pairs:
        names = facts.label_name[pair.first], facts.label_name[pair.second]
        if names[0] != names[1] and pair.kind != "neighbour":
            found.append(
                Conflict(first=facts.source_path[pair.first], second=facts.source_path[pair.second],
                         first_label=names[0], second_label=names[1], kind=pair.kind,
                         correlation=round(pair.correlation, 3))
            )  # fmt: skip
    return found


def describe_duplicates(
    groups: DuplicateGroups, search: NearDuplicates | None, sensitivity: dict[str, int]
) -> Duplicates:
    """Counts of a search; `search` is None where none was made."""
    sizes = np.bincount(groups.group)
    sizes = sizes[sizes > 0]
    kinds = [pair.kind for pair in groups.pairs]
    return Duplicates(
        searched=search is not None,
        num_pairs={kind: kinds.count(kind) for kind in ("frame", "examination", "neighbour")},
        num_groups=len(sizes),
        num_grouped=int(sizes[sizes > 1].sum()),
        largest_group=int(sizes.max()),
        sensitivity=sensitivity,
        settings=dataclasses.asdict(search) if search is not None else {},
    )


def summarise(
    facts: Facts,
    class_names: Sequence[str],
    *,
    dataset: str,
    unit: str,
    groups: DuplicateGroups,
    duplicates: Duplicates,
    shortcuts: ShortcutCheck,
    num_quarantined: int,
) -> Summary:
    """Count everything."""
    members = {name: [i for i, label in enumerate(facts.label_name) if label == name] for name in class_names}
    areas = [None if mask is None else float((mask > 0).mean()) for mask in facts.mask]
    lesions = {name: [a for i in rows if (a := areas[i])] for name, rows in members.items()}
    return Summary(
        dataset=dataset,
        unit=unit,
        num_images=len(facts.image),
        counts={
            name: {split: sum(facts.split[i] == split for i in rows) for split in SPLITS}
            for name, rows in members.items()
        },
        height=_spread([image.shape[0] for image in facts.image]),
        width=_spread([image.shape[1] for image in facts.image]),
        lesion_area={name: _spread(values) for name, values in lesions.items()},
        num_empty_masks={name: sum(areas[i] == 0 for i in rows) for name, rows in members.items()},
        marks={
            name: round(float(np.mean([facts.has_marks[i] for i in rows] or [False])), 4)
            for name, rows in members.items()
        },
        num_colour=sum(image.ndim == 3 for image in facts.image),
        duplicates=duplicates,
        conflicts=find_conflicts(facts, groups),
        shortcuts=shortcuts,
        num_quarantined=num_quarantined,
    )
