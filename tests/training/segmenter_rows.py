"""Ellipses in speckle and phantoms as rows for a segmenter, and settings with which one learns them in seconds."""

import numpy as np

from factory import geometry
from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig, phantom_sample
from factory.imaging import TrainingRow
from factory.predictors.augmentation import Augmentation
from factory.predictors.segmenters import Segmenter
from factory.predictors.settings import FitSettings
from factory.training.segmenter_stage import SegmenterStage

SIZE = 32
CLASSES = ("benign", "malignant", "normal")


def small_stage(num_steps: int = 40, num_folds: int = 2) -> SegmenterStage:
    """A U-Net of some ten thousand parameters."""
    return SegmenterStage(
        predictor=Segmenter(architecture="unet", width=4),
        fit=FitSettings(
            num_steps=num_steps,
            batch_size=8,
            learning_rate=1e-2,
            warmup_steps=2,
            validate_every=max(1, num_steps // 2),
            augmentation=Augmentation(kind="none"),
        ),
        num_folds=num_folds,
    )


def ellipse(rng: np.random.Generator, label: int) -> np.ndarray:
    """A lesion mask, uint8 (SIZE, SIZE); empty for the last class."""
    if CLASSES[label] == "normal":
        return np.zeros((SIZE, SIZE), np.uint8)
    a, b = rng.uniform(4, 9, 2) + 2 * label
    x, y = rng.uniform(8, SIZE - 8, 2)
    return geometry.ellipse((SIZE, SIZE), x=x, y=y, a=a, b=b)


def ellipse_rows(seed: int, num: int) -> list[TrainingRow]:
    """`num` dark ellipses in bright speckle, two of each patient; every sixth shows none."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num):
        label = 2 if index % 6 == 5 else index % 2
        mask = ellipse(rng, label)
        pixels = np.where(mask, 55, 150) * rng.uniform(0.6, 1.3, mask.shape)
        rows.append(_row(seed, index, label, pixels.clip(0, 255).astype(np.uint8), mask))
    return rows


def phantom_rows(seed: int, num: int, size: int) -> list[TrainingRow]:
    """`num` phantoms, two of each patient."""
    config = PhantomConfig(size=size, classes=(BENIGN, MALIGNANT, NORMAL))
    samples = [phantom_sample(config, seed, index) for index in range(num)]
    return [
        _row(seed, index, CLASSES.index(sample.label_name), sample.image, sample.mask)
        for index, sample in enumerate(samples)
    ]


def _row(seed: int, index: int, label: int, image: np.ndarray, mask: np.ndarray) -> TrainingRow:
    return TrainingRow(
        image_id=f"{seed}-{index:04d}",
        label=label,
        label_name=CLASSES[label],
        group_id=f"patient-{seed}-{index // 2}",
        image=image,
        mask=mask,
        attributes={},
    )
