"""Does `RegionAttention` teach a word where it belongs? On dermoscopy phantoms that the shipped base has never seen.

    python benchmarks/region_attention.py --steps 150

The same UNet is trained from the same start on the same batches and noise: by the prediction error alone, with
`RegionAttention` (default form), and with its paper form. On held-out images, noised at fixed timesteps, the cross-attention of
<lesion> is cut by Otsu's threshold and compared with the mask at the map's resolution. Reported: mean IoU, the IoU
with another image's mask (what a map that ignores the image would reach), the IoU before training, and the held-out
prediction error.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from measure import save
from torch import Tensor

from factory.datasets.skin_phantom import SkinSample, skin_sample
from factory.diffusion.attention import capture, select_layers
from factory.diffusion.attention_maps import min_max, token_weights
from factory.diffusion.latent_masks import latent_masks
from factory.generators.conditioning import TextOnly
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.synthesis.attention_annotator import otsu_threshold
from factory.training.examples import Examples, Latents
from factory.training.learners import DiffusionLearner
from factory.training.mixture import BatchSampler, global_batch
from factory.training.objectives import NoisePrediction, TrainingContext, add_noise
from factory.training.region_attention import RegionAttention
from factory.training.settings import TrainingSettings
from factory.training.world import World

PROMPTS = ("", "An image of <lesion> on <skin>.")
RESOLUTION, SIDE = 128, 16
TIMESTEPS = (100, 300, 500)


def encode(generator: Any, samples: list[SkinSample]) -> tuple[Tensor, Tensor]:
    """Posterior means and log-variances (N, C, h, w)."""
    images = np.stack([sample.image for sample in samples])
    parts = [generator.encode_images(images[i : i + 16]) for i in range(0, len(images), 16)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@torch.no_grad()
def measure(generator: Any, latents: Tensor, masks: Tensor, embeds: Tensor) -> dict[str, float]:
    """IoU of the cut map with the own and with another mask, and the prediction error, over `TIMESTEPS`."""
    layers = {"cross": select_layers(generator.unet, "cross", SIDE, generator.latent_shape[-1])}
    positions = generator.token_positions(PROMPTS[1:], "<lesion>")
    weights = token_weights([positions], generator.num_prompt_tokens)[0, 0]
    wanted = latent_masks(masks, SIDE, soft=True).flatten(1) > 0.5
    rng = torch.Generator().manual_seed(7)
    noise = torch.randn(latents.shape, generator=rng)
    own, other, errors = [], [], []
    for timestep in TIMESTEPS:
        timesteps = torch.full((len(latents),), timestep)
        alpha_bar = generator.noise_scheduler.alphas_cumprod[timesteps]
        with capture(generator.unet, layers) as captured:
            prediction = generator.denoiser()(
                add_noise(latents, noise, alpha_bar), timesteps, embeds[1:].expand(len(latents), -1, -1)
            )
        levels = (min_max(captured.mean("cross") @ weights) * 255).round().to(torch.uint8).numpy()
        target = noise
        if generator.noise_scheduler.config.prediction_type == "v_prediction":
            root, rest = alpha_bar.sqrt()[0], (1 - alpha_bar).sqrt()[0]
            target = root * noise - rest * latents
        errors.append(float((prediction - target).square().mean()))
        cut = np.stack([row > (otsu_threshold(row) or 0) for row in levels])
        for result, masks_of in ((own, wanted.numpy()), (other, np.roll(wanted.numpy(), 1, axis=0))):
            result.append(((cut & masks_of).sum(1) / (cut | masks_of).sum(1)).mean())
    return {
        "iou": float(np.mean(own)), "iou_with_another_mask": float(np.mean(other)), "prediction_error": float(np.mean(errors))
    }  # fmt: skip


def train(objectives: tuple[Any, ...], args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One training from the shipped base."""
    generator = LatentDiffusion(
        base="tiny",
        conditioning=TextOnly(),
        trainable=Trainable(unet="full"),
        resolution=RESOLUTION,
        placeholders=(("<lesion>", "lesion"), ("<skin>", "skin")),
    ).load(seed=seed)
    training = [skin_sample(RESOLUTION, seed, i) for i in range(args.images)]
    held_out = [skin_sample(RESOLUTION, 1000 + seed, i) for i in range(args.held_out)]
    mean, logvar = encode(generator, training)
    latents, _ = encode(generator, held_out)
    masks = torch.from_numpy(np.stack([sample.mask for sample in held_out]))
    embeds = generator.encode_prompts(PROMPTS)
    scheduler = generator.noise_scheduler
    settings = TrainingSettings(
        max_steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate, warmup_steps=10,
        prompt_dropout=0.1, seed=seed,
    )  # fmt: skip
    learner = DiffusionLearner(
        denoiser=generator.denoiser(),
        examples=Examples(
            latents=Latents(mean=mean.half().numpy(), logvar=logvar.half().numpy()),
            prompts=np.ones(len(training), np.int64),
            masks=[sample.mask for sample in training],
            num_timesteps=len(scheduler.alphas_cumprod),
            seed=seed,
            prompt_dropout=settings.prompt_dropout,
        ),
        prompt_embeds=embeds,
        conditions=generator.conditions,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=scheduler.config.prediction_type,
        objectives=objectives,
        context=TrainingContext(generator=generator, prompts=PROMPTS, resolution=RESOLUTION, seed=seed),
        settings=settings,
        world=World(),
    )
    before = measure(generator, latents, masks, embeds)
    sampler = BatchSampler(num_rows=len(training), batch_size=args.batch_size, seed=seed)
    started = time.perf_counter()
    for step in range(args.steps):
        learner.step(learner.draw(global_batch(sampler, step)))
    seconds = time.perf_counter() - started
    learner.denoiser.eval()
    return {
        "before": before,
        "after": measure(generator, latents, masks, embeds),
        "steps_per_second": args.steps / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--weight", type=float, default=0.1)
    parser.add_argument("--paper-weight", type=float, default=0.002, help="weight of the summed paper form")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds: dict[str, tuple[Any, ...]] = {
        "prediction_only": (NoisePrediction(),),
        "with_region_attention": (NoisePrediction(), RegionAttention(weight=args.weight, side=SIDE)),
        "with_paper_form": (
            NoisePrediction(),
            RegionAttention(weight=args.paper_weight, side=SIDE, form="paper"),
        ),
    }
    results: dict[str, Any] = {}
    for kind, objectives in kinds.items():
        runs = [train(objectives, args, seed) for seed in range(args.seeds)]
        results[kind] = {
            when: {name: float(np.mean([run[when][name] for run in runs])) for name in runs[0][when]}
            for when in ("before", "after")
        } | {
            "iou_by_seed": [run["after"]["iou"] for run in runs],
            "steps_per_second": float(np.mean([run["steps_per_second"] for run in runs])),
        }
        print(kind, results[kind], flush=True)
    print(
        f"wrote {save('region_attention', vars(args) | {'resolution': RESOLUTION, 'side': SIDE}, results, 'cpu')}"
    )


if __name__ == "__main__":
    main()
