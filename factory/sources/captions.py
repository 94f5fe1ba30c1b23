"""Prompts from a caption table: a fixed prefix with placeholder tokens, and what a captioner wrote."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from factory import geometry
from factory.imaging import TrainingRow
from factory.sources.prompts import PromptDraw
from factory.sources.rows import rows_digest
from schemas.identity import execution_field, hash_parts
from schemas.request import SynthesisRequest

_COLUMNS = ["image_id", "split", "label_name", "caption", "kind", "attributes"]
_GEOMETRY = ("mask.area", "mask.x", "mask.y")


@dataclass(frozen=True, kw_only=True)
class CaptionTable:
    """DermPrompt: a prefix whose <words> are placeholder tokens, then a caption (Shentu et al. 2025, §2.2 and 2.3).

    Training rows get the prefix and their own caption; a fixed share of them, chosen by image_id, the prefix alone
    (20 % in the authors' code, which draws anew in every step: here a row's prompt is asked for once). Requests get
    an expanded caption of their class, or, where the table has none, one of a training image of the class.
    Placeholders also take the place of their words inside the caption, as in the authors' code.

    Where the requested mask is known, the caption is one of the `neighbours` whose own mask was most like it in area and
    position, so that text and mask do not contradict each other (the paper draws them independently).

    Attributes:
        captions: table written by `factory caption`.
        prefix: stands first, so that truncation never reaches it.
        prefix_only: share of the training images that are trained with the prefix alone.
        neighbours: captions among which one is chosen; 0 to draw from the whole class.
    """

    captions: str = execution_field("")
    prefix: str = "An image of <lesion> on <skin>."
    prefix_only: float = 0.2
    neighbours: int = 12

    def __post_init__(self) -> None:
        if not self.prefix.strip():
            raise ValueError(
                "CaptionTable.prefix: want a text, for example 'An image of <lesion> on <skin>.'"
            )
        if not 0.0 <= self.prefix_only <= 1.0:
            raise ValueError(f"CaptionTable.prefix_only={self.prefix_only}: want 0 … 1")
        if self.neighbours < 0:
            raise ValueError(f"CaptionTable.neighbours={self.neighbours}: want 0 or more")

    def compose(self, caption: str) -> str:
        """The prompt of a caption: prefix, then the caption with placeholders for their words; "" gives the prefix."""
        for word in re.findall(r"<(\w+)>", self.prefix):
            caption = re.sub(rf"(?<![\w<]){word}(?![\w>])", f"<{word}>", caption)
        return f"{self.prefix} {caption}".strip()

    def weights(self) -> dict[str, str]:
        """{"captions": digest of what the table says}, whatever its path and the order of its rows.

        Raises:
            FileNotFoundError: there is no table.
        """
        lines = sorted(
            (
                row["kind"],
                row["image_id"],
                row["label_name"],
                row["split"],
                row["caption"],
                str(sorted(row["attributes"])),
            )
            for row in self._read()
        )
        return {"captions": hash_parts("captions", *(part for line in lines for part in line))}

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedCaptionTable":
        """The captions, checked to cover the rows.

        Raises:
            FileNotFoundError: there is no table.
            ValueError: images without a caption; names how many, and what makes them.
        """
        table = self._read()
        real = {row["image_id"]: row["caption"] for row in table if row["kind"] == "real"}
        missing = sorted(row.image_id for row in rows if row.image_id not in real)
        if missing:
            raise ValueError(
                f"prompts.captions: {self.captions} has no caption for {len(missing)} of {len(rows)} images (first: "
                f"image_id {missing[0]}); run `factory caption --real REAL --out {self.captions} --overwrite`"
            )
        known = {row.image_id for row in rows}
        drawn: dict[str, list[dict[str, Any]]] = {}
        for label in sorted({row.label_name for row in rows}):
            of_label = [row for row in table if row["label_name"] == label]
            expanded = [row for row in of_label if row["kind"] == "expanded"]
            drawn[label] = expanded or [
                row for row in of_label if row["kind"] == "real" and row["image_id"] in known
            ]
        return FittedCaptionTable(
            source=self,
            real=real,
            drawn={label: _Pool.of(entries) for label, entries in drawn.items()},
            fitted_on=rows_digest(rows),
        )

    def _read(self) -> list[dict[str, Any]]:
        from factory.storage import open_table

        if not self.captions:
            raise FileNotFoundError(
                "prompts.captions: no caption table is named; make one by `factory caption --real REAL --out "
                "captions.lance` and give it as --prompts.captions captions.lance"
            )
        try:
            table = open_table(self.captions)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"prompts.captions: no table at {self.captions}; `factory caption --real REAL --out {self.captions}` "
                "makes it"
            ) from error
        missing = [name for name in _COLUMNS if name not in table.schema.names]
        if missing:
            raise ValueError(
                f"prompts.captions: {self.captions} has no column {', '.join(missing)}; `factory caption` makes such tables"
            )
        return table.read(_COLUMNS, filter="kind != 'error'").to_pylist()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    """Captions of one class, ordered by text; `shapes` (n, 3) holds log-area and centroid, NaN where unknown."""

    image_ids: tuple[str, ...]
    captions: tuple[str, ...]
    kinds: tuple[str, ...]
    shapes: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "_Pool":
        ordered = sorted(rows, key=lambda row: (row["caption"], row["image_id"]))
        shapes = [_shape_of(dict(row["attributes"] or ())) for row in ordered]
        return cls(
            image_ids=tuple(row["image_id"] for row in ordered),
            captions=tuple(row["caption"] for row in ordered),
            kinds=tuple(row["kind"] for row in ordered),
            shapes=np.array(shapes, np.float64).reshape(-1, 3),
        )

    def like(self, mask: np.ndarray | None, count: int) -> np.ndarray:
        """Places of the captions to choose from: the `count` nearest to the mask, or all."""
        everything = np.arange(len(self.captions))
        measured = None if mask is None or not count else geometry.moments(mask)
        known = np.flatnonzero(np.isfinite(self.shapes).all(axis=1))
        if measured is None or mask is None or not len(known):
            return everything
        height, width = mask.shape
        shape = [
            math.log(measured.area / mask.size), (measured.x + 0.5) / width, (measured.y + 0.5) / height
        ]  # fmt: skip
        spread = self.shapes[known].std(axis=0)
        scaled = (self.shapes[known] - shape) / np.where(spread > 1e-6, spread, 1.0)
        return known[np.argsort((scaled**2).sum(axis=1), kind="stable")[:count]]


def _shape_of(attributes: Mapping[str, str]) -> list[float]:
    if any(name not in attributes for name in _GEOMETRY):
        return [math.nan] * 3
    area, x, y = (float(attributes[name]) for name in _GEOMETRY)
    return [math.log(max(area, 1e-6)), x, y]


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedCaptionTable:
    """`CaptionTable` with its captions: see there."""

    source: CaptionTable
    real: Mapping[str, str] = field(repr=False)
    drawn: Mapping[str, _Pool] = field(repr=False)
    fitted_on: str

    def draw(
        self, request: SynthesisRequest, rng: np.random.Generator, mask: np.ndarray | None
    ) -> PromptDraw:
        """The prompt of a request.

        Raises:
            ValueError: the label has no caption.
        """
        pool = self.drawn.get(request.label)
        if pool is None or not pool.captions:
            raise ValueError(f"label {request.label!r}: {self.source.captions} has no caption of it")
        places = pool.like(mask, self.source.neighbours)
        chosen = int(places[rng.integers(len(places))])
        return PromptDraw(
            prompt=self.source.compose(pool.captions[chosen]),
            parameters={
                "prompt_source": "caption_table",
                "caption_kind": pool.kinds[chosen],
                "caption_of": pool.image_ids[chosen],
            },
        )

    def describe(self, row: TrainingRow) -> str:
        """The prompt that a row is trained with: the same at every call.

        Raises:
            ValueError: the table has no caption for the image.
        """
        if row.image_id not in self.real:
            raise ValueError(
                f"prompts.captions: {self.source.captions} has no caption for image_id {row.image_id}; run "
                f"`factory caption --real REAL --out {self.source.captions} --overwrite`"
            )
        if _fraction(row.image_id) < self.source.prefix_only:
            return self.source.compose("")
        return self.source.compose(self.real[row.image_id])


def _fraction(image_id: str) -> float:
    """A number in [0, 1) that belongs to an image."""
    return int.from_bytes(hashlib.sha256(f"prefix/{image_id}".encode()).digest()[:7], "big") / 2**56
