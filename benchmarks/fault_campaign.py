"""Seeded faults on a several-node Ray: each run must end with exactly the planned rows, equal to a run without faults.

    python benchmarks/fault_campaign.py --runs 20 --seed 0

The kind of each fault (a node, an actor, the driver, the head, memory, …) and its moment come from the seed. The
peer is the same job without a fault on the same cluster, in the same campaign: what a fault costs is the ratio of
their times. `--minutes` ends the campaign early, with the runs that were done. `make soak` runs it whole.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import median, save

from tests.cluster.faults import (
    KINDS,
    NUM_REQUESTS,
    FaultCluster,
    Kind,
    Outcome,
    reference_rows,
    run_with_fault,
)

ROOT = Path(__file__).resolve().parents[1]


def make_inputs(folder: Path) -> tuple[str, str]:
    """A real table of phantoms and an untrained generator of recipe `tiny`."""
    from factory.recipes import RECIPES
    from factory.storage import open_table, real_digest
    from jobs.prepare import Args, run

    real = str(folder / "real.lance")
    run(Args(layout="phantom", out=real, num_images=60, seed=3))
    generator = folder / "generator"
    RECIPES["tiny"]().generator.load().save(
        generator, {"name": "tiny", "real_digest": real_digest(open_table(real))}
    )
    return real, str(generator)


def plan_runs(runs: int, seed: int) -> list[tuple[Kind, int, int]]:
    """(kind, rows committed when it strikes, seed) of each run; every kind comes before any comes again."""
    rng = np.random.default_rng(seed)
    kinds: list[Kind] = []
    while len(kinds) < runs:
        kinds += [KINDS[i] for i in rng.permutation(len(KINDS))]
    moments = rng.integers(0, NUM_REQUESTS - 2, runs)
    return [
        (kind, int(moment), seed * 1000 + i) for i, (kind, moment) in enumerate(zip(kinds[:runs], moments))
    ]


def main() -> int:
    """Run the campaign, print each run, write the results; 1 where a run did not end as it must."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no run after so many minutes"
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        real, generator = make_inputs(folder)
        reference = reference_rows(real, generator)
        with FaultCluster(folder) as cluster:
            planned: list[tuple[Kind, int, int]] = [
                ("none", 0, 999_999),
                *plan_runs(options.runs, options.seed),
            ]
            for kind, after_rows, seed in planned:
                if time.monotonic() - begin > options.minutes * 60:
                    break
                try:
                    outcome = run_with_fault(
                        cluster, kind, after_rows=after_rows, seed=seed, real=real, generator=generator,
                        reference=reference,
                    )  # fmt: skip
                except (AssertionError, TimeoutError) as error:
                    failures.append(f"{kind}, seed {seed}, after {after_rows} rows: {error}")
                    print(f"FAILED {failures[-1]}", flush=True)
                    continue
                outcomes.append(outcome)
                print(outcome, flush=True)
    faults = [outcome for outcome in outcomes if outcome.kind != "none"]
    peers = [outcome.seconds for outcome in outcomes if outcome.kind == "none"]
    if not faults and not failures:
        print("no run was done; give more --minutes", file=sys.stderr)
        return 1
    path = save(
        "fault_campaign",
        {"seed": options.seed, "runs_asked": options.runs, "rows_per_run": NUM_REQUESTS, "nodes": 2},
        {
            "runs": len(faults) + len(failures),
            "exactly_as_planned": len(faults),
            "failures": failures,
            "by_kind": dict(Counter(outcome.kind for outcome in faults)),
            "seconds_without_fault": median(peers) if peers else None,
            "ratio_seconds_with_over_without": median([o.seconds for o in faults]) / median(peers)
            if peers and faults
            else None,
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        },
        "cpu",
    )
    print(f"{len(faults)} of {len(faults) + len(failures)} runs ended exactly as planned; wrote {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
