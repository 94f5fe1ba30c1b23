"""What filters share: the rows they look at, the scores they give, and how several verdicts become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from factory.imaging import TrainingRow
from schemas.identity import hash_parts
from schemas.sample import RejectReason

Scores = Mapping[str, np.ndarray]
"""Name of a score → float32 (N,). NaN where a score does not apply to a row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FilterBatch:
    """N synthetic rows as the filters see them.

    Attributes:
        images: uint8 (S, S) or (S, S, 3) each.
        requested_masks: the conditions, uint8 (S, S) each; None where the recipe has none.
        masks: the labels, uint8 (S, S) each; None where there is none.
        labels: (N,) index into the class names.
        embeddings: float32 (N, D), unit norm.
        crop_embeddings: float32 (N, D), unit norm, of the lesion crops (`lesion_crops.embed_crops`), NaN where a row
            has no lesion; None where no filter `needs_crops`.
        segmented_masks: what a segmenter finds, uint8 (F, F) each at the segmenter's frame; None where no filter has one.
    """

    images: Sequence[np.ndarray]
    requested_masks: Sequence[np.ndarray | None]
    masks: Sequence[np.ndarray | None]
    labels: np.ndarray
    embeddings: np.ndarray
    crop_embeddings: np.ndarray | None = None
    segmented_masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        names = (
            "images",
            "requested_masks",
            "masks",
            "labels",
            "embeddings",
            "crop_embeddings",
            "segmented_masks",
        )
        lengths = {name: len(getattr(self, name)) for name in names if getattr(self, name) is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"FilterBatch: fields differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.images)


class FittedFilter(Protocol):
    """What a filter's `fit(rows, embeddings)` gives back."""

    fitted_on: str

    def score(self, batch: FilterBatch) -> dict[str, np.ndarray]:
        """Every score of every row."""
        ...

    def verdict(self, scores: Scores) -> list[RejectReason | None]:
        """Reason or None for every row, from the scores alone."""
        ...


def first_reasons(
    filters: Sequence[FittedFilter], scores: Scores, num_rows: int
) -> list[RejectReason | None]:
    """The verdict of any number of filters: for each row the reason of the first filter that has one."""
    verdicts = [item.verdict(scores) for item in filters]
    return [
        next((verdict[row] for verdict in verdicts if verdict[row] is not None), None)
        for row in range(num_rows)
    ]


def digest_rows(rows: Sequence[TrainingRow]) -> str:
    """Digest of the rows' ids, independent of their order: recorded with what was fitted on them."""
    return hash_parts("rows", *sorted(row.image_id for row in rows))


def column(scores: Scores, name: str) -> np.ndarray:
    """A score by name; ValueError where the rows were scored without its filter."""
    if name not in scores:
        raise ValueError(f"scores: {name!r} is missing; this table was scored without that filter")
    return np.asarray(scores[name])
