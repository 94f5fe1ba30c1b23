"""Near-duplicates among many rows as Ray tasks: rows into cells, then cells searched; see `factory.curation.cells`.

    embeddings.npy ─▶ sample ─▶ centroids ─▶ assign (tasks over rows) ─▶ layout by cell ─▶ search (tasks over cells)

Tasks share files of a work folder: with several machines it must lie where all of them see it. The driver holds no
embeddings but the sample; links come back a task at a time.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factory.curation.cell_search import CellLinks, search_cells
from factory.curation.cells import (
    ROWS_PER_CENTROID,
    CellFolder,
    Probes,
    assign_rows,
    num_cells_for,
    train_centroids,
    write_cells,
)
from factory.curation.components import Links

_ROWS_PER_TASK = 1 << 15
_TASKS_PER_CPU = 8


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How the clustered search runs.

    Attributes:
        folder: work folder, on a file system that all machines of the cluster see.
        num_cells: of k-means; chosen by the number of rows where None.
        max_probes: other cells that a row may reach.
        max_sample_bytes: of embeddings that k-means sees.
        max_links: links that a task returns; beyond it a spanning forest.
        seed: of the sample and of k-means.
        address: Ray cluster to join; a private Ray without it.
        num_cpus: of a private Ray.
        num_tasks: searches to cut the cells into; by the number of CPUs where None.
    """

    folder: Path
    num_cells: int | None = None
    max_probes: int = 64
    max_sample_bytes: int = 1 << 29
    max_links: int = 1 << 22
    seed: int = 0
    address: str | None = None
    num_cpus: int | None = None
    num_tasks: int | None = None

    def __post_init__(self) -> None:
        if self.max_probes < 1:
            raise ValueError(f"--max-probes {self.max_probes} must be at least 1")
        if self.num_cells is not None and self.num_cells < 1:
            raise ValueError(f"num_cells: {self.num_cells} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ClusterSearch:
    """What a clustered search did.

    Attributes:
        num_cells: of k-means.
        probes: how many cells rows reach.
        degrees: row number → links found of a sampled row.
        seconds: of training, assignment, layout and search.
    """

    num_cells: int
    probes: Probes
    degrees: dict[int, int]
    seconds: dict[str, float]


def search_clusters(
    embeddings: Path,
    limits: np.ndarray,
    *,
    fresh: np.ndarray,
    sampled: np.ndarray,
    members: np.ndarray,
    links: Links,
    settings: ClusterSettings,
    progress: Callable[[int], None] = lambda count: None,
) -> ClusterSearch:
    """Add every link of a fresh row that is found to `links`.

    Args:
        embeddings: .npy file, float32 (N, D), unit norm.
        limits: float32 (N,), least cosine of each row.
        fresh: bool (N,): only pairs with such a row are searched.
        sampled: bool (N,): links of these rows are counted.
        members: bool (N,): see `components.Links`.
        links: taken further.
        settings: how.
        progress: called with the number of rows whose cell was searched.
    """
    from jobs.cluster import start_ray

    vectors = np.load(embeddings, mmap_mode="r")
    clock = _Clock()
    centroids = _centroids(vectors, settings)
    clock.lap("train")
    folder = settings.folder
    np.save(folder / "centroids.npy", centroids)
    np.save(folder / "row_limits.npy", limits)
    with start_ray(settings.address, settings.num_cpus) as handle:
        clock.lap("start")
        cpus = max(1, int(handle.num_cpus))
        bounds = [*range(0, len(vectors), _ROWS_PER_TASK), len(vectors)]
        jobs = [(embeddings, folder, *ends, settings.max_probes) for ends in itertools.pairwise(bounds)]
        parts, probes = [], Probes()
        for path, reached in _each(_assign_task, jobs, 2 * cpus):
            parts.append(path)
            probes += reached
        clock.lap("assign")
        cells = write_cells(
            folder,
            vectors,
            parts,
            num_cells=len(centroids),
            limits=limits,
            fresh=fresh,
            members=members,
            sampled=sampled,
        )
        for path in parts:
            path.unlink()
        clock.lap("layout")
        groups = _groups(cells, settings.num_tasks or _TASKS_PER_CPU * cpus)
        sizes = np.diff(cells.offsets)
        degrees: dict[int, int] = {}
        tasks = [(folder, group, settings.max_links) for group in groups]
        for group, found in _each(_search_task, tasks, 2 * cpus):
            links.add(found.first, found.second, total=found.total, complete=found.complete)
            for row, count in found.degrees.items():
                degrees[row] = degrees.get(row, 0) + count
            progress(int(sizes[group].sum()))
        clock.lap("search")
    return ClusterSearch(num_cells=len(centroids), probes=probes, degrees=degrees, seconds=clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _centroids(vectors: np.ndarray, settings: ClusterSettings) -> np.ndarray:
    count, width = vectors.shape
    num_cells = min(settings.num_cells or num_cells_for(count), count)
    wanted = min(count, ROWS_PER_CENTROID * num_cells, settings.max_sample_bytes // (4 * width))
    num_cells = min(num_cells, max(1, wanted))
    rng = np.random.default_rng(settings.seed)
    chosen = np.sort(rng.choice(count, size=max(wanted, 1), replace=False))
    return train_centroids(vectors[chosen], num_cells, seed=settings.seed)


def _groups(cells: CellFolder, num_tasks: int) -> list[np.ndarray]:
    """Cells with rows, in groups of about equal work; the most costly groups first."""
    work = cells.work()
    used = np.flatnonzero(np.diff(cells.offsets))
    order = used[np.argsort(-work[used], kind="stable")]
    share = max(1.0, float(work[used].sum()) / max(1, num_tasks))
    number = (np.cumsum(work[order]) - work[order]) // share
    return [order[number == each] for each in np.unique(number)]


def _assign_task(
    embeddings: Path, folder: Path, start: int, stop: int, max_probes: int
) -> tuple[Path, Probes]:
    return assign_rows(
        folder,
        np.load(embeddings, mmap_mode="r"),
        np.load(folder / "row_limits.npy", mmap_mode="r"),
        np.load(folder / "centroids.npy"),
        start=start,
        stop=stop,
        max_probes=max_probes,
    )


def _search_task(folder: Path, group: np.ndarray, max_links: int) -> tuple[np.ndarray, CellLinks]:
    return group, search_cells(CellFolder.open(folder), group.tolist(), max_links=max_links)


def _each(task: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], at_once: int) -> Iterator[Any]:
    """Results of a task over jobs as they come, at most `at_once` in flight: results never pile up."""
    import ray

    remote = ray.remote(num_cpus=1)(task)
    waiting = iter(jobs)
    running = [remote.remote(*job) for _, job in zip(range(at_once), waiting)]
    while running:
        done, running = ray.wait(running, num_returns=1)
        for job in waiting:
            running.append(remote.remote(*job))
            break
        yield ray.get(done[0])
