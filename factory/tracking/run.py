"""One run being recorded: every entry goes to the store, or into the run's outbox while the store is away."""

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from factory.redaction import flatten, plain, redact, shorten, tracked_name
from factory.tracking.outbox import Entry, Outbox, leftovers
from factory.tracking.store import Store, is_away, refusals, tracking_uri
from schemas.identity import hash_parts

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

logger = logging.getLogger("factory.tracking")

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_TAG_LENGTH = 8000
_PER_BATCH = 100
_METRICS_PER_BATCH = 1000
_FLUSH_ENTRIES = 200
_FLUSH_SECONDS = 5.0
_NOT_YET = "pending"

_stores: dict[str, Store] = {}
_stores_lock = threading.Lock()
_run_ids: dict[str, str] = {}
"""MLflow's ids of the runs of this process, by the token that a run has from the start."""


def current_store() -> Store:
    """The store of this process; made once per address and folder."""
    with _stores_lock:
        uri = tracking_uri()
        key = f"{uri} from {Path.cwd()}"
        if key not in _stores:
            _stores[key] = Store(uri, _send_leftovers)
        return _stores[key]


def warm_up() -> float:
    """Import MLflow and make the store (its first use migrates a database: about 15 s). Returns seconds.

    The demo runs it in a thread while Ray starts; calling it is never required.
    """
    started = time.monotonic()
    current_store().reach(now=True)
    return time.monotonic() - started


def _send_leftovers(store: Store) -> None:
    """Send what earlier processes could not."""
    for outbox, run_id in leftovers(store.uri):
        sender = _Sender(store, outbox, token="", run_id=run_id)
        count = len(outbox)
        try:
            if outbox.send(sender.send):
                logger.warning("sent %d entries of an earlier run to MLflow", count)
        finally:
            outbox.close()


class _Sender:
    """Turns entries into calls of MLflow's client."""

    def __init__(self, store: Store, outbox: Outbox, token: str, run_id: str | None = None) -> None:
        self.store, self.outbox, self.token, self.run_id = store, outbox, token, run_id

    def send(self, entry: Entry) -> Any:
        """One entry. Sending one again, after an answer that did not arrive, changes nothing or adds a version."""
        from mlflow.entities import Metric, Param, RunTag

        client, op = self.store.client, entry["op"]
        if op == "create":
            return self._create(entry)
        assert self.run_id is not None  # "create" comes first
        if op == "metrics":
            return client.log_batch(self.run_id, metrics=[Metric(*values) for values in entry["values"]])
        if op == "params":
            return client.log_batch(self.run_id, params=[Param(*pair) for pair in entry["values"]])
        if op == "tags":
            return client.log_batch(self.run_id, tags=[RunTag(*pair) for pair in entry["values"]])
        if op == "inputs":
            return client.log_inputs(
                self.run_id, datasets=[_dataset_input(*pair) for pair in entry["values"]]
            )
        if op == "artifact":
            path = Path(entry["path"])
            keep = client.log_artifacts if path.is_dir() else client.log_artifact
            return keep(self.run_id, str(path), *([entry["folder"]] if entry["folder"] else []))
        if op == "model":
            return self._register(entry)
        assert op == "end", op
        return client.set_terminated(self.run_id, entry["status"], entry["time"])

    def _create(self, entry: Entry) -> None:
        tags = dict(entry["tags"])
        parent = _run_ids.get(entry["parent"] or "")
        if parent:
            tags["mlflow.parentRunId"] = parent
        created = self.store.client.create_run(
            self.store.experiment_id, start_time=entry["time"], tags=tags, run_name=entry["name"]
        )
        self.run_id = created.info.run_id
        _run_ids[entry["token"]] = self.run_id
        self.outbox.note({"run_id": self.run_id})

    def _register(self, entry: Entry) -> tuple[str, str]:
        from mlflow.exceptions import MlflowException

        client, name = self.store.client, entry["name"]
        assert self.run_id is not None
        folder = Path(entry["folder"])
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such checkpoint folder to register")
        source = folder.as_uri()
        if not self.store.is_sqlite:
            client.log_artifacts(self.run_id, str(folder), "generator")
            source = f"runs:/{self.run_id}/generator"
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(name, source, self.run_id, tags=entry["tags"])
        client.set_tag(self.run_id, "registered_model", f"models:/{name}/{version.version}")
        return name, str(version.version)


