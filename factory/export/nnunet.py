"""nnU-Net v2 raw data: `imagesTr/ID_0000.png`, `labelsTr/ID.png`, dataset.json; with validation rows also splits.

Layout after nnU-Net's documentation/dataset_format.md: an RGB image is one file `_0000.png` with three channel
names; labels are consecutive integers. nnU-Net makes its own folds unless `splits_final.json` lies in the folder of
the preprocessed dataset: copy ours there to train and validate on these splits.
"""

import json
from pathlib import Path

import numpy as np

from factory.export.items import ExportItem, ExportLayout, PlacedFile, image_shape, write_part
from factory.imaging import decode_png

_CHANNEL_NAMES = {1: ("greyscale",), 3: ("R", "G", "B")}


class NnunetWriter:
    """All rows go to imagesTr; every image must have the same number of channels."""

    def __init__(self, root: Path, layout: ExportLayout) -> None:
        self._root = root
        self._layout = layout
        self._channels: int | None = None
        self._count = 0
        self._val: set[str] = set()
        self._train: list[str] = []
        lesions = ["lesion"] if layout.mask_values == "stored" else list(layout.class_names)
        self._labels = {"background": 0} | {name: value for value, name in enumerate(lesions, 1)}
        if len(self._labels) != len(lesions) + 1:
            raise ValueError("nnunet: a class is named 'background', which is the name of value 0; rename it")
        for name in ("imagesTr", "labelsTr"):
            (root / name).mkdir(parents=True)

    def add(self, item: ExportItem) -> list[PlacedFile]:
        """Image and label map.

        Raises:
            ValueError: no mask, a mask of another size or with unknown values, or other channels than before.
        """
        if item.mask is None:
            raise ValueError(f"nnunet: row {item.row_id} has no mask, which this format needs")
        height, width, channels = image_shape(item.image)
        if self._channels not in (None, channels):
            raise ValueError(
                f"nnunet: row {item.row_id} has {channels} channel(s), those before it {self._channels}; "
                "choose --channels grey or --channels rgb"
            )
        mask = decode_png(item.mask)
        if mask.shape != (height, width):
            raise ValueError(f"nnunet: row {item.row_id}: mask {mask.shape} on an image {(height, width)}")
        unknown = sorted(set(np.unique(mask).tolist()) - set(self._labels.values()))
        if unknown:
            raise ValueError(
                f"nnunet: row {item.row_id}: mask values {unknown} are none of {self._labels}; "
                "choose --mask-values class to write one value per class"
            )
        self._channels = channels
        self._count += 1
        if len(self._layout.splits) > 1:
            (self._val.add if item.split == "val" else self._train.append)(item.row_id)
        return [
            write_part(self._root, f"imagesTr/{item.row_id}_0000.png", "image", item.image),
            write_part(self._root, f"labelsTr/{item.row_id}.png", "mask", item.mask),
        ]

    def finish(self) -> None:
        """dataset.json, and splits_final.json where there are validation rows."""
        dataset = {
            "channel_names": {str(k): name for k, name in enumerate(_CHANNEL_NAMES[self._channels or 1])},
            "labels": self._labels,
            "numTraining": self._count,
            "file_ending": ".png",
            "name": self._layout.name,
        }
        self._write("dataset.json", dataset)
        if self._val:
            self._write("splits_final.json", [{"train": sorted(self._train), "val": sorted(self._val)}])

    def _write(self, name: str, value: object) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (self._root / name).write_text(text + "\n", encoding="utf-8")
