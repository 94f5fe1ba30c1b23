"""The sketch branch of Chen et al. 2025: the denoiser's encoder must show where the edges of the clean image are."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from factory.sketches import DifferenceOfGaussians, Extractor
from factory.training.objectives import TrainingContext

if TYPE_CHECKING:
    from factory.training.bound_objective import BoundObjective


@dataclass(frozen=True, kw_only=True)
class SketchPerception:
    """A decoder from the encoder's features to the image's sketch, trained along and thrown away afterwards.

    Chen et al. 2025, §2.2: L = L_denoise + λ L_s, L_s = √α_t ‖S − S_gt‖₁, λ = .1. Deviates twice. √α_t lies between
    .994 and 1 on Stable Diffusion's schedule, whereas the text wants an emphasis on small t: the default is √ᾱ_t,
    which falls from 1 to .068. Edges are about 8 % of the pixels, so that plain L1 is least for the empty sketch: the
    default is a cross-entropy in which edges and the rest weigh alike. Output size and decoder are unstated; here
    each resolution is projected to 64 channels, brought to latent size, concatenated, and upsampled to the image's
    pixels by transposed convolutions of stride 2.

    Metrics beside the loss: "sketch_error" and "sketch_error_of_zero", the error of the constant zero, both as L1,
    balanced over edges and the rest or plain: the branch has learned something where the first is below the second.

    Attributes:
        weight: λ.
        extractor: draws the sketches of the training images, once.
        loss: "balanced", or "paper" for plain L1.
        timestep_weight: "alpha_bar" is √ᾱ_t, "paper" √α_t.
        channels: of each projected resolution.
    """

    weight: float = 0.1
    extractor: Extractor = field(default_factory=DifferenceOfGaussians)
    loss: Literal["balanced", "paper"] = "balanced"
    timestep_weight: Literal["alpha_bar", "paper"] = "alpha_bar"
    channels: int = 64

    def __post_init__(self) -> None:
        name = "objectives.SketchPerception"
        if not self.weight > 0:
            raise ValueError(f"{name}.weight: want a positive number, got {self.weight}")
        if self.loss not in ("balanced", "paper"):
            raise ValueError(f"{name}.loss={self.loss!r}: want balanced or paper")
        if self.timestep_weight not in ("alpha_bar", "paper"):
            raise ValueError(f"{name}.timestep_weight={self.timestep_weight!r}: want alpha_bar or paper")
        if self.channels < 8 or self.channels % 8:
            raise ValueError(f"{name}.channels: want a multiple of 8, got {self.channels}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("sketches",)

    def bind(self, context: TrainingContext) -> "BoundObjective":
        """The branch with fresh weights, seeded by the context, over the UNet of its generator.

        Raises:
            ValueError: the image is no power of two larger than the latents.
        """
        from factory.training.sketch_branch import SketchBranch

        generator = context.generator
        return SketchBranch(
            self,
            feature_channels=tuple(generator.unet.config.block_out_channels),
            latent_side=generator.latent_shape[1],
            resolution=context.resolution,
            seed=context.seed,
        )
