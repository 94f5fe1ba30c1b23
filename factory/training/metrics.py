"""The learning curve: `OUT/metrics.jsonl`, one JSON object per report with its `step`, and who is told of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Observer:
    """What the process that watches is told, on rank 0. All of it also goes to files in the run's folder.

    Attributes:
        on_latents: called with (latents encoded, latents to encode) while the cache is filled.
        on_start: called with the steps already done, before the first step.
        on_metrics: called with (steps done, numbers).
        on_preview: called with (steps done, path of the image).
    """

    on_latents: Callable[[int, int], None] = field(default=lambda done, total: None)
    on_start: Callable[[int], None] = field(default=lambda step: None)
    on_metrics: Callable[[int, Mapping[str, float]], None] = field(default=lambda step, metrics: None)
    on_preview: Callable[[int, Path], None] = field(default=lambda step, path: None)


class MetricsLog:
    """Writes `metrics.jsonl`. Lines past the checkpoint that is resumed from are dropped first.

    Attributes:
        latest: the last value of every metric.
    """

    def __init__(self, out: Path, start_step: int, observer: Observer) -> None:
        self._path = out / METRICS_FILE
        self._observer = observer
        self.latest: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(out) if line["step"] <= start_step]
        for line in kept:
            self.latest |= {name: value for name, value in line.items() if name != "step"}
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self._path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and the observer; nothing where there are no values."""
        if not values:
            return
        with self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        self.latest |= values
        self._observer.on_metrics(step, values)


def read_metrics(out: Path) -> list[dict[str, float]]:
    """Lines of `metrics.jsonl` so far; a line cut off by a kill is left out."""
    path = out / METRICS_FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # only the last line of a killed process can be torn
    return lines
