"""Leave to read the test split: asked for once, written down where the table is, refused a second time."""

import datetime
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factory.storage import TestAccess
    from factory.storage.lease import Lease

KEY = "test_opening."
LEASE = "test_opening"
"""Name of the table's lease under which an opening is written down."""
LEASE_SECONDS = 60.0
"""How long another process may take to write down its opening."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One use of a table's test split.

    Attributes:
        number: 1 for the first; every further one makes the numbers less trustworthy.
        opened_by: who.
        reason: why.
        time: when, UTC.
        comparison: fingerprint of what was compared.
        again: whether earlier openings were overridden.
    """

    number: int
    opened_by: str
    reason: str
    time: str
    comparison: str
    again: bool

    def access(self) -> "TestAccess":
        """The leave that the storage layer asks for, and records at every reading."""
        from factory.storage import TestAccess

        return TestAccess(
            opened_by=f"{self.opened_by}: factory evaluate downstream",
            reason=f"{self.reason} (opening {self.number}, comparison {self.comparison})",
        )


def openings(uri: str) -> list[Opening]:
    """Earlier openings that the table's metadata records, oldest first."""
    from factory.storage import open_table

    found = [v for k, v in open_table(uri).metadata.items() if k.startswith(KEY)]
    return sorted((Opening(**json.loads(text)) for text in found), key=lambda one: one.number)


def plan_opening(uri: str, comparison: str, *, opened_by: str, reason: str, again: bool) -> Opening:
    """The opening to come, or the one of the same comparison that was interrupted; nothing is read or written.

    Looks at the table's metadata and at the record of readings beside it, which a table that was written anew keeps.

    Raises:
        ValueError: the split was opened for another comparison, and `again` is not said.
    """
    earlier = openings(uri)
    for one in earlier:
        if one.comparison == comparison:
            return one
    readings = _readings_without_opening(uri, earlier)
    if (earlier or readings) and not again:
        last = earlier[-1] if earlier else None
        who = f"{last.opened_by} on {last.time} ({last.reason})" if last else readings[-1]["opened_by"]
        raise ValueError(
            f"{uri}: its test split was opened before, by {who}; choosing by it again makes its numbers optimistic. "
            "Report that result, or say --again, which is recorded"
        )
    return Opening(
        number=_next_number(earlier, readings),
        opened_by=opened_by,
        reason=reason,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        comparison=comparison,
        again=bool(earlier or readings),
    )


def _readings_without_opening(uri: str, earlier: list[Opening]) -> list[dict[str, str]]:
    from factory.storage import test_accesses

    known = {one.comparison for one in earlier}
    return [entry for entry in test_accesses(uri) if not any(c in entry["reason"] for c in known)]


def _next_number(earlier: list[Opening], readings: list[dict[str, str]]) -> int:
    return len(earlier) + bool(readings) + 1


def record_opening(uri: str, opening: Opening) -> Opening:
    """Write the opening into the table's metadata, before anything is read.

    Of several processes one writes at a time, and each looks first whether the table is as it was when its opening was
    planned, so one of two that planned at once is refused here.

    Returns:
        The opening on record: the given one, or that of the same comparison in another process.

    Raises:
        LeaseHeld: another process has been writing down its opening for a minute.
        ValueError: the split was opened for another comparison since `opening` was planned.
    """
    from factory.storage import open_table

    with _only_process(uri) as lease:
        earlier = openings(uri)
        for one in earlier:
            if one.comparison == opening.comparison:
                return one
        if _next_number(earlier, _readings_without_opening(uri, earlier)) != opening.number:
            who = f" by {earlier[-1].opened_by} ({earlier[-1].reason})" if earlier else ""
            raise ValueError(
                f"{uri}: its test split was opened{who} while these models trained; look at that result first. The same "
                "command with --again goes on from the models, and is recorded"
            )
        lease.check()
        open_table(uri).set_metadata({f"{KEY}{opening.number}": json.dumps(asdict(opening), sort_keys=True)})
    return opening


@contextmanager
def _only_process(uri: str) -> Iterator["Lease"]:
    """Hold the table's lease of openings; waits for another process that holds it."""
    from factory.storage import LeaseHeld
    from factory.storage.lease import take_lease

    start = time.monotonic()
    while True:
        try:
            lease = take_lease(uri, LEASE, run_id=uuid.uuid4().hex)
            break
        except LeaseHeld:
            if time.monotonic() - start > LEASE_SECONDS:
                raise
            time.sleep(0.05)
    try:
        yield lease
    finally:
        lease.release()
