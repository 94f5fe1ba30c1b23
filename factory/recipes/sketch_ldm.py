"""`sketch_ldm`: Chen et al. 2025, generative augmentation for long-tailed breast ultrasound."""

from factory.curation.filters import BlankImage, SimilarityBand
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import ClassLabel
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.recipes.recipe import Recipe
from factory.sources.prompts import LabelPrompt
from factory.training.objectives import NoisePrediction
from factory.training.settings import TrainingSettings
from factory.training.sketch_perception import SketchPerception


def sketch_ldm() -> Recipe:
    """Class-conditional latent diffusion with a sketch branch on the denoiser's encoder, 256 px; images without masks.

    Stated in the paper: 256 px, f = 8 latents, AdamW at 1e-4, 200 epochs, λ = .1. Not stated, chosen here after
    the work it builds on: the SD-1.5 UNet with a class embedding, the empty prompt, batch 64, 500 warm-up steps; a
    null class, without which guidance over the class is impossible; the weighting √ᾱ_t where the paper prints √α_t,
    which is almost constant; a class-balanced sketch loss. 200 epochs of 546 images at batch 64 are 1,800 updates.
    """
    return Recipe(
        name="sketch_ldm",
        paper="Chen et al. 2025, Subtyping Breast Lesions via Generative Augmentation based Long-tailed Recognition in Ultrasound",
        summary="class-conditional latent diffusion with a sketch branch in training; for classification, no masks",
        generator=LatentDiffusion(
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            conditioning=ClassLabel(),
            trainable=Trainable(unet="full"),
            resolution=256,
        ),
        objectives=(NoisePrediction(), SketchPerception(weight=0.1)),
        training=TrainingSettings(
            max_steps=1800,
            batch_size=64,
            gradient_accumulation_steps=4,
            learning_rate=1e-4,
            warmup_steps=500,
            ema_decay=0.999,
            prompt_dropout=0.1,
        ),
        masks=None,
        prompts=LabelPrompt(template=""),
        sampling=Sampling(noise_scheduler="dpmpp_2m", num_inference_steps=25, guidance_scale=3.0),
        annotator=None,
        filters=(BlankImage(), SimilarityBand()),
    )
