"""Clustered search: every pair is found, each once, within the budget's limits; nothing depends on shards or order."""

from pathlib import Path

import numpy as np
import pytest

from factory.curation import cells
from factory.curation.cell_search import CellLinks, search_cells
from factory.curation.cells import CellFolder, Probes, assign_rows, train_centroids, write_cells
from factory.curation.components import Links
from factory.curation.dedup import count_linked, linked_pairs


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def continuous(count: int, dim: int = 5, seed: int = 0) -> np.ndarray:
    """Unit vectors without gaps between clusters, so that cell boundaries cut through many pairs."""
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(count, dim)) / np.sqrt(np.arange(1, dim + 1)) + 0.5)


def lay_out(
    folder: Path,
    vectors: np.ndarray,
    limits: np.ndarray,
    *,
    num_cells: int = 20,
    max_probes: int = 1000,
    fresh: np.ndarray | None = None,
    members: np.ndarray | None = None,
    sampled: np.ndarray | None = None,
    part_rows: int = 170,
    seed: int = 0,
) -> tuple[CellFolder, Probes]:
    folder.mkdir(parents=True)
    count = len(vectors)
    centroids = train_centroids(vectors, num_cells, seed=seed, num_threads=1)
    parts, probes = [], Probes()
    for start in range(0, count, part_rows):
        stop = min(start + part_rows, count)
        part, reached = assign_rows(
            folder, vectors, limits, centroids, start=start, stop=stop, max_probes=max_probes
        )
        parts.append(part)
        probes += reached
    every = np.ones(count, bool)
    layout = write_cells(
        folder,
        vectors,
        parts,
        num_cells=num_cells,
        limits=limits,
        fresh=every if fresh is None else fresh,
        members=every if members is None else members,
        sampled=~every if sampled is None else sampled,
        block_rows=64,
    )
    return layout, probes


def as_set(found: CellLinks) -> set[tuple[int, int]]:
    pairs = list(zip(found.first.tolist(), found.second.tolist()))
    assert len(set(pairs)) == len(pairs), "a pair was found twice"
    return set(pairs)


def exact_set(
    vectors: np.ndarray, limits: float | np.ndarray, fresh: np.ndarray | None = None
) -> set[tuple[int, int]]:
    found = [zip(a.tolist(), b.tolist()) for a, b in linked_pairs(vectors, limits, 1, fresh=fresh)]
    return {pair for block in found for pair in block}


@pytest.mark.parametrize("threshold", [0.999, 0.98, 0.9, 0.6])
@pytest.mark.parametrize("num_cells", [1, 7, 40])
def test_every_pair_is_found_once_without_a_budget(tmp_path: Path, threshold: float, num_cells: int) -> None:
    vectors = continuous(700)
    layout, probes = lay_out(
        tmp_path / "cells", vectors, np.full(700, threshold, np.float32), num_cells=num_cells
    )
    found = search_cells(layout, range(num_cells))
    wanted = exact_set(vectors, threshold)
    assert as_set(found) == wanted and found.total == len(wanted) and found.complete
    assert len(wanted) > (1 if threshold == 0.999 else 30)
    assert probes.rows == 700 and probes.cut == 0 and probes.taken == probes.within


def test_brute_force_agrees() -> None:
    vectors = continuous(300)
    limits = np.random.default_rng(0).choice([0.93, 0.97], 300).astype(np.float32)
    product = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    linked = product.astype(np.float32) >= np.maximum(limits[:, None], limits[None, :])
    wanted = {(int(a), int(b)) for a, b in np.argwhere(np.triu(linked, 1))}
    assert exact_set(vectors, limits) == wanted
    assert (count_linked(np.arange(300), vectors, limits, block_rows=77) == linked.sum(1) - 1).all()


def test_a_pair_must_reach_the_limits_of_both_rows(tmp_path: Path) -> None:
    vectors = continuous(500, seed=2)
    limits = np.random.default_rng(0).choice([0.9, 0.99], 500).astype(np.float32)
    layout, _ = lay_out(tmp_path / "cells", vectors, limits)
    assert as_set(search_cells(layout, range(20))) == exact_set(vectors, limits)


