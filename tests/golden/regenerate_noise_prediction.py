"""Losses of the first five training steps of a tiny UNet with ControlNet, for golden comparison.

python tests/golden/regenerate_noise_prediction.py
"""

import json
from pathlib import Path

import numpy as np
import torch


def five_losses() -> dict[str, list[float]]:
    """Loss and gradient norm of steps 0 … 4, by prediction type."""
    from diffusers import UNet2DConditionModel

    from factory.assets.base_models import TINY_UNET
    from factory.diffusion.conditions import Conditions
    from factory.generators.loaded import Denoiser, controlnet_from_unet
    from factory.training.examples import Examples, Latents
    from factory.training.learners import DiffusionLearner
    from factory.training.mixture import BatchSampler, global_batch
    from factory.training.objectives import NoisePrediction
    from factory.training.settings import TrainingSettings
    from factory.training.world import World

    def conditions(embeds: torch.Tensor, *, masks: torch.Tensor, **_: object) -> Conditions:
        return Conditions(prompt_embeds=embeds, controlnet_cond=masks[:, None].float())

    out = {}
    for prediction_type in ("epsilon", "v_prediction"):
        settings = TrainingSettings(
            max_steps=5,
            batch_size=4,
            learning_rate=1e-3,
            warmup_steps=2,
            prompt_dropout=0.3,
            min_snr_gamma=5.0,
        )
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**{**TINY_UNET, "block_out_channels": [16, 32], "attention_head_dim": 4})
        controlnet = controlnet_from_unet(unet, conditioning_channels=1, factor=8, seed=1)
        rng = np.random.default_rng(0)
        latents = rng.normal(size=(6, 8, 8, 8)).astype(np.float16)
        masks = [(rng.random((64, 64)) < 0.3).astype(np.uint8) for _ in range(6)]
        learner = DiffusionLearner(
            denoiser=Denoiser(unet, controlnet),
            examples=Examples(
                latents=Latents(mean=latents, logvar=np.full_like(latents, -8)),
                prompts=np.array([1, 2, 1, 2, 1, 2]),
                masks=masks,
                num_timesteps=1000,
                prompt_dropout=settings.prompt_dropout,
            ),
            prompt_embeds=torch.from_numpy(rng.normal(size=(3, 7, 64)).astype(np.float32)),
            conditions=conditions,
            alphas_cumprod=torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0),
            prediction_type=prediction_type,
            objectives=(NoisePrediction(),),
            settings=settings,
            world=World(),
        )
        sampler = BatchSampler(num_rows=6, batch_size=4)
        metrics = [learner.step(learner.draw(global_batch(sampler, step))) for step in range(5)]
        for name in ("loss", "grad_norm"):
            out[f"{prediction_type}.{name}"] = [m[name].item() for m in metrics]
    return out


if __name__ == "__main__":
    path = Path(__file__).with_name("noise_prediction.json")
    path.write_text(json.dumps(five_losses(), indent=2) + "\n")
    print(f"wrote {path}")
