"""Image folders: `SPLIT/images/CLASS/ID.png` and `SPLIT/masks/CLASS/ID.png`; samples.csv says what each file is.

CLASS is the index in the class table, padded with zeros, so that `torchvision.datasets.ImageFolder` on
`train/images` gives the same labels as the table; classes.json has the names.
"""

import json
from pathlib import Path

from factory.export.items import ExportItem, ExportLayout, PlacedFile, write_part


class FolderWriter:
    """Writes PNG files as they are in the table."""

    def __init__(self, root: Path, layout: ExportLayout) -> None:
        self._root = root
        self._layout = layout
        self._digits = len(str(max(1, len(layout.class_names) - 1)))
        for split in layout.splits:  # an empty class must keep its number in ImageFolder
            for label in range(len(layout.class_names)):
                (root / split / "images" / self._folder(label)).mkdir(parents=True)

    def add(self, item: ExportItem) -> list[PlacedFile]:
        """Image, and mask where there is one."""
        folder, name = self._folder(item.label), f"{item.row_id}.png"
        placed = [write_part(self._root, f"{item.split}/images/{folder}/{name}", "image", item.image)]
        if item.mask is not None:
            placed.append(write_part(self._root, f"{item.split}/masks/{folder}/{name}", "mask", item.mask))
        return placed

    def finish(self) -> None:
        """Names of the class folders."""
        names = {self._folder(label): name for label, name in enumerate(self._layout.class_names)}
        text = json.dumps(names, indent=2, ensure_ascii=False)
        (self._root / "classes.json").write_text(text + "\n", encoding="utf-8")

    def _folder(self, label: int) -> str:
        return f"{label:0{self._digits}d}"
