"""COCO: `SPLIT/ID.png` and `annotations/instances_SPLIT.json`, one annotation per connected part of a lesion.

A segmentation is uncompressed run-length encoding (`{"size": [H, W], "counts": [...]}`, column by column, first the
run of zeros), which is exact; `pycocotools`' `annToMask` reads it. bbox is [x, y, width, height] in px, area in px².
Category ids are 1 + the index in the class table.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from scipy import ndimage

from factory.export.items import ExportItem, ExportLayout, PlacedFile, image_shape, write_part
from factory.imaging import decode_png

_KINDS = ("images", "annotations")
_EIGHT_NEIGHBOURS = np.ones((3, 3), np.uint8)


class CocoWriter:
    """Entries are kept on disk, one per line, until the JSON of each split is put together."""

    def __init__(self, root: Path, layout: ExportLayout) -> None:
        self._root = root
        self._layout = layout
        self._parts = root / ".parts"
        self._parts.mkdir(parents=True)
        self._streams: dict[tuple[str, str], TextIO] = {
            (split, kind): (self._parts / f"{split}.{kind}").open("w", encoding="utf-8")
            for split in layout.splits
            for kind in _KINDS
        }
        self._num_images = 0
        self._num_annotations = 0

    def add(self, item: ExportItem) -> list[PlacedFile]:
        """The image file and the annotations of its lesions.

        Raises:
            ValueError: no mask, or one of another size than the image.
        """
        if item.mask is None:
            raise ValueError(f"coco: row {item.row_id} has no mask, which this format needs")
        height, width, _ = image_shape(item.image)
        mask = decode_png(item.mask)
        if mask.shape != (height, width):
            raise ValueError(f"coco: row {item.row_id}: mask {mask.shape} on an image {(height, width)}")
        self._num_images += 1
        entry = {
            "id": self._num_images,
            "file_name": f"{item.row_id}.png",
            "height": height,
            "width": width,
            "origin": item.origin,
        }
        self._line(item.split, "images", entry)
        for instance in instances(mask):
            self._num_annotations += 1
            annotation = {
                "id": self._num_annotations,
                "image_id": self._num_images,
                "category_id": item.label + 1,
                "iscrowd": 0,
                **instance,
            }
            self._line(item.split, "annotations", annotation)
        return [write_part(self._root, f"{item.split}/{item.row_id}.png", "image", item.image)]

    def finish(self) -> None:
        """Put the JSON of each split together."""
        for stream in self._streams.values():
            stream.close()
        (self._root / "annotations").mkdir()
        categories = [
            {"id": number, "name": name, "supercategory": "lesion"}
            for number, name in enumerate(self._layout.class_names, 1)
        ]
        head = {"description": self._layout.name, "version": "1.0"}
        for split in self._layout.splits:
            target = self._root / "annotations" / f"instances_{split}.json"
            with target.open("x", encoding="utf-8") as out:
                out.write(f'{{"info": {json.dumps(head)},\n"licenses": [],\n')
                out.write(f'"categories": {json.dumps(categories, ensure_ascii=False)}')
                for kind in _KINDS:
                    self._append(out, split, kind)
                out.write("}\n")
        for path in self._parts.iterdir():
            path.unlink()
        self._parts.rmdir()

    def _append(self, out: TextIO, split: str, kind: str) -> None:
        out.write(f',\n"{kind}": [')
        with (self._parts / f"{split}.{kind}").open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                out.write(("\n" if number == 0 else ",\n") + line.rstrip("\n"))
        out.write("]")

    def _line(self, split: str, kind: str, entry: dict[str, Any]) -> None:
        self._streams[split, kind].write(json.dumps(entry, ensure_ascii=False) + "\n")


def instances(mask: np.ndarray) -> Iterator[dict[str, Any]]:
    """bbox, area and segmentation of every connected part (8 neighbours) of `mask` > 0; uint8 (H, W)."""
    parts, count = ndimage.label(mask > 0, _EIGHT_NEIGHBOURS)
    for number, place in enumerate(ndimage.find_objects(parts, count), 1):
        rows, columns = place
        inside = np.zeros(mask.shape, bool)
        inside[place] = parts[place] == number
        yield {
            "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
            "area": int(inside.sum()),
            "segmentation": {"size": list(mask.shape), "counts": run_lengths(inside)},
        }


def run_lengths(inside: np.ndarray) -> list[int]:
    """Lengths of the runs of 0, 1, 0, … of a boolean (H, W), column by column; the first may be 0."""
    flat = inside.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    lengths = np.diff(edges).tolist()
    return [0, *lengths] if flat[0] else lengths
