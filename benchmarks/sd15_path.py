"""Every recipe on a base of Stable Diffusion 1.5's shape from a local diffusers folder: train, save, synthesize.

    python benchmarks/make_random_base.py sd15 --shape sd15
    python benchmarks/sd15_path.py sd15                 # about ten minutes and 16 GB on two cores

Weights are random, so pictures mean nothing: what is exercised is the real path, with 860 M parameters in the UNet,
at a resolution that a CPU can bear. One optimizer step, a checkpoint on disk, one image in two denoising steps. Recipes
that train the whole UNet take adapters here (`unet=lora`), since its optimizer state would not fit beside it; where the
UNet itself gains weights (class embedding, inpainting input) only these are trained in the one step.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import peak_memory_mb, save
from phantom_tables import write_phantoms

METHODS = ("clinical_prior", "scmg", "didgen", "meddiff_ft", "sketch_ldm", "meddiff_inpaint")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="diffusers folder of SD-1.5's shape")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch

    from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig

    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = PhantomConfig(size=args.resolution, classes=(BENIGN, MALIGNANT, NORMAL))
        real = write_phantoms(folder / "real.lance", config, {"train": 9, "val": 3})
        for method in args.methods.split(","):
            begin = time.perf_counter()
            results[method] = run_method(method, args.base, args.resolution, real, folder / method)
            results[method]["seconds"] = time.perf_counter() - begin
            print(method, results[method], flush=True)
    settings = vars(args) | {"base": "random, SD-1.5 shape", "width": "sd15"}
    results["peak_memory_mb"] = peak_memory_mb("cpu")
    print(f"wrote {save('sd15_path', settings, results, 'cpu')}")


def run_method(method: str, base: str, resolution: int, real: str, folder: Path) -> dict[str, Any]:
    """Loss and gradient norm of one step, the parts that were saved, and the image that came out."""
    from factory.storage import open_table
    from factory.synthesis.stages import FinishStage, SynthesisStage
    from factory.training import run as training_run
    from factory.training.task import TrainingTask, identity_of
    from factory.training.world import World
    from jobs import synthesis_plan

    recipe, overrides = at_small_size(method, base, resolution, real, folder)
    task = TrainingTask(
        recipe=recipe.name,
        generator=recipe.generator,
        objectives=recipe.objectives,
        settings=recipe.training,
        prompts=recipe.prompts,
        sampling=recipe.sampling,
        real=real,
        real_version=open_table(real).version,
        out=folder / "run",
    )
    task.out.mkdir(parents=True)
    load = training_run.load_for_training
    training_run.load_for_training = lambda task, device: only_added_weights(load(task, device))
    try:
        result = training_run.train_generator(task, identity_of(task), World())
    finally:
        training_run.load_for_training = load
    args = synthesis_plan.Args(
        recipe=method, generator=str(task.out), real=real, out=str(folder / "out.lance"), labels="benign=1",
        batch_size=1, overrides=overrides,
    )  # fmt: skip
    prepared = synthesis_plan.prepare(args)
    _, synthesizer, finish = synthesis_plan.execution(args, prepared, 2.0, 0.0)
    pixels = SynthesisStage(synthesizer, prepared.plan)(prepared.request_stage(prepared.indices))
    row = FinishStage(finish)(pixels).to_pylist()[0]
    assert row["error"] is None, row["error"]
    losses = {k: v for k, v in result.metrics.items() if "loss" in k or k[0].isupper() or k == "grad_norm"}
    assert all(np.isfinite(value) for value in losses.values())
    return {
        **losses,
        "saved": sorted(
            path.name for path in task.out.iterdir() if path.is_dir() and path.name != "checkpoints"
        ),
        "weights": sorted(prepared.plan.weights),
        "has_mask": row["mask"] is not None,
        "stream_reject_reason": row["stream_reject_reason"],
    }


def only_added_weights(generator: Any) -> Any:
    """Where the whole UNet would be trained, only what this recipe adds to it is: the rest would not fit."""
    if generator.generator.trainable.unet == "full":
        for name, parameter in generator.unet.named_parameters():
            parameter.requires_grad_(name.startswith(("class_embedding", "conv_in")))
    return generator


def at_small_size(
    method: str, base: str, resolution: int, real: str, folder: Path
) -> tuple[Any, tuple[str, ...]]:
    """The recipe on the local base, and the overrides that `factory synthesize` needs to agree with it."""
    from jobs import caption
    from jobs.recipe_args import parse_recipe

    side = resolution // 8
    overrides = [
        "--generator.base", base, "--generator.resolution", str(resolution), "--training.max-steps", "1",
        "--training.batch-size", "1", "--training.gradient-accumulation-steps", "1", "--training.warmup-steps", "0",
        "--training.sample-every", "0", "--training.validate-every", "0", "--training.ema-decay", "0",
        "--sampling.num-inference-steps", "2",
    ]  # fmt: skip
    if method not in ("sketch_ldm", "meddiff_inpaint"):
        overrides += ["--generator.trainable.unet", "lora"]
    if method in ("scmg", "meddiff_ft", "meddiff_inpaint"):
        overrides += ["masks:deformed-ellipse"]
    if method == "didgen":
        captions = folder / "captions.lance"
        overrides += ["--prompts.captions", str(captions), "--objectives.1.side", str(side // 4)]
        overrides += ["--guidances.0.cross-side", str(side // 4), "--guidances.0.self-side", str(side // 2)]
        overrides += ["--annotator.cross-side", str(side // 4), "--annotator.self-side", str(side // 2)]
        caption.run(caption.Args(real=real, out=str(captions), recipe=method, overrides=tuple(overrides)))
    recipe = parse_recipe(method, overrides)
    return dataclasses.replace(recipe), tuple(overrides)


if __name__ == "__main__":
    main()
