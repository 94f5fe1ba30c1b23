"""Near-duplicates: exactness against brute force, independence of order, groups, bounded memory."""

import numpy as np
import pytest

from factory.curation import dedup
from factory.curation.dedup import (
    find_duplicates,
    flat_index,
    linked_pairs,
    nearest,
    pairs_by_search,
    real_similarity_quantile,
)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, centres: int, spread: float, seed: int = 0, dim: int = 16) -> np.ndarray:
    """Unit vectors around random centres, so that many pairs are alike."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, centres, count)
    return unit(rng.normal(size=(centres, dim))[chosen] + spread * rng.normal(size=(count, dim)))


def brute_components(vectors: np.ndarray, threshold: float) -> list[set[int]]:
    linked = vectors @ vectors.T >= threshold
    left, found = set(range(len(vectors))), []
    while left:
        component, edge = set(), {left.pop()}
        while edge:
            component |= edge
            edge = {int(k) for node in edge for k in np.flatnonzero(linked[node])} - component
        left -= component
        found.append(component)
    return found


def test_components_and_kept_members_equal_brute_force() -> None:
    vectors = clustered(300, 60, 0.12)
    rank = np.random.default_rng(1).permutation(300)
    found = find_duplicates(vectors, rank, 0.95)
    components = brute_components(vectors, 0.95)
    assert any(len(c) > 3 for c in components) and any(len(c) == 1 for c in components)
    for component in components:
        best = min(component, key=lambda k: rank[k])
        assert {int(found.kept[k]) for k in component} == {best}
    assert found.is_duplicate.sum() == 300 - len(components)
    assert found.num_links == (np.triu(vectors @ vectors.T, 1) >= 0.95).sum()


def test_chain_is_one_component() -> None:
    angles = np.arange(6) * 0.1
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    found = find_duplicates(vectors, np.array([5, 4, 0, 3, 2, 1]), float(np.cos(0.11)))
    assert found.kept.tolist() == [2] * 6


def test_row_order_changes_nothing() -> None:
    vectors = clustered(400, 80, 0.12, seed=3)
    rank = np.arange(400)
    shuffle = np.random.default_rng(0).permutation(400)
    straight = find_duplicates(vectors, rank, 0.94).kept
    shuffled = find_duplicates(vectors[shuffle], rank[shuffle], 0.94).kept
    assert (shuffle[shuffled] == straight[shuffle]).all()


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(500, 3, 0.1, seed=2)
    rank = np.random.default_rng(2).permutation(500)
    whole = find_duplicates(vectors, rank, 0.9)
    monkeypatch.setattr(dedup, "MAX_LINKS", 7 * 500)
    sizes = [len(first) for first, _ in linked_pairs(vectors, 0.9)]
    assert len(sizes) == 72 and max(sizes) <= 7 * 500
    split = find_duplicates(vectors, rank, 0.9)
    assert (split.kept == whole.kept).all() and split.num_links == whole.num_links


def test_collapsed_generator_is_one_picture() -> None:
    """Three thousand times the same image: four million links, held a block at a time."""
    vectors = np.repeat(unit(np.ones((1, 8))), 3_000, axis=0)
    found = find_duplicates(vectors, np.arange(3_000)[::-1].copy(), 0.99, num_threads=1)
    assert set(found.kept.tolist()) == {2_999}
    assert found.num_links == 3_000 * 2_999 // 2


@pytest.mark.parametrize("most", [4, 64, 2048])
def test_search_without_range_search_gives_the_same_pairs(most: int) -> None:
    """The way taken on a GPU, on a CPU index; `most` below the number of neighbours forces the exact search."""
    vectors = clustered(300, 6, 0.15, seed=5)
    index, _ = flat_index(vectors)
    rows, others, _ = pairs_by_search(index, vectors, vectors, 0.9, most)
    wanted = np.argwhere(vectors @ vectors.T > 0.9)
    assert sorted(zip(rows.tolist(), others.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_nothing_and_one() -> None:
    assert find_duplicates(np.zeros((0, 8), np.float32), np.zeros(0), 0.9).kept.shape == (0,)
    assert find_duplicates(unit(np.ones((1, 8))), np.array([7]), 0.9).kept.tolist() == [0]


@pytest.mark.parametrize("threshold", [-1.5, 1.5, float("nan")])
def test_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="duplicate similarity"):
        find_duplicates(unit(np.ones((2, 8))), np.arange(2), threshold)


def test_vectors_that_are_not_unit_are_refused() -> None:
    vectors = unit(np.ones((3, 8)))
    vectors[1] *= 2
    with pytest.raises(ValueError, match="row 1 has norm 2"):
        find_duplicates(vectors, np.arange(3), 0.9)
    vectors[1] = np.nan
    with pytest.raises(ValueError, match="row 1 has norm nan"):
        nearest(vectors, vectors, 1)


def test_nearest_leaves_the_own_group_out() -> None:
    references = clustered(120, 30, 0.3, seed=7)
    groups = [f"g{k // 4}" for k in range(120)]
    queries = clustered(40, 30, 0.3, seed=8)
    own: list[str | None] = [None if k % 3 else f"g{k % 30}" for k in range(40)]
    similarity, position = nearest(queries, references, 5, query_groups=own, reference_groups=groups)
    for k in range(40):
        product = queries[k] @ references.T
        allowed = [j for j in range(120) if groups[j] != own[k]]
        wanted = sorted(allowed, key=lambda j: -product[j])[:5]
        assert position[k].tolist() == wanted
        np.testing.assert_allclose(similarity[k], product[wanted], atol=1e-5)


def test_nearest_with_fewer_references_than_asked() -> None:
    references = unit(np.eye(4, 8))
    similarity, position = nearest(
        references, references, 6, query_groups=["a"] * 4, reference_groups=["a", "a", "a", "b"]
    )
    assert position[0].tolist() == [3, -1, -1, -1, -1, -1]
    assert np.isneginf(similarity[0, 1:]).all()
    assert nearest(references, np.zeros((0, 8), np.float32), 2)[1].tolist() == [[-1, -1]] * 4


def test_equal_similarities_come_in_order_of_position() -> None:
    references = np.repeat(unit(np.ones((1, 8))), 9, axis=0)
    assert nearest(references[:1], references, 3)[1].tolist() == [[0, 1, 2]]


def test_threshold_from_real_rows_ignores_twins_of_the_same_group() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(80, 16)))
    twins = np.concatenate([vectors, vectors])
    groups = [f"g{k}" for k in range(80)] * 2
    alone = real_similarity_quantile(vectors, groups[:80], 0.99)
    assert alone < 0.95
    assert real_similarity_quantile(twins, groups, 0.99) == pytest.approx(alone, abs=0.02)
    product = vectors @ vectors.T - 2 * np.eye(80)
    assert alone == pytest.approx(np.quantile(product.max(axis=1), 0.99), abs=1e-5)


def test_threshold_needs_two_groups() -> None:
    with pytest.raises(ValueError, match="--duplicate-similarity"):
        real_similarity_quantile(unit(np.ones((5, 8))), ["g"] * 5, 0.99)
