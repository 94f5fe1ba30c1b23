"""The diversity floor: no class loses more of its rows than the operator was told, or allowed.

A class whose accepted rows are less than a share of all its rows is named with the reasons. Where asked for, the best
of its duplicates are kept until the share is reached: near-copies of real images and rows that a filter rejected never
are.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.sample import RejectReason


@dataclass(frozen=True, kw_only=True)
class ClassFloor:
    """A class that fell below its share.

    Attributes:
        label: class name.
        rows: in the table.
        accepted: before any duplicate was kept.
        kept: duplicates kept for the floor.
        min_share: share of rows that was wanted.
        reasons: rows per reject reason, before.
    """

    label: str
    rows: int
    accepted: int
    kept: int
    min_share: float
    reasons: Mapping[str, int]

    @property
    def is_met(self) -> bool:
        """Whether the share is reached with the duplicates that were kept."""
        return self.accepted + self.kept >= math.ceil(self.min_share * self.rows - 1e-9)

    def line(self) -> str:
        """For the screen."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())
        kept = f"; the best {self.kept} duplicates are kept" if self.kept else ""
        after = "" if self.is_met or not self.kept else ", and the share is still not reached"
        share = (self.accepted) / max(self.rows, 1)
        return (
            f"WARNING: class {self.label}: {self.accepted} of {self.rows} rows accepted ({share:.0%}), less than "
            f"--min-share {self.min_share:.0%} ({reasons}){kept}{after}"
        )


def apply_floor(
    labels: Sequence[str],
    reasons: Sequence[str | None],
    rank: np.ndarray,
    min_share: float,
    *,
    keep: bool,
) -> tuple[list[int], list[ClassFloor]]:
    """Rows to keep in spite of being duplicates, and the classes below the floor.

    Args:
        labels: class name of each row, N.
        reasons: verdict of each row; None where accepted.
        rank: (N,) distinct numbers, the best row lowest.
        min_share: 0 … 1, of a class's rows.
        keep: whether duplicates are kept.

    Raises:
        ValueError: min_share is outside 0 … 1.
    """
    if not 0 <= min_share <= 1:
        raise ValueError(f"--min-share {min_share} is outside 0 … 1")
    restored: list[int] = []
    floors: list[ClassFloor] = []
    names = np.asarray(labels, dtype=object)
    for label in sorted(set(labels)):
        members = np.flatnonzero(names == label).tolist()
        counts = Counter(str(reasons[row]) for row in members if reasons[row] is not None)
        accepted = len(members) - sum(counts.values())
        short = math.ceil(min_share * len(members) - 1e-9) - accepted
        if short <= 0:
            continue
        duplicates = [row for row in members if reasons[row] == RejectReason.DUPLICATE_OF_SYNTHETIC]
        chosen = sorted(duplicates, key=lambda row: rank[row])[:short] if keep else []
        restored += chosen
        floors.append(
            ClassFloor(
                label=label,
                rows=len(members),
                accepted=accepted,
                kept=len(chosen),
                min_share=min_share,
                reasons=dict(counts.most_common()),
            )
        )
    return sorted(restored), floors
