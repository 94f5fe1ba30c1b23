"""Real rows by split: train and validation for everyone, test only with a recorded `TestAccess`."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from factory.storage.location import StorageOptions, ledger_folder
from factory.storage.table import Table, open_table
from schemas.identity import hash_parts
from schemas.sample import SPLITS


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


def real_rows(
    uri: str,
    *,
    splits: Sequence[str] = ("train",),
    columns: Sequence[str] | None = None,
    access: TestAccess | None = None,
    version: int | None = None,
    storage_options: StorageOptions = None,
) -> pa.Table:
    """Rows of a real table that belong to `splits`.

    Raises:
        PermissionError: the test split is asked for without `access`.
        ValueError: unknown split, or not a table of real images.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise ValueError(f"splits: {', '.join(unknown) or 'none given'}; there are {', '.join(SPLITS)}")
    if "test" in splits and access is None:
        raise PermissionError(
            f"the test split of {uri} is read only by `factory evaluate downstream`, which records it"
        )
    table = open_table(uri, version=version, storage_options=storage_options)
    if not {"image_id", "split", "label"} <= set(table.schema.names):
        raise ValueError(f"{uri} is not a table of real images; `factory prepare` makes one")
    if "test" in splits and access is not None:
        _record_access(table, access)
    return table.read(columns=columns, filter=f"split IN ({', '.join(map(repr, splits))})")


def test_accesses(uri: str) -> list[dict[str, str]]:
    """Every recorded reading of the test split, oldest first."""
    path = _access_log(uri)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


test_accesses.__test__ = False  # type: ignore[attr-defined]  # not a pytest function


def class_names(table: Table) -> tuple[str, ...]:
    """The class table: `label` is an index into it.

    Raises:
        ValueError: the table has none.
    """
    text = table.metadata.get("class_names")
    if text is None:
        raise ValueError(f"{table.uri} records no class_names; make it again with `factory prepare`")
    return tuple(json.loads(text))


def real_digest(table: Table, splits: Sequence[str] = ("train",)) -> str:
    """Content digest of the rows of `splits`: of their sorted (image_id, label), whatever their order.

    image_id is itself a hash of pixels, mask and label.
    """
    rows = table.read(["image_id", "label"], filter=f"split IN ({', '.join(map(repr, splits))})")
    pairs = sorted(zip(rows["image_id"].to_pylist(), rows["label"].to_pylist(), strict=True))
    return hash_parts("real", *(part for pair in pairs for part in pair))


def _access_log(uri: str) -> Path:
    return Path(ledger_folder(uri)) / "test_access.jsonl"


def _record_access(table: Table, access: TestAccess) -> None:
    path = _access_log(table.uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": str(table.version),
        **dataclasses.asdict(access),
    }
    with path.open("a") as stream:
        stream.write(json.dumps(entry) + "\n")
