"""What every format writes: one item per row, the layout of the whole export, and the interface of a writer.

File names come from row ids alone, never from class names, prompts or source paths, so nothing in a table can lead
a path out of the folder.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from factory.imaging import as_grey, as_rgb, decode_png, encode_png

Origin = Literal["real", "synthetic", "derived"]
"""`derived`: synthetic, with pixels of a real image in it."""
Channels = Literal["as-stored", "grey", "rgb"]
MaskValues = Literal["stored", "class"]
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class ExportItem:
    """One row on its way out.

    Attributes:
        row_id: image_id of a real row, request_id of a synthetic one; also its file name.
        origin: real, synthetic or derived.
        split: train or val.
        label, label_name: class, and its index in the class table.
        image: PNG, uint8 (H, W) grey or (H, W, 3) RGB.
        mask: PNG, uint8 label map (H, W); None where the row has none.
        facts: further columns of samples.csv, text.
    """

    row_id: str
    origin: Origin
    split: str
    label: int
    label_name: str
    image: bytes
    mask: bytes | None
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.row_id):
            raise ValueError(
                f"row id {self.row_id!r} cannot name a file: only letters, digits, '-' and '_' may be used"
            )
        if self.split not in ("train", "val"):
            raise ValueError(f"row {self.row_id}: split {self.split!r} is not exported, only train and val")


@dataclass(frozen=True, kw_only=True)
class PlacedFile:
    """Where a part of an item went.

    Attributes:
        role: image or mask.
        path: of the file, relative to the export, with `/`.
        member: inside that file: the name in a tar, the row number in a table; "" where the file is the part.
        sha256: of the part's own bytes.
    """

    role: Literal["image", "mask"]
    path: str
    member: str = ""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ExportLayout:
    """What a writer knows before the first item.

    Attributes:
        name: of the dataset.
        class_names: the class table.
        splits: those that may come, train first.
        num_items: how many items will come.
        mask_values: "stored", or "class": a lesion's value is 1 + its class.
        rows_per_shard: rows of a shard, in formats that have shards.
    """

    name: str
    class_names: Sequence[str]
    splits: Sequence[str]
    num_items: int
    mask_values: MaskValues = "stored"
    rows_per_shard: int = 1000

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard {self.rows_per_shard} must be at least 1")


class FormatWriter(Protocol):
    """Writes the items of one export into a folder, one at a time."""

    def add(self, item: ExportItem) -> list[PlacedFile]:
        """Write one item; says where its parts went."""
        ...

    def finish(self) -> None:
        """Write what stands once in the export, after the last item."""
        ...


def sha256_of(data: bytes) -> str:
    """Hex SHA-256, 64 characters."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_part(root: Path, path: str, role: Literal["image", "mask"], data: bytes) -> PlacedFile:
    """One part as a file of its own at `path` below `root`."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as stream:
        stream.write(data)
    return PlacedFile(role=role, path=path, sha256=sha256_of(data))


def image_shape(data: bytes) -> tuple[int, int, int]:
    """(height, width, channels) of a PNG; only its header is read.

    Raises:
        ValueError: neither grey nor RGB.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"a PNG of mode {image.mode}; tables hold 8-bit grey (L) or RGB images")
        return image.height, image.width, 1 if image.mode == "L" else 3


def with_channels(data: bytes, channels: Channels) -> bytes:
    """The PNG `data`, unchanged where it has these channels already, else converted."""
    if channels == "as-stored":
        return data
    if image_shape(data)[2] == (1 if channels == "grey" else 3):
        return data
    pixels = decode_png(data)
    return encode_png(as_grey(pixels) if channels == "grey" else as_rgb(pixels))


def with_mask_values(data: bytes | None, label: int, mask_values: MaskValues) -> bytes | None:
    """The mask, unchanged or with every lesion pixel set to 1 + `label`."""
    if data is None or mask_values == "stored":
        return data
    inside = decode_png(data) > 0
    return encode_png(np.where(inside, np.uint8(label + 1), np.uint8(0)))
