"""Train a recipe's generator, or another part of it, on the training rows of a real table.

    factory train --recipe tiny --real real.lance --out runs/generator
    factory train --recipe scmg --part vae --real real.lance --out runs/vae
    factory train --recipe scmg --part mask_gan --real real.lance --out runs/masks
    factory train --recipe tiny --part segmenter --real real.lance --out runs/segmenter
    factory train --recipe clinical_prior --real real.lance --out runs/generator --num-workers 4 --use-gpu
    factory train --recipe clinical_prior --real other.lance --out runs/adapter \\
        --adapt-from runs/generator --lora-rank 8

Running the same command again after any interruption goes on from the last checkpoint; with a larger
`--max-steps` a finished run goes on too. The VAE, the mask GAN and the mask DDPM have their own settings in the recipe
(`--vae-stage.training.…`, `--masks.model.training.…`). Without `--num-workers` a machine with at most one GPU trains in this
process; `--num-workers N` trains in N Ray workers.
"""

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from factory.generators.mask_diffusion import MaskDDPM
from factory.generators.mask_gan import MaskGAN
from factory.recipes import Recipe
from factory.sources.mask_models import CurvatureGAN, MaskDiffusion
from factory.training.parts import (
    Part,
    PartTask,
    check_run,
    clear_any_run,
    finished_step_of,
    identity_of_run,
)
from factory.training.segmenter_stage import SegmenterStage
from factory.training.task import TrainingTask, adapted
from factory.training.vae_stage import VAEStage
from jobs.recipe_args import parse_args, parse_recipe
from jobs.train_progress import Watcher, latest_metrics
from jobs.train_workers import Workers, fit_here, fit_in_workers


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory train`; any further `--field.of.recipe value` overrides the recipe."""

    recipe: str
    """Built-in recipe or module:function."""
    real: str
    """Real table, made by `factory prepare`."""
    out: str
    """Folder for the weights, their checkpoints and the learning curve."""
    part: Part = "generator"
    """What is trained: the generator, its VAE (before the generator), the recipe's mask model, or a segmenter of real images."""
    max_steps: int | None = None
    """Optimizer updates of that part in all, instead of the recipe's; of each fit, for the segmenter."""
    num_workers: int | None = None
    """Ray workers that share each batch; 0 is this process. By default one per GPU where there are several, else 0."""
    min_workers: int | None = None
    """Elastic: go on with as few as this while nodes are away, and take them in again; needs --num-workers."""
    use_gpu: bool | None = None
    """Train on GPUs; by default where there is one."""
    adapt_from: str | None = None
    """Trained generator to adapt to this table: only LoRA adapters are trained, and saved as such."""
    lora_rank: int | None = None
    """Rank of the adapters, with --adapt-from; 8 by default."""
    overwrite: bool = False
    """Discard the run that --out holds."""
    max_failures: int = 2
    """Times that Ray workers may die before the job fails; each time they go on from the last checkpoint."""
    cpus_per_worker: int | None = None
    """CPUs of each Ray worker; on CPU an equal share of all, beside a GPU 1."""
    address: str | None = None
    """Ray cluster to join; a private Ray is started without it."""
    num_cpus: int | None = None
    """CPUs of a private Ray."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What a run of the job did.

    Attributes:
        out: the folder of the weights.
        start_step, steps: updates done before, and now.
        seconds: of the whole job.
        steps_per_second: of the steps alone.
        metrics: the last value of every metric.
        model: registered name and version, or None where nothing was to do.
    """

    out: Path
    start_step: int
    steps: int
    seconds: float
    steps_per_second: float
    metrics: Mapping[str, float]
    model: tuple[str, str] | None


def make_task(args: Args) -> tuple[TrainingTask | PartTask, Recipe]:
    """The task that the arguments describe, and the recipe with its overrides.

    Raises:
        ValueError, FileNotFoundError: unknown recipe, table or checkpoint, contradicting options.
    """
    recipe = parse_recipe(args.recipe, args.overrides)
    if args.part != "generator":
        return _part_task(args, recipe)
    return _generator_task(args, recipe)


def _part_task(args: Args, recipe: Recipe) -> tuple[PartTask, Recipe]:
    from factory.storage import open_table

    if args.adapt_from is not None or args.lora_rank is not None:
        raise ValueError(
            f"--part {args.part}: --adapt-from and --lora-rank are of the generator; leave them out"
        )
    component: VAEStage | MaskGAN | MaskDDPM | SegmenterStage
    if args.part == "vae":
        recipe = dataclasses.replace(recipe, vae_stage=_with_max_steps(recipe.vae_stage, args.max_steps))
        component = recipe.vae_stage
    elif args.part == "segmenter":
        component = recipe.segmenter_stage.with_num_steps(args.max_steps)
        recipe = dataclasses.replace(recipe, segmenter_stage=component)
    else:
        source = mask_source(recipe, args.part)
        component = _with_max_steps(source.model, args.max_steps)
        recipe = dataclasses.replace(recipe, masks=dataclasses.replace(source, model=component))  # type: ignore[arg-type]
    task = PartTask(
        part=args.part,
        recipe=recipe.name,
        component=component,
        generator=recipe.generator,
        real=_absolute(args.real),
        real_version=open_table(args.real).version,
        out=Path(args.out).expanduser().resolve(),
    )
    return task, recipe


def _with_max_steps(component: Any, max_steps: int | None) -> Any:
    """The component with another number of updates, where one is asked for."""
    if max_steps is None:
        return component
    return dataclasses.replace(
        component, training=dataclasses.replace(component.training, max_steps=max_steps)
    )


def mask_source(recipe: Recipe, part: Part) -> CurvatureGAN | MaskDiffusion:
    """The recipe's source of masks, if it holds the model that `--part` trains.

    Raises:
        ValueError: it does not; says how to choose one that does.
    """
    choice = {"mask_gan": "masks:curvature-gan", "mask_diffusion": "masks:mask-diffusion"}[part]
    wanted = CurvatureGAN if part == "mask_gan" else MaskDiffusion
    if isinstance(recipe.masks, (CurvatureGAN, MaskDiffusion)) and isinstance(recipe.masks, wanted):
        return recipe.masks
    found = (
        "takes no masks" if recipe.masks is None else f"takes its masks from {type(recipe.masks).__name__}"
    )
    raise ValueError(f"--part {part}: recipe {recipe.name} {found}; choose the source with {choice}")


def _generator_task(args: Args, recipe: Recipe) -> tuple[TrainingTask, Recipe]:
    from factory.storage import open_table

    settings, generator = recipe.training, recipe.generator
    if args.max_steps is not None:
        settings = dataclasses.replace(settings, max_steps=args.max_steps)
    if args.adapt_from is not None:
        generator = adapted(generator, 8 if args.lora_rank is None else args.lora_rank)
    elif args.lora_rank is not None:
        raise ValueError(
            "--lora-rank: goes with --adapt-from; for a recipe's own adapters use --generator.trainable.lora-rank"
        )
    recipe = dataclasses.replace(recipe, training=settings, generator=generator)
    task = TrainingTask(
        recipe=recipe.name,
        generator=generator,
        objectives=recipe.objectives,
        settings=settings,
        prompts=recipe.prompts,
        sampling=recipe.sampling,
        real=_absolute(args.real),
        real_version=open_table(args.real).version,
        out=Path(args.out).expanduser().resolve(),
        adapt_from=None if args.adapt_from is None else Path(args.adapt_from).expanduser().resolve(),
    )
    return task, recipe


def _absolute(uri: str) -> str:
    """Ray workers have working directories of their own."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def choose_workers(args: Args) -> tuple[int, bool]:
    """Number of Ray workers (0: this process) and whether they use GPUs.

    Raises:
        ValueError: a negative number, or GPUs asked for in a process that has none.
    """
    import torch

    gpus = torch.cuda.device_count()
    num_workers = args.num_workers
    if num_workers is None:
        num_workers = gpus if gpus > 1 and args.use_gpu is not False else 0
    if num_workers < 0:
        raise ValueError(f"--num-workers: want 0 or more, got {num_workers}")
    use_gpu = gpus > 0 if args.use_gpu is None else args.use_gpu
    if num_workers == 0 and use_gpu and gpus == 0:
        raise ValueError(
            "--use-gpu: torch sees no GPU here; see `factory doctor`, or give --num-workers for a cluster"
        )
    return num_workers, use_gpu


def run(args: Args) -> TrainingSummary:
    """Train, or go on training, and leave the generator in `args.out`.

    Raises:
        ValueError, FileNotFoundError, PermissionError: bad input, before any compute.
        ray.train.TrainingFailedError: the workers died more than `max_failures` times.
    """
    from factory.training.run_identity import check_identity

    start = time.perf_counter()
    task, recipe = make_task(args)
    num_workers, use_gpu = choose_workers(args)
    check_run(task, num_workers)
    workers = Workers(
        number=num_workers,
        least=args.min_workers,
        use_gpu=use_gpu,
        cpus_per_worker=args.cpus_per_worker,
        max_failures=args.max_failures,
        address=args.address,
        num_cpus=args.num_cpus,
    )
    workers.check(task.settings)
    if args.overwrite:
        clear_any_run(task.out)
    identity = identity_of_run(task)
    check_identity(task.out, identity)
    done_before = finished_step_of(task)
    if done_before is not None and done_before > task.settings.max_steps:
        raise ValueError(
            f"--max-steps {task.settings.max_steps}: {task.out} is finished at step {done_before}; ask for more, choose "
            "another --out, or --overwrite"
        )
    if done_before == task.settings.max_steps:
        return TrainingSummary(
            out=task.out,
            start_step=done_before,
            steps=done_before,
            seconds=time.perf_counter() - start,
            steps_per_second=0.0,
            metrics=latest_metrics(task.out),
            model=None,
        )
    return _train(args, task, recipe, identity, workers, start)


def _train(
    args: Args,
    task: TrainingTask | PartTask,
    recipe: Recipe,
    identity: Mapping[str, Any],
    workers: Workers,
    start: float,
) -> TrainingSummary:
    from factory.tracking import track
    from factory.training.checkpoints import checkpoint_steps

    start_step = max(checkpoint_steps(task.out), default=0)
    bounds = f"{workers.number}" if workers.least is None else f"{workers.least} … {workers.number}"
    where = f"{bounds} Ray workers" if workers.number else "this process"
    going_on = f", going on from step {start_step}" if start_step else ""
    part = "" if args.part == "generator" else f" {args.part}"
    print(
        f"train {task.recipe}{part}: {task.settings.max_steps} steps in {where} on {'GPU' if workers.use_gpu else 'CPU'}{going_on}"
    )
    if task.settings.warmup_steps >= task.settings.max_steps:
        print(
            f"note: all {task.settings.max_steps} steps are warm-up (training.warmup_steps = {task.settings.warmup_steps})"
        )
    with (
        track(
            "train",
            recipe_parameters=dataclasses.asdict(recipe),
            execution_parameters={
                **dataclasses.asdict(args),
                "workers": workers.number,
                "gpu": workers.use_gpu,
            },
            inputs={"real": {"uri": task.real, "version": task.real_version, "digest": identity["real"]}},
        ) as tracked,
        Watcher(task, tracked) as watcher,
    ):
        if workers.number == 0:
            fit_here(task, identity, workers.use_gpu, watcher)
        else:
            fit_in_workers(task, identity, workers, watcher)
        metrics = latest_metrics(task.out)
        model = tracked.register_generator(
            task.out,
            f"{args.part}-{task.recipe}",
            {"steps": task.settings.max_steps, "real": identity["real"]},
        )
    return TrainingSummary(
        out=task.out,
        start_step=start_step,
        steps=task.settings.max_steps,
        seconds=time.perf_counter() - start,
        steps_per_second=metrics.get("steps_per_second", 0.0),
        metrics=metrics,
        model=model,
    )


def print_summary(args: Args, summary: TrainingSummary) -> None:
    """What was done, and what to run next."""
    following = _following(args)
    if summary.model is None:
        print(
            f"{args.out} is finished already at step {summary.steps}: nothing done (--max-steps for more, "
            f"--overwrite to start again); next: {following}"
        )
        return
    loss, val_loss = summary.metrics.get("loss"), summary.metrics.get("val_loss")
    held_out = "" if val_loss is None else f", held-out {val_loss:.4f}"
    print(
        f"steps {summary.start_step} → {summary.steps} in {summary.seconds:.0f} s, {summary.steps_per_second:.2f} it/s; "
        f"loss {loss:.4f}{held_out}; model {summary.model[0]} version {summary.model[1]}"
    )
    print(f"wrote {args.out}; next: {following}")


def _following(args: Args) -> str:
    """The command that uses what was trained."""
    train = f"factory train --recipe {args.recipe} --real {args.real} --out generator"
    if args.part == "vae":
        return f"{train} --generator.vae {args.out}"
    if args.part == "segmenter":
        return (
            f"factory synthesize --recipe {args.recipe} --generator GENERATOR --segmenter {args.out} --real {args.real} "
            "--num-requests 128 --out synthetic.lance"
        )
    if args.part != "generator":
        return (
            f"factory synthesize --recipe {args.recipe} --generator GENERATOR --masks.checkpoint {args.out} "
            f"--real {args.real} --num-requests 128 --out synthetic.lance"
        )
    return (
        f"factory synthesize --recipe {args.recipe} --generator {args.adapt_from or args.out} "
        + (f"--adapters {args.out} " if args.adapt_from else "")
        + f"--real {args.real} --num-requests 128 --out synthetic.lance"
        + "".join(f" {shlex.quote(word)}" for word in args.overrides)
    )


def parse(argv: Sequence[str]) -> Args:
    """Arguments of the command line. `--use-gpu` and `--no-use-gpu` may stand alone.

    Raises:
        ValueError, SystemExit: unknown options, values of the wrong type.
    """
    flags = {"--use-gpu": ["--use-gpu", "True"], "--no-use-gpu": ["--use-gpu", "False"]}
    words = list(argv)
    for place in reversed([i for i, word in enumerate(words) if word in flags]):
        if words[place + 1 : place + 2] not in (["True"], ["False"], ["None"]):
            words[place : place + 1] = flags[words[place]]
    return parse_args(Args, words, "factory train", __doc__ or "")


def command(argv: Sequence[str]) -> int:
    """`factory train`."""
    args = parse(argv)
    print_summary(args, run(args))
    return 0
