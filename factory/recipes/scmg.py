"""`scmg`: Pan et al. 2025 (Medical Image Analysis), semantic-curvature mask generator and text-guided ControlNet."""

from factory.curation.filters import BlankImage, DegenerateMask, SimilarityBand
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextAndMask
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.recipes.recipe import Recipe
from factory.sources.mask_models import CurvatureGAN
from factory.sources.prompts import BiradsTemplate
from factory.training.settings import TrainingSettings


def scmg() -> Recipe:
    """Masks by a GAN conditioned on class, box and curvature; text + ControlNet at 256 px; fine-tuned autoencoder.

    Stated in the paper: 256 px, effective batch 128, 200 epochs, AdamW at 1e-4; shape words are left out of the
    prompt, since the mask carries the shape. Three parts are trained, each by `factory train --part`: the
    autoencoder (`vae`, then given by `--generator.vae`), the mask generator (`mask_gan`, then given by
    `--masks.checkpoint`) and the image generator. 200 epochs of 1,600 images at batch 128 are 2,500 updates.
    """
    return Recipe(
        name="scmg",
        paper="Pan et al. 2025, Semantic-Curvature Mask Generator and text-guided ultrasound synthesis, MedIA",
        summary="masks from a curvature-aware GAN, text + mask ControlNet at 256 px, fine-tuned autoencoder",
        generator=LatentDiffusion(
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            conditioning=TextAndMask(),
            trainable=Trainable(unet="full", controlnet=True),
            resolution=256,
        ),
        training=TrainingSettings(
            max_steps=2500,
            batch_size=128,
            gradient_accumulation_steps=8,
            learning_rate=1e-4,
            warmup_steps=500,
            ema_decay=0.999,
            prompt_dropout=0.1,
        ),
        masks=CurvatureGAN(),
        prompts=BiradsTemplate(
            template="breast ultrasound image, {label}, {echogenicity} echogenicity, {boundary} boundary",
            template_without_lesion="breast ultrasound image, {label}",
        ),
        sampling=Sampling(noise_scheduler="dpmpp_2m", num_inference_steps=25, guidance_scale=5.0),
        filters=(DegenerateMask(), BlankImage(), SimilarityBand()),
    )
