"""`clinical_prior`: Pan et al. 2025, clinical-prior-guided tumour generation with cross-domain adaptation."""

from factory.curation.filters import BlankImage, DegenerateMask, SimilarityBand
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextAndMask
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.recipes.recipe import Recipe
from factory.sources.masks import DeformedEllipse
from factory.sources.prompts import BiradsTemplate
from factory.training.settings import TrainingSettings


def clinical_prior() -> Recipe:
    """SD-1.5 + mask ControlNet, BI-RADS prompts, elastically deformed ellipses, 512 px.

    Stated in the paper: base, resolution, effective batch 64, AdamW at 1e-4 after 500 warm-up steps, 200
    epochs (1,400 updates on 396 images, so `max_steps=1400`). Not stated, chosen here: which weights train
    (UNet and ControlNet jointly; `--generator.trainable.unet frozen` trains the ControlNet alone), EMA, prompt
    dropout, noise scheduler, steps and guidance scale. A new domain: `factory train --adapt-from … --lora-rank 8`.
    """
    return Recipe(
        name="clinical_prior",
        paper="Pan et al. 2025, Clinical Prior-Guided Tumor Generation for Breast Ultrasound, MICCAI",
        summary="SD-1.5 + mask ControlNet, BI-RADS prompts, deformed-ellipse masks; LoRA for a new domain",
        generator=LatentDiffusion(
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            conditioning=TextAndMask(),
            trainable=Trainable(unet="full", controlnet=True),
            resolution=512,
        ),
        training=TrainingSettings(
            max_steps=1400,
            batch_size=64,
            gradient_accumulation_steps=8,
            learning_rate=1e-4,
            warmup_steps=500,
            ema_decay=0.999,
            prompt_dropout=0.1,
        ),
        masks=DeformedEllipse(),
        prompts=BiradsTemplate(),
        sampling=Sampling(noise_scheduler="dpmpp_2m", num_inference_steps=25, guidance_scale=5.0),
        filters=(DegenerateMask(), BlankImage(), SimilarityBand()),
    )
