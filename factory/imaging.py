"""Pixels: lossless encoding, letterboxing and its inverse, decoded training rows."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

RASTER_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
"""Formats read from users' files, by content and not by suffix: Pillow would hand PostScript to an interpreter."""


def encode_png(pixels: np.ndarray) -> bytes:
    """Lossless PNG of uint8 pixels, (H, W) grey or label map, or (H, W, 3) RGB.

    Raises:
        ValueError: another dtype or shape (16-bit input is refused, never truncated).
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"pixels: want uint8 (H, W) or (H, W, 3), got {pixels.dtype} {pixels.shape}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Pixels of `encode_png`: uint8, (H, W) or (H, W, 3)."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image)


def as_grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W) uint8: the channel mean of an RGB image, a grey one unchanged."""
    return pixels if pixels.ndim == 2 else np.round(pixels.mean(axis=2)).astype(np.uint8)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: a grey image replicated, an RGB one unchanged."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Where an (height, width) image lies inside a square of `size` px: scaled by one factor, centred.

    `top`, `left`, `inner_height`, `inner_width` are in px of the square.
    """

    height: int
    width: int
    size: int

    @property
    def inner_height(self) -> int:
        return max(1, round(self.height * self.size / max(self.height, self.width)))

    @property
    def inner_width(self) -> int:
        return max(1, round(self.width * self.size / max(self.height, self.width)))

    @property
    def top(self) -> int:
        return (self.size - self.inner_height) // 2

    @property
    def left(self) -> int:
        return (self.size - self.inner_width) // 2

    def apply(self, pixels: np.ndarray, *, is_mask: bool = False) -> np.ndarray:
        """(H, W[, 3]) uint8 → (size, size[, 3]) uint8, padded with 0; masks by nearest neighbour."""
        if pixels.shape[:2] != (self.height, self.width):
            raise ValueError(f"pixels: letterbox is for {(self.height, self.width)}, got {pixels.shape[:2]}")
        resample = Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS
        inner = Image.fromarray(pixels).resize((self.inner_width, self.inner_height), resample)
        out = np.zeros((self.size, self.size, *pixels.shape[2:]), np.uint8)
        out[self.top : self.top + self.inner_height, self.left : self.left + self.inner_width] = np.asarray(
            inner
        )
        return out

    def invert(self, pixels: np.ndarray, *, is_mask: bool = False) -> np.ndarray:
        """(size, size[, 3]) uint8 → (H, W[, 3]) uint8: crop the padding, scale back."""
        inner = pixels[self.top : self.top + self.inner_height, self.left : self.left + self.inner_width]
        resample = Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS
        return np.asarray(Image.fromarray(inner).resize((self.width, self.height), resample))


def letterbox(pixels: np.ndarray, size: int, *, is_mask: bool = False) -> np.ndarray:
    """`pixels` scaled by one factor and centred in a `size` × `size` square."""
    height, width = pixels.shape[:2]
    return Letterbox(height=height, width=width, size=size).apply(pixels, is_mask=is_mask)


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """A decoded real image, letterboxed to one size.

    Attributes:
        image_id: content hash, as in the table.
        label: index into the class names; `label_name` is that name.
        group_id: patient and near-duplicate group.
        image: uint8, (S, S) grey or (S, S, 3) RGB.
        mask: uint8 label map (S, S), or None where the dataset has no masks.
        attributes: free descriptors of the row.
        licence: of its source; "" where the column was not read.
    """

    image_id: str
    label: int
    label_name: str
    group_id: str
    image: np.ndarray
    mask: np.ndarray | None
    attributes: Mapping[str, str]
    licence: str = ""


def decode_rows(table: pa.Table, size: int) -> list[TrainingRow]:
    """Rows of `real.lance` decoded and letterboxed to (size, size).

    `table` needs the columns image_id, label, label_name, group_id, image, mask and attributes.
    """
    rows = []
    for row in table.to_pylist():
        mask = None if row["mask"] is None else letterbox(decode_png(row["mask"]), size, is_mask=True)
        rows.append(
            TrainingRow(
                image_id=row["image_id"],
                label=row["label"],
                label_name=row["label_name"],
                group_id=row["group_id"],
                image=letterbox(decode_png(row["image"]), size),
                mask=mask,
                attributes=dict(row["attributes"] or ()),
                licence=row.get("licence") or "",
            )
        )
    return rows
