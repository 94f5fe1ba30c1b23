"""Leave to read the test split of a table of real images, and the record of every use of it."""

import dataclasses
import datetime
import json
import uuid
from collections.abc import Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from factory.storage.files import Files, files_at
from factory.storage.location import StorageOptions, ledger_folder

_FOLDER = "test_access"
_CONTENT = {"image", "mask", "embedding", "attributes"}
"""Columns of a real table that say what an image shows; who and how many there are may be read by all."""
_Rows = TypeVar("_Rows", pa.Table, pa.RecordBatch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestAccess:
    """Leave to read test rows. Made only by `evaluate downstream`; every use is recorded beside the table.

    Attributes:
        opened_by: which command or program.
        reason: what for.
    """

    __test__ = False  # not a pytest class

    opened_by: str
    reason: str

    def __post_init__(self) -> None:
        if not self.opened_by or not self.reason:
            raise ValueError("TestAccess: opened_by and reason must say who reads the test split and why")


class TestGuard:
    """Lets what is read from a table pass, unless it is what test images of a real table show and there is no leave.

    Attributes:
        columns: what to read: the columns asked for, and `split` where rows must be looked at.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        uri: str,
        schema: pa.Schema,
        access: TestAccess | None,
        columns: Sequence[str] | None,
        *,
        like: bool = False,
    ) -> None:
        self._uri = uri
        self.columns = None if columns is None else list(columns)
        shows = like or self.columns is None or bool(_CONTENT & set(self.columns))
        self._looks = shows and access is None and {"image_id", "split"} <= set(schema.names)
        self._added = self._looks and self.columns is not None and "split" not in self.columns
        if self._added and self.columns is not None:
            self.columns.append("split")

    def released(self, rows: _Rows) -> _Rows:
        """The rows, with the columns asked for.

        Raises:
            PermissionError: one of them belongs to the test split.
        """
        if not self._looks:
            return rows
        if pc.any(pc.equal(rows["split"], "test")).as_py():
            raise PermissionError(
                f"the test split of {self._uri} is read only by `factory evaluate downstream`, which records it; "
                "add split IN ('train', 'val') to the filter"
            )
        return rows.drop_columns(["split"]) if self._added else rows


def record_access(uri: str, version: int, access: TestAccess, storage_options: StorageOptions = None) -> None:
    """Write down, beside the table, that its test split is read now."""
    now = datetime.datetime.now(datetime.UTC)
    entry = {
        "time": now.isoformat(timespec="seconds"),
        "version": str(version),
        **dataclasses.asdict(access),
    }
    name = f"{now.strftime('%Y%m%dT%H%M%S%f')}-{uuid.uuid4().hex[:8]}.json"
    _log(uri, storage_options).put(f"{_FOLDER}/{name}", json.dumps(entry).encode())


def test_accesses(uri: str, storage_options: StorageOptions = None) -> list[dict[str, str]]:
    """Every recorded reading of the test split, oldest first."""
    log = _log(uri, storage_options)
    contents = log.each(log.get, [f"{_FOLDER}/{name}" for name in log.names(_FOLDER)])
    return [json.loads(content) for content in contents if content is not None]


test_accesses.__test__ = False  # type: ignore[attr-defined]  # not a pytest function


def _log(uri: str, storage_options: StorageOptions) -> Files:
    return files_at(ledger_folder(uri), uri, storage_options)
