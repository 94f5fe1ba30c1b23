"""Regeneration: which attempt is asked next, from what is committed alone."""

import json
from collections.abc import Mapping

import numpy as np
import pytest

from schemas.regeneration import Regeneration, next_attempts
from schemas.request import ATTEMPT_SHIFT, SynthesisPlan

PLAN = SynthesisPlan(recipe="r", fingerprint="f", weights={}, real_digest="d", labels=("benign", "malignant"))
REASON = "mask_not_obeyed"


def index(label: str, ordinal: int, attempt: int = 0) -> int:
    return PLAN.request(label, ordinal, attempt).request_index


def ask(rows: Mapping[int, str | None], *, given_up: tuple[int, ...] = (), **rule: object) -> "np.ndarray":
    wanted = PLAN.indices({"benign": 3, "malignant": 3})
    found = next_attempts(
        lambda indices: np.isin(indices, wanted),
        [(np.array(list(rows), np.int64), list(rows.values()))],
        Regeneration(**{"attempts": 2} | rule),  # type: ignore[arg-type]
        np.array(given_up, np.int64),
    )
    return found.missing


def test_only_rejected_requests_of_the_named_reasons_are_asked_again() -> None:
    rows = {
        index("benign", 0): None,
        index("benign", 1): REASON,
        index("malignant", 0): "blank_image",
        index("malignant", 1): REASON,
        index("benign", 7): REASON,  # not asked for by this job
    }
    assert ask(rows).tolist() == sorted([index("benign", 1, 1), index("malignant", 1, 1)])
    assert ask(rows, reasons=("blank_image",)).tolist() == [index("malignant", 0, 1)]


def test_an_accepted_attempt_ends_the_search_and_the_last_one_decides() -> None:
    first, second = index("benign", 1), index("benign", 1, 1)
    assert ask({first: REASON, second: None}).size == 0
    assert ask({first: REASON, second: REASON}).tolist() == [index("benign", 1, 2)]
    assert ask({first: REASON, second: "blank_image"}).size == 0, (
        "the last attempt's reason is not to be tried again"
    )
    assert ask({first: REASON, second: REASON, index("benign", 1, 2): REASON}).size == 0, "K = 2 are used up"
    assert ask({first: REASON}, given_up=(second,)).size == 0, (
        "what is quarantined is not followed by another"
    )


def test_a_scarce_budget_gives_every_request_its_first_attempt_before_a_second() -> None:
    rows = {index("benign", ordinal): REASON for ordinal in range(3)}
    rows[index("benign", 0, 1)] = REASON
    assert ask(rows, max_images=3).tolist() == [index("benign", 1, 1), index("benign", 2, 1)]
    assert ask(rows, max_images=1).size == 0, "the one attempt made counts"


def test_rounds_end_and_their_counts_reconcile() -> None:
    """A simulated job whose attempts are accepted with probability one half; killed and repeated rounds change nothing."""
    wanted = PLAN.indices({"benign": 200, "malignant": 100})
    rule = Regeneration(attempts=3)

    def is_wanted(indices: np.ndarray) -> np.ndarray:
        return np.isin(indices, wanted)

    rows: dict[int, str | None] = {}

    def verdict(request: int) -> str | None:
        return REASON if int(PLAN.request_at(request).request_id[:2], 16) < 128 else None

    rows |= {int(i): verdict(i) for i in wanted}
    rounds = 0
    while True:
        chunks = [(np.array([i], np.int64), [reason]) for i, reason in rows.items()]
        found = next_attempts(is_wanted, chunks, rule)
        if not len(found.missing):
            break
        half = found.missing[::2]  # a killed round: the rest is asked for again
        assert set(found.missing.tolist()) - set(half.tolist()) <= set(
            next_attempts(is_wanted, [*chunks, (half, [verdict(i) for i in half])], rule).missing.tolist()
        )
        rows |= {int(i): verdict(i) for i in found.missing}
        rounds += 1
    assert rounds == 3
    first = [int(i) for i in wanted if rows[int(i)] is not None]
    assert found.tried_again == len(first) == found.recovered + found.exhausted
    assert found.done.tolist() == sorted(set(rows) - set(wanted.tolist())) == found.indices.tolist()
    per_request = [sum(p in rows for p in (i, i + (1 << ATTEMPT_SHIFT))) for i in map(int, wanted)]
    accepted = sum(reason is None for reason in rows.values())
    assert accepted == len(wanted) - found.exhausted and max(per_request) == 2


def test_a_rule_survives_json_and_refuses_nonsense() -> None:
    rule = Regeneration(attempts=2, reasons=("mask_not_obeyed", "blank_image"), max_images=10)
    assert Regeneration.from_json_value(json.loads(json.dumps(rule.to_json_value()))) == rule
    for wrong in ({"attempts": 0}, {"attempts": 1, "reasons": ()}, {"attempts": 1, "max_images": -1}):
        with pytest.raises(ValueError, match="regenerate"):
            Regeneration(**wrong)
