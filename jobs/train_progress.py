"""Watching a training run from the driver: MLflow and the progress line, directly or from the run's files."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from factory.training.metrics import read_metrics
from factory.training.parts import PartTask
from factory.training.task import TrainingTask
from jobs.progress import progress_bar

if TYPE_CHECKING:
    from factory.tracking import Run

_POLL_SECONDS = 1.0


def latest_metrics(out: Path) -> dict[str, float]:
    """The last value of every metric."""
    latest: dict[str, float] = {}
    for line in read_metrics(out):
        latest |= {name: value for name, value in line.items() if name != "step"}
    return latest


class Watcher:
    """Hands metrics and previews to MLflow and the progress line, in the driver."""

    def __init__(self, task: TrainingTask | PartTask, tracked: "Run") -> None:
        self._task, self._tracked = task, tracked
        self._stack = contextlib.ExitStack()
        self._advance: Callable[[int], None] | None = None
        self._done = 0
        self._encoding: contextlib.ExitStack | None = None
        self._encoded = 0

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *details: object) -> None:
        self._close_encoding()
        self._stack.close()

    def on_latents(self, done: int, total: int) -> None:
        """A progress line for filling the cache."""
        if self._encoding is None:
            self._encoding, self._encoded = contextlib.ExitStack(), 0
            self._advance = self._encoding.enter_context(progress_bar("encode latents", total))
        if self._advance is not None:
            self._advance(done - self._encoded)
        self._encoded = done
        if done == total:
            self._close_encoding()

    def _close_encoding(self) -> None:
        if self._encoding is not None:
            self._encoding.close()
        self._encoding = None

    def on_start(self, step: int) -> None:
        """Begin the progress line, and give MLflow the whole curve where a run goes on."""
        for line in read_metrics(self._task.out) if step else ():
            if line["step"] <= step:
                self._tracked.metrics({n: v for n, v in line.items() if n != "step"}, int(line["step"]))
        self._done = step
        self._advance = self._stack.enter_context(progress_bar("train", self._task.settings.max_steps - step))

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._tracked.metrics(values, step)
        if self._advance is not None and step > self._done:
            self._advance(step - self._done)
            self._done = step

    def on_preview(self, step: int, path: Path) -> None:
        self._tracked.artifact(path)


@contextlib.contextmanager
def follow(out: Path, watcher: Watcher) -> Iterator[None]:
    """Reports what the workers append to the run's folder while the block runs."""
    stop = threading.Event()
    follower = _Follower(out, watcher)

    def follow() -> None:
        while not stop.wait(_POLL_SECONDS):
            follower.poll()

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        follower.poll()


class _Follower:
    """Reads new lines of `metrics.jsonl` and new previews; steps seen before (a restart's) are not repeated."""

    def __init__(self, out: Path, watcher: Watcher) -> None:
        from factory.training.checkpoints import checkpoint_steps

        self._out, self._watcher = out, watcher
        self._seen = max(checkpoint_steps(out), default=0)
        self._previews = set(self._grids())
        self._started = False
        self._reported: set[str] = set()

    def _grids(self) -> list[Path]:
        return sorted((self._out / "samples").glob("step-*.png"))

    def poll(self) -> None:
        lines = [line for line in read_metrics(self._out) if line["step"] > self._seen or not self._seen]
        if lines and not self._started:
            self._watcher.on_start(self._seen)
            self._started = True
        for line in lines:
            key = json.dumps([line["step"], sorted(line)])
            if key not in self._reported:
                self._reported.add(key)
                self._watcher.on_metrics(int(line["step"]), {n: v for n, v in line.items() if n != "step"})
        for path in self._grids():
            if path not in self._previews:
                self._previews.add(path)
                self._watcher.on_preview(int(path.stem.removeprefix("step-")), path)
