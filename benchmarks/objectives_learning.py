"""Do two training objectives improve what they are meant to? On phantoms of a scanner that the base has not seen.

    python benchmarks/objectives_learning.py

(a) `MaskedDenoising` against `NoisePrediction`, thirty pairs, equal steps, equal batches and noise: the error of the
prediction in the lesion's latent cells on held-out images, and in the other cells.

(b) `SketchPerception` beside `NoisePrediction`: the error of the sketch on held-out images against the constant zero,
an untrained branch, and a branch trained alone on the frozen base's features. Errors are class-balanced L1 to the binary
edges, of which every constant has one half. Also the prediction's error with and without the branch, and the ratio of
the gradients' norms (λ L_s over the denoising loss) on the encoder.

Every figure is a mean over seeds of training; differences are paired by seed and held-out image.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import save
from torch import Tensor

from factory.datasets.phantom import BENIGN, MALIGNANT, SCANNER_B, PhantomConfig, phantom_sample
from factory.diffusion.latent_masks import latent_masks
from factory.generators.conditioning import TextOnly
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.generators.loaded import LoadedGenerator
from factory.training.examples import DiffusionBatch, Examples, Latents
from factory.training.learners import DiffusionLearner
from factory.training.masked_denoising import MaskedDenoising
from factory.training.mixture import BatchSampler, global_batch
from factory.training.objectives import NoisePrediction, TrainingContext
from factory.training.settings import TrainingSettings
from factory.training.sketch_branch import SketchBranch
from factory.training.sketch_perception import SketchPerception
from factory.training.world import World

SIZE = 128
PROMPT = "An image of hta"
GENERATOR = LatentDiffusion(conditioning=TextOnly(), trainable=Trainable(unet="full"), resolution=SIZE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Images of one split: latents, masks and sketches, all in memory."""

    latents: Latents
    masks: list[np.ndarray]
    sketches: list[np.ndarray]

    def examples(self, seed: int) -> Examples:
        return Examples(
            latents=self.latents,
            prompts=np.ones(len(self.masks), np.int64),
            masks=self.masks,
            extras={"sketches": self.sketches},
            num_timesteps=1000,
            seed=seed,
        )


def make_rows(generator: LoadedGenerator, first: int, count: int) -> Rows:
    config = PhantomConfig(size=SIZE, classes=(BENIGN, MALIGNANT), scanner=SCANNER_B)
    samples = [phantom_sample(config, 11, first + index) for index in range(count)]
    parts = [generator.encode_images(np.stack([s.image])) for s in samples]
    mean, logvar = (torch.cat(p).numpy().astype(np.float16) for p in zip(*parts))
    extractor = SketchPerception().extractor
    return Rows(
        latents=Latents(mean=mean, logvar=logvar),
        masks=[s.mask for s in samples],
        sketches=[extractor.draw(s.image) for s in samples],
    )


def train(
    objectives: Sequence[Any],
    rows: Rows,
    args: argparse.Namespace,
    seed: int,
    *,
    learning_rate: float,
    freeze: bool = False,
) -> DiffusionLearner:
    """A learner after `args.steps` updates; with `freeze` only the objectives' own weights have moved."""
    generator = GENERATOR.load(seed=seed)
    settings = TrainingSettings(
        max_steps=max(1, args.steps),
        batch_size=args.batch_size,
        learning_rate=learning_rate,
        warmup_steps=10,
        ema_decay=0.0,
        prompt_dropout=0.0,
        seed=seed,
    )
    learner = DiffusionLearner(
        denoiser=generator.denoiser(),
        examples=rows.examples(seed),
        prompt_embeds=generator.encode_prompts(["", PROMPT]),
        conditions=generator.conditions,
        alphas_cumprod=generator.noise_scheduler.alphas_cumprod,  # type: ignore[attr-defined]
        prediction_type=generator.noise_scheduler.config.prediction_type,  # type: ignore[attr-defined]
        objectives=tuple(objectives),
        context=TrainingContext(generator=generator, prompts=("", PROMPT), resolution=SIZE, seed=seed),
        settings=settings,
        world=World(),
    )
    sampler = BatchSampler(num_rows=len(rows.masks), batch_size=args.batch_size, seed=seed)
    before = {name: p.detach().clone() for name, p in learner.parameters.items() if "objectives." not in name}
    for step in range(args.steps):
        learner.step(learner.draw(global_batch(sampler, step)))
        if freeze:
            with torch.no_grad():
                for name, value in before.items():
                    learner.parameters[name].copy_(value)
    return learner


@torch.no_grad()
def region_errors(learner: DiffusionLearner, batch: DiffusionBatch) -> tuple[Tensor, Tensor]:
    """Mean squared error of the prediction inside and outside the lesion, (N,) each."""
    assert batch.masks is not None
    step, _ = learner._denoise(learner._observed.eval(), batch)
    error = (step.model_pred - step.target()).square().mean(dim=1, keepdim=True)
    inside = latent_masks(batch.masks, error.shape[-1])
    return tuple(  # type: ignore[return-value]
        (error * region).sum((1, 2, 3)) / region.sum((1, 2, 3)) for region in (inside, 1 - inside)
    )


@torch.no_grad()
def sketch_errors(learner: DiffusionLearner, batch: DiffusionBatch) -> dict[str, Tensor]:
    """`SketchPerception.metrics` of held-out images, (N,) each."""
    step, outputs = learner._denoise(learner._observed.eval(), batch)
    branch = learner._bound["SketchPerception"]
    return dict(branch.metrics(step, outputs["SketchPerception"]))


