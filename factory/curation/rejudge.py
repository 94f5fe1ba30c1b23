"""Verdicts of the stream's filters again, from the scores that every row stores, with other thresholds.

No image is read and no GPU used. Only what a filter compares its scores with can change; what enters the scores
themselves (quantiles of training images, which references) cannot.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from factory.curation.filter_batch import FittedFilter, first_reasons
from schemas.sample import RejectReason

_FITTED = ("quantile", "min_references", "region")
"""Fields of filters that enter fitting or scoring."""
_NOT_A_FILTERS = (
    RejectReason.ANNOTATION_FAILED,
    RejectReason.DUPLICATE_OF_SYNTHETIC,
    RejectReason.NEAR_COPY_OF_REAL,
)


@dataclass(frozen=True, kw_only=True)
class Override:
    """One threshold of a filter: `SimilarityBand.upper=1.2`."""

    filter: str
    field: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Override":
        """From the command line.

        Raises:
            ValueError: not FILTER.FIELD=NUMBER.
        """
        name, equals, value = text.partition("=")
        kind, dot, field = name.partition(".")
        try:
            if not (equals and dot and kind and field):
                raise ValueError
            return cls(filter=kind, field=field, value=float(value))
        except ValueError:
            raise ValueError(
                f"--threshold {text!r}: want FILTER.FIELD=NUMBER, such as SimilarityBand.upper=1.2"
            ) from None


def with_thresholds(filters: Sequence[Any], overrides: Sequence[Override]) -> tuple[Any, ...]:
    """The fitted filters with thresholds replaced.

    Raises:
        ValueError: no such filter or field, a field that enters the scores, or a value that the filter refuses.
    """
    changed = list(filters)
    for item in overrides:
        places = [k for k, fitted in enumerate(changed) if type(fitted.source).__name__ == item.filter]
        if not places:
            names = ", ".join(sorted({type(fitted.source).__name__ for fitted in changed}))
            raise ValueError(f"--threshold {item.filter}.{item.field}: the recipe's filters are {names}")
        for place in places:
            source = changed[place].source
            fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
            usable = [
                name
                for name, value in fields.items()
                if name not in _FITTED and isinstance(value, (int, float))
            ]
            if item.field not in usable:
                why = (
                    "enters the scores, so images would have to be scored again"
                    if item.field in fields
                    else "is not there"
                )
                raise ValueError(
                    f"--threshold {item.filter}.{item.field}: that field {why}; there are {', '.join(usable)}"
                )
            value = int(item.value) if isinstance(fields[item.field], int) else item.value
            replaced = dataclasses.replace(source, **{item.field: value})
            changed[place] = dataclasses.replace(changed[place], source=replaced)
    return tuple(changed)


def score_columns(scores: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Stored scores of N rows → name → float32 (N,), NaN where a row has none of that name."""
    names = sorted({name for row in scores for name in row})
    return {name: np.array([row.get(name, np.nan) for row in scores], np.float32) for name in names}


def judge_again(
    filters: Sequence[FittedFilter], scores: Mapping[str, np.ndarray], reasons: Sequence[str | None]
) -> list[str | None]:
    """New stream verdicts of N rows: those of the filters, except where the stream's was not a filter's.

    Args:
        filters: fitted, in the recipe's order.
        scores: name → (N,).
        reasons: `stream_reject_reason` of the rows.
    """
    if not reasons:
        return []
    verdicts = first_reasons(filters, scores) if filters else [None] * len(reasons)
    return [
        old if old in _NOT_A_FILTERS else (None if new is None else str(new))
        for old, new in zip(reasons, verdicts, strict=True)
    ]
