"""Train a recipe's generator on the training rows of a real table.

    factory train --recipe tiny --real real.lance --out runs/generator
    factory train --recipe clinical_prior --real real.lance --out runs/generator --num-workers 4 --use-gpu
    factory train --recipe clinical_prior --real other.lance --out runs/adapter \\
        --adapt-from runs/generator --lora-rank 8

Running the same command again after any interruption goes on from the last checkpoint; with a larger
`--max-steps` a finished run goes on too. Without `--num-workers` a machine with at most one GPU trains in this
process; `--num-workers N` trains in N Ray workers.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from factory.recipes import Recipe
from factory.training.task import (
    TrainingTask,
    adapted,
    check_task,
    finished_step,
    identity_of,
)
from jobs.recipe_args import parse_args, parse_recipe
from jobs.train_progress import Watcher, follow, latest_metrics


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory train`; any further `--field.of.recipe value` overrides the recipe."""

    recipe: str
    """Built-in recipe or module:function."""
    real: str
    """Real table, made by `factory prepare`."""
    out: str
    """Folder for the generator, its checkpoints and its learning curve."""
    max_steps: int | None = None
    """Optimizer updates in all, instead of the recipe's."""
    num_workers: int | None = None
    """Ray workers that share each batch; 0 is this process. By default one per GPU where there are several, else 0."""
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
        out: the generator's folder.
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


def make_task(args: Args) -> tuple[TrainingTask, Recipe]:
    """The task that the arguments describe, and the recipe with its overrides.

    Raises:
        ValueError, FileNotFoundError: unknown recipe, table or checkpoint, contradicting options.
    """
    from factory.storage import open_table

    recipe = parse_recipe(args.recipe, args.overrides)
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
    from factory.training.run_identity import check_identity, clear_run

    start = time.perf_counter()
    task, recipe = make_task(args)
    num_workers, use_gpu = choose_workers(args)
    check_task(task, num_workers)
    if args.overwrite:
        clear_run(task.out)
    identity = identity_of(task)
    check_identity(task.out, identity)
    done_before = finished_step(task)
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
    return _train(args, task, recipe, identity, num_workers, use_gpu, start)