def test_the_seed_of_k_means_and_the_order_of_rows_change_nothing(tmp_path: Path) -> None:
    vectors = continuous(600, seed=3)
    limits = np.full(600, 0.95, np.float32)
    wanted = exact_set(vectors, 0.95)
    shuffle = np.random.default_rng(1).permutation(600)
    for seed in (0, 1):
        layout, _ = lay_out(tmp_path / f"seed{seed}", vectors, limits, seed=seed, part_rows=101 + seed)
        assert as_set(search_cells(layout, range(20))) == wanted
    layout, _ = lay_out(tmp_path / "shuffled", vectors[shuffle], limits)
    found = as_set(search_cells(layout, range(20)))
    back = {(min(a, b), max(a, b)) for a, b in ((int(shuffle[a]), int(shuffle[b])) for a, b in found)}
    assert back == wanted


def test_split_over_tasks_the_links_are_the_same(tmp_path: Path) -> None:
    vectors = continuous(600, seed=4)
    layout, _ = lay_out(tmp_path / "cells", vectors, np.full(600, 0.95, np.float32))
    whole = as_set(search_cells(layout, range(20)))
    parts = [
        as_set(search_cells(layout, group.tolist()))
        for group in np.array_split(np.random.default_rng(0).permutation(20), 6)
    ]
    assert sum(map(len, parts)) == len(whole) and set().union(*parts) == whole


def test_old_pairs_are_not_searched_again(tmp_path: Path) -> None:
    vectors = continuous(500, seed=5)
    for share in (0.0, 0.1, 0.5):
        fresh = np.random.default_rng(1).random(500) < share
        layout, _ = lay_out(tmp_path / str(share), vectors, np.full(500, 0.95, np.float32), fresh=fresh)
        found = as_set(search_cells(layout, range(20)))
        wanted = {pair for pair in exact_set(vectors, 0.95) if fresh[pair[0]] or fresh[pair[1]]}
        assert found == wanted == exact_set(vectors, 0.95, fresh)


def test_a_budget_of_probes_is_held_and_told(tmp_path: Path) -> None:
    vectors = continuous(800, seed=6)
    limits = np.full(800, 0.9, np.float32)
    layout, probes = lay_out(tmp_path / "cells", vectors, limits, num_cells=40, max_probes=3)
    assert probes.cut > 0 and probes.taken <= 3 * 800 < probes.within and probes.greatest > 3
    found, wanted = as_set(search_cells(layout, range(40))), exact_set(vectors, 0.9)
    assert found < wanted and len(found) > 0.5 * len(wanted)


def test_links_of_sampled_rows_are_counted(tmp_path: Path) -> None:
    vectors = continuous(500, seed=7)
    limits = np.full(500, 0.93, np.float32)
    sampled = np.zeros(500, bool)
    sampled[::11] = True
    layout, _ = lay_out(tmp_path / "cells", vectors, limits, sampled=sampled)
    for max_links in (1 << 20, 50):
        degrees = search_cells(layout, range(20), max_links=max_links).degrees
        rows = np.flatnonzero(sampled)
        assert [degrees.get(int(row), 0) for row in rows] == count_linked(rows, vectors, limits).tolist()
        assert set(degrees) <= set(rows.tolist())


def test_too_many_links_leave_a_forest_of_the_members(tmp_path: Path) -> None:
    vectors = continuous(500, seed=8)
    members = np.random.default_rng(0).random(500) < 0.6
    layout, _ = lay_out(tmp_path / "cells", vectors, np.full(500, 0.9, np.float32), members=members)
    whole = search_cells(layout, range(20))
    assert whole.complete and whole.total > 2000
    bounded = search_cells(layout, range(20), max_links=300)
    assert not bounded.complete and bounded.total == whole.total and len(bounded.first) < 0.5 * whole.total
    components = []
    for found in (whole, bounded):
        links = Links(members, max_links=1 << 20)
        links.add(found.first, found.second, total=found.total, complete=found.complete)
        components.append([frozenset(np.flatnonzero(links.components() == c)) for c in links.components()])
        assert links.num_links == whole.total and links.complete == found.complete
    assert components[0] == components[1]


def test_identical_rows_and_few_rows(tmp_path: Path) -> None:
    vectors = np.repeat(unit(np.ones((1, 8))), 60, axis=0)
    layout, _ = lay_out(tmp_path / "same", vectors, np.full(60, 1.0, np.float32), num_cells=4)
    assert search_cells(layout, range(4)).total == 60 * 59 // 2
    one, _ = lay_out(tmp_path / "one", vectors[:1], np.full(1, 0.9, np.float32), num_cells=1)
    assert search_cells(one, range(1)).total == 0


def test_cells_grow_with_the_square_root() -> None:
    sizes = [cells.num_cells_for(count) for count in (1, 10, 100, 10_000, 1_000_000, 10**9)]
    assert sizes == [1, 1, 12, 200, 2000, cells.MAX_CELLS]
