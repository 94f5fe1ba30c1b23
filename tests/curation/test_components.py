"""Components of links that come in parts: against networkx-free brute force, in any order, in bounded memory."""

import numpy as np
import pytest

from factory.curation import components
from factory.curation.components import Links, best_members, spanning_forest


def partition(component: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(component == number).tolist()) for number in np.unique(component)}


def brute(count: int, pairs: np.ndarray, members: np.ndarray) -> set[frozenset[int]]:
    groups = [{k} for k in range(count)]
    for one, other in pairs.tolist():
        if members[one] and members[other] and groups[one] is not groups[other]:
            merged = groups[one] | groups[other]
            for k in merged:
                groups[k] = merged
    return {frozenset(group) for group in groups}


def random_links(seed: int, count: int = 200, number: int = 150) -> np.ndarray:
    pairs = np.random.default_rng(seed).integers(count, size=(number, 2))
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    return np.unique(pairs, axis=0)


@pytest.mark.parametrize("merge_at", [1, 7, 1 << 20])
@pytest.mark.parametrize("max_links", [0, 20, 1000])
def test_components_of_members_whatever_the_parts(
    merge_at: int, max_links: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "MERGE_AT", merge_at)
    for seed in range(5):
        pairs = random_links(seed)
        members = np.random.default_rng(seed).random(200) < 0.7
        order = np.random.default_rng(seed + 1).permutation(len(pairs))
        links = Links(members, max_links)
        for part in np.array_split(pairs[order], 9):
            links.add(part[:, 0], part[:, 1])
        assert partition(links.components()) == brute(200, pairs, members)
        assert links.num_links == len(pairs)
        assert links.complete == (len(pairs) <= max_links)
        if links.complete:
            assert {tuple(p) for p in np.transpose(links.arrays()).tolist()} == {
                tuple(p) for p in pairs.tolist()
            }
        else:
            with pytest.raises(ValueError, match="more than"):
                links.arrays()


def test_a_spanning_forest_joins_the_same_rows_with_fewer_links() -> None:
    clique = np.array([(a, b) for a in range(40) for b in range(a + 1, 40)]) + 1000
    pairs = np.concatenate([clique, random_links(3)])
    first, second = spanning_forest(pairs[:, 0], pairs[:, 1])
    everyone = np.ones(1040, bool)
    assert len(first) < len(pairs) / 4
    assert {(min(p), max(p)) for p in zip(first.tolist(), second.tolist())} <= {
        tuple(p) for p in pairs.tolist()
    }
    assert brute(1040, np.stack([first, second], 1), everyone) == brute(1040, pairs, everyone)


def test_the_member_of_lowest_rank_is_kept() -> None:
    component = np.array([0, 1, 0, 2, 1, 0])
    rank = np.array([5, 1, 0, 3, 4, 2])
    assert best_members(component, rank).tolist() == [2, 1, 2, 3, 1, 2]
    assert best_members(np.empty(0, np.int64), np.empty(0)).tolist() == []
