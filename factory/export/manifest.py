"""manifest.json, samples.csv and checksums.sha256: every row, every file, and their SHA-256.

All three are streamed: memory does not grow with the rows. `sha256sum -c checksums.sha256` checks an export.
"""

import contextlib
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from factory.export.destination import MANIFEST
from factory.export.items import ExportItem, PlacedFile, sha256_of_file

SAMPLES = "samples.csv"
CHECKSUMS = "checksums.sha256"
FACTS = ("dataset", "recipe", "plan_id", "licence", "group")
"""Columns of samples.csv that come from `ExportItem.facts`."""
COLUMNS = (
    *("id", "split", "origin", "label", "label_name", "image", "image_member", "image_sha256"),
    *("mask", "mask_member", "mask_sha256", *FACTS),
)
_PART_SUFFIX = ".png"


class Manifest:
    """Writes the three files beside the data. Use as a context manager; `finish` ends it."""

    def __init__(self, root: Path, head: Mapping[str, Any]) -> None:
        """`head` stands first in manifest.json; its first key must be export_format."""
        assert next(iter(head)) == "export_format"
        self._root = root
        self._stack = contextlib.ExitStack()
        self._json = self._stack.enter_context((root / MANIFEST).open("x", encoding="utf-8"))
        self._sums = self._stack.enter_context((root / CHECKSUMS).open("x", encoding="utf-8"))
        table = self._stack.enter_context((root / SAMPLES).open("x", encoding="utf-8", newline=""))
        self._csv = csv.writer(table, lineterminator="\n")
        self._csv.writerow(COLUMNS)
        self._table = table
        self._json.write(json.dumps(head, ensure_ascii=False)[:-1] + ',\n"rows": [')
        self._num_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, item: ExportItem, placed: list[PlacedFile]) -> None:
        """One row and where its parts went."""
        files = [
            {"role": part.role, "path": part.path}
            | ({"member": part.member} if part.member else {})
            | {"sha256": part.sha256}
            for part in placed
        ]
        entry = {
            "id": item.row_id,
            "origin": item.origin,
            "split": item.split,
            "label": item.label,
            "label_name": item.label_name,
            "files": files,
        }
        self._json.write((",\n" if self._num_rows else "\n") + json.dumps(entry, ensure_ascii=False))
        self._num_rows += 1
        by_role = {part.role: part for part in placed}
        cells: list[str] = [item.row_id, item.split, item.origin, str(item.label), item.label_name]
        for role in ("image", "mask"):
            part = by_role.get(role)
            cells += ["", "", ""] if part is None else [part.path, part.member, part.sha256]
        self._csv.writerow([*cells, *(item.facts.get(name, "") for name in FACTS)])
        for part in placed:
            if not part.member:
                self._sums.write(f"{part.sha256}  {part.path}\n")

    def close_samples(self) -> str:
        """End samples.csv; its SHA-256, for the card."""
        self._table.close()
        return sha256_of_file(self._root / SAMPLES)

    def finish(self) -> None:
        """List all files that are not parts of rows, and end the manifest and the checksums."""
        self._json.write('],\n"files": [')
        own = {MANIFEST, CHECKSUMS}
        others = sorted(
            path.relative_to(self._root).as_posix()
            for path in self._root.rglob("*")
            if path.is_file() and path.suffix != _PART_SUFFIX
        )
        first = True
        for name in (name for name in others if name not in own):
            path = self._root / name
            digest = sha256_of_file(path)
            entry = {"path": name, "bytes": path.stat().st_size, "sha256": digest}
            self._json.write(("\n" if first else ",\n") + json.dumps(entry, ensure_ascii=False))
            self._sums.write(f"{digest}  {name}\n")
            first = False
        self._json.write("]}\n")
        self._json.close()
        self._sums.write(f"{sha256_of_file(self._root / MANIFEST)}  {MANIFEST}\n")
