"""What goes into a latent diffusion model beside the noisy latents.

Every conditioning also feeds a prompt to the cross-attention; one that means nothing is the empty prompt.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextOnly:
    """A prompt through the base's text encoder and cross-attention; no mask."""

    uses_mask = uses_class = uses_inpaint = False


@dataclass(frozen=True, kw_only=True)
class TextAndMask:
    """A prompt, and a label map through a ControlNet (Pan et al. 2025, clinical-prior generation).

    The ControlNet sees one channel per foreground class, 1 inside and 0 outside, at the image's resolution;
    never class numbers divided by 255, which a network can hardly tell from background.

    Attributes:
        num_mask_classes: foreground classes of the label map; 1 for a binary lesion mask.
    """

    num_mask_classes: int = 1
    uses_mask = True
    uses_class = uses_inpaint = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_mask_classes <= 255:
            raise ValueError(f"num_mask_classes={self.num_mask_classes}: want 1 … 255 foreground classes")


@dataclass(frozen=True, kw_only=True)
class ClassLabel:
    """The class through an embedding that is added to the timestep's (Chen et al. 2025, long-tailed ultrasound).

    The reference implementation of the work they build on has exactly one embedding per class, so that
    classifier-free guidance over the class is impossible; here one more stands for "no class" and is trained
    by `training.prompt_dropout`.

    Attributes:
        num_classes: at least as many as the dataset has; spare embeddings are never used.
    """

    num_classes: int = 16
    uses_class = True
    uses_mask = uses_inpaint = False

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes}: want at least 1")


@dataclass(frozen=True, kw_only=True)
class TextAndInpaint:
    """A prompt, the mask at latent size and the latents of the image without what lies under the mask.

    The 9-channel input of Stable Diffusion's inpainting checkpoints, which the authors' code of Xie et al. 2025
    trains. A base with plain input is widened by zero weights, so that it computes the same at first.
    """

    uses_inpaint = True
    uses_mask = uses_class = False


Conditioning = TextOnly | TextAndMask | ClassLabel | TextAndInpaint
