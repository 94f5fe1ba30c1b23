"""Classification losses for a long tail, the weights of class-balanced re-sampling, and a loss of masks.

Each classification loss is a frozen component: `loss(logits, labels, counts)` gives one value per image, and the trainer takes the
plain mean over the batch, so that the size of a step does not depend on the batch size. `counts` are the rows of each
class that the model effectively sees. Where synthetic rows join the batch that is `composed_counts`, not the counts of
the real table: otherwise the tail is corrected twice, once by the added rows and once by the prior.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Counts = Sequence[float] | np.ndarray
"""Rows of each class, (C,), at least one class, all positive; fractions are allowed (expected counts)."""


def checked_counts(counts: Counts) -> np.ndarray:
    """The counts as float64 (C,).

    Raises:
        ValueError: a class without rows, since its prior is zero and its logit would be minus infinity.
    """
    values = np.asarray(counts, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"counts: want finite numbers (C,), got {counts}")
    if (values <= 0).any():
        empty = int(np.flatnonzero(values <= 0)[0])
        raise ValueError(
            f"counts: class {empty} has {values[empty]:g} rows; leave the class out or add rows to it"
        )
    return values


def _cross_entropy(logits: "Tensor", labels: "Tensor") -> "Tensor":
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), labels, reduction="none")


def _row(values: np.ndarray, logits: "Tensor") -> "Tensor":
    import torch

    if logits.ndim != 2 or logits.shape[1] != len(values):
        raise ValueError(f"logits: want (B, {len(values)}) as there are counts, got {tuple(logits.shape)}")
    return torch.as_tensor(values, dtype=torch.float32, device=logits.device)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """−log softmax(logits)[label]; takes no notice of the counts."""

    def loss(self, logits: "Tensor", labels: "Tensor", counts: Counts) -> "Tensor":
        """Loss of each image, float32 (B,), from logits (B, C) and int64 labels (B,)."""
        _row(checked_counts(counts), logits)
        return _cross_entropy(logits, labels)


@dataclass(frozen=True, kw_only=True)
class BalancedSoftmax:
    """Cross-entropy of logits + log n_c (Ren et al. 2020, Eq. 3): a classifier for a uniform prior.

    Equals cross-entropy where all counts are equal. Scores are the plain logits at test time.
    """

    def loss(self, logits: "Tensor", labels: "Tensor", counts: Counts) -> "Tensor":
        """Loss of each image, float32 (B,); `counts` of the composed batch (`composed_counts`)."""
        return _cross_entropy(logits.float() + _row(np.log(checked_counts(counts)), logits), labels)


@dataclass(frozen=True, kw_only=True)
class LogitAdjustment:
    """Cross-entropy of logits + τ log π_c, π_c the class's share (Menon et al. 2021, Eq. 10).

    At τ = 1 the same as `BalancedSoftmax`, since a constant added to all logits changes nothing.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.tau) and self.tau >= 0):
            raise ValueError(f"LogitAdjustment.tau: want a number ≥ 0, got {self.tau}")

    def loss(self, logits: "Tensor", labels: "Tensor", counts: Counts) -> "Tensor":
        """Loss of each image, float32 (B,)."""
        shares = checked_counts(counts)
        prior = self.tau * np.log(shares / shares.sum())
        return _cross_entropy(logits.float() + _row(prior, logits), labels)


