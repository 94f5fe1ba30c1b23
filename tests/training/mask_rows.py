"""Small masks for the mask models: discs ("benign") and stars ("malignant"), and models of tiny width."""

from typing import Any

import numpy as np

from factory.generators.mask_diffusion import MaskDDPM
from factory.generators.mask_gan import MaskGAN
from factory.generators.mask_training import MaskModelTraining
from factory.imaging import TrainingRow
from factory.training.mask_batches import Lesions
from factory.training.settings import TrainingSettings

CLASSES = ("benign", "malignant")
SIDE = 32


def shape(rng: np.random.Generator, malignant: bool, side: int = SIDE) -> np.ndarray:
    """A disc or a five-pointed star, uint8 (side, side)."""
    y, x = rng.uniform(0.4, 0.6, 2) * side
    radius = rng.uniform(0.18, 0.28) * side
    ys, xs = np.mgrid[:side, :side]
    angle = np.arctan2(ys - y, xs - x) + rng.uniform(0, 2 * np.pi)
    return (np.hypot(ys - y, xs - x) < radius * (1 + 0.35 * malignant * np.cos(5 * angle))).astype(np.uint8)


def lesions(count: int = 24, seed: int = 0) -> Lesions:
    """Half discs, half stars."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return Lesions(
        masks=np.stack([shape(rng, bool(label)) for label in labels]),
        labels=labels.astype(np.int64),
        classes=CLASSES,
    )


def rows(count: int = 24, seed: int = 0, side: int = SIDE) -> list[TrainingRow]:
    """Training rows with such masks, and two rows of a class without lesions."""
    rng = np.random.default_rng(seed)
    labels = [*(np.arange(count) % 2).tolist(), 2, 2]
    return [
        TrainingRow(
            image_id=f"{number:032x}",
            label=label,
            label_name=(*CLASSES, "normal")[label],
            group_id=str(number),
            image=np.full((side, side), 90, np.uint8),
            mask=shape(rng, label == 1, side) if label < 2 else np.zeros((side, side), np.uint8),
            attributes={},
        )
        for number, label in enumerate(labels)
    ]


def tiny_gan(**changes: Any) -> MaskGAN:
    sizes: dict[str, Any] = {
        "resolution": SIDE, "noise_dim": 8, "channels": 16, "base_size": 4, "min_channels": 8,
        "spade_hidden": 8, "discriminator_channels": 8, "training": MaskModelTraining(max_steps=4, batch_size=8),
    }  # fmt: skip
    return MaskGAN(**{**sizes, **changes})


def tiny_ddpm(**changes: Any) -> MaskDDPM:
    sizes: dict[str, Any] = {
        "resolution": 16, "channels": (8, 16), "norm_groups": 4, "layers_per_block": 1, "num_inference_steps": 4,
        "training": MaskModelTraining(max_steps=4, batch_size=8),
    }  # fmt: skip
    return MaskDDPM(**{**sizes, **changes})


def settings(**changes: Any) -> TrainingSettings:
    values: dict[str, Any] = {
        "max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0, "adam_betas": (0.5, 0.999),
        "weight_decay": 0.0, "max_grad_norm": 10.0, "ema_decay": 0.9, "prompt_dropout": 0.0, "horizontal_flip": True,
        "checkpoint_every": 2, "log_every": 1, "validate_every": 3, "sample_every": 0, "mixed_precision": "no",
    }  # fmt: skip
    return TrainingSettings(**{**values, **changes})
