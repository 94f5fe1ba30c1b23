"""From a request index to a finished row: the stages of the stream as plain callables.

Each takes and returns Arrow tables and knows nothing of Ray, so the same code runs in a pool of actors, in a
plain loop and under a profiler:

    RequestStage    request indices → requests with mask, background and prompt   (CPU)
    SynthesisStage  requests → raw pixels                                         (GPU)
    FinishStage     raw pixels → embedded, filtered, encoded rows                 (CPU or a share of a GPU)

A request that fails keeps its place in the table with `error` and `error_reason` set, and passes the later
stages untouched: nothing in the middle of a stream is dropped or stops the others.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from factory.curation.filters import FilterBatch, first_reasons
from factory.curation.lesion_crops import embed_crops
from factory.curation.mask_fidelity import FittedMaskFidelity
from factory.diffusion.sampling import Sampling
from factory.embedding import ImageEmbedder
from factory.generators.latent_diffusion import LatentDiffusion
from factory.imaging import decode_png, encode_png
from factory.version import code_version
from schemas.identity import random_generator
from schemas.request import SynthesisPlan
from schemas.sample import QuarantineReason, RejectReason, synthetic_schema

if TYPE_CHECKING:
    from factory.synthesis.resegmentation import Resegmenter

_ERRORS = [pa.field("error", pa.string()), pa.field("error_reason", pa.string())]

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("request_index", pa.int64()),
        pa.field("request_id", pa.string()),
        pa.field("requested_mask", pa.binary()),
        pa.field("prompt", pa.string()),
        pa.field("background", pa.binary()),
        pa.field("background_id", pa.string()),
        pa.field("group_id", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("source_parameters", pa.string()),
        *_ERRORS,
    ]
)
PIXEL_SCHEMA = pa.schema(
    [
        *REQUEST_SCHEMA,
        pa.field("pixels", pa.large_binary(), metadata={"description": "uint8 (R, R[, 3]), raw bytes"}),
        pa.field(
            "mask_pixels", pa.large_binary(), metadata={"description": "uint8 (R, R) label map, raw bytes"}
        ),
        pa.field("annotation_failed", pa.bool_()),
        pa.field("channel_spread", pa.float32()),
        pa.field("batch_size", pa.int32()),
        pa.field(
            "seconds", pa.float32(), metadata={"description": "this image's share of its batch", "unit": "s"}
        ),
        pa.field("started", pa.float64(), metadata={"description": "when its batch began", "unit": "s"}),
    ]
)


def stream_schema(embedding_dim: int) -> pa.Schema:
    """What leaves the last stage: a synthetic row and, for the job's accounts, seconds and errors."""
    accounts = [pa.field("seconds", pa.float32()), pa.field("started", pa.float64())]
    return pa.schema([*synthetic_schema(embedding_dim), *accounts, *_ERRORS])


ACCOUNTS = ("seconds", "started", "error", "error_reason")
"""Columns of `stream_schema` that are not of the table."""


class FittedMaskSource(Protocol):
    """A mask source fitted to the training rows."""

    def draw(self, request: Any, rng: np.random.Generator) -> Any: ...


class FittedBackgroundSource(Protocol):
    """A source of backgrounds fitted to the training rows."""

    def draw(self, request: Any, rng: np.random.Generator, mask: np.ndarray) -> Any: ...


class FittedPromptSource(Protocol):
    """A prompt source fitted to the training rows."""

    def draw(self, request: Any, rng: np.random.Generator, mask: np.ndarray | None) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class RequestStage:
    """Fills in mask, background and prompt of each request, from generators seeded by its request_id."""

    plan: SynthesisPlan
    masks: FittedMaskSource | None
    prompts: FittedPromptSource
    backgrounds: FittedBackgroundSource | None = None

    def __call__(self, indices: Iterable[int]) -> pa.Table:
        """Request indices → table of `REQUEST_SCHEMA`, in the order given."""
        return pa.Table.from_pylist([self._row(int(index)) for index in indices], schema=REQUEST_SCHEMA)

    def _row(self, index: int) -> dict[str, Any]:
        request = self.plan.request_at(index)
        row: dict[str, Any] = {"request_index": index, "request_id": request.request_id, "prompt": ""}

        def rng(stream: str) -> np.random.Generator:
            return random_generator(request.request_id, stream)

        mask, parameters = None, {}
        try:
            if self.masks is not None:
                drawn = self.masks.draw(request, rng("mask"))
                mask, parameters["mask"] = drawn.mask, dict(drawn.parameters)
                row["requested_mask"] = encode_png(mask)
            if self.backgrounds is not None and mask is not None:
                found = self.backgrounds.draw(request, rng("background"), mask)
                parameters["background"] = dict(found.parameters)
                row |= {
                    "background": encode_png(found.image),
                    "background_id": found.background_id,
                    "group_id": found.group_id,
                    "licence": found.licence,
                }
            prompt = self.prompts.draw(request, rng("prompt"), mask)
            parameters["prompt"] = dict(prompt.parameters)
        except (ValueError, ArithmeticError) as error:
            return row | {"error": str(error), "error_reason": QuarantineReason.SOURCE_FAILED.value}
        return row | {
            "prompt": prompt.prompt,
            "source_parameters": json.dumps(parameters, sort_keys=True),
        }


