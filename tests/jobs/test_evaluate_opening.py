"""An opening of the test split is written down once, whoever else writes one down at the same moment."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Barrier

import pytest
from evaluation_tables import write_real

from factory.storage import TestAccess, open_table, real_rows
from jobs.evaluate_opening import Opening, openings, plan_opening, record_opening

ROUNDS = 5


def plan(uri: str, comparison: str, *, again: bool = False) -> Opening:
    return plan_opening(uri, comparison, opened_by=comparison, reason="to see", again=again)


def open_each(
    uris: dict[str, int], comparison: str, start: "Barrier", told: "Queue[tuple[str, str, int]]"
) -> None:
    """Another process: plan and record an opening of each table, at the same moment as its rival."""
    for uri, number in uris.items():
        planned = plan(uri, comparison, again=number > 1)
        start.wait(120)
        try:
            told.put((uri, comparison, record_opening(uri, planned).number))
        except ValueError as error:
            assert "while these models trained" in str(error)
            told.put((uri, comparison, 0))
        start.wait(120)


def test_of_two_processes_that_open_at_once_one_is_refused(tmp_path: Path) -> None:
    # Address → number of the opening to come: five tables are new, five were opened before.
    uris = {
        write_real(tmp_path, {"train": 2, "test": 2}, name=f"table{k}"): 1 + k // ROUNDS
        for k in range(2 * ROUNDS)
    }
    for uri in (uri for uri, number in uris.items() if number > 1):
        record_opening(uri, plan(uri, "the first"))
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(2), context.Queue()
    rivals = [context.Process(target=open_each, args=(uris, name, start, told)) for name in ("one", "two")]
    for process in rivals:
        process.start()
    answers = [told.get(timeout=120) for _ in range(2 * len(uris))]
    for process in rivals:
        process.join(60)
        assert process.exitcode == 0
    for uri, number in uris.items():
        allowed = {who: given for where, who, given in answers if where == uri}
        assert sorted(allowed.values()) == [0, number], f"want one refused: {allowed}"
        recorded = openings(uri)[-1]
        assert recorded.number == number == len(openings(uri)) and allowed[recorded.opened_by] == number


def test_the_same_comparison_is_one_opening_wherever_it_is_judged(tmp_path: Path) -> None:
    uri = write_real(tmp_path, {"train": 2, "test": 2})
    first = plan(uri, "a comparison")
    elsewhere = replace(first, time="2020-01-01T00:00:00+00:00")
    assert record_opening(uri, first) == first
    version = open_table(uri).version
    assert record_opening(uri, elsewhere) == first == plan(uri, "a comparison")
    assert openings(uri) == [first] and open_table(uri).version == version


def test_a_reading_since_the_plan_refuses_the_opening(tmp_path: Path) -> None:
    uri = write_real(tmp_path, {"train": 2, "test": 2})
    planned = plan(uri, "a comparison")
    real_rows(uri, splits=("test",), access=TestAccess(opened_by="somebody", reason="a look"))
    with pytest.raises(ValueError, match="while these models trained"):
        record_opening(uri, planned)
    assert not openings(uri)
    with pytest.raises(ValueError, match="opened before, by somebody"):
        plan(uri, "a comparison")
    assert record_opening(uri, plan(uri, "a comparison", again=True)).number == 2
