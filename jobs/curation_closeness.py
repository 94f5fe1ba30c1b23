"""Whether the generator lies closer to its training images than to held-out ones: for curation and its record."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from factory.curation.closeness import MIN_GROUPS, Closeness, compare_closeness
from jobs.curation_rows import RealRows, SyntheticRows, read_real

if TYPE_CHECKING:
    from factory.storage import Table

LEVEL = 0.01


@dataclass(frozen=True, kw_only=True)
class ClosenessFinding:
    """The test's outcome, or in `note` why there is none."""

    outcome: Closeness | None
    note: str = ""

    def to_json(self) -> str:
        """For the table's metadata, from where the dataset card takes it."""
        if self.outcome is None:
            return json.dumps({"test": "closer to training than to held-out images", "not_done": self.note})
        verdict = "memorising" if self.outcome.is_detected(LEVEL) else "not detected"
        values = {k: v for k, v in dataclasses.asdict(self.outcome).items() if v == v}  # NaN is no JSON
        return json.dumps(
            {
                "test": "closer to training than to held-out images",
                "level": LEVEL,
                "verdict": verdict,
                **values,
            },
            sort_keys=True,
        )

    def lines(self) -> Iterator[str]:
        """For the screen."""
        found = self.outcome
        if found is None:
            yield f"closeness to training images: not tested, {self.note}"
            return
        planted = ", ".join(f"{share:.0%} copies p {p:.3f}" for share, p in found.planted.items())
        yield (
            f"closeness to training images: cosine {found.difference:+.4f} nearer than to held-out ones, p "
            f"{found.p_value:.3f} ({found.num_references} references each; with planted {planted})"
        )
        if found.is_detected(LEVEL):
            yield (
                "WARNING: the generator lies closer to its training images than chance allows: it memorises. Train "
                "fewer steps or on more images, and look at the nearest pairs before anything leaves this machine"
            )


MAX_SYNTHETIC = 10_000
"""Rows that the test's sample is drawn from: embeddings of many rows are not in memory."""


def own_rows(rows: SyntheticRows) -> np.ndarray:
    """Row numbers of wholly synthetic rows, at most `MAX_SYNTHETIC` of them drawn by a fixed seed; ascending."""
    own = np.flatnonzero([group is None for group in rows.groups])
    if len(own) <= MAX_SYNTHETIC:
        return own
    return np.sort(np.random.default_rng(0).choice(own, MAX_SYNTHETIC, replace=False))


def find_closeness(real_table: "Table", training: RealRows, rows: SyntheticRows) -> ClosenessFinding:
    """The test on rows that are wholly synthetic, against as many validation as training references.

    Derived rows are left out: most of their pixels are a training image's.
    """
    own = own_rows(rows)
    if not rows.groups:
        return ClosenessFinding(outcome=None, note="the table has no rows")
    if not own.size:
        return ClosenessFinding(outcome=None, note="all rows are derived from training images")
    if not real_table.count("split = 'val'"):
        return ClosenessFinding(outcome=None, note="the real table has no validation rows")
    held_out = read_real(real_table, "val")
    outcome = compare_closeness(
        rows.embeddings[own],
        training.embeddings,
        training.groups,
        held_out.embeddings,
        held_out.groups,
    )
    note = "" if outcome else f"fewer than {MIN_GROUPS} patients or groups in training or validation"
    return ClosenessFinding(outcome=outcome, note=note)
