"""The training loop: which step comes next, what is reported, what is kept. No Ray, no Lance.

A run is a folder. Started again, it goes on from its last checkpoint and ends with the weights, bit for bit, of
a run that was never interrupted (on the same number of processes and threads; otherwise up to rounding).
"""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from factory.training.checkpoints import checkpoint_steps, read_checkpoint, write_checkpoint
from factory.training.metrics import MetricsLog, Observer
from factory.training.mixture import BatchSampler, Shard, global_batch
from factory.training.settings import TrainingSettings
from factory.training.world import World


class Learner(Protocol):
    """What the loop knows of what learns: it owns its modules, optimizers and moving average."""

    def draw(self, shard: Shard) -> Any:
        """Inputs of a shard on the CPU; a pure function, called in a thread."""

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One update; returns scalars on the device, "loss" among them."""

    def validate(self) -> dict[str, float]:
        """Held-out measures with the averaged weights; rank 0 only."""

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights are in place inside the block."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Parameters ("trainable") and averages ("ema") by name."""

    def state_dict(self) -> dict[str, Any]:
        """Optimizers and counters: tensors and plain values."""

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Restores `tensors()` and `state_dict()` exactly."""

    def finish(self) -> None:
        """Leaves the averaged weights in place, for saving."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What one call of the loop did.

    Attributes:
        start_step, steps: updates done before, and after.
        seconds: wall time of this call's steps, everything in between included.
        step_seconds: of these, spent in the steps themselves (without validation, previews, checkpoints).
        metrics: the last value of every metric.
    """

    start_step: int
    steps: int
    seconds: float
    step_seconds: float
    metrics: Mapping[str, float]

    @property
    def steps_per_second(self) -> float:
        """Rate of the steps themselves; 0 where none was done."""
        return (self.steps - self.start_step) / self.step_seconds if self.step_seconds else 0.0


def train(
    learner: Learner,
    sampler: BatchSampler,
    settings: TrainingSettings,
    out: Path,
    *,
    world: World,
    observer: Observer | None = None,
    preview: Callable[[Path], None] | None = None,
    constants: Mapping[str, float] | None = None,
) -> TrainingResult:
    """Take steps until `settings.max_steps`, from the last checkpoint in `out` where there is one.

    Args:
        learner: what learns: a diffusion generator, a VAE, a mask GAN, a mask DDPM.
        sampler: rows of each step.
        settings: `batch_size` must be the sampler's.
        out: the run's folder; only rank 0 writes.
        world: the processes that train together; each must call this.
        observer: told of metrics and previews.
        preview: writes a grid of samples of the averaged weights to a path.
        constants: numbers of the whole run, reported once, at step 0.

    Raises:
        ValueError: the run in `out` is already past `max_steps`; a checkpoint is damaged or does not fit; the
            loss or the gradient is no longer finite (the last checkpoint is then from before).
    """
    observer = observer or Observer()
    start_step, window = resume(learner, out, world.device)
    if start_step > settings.max_steps:
        raise ValueError(
            f"training.max_steps: {settings.max_steps} asked for, but {out} holds {start_step} steps already; "
            "ask for more, choose another --out, or --overwrite"
        )
    log = MetricsLog(out, start_step, observer) if world.rank == 0 else None
    if log is not None:
        observer.on_start(start_step)
    if log is not None and start_step == 0 and not log.latest:
        log.write(0, constants or {})
    step_seconds = 0.0
    begin = time.perf_counter()
    with ThreadPoolExecutor(1, thread_name_prefix="draw") as pool:
        # Drawing is a pure function of the step, so one batch ahead changes nothing.
        pending = pool.submit(learner.draw, world.shard(global_batch(sampler, start_step)))
        for step in range(start_step, settings.max_steps):
            step_begin = time.perf_counter()
            batch = pending.result()
            if step + 1 < settings.max_steps:
                pending = pool.submit(learner.draw, world.shard(global_batch(sampler, step + 1)))
            window.add(learner.step(batch))
            done = step + 1
            is_last = done == settings.max_steps
            saves = is_last or done % settings.checkpoint_every == 0
            reports = is_last or done % settings.log_every == 0
            if reports or saves:
                values = window.means(world, done)  # waits for the device, so the time below is whole
            step_seconds += time.perf_counter() - step_begin
            if reports:
                window = _Window()
            if log is None:
                continue
            if reports:
                rate = (done - start_step) / step_seconds
                values |= {
                    "learning_rate": settings.learning_rate_at(step),
                    "epoch": sampler.epoch(done),
                    "steps_per_second": rate,
                    "images_per_second": rate * settings.batch_size,
                }
                log.write(done, values)
            if settings.validate_every and (is_last or done % settings.validate_every == 0):
                log.write(done, learner.validate())
            if (
                preview is not None
                and settings.sample_every
                and (is_last or done % settings.sample_every == 0)
            ):
                path = out / "samples" / f"step-{done:08d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_name("unfinished.png")
                with learner.averaged():
                    preview(unfinished)
                unfinished.replace(path)
                observer.on_preview(done, path)
            if saves:
                unreported = {} if reports else values
                state = {
                    "step": done,
                    "window": unreported,
                    "window_steps": window.count,
                    **learner.state_dict(),
                }
                write_checkpoint(out, done, learner.tensors(), state, keep=settings.keep_checkpoints)
    return TrainingResult(
        start_step=start_step,
        steps=settings.max_steps,
        seconds=time.perf_counter() - begin,
        step_seconds=step_seconds,
        metrics=log.latest if log is not None else {},
    )


def resume(learner: Learner, out: Path, device: str) -> tuple[int, "_Window"]:
    """Load the last checkpoint in `out` into the learner: its step, and the means not reported yet.

    Step 0 where there is none.
    """
    steps = checkpoint_steps(out)
    if not steps:
        return 0, _Window()
    tensors, state = read_checkpoint(out, steps[-1])
    learner.load(tensors, state)
    window = _Window()
    window.count = int(state["window_steps"])
    window.sums = {n: torch.tensor(v * window.count, device=device) for n, v in state["window"].items()}
    return steps[-1], window


class _Window:
    """Sums of metrics over `count` steps since the last report, on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def means(self, world: World, step: int) -> dict[str, float]:
        """Means over the window and the processes. Collective.

        Raises:
            ValueError: one of them is not finite.
        """
        values = world.mean({name: value / self.count for name, value in self.sums.items()})
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"training diverged by step {step}: {', '.join(bad)} is not finite; lower training.learning_rate "
                "(the last checkpoint is from before; --overwrite starts again)"
            )
        return values
