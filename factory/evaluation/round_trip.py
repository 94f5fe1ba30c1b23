"""Real images through a generator's autoencoder and back: what a latent generator loses at the least."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from factory.imaging import as_grey, letterbox
from factory.predictors.examples import Examples

if TYPE_CHECKING:
    from factory.generators.loaded import LoadedGenerator

BATCH_SIZE = 8


def through_autoencoder(generator: "LoadedGenerator", images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encoded to the mean of their latents and decoded, at the generator's resolution.

    Args:
        images: uint8 (H, W) or (H, W, 3) of any sizes; letterboxed to the resolution.

    Returns:
        uint8 (R, R) for grey images, the mean of the decoder's channels, and (R, R, 3) for RGB ones.
    """
    from factory.imaging import as_rgb

    out: list[np.ndarray] = []
    for start in range(0, len(images), BATCH_SIZE):
        part = images[start : start + BATCH_SIZE]
        batch = np.stack([as_rgb(letterbox(image, generator.resolution)) for image in part])
        decoded = generator.decode(generator.encode_images(batch)[0]).numpy()
        out += [as_grey(new) if old.ndim == 2 else new for old, new in zip(part, decoded, strict=True)]
    return out


def examples_through_autoencoder(generator: "LoadedGenerator", examples: Examples) -> Examples:
    """The rows with images that went through the autoencoder; ids, groups, labels and masks stay."""
    grey = examples.channels == 1
    passed = through_autoencoder(generator, [image[..., 0] if grey else image for image in examples.images])
    images = np.stack([letterbox(image, examples.size) for image in passed])
    return dataclasses.replace(examples, images=images.reshape(examples.images.shape))
