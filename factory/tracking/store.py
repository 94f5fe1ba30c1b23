"""The MLflow store: its address, whether it answers, and what an error of it means."""

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from factory.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("factory.tracking")

EXPERIMENT = "synthetic-data-factory"
STORE_FOLDER = Path("runs")
CONNECT_SECONDS = 5.0
RETRY_SECONDS = 10.0
"""A store that is away is asked again after so long, not at every metric."""


class StoreAway(ValueError):
    """Nothing answers at the store's address now; it may later."""


def tracking_uri() -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or the sqlite file below `runs/`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{STORE_FOLDER / 'mlflow.db'}"


def check_store() -> str:
    """A short description of the store, if it can be used now.

    Raises:
        StoreAway: nothing answers there.
        ValueError: the address is no URI MLflow takes, or its host is unknown.
        OSError: the folder of a sqlite store cannot be written.
    """
    uri = tracking_uri()
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        _check_server(uri, parts)
    elif parts.scheme == "sqlite":
        database = sqlite_file(uri)
        database.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(database.parent, os.W_OK) or (
            database.exists() and not os.access(database, os.W_OK)
        ):
            raise PermissionError(f"{database}: the MLflow store is not writable; set MLFLOW_TRACKING_URI")
    elif not parts.scheme or parts.scheme == "file":
        raise ValueError(
            f"MLFLOW_TRACKING_URI={redact(uri)}: MLflow no longer keeps runs in plain folders; "
            "use sqlite:///FILE or a server's http address"
        )
    return redact(uri)


def _check_server(uri: str, parts: urllib.parse.SplitResult) -> None:
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ValueError(f"MLFLOW_TRACKING_URI={redact(uri)}: {error}") from error
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except socket.gaierror as error:
        if error.errno != socket.EAI_AGAIN:
            raise ValueError(
                f"MLFLOW_TRACKING_URI={redact(uri)}: there is no host {parts.hostname!r} ({error.strerror})"
            ) from error
        raise StoreAway(f"MLFLOW_TRACKING_URI={redact(uri)}: {error.strerror}") from error
    except OSError as error:
        raise StoreAway(
            f"MLFLOW_TRACKING_URI={redact(uri)}: nothing answers at {parts.hostname}:{port} ({error}); "
            "start the server, or unset the variable to record below runs/"
        ) from error


def sqlite_file(uri: str) -> Path:
    """The database of a `sqlite:///` address."""
    return Path(urllib.parse.unquote(uri.removeprefix("sqlite:///").split("?")[0]))


def refusals() -> tuple[type[Exception], ...]:
    """What MLflow's client raises where the store is away or refuses something."""
    import requests
    from mlflow.exceptions import MlflowException

    return (MlflowException, requests.exceptions.RequestException, OSError, ValueError)


def is_away(error: BaseException) -> bool:
    """Whether an error of the store may pass: no connection, a server's own failure, too many requests.

    What the store refuses for good (an invalid value, no permission) does not.
    """
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, StoreAway):
        return True
    if isinstance(error, requests.exceptions.RequestException):
        status = 500 if error.response is None else error.response.status_code
    elif isinstance(error, MlflowException):
        status = error.get_http_status_code()
    else:
        return isinstance(error, (ConnectionError, TimeoutError))
    return status >= 500 or status == 429


class Store:
    """One store, opened when it first answers.

    Args:
        uri: its address.
        on_back: called when it answers for the first time, or again.
    """

    def __init__(self, uri: str, on_back: Callable[["Store"], None]) -> None:
        self.uri = uri
        self._on_back = on_back
        self._opened: tuple[MlflowClient, str] | None = None
        self._is_up = False
        self._try_after = 0.0
        self._lock = threading.RLock()

    @property
    def is_sqlite(self) -> bool:
        """A file of this machine, not a server."""
        return self.uri.startswith("sqlite:")

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client; only after `reach`."""
        assert self._opened is not None
        return self._opened[0]

    @property
    def experiment_id(self) -> str:
        """Id of the factory's experiment; only after `reach`."""
        assert self._opened is not None
        return self._opened[1]

    def reach(self, now: bool = False) -> bool:
        """Whether the store can be written; asks at most every `RETRY_SECONDS` unless `now`.

        Raises:
            ValueError: what answers is no MLflow server, or refuses this user.
        """
        with self._lock:
            if self._is_up:
                return True
            if not now and time.monotonic() < self._try_after:
                return False
            try:
                check_store()
                if self._opened is None:
                    self._opened = _open(self.uri)
                self._on_back(self)
            except refusals() as error:
                if is_away(error):
                    self.lost()
                    return False
                raise
            self._is_up = True
            return True

    def lost(self) -> None:
        """It failed just now: leave it alone for a while."""
        self._is_up = False
        self._try_after = time.monotonic() + RETRY_SECONDS


def _open(uri: str) -> tuple["MlflowClient", str]:
    """The client, and the id of the factory's experiment; made where it is missing."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("mlflow", "alembic"):  # they log each step of making the database
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        location = None
        if uri.startswith("sqlite:"):
            database = sqlite_file(uri)
            uri = f"sqlite:///{database.resolve()}"  # stays valid if the process changes its folder
            location = (database.parent / "artifacts").resolve().as_uri()
            # Two processes migrating one new database at the same time break it.
            lock = stack.enter_context(Path(f"{database}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        try:
            experiment = client.get_experiment_by_name(EXPERIMENT)
            identifier = (
                experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, location)
            )
            _close_abandoned(client, identifier)
        except MlflowException as error:
            if is_away(error) or not uri.startswith("http"):
                raise
            raise ValueError(
                f"MLFLOW_TRACKING_URI={redact(uri)}: what answers there is no MLflow server that takes this user's runs "
                f"({redact(str(error)).splitlines()[0][:200]})"
            ) from error
    return client, identifier


def _close_abandoned(client: "MlflowClient", experiment_id: str) -> None:
    """Mark as KILLED the runs that a dead process of this machine left RUNNING (kill -9 runs no code)."""
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    for run in running:
        tags = run.data.tags
        if tags.get("factory.host") != socket.gethostname():
            continue
        if not _is_alive(int(tags.get("factory.pid", "0"))):
            client.set_terminated(run.info.run_id, "KILLED")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
