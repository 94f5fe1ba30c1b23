"""Attention maps out of a UNet, from the layers that are asked for; all others stay on their fused processor.

Shapes: B images, n = side² cells of a map in reading order, L prompt tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["cross", "self"]


def attention_sides(unet: nn.Module, latent_side: int) -> dict[str, int]:
    """Map side of every attention layer of a diffusers UNet, by the layer's module name.

    Read off the architecture, without running it: `latent_side` is the side of the latents.
    """
    sides: dict[str, int] = {}
    side = latent_side

    def note(prefix: str, block: nn.Module) -> None:
        for name, _ in block.named_modules():
            if name.endswith((".attn1", ".attn2")):
                sides[f"{prefix}.{name}"] = side

    model: Any = unet
    for index, block in enumerate(model.down_blocks):
        note(f"down_blocks.{index}", block)
        if getattr(block, "downsamplers", None):
            side = (side + 1) // 2
    if model.mid_block is not None:
        note("mid_block", model.mid_block)
    for index, block in enumerate(model.up_blocks):
        note(f"up_blocks.{index}", block)
        if getattr(block, "upsamplers", None):
            side *= 2
    return sides


def select_layers(unet: nn.Module, kind: Kind, side: int, latent_side: int) -> tuple[str, ...]:
    """Names of the cross- or self-attention layers of `unet` whose map is `side` × `side`.

    Raises:
        ValueError: there is none; names the sides that exist for latents of this size.
    """
    suffix = ".attn2" if kind == "cross" else ".attn1"
    sides = {
        name: value for name, value in attention_sides(unet, latent_side).items() if name.endswith(suffix)
    }
    found = tuple(name for name, value in sides.items() if value == side)
    if not found:
        known = ", ".join(map(str, sorted(set(sides.values()), reverse=True))) or "none"
        raise ValueError(
            f"{kind}-attention: no layer with a map of {side} × {side}; with latents of {latent_side} × {latent_side} "
            f"this UNet has sides {known}: set {kind}_side (or side) to one of them, or change the resolution"
        )
    return found


def attention_probabilities(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    """softmax(QKᵀ/√d) of one diffusers attention layer, averaged over its heads: float32 (B, n, L or n).

    Shentu et al. 2025, Eq. 2, where K_T is the *key* of the text (the paper calls it a query). Computed in float32
    also under autocast; differentiable. Projections are called as modules, so LoRA-wrapped ones count in full.
    """
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    batch, queries = hidden_states.shape[:2]
    query = attn.to_q(hidden_states).reshape(batch, queries, attn.heads, -1).transpose(1, 2)
    key = attn.to_k(context).reshape(batch, context.shape[1], attn.heads, -1).transpose(1, 2)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    with torch.autocast(hidden_states.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1).mean(dim=1)


class _CapturingProcessor:
    """Hands the layer's probabilities on, and leaves its output to the processor that was there."""

    def __init__(self, inner: Callable[..., Tensor], keep: Callable[[Tensor], None]) -> None:
        self._inner, self._keep = inner, keep

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.ndim != 3:
            raise ValueError("attention capture: wants transformer layers without an attention mask")
        self._keep(attention_probabilities(attn, hidden_states, encoder_hidden_states))
        return self._inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedAttention:
    """What the layers of one forward pass gave, by layer group; filled while the UNet runs.

    Attributes:
        layers: module names by group, as given to `capture`.
        maps: head-averaged probabilities, float32 (B, n, L or n), by module name.
    """

    layers: Mapping[str, tuple[str, ...]]
    maps: dict[str, Tensor]

    def mean(self, group: str) -> Tensor:
        """Average over the layers of a group, float32 (B, n, L or n); its rows sum to 1."""
        return torch.stack([self.maps[name] for name in self.layers[group]]).mean(dim=0)


@contextlib.contextmanager
def capture(unet: nn.Module, layers: Mapping[str, tuple[str, ...]]) -> Iterator[CapturedAttention]:
    """Capture the probabilities of `layers` (groups of module names of `unet`) while the block runs.

    The output of the UNet does not change by a bit: the layer's own fused processor still computes it, and only the
    projections and the softmax of the captured layers are computed a second time. The processors are put back at
    the end, also after an error. Works with and without gradients; a second forward pass replaces the first one's
    maps. Under gradient checkpointing the maps would carry no gradient: callers that need one refuse it.
    """
    captured = CapturedAttention(layers=dict(layers), maps={})
    before: list[tuple[Any, Any]] = []
    try:
        for name in dict.fromkeys(name for names in layers.values() for name in names):
            module: Any = unet.get_submodule(name)
            before.append((module, module.processor))
            module.set_processor(_CapturingProcessor(module.processor, _keep_in(captured.maps, name)))
        yield captured
    finally:
        for module, processor in before:
            module.set_processor(processor)


def _keep_in(maps: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(probabilities: Tensor) -> None:
        maps[name] = probabilities

    return keep
