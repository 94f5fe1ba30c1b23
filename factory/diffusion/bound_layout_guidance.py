"""`LayoutGuidance` at work on one batch: the losses and their gradient.

Shapes: B images, n = side² cells, L prompt tokens, T words.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from factory.diffusion.attention_maps import (
    as_square,
    layout_layers,
    required_positions,
    run_captured,
    token_weights,
)
from factory.diffusion.guidance import DenoisingBatch, DenoisingStep
from factory.diffusion.latent_masks import latent_masks
from factory.diffusion.layout_guidance import CrossForm, LayoutGuidance, SelfReduction, WordRegions


class BoundLayoutGuidance:
    """See `LayoutGuidance`."""

    def __init__(self, source: LayoutGuidance, batch: DenoisingBatch) -> None:
        if batch.masks is None:
            raise ValueError("LayoutGuidance: no masks were requested; use a recipe with a source of masks")
        self.start, self.stop = source.start, source.stop
        self._source, self._batch = source, batch
        self._positions = required_positions(batch, source.words, "LayoutGuidance")
        self._layers: dict[str, tuple[str, ...]] | None = None

    def before_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        """Latents (B, C, h, w) moved down the gradient; untouched where η is 0.

        Raises:
            ValueError: at the first step, where the UNet has no maps of the wanted sides.
        """
        if self._layers is None:
            sides = self._source.cross_side, self._source.self_side
            self._layers = layout_layers(self._batch, *sides, latent_side=latents.shape[-1])
        eta = self._source.eta_at(step.index, step.num_steps)
        if eta == 0.0:
            return latents
        with torch.enable_grad():
            moving = latents.detach().float().requires_grad_(True)
            gradient = torch.autograd.grad(self.losses(moving, step).sum(), moving)[0]
        return latents - eta * gradient.float()

    def after_step(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        return latents

    def losses(self, latents: Tensor, step: DenoisingStep) -> Tensor:
        """L_CA + w · L_SA of each image, float32 (B,), differentiable in `latents`."""
        source, masks = self._source, self._batch.masks
        assert masks is not None
        if self._layers is None:
            self._layers = layout_layers(
                self._batch, source.cross_side, source.self_side, latent_side=latents.shape[-1]
            )
        captured = run_captured(self._batch, self._layers, latents, step)
        cross = captured.mean("cross")
        weights = token_weights(self._positions, cross.shape[-1]).to(cross.device)
        maps = word_maps(cross, weights, self._batch.num_tokens, source.cross_form, source.temperature)
        maps = smooth(maps, source.smoothing)
        regions = word_regions(masks, source.tokens, source.cross_side)
        loss = cross_loss(maps, regions, source.cross_form)
        if source.self_weight:
            regions = word_regions(masks, source.tokens, source.self_side)
            loss = loss + source.self_weight * self_loss(
                captured.mean("self"), regions, source.self_reduction
            )
        return loss


def word_regions(masks: Tensor, tokens: WordRegions, side: int) -> Tensor:
    """M_i of each word: (B, T, n) float32, the share of each cell that belongs to it."""
    inside = latent_masks(masks, side, soft=True).flatten(1)
    return torch.stack([inside if where == "inside" else 1.0 - inside for _, where in tokens], dim=1)


def word_maps(
    cross: Tensor, weights: Tensor, num_tokens: Sequence[int], form: CrossForm, temperature: float
) -> Tensor:
    """A_C of each word, (B, T, n): raw for "paper", else after a softmax over the tokens between BOS and EOS.

    Args:
        cross: (B, n, L).
        weights: (B, T, L), see `token_weights`.
        num_tokens: of each prompt, with BOS and EOS.
    """
    if form == "contrast":
        places = torch.arange(cross.shape[-1], device=cross.device)
        last = torch.as_tensor(num_tokens, device=cross.device)[:, None] - 1
        is_text = (places >= 1) & (places < last)
        cross = (temperature * cross).masked_fill(~is_text[:, None], -math.inf).softmax(dim=-1)
    return torch.einsum("bnl,btl->btn", cross, weights)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Maps (B, T, n) after a normalised Gaussian of `sigma` cells, reflected at the border; 0 leaves them."""
    if sigma == 0.0:
        return maps
    square = as_square(maps)
    radius = min(max(1, math.ceil(3.0 * sigma)), square.shape[-1] - 1)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = square.flatten(0, 1)[:, None]
    flat = torch.nn.functional.pad(flat, (radius,) * 4, mode="reflect")
    flat = torch.nn.functional.conv2d(flat, kernel[None, None, None, :])
    flat = torch.nn.functional.conv2d(flat, kernel[None, None, :, None])
    return flat.reshape(maps.shape)


def cross_loss(maps: Tensor, regions: Tensor, form: CrossForm) -> Tensor:
    """L_CA of each image, (B,): mean over words of what `form` says; maps and regions (B, T, n).

    For "paper" (Eq. 3) the mean over words is the printed ½ for two of them.
    """
    if form == "paper":
        return (maps - regions).square().sum(dim=-1).mean(dim=-1)
    outside = 1.0 - regions
    area, rest = regions.sum(dim=-1), outside.sum(dim=-1)
    mean_inside = (maps * regions).sum(dim=-1) / area.clamp_min(1e-6)
    mean_outside = (maps * outside).sum(dim=-1) / rest.clamp_min(1e-6)
    return ((area > 0) * (1.0 - mean_inside) + mean_outside).mean(dim=-1)


def self_loss(attention: Tensor, regions: Tensor, reduction: SelfReduction) -> Tensor:
    """L_SA of each image, (B,): attention (B, n, n) that leaves a word's region (B, T, n), mean over words.

    Σ_p M_p Σ_q A_pq (1 − M_q), divided by Σ M ("mean_over_mask"), by Σ (1 − M) ("paper", Eq. 5), or by both ("code").
    """
    outside = 1.0 - regions
    leaving = torch.einsum("btp,bpq,btq->bt", regions, attention, outside)
    area, rest = regions.sum(dim=-1).clamp_min(1e-6), outside.sum(dim=-1).clamp_min(1e-6)
    divisor = {"mean_over_mask": area, "paper": rest, "code": area * rest}[reduction]
    return (leaving / divisor).mean(dim=-1)
