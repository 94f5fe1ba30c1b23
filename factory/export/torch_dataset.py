"""PyTorch reads the tables themselves: no export, no copy of the images.

    dataset = LanceImages.open("synthetic.lance", real="real.lance", size=224)
    sampler = WeightedRows(dataset, source_weights={"real": 1, "synthetic": 1}, class_weights={"malignant": 2})
    loader = DataLoader(dataset, batch_size=32, sampler=sampler, num_workers=2, multiprocessing_context="spawn")

Use spawn, not fork, for workers: Lance runs threads that do not survive a fork. Only real rows of the train (or val)
split are ever read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from factory.export.selection import Choice, Selection, select
from factory.imaging import as_grey, as_rgb, decode_png, letterbox
from factory.storage import Table, open_table
from schemas.identity import random_generator

Source = Literal["real", "synthetic"]
_SOURCES: tuple[Source, ...] = ("real", "synthetic")
_COLUMNS = ("image", "mask", "label", "_rowid")
_KEYS = {"real": "image_id", "synthetic": "request_id"}
_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False)
class RowIndex:
    """The rows of a dataset; all of length N.

    Attributes:
        is_real: bool (N,).
        label: int64 (N,), index into the class names.
        row_id: int64 (N,), Lance row id in the table it comes from.
    """

    is_real: np.ndarray
    label: np.ndarray
    row_id: np.ndarray


class LanceImages(Dataset[dict[str, Any]]):
    """Rows of a synthetic table, and of a real one where given, as tensors.

    An item is a dict: `image` float32 (C, size, size) in 0 … 1, letterboxed; `mask` int64 (size, size) label map,
    zeros where the row has none; `has_mask`, `is_real` bool; `label` int64; `id` str. Rows of one batch are read in
    one request per table. It pickles to the addresses and versions of the tables and the row numbers, so each worker
    process opens the tables for itself.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        size: int,
        split: Literal["train", "val"] = "train",
        channels: Literal["grey", "rgb"] = "rgb",
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        """Index the rows of one split of a selection; val holds real rows only."""
        if size < 1:
            raise ValueError(f"size {size} must be at least 1 px")
        self.class_names = selection.class_names
        self.size = size
        self.channels = channels
        self.transform = transform
        self._synthetic = selection.synthetic
        self._real = selection.real
        self.index = _index(selection, split)
        if not len(self):
            raise ValueError(f"split {split!r}: no row is left to train on")

    @classmethod
    def open(
        cls,
        synthetic: str,
        *,
        real: str | None = None,
        size: int,
        tag: str | None = None,
        choice: Choice | None = None,
        split: Literal["train", "val"] = "train",
        channels: Literal["grey", "rgb"] = "rgb",
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Self:
        """The rows that `factory export` would write with the same choice.

        Raises:
            FileNotFoundError: a table is not there.
            ValueError: as `factory.export.selection.select`.
        """
        table = open_table(synthetic, tag=tag)
        selection = select(table, None if real is None else open_table(real), choice or Choice())
        return cls(selection, size=size, split=split, channels=channels, transform=transform)

    def __len__(self) -> int:
        return len(self.index.label)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The items at `places`, in that order; PyTorch's loader calls this with a whole batch."""
        where = np.asarray(places, np.int64)
        if where.size and not (-len(self) <= where.min() and where.max() < len(self)):
            raise IndexError(f"rows {where.tolist()} of a dataset of {len(self)}")
        found: dict[tuple[bool, int], dict[str, Any]] = {}
        for source in _SOURCES:
            table = self._real if source == "real" else self._synthetic
            is_real = source == "real"
            ids = np.unique(self.index.row_id[where[self.index.is_real[where] == is_real]]).tolist()
            if ids and table is not None:
                found |= {(is_real, row_id): row for row_id, row in _read(table, source, ids).items()}
        keys = zip(self.index.is_real[where].tolist(), self.index.row_id[where].tolist())
        return [self._item(is_real, found[is_real, row_id]) for is_real, row_id in keys]

    def _item(self, is_real: bool, row: Mapping[str, Any]) -> dict[str, Any]:
        pixels = letterbox(decode_png(row["image"]), self.size)
        pixels = as_grey(pixels)[:, :, None] if self.channels == "grey" else as_rgb(pixels)
        mask = np.zeros((self.size, self.size), np.int64)
        if row["mask"] is not None:
            mask[:] = letterbox(decode_png(row["mask"]), self.size, is_mask=True)
        item = {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255,
            "mask": torch.from_numpy(mask),
            "has_mask": row["mask"] is not None,
            "label": row["label"],
            "is_real": is_real,
            "id": row["id"],
        }
        return item if self.transform is None else self.transform(item)


class WeightedRows(Sampler[int]):
    """Draws rows with replacement: first the source, then the class, then a row of both, evenly.

    A source is drawn in proportion to its weight, a class to its weight within the source; without weights, to
    the number of rows. A source that `source_weights` does not name is not drawn; a class that `class_weights` does
    not name weighs 1; weights of classes that a source lacks are shared out among those it has. The draws of an epoch
    depend on (seed, epoch) alone; call `set_epoch` as with PyTorch's DistributedSampler.
    """

    def __init__(
        self,
        dataset: LanceImages,
        *,
        source_weights: Mapping[Source, float] | None = None,
        class_weights: Mapping[str, float] | None = None,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        """`num_samples` per epoch, by default the number of rows.

        Raises:
            ValueError: an unknown source or class, a weight that is negative or not finite, a weighted source
                without rows, or nothing with a weight above zero.
        """
        self.num_samples = len(dataset) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples {num_samples} must be at least 1")
        self._seed = seed
        self._epoch = 0
        _check_weights("source_weights", source_weights, _SOURCES)
        _check_weights("class_weights", class_weights, dataset.class_names)
        self._cells: list[np.ndarray] = []
        shares: list[float] = []
        for source in _SOURCES:
            for share, rows in _cells(dataset, source, source_weights, class_weights):
                shares.append(share)
                self._cells.append(rows)
        if not sum(shares) > 0:
            raise ValueError("weights: no source and class with rows has a weight above zero")
        self._shares = np.asarray(shares) / sum(shares)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration draws."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        rng = random_generator(f"weighted-rows/{self._seed}", f"epoch/{self._epoch}")
        cells = rng.choice(len(self._cells), size=self.num_samples, p=self._shares)
        places = rng.random(self.num_samples)
        for cell, place in zip(cells.tolist(), places.tolist()):
            rows = self._cells[cell]
            yield int(rows[int(place * len(rows))])


def _cells(
    dataset: LanceImages,
    source: Source,
    source_weights: Mapping[Source, float] | None,
    class_weights: Mapping[str, float] | None,
) -> Iterator[tuple[float, np.ndarray]]:
    """(probability weight, rows) of every class that the source has."""
    index = dataset.index
    is_member = index.is_real == (source == "real")
    total = int(is_member.sum())
    weight = float(total) if source_weights is None else float(source_weights.get(source, 0.0))
    if not weight:
        return
    if not total:
        raise ValueError(f"source_weights: {source} has weight {weight}, but the dataset has no such row")
    members = {
        name: np.flatnonzero(is_member & (index.label == label))
        for label, name in enumerate(dataset.class_names)
    }
    shares = {
        name: 0.0
        if not rows.size
        else float(rows.size if class_weights is None else class_weights.get(name, 1.0))
        for name, rows in members.items()
    }
    whole = sum(shares.values())
    for name, rows in members.items():
        if shares[name]:
            yield weight * shares[name] / whole, rows


def _check_weights(what: str, weights: Mapping[Any, float] | None, known: Sequence[str]) -> None:
    for name, weight in (weights or {}).items():
        if name not in known:
            raise ValueError(f"{what}: {name!r} is none of {', '.join(known)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{what}: {name}={weight} must be a number of at least 0")


def _index(selection: Selection, split: str) -> RowIndex:
    parts: list[tuple[bool, np.ndarray, np.ndarray]] = []
    if selection.real is not None:
        parts += _rows(selection.real, True, f"{selection.real_filter} AND split = '{split}'")
    if split == "train" and selection.row_ids is None:
        parts += _rows(selection.synthetic, False, selection.synthetic_filter)
    elif split == "train" and selection.row_ids is not None:
        for start in range(0, len(selection.row_ids), _AT_ONCE):
            ids = ", ".join(map(str, selection.row_ids[start : start + _AT_ONCE]))
            parts += _rows(selection.synthetic, False, f"_rowid IN ({ids})")
    sizes = [len(rows) for _, rows, _ in parts]
    return RowIndex(
        is_real=np.repeat(np.array([is_real for is_real, _, _ in parts], bool), sizes),
        row_id=np.concatenate([rows for _, rows, _ in parts] or [np.empty(0, np.int64)]),
        label=np.concatenate([labels for _, _, labels in parts] or [np.empty(0, np.int64)]),
    )


def _rows(table: Table, is_real: bool, filter: str) -> list[tuple[bool, np.ndarray, np.ndarray]]:
    return [
        (
            is_real,
            batch.column("_rowid").to_numpy().astype(np.int64),
            batch.column("label").to_numpy().astype(np.int64),
        )
        for batch in table.batches(["_rowid", "label"], filter, batch_size=_AT_ONCE)
    ]


def _read(table: Table, source: Source, row_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    key = _KEYS[source]
    found = table.read([*_COLUMNS, key], f"_rowid IN ({', '.join(map(str, row_ids))})")
    return {row["_rowid"]: {**row, "id": row[key]} for row in found.to_pylist()}
