"""A diffusion model of lesion masks: which network, which schedule, how it is sampled."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from factory.generators.mask_checkpoints import check_mask_model
from factory.generators.mask_training import MaskModelTraining
from schemas.identity import canonical, execution_field

if TYPE_CHECKING:
    from factory.generators.mask_diffusion_model import MaskDenoiser

DIFFUSION_KIND = "mask_diffusion"


def _default_training() -> MaskModelTraining:
    return MaskModelTraining(
        max_steps=20_000,
        batch_size=32,
        learning_rate=1e-4,
        warmup_steps=500,
        adam_betas=(0.9, 0.999),
        max_grad_norm=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class MaskDDPM:
    """A class-conditional DDPM over masks (Xie et al. 2025: UNet widths [64, 128, 256, 512]).

    The paper states neither resolution, number of timesteps, schedule nor sampler. Ours: 128², 1000 steps of the cosine
    schedule, noise prediction, self-attention at the lowest level, the class added to the timestep's embedding, deterministic
    DDIM sampling.

    Attributes:
        resolution: side of the masks, px; a multiple of 2^(number of levels - 1).
        channels: width of each level.
        layers_per_block: residual blocks per level.
        norm_groups: of the group normalisation; divides every width.
        num_train_timesteps: T.
        num_inference_steps: DDIM steps per mask.
        training: optimisation; enters plans through the digest of the weights.
    """

    resolution: int = 128
    channels: tuple[int, ...] = (64, 128, 256, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    num_train_timesteps: int = 1000
    num_inference_steps: int = 50
    training: MaskModelTraining = execution_field(default_factory=_default_training)  # noqa: RUF009

    def __post_init__(self) -> None:
        if not self.channels or any(width < 1 or width % self.norm_groups for width in self.channels):
            raise ValueError(
                f"model.channels: want widths divisible by norm_groups = {self.norm_groups}, got {self.channels}"
            )
        step = 2 ** (len(self.channels) - 1)
        if self.resolution < step or self.resolution % step:
            raise ValueError(f"model.resolution: {self.resolution} px is not a multiple of {step}")
        if self.layers_per_block < 1:
            raise ValueError(f"model.layers_per_block: want 1 or more, got {self.layers_per_block}")
        if not 1 <= self.num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"model.num_inference_steps: want 1 … {self.num_train_timesteps} (num_train_timesteps), "
                f"got {self.num_inference_steps}"
            )

    def network(self, num_classes: int) -> "MaskDenoiser":
        """The denoiser with fresh weights (from torch's global generator)."""
        from factory.generators.mask_diffusion_model import MaskDenoiser

        return MaskDenoiser(self, num_classes)

    def load(self, folder: Path) -> "MaskDenoiser":
        """The trained denoiser, averaged weights, on the CPU in evaluation mode.

        Raises:
            FileNotFoundError, ValueError: the folder holds no such model, or another one.
        """
        from safetensors.torch import load_file

        from factory.generators.mask_checkpoints import WEIGHTS

        manifest = check_mask_model(folder, DIFFUSION_KIND, canonical(self))
        denoiser = self.network(len(manifest["classes"]))
        denoiser.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return denoiser.eval().requires_grad_(False)
