"""Labelled images in memory, for training and scoring a downstream predictor. Numpy only.

All images of one set are letterboxed to one size and stay uint8 until a batch is made. A set written by `save_npz`
holds plain arrays only, so that a machine without the tables can read it.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from factory.imaging import Letterbox
from schemas.identity import hash_parts


@dataclass(frozen=True, kw_only=True, eq=False)
class NativeTruth:
    """What an evaluation row is scored against at the size it was acquired in.

    Attributes:
        letterbox: from the native (height, width) to the square that the predictor sees.
        mask: uint8 (height, width) label map, lesion > 0; None where the row has none.
        pixel_spacing: mm per px, None where unknown.
    """

    letterbox: Letterbox
    mask: np.ndarray | None = None
    pixel_spacing: float | None = None

    def __post_init__(self) -> None:
        shape = (self.letterbox.height, self.letterbox.width)
        if self.mask is not None and (self.mask.dtype != np.uint8 or self.mask.shape != shape):
            raise ValueError(f"mask: want uint8 {shape}, got {self.mask.dtype} {self.mask.shape}")
        if self.pixel_spacing is not None and not (
            np.isfinite(self.pixel_spacing) and self.pixel_spacing > 0
        ):
            raise ValueError(f"pixel_spacing: want mm > 0, got {self.pixel_spacing}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """N labelled images of one size.

    Attributes:
        images: uint8 (N, S, S, K), letterboxed; K = 1 grey or 3 RGB.
        labels: int64 (N,), indices into `class_names`.
        class_names: in label order.
        ids: image_id of a real row, request_id of a synthetic one.
        groups: patient or near-duplicate group; a synthetic row's own id, or the group it inherits.
        is_real: bool (N,).
        masks: uint8 (N, S, S) label maps, lesion > 0; None where no row has one.
        has_mask: bool (N,), which rows' masks are annotations; None means all where there are masks. A row without
            one has zeros in `masks`, which says nothing about the image.
        native: one per row, of evaluation rows only.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    is_real: np.ndarray
    masks: np.ndarray | None = None
    has_mask: np.ndarray | None = None
    native: tuple[NativeTruth, ...] | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3):
            raise ValueError(f"images: want uint8 (N, S, S, 1 or 3), got {self.images.dtype} {shape}")
        count, size = shape[:2]
        self._check_array("labels", self.labels, np.int64, (count,))
        self._check_array("is_real", self.is_real, np.bool_, (count,))
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class_names: want at least one, each once; got {self.class_names}")
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"labels: row {self.ids[row]} has {self.labels[row]}, want 0 … {len(self.class_names) - 1}"
            )
        lengths = {"ids": len(self.ids), "groups": len(self.groups)}
        if self.native is not None:
            lengths["native"] = len(self.native)
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"{name}: {length} for {count} images")
        if self.masks is None:
            if self.has_mask is not None and self.has_mask.any():
                raise ValueError("has_mask: some rows have a mask, but masks is None")
            return
        self._check_array("masks", self.masks, np.uint8, (count, size, size))
        if self.has_mask is None:
            object.__setattr__(self, "has_mask", np.ones(count, np.bool_))
        assert self.has_mask is not None
        self._check_array("has_mask", self.has_mask, np.bool_, (count,))

    @staticmethod
    def _check_array(name: str, values: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> None:
        if values.dtype != dtype or values.shape != shape:
            raise ValueError(f"{name}: want {np.dtype(dtype)} {shape}, got {values.dtype} {values.shape}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Side of the images, px."""
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        """1 grey, 3 RGB."""
        return self.images.shape[3]

    @property
    def num_classes(self) -> int:
        """C, whether or not each class has a row."""
        return len(self.class_names)

    def counts(self) -> np.ndarray:
        """Rows of each class, int64 (C,)."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def digest(self) -> str:
        """Hash of which rows these are: their sorted ids."""
        return hash_parts(*sorted(self.ids))

    def content_digest(self) -> str:
        """Hash of everything a predictor could learn from, in order: ids, pixels, labels, masks."""
        arrays = [self.images, self.labels, self.is_real]
        if self.masks is not None and self.has_mask is not None:
            arrays += [self.masks, self.has_mask]
        return hash_parts(*self.class_names, *self.ids, *(np.ascontiguousarray(a).tobytes() for a in arrays))

    def take(self, rows: np.ndarray | list[int] | slice) -> "Examples":
        """The named rows (numbers, a boolean mask or a slice), in that order."""
        numbers = np.arange(len(self))[rows]
        pick = [int(n) for n in numbers]
        return replace(
            self,
            images=self.images[numbers],
            labels=self.labels[numbers],
            ids=tuple(self.ids[n] for n in pick),
            groups=tuple(self.groups[n] for n in pick),
            is_real=self.is_real[numbers],
            masks=None if self.masks is None else self.masks[numbers],
            has_mask=None if self.has_mask is None else self.has_mask[numbers],
            native=None if self.native is None else tuple(self.native[n] for n in pick),
        )


def concatenate(*parts: Examples) -> Examples:
    """The rows of all parts, one after the other. `native` is kept only where every part has it.

    Raises:
        ValueError: no part, or parts of different size, channels or classes.
    """
    if not parts:
        raise ValueError("concatenate: want at least one set of examples")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=1):
        for name in ("size", "channels", "class_names"):
            if getattr(part, name) != getattr(first, name):
                raise ValueError(
                    f"{name}: part {number} has {getattr(part, name)}, part 0 has {getattr(first, name)}"
                )
    masks = has_mask = None
    if any(part.masks is not None for part in parts):
        masks = np.concatenate(
            [np.zeros(p.images.shape[:3], np.uint8) if p.masks is None else p.masks for p in parts]
        )
        has_mask = np.concatenate(
            [np.zeros(len(p), np.bool_) if p.has_mask is None else p.has_mask for p in parts]
        )
    native: list[NativeTruth] | None = []
    for part in parts:
        native = None if native is None or part.native is None else [*native, *part.native]
    return Examples(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        class_names=first.class_names,
        ids=tuple(name for part in parts for name in part.ids),
        groups=tuple(name for part in parts for name in part.groups),
        is_real=np.concatenate([part.is_real for part in parts]),
        masks=masks,
        has_mask=has_mask,
        native=None if native is None else tuple(native),
    )


def save_npz(examples: Examples, path: Path) -> Path:
    """Write a set as one compressed npz of plain arrays, whole or not at all.

    Native masks of several sizes lie flattened one after the other in `native_masks`.
    """
    arrays: dict[str, np.ndarray] = {
        "images": examples.images,
        "labels": examples.labels,
        "class_names": np.array(examples.class_names, dtype=np.str_),
        "ids": np.array(examples.ids, dtype=np.str_),
        "groups": np.array(examples.groups, dtype=np.str_),
        "is_real": examples.is_real,
    }
    if examples.masks is not None and examples.has_mask is not None:
        arrays |= {"masks": examples.masks, "has_mask": examples.has_mask}
    if examples.native is not None:
        truths = examples.native
        flat = [truth.mask.ravel() for truth in truths if truth.mask is not None]
        arrays |= {
            "native_sizes": np.array([(t.letterbox.height, t.letterbox.width) for t in truths]).reshape(
                -1, 2
            ),
            "native_has_mask": np.array([t.mask is not None for t in truths], np.bool_),
            "native_masks": np.concatenate(flat) if flat else np.empty(0, np.uint8),
            "native_spacing": np.array(
                [np.nan if t.pixel_spacing is None else t.pixel_spacing for t in truths]
            ),
        }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    partial.replace(path)
    return path


def load_npz(path: Path) -> Examples:
    """The set written by `save_npz`. Nothing is unpickled.

    Raises:
        ValueError: the file is not such a set.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        native = _native(arrays) if "native_sizes" in arrays else None
        return Examples(
            images=arrays["images"],
            labels=arrays["labels"],
            class_names=tuple(arrays["class_names"].tolist()),
            ids=tuple(arrays["ids"].tolist()),
            groups=tuple(arrays["groups"].tolist()),
            is_real=arrays["is_real"],
            masks=arrays.get("masks"),
            has_mask=arrays.get("has_mask"),
            native=native,
        )
    except KeyError as error:
        raise ValueError(f"{path}: no array {error}; write the file with save_npz") from error


def _native(arrays: dict[str, np.ndarray]) -> tuple[NativeTruth, ...]:
    size = arrays["images"].shape[1]
    truths, offset = [], 0
    rows = zip(arrays["native_sizes"].tolist(), arrays["native_has_mask"], arrays["native_spacing"].tolist())
    for (height, width), has_mask, spacing in rows:
        mask = None
        if has_mask:
            mask = arrays["native_masks"][offset : offset + height * width].reshape(height, width)
            offset += height * width
        truths.append(
            NativeTruth(
                letterbox=Letterbox(height=height, width=width, size=size),
                mask=mask,
                pixel_spacing=None if np.isnan(spacing) else spacing,
            )
        )
    return tuple(truths)
