"""Regeneration: which rejected requests are asked for again, with a new attempt and so a new seed.

A second planning round, never a loop inside the stream: rounds follow one another until every request has an accepted
attempt, has used up its attempts, or the budget is spent. What to ask next is a pure function of what is committed, so a
job that was killed goes on where it was. At most one attempt of a request is accepted, since no further one is asked
after it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.request import ATTEMPT_SHIFT

_POSITIONS = (1 << ATTEMPT_SHIFT) - 1


@dataclass(frozen=True, kw_only=True)
class Regeneration:
    """What is tried again, and how often.

    Attributes:
        attempts: further attempts of each request, at most.
        reasons: reject reasons for which a request is tried again.
        max_images: further attempts in all; None for no bound but `attempts`.
    """

    attempts: int
    reasons: tuple[str, ...] = ("mask_not_obeyed",)
    max_images: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.attempts < 1 << 15:
            raise ValueError(f"regenerate: want 1 … 32767 further attempts, got {self.attempts}")
        if not self.reasons or len(set(self.reasons)) < len(self.reasons):
            raise ValueError(f"regenerate-reasons: want at least one, each once; got {self.reasons}")
        if self.max_images is not None and self.max_images < 0:
            raise ValueError(f"regenerate: a budget of {self.max_images} images is negative")

    def to_json_value(self) -> dict[str, object]:
        """As plain data, for a table's metadata."""
        return {"attempts": self.attempts, "reasons": list(self.reasons), "max_images": self.max_images}

    @classmethod
    def from_json_value(cls, value: Mapping[str, object]) -> "Regeneration":
        """The inverse of `to_json_value`."""
        attempts, reasons, most = value["attempts"], value["reasons"], value["max_images"]
        assert isinstance(attempts, int) and isinstance(reasons, Sequence)
        assert most is None or isinstance(most, int)
        return cls(attempts=attempts, reasons=tuple(map(str, reasons)), max_images=most)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempts:
    """The attempts behind and ahead of a plan; request indices are sorted int64 arrays.

    Attributes:
        done: attempts above 0 that are committed or given up.
        missing: attempts to ask for now.
        tried_again: requests with an attempt above 0 behind or ahead of them.
        recovered: of these, how many have an accepted attempt.
        exhausted: of these, how many were rejected with no attempt left to ask for.
    """

    done: np.ndarray
    missing: np.ndarray
    tried_again: int
    recovered: int
    exhausted: int

    @property
    def indices(self) -> np.ndarray:
        """All attempts above 0 that a job has asked for or asks for now: they join the requests of the plan."""
        return np.union1d(self.done, self.missing)

    def line(self) -> str:
        """What came of it, in words."""
        return (
            f"regeneration: {len(self.done)} further attempts of {self.tried_again} rejected requests, "
            f"{self.recovered} of them accepted in the end, {self.exhausted} given up, "
            f"{len(self.missing)} attempts to make"
        )


def next_attempts(
    is_wanted: Callable[[np.ndarray], np.ndarray],
    verdicts: Iterable[tuple[np.ndarray, Sequence[str | None] | np.ndarray]],
    rule: Regeneration,
    given_up: np.ndarray | None = None,
) -> Attempts:
    """What to ask for next.

    Args:
        is_wanted: whether the job asks for each of these first attempts: request indices int64 (n,) → bool (n,).
        verdicts: of the plan's committed rows, in chunks: their request indices, and for each the reject reason or None.
        rule: what is tried again.
        given_up: request indices that are quarantined: they count as attempts, and are not followed by another.

    Returns:
        Attempts in the order of request_index, so that of a scarce budget every request gets its first further attempt
        before any gets its second.
    """
    indices, may_retry, accepted = _gathered(verdicts, frozenset(rule.reasons))
    lost = np.empty(0, np.int64) if given_up is None else np.asarray(given_up, np.int64)
    indices = np.concatenate([indices, lost])
    may_retry = np.concatenate([may_retry, np.zeros(len(lost), np.bool_)])
    accepted = np.concatenate([accepted, np.zeros(len(lost), np.bool_)])
    ours = is_wanted(indices & _POSITIONS)
    indices, may_retry, accepted = indices[ours], may_retry[ours], accepted[ours]
    order = np.argsort(indices, kind="stable")
    indices, may_retry, accepted = indices[order], may_retry[order], accepted[order]
    positions, attempts = indices & _POSITIONS, indices >> ATTEMPT_SHIFT
    done = np.unique(indices[attempts > 0])

    again, place = np.unique(positions, return_inverse=True)
    last = np.zeros(len(again), np.int64)
    np.maximum.at(last, place, attempts)
    has_accepted = np.zeros(len(again), np.bool_)
    np.logical_or.at(has_accepted, place, accepted)
    last_may_retry = np.zeros(len(again), np.bool_)
    is_last = attempts == last[place]
    np.logical_or.at(last_may_retry, place[is_last], may_retry[is_last])

    asks = ~has_accepted & last_may_retry & (last < rule.attempts)
    missing = np.sort(((last[asks] + 1) << ATTEMPT_SHIFT) + again[asks])
    if rule.max_images is not None:
        missing = missing[: max(0, rule.max_images - len(done))]
    tried = last > 0
    tried[np.isin(again, missing & _POSITIONS)] = True
    ahead = np.isin(again, missing & _POSITIONS)
    return Attempts(
        done=done,
        missing=missing,
        tried_again=int(tried.sum()),
        recovered=int((tried & has_accepted).sum()),
        exhausted=int((tried & ~has_accepted & ~ahead).sum()),
    )


def _gathered(
    verdicts: Iterable[tuple[np.ndarray, Sequence[str | None] | np.ndarray]], reasons: frozenset[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Request indices, whether the reason allows another attempt, whether accepted: 10 bytes per committed row."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
        (np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.bool_))
    ]
    for indices, found in verdicts:
        names = list(found)
        parts.append(
            (
                np.asarray(indices, np.int64),
                np.array([name in reasons for name in names], np.bool_),
                np.array([name is None for name in names], np.bool_),
            )
        )
    one, two, three = (np.concatenate(column) for column in zip(*parts))
    return one, two, three
