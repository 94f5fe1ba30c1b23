"""Add score columns to a synthetic table: what can be said of its rows against real training images, without a generator.

    factory score synthetic.lance --real real.lance
    factory score synthetic.lance --real real.lance --segmenter runs/segmenter --kinds mask_dice
    factory score synthetic.lance --real real.lance --kinds density,shape

Kinds, each a set of nullable float columns, written for every row (no image is rewritten):

    density     density (1 as dense as real images, 0 outside them), covers_real (real images it is the nearest cover of)
    shape       area_z, elongation_z, solidity_z of the lesion among the real ones of its class
    texture     sharpness_z, speckle_z of the image among the real ones
    mask_dice   mask_dice, mask_fidelity, segmented_area, size_quartile: the mask found by a segmenter of real images against
                the requested one (`factory train --part segmenter` makes the segmenter)

Everything is fitted on the train split of --real alone; its digest is recorded in the table. Scores are no verdicts: rows are
rejected by `factory synthesize --segmenter` as they are made, or by `factory curate` later.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from tyro.conf import Positional

from factory.curation.filter_batch import FilterBatch
from factory.curation.mask_fidelity import (
    MASK_SCORES,
    Acceptance,
    FittedMaskFidelity,
    MaskFidelity,
    acceptance,
    load_mask_fidelity,
)
from factory.curation.quality import (
    DENSITY_SCORES,
    SHAPE_SCORES,
    TEXTURE_SCORES,
    Coverage,
    EmbeddingDensity,
    ImageTexture,
    MaskShape,
)
from factory.imaging import decode_png, decode_rows, letterbox
from schemas.identity import hash_parts

if TYPE_CHECKING:
    import pyarrow as pa

    from factory.storage import Table
    from factory.synthesis.resegmentation import Resegmenter

KINDS: dict[str, tuple[str, ...]] = {
    "density": DENSITY_SCORES,
    "shape": SHAPE_SCORES,
    "texture": TEXTURE_SCORES,
    "mask_dice": MASK_SCORES,
}
"""Columns of each kind."""
_NEEDS = {
    "density": ("embedding",),
    "shape": ("mask", "label_name"),
    "texture": ("image", "height", "width"),
    "mask_dice": ("image", "requested_mask", "label", "label_name"),
}
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory score`."""

    table: Positional[str]
    """Synthetic table."""
    real: str
    """Real table whose training rows are compared with."""
    segmenter: str | None = None
    """Folder that `factory train --part segmenter` wrote; needed for mask_dice."""
    kinds: str | None = None
    """density, shape, texture, mask_dice, separated by commas; all that can be had by default."""
    k: int = 5
    """Real neighbours that a real image's ball reaches to, for density."""
    quantile: float = 0.05
    """Share of faithful images that the mask fidelity's verdict may cost; for the acceptance that is printed."""
    min_dice: float | None = None
    """A Dice below which that verdict rejects whatever real images reach."""
    device: str = "cpu"
    """Where the segmenter runs: cpu or cuda."""
    num_threads: int | None = None
    """Threads of the segmenter; all cores of this process by default, at most 8."""


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """What was added.

    Attributes:
        uri, version: the table and the version made.
        rows: that were scored.
        columns: written.
        spread: 5 %, 50 % and 95 % quantile of each column over the rows that have it.
        coverage: share of the real training images that have a synthetic one inside their ball; None without density.
        acceptance: of the mask fidelity by class and size quartile.
        notes: where the mask fidelity cannot judge.
        seconds: of the whole run.
    """

    uri: str
    version: int
    rows: int
    columns: Sequence[str]
    spread: Mapping[str, tuple[float, float, float]]
    coverage: float | None
    acceptance: Sequence[Acceptance]
    notes: Sequence[str]
    seconds: float


def run(args: Args) -> ScoreResult:
    """Score every row of the table's latest version.

    Raises:
        FileNotFoundError: a table or the segmenter is not there.
        ValueError: not a synthetic or real table, other embedders or classes, too few real rows to compare with.
        LeaseHeld: a curation of this table is running.
    """
    from factory.storage import open_table
    from factory.tracking import track

    start = time.perf_counter()
    table, real = open_table(args.table), open_table(args.real)
    kinds = _kinds(args)
    _check(args, kinds, table, real)
    with track(
        "score",
        execution_parameters=dataclasses.asdict(args),
        inputs={"synthetic": f"{args.table}@{table.version}", "real": f"{args.real}@{real.version}"},
    ) as tracked:
        scorer = Scorer(args, kinds, real)
        columns = ["request_id", *dict.fromkeys(name for kind in kinds for name in _NEEDS[kind])]
        for batch in table.batches(columns, batch_size=_ROWS_AT_ONCE):
            scorer.add(batch)
        values = scorer.values()
        table = table.write_columns(values, key="request_id")
        table.set_metadata(
            {f"scores.{kind}": json.dumps(scorer.record(kind), sort_keys=True) for kind in kinds}
        )
        names = [name for name in values.column_names if name != "request_id"]
        spread = {name: _spread(values[name].to_numpy()) for name in names}
        result = ScoreResult(
            uri=table.uri,
            version=table.version,
            rows=values.num_rows,
            columns=names,
            spread=spread,
            coverage=None if scorer.coverage is None else scorer.coverage.share,
            acceptance=scorer.acceptance(values),
            notes=[] if scorer.fidelity is None else scorer.fidelity.notes(),
            seconds=time.perf_counter() - start,
        )
        tracked.set({"table": args.table, "table_version": str(result.version)})
        metrics = {f"{name}.median": middle for name, (_, middle, _) in spread.items() if np.isfinite(middle)}
        tracked.metrics(metrics | ({} if result.coverage is None else {"coverage": result.coverage}))
    return result


