"""What goes into a latent diffusion model beside the noisy latents."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextOnly:
    """A prompt through the base's text encoder and cross-attention; no mask."""

    @property
    def uses_mask(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class TextAndMask:
    """A prompt, and a label map through a ControlNet (Pan et al. 2025, clinical-prior generation).

    The ControlNet sees one channel per foreground class, 1 inside and 0 outside, at the image's resolution;
    never class numbers divided by 255, which a network can hardly tell from background.

    Attributes:
        num_mask_classes: foreground classes of the label map; 1 for a binary lesion mask.
    """

    num_mask_classes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_mask_classes <= 255:
            raise ValueError(f"num_mask_classes={self.num_mask_classes}: want 1 … 255 foreground classes")

    @property
    def uses_mask(self) -> bool:
        return True


Conditioning = TextOnly | TextAndMask
