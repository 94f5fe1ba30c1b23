"""Write tests/golden/denoise.json: sums over a short denoising loop for every noise schedule.

    python tests/golden/regenerate_denoise.py

Run it only when a change is meant to alter the numbers, and say in the commit why.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

GOLDEN = Path(__file__).with_name("denoise.json")


def loop_sums() -> dict[str, dict[str, float]]:
    """Sum, sum of magnitudes and two corner values of the latents after six steps of each schedule."""
    from diffusers import DDPMScheduler

    from factory.assets.base_models import build_models, save_tokenizer
    from factory.diffusion.conditions import Conditions
    from factory.diffusion.denoise import denoise, make_noise_scheduler
    from factory.diffusion.sampling import Sampling
    from factory.generators.loaded import Denoiser

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, unet, _ = build_models("micro", save_tokenizer(Path(folder), 32))
    denoiser = Denoiser(unet.eval(), None)
    config = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn((2, 4, 8, 8), generator=rng)
    embeds = torch.randn((2, 32, 16), generator=rng)
    null = torch.randn((1, 32, 16), generator=rng)
    conditions = Conditions(prompt_embeds=embeds)
    unconditional = Conditions(prompt_embeds=null.expand_as(embeds))
    sums = {}
    for name in ("ddim", "dpmpp_2m", "unipc", "euler"):
        sampling = Sampling(noise_scheduler=name, num_inference_steps=6)
        latents = denoise(
            denoiser, make_noise_scheduler(sampling, config), noise, conditions, unconditional,
            num_inference_steps=6, guidance_scale=2.5, guidance_start=0.2, guidance_stop=0.8,
        )  # fmt: skip
        sums[name] = {
            "sum": latents.sum().item(),
            "magnitude": latents.abs().sum().item(),
            "first": latents[0, 0, 0, 0].item(),
            "last": latents[-1, -1, -1, -1].item(),
        }
    return sums


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    GOLDEN.write_text(json.dumps(loop_sums(), indent=2) + "\n")
    print(f"wrote {GOLDEN}")
