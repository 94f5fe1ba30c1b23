"""A synthesize job in one process, to be killed: two write threads and a committer. For test_kills.py.

    python crash_job.py URI NUM_REQUESTS RUN_ID [BOUNDARY [SEED]]

Prints "ready" when it is about to take the lease. With BOUNDARY (not empty) it kills itself (SIGKILL) at that point,
the third time it comes there. SEED makes another plan.
"""

import itertools
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from storage_rows import DIM, LABELS, METADATA, plan_of, synthetic_rows

import factory.storage.committer as committer_module
import factory.storage.files as files_module
import factory.storage.writer as writer_module
from factory.storage import Committer, create_table, write_fragment
from schemas.sample import synthetic_schema

ROWS_PER_FRAGMENT = 4
BOUNDARIES = {
    "between data file and record": (writer_module, "write_record", "before"),
    "between record and its arrival at the committer": (writer_module, "write_record", "after"),
    "between record and commit": (committer_module.Committer, "_append", "before"),
    "after commit before acknowledgement": (committer_module.Committer, "_append", "after"),
    "within the acknowledgement": (files_module, "remove", "after"),
}


def die_at(boundary: str, visits: int = 3) -> None:
    """Replace the function at `boundary` by one that kills this process before or after its third call."""
    owner, name, when = BOUNDARIES[boundary]
    original, count = getattr(owner, name), itertools.count(1)

    def dying(*args, **kwargs):
        last = next(count) == visits
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def run_job(uri: str, num_requests: int, run_id: str, seed: int = 0) -> str:
    """Do what is missing; the reconciliation line."""
    create_table(uri, synthetic_schema(DIM), metadata=METADATA)
    plan = plan_of(seed)
    wanted = plan.indices({label: num_requests // len(LABELS) for label in LABELS})
    print("ready", flush=True)
    with Committer(uri, plan_id=plan.plan_id, run_id=run_id, rows_per_commit=8) as committer:
        committer.adopt()
        missing = committer.missing(wanted).to_array()
        parts = [missing[i : i + ROWS_PER_FRAGMENT] for i in range(0, len(missing), ROWS_PER_FRAGMENT)]
        with ThreadPoolExecutor(2) as pool:
            tasks = [
                pool.submit(lambda part: write_fragment(uri, synthetic_rows(plan, part), run_id=run_id), part)
                for part in parts
            ]
            for task in as_completed(tasks):
                committer.add(task.result())
        committer.commit()
        return committer.audit(wanted).line()


if __name__ == "__main__":
    boundary, seed = (sys.argv[4:6] + ["", "0"][max(len(sys.argv) - 4, 0) :])[:2]
    if boundary:
        die_at(boundary)
    print(run_job(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(seed)), flush=True)
