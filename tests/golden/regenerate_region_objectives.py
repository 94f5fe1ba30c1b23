"""Losses of the first five training steps of a tiny UNet with each objective that looks at a region or inside.

python tests/golden/regenerate_region_objectives.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

NAMES = ("masked_denoising", "region_attention", "sketch_perception")


def five_losses(name: str) -> dict[str, list[float]]:
    """Every metric of steps 0 … 4, for the default form and for the papers'."""
    from factory.training.masked_denoising import MaskedDenoising
    from factory.training.objectives import NoisePrediction
    from factory.training.region_attention import RegionAttention
    from factory.training.sketch_perception import SketchPerception

    words = (("hta", "inside"), ("image", "outside"))
    forms: dict[str, tuple[Any, ...]] = {
        "masked_denoising": (
            (MaskedDenoising(background_weight=0.05),),
            (MaskedDenoising(region="background", normalise="paper", form="paper"),),
        ),
        "region_attention": (
            (NoisePrediction(), RegionAttention(side=4, tokens=words)),
            (NoisePrediction(), RegionAttention(side=4, tokens=words, form="paper")),
        ),
        "sketch_perception": (
            (NoisePrediction(), SketchPerception(channels=16)),
            (NoisePrediction(), SketchPerception(channels=16, loss="paper", timestep_weight="paper")),
        ),
    }
    out = {}
    for kind, objectives in zip(("default", "paper"), forms[name]):
        learner, batches = make_learner(objectives)
        metrics = [learner.step(batch) for batch in batches]
        for key in metrics[0]:
            out[f"{kind}.{key}"] = [float(m[key]) for m in metrics]
    return out


def make_learner(objectives: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    from diffusers import UNet2DConditionModel

    from factory.assets.base_models import TINY_UNET
    from factory.diffusion.conditions import Conditions
    from factory.generators.loaded import Denoiser
    from factory.training.examples import Examples, Latents
    from factory.training.learners import DiffusionLearner
    from factory.training.mixture import BatchSampler, global_batch
    from factory.training.objectives import TrainingContext
    from factory.training.settings import TrainingSettings
    from factory.training.world import World

    def conditions(embeds: torch.Tensor, **_: object) -> Conditions:
        return Conditions(prompt_embeds=embeds)

    def token_positions(prompts: Sequence[str], word: str) -> list[list[int]]:
        return [[1 + prompt.split().index(word)] if word in prompt else [] for prompt in prompts]

    settings = TrainingSettings(
        max_steps=5, batch_size=4, learning_rate=1e-3, warmup_steps=2, prompt_dropout=0.0
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**TINY_UNET, "block_out_channels": [16, 32], "attention_head_dim": 4})
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(6, 8, 8, 8)).astype(np.float16)
    masks = [np.pad(np.ones((24, 30 + k), np.uint8), ((8 + k, 32 - k), (10, 24 - k))) for k in range(6)]
    sketches = [np.uint8(255) * (rng.random((64, 64)) < 0.1).astype(np.uint8) for _ in range(6)]
    learner = DiffusionLearner(
        denoiser=Denoiser(unet, None),
        examples=Examples(
            latents=Latents(mean=latents, logvar=np.full_like(latents, -8)),
            prompts=np.ones(6, np.int64),
            masks=masks,
            extras={"sketches": sketches},
            num_timesteps=1000,
        ),
        prompt_embeds=torch.from_numpy(rng.normal(size=(2, 7, 64)).astype(np.float32)),
        conditions=conditions,
        alphas_cumprod=torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0),
        prediction_type="epsilon",
        objectives=objectives,
        context=TrainingContext(
            generator=SimpleNamespace(
                unet=unet, latent_shape=(8, 8, 8), num_prompt_tokens=7, token_positions=token_positions
            ),
            prompts=("", "An image of hta"),
            resolution=64,
            seed=3,
        ),
        settings=settings,
        world=World(),
    )
    sampler = BatchSampler(num_rows=6, batch_size=4)
    return learner, [learner.draw(global_batch(sampler, step)) for step in range(5)]


if __name__ == "__main__":
    for name in NAMES:
        path = Path(__file__).with_name(f"{name}.json")
        path.write_text(json.dumps(five_losses(name), indent=2) + "\n")
        print(f"wrote {path}")
