"""Tracking: every verb is one MLflow run, with what it read, what it was told and what came out.

The store is `sqlite:///runs/mlflow.db` with artifacts in `runs/artifacts`, unless MLFLOW_TRACKING_URI says
otherwise. MLflow is imported by the first `track()` (or `warm_up()`), never by importing this module. Only
the driver process tracks; workers hand their numbers to it. MLflow's usage telemetry is off unless
MLFLOW_DISABLE_TELEMETRY is set: the data here is medical.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from factory.redaction import flatten, plain, redact, shorten, tracked_name
from schemas.identity import hash_parts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

logger = logging.getLogger(__name__)

EXPERIMENT = "synthetic-data-factory"
STORE_FOLDER = Path("runs")
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_TAG_LENGTH = 8000
_PER_BATCH = 100
_METRICS_PER_BATCH = 1000
_FLUSH_ENTRIES = 200
_FLUSH_SECONDS = 5.0
_CONNECT_SECONDS = 5.0


def tracking_uri() -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or the sqlite file below `runs/`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{STORE_FOLDER / 'mlflow.db'}"


def check_store() -> str:
    """A short description of the store, if it can be used.

    Raises:
        ValueError: the address is no URI MLflow takes, or nothing answers there.
        OSError: the folder of a sqlite store cannot be written.
    """
    uri = tracking_uri()
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise ValueError(
                f"MLFLOW_TRACKING_URI={redact(uri)}: nothing answers at {parts.hostname}:{port} ({error}); "
                "start the server, or unset the variable to record below runs/"
            ) from error
    elif parts.scheme == "sqlite":
        database = _sqlite_file(uri)
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


def _sqlite_file(uri: str) -> Path:
    return Path(urllib.parse.unquote(uri.removeprefix("sqlite:///").split("?")[0]))


_clients: dict[str, tuple["MlflowClient", str]] = {}
_client_lock = threading.Lock()


def _connect() -> tuple["MlflowClient", str]:
    """The client of the current store and the id of the factory's experiment; made once per store."""
    with _client_lock:
        uri = tracking_uri()
        key = f"{uri} from {Path.cwd()}"
        if key not in _clients:
            check_store()
            _clients[key] = _open_store(uri)
        return _clients[key]


def _open_store(uri: str) -> tuple["MlflowClient", str]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    _quiet()
    with contextlib.ExitStack() as stack:
        location = None
        if uri.startswith("sqlite:"):
            database = _sqlite_file(uri)
            uri = f"sqlite:///{database.resolve()}"  # stays valid if the process changes its folder
            location = (database.parent / "artifacts").resolve().as_uri()
            # Two processes migrating one new database at the same time break it.
            lock = stack.enter_context(Path(f"{database}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        identifier = (
            experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, location)
        )
        _close_abandoned(client, identifier)
    return client, identifier


