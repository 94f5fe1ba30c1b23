"""Duplicates among 10⁴, 10⁵ and 10⁶ embeddings: ours by k-means cells, exact FAISS, and a SemDeDup-style pass.

    python benchmarks/dedup.py                       10⁴ and 10⁵, a minute or two
    python benchmarks/dedup.py --counts 10000 100000 1000000

Embeddings are 384-d, from a mixture whose clusters overlap (32 directions of falling variance, and noise), with
near-duplicates of cosine 0.90 … 0.999 planted. Each candidate runs in a process of its own. The SemDeDup-style peer
(Abbas et al. 2023) has the same cells and compares within cells only. Exact FAISS is a range search of all rows; above
200,000 rows of 1024 queries, and its time is multiplied. Recall is against exact search of 1000 rows. Memory is the
peak of anonymous memory above that after imports: pages of mapped files, which the system may drop, are not in it.
Ratios and growth are of CPU seconds: on a shared machine the clock on the wall measures the neighbours.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import save

DIM, DIRECTIONS = 384, 32
PLANTED_SHARE = 0.1
EXACT_UP_TO, EXACT_QUERIES, RECALL_ROWS = 200_000, 1024, 1000
CANDIDATES = ("clustered", "ray", "semdedup", "exact")


def write_embeddings(path: Path, count: int, seed: int = 0) -> None:
    """A .npy file, float32 (count, DIM), unit norm; a tenth of the rows are near-duplicates of others."""
    rng = np.random.default_rng(seed)
    variance = 1 / np.sqrt(np.arange(1, DIRECTIONS + 1))
    axes = (rng.standard_normal((DIRECTIONS, DIM)) / DIM**0.5 * variance[:, None]).astype(np.float32)
    mean = np.full(DIM, 0.6 / DIM**0.5, np.float32)
    centres = rng.standard_normal((max(10, count // 500), DIRECTIONS)).astype(np.float32)
    target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, DIM))
    for start in range(0, count, 1 << 15):
        size = min(1 << 15, count - start)
        where = centres[rng.integers(len(centres), size=size)]
        local = 0.5 * rng.standard_normal((size, DIRECTIONS), dtype=np.float32)
        noise = rng.standard_normal((size, DIM), dtype=np.float32) * np.float32(0.45 / DIM**0.5)
        block = _unit((where + local) @ axes + mean + noise)
        planted = rng.permutation(size)[: int(PLANTED_SHARE * size)]
        sources = rng.integers(start + size, size=len(planted))
        inside = sources >= start
        vectors = np.where(inside[:, None], block[np.maximum(sources - start, 0)], target[sources])
        cosine = 1 - rng.uniform(0.001, 0.1, size=(len(planted), 1)).astype(np.float32)
        away = rng.standard_normal(vectors.shape, dtype=np.float32)
        away = _unit(away - (away * vectors).sum(1, keepdims=True) * vectors)
        block[planted] = _unit(cosine * vectors + np.sqrt(1 - cosine**2) * away)
        target[start : start + size] = block
    target.flush()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


# ------------------------------------------------------------------------------------------ candidates


def clustered(path: Path, threshold: float, folder: Path, threads: int) -> dict[str, Any]:
    """Ours in one process, without Ray."""
    from factory.curation import cells
    from factory.curation.cell_search import search_cells
    from factory.curation.components import Links, best_members

    vectors = np.load(path, mmap_mode="r")
    count = len(vectors)
    limits, everything = np.full(count, threshold, np.float32), np.ones(count, bool)
    sampled = _sampled(count)
    clock = [time.perf_counter()]
    num_cells = cells.num_cells_for(count)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(count, min(count, cells.ROWS_PER_CENTROID * num_cells), replace=False))
    centroids = cells.train_centroids(vectors[chosen], num_cells, num_threads=threads)
    clock.append(time.perf_counter())
    parts, probes = [], cells.Probes()
    for start in range(0, count, 1 << 15):
        part, reached = cells.assign_rows(
            folder,
            vectors,
            limits,
            centroids,
            start=start,
            stop=min(start + (1 << 15), count),
            max_probes=64,
        )
        parts.append(part)
        probes += reached
    clock.append(time.perf_counter())
    layout = cells.write_cells(
        folder,
        vectors,
        parts,
        num_cells=num_cells,
        limits=limits,
        fresh=everything,
        members=everything,
        sampled=sampled,
    )
    clock.append(time.perf_counter())
    links = Links(everything, 0)
    found = search_cells(layout, range(num_cells))
    links.add(found.first, found.second, total=found.total, complete=found.complete)
    best_members(links.components(), np.arange(count))
    clock.append(time.perf_counter())
    stages = dict(zip(("train", "assign", "layout", "search"), np.diff(clock).tolist()))
    return {
        "seconds": clock[-1] - clock[0],
        "stages": stages,
        "links": links.num_links,
        "cells": num_cells,
        "probed_mean": probes.taken / count,
        "within_reach_mean": probes.within / count,
        "rows_cut": probes.cut / count,
        "found": sum(found.degrees.values()),
    }


def ray(path: Path, threshold: float, folder: Path, threads: int) -> dict[str, Any]:
    """Ours as `factory curate` runs it, on a private Ray; memory is that of the driver."""
    from factory.curation.components import Links, best_members
    from jobs.dedup_clusters import ClusterSettings, search_clusters

    count = len(np.load(path, mmap_mode="r"))
    everything = np.ones(count, bool)
    start = time.perf_counter()
    links = Links(everything, 0)
    found = search_clusters(
        path,
        np.full(count, threshold, np.float32),
        fresh=everything,
        sampled=_sampled(count),
        members=everything,
        links=links,
        settings=ClusterSettings(folder=folder, num_cpus=threads),
    )
    best_members(links.components(), np.arange(count))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "seconds_without_ray_start": seconds - found.seconds["start"],
        "stages": found.seconds,
        "links": links.num_links,
        "found": sum(found.degrees.values()),
    }


def semdedup(path: Path, threshold: float, folder: Path, threads: int) -> dict[str, Any]:
    """Peer: the same number of cells, pairs within cells only."""
    import faiss

    from factory.curation.cells import ROWS_PER_CENTROID, num_cells_for

    faiss.omp_set_num_threads(threads)
    vectors = np.load(path, mmap_mode="r")
    count, sampled = len(vectors), _sampled(len(vectors))
    start = time.perf_counter()
    num_cells = num_cells_for(count)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(count, min(count, ROWS_PER_CENTROID * num_cells), replace=False))
    kmeans = faiss.Kmeans(
        DIM,
        num_cells,
        niter=8,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=ROWS_PER_CENTROID,
    )
    kmeans.train(np.ascontiguousarray(vectors[chosen]))
    cell = np.concatenate(
        [kmeans.assign(np.ascontiguousarray(vectors[k : k + (1 << 15)]))[1] for k in range(0, count, 1 << 15)]
    )
    order = np.argsort(cell, kind="stable")
    bounds = np.searchsorted(cell[order], np.arange(num_cells + 1))
    links = found = 0
    for low, high in itertools.pairwise(bounds.tolist()):
        rows = order[low:high]
        block = np.ascontiguousarray(vectors[rows])
        first, second = np.nonzero(np.triu(block @ block.T, 1) >= threshold)
        links += len(first)
        found += int(sampled[rows[first]].sum() + sampled[rows[second]].sum())
    return {"seconds": time.perf_counter() - start, "links": links, "cells": num_cells, "found": found}


def exact(path: Path, threshold: float, folder: Path, threads: int) -> dict[str, Any]:
    """Peer: range search of FAISS's flat index over all rows."""
    import faiss

    faiss.omp_set_num_threads(threads)
    vectors = np.load(path, mmap_mode="r")
    count = len(vectors)
    start, cpu_start = time.perf_counter(), time.process_time()
    index = faiss.IndexFlatIP(DIM)
    for begin in range(0, count, 1 << 16):
        index.add(np.ascontiguousarray(vectors[begin : begin + (1 << 16)]))
    added, cpu_added = time.perf_counter(), time.process_time()
    queries = count if count <= EXACT_UP_TO else EXACT_QUERIES
    links = 0
    for begin in range(0, queries, 4096):
        block = np.ascontiguousarray(vectors[begin : min(begin + 4096, queries)])
        limits, _, _ = index.range_search(block, float(np.nextafter(np.float32(threshold), np.float32(0))))
        links += int(limits[-1]) - len(block)
    searched = (time.perf_counter() - added) * count / queries
    return {
        "seconds": added - start + searched,
        "cpu_seconds": cpu_added - cpu_start + (time.process_time() - cpu_added) * count / queries,
        "extrapolated_from_queries": None if queries == count else queries,
        "links": links // 2 if queries == count else None,
    }