def gradient_ratio(learner: DiffusionLearner, batch: DiffusionBatch, weight: float) -> float:
    """Norm of ∂(λ L_s) over that of ∂(denoising loss), on the parameters of the UNet's encoder."""
    step, outputs = learner._denoise(learner._observed.train(), batch)
    unet: Any = learner.denoiser.unet
    encoder = [p for p in (*unet.conv_in.parameters(), *unet.down_blocks.parameters()) if p.requires_grad]
    norms = []
    for name in ("SketchPerception", "NoisePrediction"):
        loss = learner._bound[name].loss(step, outputs[name]).mean()
        scaled = loss * (weight if name == "SketchPerception" else 1.0)
        gradients = torch.autograd.grad(scaled, encoder, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
    return norms[0] / norms[1]


def paired(values: list[Tensor], others: list[Tensor]) -> dict[str, Any]:
    """Mean of each, mean difference with its standard error over held-out images, and how many seeds agree."""
    one, two = torch.stack(values), torch.stack(others)
    difference = (one - two).mean(dim=0)
    return {
        "mean": one.mean().item(),
        "other_mean": two.mean().item(),
        "relative_change": (one.mean() / two.mean() - 1).item(),
        "difference": difference.mean().item(),
        "standard_error": (difference.std() / len(difference) ** 0.5).item(),
        "seeds_below": f"{int(((one - two).mean(dim=1) < 0).sum())}/{len(one)}",
    }


def masked_denoising(rows: Rows, held_out: DiffusionBatch, args: argparse.Namespace) -> dict[str, Any]:
    """Part (a)."""
    rate = args.masked_learning_rate
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"masked": [], "whole": []}
    for seed in range(args.seeds):
        for name, objective in (("masked", MaskedDenoising()), ("whole", NoisePrediction())):
            found[name].append(
                region_errors(train([objective], rows, args, seed, learning_rate=rate), held_out)
            )
    args_before = argparse.Namespace(**{**vars(args), "steps": 0})
    base = region_errors(train([NoisePrediction()], rows, args_before, 0, learning_rate=rate), held_out)
    return {
        "lesion_error": paired(*([i for i, _ in found[name]] for name in ("masked", "whole"))),
        "background_error": paired(*([o for _, o in found[name]] for name in ("masked", "whole"))),
        "base_before_training": {"lesion": base[0].mean().item(), "background": base[1].mean().item()},
    }


def sketch_perception(rows: Rows, held_out: DiffusionBatch, args: argparse.Namespace) -> dict[str, Any]:
    """Part (b)."""
    rate = args.sketch_learning_rate
    both = (NoisePrediction(), SketchPerception())
    untrained = argparse.Namespace(**{**vars(args), "steps": 0})
    errors: dict[str, list[Tensor]] = {"joint": [], "frozen": [], "untrained": [], "zero": []}
    losses: dict[str, list[Tensor]] = {"joint": [], "alone": []}
    ratios = []
    for seed in range(args.seeds):
        joint = train(both, rows, args, seed, learning_rate=rate)
        first = train(both, rows, untrained, seed, learning_rate=rate)
        for name, learner in (
            ("joint", joint),
            ("frozen", train(both, rows, args, seed, learning_rate=rate, freeze=True)),
            ("untrained", first),
        ):
            errors[name].append(sketch_errors(learner, held_out)["sketch_error"])
        errors["zero"].append(sketch_errors(joint, held_out)["sketch_error_of_zero"])
        ratios.append([gradient_ratio(item, held_out, both[1].weight) for item in (first, joint)])
        alone = train([NoisePrediction()], rows, args, seed, learning_rate=rate)
        for name, learner in (("joint", joint), ("alone", alone)):
            step, _ = learner._denoise(learner._observed.eval(), held_out)
            losses[name].append((step.model_pred - step.target()).square().mean((1, 2, 3)).detach())
    assert isinstance(joint._bound["SketchPerception"], SketchBranch)
    clean = held_out.timesteps < 500
    return {
        **{
            f"joint_against_{name}": paired(errors["joint"], errors[name])
            for name in ("zero", "untrained", "frozen")
        },
        "joint_against_zero_below_t_500": paired(*([e[clean] for e in errors[n]] for n in ("joint", "zero"))),
        "prediction_error_with_against_without": paired(losses["joint"], losses["alone"]),
        "gradient_ratio": {"before": np.mean(ratios, axis=0)[0], "after": np.mean(ratios, axis=0)[1]},
        "edge_density": float(np.mean([s.mean() / 255 for s in rows.sketches])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--masked-learning-rate", type=float, default=3e-5, help="of part (a)")
    parser.add_argument("--sketch-learning-rate", type=float, default=3e-4, help="of part (b)")
    parser.add_argument("--num-pairs", type=int, default=30, help="training images of part (a)")
    parser.add_argument("--num-images", type=int, default=200, help="training images of part (b)")
    parser.add_argument("--num-held-out", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    generator = GENERATOR.load()
    total = max(args.num_pairs, args.num_images)
    rows = make_rows(generator, 0, args.num_pairs)
    more = make_rows(generator, 0, args.num_images)
    names = [f"held-out-{k}" for k in range(args.num_held_out)]
    batch = make_rows(generator, total, args.num_held_out).examples(0).fixed(np.arange(len(names)), names)
    # Timesteps by a fixed permutation: without it they would grow with the image's number.
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(names)))
    batch = DiffusionBatch(**{**vars(batch), "timesteps": batch.timesteps[order]})
    results = {
        "masked_denoising": masked_denoising(rows, batch, args),
        "sketch_perception": sketch_perception(more, batch, args),
    }
    path: Path = save("objectives_learning", {"width": "phantom", **vars(args)}, results, "cpu")
    print(json.dumps(results, indent=2))
    print(f"wrote {path} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
