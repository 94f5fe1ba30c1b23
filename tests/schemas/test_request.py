"""Plans and requests: what determines them, and what must not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.request import SynthesisPlan

PLAN = SynthesisPlan(
    recipe="tiny",
    fingerprint="f",
    weights={"base": "1", "unet": "2"},
    real_digest="r",
    labels=("benign", "malignant"),
)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"weights": {"base": "1", "unet": "3"}},
        {"real_digest": "s"},
        {"seed": 1},
        {"labels": ("malignant", "benign")},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_changes_an_image_changes_the_plan(change: dict) -> None:
    assert replace(PLAN, **change).plan_id != PLAN.plan_id


def test_recipe_name_and_weight_order_do_not_enter() -> None:
    assert replace(PLAN, recipe="renamed").plan_id == PLAN.plan_id
    assert replace(PLAN, weights={"unet": "2", "base": "1"}).plan_id == PLAN.plan_id


@given(st.sampled_from(PLAN.labels), st.integers(0, 10**12), st.integers(0, 100))
def test_request_at_inverts_request(label: str, ordinal: int, attempt: int) -> None:
    request = PLAN.request(label, ordinal, attempt)
    assert PLAN.request_at(request.request_index) == request
    assert 0 <= request.request_index < 2**63


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_asking_for_more_only_adds(
    benign: int, malignant: int, more_benign: int, more_malignant: int
) -> None:
    small = PLAN.indices({"benign": benign, "malignant": malignant})
    large = PLAN.indices({"benign": benign + more_benign, "malignant": malignant + more_malignant})
    assert set(small) <= set(large)
    assert len(set(large)) == len(large) == benign + malignant + more_benign + more_malignant
    assert np.all(np.diff(large) > 0)


def test_indices_agree_with_requests() -> None:
    indices = PLAN.indices({"benign": 3, "malignant": 2}, attempt=2)
    requests = [PLAN.request_at(i) for i in indices]
    assert sorted((r.label, r.ordinal) for r in requests) == [
        ("benign", 0), ("benign", 1), ("benign", 2), ("malignant", 0), ("malignant", 1),
    ]  # fmt: skip
    assert {r.attempt for r in requests} == {2}


def test_an_attempt_is_another_request() -> None:
    assert PLAN.request("benign", 0, 0).request_id != PLAN.request("benign", 0, 1).request_id


def test_bad_requests_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cyst.*benign, malignant"):
        PLAN.request("cyst", 0)
    with pytest.raises(ValueError, match="benign=-1"):
        PLAN.indices({"benign": -1})
    with pytest.raises(ValueError, match="ordinal -1"):
        PLAN.request("benign", -1)
    with pytest.raises(ValueError, match="at least one class"):
        replace(PLAN, labels=())


@given(
    st.dictionaries(st.sampled_from(PLAN.labels), st.integers(0, 50)), st.integers(1, 30), st.integers(0, 3)
)
def test_blocks_of_indices_are_the_indices(counts: dict[str, int], block: int, attempt: int) -> None:
    blocks = list(PLAN.index_blocks(counts, attempt, block))
    expected = sorted(
        PLAN.request(label, ordinal, attempt).request_index
        for label, count in counts.items()
        for ordinal in range(count)
    )
    assert [index for found in blocks for index in found.tolist()] == expected
    assert all(0 < len(found) <= block for found in blocks)