def _train(
    args: Args,
    task: TrainingTask,
    recipe: Recipe,
    identity: Mapping[str, Any],
    num_workers: int,
    use_gpu: bool,
    start: float,
) -> TrainingSummary:
    from factory.tracking import track
    from factory.training.checkpoints import checkpoint_steps

    start_step = max(checkpoint_steps(task.out), default=0)
    where = f"{num_workers} Ray workers" if num_workers else "this process"
    going_on = f", going on from step {start_step}" if start_step else ""
    print(
        f"train {task.recipe}: {task.settings.max_steps} steps in {where} on {'GPU' if use_gpu else 'CPU'}{going_on}"
    )
    if task.settings.warmup_steps >= task.settings.max_steps:
        print(
            f"note: all {task.settings.max_steps} steps are warm-up (training.warmup_steps = {task.settings.warmup_steps})"
        )
    with (
        track(
            "train",
            recipe_parameters=dataclasses.asdict(recipe),
            execution_parameters={**dataclasses.asdict(args), "workers": num_workers, "gpu": use_gpu},
            inputs={"real": {"uri": task.real, "version": task.real_version, "digest": identity["real"]}},
        ) as tracked,
        Watcher(task, tracked) as watcher,
    ):
        if num_workers == 0:
            _fit_here(task, identity, use_gpu, watcher)
        else:
            _fit_in_workers(args, task, identity, num_workers, use_gpu, watcher)
        metrics = latest_metrics(task.out)
        model = tracked.register_generator(
            task.out, f"generator-{task.recipe}", {"steps": task.settings.max_steps, "real": identity["real"]}
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


def _fit_here(task: TrainingTask, identity: Mapping[str, Any], use_gpu: bool, watcher: Watcher) -> None:
    """Ray Train's local mode: the same trainer, this process, no cluster."""
    import torch
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from factory.training.metrics import Observer
    from factory.training.run import train_generator
    from factory.training.world import World

    def train_loop_per_worker() -> None:
        observer = Observer(
            on_latents=watcher.on_latents,
            on_start=watcher.on_start,
            on_metrics=watcher.on_metrics,
            on_preview=watcher.on_preview,
        )
        train_generator(task, identity, World(device="cuda" if use_gpu else "cpu"), observer)

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    TorchTrainer(train_loop_per_worker, scaling_config=ScalingConfig(num_workers=0, use_gpu=use_gpu)).fit()
    if use_gpu:
        torch.cuda.empty_cache()  # the next job of this process may want the GPU in another one


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """What each Ray worker executes; `config` holds the task and its identity."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    from factory.training.run import train_generator
    from factory.training.world import World

    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=str(get_device()) if config["use_gpu"] else "cpu",
        wrap=prepare_model,
    )
    train_generator(config["task"], config["identity"], world)


def _fit_in_workers(
    args: Args,
    task: TrainingTask,
    identity: Mapping[str, Any],
    num_workers: int,
    use_gpu: bool,
    watcher: Watcher,
) -> None:
    """Ray Train over `num_workers`. State lies in `task.out`, so restarted workers go on from its checkpoints.

    Ray Train's own checkpoint registry is not used: a worker that dies just after a report restarts from
    nothing there.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from jobs.cluster import start_ray
    from jobs.latents import fill_latents_by_ray

    with start_ray(args.address, args.num_cpus) as handle:
        cpus = args.cpus_per_worker or (1 if use_gpu else max(1, int(handle.num_cpus) // num_workers))
        if not args.address and num_workers * cpus > handle.num_cpus:
            raise ValueError(
                f"--num-workers {num_workers} × {cpus} CPUs: Ray has {handle.num_cpus:.0f}; they would wait forever. "
                "Ask for fewer workers, or raise --num-cpus"
            )
        if use_gpu and not args.address and num_workers > handle.num_gpus:
            raise ValueError(
                f"--num-workers {num_workers}: Ray has {handle.num_gpus:.0f} GPUs, each worker needs one"
            )
        filled = fill_latents_by_ray(task, num_workers=num_workers, use_gpu=use_gpu, num_cpus=cpus)
        if filled:
            print(f"encoded {filled} latents")
        resources = {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"task": task, "identity": dict(identity), "use_gpu": use_gpu},
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="train",
                storage_path=str(task.out / ".ray"),
                failure_config=FailureConfig(max_failures=args.max_failures),
            ),
        )
        with follow(task.out, watcher):
            try:
                trainer.fit()
            except TrainingFailedError as error:
                for failure in getattr(error, "worker_failures", {}).values():
                    cause = getattr(failure, "_base_exc", failure)
                    if isinstance(cause, ValueError):  # as it would be in this process
                        raise ValueError(str(cause)) from error
                raise


def print_summary(args: Args, summary: TrainingSummary) -> None:
    """What was done, and what to run next."""
    following = (
        f"factory synthesize --recipe {args.recipe} --generator {args.adapt_from or args.out} "
        + (f"--adapters {args.out} " if args.adapt_from else "")
        + f"--real {args.real} --num-requests 128 --out synthetic.lance"
    )
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


def command(argv: Sequence[str]) -> int:
    """`factory train`. `--use-gpu` and `--no-use-gpu` may stand alone."""
    flags = {"--use-gpu": ["--use-gpu", "True"], "--no-use-gpu": ["--use-gpu", "False"]}
    words = list(argv)
    for place in reversed([i for i, word in enumerate(words) if word in flags]):
        if words[place + 1 : place + 2] not in (["True"], ["False"], ["None"]):
            words[place : place + 1] = flags[words[place]]
    args = parse_args(Args, words, "factory train", __doc__ or "")
    print_summary(args, run(args))
    return 0
