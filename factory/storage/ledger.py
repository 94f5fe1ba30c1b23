"""The ledger: what was written but not committed, beside the table.

Layout, below ``<uri>.ledger/``, in a folder or under a prefix of an object store::

    test_access/                          one file per reading of the test split (tables of real images)
    <table id>/<plan_id>/lease            who commits (flock; on object stores a config key of the table instead)
    <table id>/<plan_id>/records/         one file per written, not yet committed fragment
    <table id>/<plan_id>/quarantine/      one file per request that could not be made
    <table id>/<plan_id>/intents/         one file per batch that is being made
    <table id>/<plan_id>/suspects/        one file per request whose batch died

The table id is drawn when a table is created, so the ledger of a table that was deleted says nothing about
the one that took its place.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance

from factory.storage.errors import reliably
from factory.storage.files import Files, files_at
from factory.storage.location import StorageOptions, lance_options, ledger_folder, local_path

TABLE_ID = "table_id"
"""Metadata key of the id that a table gets when it is created."""


class Ledger:
    """The part of a table's ledger that belongs to one plan: folders of small JSON files, each written whole.

    Raises:
        FileNotFoundError: there is no table at `uri`.
        ValueError: `plan_id` cannot name a folder, or the table is on an object store that is not s3:// or gs://.
    """

    def __init__(
        self,
        uri: str,
        plan_id: str,
        *,
        storage_options: StorageOptions = None,
        dataset: lance.LanceDataset | None = None,
    ) -> None:
        if not plan_id or "/" in plan_id or plan_id.startswith("."):
            raise ValueError(f"plan_id {plan_id!r} cannot name a folder")
        self.uri = str(uri)
        self.plan_id = plan_id
        table_id = _table_id(self.uri, storage_options) if dataset is None else _id_of(dataset)
        folder = f"{ledger_folder(self.uri)}/{table_id}/{plan_id}"
        self.folder: Path | None = local_path(folder)
        self._files: Files = files_at(folder, self.uri, storage_options)

    def put(self, folder: str, name: str, value: dict[str, Any]) -> None:
        """Write `folder/name`, whole or not at all, replacing an earlier one."""
        self._files.put(f"{folder}/{name}", json.dumps(value).encode())

    def get(self, folder: str, name: str) -> dict[str, Any] | None:
        """Content of `folder/name`; None if it is not there (any more)."""
        data = self._files.get(f"{folder}/{name}")
        return None if data is None else json.loads(data)

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files of `folder`."""
        return self._files.names(folder)

    def items(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every file of `folder` with its content, in order of names."""
        names = self.names(folder)
        values = self._files.each(lambda name: self.get(folder, name), names)
        yield from ((name, value) for name, value in zip(names, values, strict=True) if value is not None)

    def delete(self, folder: str, *names: str) -> None:
        """Remove those of `names` in `folder` that are there."""
        self._files.delete([f"{folder}/{name}" for name in names])


def _table_id(uri: str, storage_options: StorageOptions) -> str:
    options = lance_options(storage_options)
    try:
        return _id_of(reliably(uri, "open", lambda: lance.dataset(uri, storage_options=options)))
    except ValueError as fault:
        raise FileNotFoundError(f"no table at {uri}: create it before its ledger is used") from fault


def _id_of(dataset: lance.LanceDataset) -> str:
    return dataset.schema_metadata.get(TABLE_ID, "table")
