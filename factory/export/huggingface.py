"""Hugging Face `datasets`: `load_from_disk(FOLDER)` gives a DatasetDict with splits train and validation.

Features: image and mask are `Image`, label is a `ClassLabel` with the names of the class table. PNG bytes go in as
they are in the table.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.export.items import ExportItem, ExportLayout, PlacedFile, sha256_of

if TYPE_CHECKING:
    from datasets import Features
    from datasets.arrow_writer import ArrowWriter

_SPLIT_NAMES = {"train": "train", "val": "validation"}
_ROWS_AT_ONCE = 256


class HuggingFaceWriter:
    """Streams rows into one Arrow file per split, which `save_to_disk` then cuts into shards."""

    def __init__(self, root: Path, layout: ExportLayout) -> None:
        self._root = root
        self._layout = layout
        self._parts = root / ".parts"
        self._parts.mkdir(parents=True)
        self._writers: dict[str, ArrowWriter] = {}
        self._counts: dict[str, int] = {}

    def add(self, item: ExportItem) -> list[PlacedFile]:
        """One row of its split."""
        split = _SPLIT_NAMES[item.split]
        if split not in self._writers:
            self._writers[split] = self._open(split)
        row: dict[str, Any] = {
            "id": item.row_id,
            "image": {"bytes": item.image, "path": None},
            "mask": None if item.mask is None else {"bytes": item.mask, "path": None},
            "label": item.label,
            "origin": item.origin,
            "facts": [{"key": key, "value": value} for key, value in item.facts.items()],
        }
        self._writers[split].write(row)
        number = self._counts.get(split, 0)
        self._counts[split] = number + 1
        member = str(number)
        placed = [PlacedFile(role="image", path=split, member=member, sha256=sha256_of(item.image))]
        if item.mask is not None:
            placed.append(PlacedFile(role="mask", path=split, member=member, sha256=sha256_of(item.mask)))
        return placed

    def finish(self) -> None:
        """Cut the splits into shards and write what `load_from_disk` reads."""
        import datasets

        parts = {}
        for split in (name for name in _SPLIT_NAMES.values() if name in self._writers):
            self._writers[split].finalize()
            self._writers[split].close()
            parts[split] = datasets.Dataset.from_file(str(self._parts / f"{split}.arrow"))
        were_on = datasets.are_progress_bars_disabled() is False
        datasets.disable_progress_bars()
        try:
            datasets.DatasetDict(parts).save_to_disk(str(self._root))
        finally:
            if were_on:
                datasets.enable_progress_bars()
        shutil.rmtree(self._parts)

    def _open(self, split: str) -> "ArrowWriter":
        from datasets.arrow_writer import ArrowWriter

        path = str(self._parts / f"{split}.arrow")
        return ArrowWriter(path=path, features=self._features(), writer_batch_size=_ROWS_AT_ONCE)

    def _features(self) -> "Features":
        from datasets import ClassLabel, Features, Image, Value

        return Features(
            {
                "id": Value("string"),
                "image": Image(),
                "mask": Image(),
                "label": ClassLabel(names=list(self._layout.class_names)),
                "origin": Value("string"),
                "facts": [{"key": Value("string"), "value": Value("string")}],
            }
        )