@dataclass(frozen=True, kw_only=True)
class ClassBalancedFocal:
    """Focal loss weighted by the inverse effective number of rows (Cui et al. 2019, Eq. 10 and 12).

    The focal part is the paper's: independent sigmoids, Σ_c −(1 − p_c)^γ log p_c with p_c the probability given to
    what is true of class c. The weight is that of the image's label.

    Attributes:
        beta: of the effective number (1 − βⁿ) / (1 − β): 0 weights no class, towards 1 by inverse frequency.
        gamma: of focusing; 0 is sigmoid cross-entropy.
    """

    beta: float = 0.999
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"ClassBalancedFocal.beta: want 0 ≤ β < 1, got {self.beta}")
        if not (np.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"ClassBalancedFocal.gamma: want a number ≥ 0, got {self.gamma}")

    def loss(self, logits: "Tensor", labels: "Tensor", counts: Counts) -> "Tensor":
        """Loss of each image, float32 (B,)."""
        from torch.nn.functional import logsigmoid, one_hot

        weights = _row(class_balanced_weights(counts, beta=self.beta), logits)
        signs = 2.0 * one_hot(labels, logits.shape[1]) - 1.0
        margins = signs * logits.float()
        # log(1 − p) is logsigmoid(−margin): no p near 1 is ever subtracted from 1.
        focal = -(self.gamma * logsigmoid(-margins)).exp() * logsigmoid(margins)
        return weights[labels] * focal.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class DiceCrossEntropy:
    """Soft Dice loss plus binary cross-entropy of a lesion mask, per image (the loss of nnU-Net: Isensee et al. 2021).

    Dice is (2 Σ p·g + 1) / (Σ p + Σ g + 1) of each image, so that an image without lesion has a loss as well.

    Attributes:
        dice_weight, cross_entropy_weight: of the two terms; not both 0.
    """

    dice_weight: float = 1.0
    cross_entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.dice_weight, self.cross_entropy_weight)
        if not all(np.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
            raise ValueError(f"DiceCrossEntropy: want two weights ≥ 0, not both 0; got {weights}")

    def loss(self, logits: "Tensor", masks: "Tensor") -> "Tensor":
        """Loss of each image, float32 (B,), from logits (B, 1, S, S) and masks (B, S, S) of 0 and 1."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        if logits.ndim != 4 or logits.shape[1] != 1 or logits[:, 0].shape != masks.shape:
            raise ValueError(
                f"logits: want (B, 1, S, S) for masks {tuple(masks.shape)}, got {tuple(logits.shape)}"
            )
        scores, truth = logits[:, 0].float(), masks.float()
        entropy = binary_cross_entropy_with_logits(scores, truth, reduction="none").mean(dim=(1, 2))
        probability = scores.sigmoid()
        overlap = 2 * (probability * truth).sum(dim=(1, 2)) + 1
        dice = overlap / (probability.sum(dim=(1, 2)) + truth.sum(dim=(1, 2)) + 1)
        return self.dice_weight * (1 - dice) + self.cross_entropy_weight * entropy


TaskLoss = CrossEntropy | BalancedSoftmax | LogitAdjustment | ClassBalancedFocal
TASK_LOSSES = (CrossEntropy, BalancedSoftmax, LogitAdjustment, ClassBalancedFocal)


def class_balanced_weights(counts: Counts, *, beta: float) -> np.ndarray:
    """(1 − β) / (1 − βⁿ) of each class, scaled to a mean of 1 (Cui et al. 2019), float64 (C,)."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta: want 0 ≤ β < 1, got {beta}")
    numbers = checked_counts(counts)
    # −expm1(n log β) is 1 − βⁿ without the loss of digits at β near 1.
    weights = np.ones(len(numbers)) if beta == 0 else (1 - beta) / -np.expm1(numbers * np.log(beta))
    return weights * len(weights) / weights.sum()


def composed_counts(
    real_counts: Counts, *, real_per_batch: int, synthetic_per_batch: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Expected rows of each class in a batch of real rows drawn as they come and added synthetic ones, (C,).

    real_per_batch · n_c / N + s_c: the prior that `BalancedSoftmax` needs (its scale does not matter).

    Args:
        real_counts: (C,) rows of the real training table, or their sum of sampling weights where it is re-sampled.
        real_per_batch: real rows in a batch.
        synthetic_per_batch: (C,) synthetic rows of each class in a batch.

    Raises:
        ValueError: negative or differing numbers of classes, or a class with neither real nor synthetic rows.
    """
    real, added = np.asarray(real_counts, np.float64), np.asarray(synthetic_per_batch, np.float64)
    if real.ndim != 1 or real.shape != added.shape or (real < 0).any() or (added < 0).any():
        raise ValueError(
            f"real_counts, synthetic_per_batch: want two (C,) of numbers ≥ 0, got {real} and {added}"
        )
    if real_per_batch < 0 or (real_per_batch > 0 and real.sum() == 0):
        raise ValueError(f"real_per_batch: {real_per_batch} rows of a table with {real.sum():g}")
    share = real / real.sum() if real_per_batch else np.zeros_like(real)
    return checked_counts(real_per_batch * share + added)


def resampling_weights(
    labels: Sequence[int] | np.ndarray, num_classes: int, *, power: float = 1.0
) -> np.ndarray:
    """Probability of drawing each row, float64 (N,), summing to 1: a class as a whole is drawn ∝ n_c^(1 − power).

    Args:
        power: 1 is class-balanced, ½ square-root, 0 plain sampling (Kang et al. 2020, §4.1).

    Raises:
        ValueError: a label outside 0 … num_classes − 1, or a class without rows.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu" or not len(values):
        raise ValueError(f"labels: want int (N ≥ 1,), got {values.dtype} {values.shape}")
    if values.min() < 0 or values.max() >= num_classes:
        raise ValueError(f"labels: want 0 … {num_classes - 1}, got {values.min()} … {values.max()}")
    weights = checked_counts(np.bincount(values, minlength=num_classes))[values] ** -power
    return weights / weights.sum()
