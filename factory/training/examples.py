"""Training rows as the learner sees them: latents, prompts and masks in memory, noised by (seed, step, position).

Every draw (timestep, noise, posterior noise, dropped prompt, flip) belongs to one place of one global batch and
has its own random generator, so how a batch is split over workers and micro-batches changes nothing.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factory.training.mixture import Shard
from schemas.identity import torch_seed


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Posteriors of the VAE for N rows, scaled as the denoiser sees them.

    Attributes:
        mean, logvar: float16 (N, C, h, w).
        flipped_mean, flipped_logvar: of the mirrored images, or None. A mirrored latent is not the latent of the
            mirrored image, so these are encoded, not flipped.
    """

    mean: np.ndarray
    logvar: np.ndarray
    flipped_mean: np.ndarray | None = None
    flipped_logvar: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class DiffusionBatch:
    """Drawn inputs of b images; all tensors share the first axis.

    Attributes:
        latents: x_0, float32 (b, C, h, w).
        noise: ε, float32 (b, C, h, w).
        timesteps: int64 (b,).
        prompts: rows of the prompt table, int64 (b,).
        masks: label maps, uint8 (b, R, R), or None.
        step: the optimizer update they are for.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: Tensor
    masks: Tensor | None
    step: int

    def to(self, device: str) -> "DiffusionBatch":
        """The batch on a device; copies overlap with computation on CUDA."""
        if torch.device(device).type != "cuda":
            return self
        pinned = {name: value.pin_memory() for name, value in self._tensors().items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in pinned.items()})

    def split(self, parts: int) -> list["DiffusionBatch"]:
        """Consecutive equal micro-batches."""
        size = len(self.latents) // parts
        if size * parts != len(self.latents):
            raise ValueError(f"parts: {len(self.latents)} images cannot be split into {parts} equal parts")
        return [self.slice(i * size, (i + 1) * size) for i in range(parts)]

    def slice(self, start: int, stop: int) -> "DiffusionBatch":
        """Images start … stop - 1."""
        return replace(self, **{name: value[start:stop] for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        names = ("latents", "noise", "timesteps", "prompts", "masks")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class Examples:
    """N encoded rows, from which batches are drawn.

    Args:
        latents: their posteriors.
        prompts: row of the prompt table of each example, int64 (N,); row 0 is the null prompt.
        masks: label maps uint8 (R, R), one per row (kept compressed), or None where no mask goes in.
        num_timesteps: T of the noise scheduler.
        seed: of every draw.
        prompt_dropout: share of images that get the null prompt.
        horizontal_flip: mirror half of the images; needs the flipped latents.
    """

    def __init__(
        self,
        *,
        latents: Latents,
        prompts: np.ndarray,
        masks: Sequence[np.ndarray] | None,
        num_timesteps: int,
        seed: int = 0,
        prompt_dropout: float = 0.0,
        horizontal_flip: bool = False,
    ) -> None:
        count = len(latents.mean)
        if len(prompts) != count or (masks is not None and len(masks) != count):
            raise ValueError(f"examples: {count} latents, {len(prompts)} prompts, {len(masks or ())} masks")
        if horizontal_flip and latents.flipped_mean is None:
            raise ValueError("horizontal_flip: the latents of the mirrored images are missing")
        self.latents = latents
        self.prompts = np.asarray(prompts, np.int64)
        self.num_timesteps = num_timesteps
        self.seed = seed
        self.prompt_dropout = prompt_dropout
        self.horizontal_flip = horizontal_flip
        self._side = 0 if not masks else masks[0].shape[0]
        self._masks = None if masks is None else [zlib.compress(mask.tobytes(), 1) for mask in masks]

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, shard: Shard) -> DiffusionBatch:
        """Inputs of the shard's images: a pure function of (seed, step, positions)."""
        seeds = [f"training/{self.seed}/{shard.step}/{position}" for position in shard.positions]
        return self._draw(shard.step, shard.rows, seeds, None)

    def fixed(self, rows: np.ndarray, names: Sequence[str]) -> DiffusionBatch:
        """Inputs for validation: noise by `names` (image ids), timesteps spread evenly, nothing dropped or flipped."""
        count = len(rows)
        timesteps = ((np.arange(count) + 0.5) / count * self.num_timesteps).astype(np.int64)
        return self._draw(-1, rows, [f"validation/{name}" for name in names], timesteps)

    def _draw(
        self, step: int, rows: np.ndarray, seeds: Sequence[str], timesteps: np.ndarray | None
    ) -> DiffusionBatch:
        shape = self.latents.mean.shape[1:]
        latents = torch.empty((len(rows), *shape))
        noise = torch.empty((len(rows), *shape))
        chosen_timesteps = torch.empty(len(rows), dtype=torch.int64)
        prompts = torch.from_numpy(self.prompts[rows])
        masks = None if self._masks is None else np.empty((len(rows), self._side, self._side), np.uint8)
        for i, (row, seed) in enumerate(zip(rows, seeds)):
            rng = torch.Generator().manual_seed(torch_seed(seed, "draws"))
            timestep, drop, flip = torch.rand(3, generator=rng, dtype=torch.float64).tolist()
            posterior_noise = torch.randn(shape, generator=rng)
            noise[i] = torch.randn(shape, generator=rng)
            training = timesteps is None
            flipped = training and self.horizontal_flip and flip < 0.5
            mean, logvar = self._posterior(int(row), flipped)
            latents[i] = mean + torch.exp(0.5 * logvar) * posterior_noise
            chosen_timesteps[i] = (
                int(timestep * self.num_timesteps) if timesteps is None else int(timesteps[i])
            )
            if training and drop < self.prompt_dropout:
                prompts[i] = 0
            if masks is not None:
                mask = self._mask(int(row))
                masks[i] = mask[:, ::-1] if flipped else mask
        return DiffusionBatch(
            latents=latents,
            noise=noise,
            timesteps=chosen_timesteps,
            prompts=prompts,
            masks=None if masks is None else torch.from_numpy(masks),
            step=step,
        )

    def _posterior(self, row: int, flipped: bool) -> tuple[Tensor, Tensor]:
        source = self.latents
        if flipped:
            assert source.flipped_mean is not None and source.flipped_logvar is not None
            mean, logvar = source.flipped_mean[row], source.flipped_logvar[row]
        else:
            mean, logvar = source.mean[row], source.logvar[row]
        return torch.from_numpy(mean).float(), torch.from_numpy(logvar).float()

    def _mask(self, row: int) -> np.ndarray:
        assert self._masks is not None
        return np.frombuffer(zlib.decompress(self._masks[row]), np.uint8).reshape(self._side, self._side)
