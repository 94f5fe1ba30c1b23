"""Generators of random weights for tests: the real classes, small."""

from pathlib import Path

import torch

from factory.assets.base_models import write_random_base
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.generators.loaded import LoadedGenerator

RESOLUTION = 64


def random_base(folder: Path, seed: int = 0) -> Path:
    return write_random_base(folder, "micro", seed=seed)


def mask_generator(
    base: Path, unet: str = "lora", *, controlnet: bool = True, rank: int = 4
) -> LatentDiffusion:
    trainable = Trainable(unet=unet, controlnet=controlnet, lora_rank=rank)  # type: ignore[arg-type]
    return LatentDiffusion(base=str(base), resolution=RESOLUTION, trainable=trainable)


def disturb(loaded: LoadedGenerator, seed: int = 0, size: float = 0.05) -> None:
    """As if trained: every trainable parameter moves away from its initial value."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.trainable_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=rng))


def inputs(loaded: LoadedGenerator, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Noisy latents, timesteps, prompt embeddings and mask planes."""
    rng = torch.Generator().manual_seed(seed)
    masks = torch.zeros(batch, loaded.resolution, loaded.resolution, dtype=torch.uint8)
    masks[:, 20:40, 10:50] = 1
    condition = loaded.condition(masks)
    assert condition is not None
    return (
        torch.randn((batch, *loaded.latent_shape), generator=rng),
        torch.randint(0, 1000, (batch,), generator=rng),
        loaded.encode_prompts(["benign tumor", "malignant tumor"][:batch]),
        condition,
    )
