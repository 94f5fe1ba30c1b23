"""Training rows as the learner sees them: latents, prompts and masks in memory, noised by (seed, step, position).

Every draw (timestep, noise, posterior noise, dropped prompt, flip) belongs to one place of one global batch and
has its own random generator, so how a batch is split over workers and micro-batches changes nothing.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        masked, flipped_masked: means of the images without what lies under their mask, for inpainting, or None.
    """

    mean: np.ndarray
    logvar: np.ndarray
    flipped_mean: np.ndarray | None = None
    flipped_logvar: np.ndarray | None = None
    masked: np.ndarray | None = None
    flipped_masked: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class DiffusionBatch:
    """Drawn inputs of b images; all tensors share the first axis.

    Attributes:
        latents: x_0, float32 (b, C, h, w).
        noise: ε, float32 (b, C, h, w).
        timesteps: int64 (b,).
        prompts: rows of the prompt table, int64 (b,).
        labels: class numbers, int64 (b,), −1 where the class was dropped with the prompt.
        masks: label maps, uint8 (b, R, R), or None.
        masked_latents: of the images without what lies under their mask, float32 (b, C, h, w), or None.
        extras: further maps at image resolution by name, uint8 (b, R, R).
        step: the optimizer update they are for.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: Tensor
    labels: Tensor
    masks: Tensor | None = None
    masked_latents: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    step: int

    def to(self, device: str) -> "DiffusionBatch":
        """The batch on a device; copies overlap with computation on CUDA."""
        if torch.device(device).type != "cuda":
            return self
        return self._map(lambda value: value.pin_memory().to(device, non_blocking=True))

    def split(self, parts: int) -> list["DiffusionBatch"]:
        """Consecutive equal micro-batches."""
        size = len(self.latents) // parts
        if size * parts != len(self.latents):
            raise ValueError(f"parts: {len(self.latents)} images cannot be split into {parts} equal parts")
        return [self.slice(i * size, (i + 1) * size) for i in range(parts)]

    def slice(self, start: int, stop: int) -> "DiffusionBatch":
        """Images start … stop - 1."""
        return self._map(lambda value: value[start:stop])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "DiffusionBatch":
        names = ("latents", "noise", "timesteps", "prompts", "labels", "masks", "masked_latents")
        changed: dict[str, Any] = {
            name: change(getattr(self, name)) for name in names if getattr(self, name) is not None
        }
        extras = {name: change(value) for name, value in self.extras.items()}
        return replace(self, **changed, extras=extras)


class Examples:
    """N encoded rows, from which batches are drawn.

    Args:
        latents: their posteriors.
        prompts: row of the prompt table of each example, int64 (N,); row 0 is the null prompt.
        masks: label maps uint8 (R, R), one per row (kept compressed), or None where no mask is needed.
        labels: class numbers, int64 (N,); all 0 without.
        extras: further maps uint8 (R, R) by name, such as sketches, one per row.
        num_timesteps: T of the noise scheduler.
        seed: of every draw.
        prompt_dropout: share of images that get the null prompt and no class.
        horizontal_flip: mirror half of the images; needs the flipped latents.
    """

    def __init__(
        self,
        *,
        latents: Latents,
        prompts: np.ndarray,
        masks: Sequence[np.ndarray] | None,
        num_timesteps: int,
        labels: np.ndarray | None = None,
        extras: Mapping[str, Sequence[np.ndarray]] | None = None,
        seed: int = 0,
        prompt_dropout: float = 0.0,
        horizontal_flip: bool = False,
    ) -> None:
        count = len(latents.mean)
        maps = dict(extras or {}) | ({} if masks is None else {"masks": masks})
        lengths = {"prompts": len(prompts)} | {name: len(values) for name, values in maps.items()}
        if labels is not None:
            lengths["labels"] = len(labels)
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"examples: {count} latents, {length} {name}")
        if horizontal_flip and latents.flipped_mean is None:
            raise ValueError("horizontal_flip: the latents of the mirrored images are missing")
        self.latents = latents
        self.prompts = np.asarray(prompts, np.int64)
        self.labels = np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64)
        self.num_timesteps = num_timesteps
        self.seed = seed
        self.prompt_dropout = prompt_dropout
        self.horizontal_flip = horizontal_flip
        self._maps = {name: _CompressedMaps(values) for name, values in maps.items()}

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
        labels = torch.from_numpy(self.labels[rows])
        masked = None if self.latents.masked is None else torch.empty((len(rows), *shape))
        maps = {name: values.empty(len(rows)) for name, values in self._maps.items()}
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
                prompts[i], labels[i] = 0, -1
            if masked is not None:
                masked[i] = self._masked(int(row), flipped)
            for name, values in self._maps.items():
                values.read(int(row), flipped, maps[name][i])
        tensors = {name: torch.from_numpy(values) for name, values in maps.items()}
        return DiffusionBatch(
            latents=latents,
            noise=noise,
            timesteps=chosen_timesteps,
            prompts=prompts,
            labels=labels,
            masks=tensors.pop("masks", None),
            masked_latents=masked,
            extras=tensors,
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

    def _masked(self, row: int, flipped: bool) -> Tensor:
        source = self.latents.flipped_masked if flipped else self.latents.masked
        assert source is not None
        return torch.from_numpy(source[row]).float()


class _CompressedMaps:
    """N maps uint8 (R, R), a kilobyte each."""

    def __init__(self, maps: Sequence[np.ndarray]) -> None:
        self._side = maps[0].shape[0] if maps else 0
        self._packed = [zlib.compress(np.ascontiguousarray(values).tobytes(), 1) for values in maps]

    def empty(self, count: int) -> np.ndarray:
        return np.empty((count, self._side, self._side), np.uint8)

    def read(self, row: int, flipped: bool, out: np.ndarray) -> None:
        values = np.frombuffer(zlib.decompress(self._packed[row]), np.uint8).reshape(out.shape)
        out[...] = values[:, ::-1] if flipped else values
