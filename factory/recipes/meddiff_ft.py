"""`meddiff_ft`: Xie et al. 2025, lesions painted into real backgrounds by a model fine-tuned on thirty pairs."""

from factory.curation.filters import BlankImage, DegenerateMask, SimilarityBand
from factory.diffusion.masked_blend import MaskedBlend
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextAndInpaint, TextOnly
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.recipes.recipe import Recipe
from factory.sources.backgrounds import RealNormals
from factory.sources.mask_models import MaskDiffusion
from factory.sources.trigger import TriggerWord
from factory.synthesis.eroded_mask import ErodedMask
from factory.training.masked_denoising import MaskedDenoising
from factory.training.objectives import NoisePrediction
from factory.training.settings import TrainingSettings

_PAPER = "Xie et al. 2025, MedDiff-FT: Data-Efficient Diffusion Model Fine-tuning with Structural Guidance"


def meddiff_ft() -> Recipe:
    """SD-1.5 with a trigger word and a loss inside the lesion only, 30 pairs, 512 px (the paper's method).

    Stated in the paper: trigger "An image of hta", batch 2, 2,000 iterations, about 30 pairs, the masked objective
    (Eq. 1), guided inference that keeps the background (Eq. 2, corrected: see `MaskedBlend`), masks from a DDPM,
    similarity filter, erosion of the label. The learning rate is that of the authors' code. Backgrounds: images
    without a lesion where the dataset has them, else `--backgrounds` `healed-lesions` made by `factory heal`. Rows
    keep pixels of a patient: they are marked `derived`.
    """
    return Recipe(
        name="meddiff_ft",
        paper=_PAPER,
        summary="lesions painted into real backgrounds; fine-tuned on 30 pairs inside the lesion only",
        generator=LatentDiffusion(
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            conditioning=TextOnly(),
            trainable=Trainable(unet="full"),
            resolution=512,
        ),
        objectives=(MaskedDenoising(),),
        training=TrainingSettings(
            max_steps=2000,
            batch_size=2,
            learning_rate=3e-6,
            warmup_steps=0,
            ema_decay=0.0,
            prompt_dropout=0.0,
            horizontal_flip=True,
            max_rows=30,
        ),
        masks=MaskDiffusion(),
        prompts=TriggerWord(),
        backgrounds=RealNormals(),
        sampling=Sampling(noise_scheduler="ddim", num_inference_steps=50, guidance_scale=1.0),
        guidances=(MaskedBlend(),),
        annotator=ErodedMask(),
        filters=(DegenerateMask(), BlankImage(), SimilarityBand(region="lesion")),
    )


def meddiff_inpaint() -> Recipe:
    """The same with SD's 9-channel inpainting model and the loss over the whole image (the authors' code).

    From the code: the inpainting checkpoint sees the noisy latents, the mask and the latents of the image without
    the lesion; unmasked loss; effective batch 2, 500 steps at 3e-6, horizontal flips, prompt "a photo of hta".
    """
    return Recipe(
        name="meddiff_inpaint",
        paper=_PAPER + " (the authors' code)",
        summary="lesions painted into real backgrounds by a 9-channel inpainting model, 30 pairs",
        generator=LatentDiffusion(
            base="stable-diffusion-v1-5/stable-diffusion-inpainting",
            conditioning=TextAndInpaint(),
            trainable=Trainable(unet="full"),
            resolution=512,
        ),
        objectives=(NoisePrediction(),),
        training=TrainingSettings(
            max_steps=500,
            batch_size=2,
            learning_rate=3e-6,
            warmup_steps=0,
            ema_decay=0.0,
            prompt_dropout=0.0,
            horizontal_flip=True,
            max_rows=30,
        ),
        masks=MaskDiffusion(),
        prompts=TriggerWord(prompt="a photo of hta"),
        backgrounds=RealNormals(),
        sampling=Sampling(noise_scheduler="ddim", num_inference_steps=50, guidance_scale=1.0),
        guidances=(MaskedBlend(),),
        annotator=ErodedMask(),
        filters=(DegenerateMask(), BlankImage(), SimilarityBand(region="lesion")),
    )
