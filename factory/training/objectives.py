"""What training minimises: objectives give a loss per image of one denoising step.

An objective is a component of a recipe: a frozen dataclass, numpy at most on import, with a `weight`, what it
`needs` of a training row beside the image, and `bind(context)`, which gives the torch module that computes its
loss, with whatever weights of its own that has. The learner sums the weighted losses per image and averages over
the global batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from factory.training.bound_objective import BoundObjective


PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True, kw_only=True)
class PredictionStep:
    """One evaluation of the denoiser on noised latents: all an objective can look at.

    Attributes:
        latents: clean latents x_0, float (B, C, h, w).
        noise: ε, float (B, C, h, w).
        timesteps: t, int64 (B,).
        alphas_cumprod: ᾱ of every timestep of the noise scheduler, float (T,).
        prediction_type: what `model_pred` stands for, "epsilon" or "v_prediction".
        model_pred: the denoiser's output, float (B, C, h, w).
        timestep_weights: weight of each image's timestep, float (B,); ones unless min-SNR is on.
        masks: label maps at image resolution, uint8 (B, R, R), or None.
        labels: class numbers, int64 (B,), −1 where the class was dropped; or None.
        prompts: rows of the prompt table, int64 (B,), 0 where the prompt was dropped; or None.
        extras: further columns that an objective needs, by name; "sketches" is uint8 (B, R, R).
    """

    latents: "Tensor"
    noise: "Tensor"
    timesteps: "Tensor"
    alphas_cumprod: "Tensor"
    prediction_type: str
    model_pred: "Tensor"
    timestep_weights: "Tensor"
    masks: "Tensor | None" = None
    labels: "Tensor | None" = None
    prompts: "Tensor | None" = None
    extras: "Mapping[str, Tensor]" = field(default_factory=dict)

    @property
    def alpha_bar(self) -> "Tensor":
        """ᾱ_t of each image, (B, 1, 1, 1)."""
        return self.alphas_cumprod[self.timesteps].reshape(-1, 1, 1, 1)

    @property
    def noisy_latents(self) -> "Tensor":
        """x_t = √ᾱ x_0 + √(1 - ᾱ) ε, (B, C, h, w)."""
        return add_noise(self.latents, self.noise, self.alpha_bar)

    def target(self) -> "Tensor":
        """What `model_pred` should be: ε, or v = √ᾱ ε - √(1 - ᾱ) x_0 (Salimans & Ho 2022, Eq. 10)."""
        if self.prediction_type == "epsilon":
            return self.noise
        return self.alpha_bar.sqrt() * self.noise - (1 - self.alpha_bar).sqrt() * self.latents

    def predicted_noise(self) -> "Tensor":
        """ε as the model sees it: √ᾱ v + √(1 - ᾱ) x_t where it predicts v."""
        if self.prediction_type == "epsilon":
            return self.model_pred
        return self.alpha_bar.sqrt() * self.model_pred + (1 - self.alpha_bar).sqrt() * self.noisy_latents

    def predicted_latents(self) -> "Tensor":
        """x_0 as the model sees it: (x_t - √(1 - ᾱ) ε) / √ᾱ."""
        if self.prediction_type == "epsilon":
            return (
                self.noisy_latents - (1 - self.alpha_bar).sqrt() * self.model_pred
            ) / self.alpha_bar.sqrt()
        return self.alpha_bar.sqrt() * self.noisy_latents - (1 - self.alpha_bar).sqrt() * self.model_pred


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingContext:
    """What an objective may know before training begins.

    Attributes:
        generator: the `LoadedGenerator` that is trained.
        prompts: the prompt table; row 0 is the null prompt.
        resolution: side of the images, px.
        seed: of weights that the objective starts at random.
    """

    generator: Any
    prompts: Sequence[str]
    resolution: int
    seed: int


class Objective(Protocol):
    """What a recipe holds."""

    @property
    def weight(self) -> float: ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns of a training row beside its image: "masks", "sketches"."""
        ...

    def bind(self, context: TrainingContext) -> "BoundObjective": ...


@dataclass(frozen=True, kw_only=True)
class NoisePrediction:
    """Mean squared error of the prediction, in the noise scheduler's own prediction type.

    Papers 000-004 all use the ε form (001 Eq. 5); v is Salimans & Ho 2022.

    Attributes:
        weight: factor in the sum of objectives.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"objectives.NoisePrediction.weight: want a positive number, got {self.weight}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def bind(self, context: TrainingContext) -> "BoundObjective":
        from factory.training.bound_objective import StepObjective

        return StepObjective(self.loss)

    def loss(self, step: PredictionStep) -> "Tensor":
        """Timestep-weighted MSE of each image, float (B,); computed in fp32."""
        error = (step.model_pred.float() - step.target().float()).square()
        return step.timestep_weights * error.mean(dim=(1, 2, 3))


def add_noise(latents: "Tensor", noise: "Tensor", alpha_bar: "Tensor") -> "Tensor":
    """x_t = √ᾱ x_0 + √(1 - ᾱ) ε for ᾱ (B,) or (B, 1, 1, 1)."""
    alpha_bar = alpha_bar.reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def min_snr_weights(
    alphas_cumprod: "Tensor", timesteps: "Tensor", gamma: float, prediction_type: str
) -> "Tensor":
    """Loss weight of each timestep, float (B,): min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v.

    Hang et al. 2023, Eq. 8; SNR = ᾱ / (1 - ᾱ).
    """
    alpha_bar = alphas_cumprod[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor
