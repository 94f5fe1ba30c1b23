"""Which process this is, so that another one can say who holds a lease and whether it still lives."""

import dataclasses
import datetime
import os
import platform
import socket
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process of one machine.

    Attributes:
        host: host name, for people.
        machine: kernel boot id and process namespace where there are such; pids mean something only within.
        pid: process id.
        clock: start time of the process in kernel ticks, so that a reused pid is not taken for it; 0 unknown.
        started: local ISO time at which this identity was made, for people.
    """

    host: str
    machine: str
    pid: int
    clock: int
    started: str

    def is_same_process(self, other: "ProcessIdentity") -> bool:
        """Whether both are one process."""
        return (self.machine, self.pid, self.clock) == (other.machine, other.pid, other.clock)

    def is_known_dead(self) -> bool:
        """True only if the process ran where pids can be looked up from here, and is no more."""
        return self.machine == _machine() and _clock(self.pid) != self.clock

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ProcessIdentity":
        """The inverse of `to_dict`; other keys are ignored."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    return ProcessIdentity(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        clock=_clock(os.getpid()),
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{platform.system()}/{socket.gethostname()}"


def _clock(pid: int) -> int:
    """Start time in ticks from /proc; 0 for a living process where there is no /proc; -1 for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in ("Z", "X") else int(fields[19])
    except OSError:
        if Path("/proc/self/stat").exists():
            return -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        return 0
    return 0
