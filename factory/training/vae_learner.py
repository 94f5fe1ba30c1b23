"""Fine-tunes an AutoencoderKL on images; keeps the protocol of `loop.Learner`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from factory.generators.checkpoints import weight_variant
from factory.imaging import TrainingRow, as_rgb
from factory.training.averaged_learner import AveragedLearner
from factory.training.learners import uses_bf16
from factory.training.mixture import Shard
from factory.training.settings import TrainingSettings
from factory.training.world import World
from schemas.identity import torch_seed


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBatch:
    """Drawn inputs of b images.

    Attributes:
        step: the update they are for.
        images: float (b, 3, R, R), -1 … 1; a grey image replicated.
        noise: of the posterior, float (b, C, h, w).
    """

    step: int
    images: Tensor
    noise: Tensor

    def slice(self, start: int, stop: int, device: str) -> "ImageBatch":
        """Images start … stop - 1, on a device."""
        images, noise = (x[start:stop].to(device) for x in (self.images, self.noise))
        return ImageBatch(step=self.step, images=images, noise=noise)


class Autoencoder(nn.Module):
    """One pass through encoder, posterior and decoder: what is wrapped where several processes train."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (b, 3, R, R) and posterior noise → reconstructions, mean and log-variance of the latents."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


def vae_terms(images: Tensor, made: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error over pixels, and KL from the unit Gaussian in nats, of each image: float (b,) each.

    Pan et al. 2025, Medical Image Analysis, Eq. 4 (a mean instead of a sum over pixels) and Eq. 5.
    """
    error = (made.float() - images).square().mean(dim=(1, 2, 3))
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(dim=(1, 2, 3))
    return error, kl


class VAELearner(AveragedLearner):
    """Trains all weights of an autoencoder.

    Args:
        vae: fp32; its config is kept.
        rows: training images at one resolution.
        kl_weight: of the KL.
        settings: optimisation.
        world: the processes that train together.
        held_out: validation images.
    """

    def __init__(
        self,
        *,
        vae: AutoencoderKL,
        rows: Sequence[TrainingRow],
        kl_weight: float,
        settings: TrainingSettings,
        world: World,
        held_out: Sequence[TrainingRow] = (),
    ) -> None:
        self.world, self.kl_weight = world, kl_weight
        self._images = [row.image for row in rows]
        nn.Module.to(vae, world.device)
        self.vae = vae.requires_grad_(True)
        if settings.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side = self._images[0].shape[0] // factor
        self._latent_shape = (int(vae.config.latent_channels), side, side)
        self._autocast = uses_bf16(settings, world.device)
        self._held_out = [row.image for row in held_out]
        parameters = dict(vae.named_parameters())
        optimizer = torch.optim.AdamW(
            list(parameters.values()),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
        )
        super().__init__(
            network=vae, parameters=parameters, optimizers={"main": optimizer}, settings=settings
        )
        self._plain = Autoencoder(vae)
        self._model = world.prepare(self._plain)

    def draw(self, shard: Shard) -> ImageBatch:
        """Inputs on the CPU; a pure function of (seed, step, positions), safe to call in a thread."""
        images, noise = [], []
        for row, position in zip(shard.rows, shard.positions):
            seed = torch_seed(f"training/{self.settings.seed}/{shard.step}/{position}", "draws")
            rng = torch.Generator().manual_seed(seed)
            mirrored = self.settings.horizontal_flip and torch.rand((), generator=rng).item() < 0.5
            image = as_rgb(self._images[row])
            images.append(image[:, ::-1] if mirrored else image)
            noise.append(torch.randn(self._latent_shape, generator=rng))
        return ImageBatch(step=shard.step, images=to_tensor(images), noise=torch.stack(noise))

    def step(self, batch: ImageBatch) -> dict[str, Tensor]:
        """One update from this process's share of a batch. Returns scalars on the device."""
        self.vae.train()
        self.set_learning_rate(batch.step)
        count = self.settings.gradient_accumulation_steps
        size = len(batch.images) // count
        parts = [
            batch.slice(number * size, (number + 1) * size, self.world.device) for number in range(count)
        ]
        return self.descend(self._model, parts, lambda part: self._losses(self._model, part))

    def _losses(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """Means over the batch."""
        with torch.autocast(torch.device(self.world.device).type, torch.bfloat16, enabled=self._autocast):
            made, mean, logvar = model(batch.images, batch.noise)
        error, kl = (term.mean() for term in vae_terms(batch.images, made, mean, logvar))
        return {"loss": error + self.kl_weight * kl, "loss_reconstruction": error, "kl": kl}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out images with the averaged weights, latents at the posterior's mean.

        "val_loss" is the reconstruction error, "val_latent_std" the standard deviation of the scaled latents.
        """
        if not self._held_out:
            return {}
        error, latents = [], []
        scale = float(self.vae.config.scaling_factor)
        with self.averaged():
            for start in range(0, len(self._held_out), self.settings.batch_size):
                images = to_tensor(self._held_out[start : start + self.settings.batch_size])
                images = images.to(self.world.device)
                made, mean, logvar = self._plain(images, torch.zeros((), device=images.device))
                error.append(vae_terms(images, made, mean, logvar)[0])
                latents.append(mean * scale)
        return {"val_loss": torch.cat(error).mean().item(), "val_latent_std": torch.cat(latents).std().item()}

    @torch.no_grad()
    def previews(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `count` held-out images and their reconstructions, uint8 (n, R, R, 3) each."""
        images = to_tensor(self._held_out[:count])
        made, _, _ = self._plain(images.to(self.world.device), torch.zeros((), device=self.world.device))
        pair = ((x.float().cpu().clamp(-1, 1) + 1) * 127.5 for x in (images, made))
        real, drawn = (x.round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for x in pair)
        return real, drawn


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 images, grey or RGB → float (b, 3, R, R), -1 … 1."""
    pixels = torch.from_numpy(np.stack([as_rgb(image) for image in images])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a diffusers folder, fp32, safetensors only.

    Raises:
        FileNotFoundError, ValueError: it is missing, or its weights do not fit its config.
    """
    variant = weight_variant(folder, "vae")
    vae, info = AutoencoderKL.from_pretrained(
        str(folder / "vae"),
        use_safetensors=True,
        variant=variant,
        output_loading_info=True,
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    wrong = [
        key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind, ())
    ]
    if wrong:
        raise ValueError(f"{folder / 'vae'}: {len(wrong)} weights do not fit its config, first {wrong[0]}")
    return vae
