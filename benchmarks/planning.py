"""Planning, resuming and auditing 10^5 … 10^7 requests: seconds and memory of the driver.

    python benchmarks/planning.py                       # 10^5, 10^6, 10^7; about five minutes on one core
    python benchmarks/planning.py --sizes 100000

A table of N rows is written without Ray, with a tiny payload (the stream's identity columns, no images), by the real
writer and committer, all but 1000 of the requests; the ids are numbers in 32 hex digits, since hashing them is not what
is measured. Then, each in a process of its own: *plan* is the bitmap of
N requests and the read tasks of the stream over all of them; *resume* opens the committer and asks what is missing;
*audit* checks distinctness and counts. The peer does *resume* as it is usually written: a left anti-join of the
wanted ids with the ids in the table, by pyarrow and by pandas, in the same run on the same table. Wall seconds and the
processor seconds of all threads are given: on a busy machine the second is the one to compare.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from schemas.request import SynthesisPlan

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = 1000
ROWS_PER_FRAGMENT = 50_000
ODD = 0x9E3779B97F4A7C15F39CC0605CEDC835


def make_plan() -> "SynthesisPlan":
    """The plan of every process of the benchmark."""
    from schemas.request import SynthesisPlan

    return SynthesisPlan(
        recipe="bench", fingerprint="f" * 32, weights={}, real_digest="r", labels=("benign", "malignant")
    )


def schema() -> pa.Schema:
    """Identity columns of a synthetic row, and the verdict."""
    return pa.schema(
        [
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("plan_id", pa.string(), nullable=False),
            pa.field("request_index", pa.int64(), nullable=False),
            pa.field("stream_reject_reason", pa.string()),
        ]
    )


def wanted_counts(size: int) -> dict[str, int]:
    """Half of each label."""
    return {"benign": size // 2, "malignant": size - size // 2}


def fill(uri: str, size: int) -> dict:
    """Write and commit all requests but `LEFT_OUT` of them, by the real writer and committer."""
    from factory.storage import Committer, IndexSet, create_table, write_fragment

    plan = make_plan()
    create_table(uri, schema())
    left_out = np.random.default_rng(0).choice(size, LEFT_OUT, replace=False)
    todo = IndexSet.of(plan.index_blocks(wanted_counts(size))).without(IndexSet.of([left_out]))
    start = time.perf_counter()
    with Committer(uri, plan_id=plan.plan_id, run_id="fill", rows_per_commit=500_000) as committer:
        for block in todo.blocks(ROWS_PER_FRAGMENT):
            indices = block.tolist()
            reasons = ["blank_image" if index % 4 == 0 else None for index in indices]
            rows = pa.table(
                [[f"{i * ODD % 2**128:032x}" for i in indices], [plan.plan_id] * len(block), block, reasons],
                schema=schema(),
            )
            committer.add(write_fragment(uri, rows, run_id="fill"))
    return {"seconds": time.perf_counter() - start, "rows": size - LEFT_OUT}


def plan(uri: str, size: int) -> dict:
    """The bitmap of what is asked for, and the read tasks of the stream over all of it."""
    from factory.storage import IndexSet
    from jobs.synthesis_stream import request_source, rows_per_block

    before = rss_mb()
    start = time.perf_counter()
    requested = IndexSet.of(make_plan().index_blocks(wanted_counts(size)))
    bitmap_seconds = time.perf_counter() - start
    tasks = request_source(requested, rows_per_block(size, 32)).get_read_tasks(1)
    seconds = time.perf_counter() - start
    assert sum(task.metadata.num_rows or 0 for task in tasks) == -(-size // rows_per_block(size, 32))
    return {
        "seconds": seconds,
        "bitmap_seconds": bitmap_seconds,
        "rows_per_second": size / seconds,
        "added_mb": rss_mb() - before,
    }


def resume(uri: str, size: int) -> dict:
    """What the driver does before it starts the stream again."""
    from factory.storage import Committer, IndexSet

    the_plan = make_plan()
    before = rss_mb()
    start = time.perf_counter()
    requested = IndexSet.of(the_plan.index_blocks(wanted_counts(size)))
    with Committer(uri, plan_id=the_plan.plan_id, run_id="resume") as committer:
        committer.adopt()
        missing = committer.missing(requested)
    seconds = time.perf_counter() - start
    assert len(missing) == LEFT_OUT
    return {"seconds": seconds, "added_mb": rss_mb() - before}


def audit(uri: str, size: int) -> dict:
    """What the driver does when the stream has ended."""
    from factory.storage import Committer, IndexSet

    the_plan = make_plan()
    requested = IndexSet.of(the_plan.index_blocks(wanted_counts(size)))
    with Committer(uri, plan_id=the_plan.plan_id, run_id="audit") as committer:
        before = rss_mb()
        start = time.perf_counter()
        found = committer.audit(requested)
        seconds = time.perf_counter() - start
    assert (found.committed, found.pending) == (size - LEFT_OUT, LEFT_OUT)
    return {"seconds": seconds, "added_mb": rss_mb() - before}


def peer_pyarrow(uri: str, size: int) -> dict:
    """Wanted ids anti-joined with the committed ones, as Arrow tables."""
    import lance

    before = rss_mb()
    start = time.perf_counter()
    wanted = pa.table({"request_index": make_plan().indices(wanted_counts(size))})
    done = lance.dataset(uri).to_table(columns=["request_index"])
    missing = wanted.join(done, keys="request_index", join_type="left anti")
    seconds = time.perf_counter() - start
    assert missing.num_rows == LEFT_OUT
    return {"seconds": seconds, "added_mb": rss_mb() - before}


def peer_pandas(uri: str, size: int) -> dict:
    """Wanted ids that are not `isin` the committed ones, as pandas columns."""
    import lance
    import pandas as pd

    before = rss_mb()
    start = time.perf_counter()
    wanted = pd.Series(make_plan().indices(wanted_counts(size)))
    done = lance.dataset(uri).to_table(columns=["request_index"]).to_pandas()
    missing = wanted[~wanted.isin(done["request_index"])]
    seconds = time.perf_counter() - start
    assert len(missing) == LEFT_OUT
    return {"seconds": seconds, "added_mb": rss_mb() - before}


STEPS = {step.__name__: step for step in (fill, plan, resume, peer_pyarrow, peer_pandas, audit)}


def rss_mb() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def in_process(step: str, uri: str, size: int) -> dict:
    """One step in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--step", step, "--uri", uri, "--sizes", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--step", choices=tuple(STEPS))
    parser.add_argument("--uri")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    if args.step:
        import factory.storage  # noqa: F401  # imported before memory is measured

        if args.step == "plan":
            import ray.data  # noqa: F401
        cpu = time.process_time()
        result = STEPS[args.step](args.uri, args.sizes[0])
        result["cpu_seconds"] = time.process_time() - cpu
        print(json.dumps(result | {"peak_rss_mb": rss_mb()}))
        return
    from measure import save

    results: dict[str, dict] = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            uri = str(Path(folder) / "synthetic.lance")
            results[str(size)] = {name: in_process(name, uri, size) for name in STEPS}
        for name, found in results[str(size)].items():
            print(
                f"{size:>10,} {name:<14} {found['seconds']:8.2f} s ({found['cpu_seconds']:7.2f} s of CPU)  {found['peak_rss_mb']:7.0f} MB peak, "
                f"{found.get('added_mb', 0):6.0f} MB by the step",
                flush=True,
            )
    settings = {"width": "identity", "left_out": LEFT_OUT, "rows_per_fragment": ROWS_PER_FRAGMENT}
    print(f"wrote {save('planning', settings | {'sizes': args.sizes}, results, 'cpu')}")


if __name__ == "__main__":
    main()
