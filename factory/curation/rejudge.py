"""Verdicts of the stream's filters again, from the scores that every row stores, with other thresholds.

No synthetic image is read and no GPU used. Only what a filter compares its scores with can change: a threshold, or a
bound that is fitted again on the real training rows (`REFITTED` of a filter). What entered the scores themselves
(`ENTERS_SCORES`: which references, ranges of training masks) cannot.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from factory.curation.filter_batch import FittedFilter, first_reasons
from schemas.sample import RejectReason

_UNDECLARED = ("quantile", "min_references", "region")
"""Fields taken to enter the scores of a filter that does not say which do."""
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


def with_thresholds(
    filters: Sequence[Any], overrides: Sequence[Override], refit: Callable[[Any], Any] | None = None
) -> tuple[Any, ...]:
    """The fitted filters with thresholds replaced. A value that is in force already changes nothing.

    Args:
        filters: fitted, in the recipe's order.
        overrides: applied one after the other.
        refit: fits a filter on the real training rows again, for bounds that come from them.

    Raises:
        ValueError: no such filter or field, another value of a field that entered the scores, or a value that the
            filter refuses.
    """
    changed = list(filters)
    for item in overrides:
        named = {k: type(f.source).__name__ for k, f in enumerate(changed) if hasattr(f, "source")}
        places = [k for k, name in named.items() if name == item.filter]
        if not places:
            names = ", ".join(sorted(set(named.values())))
            raise ValueError(f"--threshold {item.filter}.{item.field}: the recipe's filters are {names}")
        for place in places:
            changed[place] = _with_threshold(changed[place], item, refit)
    return tuple(changed)


def _with_threshold(fitted: Any, item: Override, refit: Callable[[Any], Any] | None) -> Any:
    source = fitted.source
    values = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    value = int(item.value) if isinstance(values.get(item.field), int) else item.value
    if item.field in values and values[item.field] == value:
        return fitted
    entering = getattr(source, "ENTERS_SCORES", _UNDECLARED)
    usable = [
        name
        for name, now in values.items()
        if name not in entering and (now is None or isinstance(now, (int, float)))
    ]
    if item.field not in usable:
        why = (
            "entered the scores, so images would have to be scored again"
            if item.field in values
            else "is not there"
        )
        raise ValueError(
            f"--threshold {item.filter}.{item.field}: that field {why}; there are {', '.join(usable)}"
        )
    replaced = dataclasses.replace(source, **{item.field: value})
    if item.field in getattr(source, "REFITTED", ()):
        if refit is None:
            raise ValueError(
                f"--threshold {item.filter}.{item.field}: the bound comes from the real training rows; give them"
            )
        return refit(replaced)
    return dataclasses.replace(fitted, source=replaced)


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
    verdicts = first_reasons(filters, scores, len(reasons))
    return [
        old if old in _NOT_A_FILTERS else (None if new is None else str(new))
        for old, new in zip(reasons, verdicts, strict=True)
    ]
