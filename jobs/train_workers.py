"""Where a training run executes: in this process, or in the workers of Ray Train."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from factory.training.parts import PartTask, train_run
from factory.training.settings import TrainingSettings
from factory.training.task import TrainingTask
from jobs.train_progress import Watcher, follow


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Ray workers that train together.

    Attributes:
        number: how many; with `least` at most so many.
        least: training goes on with so many while others are away, and takes them in again when they are back;
            None: always `number`.
        use_gpu: one GPU for each.
        cpus_per_worker: of each; None is an equal share of all, beside a GPU 1.
        max_failures: times that they may die before the job fails.
        address: Ray cluster to join; None starts a private Ray.
        num_cpus: of a private Ray.
    """

    number: int
    least: int | None = None
    use_gpu: bool
    cpus_per_worker: int | None
    max_failures: int
    address: str | None
    num_cpus: int | None

    @property
    def needed(self) -> int:
        """Workers without which training does not begin."""
        return self.number if self.least is None else self.least

    def check(self, settings: TrainingSettings) -> None:
        """Each number of workers between the bounds must share the batch equally.

        Raises:
            ValueError: one of them does not, or the bounds are the wrong way round.
        """
        if self.least is None:
            return
        if not 1 <= self.least <= self.number:
            raise ValueError(
                f"--min-workers {self.least}: want 1 … --num-workers ({self.number}); leave it out for a fixed number"
            )
        for number in range(self.least, self.number + 1):
            settings.check_world_size(number)


RESIZE_SECONDS = 60.0
"""How often a healthy elastic group looks whether more workers could join."""


def fit_here(
    task: TrainingTask | PartTask, identity: Mapping[str, Any], use_gpu: bool, watcher: Watcher
) -> None:
    """Ray Train's local mode: the same trainer, this process, no cluster."""
    import torch
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from factory.training.metrics import Observer
    from factory.training.world import World

    def train_loop_per_worker() -> None:
        observer = Observer(
            on_latents=watcher.on_latents,
            on_start=watcher.on_start,
            on_metrics=watcher.on_metrics,
            on_preview=watcher.on_preview,
        )
        train_run(task, identity, World(device="cuda" if use_gpu else "cpu"), observer)

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    TorchTrainer(train_loop_per_worker, scaling_config=ScalingConfig(num_workers=0, use_gpu=use_gpu)).fit()
    if use_gpu:
        torch.cuda.empty_cache()  # the next job of this process may want the GPU in another one


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """What each Ray worker executes; `config` holds the task and its identity."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    from factory.training.world import World

    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=str(get_device()) if config["use_gpu"] else "cpu",
        wrap=prepare_model,
    )
    train_run(config["task"], config["identity"], world)


def fit_in_workers(
    task: TrainingTask | PartTask, identity: Mapping[str, Any], workers: Workers, watcher: Watcher
) -> None:
    """Ray Train over several workers. State lies in `task.out`, so restarted workers go on from its checkpoints.

    Ray Train's own checkpoint registry is not used: a worker that dies just after a report restarts from
    nothing there.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from jobs.cluster import start_ray
    from jobs.latents import fill_latents_by_ray

    num_workers, use_gpu = workers.number, workers.use_gpu
    with start_ray(workers.address, workers.num_cpus) as handle:
        cpus = workers.cpus_per_worker or (1 if use_gpu else max(1, int(handle.num_cpus) // num_workers))
        if not handle.is_cluster and workers.needed * cpus > handle.num_cpus:
            raise ValueError(
                f"--num-workers {workers.needed} × {cpus} CPUs: Ray has {handle.num_cpus:.0f}; they would wait forever. "
                "Ask for fewer workers, or raise --num-cpus"
            )
        if use_gpu and not handle.is_cluster and workers.needed > handle.num_gpus:
            raise ValueError(
                f"--num-workers {workers.needed}: Ray has {handle.num_gpus:.0f} GPUs, each worker needs one"
            )
        if isinstance(task, TrainingTask):
            filled = fill_latents_by_ray(task, num_workers=num_workers, use_gpu=use_gpu, num_cpus=cpus)
            if filled:
                print(f"encoded {filled} latents")
        resources = {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"task": task, "identity": dict(identity), "use_gpu": use_gpu},
            scaling_config=ScalingConfig(
                num_workers=num_workers if workers.least is None else (workers.least, num_workers),
                use_gpu=use_gpu,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=RunConfig(
                name="train",
                storage_path=str(task.out / ".ray"),
                failure_config=FailureConfig(max_failures=workers.max_failures),
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
