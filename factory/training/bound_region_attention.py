"""`RegionAttention` at work: captures cross-attention while the denoiser runs, and compares it with the masks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from factory.diffusion.attention import CapturedAttention, capture, select_layers
from factory.diffusion.attention_maps import min_max, token_weights
from factory.diffusion.latent_masks import latent_masks
from factory.training.bound_objective import BoundObjective
from factory.training.objectives import PredictionStep, TrainingContext
from factory.training.region_attention import RegionAttention


class BoundRegionAttention(BoundObjective):
    """See `RegionAttention`. Has no parameters."""

    weights: Tensor

    def __init__(self, source: RegionAttention, context: TrainingContext) -> None:
        super().__init__()
        generator = context.generator
        if getattr(generator.unet, "is_gradient_checkpointing", False):
            raise ValueError(
                "training.gradient_checkpointing: RegionAttention needs gradients of attention maps, which checkpointed "
                "layers do not give; switch it off (use gradient_accumulation_steps against lack of memory)"
            )
        self._source = source
        side = generator.latent_shape[-1]
        self._layers = {"cross": select_layers(generator.unet, "cross", source.side, side)}
        positions = [generator.token_positions(context.prompts, word) for word in source.words]
        for word, rows in zip(source.words, positions, strict=True):
            if not any(rows):
                raise ValueError(
                    f"objectives.RegionAttention.tokens: none of the {len(context.prompts)} training prompts has {word!r}; "
                    "use prompts that name it (CaptionTable) and generator.placeholders for words in angle brackets"
                )
        length = generator.num_prompt_tokens
        self.register_buffer("weights", token_weights(positions, length), persistent=False)
        self._captured: CapturedAttention | None = None

    @contextlib.contextmanager
    def capture(self, denoiser: nn.Module) -> Iterator[None]:
        unet: Any = denoiser.unet
        with capture(unet, self._layers) as self._captured:
            yield

    def forward(self) -> Tensor:
        """Head- and layer-averaged cross-attention, float32 (B, n, L)."""
        assert self._captured is not None
        maps = self._captured.mean("cross")
        self._captured = None
        return maps

    def word_maps(self, prompts: Tensor, attention: Tensor) -> Tensor:
        """Raw map of each word, (B, T, n), for rows `prompts` (B,) of the prompt table; 0 where it is absent."""
        return torch.einsum("bnl,btl->btn", attention.float(), self.weights[prompts])

    def loss(self, step: PredictionStep, output: Tensor) -> Tensor:
        if step.masks is None or step.prompts is None:
            raise ValueError("objectives.RegionAttention: needs masks and prompts of the training rows")
        maps = self.word_maps(step.prompts, output)
        inside = latent_masks(step.masks, self._source.side, soft=True).flatten(1)
        sides = [where for _, where in self._source.tokens]
        regions = torch.stack([inside if where == "inside" else 1.0 - inside for where in sides], dim=1)
        counts = self.weights[step.prompts].sum(dim=-1) > 0
        if self._source.form == "paper":
            errors = (maps - regions).square().sum(dim=-1)
        else:
            errors = (min_max(maps) - regions).square().mean(dim=-1)
            counts = counts & (regions.amax(dim=-1) > regions.amin(dim=-1))
        return (errors * counts).mean(dim=-1)
