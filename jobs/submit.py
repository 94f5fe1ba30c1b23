"""Run a verb on a Ray cluster, from this machine: the working tree is sent, the job's output comes back.

    factory submit --address http://127.0.0.1:8265 train --recipe tiny \\
        --real s3://bucket/real.lance --out /shared/generator --allow-local-paths
    factory submit --no-wait synthesize --recipe tiny --generator … --real … --num-requests 10000 --out s3://…

Options of the submission stand before the verb. The verb's arguments are checked here before anything is sent.
Ctrl-C leaves the job running and says how to follow it again. The exit status is the job's own; 75 says that
the cluster was lost: submit the same command again, it goes on from storage.
"""

import argparse
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.redaction import redact
from jobs.job_server import (
    LOST_STATUS,
    ClusterLost,
    connect_jobs,
    errors_for_the_operator,
    exit_status,
    follow,
)
from jobs.submission import (
    ROOT,
    SUBMITTABLE_VERBS,
    Command,
    Package,
    describe_environment,
    environment,
    is_head_on_this_machine,
    lock_digest,
    pack,
    parse_command,
    runtime_environment,
    with_paths,
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory submit`."""

    verb: str
    """The verb to run there."""
    argv: tuple[str, ...]
    """Its arguments."""
    address: str | None = None
    """Job server of the cluster; else RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    wait: bool = True
    """Follow the job until it ends."""
    stop_on_interrupt: bool = False
    """Ctrl-C stops the job instead of leaving it."""
    allow_local_paths: bool = False
    """Every node sees this machine's paths: a shared file system."""
    runtime_env: tuple[str, ...] = ()
    """YAML or JSON files with further fields of Ray's runtime_env."""
    env: tuple[str, ...] = ()
    """Names of variables of this shell that the job gets."""
    working_dir: str | None = None
    """Tree to send; by default this checkout."""
    job_id: str | None = None
    """Id of the job; one that was used before is refused."""
    num_cpus: float = 0.0
    """CPUs that the driver itself reserves; it computes little, except in curate and in train without workers."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="factory submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "job server of the cluster (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    parser.add_argument("--address", help=about)
    parser.add_argument("--no-wait", dest="wait", action="store_false", help="print the job id and return")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job")
    parser.add_argument(
        "--allow-local-paths",
        action="store_true",
        help="every node sees this machine's paths (shared storage)",
    )
    parser.add_argument(
        "--runtime-env",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML or JSON with more of Ray's runtime_env",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="variable of this shell that the job gets"
    )
    parser.add_argument("--working-dir", metavar="DIR", help="tree to send (default: this checkout)")
    parser.add_argument("--job-id", metavar="ID", help="id of the job; a used one is refused")
    parser.add_argument("--num-cpus", type=float, default=0.0, help="CPUs that the driver itself reserves")
    parser.add_argument("verb", choices=SUBMITTABLE_VERBS, metavar="VERB", help=", ".join(SUBMITTABLE_VERBS))
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="…", help="arguments of the verb")
    return parser


def parse(argv: Sequence[str]) -> Args:
    """Arguments of the command line.

    Raises:
        SystemExit: unknown options, or no verb.
    """
    found = _parser().parse_args(list(argv))
    return Args(
        verb=found.verb,
        argv=tuple(found.argv),
        address=found.address,
        wait=found.wait,
        stop_on_interrupt=found.stop_on_interrupt,
        allow_local_paths=found.allow_local_paths,
        runtime_env=tuple(found.runtime_env),
        env=tuple(found.env),
        working_dir=found.working_dir,
        job_id=found.job_id,
        num_cpus=found.num_cpus,
    )


def _tree(args: Args) -> Path:
    if args.working_dir is not None:
        return Path(args.working_dir).expanduser().resolve()
    here = Path.cwd().resolve()
    return here if (here / "jobs" / "cli.py").is_file() else ROOT


def submit(args: Args) -> tuple[Any, str, Command]:
    """Check, pack and send; returns Ray's client, the job's id and the command as it runs there.

    Raises:
        ValueError: arguments, paths or environment that cannot work there; nothing was sent.
        ConnectionError: no job server answers.
    """
    tree = _tree(args)
    command = parse_command(args.verb, args.argv, tree)
    client = connect_jobs(args.address)
    shared = args.allow_local_paths or is_head_on_this_machine(_session(client))
    variables = environment(args.env, shared=shared)
    with tempfile.TemporaryDirectory(prefix="factory-submit-") as folder:
        package = pack(tree, Path(folder))
        command = with_paths(command, tree=tree, sent=package.files, shared=shared)
        settings = runtime_environment(args.runtime_env, package.path, variables)
        _announce(client, command, package, tree, variables)
        job_id = args.job_id or f"factory-{args.verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        with errors_for_the_operator(client.get_address()):
            client.submit_job(
                entrypoint=command.entrypoint(),
                submission_id=job_id,
                runtime_env=settings,
                entrypoint_num_cpus=args.num_cpus or None,
                metadata={
                    "factory_command": command.line(),
                    "code_version": variables["FACTORY_CODE_VERSION"],
                    "tree": package.digest,
                    "lock": lock_digest(tree),
                },
            )
    return client, job_id, command


def _session(client: Any) -> str:
    """Name of the cluster's Ray session, after a check that its Ray is this one's.

    Raises:
        ValueError: another version of Ray runs there.
    """
    import ray

    with errors_for_the_operator(client.get_address()):
        answer = client._do_request("GET", "/api/version").json()
    theirs = str(answer.get("ray_version"))
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ValueError(
            f"the cluster runs Ray {theirs}, this machine {ray.__version__}: install both from requirements/"
        )
    return str(answer.get("session_name", ""))


def _announce(client: Any, command: Command, package: Package, tree: Path, variables: dict[str, str]) -> None:
    print(
        f"sends {len(package.files)} files of {tree}, {package.megabytes:.1f} MB, to {redact(client.get_address())} "
        "(without what .gitignore names, tables and runs)"
    )
    print(f"environment: {describe_environment(variables)}")
    if "MLFLOW_TRACKING_URI" not in variables:
        print(
            "note: MLFLOW_TRACKING_URI is not set here; unless the cluster sets it, the run is recorded in the job's "
            "temporary folder and lost with it"
        )
    print(f"runs: {command.line()}")


def command(argv: Sequence[str]) -> int:
    """`factory submit`; the exit status of the job, 75 where the cluster was lost, 130 after Ctrl-C."""
    args = parse(argv)
    client, job_id, sent = submit(args)
    at = f" --address {shlex.quote(args.address)}" if args.address else ""
    print(f"job {job_id}", flush=True)
    if not args.wait:
        print(f"follow: factory jobs logs {job_id} --follow{at}; stop: factory jobs stop {job_id}{at}")
        return 0
    try:
        details = follow(client, job_id)
    except KeyboardInterrupt:
        if args.stop_on_interrupt:
            client.stop_job(job_id)
            print(f"\nstopped {job_id}", file=sys.stderr)
        else:
            print(
                f"\ndetached: {job_id} goes on. Follow it: factory jobs logs {job_id} --follow{at}; "
                f"stop it: factory jobs stop {job_id}{at}",
                file=sys.stderr,
            )
        return 130
    except ClusterLost as error:
        again = shlex.join(["factory", "submit", *argv])
        print(f"error: {error}. What is committed is safe; to go on: {redact(again)}", file=sys.stderr)
        return LOST_STATUS
    return report_end(details, sent)


def report_end(details: Any, sent: Command) -> int:
    """A closing line and the exit status."""
    from jobs.cli import VERBS

    status = exit_status(details)
    state = str(getattr(details.status, "value", details.status)).lower()
    again = "; the same command goes on" if status and VERBS[sent.verb.split()[0]].resumes else ""
    print(f"job {details.submission_id} {state}, exit status {status}{again}")
    return status
