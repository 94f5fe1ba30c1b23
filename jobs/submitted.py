"""Jobs that were submitted to a cluster: which there are, their output, how they stand, stopping one.

factory jobs list [--address URL]
factory jobs logs ID [--follow]
factory jobs status ID
factory jobs stop ID
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.job_server import (
    LOST_STATUS,
    ClusterLost,
    connect_jobs,
    errors_for_the_operator,
    exit_status,
    follow,
    job_info,
    job_line,
)

ACTIONS = ("list", "logs", "status", "stop")
STOP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory jobs`."""

    action: str
    """list, logs, status or stop."""
    job_id: str | None = None
    """Which job."""
    address: str | None = None
    """Job server of the cluster; else RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    follow: bool = False
    """With logs: until the job ends; the exit status is then the job's."""
    json: bool = False
    """With list and status: as JSON."""

    def __post_init__(self) -> None:
        if (self.job_id is None) != (self.action == "list"):
            raise ValueError(
                f"jobs {self.action}: {'takes no id' if self.action == 'list' else 'which job? `factory jobs list`'}"
            )


def parse(argv: Sequence[str]) -> Args:
    """Arguments of the command line.

    Raises:
        SystemExit: unknown options or action.
        ValueError: an id where none belongs, or none where one does.
    """
    parser = argparse.ArgumentParser(
        prog="factory jobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("job_id", nargs="?", metavar="ID")
    parser.add_argument(
        "--address", help="job server (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    )
    parser.add_argument("--follow", action="store_true", help="with logs: until the job ends")
    parser.add_argument("--json", action="store_true", help="with list and status: as JSON")
    return Args(**vars(parser.parse_args(list(argv))))


def list_jobs(client: Any, as_json: bool) -> int:
    """Every submitted job, newest first."""
    with errors_for_the_operator(client.get_address()):
        found = [details for details in client.list_jobs() if details.submission_id]
    lines = [job_line(details) for details in sorted(found, key=lambda d: -(d.start_time or 0))]
    if as_json:
        print(json.dumps(lines, indent=2))
        return 0
    for line in lines:
        print(
            f"{line['id']}  {line['status']:<9}  {line['started']}  {line['seconds']:>6} s  {line['command']}"
        )
    if not lines:
        print("no job was submitted to this cluster")
    return 0


def show_status(client: Any, job_id: str, as_json: bool) -> int:
    """How a job stands; exit status 0 unless it failed."""
    details = job_info(client, job_id)
    line = dict(job_line(details))
    ended = details.status.is_terminal()
    if ended:
        line["exit_status"] = str(exit_status(details))
    if as_json:
        print(json.dumps(line, indent=2))
    else:
        for name, value in line.items():
            print(f"{name:<12} {value}")
        if ended and line["status"] == "FAILED" and details.message:
            print(f"{'message':<12} {details.message.splitlines()[0]}")
    return exit_status(details) if ended else 0


def show_logs(client: Any, job_id: str, following: bool) -> int:
    """The job's output so far, or until it ends."""
    job_info(client, job_id)
    if not following:
        sys.stdout.write(client.get_job_logs(job_id))
        return 0
    try:
        return exit_status(follow(client, job_id))
    except KeyboardInterrupt:
        print(f"\ndetached: {job_id} goes on", file=sys.stderr)
        return 130
    except ClusterLost as error:
        print(f"error: {error}; submit the same command again, it goes on from storage", file=sys.stderr)
        return LOST_STATUS


def stop(client: Any, job_id: str) -> int:
    """Stop a job and wait until it has ended; exit status 1 where it does not end."""
    if job_info(client, job_id).status.is_terminal():
        print(f"{job_id} has ended already")
        return 0
    client.stop_job(job_id)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if client.get_job_info(job_id).status.is_terminal():
            print(f"stopped {job_id}; what it committed stays, and the same command goes on")
            return 0
        time.sleep(0.5)
    print(f"{job_id} was told to stop and still runs after {STOP_SECONDS:.0f} s", file=sys.stderr)
    return 1


def command(argv: Sequence[str]) -> int:
    """`factory jobs`."""
    args = parse(argv)
    client = connect_jobs(args.address)
    if args.action == "list":
        return list_jobs(client, args.json)
    assert args.job_id is not None  # checked by Args
    if args.action == "logs":
        return show_logs(client, args.job_id, args.follow)
    if args.action == "status":
        return show_status(client, args.job_id, args.json)
    return stop(client, args.job_id)
