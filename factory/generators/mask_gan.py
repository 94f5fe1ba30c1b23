"""A semantic-curvature mask generator: which network, which losses."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from factory.generators.mask_checkpoints import check_mask_model
from factory.generators.mask_training import MaskModelTraining
from schemas.identity import canonical, execution_field

if TYPE_CHECKING:
    from factory.generators.mask_gan_model import MaskDiscriminator, MaskGenerator

GAN_KIND = "mask_gan"


@dataclass(frozen=True, kw_only=True)
class MaskGAN:
    """A GAN that draws a lesion mask for a class and a bounding rectangle (Pan et al. 2025, Medical Image Analysis, §3.2).

    The paper states no sizes, no Adam betas and no loss weights. Deviations of the default, each with its literal form:

    - `class_input="modulation"`: γ and β of every SPADE layer depend on the class. In the paper the class is broadcast
      over the first feature map ("concatenation"), and the instance norm of Eq. 9 then subtracts every such constant:
      the class would have no influence at all.
    - `class_term="projection"`: a projection discriminator on both branches. Eq. 14 trains the classifier on
      generated masks and Eq. 15 gives the generator no class term ("paper"). "acgan": classifier on real masks and a
      cross-entropy for the generator; it asks for perfect separability where classes overlap.
    - `operator="scale_normalised"`: see `mask_curvature.curvature`; "sobel" is the paper's.
    - `curvature_pairing="rank"`: the curvatures of a batch and as many draws of their class's empirical distribution are
      paired by rank, so that the distribution is matched. Paired item by item ("item", Eq. 11) a generator
      that cannot know its target does best with the class's median everywhere.
    - `box_weight`: 1 - IoU of the bounding box with the rectangle, to which nothing in Eq. 15 ties the mask; 0 is
      the paper's.
    - `sharpness`: discriminator and curvature see sigmoid(k (M - ½)), rescaled to 0 … 1, so that ripples below
      the threshold do not count; None is the paper's soft mask.

    Attributes:
        resolution: side of the masks, px: `base_size` times a power of two.
        noise_dim: n of z.
        channels: C0 of the first feature map; each block halves it, down to `min_channels`.
        base_size: H0 = W0.
        min_channels: least width of a block.
        spade_hidden: width inside the SPADE layers.
        discriminator_channels: width of the first convolution of each branch; doubled up to 8 times.
        discriminator_learning_rate: constant; the generator's is `training.learning_rate`.
        class_weight: of the class terms ("acgan" and "paper").
        curvature_weight: of the curvature loss; 0 turns it off.
        training: optimisation; enters plans through the digest of the weights.
    """

    resolution: int = 256
    noise_dim: int = 128
    channels: int = 512
    base_size: int = 8
    min_channels: int = 32
    spade_hidden: int = 64
    discriminator_channels: int = 64
    discriminator_learning_rate: float = 1e-4
    class_input: Literal["modulation", "concatenation"] = "modulation"
    class_term: Literal["projection", "acgan", "paper"] = "projection"
    class_weight: float = 1.0
    curvature_weight: float = 1.0
    operator: Literal["scale_normalised", "sobel"] = "scale_normalised"
    curvature_pairing: Literal["rank", "item"] = "rank"
    box_weight: float = 1.0
    sharpness: float | None = 10.0
    training: MaskModelTraining = execution_field(default_factory=MaskModelTraining)  # noqa: RUF009

    def __post_init__(self) -> None:
        sizes = (
            "noise_dim",
            "channels",
            "base_size",
            "min_channels",
            "spade_hidden",
            "discriminator_channels",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: want 1 or more, got {getattr(self, name)}")
        ratio = self.resolution // self.base_size
        if self.base_size * ratio != self.resolution or ratio < 2 or ratio & (ratio - 1):
            raise ValueError(
                f"model.resolution: {self.resolution} px is not base_size = {self.base_size} px times a power of two"
            )
        for name in ("class_weight", "curvature_weight", "box_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"model.{name}: want 0 or more, got {getattr(self, name)}")
        if not self.discriminator_learning_rate > 0:
            raise ValueError(
                f"model.discriminator_learning_rate: want > 0, got {self.discriminator_learning_rate}"
            )
        if self.sharpness is not None and not self.sharpness > 0:
            raise ValueError(f"model.sharpness: want a positive number or None, got {self.sharpness}")
        choices = {
            "class_input": ("modulation", "concatenation"),
            "class_term": ("projection", "acgan", "paper"),
            "operator": ("scale_normalised", "sobel"),
            "curvature_pairing": ("rank", "item"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")

    @property
    def num_blocks(self) -> int:
        """N: doublings from `base_size` to `resolution`."""
        return (self.resolution // self.base_size).bit_length() - 1

    def networks(self, num_classes: int) -> "tuple[MaskGenerator, MaskDiscriminator]":
        """Both networks with fresh weights (from torch's global generator)."""
        from factory.generators.mask_gan_model import MaskDiscriminator, MaskGenerator

        return MaskGenerator(self, num_classes), MaskDiscriminator(self, num_classes)

    def load(self, folder: Path) -> "MaskGenerator":
        """The trained generator, averaged weights, on the CPU in evaluation mode.

        Raises:
            FileNotFoundError, ValueError: the folder holds no such model, or another one.
        """
        from safetensors.torch import load_file

        from factory.generators.mask_checkpoints import WEIGHTS
        from factory.generators.mask_gan_model import MaskGenerator

        manifest = check_mask_model(folder, GAN_KIND, canonical(self))
        generator = MaskGenerator(self, len(manifest["classes"]))
        generator.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return generator.eval().requires_grad_(False)
