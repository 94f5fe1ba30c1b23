"""Leave to read the test split: asked for once, written down where the table is, refused a second time."""

import datetime
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factory.storage import TestAccess

KEY = "test_opening."


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
    from factory.storage import test_accesses

    earlier = openings(uri)
    for one in earlier:
        if one.comparison == comparison:
            return one
    known = {one.comparison for one in earlier}
    readings = [entry for entry in test_accesses(uri) if not any(c in entry["reason"] for c in known)]
    if (earlier or readings) and not again:
        last = earlier[-1] if earlier else None
        who = f"{last.opened_by} on {last.time} ({last.reason})" if last else readings[-1]["opened_by"]
        raise ValueError(
            f"{uri}: its test split was opened before, by {who}; choosing by it again makes its numbers optimistic. "
            "Report that result, or say --again, which is recorded"
        )
    return Opening(
        number=len(earlier) + bool(readings) + 1,
        opened_by=opened_by,
        reason=reason,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        comparison=comparison,
        again=bool(earlier or readings),
    )


def record_opening(uri: str, opening: Opening) -> None:
    """Write the opening into the table's metadata, before anything is read.

    Raises:
        ValueError: another comparison took this number meanwhile.
    """
    from factory.storage import open_table

    key = f"{KEY}{opening.number}"
    table = open_table(uri)
    text = json.dumps(asdict(opening), sort_keys=True)
    if table.metadata.get(key, text) != text:
        raise ValueError(
            f"{uri}: its test split was opened by another job just now; look at its result first"
        )
    if key not in table.metadata:
        table.set_metadata({key: text})