class Intents(Protocol):
    """What an actor writes down before it runs a batch, so that a death can be traced to one request."""

    def begin(self, request_ids: Sequence[str]) -> list[list[str]]: ...

    def tries(self, request_id: str) -> int: ...

    def finish(self, request_ids: Sequence[str]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SynthesizerSettings:
    """What a Synthesizer is built from, small enough to send to every actor."""

    generator: LatentDiffusion
    checkpoint: str | None
    adapters: tuple[str, ...] = ()
    sampling: Sampling
    guidances: tuple[Any, ...] = ()
    annotator: Any
    colour: bool = False
    feather: float = 0.0
    batch_size: int
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    num_threads: int | None = None

    def stage(self, plan: SynthesisPlan, intents: Intents | None = None) -> "SynthesisStage":
        """The stage, loaded where it is to run."""
        return SynthesisStage(self, plan, intents)


class SynthesisStage:
    """Holds a Synthesizer; turns requests into raw pixels."""

    def __init__(
        self, settings: SynthesizerSettings, plan: SynthesisPlan, intents: Intents | None = None
    ) -> None:
        from factory.synthesis.synthesizer import Synthesizer

        self.plan = plan
        self.intents = intents
        self.synthesizer = Synthesizer(
            settings.generator,
            None if settings.checkpoint is None else Path(settings.checkpoint),
            settings.sampling,
            settings.guidances,
            settings.annotator,
            colour=settings.colour,
            feather=settings.feather,
            adapters=tuple(Path(adapter) for adapter in settings.adapters),
            batch_size=settings.batch_size,
            device=settings.device,
            dtype=settings.dtype,
            compile=settings.compile,
            num_threads=settings.num_threads,
        )

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Table of `REQUEST_SCHEMA` → table of `PIXEL_SCHEMA`, in the same order."""
        rows = requests.to_pylist()
        todo = {row["request_id"]: row for row in rows if row["error"] is None}
        groups = self.intents.begin(list(todo)) if self.intents and todo else [list(todo)]
        done: dict[str, dict[str, Any]] = {}
        for group in groups:
            done |= self._make([todo[request_id] for request_id in group])
            if self.intents:
                self.intents.finish(group)
        for request_id in todo.keys() - done.keys():
            done[request_id] = self._given_up(request_id)
        return pa.Table.from_pylist(
            [row | done.get(row["request_id"], {}) for row in rows], schema=PIXEL_SCHEMA
        )

    def _given_up(self, request_id: str) -> dict[str, Any]:
        tries = self.intents.tries(request_id) if self.intents else 0
        message = f"the process died {tries} times with this request alone in its batch"
        return {"error": message, "error_reason": QuarantineReason.PROCESS_DIED.value}

    def _make(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        from factory.synthesis.synthesizer import PreparedRequest

        prepared = [
            PreparedRequest(
                request=self.plan.request_at(row["request_index"]),
                requested_mask=_decoded(row["requested_mask"]),
                prompt=row["prompt"],
                background=_decoded(row["background"]),
            )
            for row in rows
        ]
        results: dict[str, dict[str, Any]] = {}
        started = time.time()
        for item in self.synthesizer.synthesize(prepared):
            if item.image is None:
                reason = item.reason or QuarantineReason.GENERATION_FAILED
                results[item.request_id] = {"error": item.error or "no image", "error_reason": reason.value}
                continue
            results[item.request_id] = {
                "pixels": item.image.tobytes(),
                "mask_pixels": None if item.mask is None else item.mask.tobytes(),
                "annotation_failed": item.annotation_failed,
                "channel_spread": item.channel_spread,
                "batch_size": len(rows),
                "seconds": item.seconds,
                "started": started,
            }
        return results


def _decoded(png: bytes | None) -> np.ndarray | None:
    return None if png is None else decode_png(png)


@dataclass(frozen=True, kw_only=True)
class FinishSettings:
    """What makes rows complete: embedder, fitted filters and the constants of the plan."""

    plan: SynthesisPlan
    embedder: ImageEmbedder
    filters: tuple[Any, ...]
    sampling: Sampling
    resolution: int
    colour: bool = False
    licence: str
    device: str = "cpu"
    num_threads: int | None = None

    def stage(self) -> "FinishStage":
        """The stage, loaded where it is to run."""
        return FinishStage(self)


def _resegmenter(settings: FinishSettings) -> "Resegmenter | None":
    """The segmenter that a filter judges by, where one does."""
    folders = {item.segmenter for item in settings.filters if isinstance(item, FittedMaskFidelity)}
    if not folders:
        return None
    from factory.synthesis.resegmentation import Resegmenter

    (folder,) = folders  # one gate per job
    return Resegmenter(folder, device=settings.device)


class FinishStage:
    """Holds an embedder, and a segmenter where a filter wants one; embeds, scores, marks and encodes. Nothing is dropped: filters mark."""

    def __init__(self, settings: FinishSettings) -> None:
        self.settings = settings
        self.embedder = settings.embedder.load(device=settings.device, num_threads=settings.num_threads)
        self.resegmenter = _resegmenter(settings)
        self.schema = stream_schema(self.embedder.spec.dim)

    def __call__(self, pixels: pa.Table) -> pa.Table:
        """Table of `PIXEL_SCHEMA` → table of `stream_schema`, in the same order."""
        rows = pixels.to_pylist()
        size = self.settings.resolution
        made = [row for row in rows if row["error"] is None]
        shape = (size, size, 3) if self.settings.colour else (size, size)
        images = [np.frombuffer(row["pixels"], np.uint8).reshape(shape) for row in made]
        masks = [
            None
            if row["mask_pixels"] is None
            else np.frombuffer(row["mask_pixels"], np.uint8).reshape(size, size)
            for row in made
        ]
        embeddings = (
            self.embedder.embed(images) if made else np.zeros((0, self.embedder.spec.dim), np.float32)
        )
        requests = [self.settings.plan.request_at(row["request_index"]) for row in rows]
        labels = np.array(
            [r.label_index for r, row in zip(requests, rows) if row["error"] is None], dtype=np.int64
        )
        scores, reasons = self._mark(made, images, masks, labels, embeddings) if made else ([], [])
        finished = iter(zip(images, masks, embeddings, scores, reasons))
        table = []
        for request, row in zip(requests, rows):
            out = self._constants() | {
                "request_id": request.request_id,
                "request_index": request.request_index,
                "attempt": request.attempt,
                "label": request.label_index,
                "label_name": request.label,
                "prompt": row["prompt"],
                "requested_mask": row["requested_mask"],
                "background_id": row["background_id"],
                "derived": row["background_id"] is not None,
                "group_id": row["group_id"],
                "licence": row["licence"] or self.settings.licence,
                "source_parameters": row["source_parameters"] or "{}",
                "batch_size": row["batch_size"] or 0,
                "error": row["error"],
                "error_reason": row["error_reason"],
                "seconds": row["seconds"] or 0.0,
                "started": row["started"],
            }
            if row["error"] is None:
                image, mask, embedding, score, reason = next(finished)
                out |= {
                    "image": encode_png(image),
                    "mask": None if mask is None else encode_png(mask),
                    "embedding": embedding.tolist(),
                    "scores": list((score | {"channel_spread": row["channel_spread"]}).items()),
                    "stream_reject_reason": reason,
                }
            table.append(out)
        return pa.Table.from_pylist(table, schema=self.schema)

    def _mark(
        self,
        rows: list[dict[str, Any]],
        images: list[np.ndarray],
        masks: list[np.ndarray | None],
        labels: np.ndarray,
        embeddings: np.ndarray,
    ) -> tuple[list[dict[str, float]], list[str | None]]:
        """Scores of every filter, and the first reason, for each image: a failed annotation comes before them."""
        batch = FilterBatch(
            images=images,
            requested_masks=[_decoded(row["requested_mask"]) for row in rows],
            masks=masks,
            labels=labels,
            embeddings=embeddings,
            crop_embeddings=self._embed_crops(images, masks),
            segmented_masks=None if self.resegmenter is None else self.resegmenter.segment(images),
        )
        columns: dict[str, np.ndarray] = {}
        for item in self.settings.filters:
            columns |= item.score(batch)
        scores = [{name: float(values[i]) for name, values in columns.items()} for i in range(len(rows))]
        reasons = first_reasons(self.settings.filters, columns, len(rows))
        failed = RejectReason.ANNOTATION_FAILED
        reasons = [failed if row["annotation_failed"] else reason for row, reason in zip(rows, reasons)]
        return scores, [None if reason is None else reason.value for reason in reasons]

    def _embed_crops(self, images: list[np.ndarray], masks: list[np.ndarray | None]) -> np.ndarray | None:
        """Embeddings of the lesion crops where a filter looks at them."""
        if not any(getattr(item, "needs_crops", False) for item in self.settings.filters):
            return None
        return embed_crops(images, masks, self.embedder.embed, self.embedder.spec.dim)

    def _constants(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "plan_id": settings.plan.plan_id,
            "recipe": settings.plan.recipe,
            "fingerprint": settings.plan.fingerprint,
            "weights": list(settings.plan.weights.items()),
            "seed": settings.plan.seed,
            "image": b"",
            "height": settings.resolution,
            "width": settings.resolution,
            "split": "train",
            "num_inference_steps": settings.sampling.num_inference_steps,
            "guidance_scale": settings.sampling.guidance_scale,
            "embedding": [0.0] * self.embedder.spec.dim,
            "code_version": code_version(),
        }
