"""Grids of samples during training: the same held-out masks, prompts and noise every time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factory.diffusion.conditions import Conditions
from factory.diffusion.denoise import denoise, make_noise_scheduler
from factory.diffusion.sampling import Sampling
from factory.generators.loaded import LoadedGenerator
from factory.imaging import TrainingRow, as_rgb
from schemas.identity import torch_seed

_GAP = 2
_LESION_COLOURS = np.array([(0, 200, 120), (230, 160, 0), (60, 120, 255), (220, 60, 160)], np.uint8)


class PreviewGrid:
    """Draws one column per held-out row: the real image, its mask, and what the generator makes of the mask.

    Args:
        generator: the model being trained; its present weights are used at each call.
        rows: held-out rows.
        conditions: of these rows.
        null_prompt: float (1, L, D).
        sampling: how images are drawn.
    """

    def __init__(
        self,
        generator: LoadedGenerator,
        rows: Sequence[TrainingRow],
        conditions: Conditions,
        null_prompt: torch.Tensor,
        sampling: Sampling,
    ) -> None:
        self._generator, self._rows, self._sampling = generator, list(rows), sampling
        self._conditions = conditions
        self._null_conditions = generator.unconditional(conditions, null_prompt)

    def __call__(self, path: Path) -> None:
        """Write the grid as PNG."""
        made = self._draw()
        columns = []
        for row, image in zip(self._rows, made):
            mask = np.zeros(image.shape[:2], np.uint8) if row.mask is None else row.mask
            columns.append(np.concatenate([as_rgb(row.image), _coloured(mask), image]))
        gap = np.full((columns[0].shape[0], _GAP, 3), 255, np.uint8)
        strips = [piece for column in columns for piece in (column, gap)][:-1]
        Image.fromarray(np.concatenate(strips, axis=1)).save(path)

    def _draw(self) -> np.ndarray:
        """uint8 (n, R, R, 3)."""
        generator, sampling = self._generator, self._sampling
        noise_scheduler: Any = generator.noise_scheduler
        rngs = [torch.Generator().manual_seed(torch_seed(row.image_id, "preview")) for row in self._rows]
        latents = torch.stack([torch.randn(generator.latent_shape, generator=rng) for rng in rngs])
        denoised = denoise(
            generator.denoiser(),
            make_noise_scheduler(sampling, noise_scheduler.config),
            latents.to(generator.device),
            self._conditions,
            self._null_conditions,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_start=sampling.guidance_start,
            guidance_stop=sampling.guidance_stop,
            eta=sampling.eta,
            rngs=rngs,
        )
        return generator.decode(denoised).numpy()


def _coloured(mask: np.ndarray) -> np.ndarray:
    """uint8 (R, R, 3): background black, each class in its colour."""
    out = np.zeros((*mask.shape, 3), np.uint8)
    inside = mask > 0
    out[inside] = _LESION_COLOURS[(mask[inside].astype(int) - 1) % len(_LESION_COLOURS)]
    return out
