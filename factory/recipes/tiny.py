"""`tiny`: the machine at a width that runs on two CPU cores in minutes, on the shipped base checkpoint."""

from factory.curation.filters import BlankImage, DegenerateMask, SimilarityBand
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextAndMask
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.recipes.recipe import Recipe
from factory.sources.masks import DeformedEllipse
from factory.sources.prompts import BiradsTemplate
from factory.training.settings import TrainingSettings


def tiny() -> Recipe:
    """Text and mask ControlNet at 128 px: the classes of `clinical_prior` at tiny width."""
    return Recipe(
        name="tiny",
        paper="after Pan et al. 2025 (clinical prior), at tiny width",
        summary="text + mask ControlNet at 128 px on the shipped base; for the demo, tests and CPU machines",
        generator=LatentDiffusion(
            base="tiny",
            conditioning=TextAndMask(),
            trainable=Trainable(unet="lora", controlnet=True, lora_rank=8),
            resolution=128,
        ),
        training=TrainingSettings(
            max_steps=300,
            batch_size=8,
            learning_rate=1e-3,
            warmup_steps=20,
            ema_decay=0.98,
            prompt_dropout=0.1,
            checkpoint_every=100,
            sample_every=300,
        ),
        masks=DeformedEllipse(),
        prompts=BiradsTemplate(),
        sampling=Sampling(noise_scheduler="ddim", num_inference_steps=20, guidance_scale=2.0),
        filters=(DegenerateMask(), BlankImage(), SimilarityBand()),
    )
