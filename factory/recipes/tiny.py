"""Recipes at a width that runs on two CPU cores in minutes, on the shipped base checkpoint."""

import dataclasses
from typing import Any

from factory.diffusion.layout_guidance import LayoutGuidance
from factory.diffusion.sampling import Sampling
from factory.generators.latent_diffusion import Trainable
from factory.generators.mask_diffusion import MaskDDPM
from factory.generators.mask_gan import MaskGAN
from factory.generators.mask_training import MaskModelTraining
from factory.recipes.clinical_prior import clinical_prior
from factory.recipes.recipe import Recipe
from factory.sources.mask_models import CurvatureGAN, MaskDiffusion
from factory.synthesis.attention_annotator import AttentionOtsu
from factory.training.region_attention import RegionAttention
from factory.training.settings import TrainingSettings

RESOLUTION = 128
ATTENTION_SIDE = 16
"""Side of the larger attention maps that the shipped base has at 128 px."""
LAYOUT_ETA = 2000.0
"""Step length of the layout guidance: gradients in the shipped base's latents are that much smaller."""


def tiny() -> Recipe:
    """`clinical_prior` at tiny width: what `factory demo` runs."""
    recipe = at_tiny_width(clinical_prior())
    return dataclasses.replace(
        recipe,
        name="tiny",
        summary="text + mask ControlNet at 128 px on the shipped base; for the demo, tests and CPU machines",
    )


def at_tiny_width(recipe: Recipe) -> Recipe:
    """The same components on the shipped base at 128 px, as NAME_tiny: to try a method, not for its images.

    Settings that are tied to a size change with it: attention sides, the step of the layout guidance, mask models,
    steps, and the learning rate.
    """
    generator = recipe.generator
    unet = "lora" if generator.conditioning.uses_mask else "full"  # beside a ControlNet, adapters are enough
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}_tiny",
        paper=f"after {recipe.paper}; at tiny width",
        summary=f"{recipe.name} at 128 px on the shipped base; to try it on a CPU",
        generator=dataclasses.replace(
            generator,
            base="tiny",
            resolution=RESOLUTION,
            trainable=Trainable(unet=unet, controlnet=generator.trainable.controlnet, lora_rank=8),  # type: ignore[arg-type]
        ),
        objectives=tuple(_sized(item) for item in recipe.objectives),
        training=TrainingSettings(
            max_steps=300,
            batch_size=8,
            learning_rate=1e-3 if unet == "lora" else 3e-4,
            warmup_steps=20,
            ema_decay=0.98,
            prompt_dropout=recipe.training.prompt_dropout,
            horizontal_flip=recipe.training.horizontal_flip,
            max_rows=recipe.training.max_rows,
            checkpoint_every=100,
            sample_every=300,
        ),
        masks=_sized(recipe.masks),
        sampling=Sampling(
            noise_scheduler="ddim",
            num_inference_steps=20,
            guidance_scale=min(2.0, recipe.sampling.guidance_scale),
        ),
        guidances=tuple(_sized(item) for item in recipe.guidances),
        annotator=_sized(recipe.annotator),
    )


def _sized(component: Any) -> Any:
    """A component with the sizes of the shipped base."""
    if isinstance(component, RegionAttention):
        return dataclasses.replace(component, side=ATTENTION_SIDE)
    if isinstance(component, LayoutGuidance):
        return dataclasses.replace(
            component, cross_side=ATTENTION_SIDE, self_side=ATTENTION_SIDE, eta=LAYOUT_ETA
        )
    if isinstance(component, AttentionOtsu):
        return dataclasses.replace(component, cross_side=ATTENTION_SIDE, self_side=ATTENTION_SIDE)
    if isinstance(component, CurvatureGAN):
        training = MaskModelTraining(
            max_steps=400, batch_size=16, checkpoint_every=100, sample_every=200, ema_decay=0.98
        )
        model = MaskGAN(
            resolution=64,
            channels=96,
            noise_dim=32,
            min_channels=16,
            spade_hidden=16,
            discriminator_channels=16,
            training=training,
        )
        return dataclasses.replace(component, model=model)
    if isinstance(component, MaskDiffusion):
        training = MaskModelTraining(
            max_steps=600,
            batch_size=16,
            learning_rate=1e-3,
            adam_betas=(0.9, 0.999),
            checkpoint_every=200,
            sample_every=300,
            ema_decay=0.98,
        )
        model_of_masks = MaskDDPM(
            resolution=32,
            channels=(16, 32, 32),
            layers_per_block=1,
            norm_groups=8,
            num_inference_steps=25,
            training=training,
        )
        return dataclasses.replace(component, model=model_of_masks)
    return component
