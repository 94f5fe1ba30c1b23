"""Entries for a store that is away: kept on disk in order, sent when it is back, by this process or a later one.

An outbox is a file `NAME.jsonl` of one run, made by the first entry that cannot be sent, with a folder `NAME.d`
for its artifacts. Its first line names the store; a line `{"sent": n}` says that the first n entries have been
sent. The process that records the run holds a lock on the file; a file without a lock is a leftover.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from factory.redaction import redact
from factory.tracking.store import STORE_FOLDER, is_away, refusals

logger = logging.getLogger("factory.tracking")

Entry = dict[str, Any]


def outbox_folder() -> Path:
    """FACTORY_MLFLOW_OUTBOX, or `runs/mlflow-outbox`."""
    return Path(os.environ.get("FACTORY_MLFLOW_OUTBOX") or STORE_FOLDER / "mlflow-outbox").absolute()


class Outbox:
    """What one run still has to tell the store. Nothing is on disk until the first `add`."""

    def __init__(self, uri: str) -> None:
        self._uri = redact(uri)
        self._entries: list[Entry] = []
        self._sent = 0
        self._file: IO[str] | None = None
        self.path: Path | None = None

    def __len__(self) -> int:
        return len(self._entries) - self._sent

    def add(self, entry: Entry, run_id: str | None) -> None:
        """Keep an entry; the file of an artifact is copied. `run_id` is the run's, where MLflow has made it.

        Raises:
            OSError: the disk is full or the folder not writable.
        """
        if self._file is None:
            self._create()
            if run_id is not None:
                self._write({"run_id": run_id})
        assert self.path is not None and self._file is not None
        if entry["op"] == "artifact":
            entry = entry | {"path": str(self._copy(Path(entry["path"])))}
        self._write(entry)
        self._entries.append(entry)

    def _create(self) -> None:
        folder = outbox_folder()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.path = folder / f"{name}.jsonl"
        self._file = self.path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._write({"store": self._uri})

    def _copy(self, source: Path) -> Path:
        assert self.path is not None
        folder = self.path.with_suffix(".d") / f"{len(self._entries):06d}"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / source.name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
        return target

    def _write(self, line: Entry) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def send(self, send: Callable[[Entry], Any]) -> bool:
        """Hand the entries to `send` in order; whether all are gone. What the store refuses for good is said and left out."""
        while len(self):
            entry = self._entries[self._sent]
            try:
                send(entry)
            except refusals() as error:
                if is_away(error):
                    return False
                logger.warning("MLflow refuses %s, left out: %s", entry["op"], redact(str(error)))
            self._sent += 1
            self._write({"sent": self._sent})
        self._entries, self._sent = [], 0
        self._remove()
        return True

    def note(self, line: Entry) -> None:
        """Remember something beside the entries, where there is a file."""
        if self._file is not None:
            self._write(line)

    def _remove(self) -> None:
        if self.path is None or self._file is None:
            return
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.path.with_suffix(".d"), ignore_errors=True)
        self._file.close()
        self._file = self.path = None

    def close(self) -> None:
        """Leave what is there to a later process."""
        if self._file is not None:
            self._file.close()
            self._file = None


def leftovers(uri: str) -> Iterator[tuple[Outbox, str | None]]:
    """Outboxes for this store whose process is gone, oldest first, each with the id of its run if that was made.

    They are locked while they are held.
    """
    for path in sorted(outbox_folder().glob("*.jsonl")):
        try:
            file = path.open("r+")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        found = _read(path, file, uri)
        if found is None:
            file.close()
        else:
            yield found


def _read(path: Path, file: IO[str], uri: str) -> tuple[Outbox, str | None] | None:
    """The outbox in a file; None where it is another store's, or sent meanwhile."""
    lines = []
    for text in file:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the last line of a process that was killed while it wrote
    if not lines or lines[0].get("store") != redact(uri) or not path.exists():
        return None
    outbox = Outbox(uri)
    outbox.path, outbox._file = path, file
    run_id = None
    for line in lines[1:]:
        if "sent" in line:
            outbox._sent = line["sent"]
        elif "run_id" in line and "op" not in line:
            run_id = line["run_id"]
        else:
            outbox._entries.append(line)
    return outbox, run_id