def _quiet() -> None:
    """Keep MLflow and alembic from logging each step of making the database."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


def warm_up() -> float:
    """Import MLflow and make the store (its first use migrates a database: about 15 s). Returns seconds.

    The demo runs it in a thread while Ray starts; calling it is never required.
    """
    started = time.monotonic()
    _connect()
    return time.monotonic() - started


class Run:
    """One run being recorded. Made by `track`; methods may be called from any thread of the driver."""

    def __init__(self, client: "MlflowClient", experiment_id: str, run_id: str) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self.run_id = run_id
        self._lock = threading.RLock()
        self._pending: list[Metric] = []
        self._flushed = time.monotonic()

    @property
    def url(self) -> str:
        """Where to look at the run: a web address, or the command that serves the sqlite store."""
        uri = redact(tracking_uri())
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {uri}"

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers, at a step where there is one. They are sent in batches, at the latest at the end."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(tracked_name(name), float(value), now, step or 0) for name, value in values.items()]
        with self._lock:
            self._pending += entries
            if len(self._pending) >= _FLUSH_ENTRIES or time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flush()

    def _flush(self) -> None:
        from mlflow.exceptions import MlflowException

        with self._lock:
            self._flushed = time.monotonic()
            while self._pending:
                batch = self._pending[:_METRICS_PER_BATCH]
                try:
                    self._client.log_batch(self.run_id, metrics=batch)
                except MlflowException as error:
                    # A store that is away must not cost the hours of work it describes: keep, say, try again.
                    logger.warning(
                        "%d metrics wait for the MLflow store: %s", len(self._pending), redact(str(error))
                    )
                    return
                del self._pending[: len(batch)]

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Record parameters, flattened and redacted; each may be set once."""
        from mlflow.entities import Param

        entries = [Param(key, value) for key, value in flatten(values).items()]
        for start in range(0, len(entries), _PER_BATCH):
            self._client.log_batch(self.run_id, params=entries[start : start + _PER_BATCH])

    def set(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier one."""
        from mlflow.entities import RunTag

        entries = [RunTag(key, shorten(value, _TAG_LENGTH)) for key, value in flatten(tags).items()]
        for start in range(0, len(entries), _PER_BATCH):
            self._client.log_batch(self.run_id, tags=entries[start : start + _PER_BATCH])

    def inputs(self, inputs: Mapping[str, Any]) -> None:
        """Record what was read: `{"real": "real.lance@7"}`, or a mapping with uri, version, digest, rows, …"""
        datasets = [_dataset_input(name, value) for name, value in inputs.items()]
        if datasets:
            self._client.log_inputs(self.run_id, datasets=datasets)

    def artifact(self, name_or_path: str | Path, value: Any = None) -> None:
        """Keep a file or folder (`artifact(path)`), or a text, mapping, figure or PIL image under a name.

        Raises:
            FileNotFoundError: no such file, where only a path is given.
            ValueError: `value` is of another type.
        """
        if value is None:
            path = Path(name_or_path)
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file to keep as an artifact")
            keep = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            keep(self.run_id, str(path), *([path.name] if path.is_dir() else []))
            return
        name = str(name_or_path)
        if isinstance(value, str):
            self._client.log_text(self.run_id, redact(value), name)
        elif isinstance(value, (Mapping, list, tuple)):
            self._client.log_text(self.run_id, json.dumps(plain(value), indent=2, ensure_ascii=False), name)
        elif hasattr(value, "savefig"):
            self._client.log_figure(self.run_id, value, name)
        elif hasattr(value, "getbands"):
            self._client.log_image(self.run_id, value, name)
        else:
            raise ValueError(f"artifact {name}: cannot keep a {type(value).__name__}")

    def register_generator(
        self, folder: str | Path, name: str, tags: Mapping[str, Any] = _NOTHING
    ) -> tuple[str, str]:
        """Add a version of the registered model `name` that points to a checkpoint folder.

        With a sqlite store the version points to the folder where it lies; a server cannot read it there, so
        the folder is uploaded to the run first.

        Returns:
            The model's name and the new version, as `models:/name/version` takes them.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: MLflow does not take the name (it may not hold / or :).
        """
        from mlflow.exceptions import MlflowException

        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such checkpoint folder to register")
        if not name or "/" in name or ":" in name:
            raise ValueError(f"registered model name {name!r}: must not be empty or hold '/' or ':'")
        source = folder.resolve().as_uri()
        if not tracking_uri().startswith("sqlite:"):
            self._client.log_artifacts(self.run_id, str(folder), "generator")
            source = f"runs:/{self.run_id}/generator"
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._client.create_model_version(name, source, self.run_id, tags=flatten(tags))
        self.set({"registered_model": f"models:/{name}/{version.version}"})
        return name, str(version.version)

    def _finish(self, status: str, error: BaseException | None) -> None:
        try:
            if error is not None:
                self._record_error(error)
            self._flush()
            if self._pending:
                logger.warning("%d metrics were not recorded in MLflow", len(self._pending))
        finally:
            self._client.set_terminated(self.run_id, status)

    def _record_error(self, error: BaseException) -> None:
        self.set({"error": f"{type(error).__name__}: {error}"})
        text = "".join(traceback.format_exception(error))
        self._client.log_text(self.run_id, redact(text), "error.txt")


def _dataset_input(name: str, value: Any) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if isinstance(value, Mapping):
        described = {str(key): str(item) for key, item in value.items() if item is not None}
    else:
        uri, separator, version = str(value).rpartition("@")
        described = {"uri": uri, "version": version} if separator else {"uri": str(value)}
    if not described.get("uri"):
        raise ValueError(f"inputs: {name} needs a uri, got {value!r}")
    uri = redact(described.pop("uri"))
    digest = described.pop("digest", "") or hash_parts(uri, described.get("version", ""))
    dataset = Dataset(
        name=name,
        digest=digest[:36],
        source_type="lance",
        source=json.dumps({"uri": uri, **{k: redact(v) for k, v in described.items()}}),
        schema=None,
        profile=json.dumps({"num_rows": described["rows"]}) if "rows" in described else None,
    )
    tags = [InputTag("mlflow.data.context", name)]
    tags += [InputTag(f"factory.{key}", redact(item)[:500]) for key, item in described.items()]
    return DatasetInput(dataset, tags)


_active: list[Run] = []


@contextlib.contextmanager
def track(
    verb: str,
    *,
    recipe_parameters: Mapping[str, Any] = _NOTHING,
    execution_parameters: Mapping[str, Any] = _NOTHING,
    inputs: Mapping[str, Any] = _NOTHING,
) -> Iterator[Run]:
    """Record one verb as a run: FINISHED at the end, FAILED with the error (KILLED by Ctrl-C) otherwise.

    A run begun while another is open in this process is nested under it.

    Args:
        verb: name of the run, e.g. "train".
        recipe_parameters: what decides what is computed; recorded as `recipe.…`.
        execution_parameters: where and how fast; recorded as `execution.…`.
        inputs: tables read, `{"real": "real.lance@7"}` or a mapping with uri, version, digest, rows, tag.

    Raises:
        ValueError: the store's address is wrong or nothing answers there.
    """
    client, experiment_id = _connect()
    tags = {
        "mlflow.runName": verb,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": redact(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "factory.verb": verb,
        "factory.host": socket.gethostname(),
        "factory.pid": str(os.getpid()),
    }
    if _active:
        tags["mlflow.parentRunId"] = _active[-1].run_id
    created = client.create_run(experiment_id, tags=tags, run_name=verb)
    run = Run(client, experiment_id, created.info.run_id)
    _active.append(run)
    status = "FAILED"
    raised: BaseException | None = None
    try:
        run.parameters({"recipe": recipe_parameters, "execution": execution_parameters})
        run.inputs(inputs)
        yield run
        status = "FINISHED"
    except KeyboardInterrupt as error:
        status, raised = "KILLED", error
        raise
    except SystemExit as error:
        status, raised = ("FINISHED", None) if error.code in (None, 0) else ("FAILED", error)
        raise
    except BaseException as error:
        raised = error
        raise
    finally:
        _active.remove(run)
        run._finish(status, raised)