class Run:
    """One run being recorded. Made by `track`; methods may be called from any thread of the driver.

    While the store is away entries wait in a file, in order, and the job goes on.
    """

    def __init__(self, store: Store, parent: "Run | None") -> None:
        self._token = secrets.token_hex(8)
        self._outbox = Outbox(store.uri)
        self._sender = _Sender(store, self._outbox, self._token)
        self._store, self._parent = store, parent
        self._lock = threading.RLock()
        self._metrics: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()

    @property
    def run_id(self) -> str:
        """MLflow's id; "pending" until the store has answered once."""
        return self._sender.run_id or _NOT_YET

    @property
    def url(self) -> str:
        """Where to look at the run: a web address, or the command that serves the sqlite store."""
        uri = redact(tracking_uri())
        if not uri.startswith("http"):
            return f"mlflow ui --backend-store-uri {uri}"
        if self._sender.run_id is None:
            return uri
        return f"{uri.rstrip('/')}/#/experiments/{self._store.experiment_id}/runs/{self.run_id}"

    def _record(self, entry: Entry) -> Any:
        """Send an entry, or keep it; what MLflow answered, or None. After the first one the store never fails the job."""
        begins = entry["op"] == "create"
        with self._lock:
            reason = "it does not answer"
            if self._send_waiting(begins=begins):
                try:
                    return self._sender.send(entry)
                except refusals() as error:
                    reason = redact(f"{type(error).__name__}: {error}").splitlines()[0][:200]
                    if not is_away(error):
                        if begins:
                            raise
                        logger.warning("MLflow refuses %s, left out: %s", entry["op"], reason)
                        return None
                    self._store.lost()
            first = not len(self._outbox)
            self._outbox.add(entry, self._sender.run_id)
            if first:
                logger.warning(
                    "entries wait for the MLflow store at %s in %s (%s); the job goes on",
                    redact(self._store.uri), self._outbox.path, reason,
                )  # fmt: skip
            return None

    def _send_waiting(self, *, now: bool = False, begins: bool = False) -> bool:
        """Send what waits, the parent's first; whether the store can take the next entry."""
        with self._lock:
            if self._parent is not None and not self._parent._send_waiting(now=now):
                return False
            try:
                if not self._store.reach(now):
                    return False
            except (ValueError, OSError) as error:
                if begins:
                    raise
                logger.warning("the MLflow store cannot be used: %s", redact(str(error)))
                self._store.lost()
                return False
            waiting = len(self._outbox)
            if not self._outbox.send(self._sender.send):
                self._store.lost()
                return False
            if waiting:
                logger.warning("the MLflow store is back: %d entries sent", waiting)
            return True

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers, at a step where there is one. They are sent in batches, at the latest at the end."""
        now = int(time.time() * 1000)
        entries = [(tracked_name(name), float(value), now, step or 0) for name, value in values.items()]
        with self._lock:
            self._metrics += entries
            if len(self._metrics) >= _FLUSH_ENTRIES or time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flush()

    def _flush(self) -> None:
        with self._lock:
            self._flushed = time.monotonic()
            while self._metrics:
                batch = self._metrics[:_METRICS_PER_BATCH]
                self._record({"op": "metrics", "values": batch})
                del self._metrics[: len(batch)]

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Record parameters, flattened and redacted; each may be set once."""
        self._record_pairs("params", list(flatten(values).items()))

    def set(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier one."""
        pairs = [(key, shorten(value, _TAG_LENGTH)) for key, value in flatten(tags).items()]
        self._record_pairs("tags", pairs)

    def _record_pairs(self, op: str, pairs: list[tuple[str, str]]) -> None:
        for start in range(0, len(pairs), _PER_BATCH):
            self._record({"op": op, "values": pairs[start : start + _PER_BATCH]})

    def inputs(self, inputs: Mapping[str, Any]) -> None:
        """Record what was read: `{"real": "real.lance@7"}`, or a mapping with uri, version, digest, rows, …"""
        described = [(name, _described(name, value)) for name, value in inputs.items()]
        if described:
            self._record({"op": "inputs", "values": described})

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
            folder = path.name if path.is_dir() else ""
            self._record({"op": "artifact", "path": str(path.absolute()), "folder": folder})
            return
        name = Path(name_or_path)
        with tempfile.TemporaryDirectory(prefix="factory-artifact-") as temporary:
            path = Path(temporary) / name.name
            _write_value(path, value)
            folder = "" if name.parent == Path() else name.parent.as_posix()
            self._record({"op": "artifact", "path": str(path), "folder": folder})

    def register_generator(
        self, folder: str | Path, name: str, tags: Mapping[str, Any] = _NOTHING
    ) -> tuple[str, str]:
        """Add a version of the registered model `name` that points to a checkpoint folder.

        With a sqlite store the version points to the folder where it lies; a server cannot read it there, so
        the folder is uploaded to the run first.

        Returns:
            The model's name and the new version, as `models:/name/version` takes them; "pending" as the version
            while the store is away.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: MLflow does not take the name (it may not hold / or :).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such checkpoint folder to register")
        if not name or "/" in name or ":" in name:
            raise ValueError(f"registered model name {name!r}: must not be empty or hold '/' or ':'")
        self._flush()
        entry = {"op": "model", "name": name, "folder": str(folder.resolve()), "tags": flatten(tags)}
        return self._record(entry) or (name, _NOT_YET)

    def _finish(self, status: str, error: BaseException | None) -> None:
        try:
            if error is not None:
                self._record_error(error)
            self._flush()
        finally:
            self._record({"op": "end", "status": status, "time": int(time.time() * 1000)})
            if len(self._outbox) and not self._send_waiting(now=True):
                logger.warning(
                    "%d entries still wait for the MLflow store in %s; the next verb run from here that reaches it sends them",
                    len(self._outbox), self._outbox.path,
                )  # fmt: skip
            self._outbox.close()

    def _record_error(self, error: BaseException) -> None:
        self.set({"error": f"{type(error).__name__}: {error}"})
        self.artifact("error.txt", "".join(traceback.format_exception(error)))


def _write_value(path: Path, value: Any) -> None:
    if isinstance(value, str):
        path.write_text(redact(value))
    elif isinstance(value, (Mapping, list, tuple)):
        path.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False))
    elif hasattr(value, "savefig"):
        value.savefig(path)
    elif hasattr(value, "getbands"):
        value.save(path)
    else:
        raise ValueError(f"artifact {path.name}: cannot keep a {type(value).__name__}")


