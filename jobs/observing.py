"""What a stream is doing, while it does it: one structured line per stage and minute, MLflow metrics, Prometheus.

    time=2026-01-31T12:00:00+00:00 job=synthesize stage=synthesizer rows=640 rows_per_second=3.20 busy=0.94 queued=2 …

The lines go to a log beside the table, and to standard error where that is not a terminal (a terminal has its progress
bar). The same numbers are gauges of Ray's own metrics, which its Prometheus endpoint on each node serves as
`ray_factory_stage_…`. Numbers come from the executor of Ray Data, so a stage that is stuck is seen to be stuck.
"""

import contextlib
import datetime
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from factory.redaction import redact

EVERY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a stream.

    Attributes:
        name: as in the log.
        operator: part of the name of the Ray Data operator that runs it.
        num_workers: actors of its pool; 0 for tasks, of which as many run as fit.
    """

    name: str
    operator: str
    num_workers: int = 0


@dataclass(frozen=True, kw_only=True)
class StageState:
    """Where a stage stands: all since the start, but for `running` and `queued`, which are of this moment.

    Attributes:
        rows: rows that left it.
        busy_seconds: sum over its tasks of the time spent in them.
        running: tasks that run.
        queued: batches that wait for it.
        failed: tasks that failed, tries included.
    """

    rows: int = 0
    busy_seconds: float = 0.0
    running: int = 0
    queued: int = 0
    failed: int = 0


class StreamObserver:
    """Turns states of stages into lines, metrics and gauges, once a minute.

    Args:
        job: name of the job in the lines.
        total: rows that the stream is to make.
        stages: in the order of the stream; the last one's rows count as done.
        log: file that lines are appended to as JSON, or None.
        every_seconds: between two reports.
        lines: stream for the readable lines, or None.
        prometheus: also set gauges of Ray's metrics.
    """

    def __init__(
        self,
        job: str,
        total: int,
        stages: Sequence[Stage],
        *,
        log: Path | None = None,
        every_seconds: float = EVERY_SECONDS,
        lines: TextIO | None = None,
        prometheus: bool = True,
    ) -> None:
        self.job, self.total, self.stages = job, total, tuple(stages)
        self._log, self._every, self._lines = log, every_seconds, lines
        self._start = self._last = time.perf_counter()
        self._before: dict[str, StageState] = {}
        self._rejected: Counter[str] = Counter()
        self._done = 0
        self._metrics: dict[str, float] = {}
        self._gauges: dict[str, Any] | None = None if prometheus else {}
        self._lock = threading.Lock()

    def add(self, rows: int, rejected: Mapping[str, int] | None = None) -> None:
        """Rows that came out of the stream, and the reasons of the rejected among them."""
        with self._lock:
            self._done += rows
            self._rejected.update(rejected or {})

    def observe(self, states: Mapping[str, StageState]) -> bool:
        """Take note of the stages' states by name; reports, and returns True, when it is time."""
        now = time.perf_counter()
        if now - self._last < self._every:
            return False
        with self._lock:
            self._report(states, now - self._last)
        self._last, self._before = now, dict(states)
        return True

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the last report, by name, once; empty where there is nothing new. For the driver's thread."""
        with self._lock:
            found, self._metrics = self._metrics, {}
        return found

    def _report(self, states: Mapping[str, StageState], seconds: float) -> None:
        whole = time.perf_counter() - self._start
        rate = self._done / whole
        left = (self.total - self._done) / rate if rate else None
        for stage in self.stages:
            state, before = states.get(stage.name, StageState()), self._before.get(stage.name, StageState())
            fields: dict[str, Any] = {
                "rows": state.rows,
                "rows_per_second": round((state.rows - before.rows) / seconds, 3),
                "running": state.running,
                "queued": state.queued,
                "failed": state.failed,
            }
            if stage.num_workers:
                # Ray reports a task's time when its block is done, so a window can hold a little more than its length.
                busy = (state.busy_seconds - before.busy_seconds) / (seconds * stage.num_workers)
                fields["busy"] = round(min(busy, 1.0), 3)
            self._emit(stage.name, fields)
        self._emit(
            "all",
            {
                "rows": self._done,
                "total": self.total,
                "rows_per_second": round(rate, 3),
                "eta_seconds": None if left is None else round(left),
                **{f"rejected.{reason}": count for reason, count in sorted(self._rejected.items())},
            },
        )

    def _emit(self, stage: str, fields: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"time": now, "job": self.job, "stage": stage, **fields}
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(redact(json.dumps(entry)) + "\n")
        if self._lines is not None:
            print(" ".join(f"{key}={value}" for key, value in entry.items()), file=self._lines, flush=True)
        numbers = {name: float(value) for name, value in fields.items() if value is not None}
        self._metrics |= {f"stream.{stage}.{name}": value for name, value in numbers.items()}
        self._set_gauges(stage, numbers)

    def _set_gauges(self, stage: str, numbers: Mapping[str, float]) -> None:
        if self._gauges is None:
            self._gauges = _gauges()
        for name, value in numbers.items():
            kind, _, reason = name.partition(".")
            if kind in self._gauges:
                tags = {"job": self.job, "stage": stage, "reason": reason}
                self._gauges[kind].set(value, tags=tags)


def _gauges() -> dict[str, Any]:
    """Gauges of Ray's metrics by field; they need a connected Ray."""
    from ray.util.metrics import Gauge

    about = {
        "rows": "Rows that left the stage",
        "rows_per_second": "Rows per second since the last report",
        "running": "Tasks running",
        "queued": "Batches waiting",
        "failed": "Tasks failed, tries included",
        "busy": "Share of its workers' time that the stage computed",
        "eta_seconds": "Seconds left",
        "rejected": "Rows rejected, by reason",
    }
    keys = ("job", "stage", "reason")
    return {
        name: Gauge(f"factory_stage_{name}", description=text, tag_keys=keys) for name, text in about.items()
    }


def states_of(executor: Any, stages: Sequence[Stage]) -> dict[str, StageState]:
    """States of the stages in a running Ray Data executor.

    The executor is no public interface of Ray; this function is the only place that looks into it. An operator
    that Ray fused from two stages counts for both.
    """
    found: dict[str, StageState] = {}
    for operator, state in executor._topology.items():
        metrics = operator.metrics
        for stage in stages:
            if stage.operator in operator.name:
                found[stage.name] = StageState(
                    rows=metrics.row_outputs_taken,
                    busy_seconds=metrics.block_generation_time,
                    running=metrics.num_tasks_running,
                    queued=state.total_enqueued_input_blocks(),
                    failed=metrics.num_tasks_failed,
                )
    return found


class Observing(ExecutionCallback):
    """Shows the executor to the observer in force. Ray sends the class, by name, to the workers, which never use it."""

    observer: ClassVar[StreamObserver | None] = None

    def on_execution_step(self, executor: Any) -> None:
        """Called by the executor's thread many times a second."""
        if self.observer is not None:
            self.observer.observe(states_of(executor, self.observer.stages))


@contextlib.contextmanager
def observing(observer: StreamObserver) -> Iterator[None]:
    """`observer` sees the Ray Data streams that are made and run inside the block."""
    context = ray.data.DataContext.get_current()
    before, Observing.observer = context.custom_execution_callback_classes, observer
    context.custom_execution_callback_classes = [*before, Observing]
    try:
        yield
    finally:
        context.custom_execution_callback_classes = before
        Observing.observer = None
