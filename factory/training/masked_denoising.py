"""The denoising loss inside, or outside, the lesion only: Xie et al. 2025 (MedDiff-FT), Eq. 1, in latents."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from factory.training.objectives import PredictionStep, TrainingContext

if TYPE_CHECKING:
    from torch import Tensor

    from factory.training.bound_objective import BoundObjective


@dataclass(frozen=True, kw_only=True)
class MaskedDenoising:
    """Squared error of the prediction over one region of the mask, so that thirty images suffice to learn a lesion.

    Xie et al. 2025, Eq. 1: w_t ‖M ⊙ (x̂_0 − x_0)‖². Deviates, since training is in latents and the paper leaves the
    norm and w_t open: M is reduced to latent cells by the function that inference uses (`latent_masks`); the error
    is that of the model's own prediction (ε or v), whose weighting of the timesteps is the usual one; and it is
    divided by the region's area, without which small lesions count for nothing. Outside the region the gradient
    is exactly 0 unless `background_weight` is set.

    Attributes:
        weight: factor in the sum of objectives.
        region: "lesion" learns what lies under the mask; "background" what does not, which is the generator that
            heals lesions away (§2.1 of the paper, inverted mask).
        background_weight: weight of the mean error of the other region; .05 … .1 helps against seams.
        normalise: "area" divides by the cells of the region, at least `min_cells`; "paper" by those of the frame.
        min_cells: least divisor, latent cells: one cell shall not weigh as much as a lesion.
        form: "prediction" is the error of ε or v; "paper" that of x̂_0 with w_t = 1, which is the ε error times
            (1 − ᾱ) / ᾱ and is ruled by the noisiest timesteps.
    """

    weight: float = 1.0
    region: Literal["lesion", "background"] = "lesion"
    background_weight: float = 0.0
    normalise: Literal["area", "paper"] = "area"
    min_cells: int = 16
    form: Literal["prediction", "paper"] = "prediction"

    def __post_init__(self) -> None:
        name = "objectives.MaskedDenoising"
        if not self.weight > 0:
            raise ValueError(f"{name}.weight: want a positive number, got {self.weight}")
        if self.region not in ("lesion", "background"):
            raise ValueError(f"{name}.region={self.region!r}: want lesion or background")
        if not 0 <= self.background_weight <= 1:
            raise ValueError(f"{name}.background_weight: want 0 … 1, got {self.background_weight}")
        if self.normalise not in ("area", "paper") or self.form not in ("prediction", "paper"):
            raise ValueError(
                f"{name}: want normalise area or paper and form prediction or paper, got {self.normalise!r}, "
                f"{self.form!r}"
            )
        if self.min_cells < 1:
            raise ValueError(f"{name}.min_cells: want 1 or more latent cells, got {self.min_cells}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Masks; and to learn lesions, rows that have one."""
        return ("masks", "lesions") if self.region == "lesion" else ("masks",)

    def bind(self, context: TrainingContext) -> "BoundObjective":
        from factory.training.bound_objective import StepObjective

        return StepObjective(self.loss)

    def loss(self, step: PredictionStep) -> "Tensor":
        """Timestep-weighted loss of each image, float (B,); 0 where the region is empty.

        Raises:
            ValueError: the step has no masks.
        """
        from factory.diffusion.latent_masks import latent_masks

        if step.masks is None:
            raise ValueError("objectives.MaskedDenoising: the training rows have no masks")
        if self.form == "paper":
            wrong = step.predicted_latents().float() - step.latents.float()
        else:
            wrong = step.model_pred.float() - step.target().float()
        error = wrong.square().mean(dim=1, keepdim=True)  # over channels: (B, 1, h, w)
        region = latent_masks(step.masks.to(error.device), error.shape[-1])
        if self.region == "background":
            region = 1 - region
        loss = self._mean(error, region)
        if self.background_weight:
            loss = loss + self.background_weight * self._mean(error, 1 - region)
        return step.timestep_weights * loss

    def _mean(self, error: "Tensor", region: "Tensor") -> "Tensor":
        total = (error * region).sum(dim=(1, 2, 3))
        if self.normalise == "paper":
            return total / error[0].numel()
        return total / region.sum(dim=(1, 2, 3)).clamp(min=self.min_cells)
