"""The ledger: what was written but not committed, beside the table.

Layout, below ``<uri>.ledger/``::

    test_access.jsonl                     readings of the test split (tables of real images)
    <table id>/<plan_id>/lease            who commits (flock)
    <table id>/<plan_id>/records/         one file per written, not yet committed fragment
    <table id>/<plan_id>/quarantine/      one file per request that could not be made
    <table id>/<plan_id>/intents/         one file per batch that is being made
    <table id>/<plan_id>/suspects/        one file per request whose batch died

The table id is drawn when a table is created, so the ledger of a table that was deleted says nothing about
the one that took its place.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance

from factory.storage.errors import storage_faults
from factory.storage.location import ledger_folder, local_path

TABLE_ID = "table_id"
"""Metadata key of the id that a table gets when it is created."""


class Ledger:
    """The part of a table's ledger that belongs to one plan: folders of small JSON files, each written whole.

    A file is written under another name, synced and renamed, so that it is there entirely or not at all,
    also after a power cut.

    Raises:
        ValueError: the table is on an object store; the ledger needs a local or mounted file system.
    """

    def __init__(self, uri: str, plan_id: str) -> None:
        uri = str(uri)
        if local_path(uri) is None:
            raise ValueError(
                f"{uri}: the exactly-once write path needs a local or mounted file system for its ledger; "
                "write to a local path and copy the finished table"
            )
        if not plan_id or "/" in plan_id or plan_id.startswith("."):
            raise ValueError(f"plan_id {plan_id!r} cannot name a folder")
        self.uri = uri
        self.plan_id = plan_id
        root = local_path(ledger_folder(uri))
        assert root is not None
        self.folder = root / _table_id(uri) / plan_id

    def put(self, folder: str, name: str, value: dict[str, Any]) -> None:
        """Write `folder/name`, whole or not at all, replacing an earlier one."""
        with storage_faults(self.uri, "write to the ledger of"):
            target = self.folder / folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, json.dumps(value).encode())

    def get(self, folder: str, name: str) -> dict[str, Any] | None:
        """Content of `folder/name`; None if it is not there (any more)."""
        try:
            return json.loads((self.folder / folder / name).read_bytes())
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files of `folder`."""
        try:
            paths = list((self.folder / folder).iterdir())
        except FileNotFoundError:
            return []
        return sorted(path.name for path in paths if not path.name.startswith("."))

    def items(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every file of `folder` with its content, in order of names."""
        for name in self.names(folder):
            value = self.get(folder, name)
            if value is not None:
                yield name, value

    def delete(self, folder: str, name: str) -> None:
        """Remove `folder/name` if it is there."""
        (self.folder / folder / name).unlink(missing_ok=True)


def write_whole(target: Path, data: bytes) -> None:
    """Write `data` to `target` atomically and durably: temporary name, fsync, rename, fsync of the folder."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _table_id(uri: str) -> str:
    try:
        metadata = lance.dataset(uri).schema_metadata
    except ValueError as fault:
        raise FileNotFoundError(f"no table at {uri}: create it before its ledger is used") from fault
    return metadata.get(TABLE_ID, "table")