def _described(name: str, value: Any) -> dict[str, str]:
    """What is said of an input, without secrets."""
    if isinstance(value, Mapping):
        described = {str(key): str(item) for key, item in value.items() if item is not None}
    else:
        uri, separator, version = str(value).rpartition("@")
        described = {"uri": uri, "version": version} if separator else {"uri": str(value)}
    if not described.get("uri"):
        raise ValueError(f"inputs: {name} needs a uri, got {value!r}")
    return {key: redact(item) for key, item in described.items()}


def _dataset_input(name: str, described: Mapping[str, str]) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    rest = dict(described)
    uri = rest.pop("uri")
    digest = rest.pop("digest", "") or hash_parts(uri, rest.get("version", ""))
    dataset = Dataset(
        name=name,
        digest=digest[:36],
        source_type="lance",
        source=json.dumps({"uri": uri, **rest}),
        schema=None,
        profile=json.dumps({"num_rows": rest["rows"]}) if "rows" in rest else None,
    )
    tags = [InputTag("mlflow.data.context", name)]
    tags += [InputTag(f"factory.{key}", item[:500]) for key, item in rest.items()]
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

    A run begun while another is open in this process is nested under it. A server that does not answer costs
    the job nothing: what there is to say waits in a file.

    Args:
        verb: name of the run, e.g. "train".
        recipe_parameters: what decides what is computed; recorded as `recipe.…`.
        execution_parameters: where and how fast; recorded as `execution.…`.
        inputs: tables read, `{"real": "real.lance@7"}` or a mapping with uri, version, digest, rows, tag.

    Raises:
        ValueError: the store's address is wrong: no URI MLflow takes, an unknown host, a server that is no MLflow
            or refuses this user.
    """
    run = Run(current_store(), _active[-1] if _active else None)
    tags = {
        "mlflow.runName": verb,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": redact(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "factory.verb": verb,
        "factory.host": socket.gethostname(),
        "factory.pid": str(os.getpid()),
    }
    parent = _active[-1]._token if _active else None
    created = {"op": "create", "token": run._token, "name": verb, "tags": tags, "parent": parent}
    run._record(created | {"time": int(time.time() * 1000)})
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
