"""Trainings as Ray tasks: a map over runs for `factory.evaluation`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

ATTEMPTS_AFTER_DEATH = 2
"""A worker that died (out of memory, a lost machine) has its run started again so many times."""


def ray_executor(
    *, cpus_per_run: float, gpus_per_run: float
) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]:
    """A map in the order of completion; Ray is up. An error in a run ends the map and stops the others."""

    def execute(function: Callable[[Any], Any], runs: Sequence[Any]) -> Iterator[Any]:
        import ray

        task = ray.remote(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=ATTEMPTS_AFTER_DEATH)(
            _one
        )
        shared = ray.put(function)
        waiting = [task.remote(shared, run, max(1, int(cpus_per_run))) for run in runs]
        try:
            while waiting:
                done, waiting = ray.wait(waiting)
                yield ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        finally:
            for one in waiting:
                ray.cancel(one, force=True)

    return execute


def _one(function: Callable[[Any], Any], run: Any, num_threads: int) -> Any:
    import torch

    torch.set_num_threads(num_threads)
    return function(run)
