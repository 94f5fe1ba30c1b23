"""Real rows by split: train and validation for everyone, test only with a recorded `TestAccess`."""

import json
from collections.abc import Sequence

import pyarrow as pa

from factory.storage.access import TestAccess
from factory.storage.location import StorageOptions
from factory.storage.table import Table, open_table
from schemas.identity import hash_parts
from schemas.sample import SPLITS


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
    table = open_table(
        uri,
        version=version,
        storage_options=storage_options,
        test_access=access if "test" in splits else None,
    )
    if not {"image_id", "split", "label"} <= set(table.schema.names):
        raise ValueError(f"{uri} is not a table of real images; `factory prepare` makes one")
    return table.read(columns=columns, filter=f"split IN ({', '.join(map(repr, splits))})")


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
