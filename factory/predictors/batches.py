"""Which training rows each optimizer step sees: pure functions of (seed, step). Numpy only.

A training step can therefore be repeated, and a run resumed, without keeping any state. `counts` are the rows of each
class that a batch is expected to hold, which is the prior that `BalancedSoftmax` needs.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from factory.predictors.losses import composed_counts, resampling_weights
from schemas.identity import random_generator

Sampling = Literal["plain", "class_balanced", "square_root"]
POWER: dict[str, float] = {"plain": 0.0, "class_balanced": 1.0, "square_root": 0.5}


class Batches(Protocol):
    """Composition of every batch."""

    @property
    def counts(self) -> np.ndarray:
        """Expected rows of each class in a batch, float64 (C,)."""

    @property
    def row_weights(self) -> np.ndarray:
        """Expected appearances of each row in a batch, float64 (N,)."""

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the batch of `step` (from 0), int64 (b,)."""


class ShuffledRows:
    """An endless stream over row numbers: one permutation after the other, each row once per epoch."""

    def __init__(self, rows: np.ndarray, identity: str) -> None:
        self._rows = np.asarray(rows, np.int64)
        self._identity = identity
        self._epochs: dict[int, np.ndarray] = {}

    def between(self, start: int, stop: int) -> np.ndarray:
        """Positions start … stop − 1 of the stream, int64 (stop − start,)."""
        count = len(self._rows)
        parts, position = [np.empty(0, np.int64)], start
        while position < stop:
            epoch, offset = divmod(position, count)
            take = min(count - offset, stop - position)
            parts.append(self._epoch(epoch)[offset : offset + take])
            position += take
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {e: rows for e, rows in self._epochs.items() if e == epoch - 1}
            rng = random_generator(self._identity, f"epoch {epoch}")
            self._epochs[epoch] = rng.permutation(self._rows)
        return self._epochs[epoch]


class UnionBatches:
    """Batches from all rows alike, real and synthetic in one pool.

    Args:
        labels: int (N,).
        num_classes: C.
        batch_size: rows in every batch; may exceed N, rows then repeat.
        seed: of the order.
        sampling: "plain" goes through shuffled epochs, every row once in each; "class_balanced" and "square_root"
            draw with replacement, a class as a whole ∝ n_c⁰ and ∝ n_c^½ (Kang et al. 2020).

    Raises:
        ValueError: no rows, a label outside the classes, or re-sampling with a class without rows.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        num_classes: int,
        batch_size: int,
        seed: int,
        sampling: Sampling = "plain",
    ) -> None:
        self._labels = _checked_labels(labels, num_classes)
        if batch_size < 1:
            raise ValueError(f"batch_size: want at least 1, got {batch_size}")
        if sampling not in POWER:
            raise ValueError(f"sampling: want one of {', '.join(POWER)}, got {sampling!r}")
        self._batch_size = batch_size
        self._num_classes = num_classes
        self._identity = f"union batches/{seed}/{sampling}"
        self._stream = ShuffledRows(np.arange(len(self._labels)), self._identity)
        self._chances: np.ndarray | None = None
        if sampling != "plain":
            self._chances = resampling_weights(self._labels, num_classes, power=POWER[sampling])

    @property
    def row_weights(self) -> np.ndarray:
        """Expected appearances of each row in a batch, float64 (N,)."""
        count = len(self._labels)
        chances = np.full(count, 1 / count) if self._chances is None else self._chances
        return self._batch_size * chances

    @property
    def counts(self) -> np.ndarray:
        """Expected rows of each class in a batch, float64 (C,)."""
        return np.bincount(self._labels, weights=self.row_weights, minlength=self._num_classes)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the batch of `step`, int64 (batch_size,)."""
        if self._chances is None:
            return self._stream.between(step * self._batch_size, (step + 1) * self._batch_size)
        rng = random_generator(self._identity, f"step {step}")
        return rng.choice(len(self._labels), self._batch_size, p=self._chances)


class ComposedBatches:
    """B real rows as they come and s_c synthetic rows of each class c (Chen et al. 2025, class-adaptive sampler).

    Real rows come in shuffled epochs; the synthetic rows of each class in their own.

    Args:
        labels: int (N,) of all rows.
        is_real: bool (N,).
        num_classes: C.
        real_per_batch: B ≥ 1.
        synthetic_per_class: s_c ≥ 0 of each class, (C,).
        seed: of the order.

    Raises:
        ValueError: no real row, or synthetic rows wanted of a class that has none.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        is_real: np.ndarray,
        num_classes: int,
        real_per_batch: int,
        synthetic_per_class: Sequence[int],
        seed: int,
    ) -> None:
        self._labels = _checked_labels(labels, num_classes)
        self._is_real = np.asarray(is_real, np.bool_)
        added = np.asarray(synthetic_per_class)
        if self._is_real.shape != self._labels.shape:
            raise ValueError(f"is_real: want {self._labels.shape}, got {self._is_real.shape}")
        if added.shape != (num_classes,) or added.dtype.kind not in "iu" or (added < 0).any():
            raise ValueError(
                f"synthetic_per_class: want {num_classes} numbers ≥ 0, got {synthetic_per_class}"
            )
        if real_per_batch < 1 or not self._is_real.any():
            raise ValueError(
                f"real_per_batch: want at least 1 of at least one real row, got {real_per_batch} "
                f"of {int(self._is_real.sum())}"
            )
        self._real_per_batch = real_per_batch
        self._added = added.astype(np.int64)
        identity = f"composed batches/{seed}"
        self._real = ShuffledRows(np.flatnonzero(self._is_real), f"{identity}/real")
        self._synthetic: dict[int, ShuffledRows] = {}
        for label in np.flatnonzero(added).tolist():
            rows = np.flatnonzero(~self._is_real & (self._labels == label))
            if not len(rows):
                raise ValueError(
                    f"synthetic_per_class: {added[label]} of class {label}, which has no synthetic row"
                )
            self._synthetic[label] = ShuffledRows(rows, f"{identity}/class {label}")

    @property
    def counts(self) -> np.ndarray:
        """Expected rows of each class in a batch, float64 (C,): B · n_c / N + s_c.

        Raises:
            ValueError: a class has neither real rows nor added ones.
        """
        real = np.bincount(self._labels[self._is_real], minlength=len(self._added))
        return composed_counts(real, real_per_batch=self._real_per_batch, synthetic_per_batch=self._added)

    @property
    def row_weights(self) -> np.ndarray:
        """Expected appearances of each row in a batch, float64 (N,)."""
        weights = np.where(self._is_real, self._real_per_batch / self._is_real.sum(), 0.0)
        for label in self._synthetic:
            rows = ~self._is_real & (self._labels == label)
            weights[rows] = self._added[label] / rows.sum()
        return weights

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the batch of `step`: real ones first, then the classes in order, int64 (B + Σ s_c,)."""
        parts = [self._real.between(step * self._real_per_batch, (step + 1) * self._real_per_batch)]
        for label, stream in self._synthetic.items():
            added = int(self._added[label])
            parts.append(stream.between(step * added, (step + 1) * added))
        return np.concatenate(parts)


def _checked_labels(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu" or not len(values):
        raise ValueError(f"labels: want int (N ≥ 1,), got {values.dtype} {values.shape}")
    if values.min() < 0 or values.max() >= num_classes:
        raise ValueError(f"labels: want 0 … {num_classes - 1}, got {values.min()} … {values.max()}")
    return values.astype(np.int64)
