"""From captured attention to maps of words: token weights, normalisation, refinement by self-attention.

Shapes: B images, n = side² cells in reading order, L prompt tokens, T words.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from factory.diffusion.attention import CapturedAttention, capture, select_layers
from factory.diffusion.guidance import DenoisingBatch, DenoisingStep

PowerForm = Literal["matrix", "paper"]


def token_weights(positions: Sequence[Sequence[Sequence[int]]], length: int) -> Tensor:
    """Weights (B, T, L) float32 that average a token row over each word's tokens.

    Args:
        positions: for each of T words, for each of B prompts, the places of its tokens; empty where it is absent
            (its weights are then 0).
        length: L.
    """
    weights = torch.zeros(len(positions[0]), len(positions), length)
    for word, rows in enumerate(positions):
        for row, places in enumerate(rows):
            for place in places:
                weights[row, word, place] = 1.0 / len(places)
    return weights


def required_positions(batch: DenoisingBatch, words: Sequence[str], asked_by: str) -> list[list[list[int]]]:
    """Places of every word in every prompt, [T][B][pieces].

    Raises:
        ValueError: a prompt lacks a word; names both and what to do.
    """
    found = [batch.token_positions(word) for word in words]
    for word, rows in zip(words, found, strict=True):
        for prompt, places in zip(batch.prompts, rows, strict=True):
            if not places:
                raise ValueError(
                    f"{asked_by}: the prompt {prompt!r} has no {word!r}; use prompts that name it early (CaptionTable's "
                    "prefix) and generator.placeholders for words in angle brackets"
                )
    return found


def min_max(maps: Tensor) -> Tensor:
    """Each map (…, n) stretched to 0 … 1; a constant map becomes 0."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def as_square(maps: Tensor) -> Tensor:
    """(…, n) → (…, side, side)."""
    side = math.isqrt(maps.shape[-1])
    assert side * side == maps.shape[-1], maps.shape
    return maps.reshape(*maps.shape[:-1], side, side)


def refine(self_attention: Tensor, cross_map: Tensor, power: int, form: PowerForm = "matrix") -> Tensor:
    """A_CS = (A_S)^τ · A_C, min–max normalised: (B, side_s, side_s) (Shentu et al. 2025, Eq. 7).

    "matrix" is the matrix power, as in the work they cite (Nguyen et al. 2023, Dataset Diffusion): (A_S)^τ stays
    row-stochastic and leaves constants alone. "paper" takes the exponent literally, element by element; rows then no
    longer sum to 1. The matrix is never raised: τ products with the vector give the same. Normalising (A_S)^τ to
    0 … 1 before the product, as the authors' code does, adds a constant and a factor that the last normalisation
    removes.

    Args:
        self_attention: (B, n_s, n_s) row-stochastic.
        cross_map: (B, side_c, side_c) of one word, resized bicubically to side_s.
        power: τ.
    """
    side = math.isqrt(self_attention.shape[-1])
    resized = torch.nn.functional.interpolate(
        cross_map[:, None].float(), size=(side, side), mode="bicubic", align_corners=False
    )
    values = resized.flatten(1)[..., None]
    matrix = self_attention.float()
    if form == "paper":
        values = matrix.pow(power) @ values
    else:
        for _ in range(power):  # a row-stochastic matrix keeps the mean: without it, no digits are lost
            values = matrix @ (values - values.mean(dim=1, keepdim=True))
    return as_square(min_max(values[..., 0]))


class AttentionRecord:
    """A hook that reads the attention of the last denoising step and keeps the map of one word per image.

    The denoiser runs once more on the last step's input, conditional side only: 1/100 more work in a guided loop of
    50 steps, and the loop's own denoiser may be compiled.
    """

    start, stop = 0.0, 1.0

    def __init__(
        self,
        batch: DenoisingBatch,
        word: str,
        *,
        cross_side: int,
        self_side: int,
        power: int,
        form: PowerForm,
    ) -> None:
        self._batch = batch
        self._sides = (cross_side, self_side)
        self._power, self._form = power, form
        self._positions = required_positions(batch, [word], "AttentionOtsu")
        self._layers: dict[str, tuple[str, ...]] | None = None
        self._maps: Tensor | None = None

    def before_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        if self._layers is None:  # at the first step, so that a wrong side costs nothing
            self._layers = layout_layers(self._batch, *self._sides, latent_side=latents.shape[-1])
        if step.index == step.num_steps - 1:
            with torch.no_grad():
                captured = run_captured(self._batch, self._layers, latents, step)
                self._maps = self._read(captured)
        return latents

    def after_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        return latents

    def _read(self, captured: CapturedAttention) -> Tensor:
        cross = captured.mean("cross")
        weights = token_weights(self._positions, cross.shape[-1]).to(cross.device)
        word = torch.einsum("bnl,btl->bn", cross, weights)
        refined = refine(captured.mean("self"), as_square(word), self._power, self._form)
        size = (self._batch.resolution,) * 2
        resized = torch.nn.functional.interpolate(
            refined[:, None], size=size, mode="bicubic", align_corners=False
        ).flatten(1)
        levels = (min_max(resized) * 255.0).round()
        return (
            torch.where(resized.isfinite(), levels, torch.zeros_like(levels))
            .to(torch.uint8)
            .reshape(-1, *size)
        )

    def maps(self) -> Tensor:
        """uint8 (B, R, R) on the CPU: the refined map, 0 … 255 in each image."""
        if self._maps is None:
            raise RuntimeError("attention record: the denoising loop has not reached its last step")
        self._maps = self._maps.cpu()
        return self._maps


def layout_layers(
    batch: DenoisingBatch, cross_side: int, self_side: int, *, latent_side: int
) -> dict[str, tuple[str, ...]]:
    """The layers "cross" and "self" of the batch's UNet; ValueError where a side does not exist."""
    unet = batch.denoiser.unet
    assert isinstance(unet, torch.nn.Module)
    return {
        "cross": select_layers(unet, "cross", cross_side, latent_side),
        "self": select_layers(unet, "self", self_side, latent_side),
    }


def run_captured(
    batch: DenoisingBatch, layers: dict[str, tuple[str, ...]], latents: Tensor, step: DenoisingStep
) -> CapturedAttention:
    """One run of the conditional side on the loop's latents (B, C, h, w), with the attention of `layers`."""
    unet = batch.denoiser.unet
    assert isinstance(unet, torch.nn.Module)
    inputs = step.noise_scheduler.scale_model_input(latents, step.timestep)
    with capture(unet, layers) as captured:
        batch.denoiser(
            inputs.to(batch.conditions.prompt_embeds.dtype),
            step.timestep.expand(latents.shape[0]),
            **batch.conditions.arguments(),
        )
    return captured