def _kinds(args: Args) -> tuple[str, ...]:
    if args.kinds is None:
        return tuple(kind for kind in KINDS if kind != "mask_dice" or args.segmenter is not None)
    kinds = tuple(dict.fromkeys(word.strip() for word in args.kinds.split(",")))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"--kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    if "mask_dice" in kinds and args.segmenter is None:
        raise ValueError(
            "--kinds mask_dice: give --segmenter FOLDER, made by `factory train --part segmenter`"
        )
    return kinds


def _check(args: Args, kinds: Sequence[str], table: "Table", real: "Table") -> None:
    from factory.embedding import EmbedderSpec
    from factory.storage import class_names

    if not {"request_id", "stream_reject_reason"} <= set(table.schema.names):
        raise ValueError(f"{args.table} is not a synthetic table; `factory synthesize` makes one")
    if not {"image_id", "split", "group_id"} <= set(real.schema.names):
        raise ValueError(f"--real {args.real} is not a table of real images; `factory prepare` makes one")
    if class_names(table) != class_names(real):
        raise ValueError(
            f"classes of {args.table} are {', '.join(class_names(table))}, those of --real {', '.join(class_names(real))}"
        )
    if not real.count("split = 'train'"):
        raise ValueError(f"--real {args.real}: the train split is empty; run `factory prepare` again")
    if "density" in kinds:
        specs = [EmbedderSpec.from_json(each.metadata["embedder"]) for each in (table, real)]
        specs[0].check_same(specs[1], args.real)


