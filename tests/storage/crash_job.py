"""A synthesize job in one process, to be killed: two write threads and a committer. For test_kills.py.

    python crash_job.py URI NUM_REQUESTS RUN_ID [BOUNDARY]

Prints "ready" when it is about to take the lease. With BOUNDARY it kills itself (SIGKILL) at that point, the third time
it comes there.
"""

import itertools
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from storage_rows import LABELS, plan_of, synthetic_rows, synthetic_table

import factory.storage.committer as committer_module
import factory.storage.writer as writer_module
from factory.storage import Committer, write_fragment

ROWS_PER_FRAGMENT = 4
BOUNDARIES = {
    "between data file and record": (writer_module, "write_record", "before"),
    "between record and its arrival at the committer": (writer_module, "write_record", "after"),
    "between record and commit": (committer_module.Committer, "_append", "before"),
    "after commit before acknowledgement": (committer_module.Committer, "_append", "after"),
    "within the acknowledgement": (committer_module.Ledger, "delete", "after"),
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


def run_job(uri: str, num_requests: int, run_id: str) -> str:
    """Do what is missing; the reconciliation line."""
    synthetic_table(Path(uri).parent, Path(uri).name)
    plan = plan_of()
    wanted = plan.indices({label: num_requests // len(LABELS) for label in LABELS})
    print("ready", flush=True)
    with Committer(uri, plan_id=plan.plan_id, run_id=run_id, rows_per_commit=8) as committer:
        committer.adopt()
        missing = committer.missing(wanted)
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
    if len(sys.argv) > 4:
        die_at(sys.argv[4])
    print(run_job(sys.argv[1], int(sys.argv[2]), sys.argv[3]), flush=True)
