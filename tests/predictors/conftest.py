"""Phantom examples, and files of random weights, for the predictors' tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from factory.datasets.phantom import PhantomConfig, phantom_sample
from factory.imaging import Letterbox
from factory.predictors.examples import Examples, NativeTruth

torch.set_num_threads(1)
MakePhantoms = Callable[..., Examples]


@pytest.fixture(scope="session")
def phantoms() -> MakePhantoms:
    """make(count, size, first=0, channels=1, native=False) → phantoms first … first + count − 1."""

    def make(count: int, size: int, first: int = 0, channels: int = 1, native: bool = False) -> Examples:
        config = PhantomConfig(size=size)
        samples = [phantom_sample(config, 0, first + index) for index in range(count)]
        names = tuple(f"phantom {first + index}" for index in range(count))
        images = np.stack([sample.image for sample in samples])[..., None]
        box = Letterbox(height=size, width=size, size=size)
        return Examples(
            images=np.repeat(images, channels, axis=3),
            labels=np.array([config.class_names.index(sample.label_name) for sample in samples]),
            class_names=config.class_names,
            ids=names,
            groups=names,
            is_real=np.ones(count, np.bool_),
            masks=np.stack([sample.mask for sample in samples]),
            native=tuple(NativeTruth(letterbox=box, mask=s.mask) for s in samples) if native else None,
        )

    return make


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(timm name, **options) → a safetensors file of that network, random but for a fixed seed."""

    def make(name: str, seed: int = 0, **options: object) -> Path:
        import timm
        from safetensors.torch import save_file

        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        save_file(timm.create_model(name, pretrained=False, **options).state_dict(), path)
        return path

    return make
