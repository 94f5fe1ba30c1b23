"""What is asked for: a plan and its requests.

`plan_id` is a hash of what determines every image of the plan; `request_id` of the plan, the label, the
ordinal within the label and the attempt. Neither the number of requests nor the label proportions enter, so
asking for more extends the same plan. A request also has a `request_index`, unique within its plan, by which
a bitmap of what is committed answers what is missing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from schemas.identity import hash_parts

ATTEMPT_SHIFT = 48
"""Bits of a request_index below the attempt: 2^48 (label, ordinal) pairs, 2^15 attempts."""


@dataclass(frozen=True, kw_only=True)
class SynthesisRequest:
    """One image to make.

    Attributes:
        request_id: 32 hex characters; everything random about the image is seeded from it.
        plan_id: the plan it belongs to.
        request_index: its number within the plan, unique over labels, ordinals and attempts.
        label: class name.
        label_index: position of `label` in the plan's class table.
        ordinal: 0, 1, 2, … within its label.
        attempt: 0 at first; regeneration with a new seed counts up (a retry after a fault does not).
    """

    request_id: str
    plan_id: str
    request_index: int
    label: str
    label_index: int
    ordinal: int
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class SynthesisPlan:
    """All requests of a job: what determines them, but not how many are wanted.

    Attributes:
        recipe: name of the recipe.
        fingerprint: hash of the recipe's parts that change pixels or masks.
        weights: digest of every weight file set and of every table that a source reads, by name.
        real_digest: content digest of the real training rows used.
        seed: the operator's --seed.
        labels: class table of the real dataset, in its order.
    """

    recipe: str
    fingerprint: str
    weights: Mapping[str, str]
    real_digest: str
    seed: int = 0
    labels: tuple[str, ...]
    plan_id: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("labels: a plan needs at least one class")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: duplicate class name in {self.labels}")
        parts: list[str | int] = [self.fingerprint, self.real_digest, self.seed]
        for name in sorted(self.weights):
            parts += [name, self.weights[name]]
        object.__setattr__(self, "plan_id", hash_parts("plan", *parts, "labels", *self.labels))

    def request(self, label: str, ordinal: int, attempt: int = 0) -> SynthesisRequest:
        """The request for the `ordinal`-th image of `label`.

        Raises:
            ValueError: `label` is not in the class table, or ordinal or attempt is negative or too large.
        """
        if label not in self.labels:
            raise ValueError(f"label {label!r} is not a class of the real dataset: {', '.join(self.labels)}")
        label_index = self.labels.index(label)
        position = ordinal * len(self.labels) + label_index
        if ordinal < 0 or position >= 1 << ATTEMPT_SHIFT:
            raise ValueError(f"ordinal {ordinal} is outside 0 … 2^{ATTEMPT_SHIFT} / number of classes")
        if not 0 <= attempt < 1 << 15:
            raise ValueError(f"attempt {attempt} is outside 0 … 32767")
        return SynthesisRequest(
            request_id=hash_parts("request", self.plan_id, label, ordinal, attempt),
            plan_id=self.plan_id,
            request_index=(attempt << ATTEMPT_SHIFT) + position,
            label=label,
            label_index=label_index,
            ordinal=ordinal,
            attempt=attempt,
        )

    def request_at(self, request_index: int) -> SynthesisRequest:
        """The request with that index: the inverse of `request`."""
        attempt, position = divmod(int(request_index), 1 << ATTEMPT_SHIFT)
        ordinal, label_index = divmod(position, len(self.labels))
        return self.request(self.labels[label_index], ordinal, attempt)

    def indices(self, counts: Mapping[str, int], attempt: int = 0) -> np.ndarray:
        """Sorted request indices (int64) of the first `counts[label]` requests of each label.

        Raises:
            ValueError: a label is unknown, or a count is negative.
        """
        return np.concatenate([np.empty(0, np.int64), *self.index_blocks(counts, attempt)])

    def index_blocks(
        self, counts: Mapping[str, int], attempt: int = 0, block: int = 1 << 20
    ) -> Iterator[np.ndarray]:
        """The same indices in increasing arrays of at most `block`, one at a time: 10^7 of them need not be in memory.

        Raises:
            ValueError: as `indices`.
        """
        wanted = np.zeros(len(self.labels), np.int64)
        for label, count in counts.items():
            if count < 0:
                raise ValueError(f"labels: {label}={count} is negative")
            wanted[self.request(label, max(count - 1, 0), attempt).label_index] = count
        stop = int(wanted.max()) * len(self.labels)
        for lowest in range(0, stop, block):
            positions = np.arange(lowest, min(lowest + block, stop), dtype=np.int64)
            ordinals, labels = np.divmod(positions, len(self.labels))
            found = positions[ordinals < wanted[labels]]
            if len(found):
                yield (attempt << ATTEMPT_SHIFT) + found
