"""Requests that cannot be made: which, why, how often tried; and which one kills its process.

`QuarantineLog` names requests that are given up. `IntentLog` is written before a batch runs, so that after
the death of a process it is known what it was doing: its batch is then made one request at a time, and only
a request that dies alone counts as tried.
"""

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from factory.storage.ledger import Ledger
from factory.storage.location import StorageOptions
from factory.storage.process import ProcessIdentity, this_process
from schemas.identity import hash_parts
from schemas.sample import QuarantineReason

_QUARANTINE = "quarantine"
_INTENTS = "intents"
_SUSPECTS = "suspects"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuarantinedRequest:
    """A request that is given up.

    Attributes:
        request_id, request_index: which.
        reason: one of `QuarantineReason`.
        error: what the last try said.
        tries: how often it was tried.
    """

    request_id: str
    request_index: int
    reason: str
    error: str
    tries: int

    def __post_init__(self) -> None:
        if self.reason not in [item.value for item in QuarantineReason]:
            raise ValueError(f"reason {self.reason!r} is none of {', '.join(QuarantineReason)}")


class QuarantineLog:
    """The quarantined requests of one plan: one file each, so that any process may add at any time."""

    def __init__(self, uri: str, plan_id: str, storage_options: StorageOptions = None) -> None:
        self._ledger = Ledger(uri, plan_id, storage_options=storage_options)

    def add(self, request_id: str, request_index: int, reason: str, error: str, tries: int) -> None:
        """Give `request_id` up; a second entry of the same request replaces the first.

        Raises:
            ValueError: `reason` is no `QuarantineReason`.
        """
        entry = QuarantinedRequest(
            request_id=request_id,
            request_index=int(request_index),
            reason=str(reason),
            error=error[:4000],
            tries=int(tries),
        )
        self._ledger.put(_QUARANTINE, f"{request_id}.json", dataclasses.asdict(entry))

    def remove(self, *request_ids: str) -> None:
        """Let `request_ids` be tried again by the next run."""
        self._ledger.delete(_QUARANTINE, *(f"{request_id}.json" for request_id in request_ids))

    def entries(self) -> list[QuarantinedRequest]:
        """Every quarantined request, in order of request_index."""
        found = [QuarantinedRequest(**value) for _, value in self._ledger.items(_QUARANTINE)]
        return sorted(found, key=lambda entry: entry.request_index)

    def indices(self) -> np.ndarray:
        """Sorted request indices (N,) int64 of all entries."""
        return np.array([entry.request_index for entry in self.entries()], np.int64)


class IntentLog:
    """What each process is making, written (durably) before it starts.

    Use, in the process that may die::

        for group in intents.begin(request_ids):   # run the groups in this order
            make(group)
            intents.finish(group)

    A process that dies leaves its intent unfinished. Whoever begins any of those requests again finds it:
    the group that was running is to blame. If it was a single request, that counts as one try of it; if it
    was several, each becomes a suspect and is from then on run alone, until it is finished.

    Args:
        max_tries: a request that died alone so often is `exhausted`.
    """

    def __init__(
        self, uri: str, plan_id: str, max_tries: int = 3, storage_options: StorageOptions = None
    ) -> None:
        if max_tries < 1:
            raise ValueError(f"max_tries {max_tries} must be at least 1")
        self._ledger = Ledger(uri, plan_id, storage_options=storage_options)
        self._me = this_process()
        self._max_tries = max_tries
        self._open: dict[str, dict[str, Any]] = {}

    def begin(self, request_ids: Sequence[str]) -> list[list[str]]:
        """Record the intent to make `request_ids`; the groups in which to make them, in this order.

        Normally one group of all. Suspects come alone, before the others; exhausted requests do not come.
        """
        self._settle_earlier(set(request_ids))
        states = {name[:-5]: value for name, value in self._ledger.items(_SUSPECTS)}
        suspects = [name for name in request_ids if name in states and not self._is_over(states[name])]
        innocent = [name for name in request_ids if name not in states]
        groups = [[name] for name in suspects] + ([innocent] if innocent else [])
        if groups:
            name = f"{hash_parts(*sorted(request_ids))}-{uuid.uuid4().hex[:12]}.json"
            self._open[name] = {"process": self._me.to_dict(), "groups": groups, "finished": []}
            self._ledger.put(_INTENTS, name, self._open[name])
        return groups

    def finish(self, request_ids: Sequence[str]) -> None:
        """The requests were made (or quarantined for a reason of their own): nothing to suspect of them."""
        done = set(request_ids)
        suspects = [name for name in self._ledger.names(_SUSPECTS) if name.removesuffix(".json") in done]
        self._ledger.delete(_SUSPECTS, *suspects)
        for name, intent in list(self._open.items()):
            intent["finished"] += [i for group in intent["groups"] for i in group if i in done]
            if set(intent["finished"]) >= {i for group in intent["groups"] for i in group}:
                del self._open[name]
                self._ledger.delete(_INTENTS, name)
            else:
                self._ledger.put(_INTENTS, name, intent)

    def tries(self, request_id: str) -> int:
        """How often a process died while it made this request alone."""
        self._settle_earlier({request_id})
        state = self._ledger.get(_SUSPECTS, f"{request_id}.json")
        return 0 if state is None else len(state["deaths"])

    def exhausted(self, request_id: str) -> bool:
        """Whether the request is to be quarantined, with reason `process_died`."""
        return self.tries(request_id) >= self._max_tries

    def _is_over(self, state: dict[str, Any]) -> bool:
        return len(state["deaths"]) >= self._max_tries

    def _settle_earlier(self, request_ids: set[str]) -> None:
        """Turn unfinished intents of other processes that contain one of `request_ids` into suspects."""
        for name, intent in self._ledger.items(_INTENTS):
            if not request_ids & {i for group in intent["groups"] for i in group}:
                continue
            if self._me.is_same_process(ProcessIdentity.from_dict(intent["process"])):
                continue  # this process lives: an exception is not a death
            finished = set(intent["finished"])
            left = [[i for i in group if i not in finished] for group in intent["groups"]]
            running = next((k for k, group in enumerate(left) if group), None)
            if running is not None:
                self._blame(name, left[running], alone=len(intent["groups"][running]) == 1)
            self._ledger.delete(_INTENTS, name)

    def _blame(self, death: str, request_ids: list[str], *, alone: bool) -> None:
        """Make `request_ids` suspects; where one died alone, count this death, once however often seen."""
        for request_id in request_ids:
            state = self._ledger.get(_SUSPECTS, f"{request_id}.json") or {"deaths": []}
            deaths = set(state["deaths"]) | ({death} if alone else set())
            self._ledger.put(_SUSPECTS, f"{request_id}.json", {"deaths": sorted(deaths)})
