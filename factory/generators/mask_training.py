"""How a mask model is trained: the part of its component that fixes its weights, and how fast they come."""

from dataclasses import dataclass

from schemas.identity import execution_field


@dataclass(frozen=True, kw_only=True)
class MaskModelTraining:
    """Optimisation of a mask model (Adam, constant learning rate after warm-up). Fields as in the generator's settings.

    Attributes:
        max_steps: updates in all; a finished run goes on where more are asked for.
        batch_size: masks per update.
        learning_rate: of the generator (mask GAN) or the denoiser (mask DDPM).
        warmup_steps: updates over which it rises linearly.
        adam_betas: of every optimizer.
        max_grad_norm: gradients are clipped to this L2 norm, each optimizer's apart.
        ema_decay: of the moving average that is saved; ramped up as (1 + n) / (10 + n).
        horizontal_flip: mirrors half of the masks, with their boxes.
        seed: every draw of the run comes from it.
        log_every, validate_every, sample_every, checkpoint_every: updates between each; 0 turns the middle two off.
        keep_checkpoints: how many of the latest checkpoints stay.
    """

    max_steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    adam_betas: tuple[float, float] = (0.5, 0.999)
    max_grad_norm: float = 10.0
    ema_decay: float = 0.999
    horizontal_flip: bool = True
    seed: int = 0
    log_every: int = execution_field(50)
    validate_every: int = execution_field(500)
    sample_every: int = execution_field(1000)
    checkpoint_every: int = execution_field(500)
    keep_checkpoints: int = execution_field(2)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.training.{name}: want 1 or more, got {getattr(self, name)}")
        for name in ("warmup_steps", "validate_every", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.training.{name}: want 0 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.training.{name}: want a positive number, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in (*self.adam_betas, self.ema_decay)):
            raise ValueError(
                f"model.training: want 0 <= adam_betas, ema_decay < 1, got {self.adam_betas}, {self.ema_decay}"
            )
