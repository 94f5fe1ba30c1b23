"""The job server of a Ray cluster: reaching it, following a job, what its end means as an exit status."""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from factory.redaction import redact

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where a local head serves it, and where `ray dashboard cluster.yaml` forwards a remote one."""
LOST_SECONDS = 60.0
"""A job server that does not answer for this long counts as lost."""
LOST_STATUS = 75
"""Exit status where the cluster was lost: trying again may work (EX_TEMPFAIL of sysexits.h)."""
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_STOPPED_STATUS = 143


class ClusterLost(ConnectionError):
    """The job server answered before and does not any more."""


def server_url(address: str | None) -> str:
    """The job server's address: as given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if it is one, else the default.

    Raises:
        ValueError: it is no http or https address.
    """
    named = [os.environ.get(name, "") for name in _ADDRESS_VARIABLES]
    url = address or next((value for value in named if value.startswith("http")), DEFAULT_ADDRESS)
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"--address {url}: want the job server's http address, such as {DEFAULT_ADDRESS} (the dashboard's port)"
        )
    return url.rstrip("/")


def connect_jobs(address: str | None) -> Any:
    """A `ray.job_submission.JobSubmissionClient` of the cluster; sends the token where this user has one.

    Raises:
        ValueError: the address is none, or the cluster wants a token that was not sent or is wrong.
        ConnectionError: nothing answers there.
    """
    url = server_url(address)
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    with _without_ray_addresses(), errors_for_the_operator(url):
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return JobSubmissionClient(url)


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


@contextlib.contextmanager
def _without_ray_addresses() -> Iterator[None]:
    """Ray lets these variables overrule the address that its client is given."""
    held = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


@contextlib.contextmanager
def errors_for_the_operator(url: str) -> Iterator[None]:
    """What the job server refuses, as errors that say what to do."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ValueError(
            f"{redact(url)} refuses this client: {_first_line(error)}. Put the cluster's token in RAY_AUTH_TOKEN, in the "
            "file that RAY_AUTH_TOKEN_PATH names or in ~/.ray/auth_token (on the head: `ray get-auth-token`)"
        ) from error
    except (ConnectionError, requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise ConnectionError(
            f"no job server answers at {redact(url)}; start a head (`ray start --head`), forward the cluster's "
            "(`ray dashboard cluster.yaml`), or correct --address"
        ) from error
    except RuntimeError as error:
        if "does not exist" in str(error) or "status code 404" in str(error):
            raise ValueError(f"{_first_line(error)}; `factory jobs list` shows the jobs there are") from error
        if "already" in str(error) or "status code 4" in str(error):
            raise ValueError(f"the job server refuses: {_first_line(error)}") from error
        raise


def _first_line(error: BaseException) -> str:
    """The line of a server's answer that says what is wrong: of a traceback the last, else the first."""
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip(" .")]
    if not lines:
        return type(error).__name__
    return redact(lines[-1] if "Traceback" in str(error) else lines[0])


def job_info(client: Any, job_id: str) -> Any:
    """Ray's JobDetails.

    Raises:
        ValueError: no such job.
        ConnectionError: nothing answers.
    """
    with errors_for_the_operator(client.get_address()):
        return client.get_job_info(job_id)


def exit_status(details: Any) -> int:
    """The status that the job's own process ended with; 143 where it was stopped, 1 where it never ran."""
    status = str(getattr(details.status, "value", details.status))
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return _STOPPED_STATUS
    return details.driver_exit_code or 1


def follow(client: Any, job_id: str, write: Callable[[str], object] = sys.stdout.write) -> Any:
    """Hand the job's output to `write` as it comes, until the job ends; returns its JobDetails.

    A broken connection is taken up again where it broke.

    Raises:
        ClusterLost: the job server did not answer for `LOST_SECONDS`.
    """
    output = _Output(write)
    silent_since: float | None = None
    while True:
        try:
            asyncio.run(_tail(client, job_id, output))
            details = client.get_job_info(job_id)
            silent_since = None
            if details.status.is_terminal():
                output.begin()
                output.take(client.get_job_logs(job_id))
                return details
        except _lost_errors() as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > LOST_SECONDS:
                raise ClusterLost(
                    f"{redact(client.get_address())} does not answer any more ({error})"
                ) from error
        time.sleep(1.0)


class _Output:
    """A log that is read from its beginning again and again: only what is new is written."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._written = self._read = 0

    def begin(self) -> None:
        """The log is read from its beginning."""
        self._read = 0

    def take(self, text: str) -> None:
        """The next piece of the log."""
        fresh = text[max(self._written - self._read, 0) :]
        self._read += len(text)
        if fresh:
            self._write(fresh)
            self._written = self._read
            sys.stdout.flush()


async def _tail(client: Any, job_id: str, output: _Output) -> None:
    """Follow the log once."""
    output.begin()
    async for text in client.tail_job_logs(job_id):
        output.take(text)


def _lost_errors() -> tuple[type[BaseException], ...]:
    import aiohttp
    import requests

    return (
        ConnectionError,
        requests.exceptions.ConnectionError,
        requests.exceptions.Timeout,
        aiohttp.ClientError,
        asyncio.TimeoutError,
        RuntimeError,  # what Ray's client raises where the server answers with an error or closes a log
    )


def job_line(details: Any) -> Mapping[str, str]:
    """What `factory jobs list` shows of one job, without its environment."""
    begin, end = details.start_time, details.end_time
    seconds = ((end or time.time() * 1000) - begin) / 1000 if begin else 0.0
    return {
        "id": details.submission_id or details.job_id or "",
        "status": str(getattr(details.status, "value", details.status)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begin / 1000)) if begin else "",
        "seconds": f"{seconds:.0f}",
        "command": redact((details.metadata or {}).get("factory_command", details.entrypoint)),
    }
