"""Which rows are duplicates: exact or clustered search, links of earlier curations used again, recall measured."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from factory.curation.components import Links, best_members
from factory.curation.dedup import check_unit, count_linked, linked_pairs
from factory.curation.link_store import MAX_LINKS, LinkSettings, load_links, row_checksums, save_links
from jobs.progress import progress_bar

if TYPE_CHECKING:
    from jobs.dedup_clusters import ClusterSearch

Method = Literal["auto", "exact", "clustered"]
EXACT_PAIRS = 60_000**2
"""Pairs up to which the search is exact on a CPU: about ten seconds on two cores, as long as Ray takes to start."""
EXACT_PAIRS_GPU = 2_000_000**2


@dataclass(frozen=True, kw_only=True)
class Search:
    """How duplicates are searched; changes nothing but time, memory, and recall where the search is clustered.

    Attributes:
        method: exact, clustered, or auto: exact up to `EXACT_PAIRS` pairs of a new row and any row.
        memory_bytes: for embeddings in this process; more are mapped from files.
        work_folder: for these files; None: beside the table, or the system's where that is an object store.
        links_folder: where links are kept between curations; None: they are not.
        from_scratch: do not use links that are kept.
        recall_rows: rows that are compared with all others to measure the recall of a clustered search.
        max_probes: other cells that a row is searched in.
        seed: of k-means and of these samples.
        num_threads: for FAISS in this process.
        address, num_cpus: of Ray, for the clustered search.
    """

    method: Method = "auto"
    memory_bytes: int = 2 << 30
    work_folder: Path | None = None
    links_folder: Path | None = None
    from_scratch: bool = False
    recall_rows: int = 512
    max_probes: int = 64
    seed: int = 0
    num_threads: int | None = None
    address: str | None = None
    num_cpus: int | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes < 1 << 20:
            raise ValueError(f"--memory-budget: {self.memory_bytes / 2**30:g} GB is less than a megabyte")
        if self.max_probes < 1 or self.recall_rows < 1:
            raise ValueError(
                f"--max-probes {self.max_probes} and --recall-rows {self.recall_rows} must be at least 1"
            )

    def keeps_in_memory(self, count: int, width: int) -> bool:
        """Whether the embeddings of so many rows are held in memory: a quarter of the budget is for them."""
        return self.method != "clustered" and 4 * count * width <= self.memory_bytes // 4

    @contextlib.contextmanager
    def working(self) -> Iterator[Path]:
        """A folder for files of this run, removed at its end."""
        if self.work_folder is not None:
            self.work_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="curation-", dir=self.work_folder) as name:
            yield Path(name)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Links that were found of sampled rows, against exact search.

    Attributes:
        rows: sampled.
        pairs: linked pairs that they have.
        found: of these.
    """

    rows: int
    pairs: int
    found: int

    @property
    def value(self) -> float | None:
        """Share found; None where the sample has no pair."""
        return self.found / self.pairs if self.pairs else None


@dataclass(frozen=True, kw_only=True, eq=False)
class DuplicateFindings:
    """Outcome of the search.

    Attributes:
        kept: int64 (N,), row that is kept of each row's component; its own where alone.
        num_links: linked pairs among all rows, rejected ones too.
        method: that was taken.
        reused: rows whose links among each other come from an earlier curation.
        recall: measured where the search, or one whose links are used, was clustered.
        clusters: of a clustered search.
        notes: for the operator.
        seconds: of the search.
    """

    kept: np.ndarray = field(repr=False)
    num_links: int
    method: str
    reused: int = 0
    recall: Recall | None = None
    clusters: "ClusterSearch | None" = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """For the curation's record."""
        values: dict[str, Any] = {
            "method": self.method,
            "links": self.num_links,
            "rows_reused": self.reused,
            "recall": None if self.recall is None else self.recall.value,
        }
        if self.recall is not None:
            values |= {"recall_rows": self.recall.rows, "recall_pairs": self.recall.pairs}
        if self.clusters is not None:
            probes = self.clusters.probes
            values |= {
                "cells": self.clusters.num_cells,
                "cells_probed_mean": probes.taken / max(1, probes.rows),
                "cells_within_reach_mean": probes.within / max(1, probes.rows),
                "rows_cut": probes.cut,
            }
        return values

    def lines(self) -> Iterator[str]:
        """For the screen."""
        how = f"duplicates searched: {self.method}, {self.num_links} links in {self.seconds:.1f} s"
        if self.reused:
            how += f"; links among {self.reused} rows taken from the last curation"
        yield how
        if self.clusters is not None:
            probes = self.clusters.probes
            yield (
                f"{self.clusters.num_cells} cells; a row searches {probes.taken / max(1, probes.rows):.1f} others on "
                f"average; {probes.cut} of {probes.rows} rows reach more than the --max-probes allow (greatest "
                f"{probes.greatest})"
            )
        if self.recall is not None:
            value = self.recall.value
            found = "no linked pair in the sample" if value is None else f"{value:.4f}"
            yield (
                f"recall of linked pairs against exact search: {found} ({self.recall.found} of {self.recall.pairs} "
                f"pairs of {self.recall.rows} sampled rows)"
            )
            if value is not None and value < 0.99:
                yield "WARNING: pairs are missed; raise --max-probes, or --method exact"
        yield from self.notes


