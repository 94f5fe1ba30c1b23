"""Errors of the storage layer, said so that an operator knows what happened and what to do.

A file system that is full, forbidden or broken stops the job with one line. Faults of an object store are of two kinds: it does not answer (`StorageUnreachable`: tried again for about a minute
and a half, said once), and it refuses (no such bucket, access denied: the job stops with one line).
"""

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from factory.storage.location import is_remote

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
"""Waits between the tries of one access to an object store; Lance and pyarrow retry single requests themselves."""
_DISK_FULL = ("no space left", "os error 28", "disk quota", "os error 122")
_FORBIDDEN = (
    "permission denied",
    "os error 13",
    "read-only file system",
    "os error 30",
    "access denied",
    "access_denied",
    "accessdenied",
    "403 forbidden",
    "401 unauthorized",
    "http status 403",
    "invalidaccesskeyid",
    "invalid_access_key_id",
    "signaturedoesnotmatch",
    "signature_does_not_match",
    "expiredtoken",
)
_NO_BUCKET = ("nosuchbucket", "no_such_bucket", "the specified bucket does not exist")
_FAILED = re.compile(
    r"lanceerror\(io\)|input/output error|not a directory|stale file handle|transport endpoint is not connected"
    r"|\bos error (?:5|20|107|116)\b"
)
"""What a disk or share says that is broken, gone or no longer mounted."""
_UNREACHABLE = re.compile(
    r"error sending request|network_connection|could not connect|connection (?:refused|reset|closed)|broken pipe"
    r"|timed? ?out|slow_?down|slow down|service_unavailable|internal_failure|request_timeout|throttl"
    r"|\b(?:429|500|502|503|504) [a-z]|http status (?:429|500|502|503|504)"
)


class StorageFull(OSError):
    """The device that holds a table is full; what was committed before is intact."""


class StorageFailed(OSError):
    """A file system is broken or no longer there; what was committed before is as it was left on it."""


class StorageUnreachable(OSError):
    """An object store did not answer; what was committed before is intact."""


class TableDamaged(RuntimeError):
    """A table, or a record of its ledger, contradicts itself."""


class DuplicateRequests(TableDamaged):
    """A request_id (or a request_index of one plan) stands in a table more than once."""


@contextlib.contextmanager
def storage_faults(uri: str, action: str) -> Iterator[None]:
    """Translate I/O errors met while doing `action` ("write a fragment of", …) to the table at `uri`.

    Raises:
        StorageFull: the device is full. The table is left as it was before `action`.
        PermissionError: the path may not be written or read, is mounted read-only, or a store refuses the credentials.
        FileNotFoundError: an object store has no such bucket.
        StorageFailed: a file system fails or is gone.
        StorageUnreachable: an object store does not answer.
    """
    try:
        yield
    except (StorageFull, StorageFailed, StorageUnreachable, PermissionError):
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
            message = (
                f"cannot {action} {uri}: permission denied or read-only; what was committed is intact. "
                "Mend the rights or credentials and run the same command again"
            )
            raise PermissionError(errno.EACCES, message) from fault
        if is_remote(uri):
            _raise_store_fault(uri, action, text, fault)
        elif _FAILED.search(text):
            raise StorageFailed(
                errno.EIO,
                f"cannot {action} {uri}: the storage fails ({_first_line(fault)}). What was committed is on it; mend it and "
                "run the same command again to go on",
            ) from fault
        raise


def table_gone(uri: str, action: str) -> StorageFailed:
    """The error of a table that was there when the job began."""
    return StorageFailed(
        errno.EIO,
        f"cannot {action} {uri}: the table is not there any more. Mount or mend its storage and run the same command again "
        "to go on",
    )


def _first_line(fault: BaseException) -> str:
    """What the system said, without the place in Lance's source."""
    return re.sub(r", /\S+\.rs:\d+.*", "", (str(fault).splitlines() or [type(fault).__name__])[0])


def reliably(uri: str, action: str, attempt: Callable[[], _T]) -> _T:
    """`attempt()` with its faults translated, tried again while an object store does not answer; it is said once.

    Only for what may be done twice. Local paths are tried once.

    Raises:
        StorageUnreachable: it never answered.
    """
    for number, wait in enumerate((*RETRY_SECONDS, None)):
        try:
            with storage_faults(uri, action):
                return attempt()
        except StorageUnreachable:
            if wait is None:
                raise
            if number == 0:
                _LOG.warning(
                    "cannot %s %s: the object store does not answer; trying again for %.0f s",
                    action,
                    uri,
                    sum(RETRY_SECONDS),
                )
            time.sleep(wait)
    raise AssertionError("unreachable")


def _raise_store_fault(uri: str, action: str, text: str, fault: Exception) -> None:
    if any(sign in text for sign in _NO_BUCKET):
        message = (
            f"cannot {action} {uri}: there is no such bucket; create it or mend the address, and run the same "
            "command again"
        )
        raise FileNotFoundError(errno.ENOENT, message) from fault
    if _UNREACHABLE.search(text):
        message = (
            f"cannot {action} {uri}: the object store does not answer. What was committed is intact; run the same "
            "command again to go on"
        )
        raise StorageUnreachable(message) from fault
