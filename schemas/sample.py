"""Rows: real samples, synthetic samples, and why a row was rejected.

The pyarrow schemas are the contract between every part of the factory. Units and shapes stand in each
field's metadata. Embeddings have the dimension of the table's embedder, so the schemas are functions of it.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, Self

import pyarrow as pa

SCHEMA_VERSION = "1"
SPLITS = ("train", "val", "test", "reserve")
"""Of real rows. `reserve`: real rows that no generator, filter or task model sees, save the oracle arm of an evaluation
and the held-out set of a memorisation test."""


class RejectReason(enum.StrEnum):
    """Why a synthetic row is not accepted. Rejected rows stay in the table."""

    EMPTY_MASK = "empty_mask"
    MASK_TOO_SMALL = "mask_too_small"
    MASK_TOO_LARGE = "mask_too_large"
    MASK_FRAGMENTED = "mask_fragmented"
    MASK_TOUCHES_BORDER = "mask_touches_border"
    BLANK_IMAGE = "blank_image"
    TOO_SIMILAR_TO_REAL = "too_similar_to_real"
    TOO_FAR_FROM_REAL = "too_far_from_real"
    MASK_NOT_OBEYED = "mask_not_obeyed"
    DUPLICATE_OF_SYNTHETIC = "duplicate_of_synthetic"
    NEAR_COPY_OF_REAL = "near_copy_of_real"
    ANNOTATION_FAILED = "annotation_failed"


class QuarantineReason(enum.StrEnum):
    """Why a request has no row: it could not be made."""

    SOURCE_FAILED = "source_failed"
    PROCESS_DIED = "process_died"
    OUT_OF_MEMORY = "out_of_memory"
    GENERATION_FAILED = "generation_failed"
    NOT_FINITE = "not_finite"


def _field(name: str, kind: pa.DataType, about: str, *, nullable: bool = False, unit: str = "") -> pa.Field:
    metadata = {"description": about} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


def _embedding(dim: int, nullable: bool) -> pa.Field:
    return _field("embedding", pa.list_(pa.float32(), dim), f"unit-norm image embedding, ({dim},) float32",
                  nullable=nullable)  # fmt: skip


_KEY_VALUES = pa.map_(pa.string(), pa.string())


def real_schema(embedding_dim: int) -> pa.Schema:
    """Schema of `real.lance`."""
    return pa.schema(
        [
            _field("image_id", pa.string(), "hash of the decoded pixels, mask and label: 32 hex characters"),
            _field("dataset", pa.string(), "name of the layout or dataset"),
            _field("source_path", pa.string(), "path relative to the source folder"),
            _field("patient_id", pa.string(), "as the dataset gives it", nullable=True),
            _field("group_id", pa.string(), "patient and near-duplicate group; never spans two splits"),
            _field("split", pa.string(), "train | val | test | reserve"),
            _field("label", pa.int32(), "index into the table's class names"),
            _field("label_name", pa.string(), "class name"),
            _field("image", pa.binary(), "PNG, uint8, (H, W) grey or (H, W, 3) RGB"),
            _field("mask", pa.binary(), "PNG, uint8 label map (H, W); 0 = background", nullable=True),
            _field("height", pa.int32(), "image height", unit="px"),
            _field("width", pa.int32(), "image width", unit="px"),
            _field("bit_depth", pa.int32(), "bits per channel of the stored image", unit="bit"),
            _field("photometric", pa.string(), "grey | rgb"),
            _field(
                "pixel_spacing", pa.float32(), "isotropic pixel size where known", nullable=True, unit="mm"
            ),
            _field("device", pa.string(), "scanner or camera where known", nullable=True),
            _field("has_marks", pa.bool_(), "calipers, text or Doppler colour burned in (heuristic)"),
            _field("attributes", _KEY_VALUES, "free descriptors, e.g. BI-RADS"),
            _field("licence", pa.string(), "licence of the source as far as known"),
            _field("allowed_use", pa.string(), "what the licence allows; 'unknown' where not known"),
            _embedding(embedding_dim, nullable=False),
        ],
        metadata={"schema_version": SCHEMA_VERSION},
    )


def synthetic_schema(embedding_dim: int) -> pa.Schema:
    """Schema of `synthetic.lance` as the stream writes it; `curation_schema` is added by curation."""
    return pa.schema(
        [
            _field("request_id", pa.string(), "hash of plan, label, ordinal and attempt: 32 hex characters"),
            _field("plan_id", pa.string(), "hash of recipe, weights, real rows, captions and seed"),
            _field("request_index", pa.int64(), "unique within a plan"),
            _field("attempt", pa.int32(), "0, then 1, 2, … for regenerations with a new seed"),
            _field("recipe", pa.string(), "recipe name"),
            _field("fingerprint", pa.string(), "hash of the recipe's parts that change pixels or masks"),
            _field("weights", _KEY_VALUES, "digest of each weight set used"),
            _field("seed", pa.int64(), "the operator's seed"),
            _field("label", pa.int32(), "index into the table's class names"),
            _field("label_name", pa.string(), "class name"),
            _field("prompt", pa.string(), "text condition, '' where none"),
            _field(
                "requested_mask", pa.binary(), "PNG, uint8 label map (H, W): the condition", nullable=True
            ),
            _field("mask", pa.binary(), "PNG, uint8 label map (H, W): the label", nullable=True),
            _field("image", pa.binary(), "PNG, uint8, (H, W) grey or (H, W, 3) RGB"),
            _field("height", pa.int32(), "image height", unit="px"),
            _field("width", pa.int32(), "image width", unit="px"),
            _field("background_id", pa.string(), "image_id of the real background, if any", nullable=True),
            _field("derived", pa.bool_(), "true where pixels of a real image remain"),
            _field("split", pa.string(), "train; inherited from the background where derived"),
            _field("licence", pa.string(), "inherited from the real rows used"),
            _field("group_id", pa.string(), "the background's group where derived", nullable=True),
            _field("source_parameters", pa.string(), "JSON: what each source drew for this request"),
            _field("num_inference_steps", pa.int32(), "denoising steps"),
            _field("guidance_scale", pa.float32(), "classifier-free guidance scale"),
            _field("batch_size", pa.int32(), "images in the batch it was made in (provenance only)"),
            _embedding(embedding_dim, nullable=False),
            _field("scores", pa.map_(pa.string(), pa.float32()), "every score of the stream's filters"),
            _field("stream_reject_reason", pa.string(), "verdict of the per-row filters", nullable=True),
            _field("code_version", pa.string(), "version of this software"),
        ],
        metadata={"schema_version": SCHEMA_VERSION},
    )


def curation_schema() -> pa.Schema:
    """Columns that curation alone writes. Null means: not curated yet, the stream's verdict holds."""
    return pa.schema(
        [
            _field("reject_reason", pa.string(), "verdict after curation", nullable=True),
            _field("accepted", pa.bool_(), "verdict after curation", nullable=True),
            _field("duplicate_of", pa.string(), "request_id of the kept member", nullable=True),
            _field("nearest_real", pa.string(), "image_id of the nearest real training image", nullable=True),
            _field(
                "nearest_real_similarity", pa.float32(), "cosine of the embeddings, -1 … 1", nullable=True
            ),
        ]
    )


