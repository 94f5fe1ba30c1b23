"""A new domain by full fine-tuning, by adapters of several ranks, and not at all (Pan et al. 2025, Table 2).

    python benchmarks/lora_vs_full.py                                 # tiny width, CPU, about eight minutes
    python benchmarks/lora_vs_full.py --steps 400 --num-synthetic 256

A generator is trained on phantoms of scanner A and adapted to a few of scanner B. Each arm then draws the same
requests (masks and prompts of held-out rows of B, the same noise), compared with held-out images of B. The row
"scratch" trains on B from the base. FID and KID are in the features of `--features`, with the distance of two
halves of the real set as floor; both are far from any published absolute number, their order is the result.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import save
from phantom_tables import write_phantoms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--source-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--source-images", type=int, default=160)
    parser.add_argument("--target-images", type=int, default=32)
    parser.add_argument("--num-synthetic", type=int, default=128)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--features", default="tiny", help="embedder, as `factory prepare --embedder`")
    parser.add_argument("--embedder-weights", help="local safetensors of a timm embedder")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args, Path(folder))
    for row in rows:
        print(
            f"{row['arm']:8s} FID {row['fid']:8.3f} (floor {row['fid_floor']:.3f})  KID {row['kid']:9.5f}  "
            f"{row['trained_parameters']:>9,} parameters  state {row['training_state_mb']:7.1f} MB  {row['seconds']:6.1f} s"
        )
    path = save("lora_vs_full", vars(args), {"arms": rows}, args.device)
    print(f"wrote {path}")


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from factory.datasets.phantom import BENIGN, MALIGNANT, SCANNER_A, SCANNER_B, PhantomConfig
    from factory.generators.latent_diffusion import Trainable
    from factory.recipes import RECIPES

    recipe = RECIPES["tiny"]()
    side = recipe.generator.resolution
    classes = (BENIGN, MALIGNANT)
    held_out = args.num_synthetic
    source = write_phantoms(
        folder / "a.lance",
        PhantomConfig(size=side, classes=classes, scanner=SCANNER_A),
        {"train": args.source_images, "val": 8},
    )
    target = write_phantoms(
        folder / "b.lance",
        PhantomConfig(size=side, classes=classes, scanner=SCANNER_B),
        {"train": args.target_images, "val": held_out},
        seed=1,
    )
    ground = folder / "source"
    full = dataclasses.replace(
        recipe, generator=dataclasses.replace(recipe.generator, trainable=Trainable(unet="full"))
    )
    train(full, source, ground, args.source_steps, args.device, learning_rate=3e-4)
    rows = [evaluate("none", full, ground, None, target, args, {"seconds": 0.0})]
    done = train(full, target, folder / "scratch", args.steps, args.device, learning_rate=3e-4)
    rows.append(evaluate("scratch", full, folder / "scratch", None, target, args, done))
    done = train(
        full, target, folder / "full", args.steps, args.device, adapt_from=ground, learning_rate=3e-4
    )
    rows.append(evaluate("full", full, folder / "full", ground, target, args, done))
    for rank in (int(word) for word in args.ranks.split(",")):
        trainable = Trainable(unet="lora", controlnet=False, lora_rank=rank)
        lora = dataclasses.replace(
            recipe, generator=dataclasses.replace(recipe.generator, trainable=trainable)
        )
        out = folder / f"rank-{rank}"
        done = train(lora, target, out, args.steps, args.device, adapt_from=ground, learning_rate=1e-3)
        rows.append(evaluate(f"LoRA {rank}", lora, out, ground, target, args, done))
    return rows


def train(
    recipe: Any,
    real: str,
    out: Path,
    steps: int,
    device: str,
    *,
    adapt_from: Path | None = None,
    learning_rate: float,
) -> dict[str, float]:
    """Train in this process; seconds of the steps, trained parameters and bytes of their training state."""
    from factory.storage import open_table
    from factory.training.run import load_for_training, train_generator
    from factory.training.task import TrainingTask, identity_of
    from factory.training.world import World

    settings = dataclasses.replace(
        recipe.training,
        max_steps=steps,
        learning_rate=learning_rate,
        validate_every=0,
        sample_every=0,
        checkpoint_every=steps,
    )
    task = TrainingTask(
        recipe=recipe.name,
        generator=recipe.generator,
        objectives=recipe.objectives,
        settings=settings,
        prompts=recipe.prompts,
        sampling=recipe.sampling,
        real=real,
        real_version=open_table(real).version,
        out=out,
        adapt_from=adapt_from,
    )
    out.mkdir(parents=True)
    begin = time.perf_counter()
    result = train_generator(task, identity_of(task), World(device=device))
    parameters = sum(p.numel() for p in load_for_training(task, "cpu").trainable_parameters())
    return {
        "seconds": result.step_seconds,
        "seconds_with_encoding": time.perf_counter() - begin,
        "trained_parameters": parameters,
        # Gradient, two moments and the moving average, fp32.
        "training_state_mb": 16 * parameters / 1e6,
    }


def evaluate(
    name: str,
    recipe: Any,
    checkpoint: Path,
    ground: Path | None,
    target: str,
    args: argparse.Namespace,
    done: dict[str, float],
) -> dict[str, Any]:
    """Draw one image per held-out row of the target and compare the two sets."""
    from factory.embedding import ImageEmbedder
    from factory.evaluation.image_metrics import fid, kid

    real, synthetic = draw(recipe, checkpoint, ground, target, args.device)
    embedder = ImageEmbedder(name=args.features, weights=args.embedder_weights).load(num_threads=args.threads)
    one, two = embedder.embed(list(real)), embedder.embed(list(synthetic))
    frechet, kernel = fid(one, two), kid(one, two)
    return {
        "arm": name,
        "fid": frechet.value,
        "fid_floor": frechet.floor,
        "kid": kernel.value,
        "kid_floor": kernel.floor,
        "num_real": frechet.num_real,
        "num_synthetic": frechet.num_synthetic,
        "trained_parameters": 0,
        "training_state_mb": 0.0,
        **done,
    }


def draw(
    recipe: Any, checkpoint: Path, ground: Path | None, target: str, device: str, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out images (N, R, R) and what the generator makes of their masks and prompts."""
    import torch

    from factory.diffusion.denoise import denoise, make_noise_scheduler
    from factory.imaging import as_grey, decode_rows
    from factory.storage import real_rows
    from schemas.identity import torch_seed

    generator = recipe.generator.load(checkpoint, adapt_from=ground, device=device)
    side = recipe.generator.resolution
    prompts = recipe.prompts.fit(decode_rows(real_rows(target, splits=("train",)), side))
    rows = decode_rows(real_rows(target, splits=("val",)), side)
    made = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        rngs = [torch.Generator().manual_seed(torch_seed(row.image_id, "benchmark")) for row in batch]
        noise = torch.stack([torch.randn(generator.latent_shape, generator=rng) for rng in rngs])
        masks = torch.from_numpy(np.stack([row.mask for row in batch if row.mask is not None]))
        embeds = generator.encode_prompts([prompts.describe(row) for row in batch])
        conditions = generator.conditions(embeds, masks=masks)
        latents = denoise(
            generator.denoiser(),
            make_noise_scheduler(recipe.sampling, generator.noise_scheduler.config),
            noise.to(device),
            conditions,
            generator.unconditional(conditions, generator.null_prompt()),
            num_inference_steps=recipe.sampling.num_inference_steps,
            guidance_scale=recipe.sampling.guidance_scale,
        )
        made.append(generator.decode(latents).float().mean(dim=-1).round().to(torch.uint8).numpy())
    return np.stack([as_grey(row.image) for row in rows]), np.concatenate(made)


if __name__ == "__main__":
    main()
