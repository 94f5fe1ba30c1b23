"""The VAE stage: fine-tuning a generator's autoencoder before the generator itself. No torch."""

from dataclasses import dataclass, field

from factory.training.settings import TrainingSettings

PAPER_KL_WEIGHT = 1.0
"""The unweighted sum of Pan et al. 2025, Medical Image Analysis, Eq. 6."""


def _default_training() -> TrainingSettings:
    return TrainingSettings(
        max_steps=2000,
        batch_size=8,
        learning_rate=1e-5,
        warmup_steps=100,
        prompt_dropout=0.0,
        validate_every=100,
    )


@dataclass(frozen=True, kw_only=True)
class VAEStage:
    """Mean squared error plus `kl_weight` times the KL of the posterior (Pan et al. 2025, Medical Image Analysis, Eq. 4–6).

    The error is the mean over pixels, the KL the sum over the latent's numbers (nats per image). The paper adds them
    without a weight (`kl_weight=1`): the KL then outweighs the error by orders of magnitude and the latents
    collapse to noise, so the default is 1e-6, as in latent diffusion. Neither steps nor learning rate are stated.

    The scaling factor of the latents is kept, since the UNet upon which training goes on has been trained with it; the
    standard deviation of the scaled latents of held-out images (`val_latent_std`, about 1 as shipped) is
    logged, so that a drift is seen.

    Attributes:
        kl_weight: of the KL.
        training: optimisation; `prompt_dropout`, `min_snr_gamma` and `compile` have no meaning here.
    """

    kl_weight: float = 1e-6
    training: TrainingSettings = field(default_factory=_default_training)

    def __post_init__(self) -> None:
        if not self.kl_weight >= 0:
            raise ValueError(f"vae_stage.kl_weight: want 0 or more, got {self.kl_weight}")
        if self.training.min_snr_gamma is not None or self.training.compile:
            raise ValueError(
                "vae_stage.training: min_snr_gamma and compile are of the generator; leave them unset"
            )
