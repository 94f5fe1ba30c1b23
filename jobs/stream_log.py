"""The log of a stream beside its table: where it is kept, and what it said last. Imports nothing heavy."""

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.storage import is_remote, ledger_folder

_TAIL_BYTES = 65_536
WHOLE = "all"
"""The stage name of the line about the whole stream, the last of each report."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The latest whole report of a run: a line per stage, then the one of the whole stream.

    Attributes:
        run_id: the run that wrote it.
        entries: the lines as `jobs.observing` wrote them.
    """

    run_id: str
    entries: tuple[Mapping[str, Any], ...]

    @property
    def time(self) -> datetime.datetime:
        """When it was written, UTC."""
        return datetime.datetime.fromisoformat(self.entries[-1]["time"])

    def lines(self, now: datetime.datetime) -> Iterator[str]:
        """What is printed of it at `now`."""
        age = duration((now - self.time).total_seconds())
        yield f"last report {age} ago, of run {self.run_id}:"
        for entry in self.entries:
            yield f"  {'whole stream' if entry['stage'] == WHOLE else entry['stage']}: {_words(entry)}"


def log_file(table: str, plan_id: str, run_id: str) -> Path | None:
    """Where the lines about a run over `table` are kept: in the ledger of a local table, nowhere for another."""
    folder = _log_folder(table, plan_id)
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run_id}.jsonl"


def last_report(table: str, plan_id: str) -> Report | None:
    """The latest whole report about a plan, of whichever run; None where there is none or the table is remote."""
    folder = _log_folder(table, plan_id)
    logs = list(folder.glob("*.jsonl")) if folder is not None and folder.is_dir() else []
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        report = _read(path)
        if report is not None:
            return report
    return None


def duration(seconds: float) -> str:
    """A time span in one unit: 45 s, 12 min, 3.5 h, 2.1 d."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def _log_folder(table: str, plan_id: str) -> Path | None:
    return None if is_remote(table) else Path(ledger_folder(table)) / "log" / plan_id


def _read(path: Path) -> Report | None:
    """The last whole report of a log; a line that a killed job left torn does not count."""
    with path.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(stream.tell() - _TAIL_BYTES, 0))
        raw = stream.read().split(b"\n")
    entries: list[Mapping[str, Any]] = []
    for line in raw:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"time", "stage"} <= set(entry):
            entries.append(entry)
    ends = [number for number, entry in enumerate(entries) if entry["stage"] == WHOLE]
    if not ends:
        return None
    first = ends[-2] + 1 if len(ends) > 1 else 0
    return Report(run_id=path.stem, entries=tuple(entries[first : ends[-1] + 1]))


def _words(entry: Mapping[str, Any]) -> str:
    """One line about a stage."""
    words = [f"{entry.get('rows', 0)}{' of ' + str(entry['total']) if 'total' in entry else ''} rows"]
    words.append(f"{entry.get('rows_per_second', 0.0):.2f} rows/s")
    if entry["stage"] == WHOLE:
        left = entry.get("eta_seconds")
        words.append("no end in sight yet" if left is None else f"{duration(left)} left then")
        words += [
            f"{name.partition('.')[2]} {n}" for name, n in entry.items() if name.startswith("rejected.")
        ]
        return ", ".join(words)
    if "busy" in entry:
        words.append(f"busy {entry['busy']:.0%}")
    words += [f"{entry[name]} {name}" for name in ("running", "queued", "failed") if entry.get(name)]
    return ", ".join(words)
