"""The caption table: one row per caption of a real image, and per new one for synthesis."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from schemas.identity import hash_parts

Kind = Literal["real", "expanded", "error"]
CAPTION_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("attributes", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("captioner", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=True),
    ],
    metadata={"schema_version": "captions/1"},
)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption.

    Attributes:
        image_id: of the real image; of an expanded caption a hash of its class and text.
        split: of the real image; "train" for expanded ones, which are made from training captions alone.
        label_name: class.
        caption: text, without the prefix; empty for kind "error".
        kind: "real", "expanded", or "error" (the captioner failed; no source reads it).
        attributes: what the text says, where it is known, and the mask's geometry.
        captioner: what wrote it.
        error: why there is none.
    """

    image_id: str
    split: str = "train"
    label_name: str
    caption: str
    kind: Kind = "real"
    attributes: Mapping[str, str] = field(default_factory=dict)
    captioner: str
    error: str | None = None

    def to_row(self) -> dict[str, object]:
        """A row of `CAPTION_SCHEMA`."""
        return {
            "image_id": self.image_id,
            "split": self.split,
            "label_name": self.label_name,
            "caption": self.caption,
            "kind": self.kind,
            "attributes": list(self.attributes.items()),
            "captioner": self.captioner,
            "error": self.error,
        }


def write_captions(uri: str, captions: Iterable[Caption], *, overwrite: bool = False) -> None:
    """Write the table in one commit, sorted by kind, class, image and text.

    Raises:
        FileExistsError: a table is there and `overwrite` is not asked for.
    """
    from factory.storage import write_table

    ordered = sorted(captions, key=lambda c: (c.kind, c.label_name, c.image_id, c.caption))
    data = pa.Table.from_pylist([caption.to_row() for caption in ordered], schema=CAPTION_SCHEMA)
    write_table(uri, data, CAPTION_SCHEMA, overwrite=overwrite)


def read_captions(uri: str) -> list[Caption]:
    """Every caption of a table.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: it is no table of captions.
    """
    from factory.storage import open_table

    table = open_table(uri)
    if not set(CAPTION_SCHEMA.names) <= set(table.schema.names):
        raise ValueError(
            f"{uri} is not a table of captions; `factory caption --real REAL --out {uri}` makes one"
        )
    rows = table.read(CAPTION_SCHEMA.names).to_pylist()
    return [Caption(**{**row, "attributes": dict(row["attributes"] or ())}) for row in rows]


def expanded_caption(
    label: str, text: str, captioner: str, attributes: Mapping[str, str] | None = None
) -> Caption:
    """A new caption for synthesis, identified by class and text."""
    return Caption(
        image_id=hash_parts("caption", label, text),
        label_name=label,
        caption=text,
        kind="expanded",
        attributes=attributes or {},
        captioner=captioner,
    )


def by_label(captions: Sequence[Caption], kind: Kind, *, split: str = "train") -> dict[str, list[Caption]]:
    """Captions of a kind and split by class, in the order given."""
    found: dict[str, list[Caption]] = {}
    for caption in captions:
        if caption.kind == kind and caption.split == split:
            found.setdefault(caption.label_name, []).append(caption)
    return found
