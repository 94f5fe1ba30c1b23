"""Write tests/golden/guidance.json: sums over a short denoising loop under each guidance, and the mask it annotates.

python tests/golden/regenerate_guidance.py
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

GOLDEN = Path(__file__).with_name("guidance.json")


def guided_sums() -> dict[str, dict[str, float]]:
    """Sums of the latents after six steps, by guidance; "attention_otsu" is of the levels it reads at the end."""
    from attention_batch import make_batch, make_latents, make_unet
    from diffusers import DDIMScheduler

    from factory.diffusion.conditions import Conditions
    from factory.diffusion.denoise import denoise
    from factory.diffusion.guidance import Guidance
    from factory.diffusion.layout_guidance import LayoutGuidance
    from factory.diffusion.masked_blend import MaskedBlend
    from factory.synthesis.attention_annotator import AttentionOtsu

    batch = make_batch(make_unet(), 2)
    rng = torch.Generator().manual_seed(9)
    batch = replace(batch, backgrounds=torch.randn((2, 2, 8, 8), generator=rng))
    null = Conditions(prompt_embeds=torch.zeros_like(batch.conditions.prompt_embeds))

    def loop(guidances: list[Guidance]) -> torch.Tensor:
        return denoise(
            batch.denoiser,
            DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
            ),
            make_latents(2),
            batch.conditions,
            null,
            num_inference_steps=6,
            guidance_scale=2.0,
            guidances=guidances,
            rngs=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        )

    layout = LayoutGuidance(cross_side=4, self_side=8)
    paper = replace(layout, cross_form="paper", self_reduction="paper", schedule="constant")
    annotator = AttentionOtsu(cross_side=4, self_side=8, max_area=1.0).bind(batch)
    latents = {
        "layout": loop([layout.bind(batch)]),
        "layout_paper": loop([paper.bind(batch)]),
        "masked_blend": loop([MaskedBlend().bind(batch)]),
        "attention_otsu": loop(list(annotator.hooks)),
    }
    masks = [annotator.annotate(i, torch.zeros(32, 32).numpy()) for i in range(2)]
    sums = {
        name: {
            "sum": value.sum().item(),
            "magnitude": value.abs().sum().item(),
            "first": value[0, 0, 0, 0].item(),
            "last": value[-1, -1, -1, -1].item(),
        }
        for name, value in latents.items()
    }
    sums["attention_otsu"]["area"] = float(sum(0 if mask is None else int(mask.sum()) for mask in masks))
    return sums


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests" / "diffusion")]
    GOLDEN.write_text(json.dumps(guided_sums(), indent=2) + "\n")
    print(f"wrote {GOLDEN}")
