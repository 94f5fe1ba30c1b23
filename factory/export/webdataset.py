"""WebDataset shards: `SPLIT-000000.tar`, … with `ID.image.png`, `ID.mask.png` and `ID.json` per sample.

The tars hold no time and no user, so the same rows give the same bytes. Rows stand in the order of the export, real
ones spread evenly among synthetic ones; shuffle shards and samples when training (`webdataset`'s shardshuffle and
`.shuffle`).
"""

import io
import json
import tarfile
from pathlib import Path

from factory.export.items import ExportItem, ExportLayout, PlacedFile, sha256_of


class WebDatasetWriter:
    """One open tar per split; the next one starts after `rows_per_shard` samples."""

    def __init__(self, root: Path, layout: ExportLayout) -> None:
        self._root = root
        self._layout = layout
        self._tars: dict[str, tarfile.TarFile] = {}
        self._counts: dict[str, int] = {}
        root.mkdir(parents=True, exist_ok=True)

    def add(self, item: ExportItem) -> list[PlacedFile]:
        """The parts of one sample, side by side."""
        tar, name = self._shard(item.split)
        placed = [self._member(tar, name, "image", f"{item.row_id}.image.png", item.image)]
        if item.mask is not None:
            placed.append(self._member(tar, name, "mask", f"{item.row_id}.mask.png", item.mask))
        about = {
            "id": item.row_id,
            "label": item.label,
            "label_name": item.label_name,
            "origin": item.origin,
            "split": item.split,
            **item.facts,
        }
        _put(tar, f"{item.row_id}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())
        return placed

    def finish(self) -> None:
        """Close the shards and name the classes."""
        for tar in self._tars.values():
            tar.close()
        text = json.dumps(list(self._layout.class_names), indent=2, ensure_ascii=False)
        (self._root / "classes.json").write_text(text + "\n", encoding="utf-8")

    def _shard(self, split: str) -> tuple[tarfile.TarFile, str]:
        count = self._counts.get(split, 0)
        number, place = divmod(count, self._layout.rows_per_shard)
        name = f"{split}-{number:06d}.tar"
        if place == 0:
            if split in self._tars:
                self._tars[split].close()
            self._tars[split] = tarfile.open(self._root / name, "x", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._counts[split] = count + 1
        return self._tars[split], name

    @staticmethod
    def _member(tar: tarfile.TarFile, path: str, role: str, name: str, data: bytes) -> PlacedFile:
        _put(tar, name, data)
        return PlacedFile(
            role="image" if role == "image" else "mask", path=path, member=name, sha256=sha256_of(data)
        )


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # mtime, uid and gid are 0
    entry.size = len(data)
    entry.mode = 0o644
    tar.addfile(entry, io.BytesIO(data))