class Scorer:
    """Scores batches of one synthetic table; what it compares with is fitted once, on real training rows."""

    def __init__(self, args: Args, kinds: Sequence[str], real: "Table") -> None:
        from factory.storage import class_names, real_digest

        self._args, self._kinds, self._real = args, kinds, real
        self._ids: list[str] = []
        self._labels: list[str] = []
        self._columns: dict[str, list[np.ndarray]] = {name: [] for kind in kinds for name in KINDS[kind]}
        self._textures: dict[int, ImageTexture] = {}
        self._shape = self._fit_shape() if "shape" in kinds else None
        self.coverage = Coverage(self._fit_density()) if "density" in kinds else None
        self.fidelity: FittedMaskFidelity | None = None
        self._resegmenter: Resegmenter | None = None
        if "mask_dice" in kinds:
            assert args.segmenter is not None
            source = MaskFidelity(quantile=args.quantile, min_dice=args.min_dice)
            self.fidelity = load_mask_fidelity(source, args.segmenter, class_names(real), real_digest(real))
            self._resegmenter = self._load_segmenter(args.segmenter)

    def add(self, batch: "pa.RecordBatch") -> None:
        """Score more rows."""
        rows = batch.to_pydict()
        self._ids += rows["request_id"]
        found: dict[str, np.ndarray] = {}
        if self.coverage is not None:
            vectors = np.array(rows["embedding"], np.float32).reshape(
                -1, self.coverage.fitted.embeddings.shape[1]
            )
            self.coverage.add(rows["request_id"], vectors)
            found["density"] = self.coverage.fitted.density(vectors)
        if self._shape is not None:
            found |= self._shape.score([_decoded(mask) for mask in rows["mask"]], rows["label_name"])
        if "texture" in self._kinds or self.fidelity is not None:
            images = [decode_png(data) for data in rows["image"]]
            if "texture" in self._kinds:
                found |= self._texture_scores(images)
            if self.fidelity is not None:
                found |= self._mask_scores(images, rows)
                self._labels += rows["label_name"]
        for name, values in found.items():
            self._columns[name].append(values)

    def values(self) -> "pa.Table":
        """request_id and every column, float32; null where a score does not apply."""
        import pyarrow as pa

        columns = {"request_id": pa.array(self._ids, pa.string())}
        for name, parts in self._columns.items():
            if name == "covers_real":
                assert self.coverage is not None
                counts = self.coverage.covers_real()
                values = np.array([counts.get(request_id, 0) for request_id in self._ids], np.float32)
            else:
                values = np.concatenate([np.empty(0, np.float32), *parts])
            columns[name] = pa.array(values, pa.float32(), from_pandas=True)
        return pa.table(columns)

    def record(self, kind: str) -> dict[str, Any]:
        """What the columns of a kind were computed with."""
        base: dict[str, Any] = {
            "real": f"{self._real.uri}@{self._real.version}",
            "columns": list(KINDS[kind]),
        }
        if kind == "density":
            assert self.coverage is not None
            fitted = self.coverage.fitted
            return base | {"k": fitted.k, "fitted_on": fitted.fitted_on, "coverage": self.coverage.share}
        if kind == "shape":
            assert self._shape is not None
            return base | {"fitted_on": self._shape.fitted_on}
        if kind == "texture":
            return base | {"fitted_on": {str(size): item.fitted_on for size, item in self._textures.items()}}
        assert self.fidelity is not None
        return base | self.fidelity.record()

    def acceptance(self, values: "pa.Table") -> list[Acceptance]:
        """What the mask fidelity would accept, by class and size quartile; empty without it."""
        if self.fidelity is None:
            return []
        scores = {name: values[name].to_numpy() for name in MASK_SCORES}
        return acceptance(self._labels, scores["size_quartile"], self.fidelity.verdict(scores))

    def _texture_scores(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        out = {name: np.empty(len(images), np.float32) for name in TEXTURE_SCORES}
        for size in {len(image) for image in images}:
            if size not in self._textures:
                self._textures[size] = self._fit_texture(size)
            places = [place for place, image in enumerate(images) if len(image) == size]
            for name, values in self._textures[size].score([images[place] for place in places]).items():
                out[name][places] = values
        return out

    def _mask_scores(self, images: Sequence[np.ndarray], rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
        assert self.fidelity is not None and self._resegmenter is not None
        requested = [_decoded(mask) for mask in rows["requested_mask"]]
        return self.fidelity.score(
            FilterBatch(
                images=images,
                requested_masks=requested,
                masks=requested,
                labels=np.array(rows["label"], np.int64),
                embeddings=np.empty((len(images), 0), np.float32),
                segmented_masks=self._resegmenter.segment(images),
            )
        )

    def _load_segmenter(self, folder: str) -> "Resegmenter":
        import torch

        from factory.synthesis.resegmentation import Resegmenter

        torch.set_num_threads(self._args.num_threads or min(8, len(os.sched_getaffinity(0))))
        return Resegmenter(folder, device=self._args.device)

    def _train_rows(self, columns: Sequence[str]) -> "pa.Table":
        from factory.storage import real_rows

        rows = real_rows(self._real.uri, splits=("train",), columns=columns, version=self._real.version)
        return rows.sort_by("image_id")

    def _fit_density(self) -> Any:
        rows = self._train_rows(["image_id", "group_id", "embedding"])
        embeddings = np.stack(rows["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
        source = EmbeddingDensity(k=self._args.k)
        return source.fit(rows["image_id"].to_pylist(), rows["group_id"].to_pylist(), embeddings)

    def _fit_shape(self) -> MaskShape:
        rows = self._train_rows(["image_id", "label_name", "mask", "height", "width"])
        return MaskShape.fit(
            ((row["label_name"], _square(_decoded(row["mask"]))) for row in rows.to_pylist()),
            fitted_on=hash_parts("rows", *sorted(rows["image_id"].to_pylist())),
        )

    def _fit_texture(self, size: int) -> ImageTexture:
        names = ["image_id", "label", "label_name", "group_id", "image", "mask", "attributes"]
        rows = self._train_rows(names)
        images = (
            row.image
            for start in range(0, rows.num_rows, _ROWS_AT_ONCE)
            for row in decode_rows(rows.slice(start, _ROWS_AT_ONCE), size)
        )
        digest = hash_parts("rows", *sorted(rows["image_id"].to_pylist()))
        return ImageTexture.fit(images, size=size, fitted_on=digest)


def _decoded(png: bytes | None) -> np.ndarray | None:
    return None if png is None else decode_png(png)


def _square(mask: np.ndarray | None) -> np.ndarray | None:
    """A real mask padded to a square, as synthetic ones are, at its own scale."""
    return None if mask is None else letterbox(mask, max(mask.shape), is_mask=True)


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    known = values[np.isfinite(values)]
    low, middle, high = np.quantile(known, [0.05, 0.5, 0.95]) if len(known) else (np.nan,) * 3
    return float(low), float(middle), float(high)


def print_result(args: Args, result: ScoreResult) -> None:
    """Quantiles of each column, coverage, acceptance by class and size."""
    for line in _lines(result):
        print(line)
    print(
        f"wrote {len(result.columns)} columns of {result.rows} rows to {result.uri} (version {result.version}) in "
        f'{result.seconds:.0f} s; next: factory query {result.uri} "{result.columns[0]} IS NOT NULL"'
    )


def _lines(result: ScoreResult) -> Iterable[str]:
    for name, (low, middle, high) in result.spread.items():
        yield f"{name:16} 5 % {low:8.3f}   median {middle:8.3f}   95 % {high:8.3f}"
    if result.coverage is not None:
        yield f"coverage: {result.coverage:.1%} of the real training images have a synthetic one among their neighbours"
    for item in result.acceptance:
        yield item.line()
    for note in result.notes:
        yield f"note: {note}"


def command(argv: Sequence[str]) -> int:
    """`factory score`."""
    args = tyro.cli(Args, args=list(argv), prog="factory score", description=__doc__)
    print_result(args, run(args))
    return 0
