"""The network of the mask DDPM and its DDIM sampler."""

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from factory.generators.mask_diffusion import MaskDDPM


class MaskDenoiser(nn.Module):
    """ε_θ(x_t, t, k) over masks in -1 … 1."""

    def __init__(self, model: MaskDDPM, num_classes: int) -> None:
        super().__init__()
        self.model, self.num_classes = model, num_classes
        plain = len(model.channels) - 1
        self.unet = UNet2DModel(
            sample_size=model.resolution,
            in_channels=1,
            out_channels=1,
            block_out_channels=model.channels,
            layers_per_block=model.layers_per_block,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            norm_num_groups=model.norm_groups,
            attention_head_dim=min(8, model.channels[-1]),
            num_class_embeds=num_classes,
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        """x_t float (B, 1, R, R), t int64 (B,), classes int64 (B,) → ε, float (B, 1, R, R)."""
        return self.unet(noisy, timesteps, class_labels=classes).sample

    @torch.no_grad()
    def draw(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Deterministic DDIM from `noise`, float (B, 1, R, R) → soft masks 0 … 1, same shape."""
        noise_scheduler = ddim_scheduler(self.model)
        noise_scheduler.set_timesteps(self.model.num_inference_steps)
        latents = noise
        for timestep in noise_scheduler.timesteps:
            timesteps = timestep.expand(len(noise)).to(noise.device)
            model_pred = self(latents, timesteps, classes)
            latents = noise_scheduler.step(model_pred, timestep, latents, eta=0.0).prev_sample
        return (latents.clamp(-1, 1) + 1) / 2


def ddpm_scheduler(model: MaskDDPM) -> DDPMScheduler:
    """The forward process: cosine schedule."""
    return DDPMScheduler(num_train_timesteps=model.num_train_timesteps, beta_schedule="squaredcos_cap_v2")


def ddim_scheduler(model: MaskDDPM) -> DDIMScheduler:
    """The sampler: the predicted mask is clipped to -1 … 1, the last step returns it."""
    return DDIMScheduler(
        num_train_timesteps=model.num_train_timesteps, beta_schedule="squaredcos_cap_v2", clip_sample=True
    )
