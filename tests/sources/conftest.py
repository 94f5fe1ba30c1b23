"""Training rows for the sources: phantom, and real BUSI where it lies beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig, phantom_sample
from factory.imaging import TrainingRow, letterbox
from schemas.request import SynthesisPlan

CLASSES = ("benign", "malignant", "normal")


@pytest.fixture(scope="session")
def plan() -> SynthesisPlan:
    return SynthesisPlan(recipe="test", fingerprint="f", weights={}, real_digest="r", labels=CLASSES)


@pytest.fixture(scope="session")
def phantom_rows() -> list[TrainingRow]:
    """300 rows of 128 px with the true descriptors as attributes; normals have empty masks."""
    config = PhantomConfig(size=128, classes=(BENIGN, MALIGNANT, NORMAL))
    samples = [phantom_sample(config, 3, index) for index in range(300)]
    return [
        TrainingRow(
            image_id=f"{index:04d}",
            label=CLASSES.index(sample.label_name),
            label_name=sample.label_name,
            group_id=f"{index:04d}",
            image=sample.image,
            mask=sample.mask,
            attributes=dict(sample.attributes),
        )
        for index, sample in enumerate(samples)
    ]


@pytest.fixture(scope="session")
def busi_rows(busi_folder: Path) -> list[TrainingRow]:
    """All of BUSI, letterboxed to 256 px, masks of an image merged."""
    rows = []
    for label, name in enumerate(CLASSES):
        for path in sorted((busi_folder / name).glob("*).png")):
            parts = sorted((busi_folder / name).glob(f"{path.stem}_mask*.png"))
            mask = np.any([np.asarray(Image.open(part).convert("L")) > 127 for part in parts], axis=0)
            rows.append(
                TrainingRow(
                    image_id=path.stem,
                    label=label,
                    label_name=name,
                    group_id=path.stem,
                    image=letterbox(np.asarray(Image.open(path).convert("L")), 256),
                    mask=letterbox(mask.astype(np.uint8), 256, is_mask=True),
                    attributes={},
                )
            )
    return rows