def find_duplicates_among(
    request_ids: Sequence[str],
    embeddings: np.ndarray,
    members: np.ndarray,
    rank: np.ndarray,
    limits: np.ndarray,
    settings: LinkSettings,
    search: Search,
    folder: Path,
) -> DuplicateFindings:
    """Components of the members, and which member of each is kept.

    Links are searched among all rows, so that they hold whatever the verdicts are next time.

    Args:
        request_ids: of the rows, ascending, N.
        embeddings: float32 (N, D), unit norm; in memory or mapped.
        members: bool (N,): rows that can be duplicates of each other.
        rank: (N,) distinct integers, the best row lowest.
        limits: float32 (N,): a pair is linked from the greater limit of its rows on.
        settings: identity of the links.
        search: how.
        folder: for files of this run.
    """
    start = time.perf_counter()
    check_unit(embeddings)
    checksums = row_checksums(embeddings)
    links = Links(members, MAX_LINKS)
    notes: list[str] = []
    fresh = np.ones(len(request_ids), bool)
    all_exact = True
    sampled = np.zeros(len(request_ids), bool)
    rng = np.random.default_rng(search.seed)
    sampled[rng.permutation(len(request_ids))[: search.recall_rows]] = True
    degrees = np.zeros(len(request_ids), np.int64)
    if search.links_folder is not None and not search.from_scratch:
        known = load_links(search.links_folder, settings, request_ids, checksums)
        if search.method == "exact" and not known.exact:
            notes.append("links of an earlier curation are not used: they were found by clustered search")
        else:
            fresh, all_exact = ~known.known, known.exact
            links.add(known.first, known.second)
            _count_ends(degrees, known.first, known.second)
            notes += [known.note] if known.note else []
    method = _method(search, int(fresh.sum()), len(fresh))
    clusters = None
    if method == "exact":
        for first, second in _search_exact(embeddings, limits, fresh, search):
            links.add(first, second)
            _count_ends(degrees, first, second)
    else:
        clusters = _search_clustered(embeddings, limits, fresh, sampled, members, links, search, folder)
        for row, count in clusters.degrees.items():
            degrees[row] += count
        all_exact = False
    recall = None
    if not all_exact:
        rows = np.flatnonzero(sampled)
        exact = count_linked(rows, embeddings, limits)
        assert (degrees[rows] <= exact).all(), "a pair was found twice, or one that is not linked"
        recall = Recall(rows=len(rows), pairs=int(exact.sum()), found=int(degrees[rows].sum()))
    if search.links_folder is not None:
        notes += _keep(links, search.links_folder, settings, request_ids, checksums, all_exact, fresh)
    return DuplicateFindings(
        kept=best_members(links.components(), rank),
        num_links=links.num_links,
        method=method,
        reused=int((~fresh).sum()),
        recall=recall,
        clusters=clusters,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _method(search: Search, num_fresh: int, count: int) -> str:
    if search.method != "auto":
        return search.method
    import faiss

    on_gpu = getattr(faiss, "get_num_gpus", int)() > 0
    return "exact" if num_fresh * count <= (EXACT_PAIRS_GPU if on_gpu else EXACT_PAIRS) else "clustered"


def _count_ends(degrees: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    for ends in (first, second):
        degrees += np.bincount(ends, minlength=len(degrees))


def _search_exact(
    embeddings: np.ndarray, limits: np.ndarray, fresh: np.ndarray, search: Search
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    shard_rows = max(1024, search.memory_bytes // 2 // max(1, 4 * embeddings.shape[1]))
    with progress_bar("duplicates", int(fresh.sum())) as advance:
        yield from linked_pairs(embeddings, limits, search.num_threads, fresh=fresh, shard_rows=shard_rows)
        advance(int(fresh.sum()))


def _search_clustered(
    embeddings: np.ndarray,
    limits: np.ndarray,
    fresh: np.ndarray,
    sampled: np.ndarray,
    members: np.ndarray,
    links: Links,
    search: Search,
    folder: Path,
) -> "ClusterSearch":
    from jobs.dedup_clusters import ClusterSettings, search_clusters

    path = Path(embeddings.filename) if isinstance(embeddings, np.memmap) else folder / "embeddings.npy"  # type: ignore[arg-type]
    if not isinstance(embeddings, np.memmap):
        np.save(path, embeddings)
    cells = folder / "cells"
    cells.mkdir()
    settings = ClusterSettings(
        folder=cells,
        max_probes=search.max_probes,
        max_sample_bytes=search.memory_bytes // 4,
        seed=search.seed,
        address=search.address,
        num_cpus=search.num_cpus,
    )
    with progress_bar("duplicates", len(embeddings)) as advance:
        return search_clusters(
            path,
            limits,
            fresh=fresh,
            sampled=sampled,
            members=members,
            links=links,
            settings=settings,
            progress=advance,
        )


def _keep(
    links: Links,
    folder: Path,
    settings: LinkSettings,
    request_ids: Sequence[str],
    checksums: np.ndarray,
    exact: bool,
    fresh: np.ndarray,
) -> list[str]:
    if not links.complete:
        return [f"more than {MAX_LINKS} links: they are not kept, the next curation starts from scratch"]
    if fresh.any():
        save_links(folder, settings, request_ids, checksums, *links.arrays(), exact=exact)
    return []
