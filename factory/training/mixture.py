"""Which rows each training step sees: the one `BatchSampler`.

A batch is a pure function of (seed, step): no state to save, so resuming is exact, and the split over workers
comes after the draw, so the number of workers does not change which rows a step sees.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from schemas.identity import random_generator


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """Shuffled epochs laid end to end and cut into batches.

    Every row comes once per epoch. A batch may span two epochs, so it is always full, also where there are
    fewer rows than `batch_size`.

    Attributes:
        num_rows: rows of the training set, numbered 0 … num_rows - 1.
        batch_size: images per step over all workers.
        seed: of the shuffles.
    """

    num_rows: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"num_rows: want at least one training row, got {self.num_rows}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: want 1 or more, got {self.batch_size}")

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of global batch `step`: int64 (batch_size,)."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, within = np.divmod(places, self.num_rows)
        out = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = _shuffle(self.seed, int(epoch), self.num_rows)[within[here]]
        return out

    def epoch(self, step: int) -> float:
        """Passes over the rows done before `step`."""
        return step * self.batch_size / self.num_rows


@lru_cache(maxsize=4)
def _shuffle(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    order = random_generator(f"training/{seed}/{epoch}", "rows").permutation(num_rows)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of a global batch that one worker computes, or one micro-batch of it.

    Attributes:
        step: the optimizer update it belongs to.
        rows: row numbers, int64 (b,).
        positions: their places in the global batch, int64 (b,). Noise is drawn by (seed, step, position).
    """

    step: int
    rows: np.ndarray
    positions: np.ndarray

    def split(self, parts: int) -> list["Shard"]:
        """Consecutive equal parts.

        Raises:
            ValueError: the number of rows is not divisible by `parts`.
        """
        if len(self.rows) % parts:
            raise ValueError(f"parts: {len(self.rows)} rows cannot be split into {parts} equal parts")
        pieces = zip(np.split(self.rows, parts), np.split(self.positions, parts))
        return [Shard(step=self.step, rows=rows, positions=positions) for rows, positions in pieces]


def global_batch(sampler: BatchSampler, step: int) -> Shard:
    """Batch `step` before it is split over workers."""
    return Shard(step=step, rows=sampler.rows(step), positions=np.arange(sampler.batch_size, dtype=np.int64))