def truth(path: Path, threshold: float) -> int:
    """Links of the sampled rows, by comparing them with all."""
    from factory.curation.dedup import count_linked

    vectors = np.load(path, mmap_mode="r")
    rows = np.flatnonzero(_sampled(len(vectors)))
    return int(count_linked(rows, vectors, np.full(len(vectors), threshold, np.float32)).sum())


def _sampled(count: int) -> np.ndarray:
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(7).permutation(count)[:RECALL_ROWS]] = True
    return chosen


# ------------------------------------------------------------------------------------------ running


def _anonymous_mb() -> float:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) / 1e3


def run_one(name: str, path: Path, threshold: float, threads: int) -> dict[str, Any]:
    """A candidate in this process, with its peak of anonymous memory in MB."""
    import faiss  # noqa: F401
    import scipy.sparse.csgraph  # noqa: F401

    from factory.curation import cell_search  # noqa: F401

    before, peak, done = _anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _anonymous_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    candidates = {"clustered": clustered, "ray": ray, "semdedup": semdedup, "exact": exact}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        start = time.process_time()
        result = candidates[name](path, threshold, Path(folder), threads)
        result.setdefault("cpu_seconds", time.process_time() - start)
    done.set()
    watcher.join()
    return result | {"peak_mb": peak[0] - before}


