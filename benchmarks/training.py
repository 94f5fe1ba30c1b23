"""Training on cached latents against encoding the images in the loop, as the stock training scripts do.

    python benchmarks/training.py                              # tiny width, CPU, about a minute
    python benchmarks/training.py --width sd15 --device cuda   # SD-1.5 width, random weights, GPU

Both sides take the same optimizer steps on the same rows, in turn, in one process; the second also runs the
VAE encoder and the text encoder on each batch.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measure import interleaved, median, peak_memory_mb, save


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch

    from factory.assets.base_models import write_random_base
    from factory.datasets.phantom import PhantomConfig, phantom_sample
    from factory.generators.conditioning import TextAndMask
    from factory.generators.latent_diffusion import LatentDiffusion, Trainable
    from factory.training.examples import Examples, Latents
    from factory.training.learners import DiffusionLearner
    from factory.training.mixture import BatchSampler, global_batch
    from factory.training.objectives import NoisePrediction
    from factory.training.settings import TrainingSettings
    from factory.training.world import World

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        base, resolution = "tiny", 128
        if args.width == "sd15":
            base, resolution = str(Path(folder) / "base"), 512
            write_random_base(Path(base), "sd15", dtype=torch.float16, seed=0)
        generator = LatentDiffusion(
            base=base,
            conditioning=TextAndMask(),
            trainable=Trainable(unet="lora", controlnet=True, lora_rank=8),
            resolution=resolution,
        ).load(device=args.device, dtype="float32")
    samples = [
        phantom_sample(PhantomConfig(size=resolution), 0, index) for index in range(4 * args.batch_size)
    ]
    images = np.stack([sample.image for sample in samples])
    texts = [f"breast ultrasound image of {sample.label_name} tumor." for sample in samples]
    table = ["", *dict.fromkeys(texts)]
    with torch.inference_mode():
        posteriors = [generator.encode_images(images[i : i + 4]) for i in range(0, len(images), 4)]
        embeds = generator.encode_prompts(table).float().cpu()
    mean, logvar = (torch.cat([p[k] for p in posteriors]).half().cpu().numpy() for k in (0, 1))
    settings = TrainingSettings(max_steps=10_000, batch_size=args.batch_size, learning_rate=1e-4)
    scheduler = generator.noise_scheduler
    learner = DiffusionLearner(
        denoiser=generator.denoiser(),
        examples=Examples(
            latents=Latents(mean=mean, logvar=logvar),
            prompts=np.array([table.index(text) for text in texts]),
            masks=[sample.mask for sample in samples],
            num_timesteps=len(scheduler.alphas_cumprod),
        ),
        prompt_embeds=embeds,
        conditions=generator.conditions,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=scheduler.config.prediction_type,
        objectives=(NoisePrediction(),),
        settings=settings,
        world=World(device=args.device),
    )
    sampler = BatchSampler(num_rows=len(images), batch_size=args.batch_size, seed=0)
    step = 0

    def cached() -> None:
        nonlocal step
        learner.step(learner.draw(global_batch(sampler, step)))
        step += 1

    def encoding() -> None:
        rows = global_batch(sampler, step).rows
        with torch.inference_mode():
            generator.encode_images(images[rows])
            generator.encode_prompts([texts[row] for row in rows])
        cached()

    times = interleaved({"cached": cached, "encoding": encoding}, args.rounds, args.device)
    rates = {name: 1 / median(values) for name, values in times.items()}
    results = {
        "steps_per_second": rates,
        "ratio_cached_over_encoding": rates["cached"] / rates["encoding"],
        "peak_memory_mb_both": peak_memory_mb(args.device),
    }
    path = save("training", vars(args) | {"resolution": resolution}, results, args.device)
    print(
        f"cached {rates['cached']:.2f} steps/s, encoding in the loop {rates['encoding']:.2f} steps/s: "
        f"ratio {results['ratio_cached_over_encoding']:.2f}; wrote {path}"
    )


if __name__ == "__main__":
    main()
