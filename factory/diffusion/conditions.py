"""What conditions a denoiser in one call, beside the noisy latents and the timestep."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """Conditions of B images; which ones a generator takes is said by its conditioning.

    Attributes:
        prompt_embeds: (B, L, D) hidden states of the text encoder.
        controlnet_cond: (B, K, R, R) one-hot planes of the label map, or what the ControlNet's mask encoder made of
            them; None without a ControlNet.
        class_labels: (B,) int64, or None.
        inpaint: (B, 1 + C, h, w): the mask at latent size (1 = made anew) and the latents of the image without
            what lies under it, as inpainting UNets take them; None for others.
    """

    prompt_embeds: Tensor
    controlnet_cond: Tensor | None = None
    class_labels: Tensor | None = None
    inpaint: Tensor | None = None

    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser; what is None is left out."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def then(self, other: "Conditions") -> "Conditions":
        """This batch and behind it the other one."""
        mine, theirs = self.arguments(), other.arguments()
        if mine.keys() != theirs.keys():
            raise ValueError(f"conditions: {sorted(mine)} and {sorted(theirs)} cannot be one batch")
        return Conditions(**{name: torch.cat([mine[name], theirs[name]]) for name in mine})
