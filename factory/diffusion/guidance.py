"""Hooks into the denoising loop that steer it by more than the prompt.

Classifier-free guidance is not one of them: it lives in the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from factory.diffusion.conditions import Conditions


@dataclass(frozen=True, kw_only=True)
class DenoisingStep:
    """Where the loop is.

    Attributes:
        index, num_steps: step `index` of `num_steps`, from 0.
        timestep: of the latents before the step (training timesteps, 0 = almost clean).
        next_timestep: of the latents after it; None after the last step, where they are clean.
        noise_scheduler: the diffusers schedule of this loop.
        rngs: one generator per image, on the CPU.
        is_guided: whether classifier-free guidance is on: the denoiser then gets the unconditional images and
            behind them the conditional ones in one call of 2 B.
    """

    index: int
    num_steps: int
    timestep: Tensor
    next_timestep: Tensor | None
    noise_scheduler: Any
    rngs: Sequence[torch.Generator]
    is_guided: bool = False

    @property
    def fraction(self) -> float:
        return self.index / self.num_steps


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingBatch:
    """A batch about to be denoised: all that a guidance or an annotator is bound to.

    Attributes:
        denoiser: `(latents, timesteps, **conditions.arguments()) -> prediction`, not compiled; its UNet is `unet`.
        conditions: of the B images, the conditional side.
        prompts: B texts.
        token_positions: a word → for each prompt the places of its tokens in the padded row of tokens.
        num_tokens: tokens of each prompt with its begin and end, without padding.
        masks: requested label maps, uint8 (B, R, R), or None.
        backgrounds: scaled latents (B, C, h, w) of the background images, or None.
        resolution: R, px.
    """

    denoiser: nn.Module
    conditions: Conditions
    prompts: Sequence[str]
    token_positions: Callable[[str], list[list[int]]]
    num_tokens: Sequence[int]
    masks: Tensor | None
    backgrounds: Tensor | None
    resolution: int


class GuidanceComponent(Protocol):
    """What a recipe holds: settings, which become a guidance when a batch is at hand."""

    def bind(self, batch: DenoisingBatch) -> "Guidance": ...


class Guidance(Protocol):
    """Active for steps with start ≤ fraction < stop."""

    @property
    def start(self) -> float: ...

    @property
    def stop(self) -> float: ...

    def before_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        """Latents (B, C, h, w) to denoise in this step."""

    def after_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        """Latents (B, C, h, w) to hand to the next step."""


def is_active(start: float, stop: float, fraction: float) -> bool:
    """Whether something limited to [start, stop) is on at this fraction of the loop."""
    return start <= fraction < stop


def draw_noise(shape: tuple[int, ...], rngs: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """(B, *shape) float32 standard normal, image i from rngs[i] alone, drawn on the CPU."""
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundMaskedBlend:
    """Keep a given image outside the mask (Xie et al. 2025, Eq. 2).

    After each step x ← M ⊙ x + (1 − M) ⊙ q(x_{t−1} | z₀), with z₀ itself after the last step. Deviates: the
    equation as printed lacks the noise term and leaves its F and x^prev undefined; this is the form that
    keeps the marginals right (RePaint, Lugmayr et al. 2022, without resampling). Outside M the latents end
    bit-identical to z₀; pixels do not, for the VAE's round trip.

    Attributes:
        background: z₀, scaled latents (B, C, h, w).
        mask: (B, 1, h, w), 1 where the image is made.
        start, stop: fractions of the loop; a stop below 1 leaves the last steps free.
    """

    background: Tensor
    mask: Tensor
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        b, _, h, w = self.background.shape
        if tuple(self.mask.shape) != (b, 1, h, w):
            raise ValueError(f"mask: want {(b, 1, h, w)} for this background, got {tuple(self.mask.shape)}")

    def before_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        return latents

    def after_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        background = self.background.to(latents)
        if step.next_timestep is not None:
            noise = draw_noise(tuple(latents.shape[1:]), step.rngs, latents.device).to(latents)
            timesteps = step.next_timestep.expand(latents.shape[0])
            background = step.noise_scheduler.add_noise(background, noise, timesteps)
        return torch.where(self.mask.to(latents.device) > 0.5, latents, background)
