"""How a generator is trained: the part of a recipe that fixes the trained weights, and how fast they come."""

from dataclasses import dataclass
from typing import Literal

from schemas.identity import execution_field


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimisation settings. Identity fields change the weights; execution fields only speed and reporting.

    Paper 001 (Pan et al. 2025): AdamW, learning rate 1e-4 constant after 500 warm-up updates, effective batch
    64 by accumulation. 36% of its updates are warm-up; shorter runs set `warmup_steps` lower.

    Attributes:
        max_steps: optimizer updates in all. Extending a finished run continues it: the learning rate does not
            depend on `max_steps`.
        batch_size: images per update over all workers and accumulation steps together.
        learning_rate: after warm-up.
        warmup_steps: updates over which the learning rate rises linearly from learning_rate / warmup_steps.
        weight_decay: AdamW, decoupled.
        adam_betas: AdamW.
        max_grad_norm: the gradient of all trainable parameters together is clipped to this L2 norm.
        ema_decay: decay of the moving average of the trainable parameters, ramped up as (1 + n) / (10 + n) so
            that short runs are not held at their start; 0 keeps the last weights.
        prompt_dropout: share of images trained with the null prompt, for classifier-free guidance.
        min_snr_gamma: weights each image by its timestep as Hang et al. 2023; None weights all alike.
        horizontal_flip: mirrors half of the images, with their masks.
        max_rows: trains on this many rows, the classes in turn; None on all.
        seed: every draw of the run comes from it.
        gradient_accumulation_steps: micro-batches per worker and update.
        mixed_precision: "auto" is bf16 on a CUDA device that supports it, else "no" (fp32).
        channels_last: memory layout of convolution weights; None is True on CUDA.
        compile: torch.compile the denoiser.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        log_every, validate_every, sample_every, checkpoint_every: updates between each; 0 turns the middle
            two off. A checkpoint is also written at the last step.
        keep_checkpoints: how many of the latest checkpoints stay.
    """

    max_steps: int
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_steps: int = 500
    weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1
    min_snr_gamma: float | None = None
    horizontal_flip: bool = False
    max_rows: int | None = None
    seed: int = 0
    gradient_accumulation_steps: int = execution_field(1)
    mixed_precision: Literal["auto", "no", "bf16"] = execution_field("auto")
    channels_last: bool | None = execution_field(None)
    compile: bool = execution_field(False)
    gradient_checkpointing: bool = execution_field(False)
    log_every: int = execution_field(10)
    validate_every: int = execution_field(200)
    sample_every: int = execution_field(500)
    checkpoint_every: int = execution_field(200)
    keep_checkpoints: int = execution_field(2)

    def __post_init__(self) -> None:
        at_least_one = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every",
                        "checkpoint_every", "keep_checkpoints")  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: want 1 or more, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "validate_every", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}: want 0 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training.{name}: want a positive number, got {getattr(self, name)}")
        for name in ("ema_decay", "prompt_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name}: want 0 <= {name} < 1, got {getattr(self, name)}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"training.max_rows: want 1 or more, or None, got {self.max_rows}")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(
                f"training.min_snr_gamma: want a positive number or None, got {self.min_snr_gamma}"
            )
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise ValueError(f"training.mixed_precision: want auto, no or bf16, got {self.mixed_precision!r}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"training.batch_size: {self.batch_size} is not divisible by "
                f"gradient_accumulation_steps = {self.gradient_accumulation_steps}"
            )

    def check_world_size(self, num_workers: int) -> None:
        """Every worker and micro-batch must get the same number of images.

        Raises:
            ValueError: the global batch does not divide by num_workers × gradient_accumulation_steps.
        """
        parts = max(num_workers, 1) * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise ValueError(
                f"training.batch_size: {self.batch_size} is not divisible by {num_workers} workers × "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps = {parts}; choose "
                f"{(self.batch_size // parts + 1) * parts} or other numbers"
            )

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of update `step` (0, 1, …): linear warm-up, then constant (paper 001)."""
        if step >= self.warmup_steps:
            return self.learning_rate
        return self.learning_rate * (step + 1) / self.warmup_steps
