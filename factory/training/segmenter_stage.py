"""The segmenter stage: what `factory train --part segmenter` trains on real images, to judge synthetic ones. No torch."""

from dataclasses import dataclass, field, replace

from factory.predictors.segmenters import Segmenter
from factory.predictors.settings import FitSettings

FOLDS_FOLDER = "folds"
"""What an unfinished run keeps in its folder: checkpoints, and the predictions of finished folds."""


def _default_predictor() -> Segmenter:
    return Segmenter(architecture="attention_unet", width=16)


def _default_fit() -> FitSettings:
    return FitSettings(num_steps=600, batch_size=8, learning_rate=2e-3, validate_every=100)


@dataclass(frozen=True, kw_only=True)
class SegmenterStage:
    """A segmenter of real images, once per fold to measure it and once on all training rows to use it.

    Attributes:
        predictor: the network. Choose another architecture than the task model's (a plain U-Net by default): a gate of the
            same kind would keep what that model finds easy.
        fit: how it is trained.
        num_folds: groups of training rows are shared out over so many folds; each fold is segmented by a network that
            was trained on the others.
        size: side of the images, px; None is the generator's resolution.
        seed: of weights, row order and augmentation.
    """

    predictor: Segmenter = field(default_factory=_default_predictor)
    fit: FitSettings = field(default_factory=_default_fit)
    num_folds: int = 5
    size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_folds < 2:
            raise ValueError(f"segmenter_stage.num_folds: want at least 2, got {self.num_folds}")
        if self.size is not None and self.size < 16:
            raise ValueError(f"segmenter_stage.size: want at least 16 px, got {self.size}")

    def with_num_steps(self, num_steps: int | None) -> "SegmenterStage":
        """The stage with another number of updates of each fit; itself for None."""
        return self if num_steps is None else replace(self, fit=replace(self.fit, num_steps=num_steps))

    @property
    def total_steps(self) -> int:
        """Updates of all fits together, where none stops early."""
        return self.fit.num_steps * (self.num_folds + 1)
