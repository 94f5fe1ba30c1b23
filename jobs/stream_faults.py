"""What went wrong in a task of a stream, said by the driver: Ray hands errors over as text around an error of its own."""

import contextlib
import errno
import re
from collections.abc import Iterator

_STORAGE_FAULT = re.compile(
    r"^(?:factory\.storage\.errors\.StorageFull|factory\.storage\.errors\.StorageFailed"
    r"|factory\.storage\.errors\.StorageUnreachable|PermissionError): (?:\[Errno (?P<number>\d+)\] )?(?P<text>.+)$",
    re.MULTILINE,
)
"""The line of a traceback that a fault of `factory.storage` ends with."""


@contextlib.contextmanager
def storage_faults_of_tasks() -> Iterator[None]:
    """A storage fault that ended a task or actor inside the block is raised as what it was, in one line.

    Raises:
        OSError: a task met a fault of storage that `factory.storage` reported; the message says how to go on.
        ray.exceptions.RayError: a task failed for another reason.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        fault = storage_fault(str(error))
        if fault is None:
            raise
        raise fault from error


def storage_fault(text: str) -> OSError | None:
    """The fault of `factory.storage` in the traceback of a task; None where it failed for another reason."""
    found = _STORAGE_FAULT.search(text)
    if found is None or "run the same command again" not in found["text"]:
        return None
    return OSError(int(found["number"] or errno.EIO), found["text"])
