"""Guided inference of Xie et al. 2025 as a recipe holds it: the lesion is painted into a given background."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factory.diffusion.guidance import BoundMaskedBlend, DenoisingBatch


@dataclass(frozen=True, kw_only=True)
class MaskedBlend:
    """Keeps the background outside the requested mask, noised as its step demands; see `BoundMaskedBlend`.

    Xie et al. 2025, Eq. 2, corrected: as printed the equation adds no noise (for unit-variance data its chain ends
    at a variance of .005) and its F and x^prev are undefined, so it cannot be run literally. Pixels outside the
    mask are the background's only after `compositing.composite`: the latents are bit-identical, but pass the VAE.

    Attributes:
        start, stop: fractions of the loop between which the background is put in; a stop below 1 leaves the last
            steps free to soften the seam, and the background then changes.
        dilation: latent cells by which the painted region exceeds the mask. The label stays the mask itself.
    """

    start: float = 0.0
    stop: float = 1.0
    dilation: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(
                f"guidances.MaskedBlend: want 0 ≤ start < stop ≤ 1, got start={self.start}, stop={self.stop}"
            )
        if self.dilation < 0:
            raise ValueError(
                f"guidances.MaskedBlend.dilation: want 0 or more latent cells, got {self.dilation}"
            )

    def bind(self, batch: "DenoisingBatch") -> "BoundMaskedBlend":
        """The guidance of one batch.

        Raises:
            ValueError: the batch has no masks or no backgrounds.
        """
        from torch.nn.functional import max_pool2d

        from factory.diffusion.guidance import BoundMaskedBlend
        from factory.diffusion.latent_masks import latent_masks

        if batch.masks is None or batch.backgrounds is None:
            missing = "masks" if batch.masks is None else "backgrounds"
            raise ValueError(
                f"guidances.MaskedBlend: the batch has no {missing}; the recipe needs a source of masks and one of "
                "backgrounds (RealNormals or HealedLesions)"
            )
        mask = latent_masks(batch.masks, batch.backgrounds.shape[-1])
        if self.dilation:
            mask = max_pool2d(mask, 2 * self.dilation + 1, stride=1, padding=self.dilation)
        return BoundMaskedBlend(background=batch.backgrounds, mask=mask, start=self.start, stop=self.stop)