def _spawn(name: str, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", name, "--file", str(path)]
    command += ["--threshold", str(args.threshold), "--threads", str(args.threads)]
    # numpy on one thread: on a busy machine two wait for each other; FAISS has --threads.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ray-up-to", type=int, default=100_000, help="rows up to which Ray is timed too")
    parser.add_argument("--work-dir")
    parser.add_argument("--run", choices=CANDIDATES)
    parser.add_argument("--file")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run_one(args.run, Path(args.file), args.threshold, args.threads)))
        return
    results: dict[str, Any] = {}
    settings = {"width": DIM, "counts": args.counts, "threshold": args.threshold, "threads": args.threads}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        path = Path(folder) / "embeddings.npy"
        for count in args.counts:
            write_embeddings(path, count)
            wanted = truth(path, args.threshold)
            of_count: dict[str, Any] = {"exact_pairs_of_sampled_rows": wanted}
            for name in CANDIDATES:
                if name == "ray" and count > args.ray_up_to:
                    continue
                of_count[name] = _spawn(name, path, args)
                if "found" in of_count[name]:
                    of_count[name]["recall"] = of_count[name].pop("found") / max(1, wanted)
                print(count, name, json.dumps(of_count[name]), flush=True)
            for name in ("exact", "semdedup"):
                ratio = of_count[name]["cpu_seconds"] / of_count["clustered"]["cpu_seconds"]
                of_count[f"ratio_{name}_to_ours"] = ratio
            results[str(count)] = of_count
            results["growth_exponent"] = _growth(results, [c for c in args.counts if str(c) in results])
            print(save("dedup", settings, results, "cpu"), flush=True)
    print(json.dumps(results["growth_exponent"], indent=2))


def _growth(results: dict[str, Any], counts: list[int]) -> dict[str, dict[str, float]]:
    """log(time ratio) / log(ratio of rows), between each count and the next."""
    found: dict[str, dict[str, float]] = {}
    for low, high in itertools.pairwise(counts):
        for name in ("clustered", "semdedup", "exact"):
            seconds = [results[str(count)][name]["cpu_seconds"] for count in (low, high)]
            exponent = float(np.log(seconds[1] / seconds[0]) / np.log(high / low))
            found.setdefault(name, {})[f"{low} to {high}"] = exponent
    return found


if __name__ == "__main__":
    main()
