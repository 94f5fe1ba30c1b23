"""Errors of the storage layer, said so that an operator knows what happened and what to do."""

import contextlib
import errno
import os
from collections.abc import Iterator

_DISK_FULL = ("no space left", "os error 28", "disk quota", "os error 122")
_FORBIDDEN = ("permission denied", "os error 13", "read-only file system", "os error 30", "access denied")


class StorageFull(OSError):
    """The device that holds a table is full; what was committed before is intact."""


class TableDamaged(RuntimeError):
    """A table, or a record of its ledger, contradicts itself."""


class DuplicateRequests(TableDamaged):
    """A request_id (or a request_index of one plan) stands in a table more than once."""


@contextlib.contextmanager
def storage_faults(uri: str, action: str) -> Iterator[None]:
    """Translate I/O errors met while doing `action` ("write a fragment of", …) to the table at `uri`.

    Raises:
        StorageFull: the device is full. The table is left as it was before `action`.
        PermissionError: the path may not be written or read, or is mounted read-only.
    """
    try:
        yield
    except (StorageFull, PermissionError):
        raise
    except (OSError, RuntimeError, ValueError) as fault:
        text = str(fault).lower()
        number = fault.errno if isinstance(fault, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in _DISK_FULL):
            message = (
                f"cannot {action} {uri}: the device is full. What was committed is intact; free some space "
                f"and run the same command again ({os.fspath(uri)})"
            )
            raise StorageFull(errno.ENOSPC, message) from fault
        if number in (errno.EACCES, errno.EPERM, errno.EROFS) or any(sign in text for sign in _FORBIDDEN):
            message = f"cannot {action} {uri}: permission denied or read-only; what was committed is intact"
            raise PermissionError(errno.EACCES, message) from fault
        raise
