"""One committer at a time per (table, plan): a file lock locally, a Lance config key elsewhere.

Lance's Append has no compare-and-swap, so two committers of one plan would commit the same requests twice.
The kernel releases the file lock when its process dies, however it dies. A config key stays behind; it is
taken over when its holder is known to be dead, or has not renewed it for `seconds_to_live`. A thread renews it.
"""

import dataclasses
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Literal, Protocol

import lance

from factory.storage.errors import StorageUnreachable, reliably, storage_faults
from factory.storage.ledger import Ledger
from factory.storage.location import StorageOptions, is_remote, lance_options
from factory.storage.process import ProcessIdentity, this_process

LeaseKind = Literal["file", "config"]
SECONDS_TO_LIVE = 300.0
"""A lease that was not renewed for so long may be taken over; it is renewed four times as often."""
_LOG = logging.getLogger(__name__)
_CONFLICT_SIGNS = ("Incompatible transaction", "conflict")


class LeaseHeld(OSError):
    """Another process commits this plan to this table."""


class LeaseLost(OSError):
    """This process no longer holds its lease; it must not commit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease: the process, the run of the job, and a token drawn when it was taken."""

    process: ProcessIdentity
    run_id: str
    token: str
    renewed: float

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Holder | None":
        """The inverse of `to_json`; None where `text` is no such line (a lock file just being written)."""
        try:
            values: dict[str, Any] = json.loads(text)
            return cls(**{**values, "process": ProcessIdentity.from_dict(values["process"])})
        except (json.JSONDecodeError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        p = self.process
        return f"process {p.pid} on {p.host}, started {p.started}, run {self.run_id}"


class Lease(Protocol):
    """Held from construction to `release`."""

    def check(self) -> None:
        """Raise LeaseLost unless this process still holds the lease; renews it where that is needed."""

    def release(self) -> None:
        """Let it go; a second call does nothing."""


def take_lease(
    uri: str,
    plan_id: str,
    *,
    run_id: str,
    kind: LeaseKind | None = None,
    storage_options: StorageOptions = None,
    seconds_to_live: float = SECONDS_TO_LIVE,
) -> Lease:
    """The lease of `plan_id` on the table at `uri`: by `kind`, or what its storage can do.

    Raises:
        LeaseHeld: another process holds it; the message says which.
    """
    if kind == "file" or (kind is None and not is_remote(uri)):
        return FileLease(Ledger(uri, plan_id), run_id=run_id)
    return ConfigLease(
        uri, plan_id, run_id=run_id, storage_options=storage_options, seconds_to_live=seconds_to_live
    )


class FileLease:
    """An flock on a file of the ledger, which also says who holds it."""

    def __init__(self, ledger: Ledger, *, run_id: str) -> None:
        if ledger.folder is None:
            raise ValueError(f"{ledger.uri}: an object store has no file locks; use a config lease")
        self._path: Path = ledger.folder / "lease"
        with storage_faults(ledger.uri, "take the lease of"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._holder = _holder(run_id)
            os.ftruncate(handle, 0)
            os.pwrite(handle, self._holder.to_json().encode(), 0)
        except BlockingIOError as fault:
            holder = Holder.from_json(os.pread(handle, 1 << 16, 0).decode(errors="replace"))
            os.close(handle)
            raise LeaseHeld(_held(ledger.uri, ledger.plan_id, holder)) from fault
        except BaseException:
            os.close(handle)
            raise
        self._handle: int | None = handle

    def check(self) -> None:
        """Raise LeaseLost if the lock file was removed or replaced, or the lease released."""
        if self._handle is None:
            raise LeaseLost(f"lease {self._path} was released")
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        mine = os.fstat(self._handle)
        if there is None or (there.st_ino, there.st_dev) != (mine.st_ino, mine.st_dev):
            raise LeaseLost(f"lease file {self._path} was removed while it was held; stop the other job")

    def release(self) -> None:
        """Close the file, which lets the lock go. The file stays: removing it would race with a new holder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class ConfigLease:
    """The table's config key ``lease.<plan_id>``: Lance refuses a change of a key that changed meanwhile.

    A thread renews it every quarter of its life, also while no commit comes. A process that stands still for longer
    than `seconds_to_live` between its check and its commit could commit beside its successor: keep that far above the
    longest commit. Clocks of the machines must agree to within a quarter of it.
    """

    def __init__(
        self,
        uri: str,
        plan_id: str,
        *,
        run_id: str,
        storage_options: StorageOptions = None,
        seconds_to_live: float = SECONDS_TO_LIVE,
    ) -> None:
        self._uri, self._plan_id = uri, plan_id
        self._key = f"lease.{plan_id}"
        self._options = lance_options(storage_options)
        self._seconds_to_live = seconds_to_live
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._holder: Holder | None = _holder(run_id)
        dataset = self._open()
        held = Holder.from_json(dataset.config().get(self._key, ""))
        if held is not None and not self._is_over(held):
            raise LeaseHeld(_held(uri, plan_id, held))
        if not self._put(dataset, self._holder):
            raise LeaseHeld(_held(uri, plan_id, Holder.from_json(self._open().config().get(self._key, ""))))
        threading.Thread(target=self._renew_until_released, name=self._key, daemon=True).start()

    def check(self) -> None:
        """Raise LeaseLost unless the key still names this holder; renew it after a quarter of its life."""
        with self._lock:
            dataset = self._open()
            stored = Holder.from_json(dataset.config().get(self._key, ""))
            if self._holder is None or stored is None or stored.token != self._holder.token:
                raise LeaseLost(f"the lease of plan {self._plan_id} on {self._uri} is now held by {stored}")
            if time.time() - stored.renewed > self._seconds_to_live / 4:
                renewed = dataclasses.replace(self._holder, renewed=time.time())
                if not self._put(dataset, renewed):
                    raise LeaseLost(
                        f"the lease of plan {self._plan_id} on {self._uri} was taken by another process"
                    )
                self._holder = renewed

    def release(self) -> None:
        """Remove the key, if it still names this holder."""
        self._stop.set()
        with self._lock:
            if self._holder is None:
                return
            holder, self._holder = self._holder, None
            dataset = self._open()
            stored = Holder.from_json(dataset.config().get(self._key, ""))
            if stored is not None and stored.token == holder.token:
                self._put(dataset, None)

    def _renew_until_released(self) -> None:
        """The thread: what it cannot do now it tries again a quarter of the lease's life later; `check` decides."""
        while not self._stop.wait(self._seconds_to_live / 4):
            try:
                self.check()
            except LeaseLost:
                return
            except OSError as fault:
                _LOG.warning("the lease of plan %s was not renewed: %s", self._plan_id, fault)

    def _open(self) -> lance.LanceDataset:
        return reliably(
            self._uri,
            "read the lease of",
            lambda: lance.dataset(self._uri, storage_options=self._options),
        )

    def _is_over(self, held: Holder) -> bool:
        return held.process.is_known_dead() or time.time() - held.renewed > self._seconds_to_live

    def _put(self, dataset: lance.LanceDataset, holder: Holder | None) -> bool:
        """Whether the key could be set from what `dataset` has read; False if it changed meanwhile."""
        seen = dataset.config().get(self._key)
        wanted = None if holder is None else holder.to_json()
        while True:
            try:
                with storage_faults(self._uri, "take the lease of"):
                    dataset.update_config({self._key: wanted})
                return True
            except StorageUnreachable:
                dataset = (
                    self._open()
                )  # waits for the store; the change may have arrived although it was not said
                if dataset.config().get(self._key) == wanted:
                    return True
            except OSError as fault:
                if not any(sign in str(fault) for sign in _CONFLICT_SIGNS):
                    raise
                dataset = self._open()  # another key may have been set: that is no refusal
            if dataset.config().get(self._key) != seen:
                return False


def _holder(run_id: str) -> Holder:
    return Holder(process=this_process(), run_id=run_id, token=uuid.uuid4().hex, renewed=time.time())


def _held(uri: str, plan_id: str, holder: Holder | None) -> str:
    who = "a process that is just starting" if holder is None else str(holder)
    return f"{uri}: plan {plan_id} is being written by {who}; wait for it or stop it"
