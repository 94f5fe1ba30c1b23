"""How a predictor is trained."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from factory.predictors.augmentation import Augmentation
from factory.predictors.batches import POWER, Sampling
from factory.predictors.losses import CrossEntropy, DiceCrossEntropy, TaskLoss

Schedule = Literal["cosine", "constant"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """AdamW on augmented batches for a fixed number of steps, or until validation no longer improves.

    Attributes:
        num_steps: optimizer steps.
        batch_size, sampling: for whoever makes the batches (`UnionBatches`).
        learning_rate: the highest.
        weight_decay: of weights; biases and normalisation are left alone.
        warmup_steps: linear rise of the learning rate.
        schedule: "cosine" falls to 0 at the last step.
        loss: None for the task's own: CrossEntropy, or DiceCrossEntropy of masks.
        augmentation: of training images.
        validate_every: steps between reports; validation, divergence check and checkpoint happen there.
        patience: reports without improvement after which training stops; None never stops early.
        max_gradient_norm: the gradient of all parameters is clipped to it.
        precision: of the network's arithmetic; bfloat16 is meant for GPUs.
    """

    num_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 20
    schedule: Schedule = "cosine"
    loss: TaskLoss | DiceCrossEntropy | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    sampling: Sampling = "plain"
    validate_every: int = 50
    patience: int | None = None
    max_gradient_norm: float = 1.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"FitSettings.{name}: want at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"FitSettings.{name}: want a number > 0, got {value}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"FitSettings.weight_decay: want a number ≥ 0, got {self.weight_decay}")
        if self.warmup_steps < 0 or (self.patience is not None and self.patience < 1):
            raise ValueError(
                f"FitSettings: want warmup_steps ≥ 0 and patience ≥ 1, got {self.warmup_steps}, {self.patience}"
            )
        for name, choices in (
            ("schedule", get_args(Schedule)),
            ("sampling", POWER),
            ("precision", get_args(Precision)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"FitSettings.{name}: want one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )

    def loss_of(self, task: str) -> TaskLoss | DiceCrossEntropy:
        """The loss of a task.

        Raises:
            ValueError: the loss given is one of the other task.
        """
        if self.loss is None:
            return CrossEntropy() if task == "classification" else DiceCrossEntropy()
        if isinstance(self.loss, DiceCrossEntropy) != (task == "segmentation"):
            raise ValueError(f"FitSettings.loss: {type(self.loss).__name__} is no loss of {task}")
        return self.loss

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.learning_rate * rise
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