class _Row:
    """Conversion between a dataclass and one row of its Arrow schema."""

    def to_row(self) -> dict[str, Any]:
        """A plain dictionary that `pa.Table.from_pylist` takes."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {
            name: list(value.items()) if isinstance(value, Mapping) else value for name, value in row.items()
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `to_row`; columns the dataclass does not have are ignored.

        Raises:
            ValueError: a column without default is missing.
        """
        values = {}
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if item.name in row:
                value = row[item.name]
                is_mapping = item.name in ("attributes", "weights", "scores")
                values[item.name] = dict(value or ()) if is_mapping else value
        missing = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.name not in values and f.default is f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{cls.__name__}: column(s) {', '.join(missing)} missing from the row")
        if isinstance(values.get("embedding"), list):
            values["embedding"] = tuple(values["embedding"])
        return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealSample(_Row):
    """One annotated real image; see `real_schema` for units and shapes."""

    image_id: str
    dataset: str
    source_path: str
    patient_id: str | None = None
    group_id: str
    split: str
    label: int
    label_name: str
    image: bytes
    mask: bytes | None
    height: int
    width: int
    bit_depth: int = 8
    photometric: str = "grey"
    pixel_spacing: float | None = None
    device: str | None = None
    has_marks: bool = False
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str
    allowed_use: str
    embedding: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} is none of {', '.join(SPLITS)} ({self.source_path})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSample(_Row):
    """One generated image; see `synthetic_schema` for units and shapes."""

    request_id: str
    plan_id: str
    request_index: int
    attempt: int
    recipe: str
    fingerprint: str
    weights: Mapping[str, str]
    seed: int
    label: int
    label_name: str
    prompt: str
    requested_mask: bytes | None
    mask: bytes | None
    image: bytes
    height: int
    width: int
    background_id: str | None = None
    derived: bool = False
    split: str = "train"
    licence: str
    group_id: str | None = None
    source_parameters: str = "{}"
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    embedding: tuple[float, ...]
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stream_reject_reason: str | None = None
    code_version: str


def table_of(samples: Iterable[_Row], schema: pa.Schema) -> pa.Table:
    """Rows as one Arrow table of exactly `schema`.

    Raises:
        pa.ArrowInvalid: a value does not fit its column.
    """
    return pa.Table.from_pylist([sample.to_row() for sample in samples], schema=schema)
