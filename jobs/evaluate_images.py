"""Compare synthetic with real images: distances in features, neighbourhoods, diversity.

    factory evaluate images synthetic.lance --real real.lance --per-class --out runs/images
    factory evaluate images synthetic.lance --real real.lance --tag curated-1 --features table inception=inception.pth \\
        --lpips-backbone vgg16.pth --lpips-linear vgg.pth --generator runs/generator --out runs/images

The reference is the train split, which the generator has seen, or val; test images are never read. Every line comes
with the number of images, the features, an interval from half subsamples, and the same number between two halves of
the real set. Where features are the tables' own embeddings, no image is opened.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from jobs.evaluate_plan import RESULTS
from jobs.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np

    from factory.embedding import LoadedEmbedder
    from factory.evaluation.features import ImageRows
    from factory.evaluation.image_comparison import ImageScore
    from factory.generators.loaded import LoadedGenerator
    from factory.storage import Table


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory evaluate images`."""

    table: Positional[str]
    """Synthetic table."""
    real: str
    """Table of real images."""
    out: str
    """Folder for results.json, report.md, report.html and the cache of features."""
    tag: str | None = None
    """Version of the synthetic table by tag, such as curated-1."""
    where: str = ""
    """SQL that synthetic rows must pass too."""
    all_rows: bool = False
    """Compare rejected rows too."""
    reference: Literal["train", "val"] = "train"
    """Split of the real images."""
    features: tuple[str, ...] = ("table",)
    """table (the embeddings stored in both tables), tiny, dinov2:FOLDER, timm:MODEL, inception=FILE; one or more."""
    feature_weights: str | None = None
    """Local .safetensors file for a timm model."""
    per_class: bool = False
    """Distances within each class too; diversity always is."""
    lpips_backbone: str | None = None
    """torchvision's vgg16 or alexnet, a local file; without it LPIPS is not computed."""
    lpips_linear: str | None = None
    """The lpips weights that belong to it (torchmetrics/functional/image/lpips_models holds them)."""
    generator: str | None = None
    """Checkpoint of the generator: adds the distance of real images to themselves through its autoencoder."""
    recipe: str | None = None
    """Recipe of the generator; the one in its manifest by default."""
    most: int = 5000
    """At most so many images of each table, drawn by a hash of their ids."""
    num_diversity: int = 32
    """Images per class and side among whose pairs diversity is measured."""
    size: int | None = None
    """Side of the images for diversity, px; that of the synthetic images by default."""
    num_resamples: int = 100
    """Half subsamples behind each interval."""
    seed: int = 0
    """Of the subsamples."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class ImagesResult:
    """What was found and where it was written."""

    scores: tuple["ImageScore", ...]
    record: dict[str, Any]
    folder: str


def run(args: Args) -> ImagesResult:
    """Compare.

    Raises:
        FileNotFoundError: a table or a file of weights is not there.
        ValueError: bad arguments, too few images, tables of two embedders where their embeddings are asked for.
    """
    from factory.evaluation.data import synthetic_filter
    from factory.evaluation.features import list_rows
    from factory.evaluation.image_comparison import classes_of
    from factory.storage import open_table
    from factory.tracking import track

    _check(args)
    real, synthetic = open_table(args.real), open_table(args.table, tag=args.tag)
    if "split" not in real.schema.names or "image_id" not in real.schema.names:
        raise ValueError(f"--real {args.real} is not a table of real images; `factory prepare` makes one")
    if "request_id" not in synthetic.schema.names:
        raise ValueError(f"{args.table} is not a synthetic table; `factory synthesize` makes one")
    rows = (
        list_rows(real, f"split = '{args.reference}'", most=args.most),
        list_rows(synthetic, synthetic_filter(args.where, accepted_only=not args.all_rows), most=args.most),
    )
    classes = classes_of(rows[0].labels, rows[1].labels)
    inputs = {"real": f"{args.real}@{real.version}", "synthetic": f"{args.table}@{synthetic.version}"}
    with track("evaluate images", recipe_parameters=asdict(args), inputs=inputs) as tracked:
        job = _Job(args, real, synthetic, *rows, classes)
        scores = (*job.distances(), *job.diversity())
        record = _record(args, real, synthetic, rows, scores)
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RESULTS, json.dumps(record, indent=2, allow_nan=False) + "\n")
        _write_pages(folder, record)
        tracked.metrics(
            {f"{s.features}.{s.label}.{s.metric}": s.value for s in scores if s.value is not None}
        )
        for name in (RESULTS, "report.md", "report.html"):
            tracked.artifact(folder / name)
        tracked.set({"output": args.out})
    return ImagesResult(scores=scores, record=record, folder=args.out)


def _check(args: Args) -> None:
    if not args.features:
        raise ValueError("--features: want one at least, e.g. table")
    if (args.lpips_backbone is None) != (args.lpips_linear is None):
        raise ValueError("--lpips-backbone and --lpips-linear belong together: give both, or neither")
    if args.most < 2 or args.num_diversity < 4:
        raise ValueError(
            f"--most {args.most} must be at least 2, --num-diversity {args.num_diversity} at least 4"
        )
    if args.size is not None and args.size < 11:
        raise ValueError(f"--size {args.size}: want at least 11 px")


class _Job:
    """The two sets and what is computed of them."""

    def __init__(
        self,
        args: Args,
        real: "Table",
        synthetic: "Table",
        real_rows: "ImageRows",
        synthetic_rows: "ImageRows",
        classes: list[str],
    ) -> None:
        self._args = args
        self._sides = ((real, real_rows), (synthetic, synthetic_rows))
        self._classes = classes

    def distances(self) -> list["ImageScore"]:
        """Every kind of features, over all images and per class."""
        from factory.embedding import EmbedderSpec
        from factory.evaluation.features import STORED, describe, parse_features, stored_features
        from factory.evaluation.image_comparison import FeatureSet, distances

        args = self._args
        scores: list[ImageScore] = []
        generator = (
            None if args.generator is None else load_autoencoder(args.generator, args.recipe, args.device)
        )
        labels: list[str | None] = [None, *(self._classes if args.per_class else [])]
        specs = [EmbedderSpec.from_json(table.metadata["embedder"]) for table, _ in self._sides]
        for name in dict.fromkeys(args.features):
            embedder: LoadedEmbedder | None = None
            if name == STORED:
                specs[1].check_same(specs[0], args.real)
                spec = specs[0]
            else:
                embedder = parse_features(name, args.feature_weights).load(args.device)
                spec = embedder.spec
            vectors = []
            for (table, rows), stored in zip(self._sides, specs, strict=True):
                if embedder is None or _same(spec, stored):
                    vectors.append(stored_features(table, rows))
                else:
                    vectors.append(self._computed(embedder, table, rows, None))
            passed = None
            if generator is not None:
                embedder = embedder or spec.embedder().load(args.device)
                passed = self._computed(embedder, *self._sides[0], generator)
            sets = [
                FeatureSet(vectors=v, labels=rows.labels, groups=rows.groups)
                for v, (_, rows) in zip(vectors, self._sides, strict=True)
            ]
            scores += distances(
                *sets,
                features=spec.name,
                preprocessing=describe(spec),
                is_clip="clip" in spec.name.lower(),
                round_trip=passed,
                labels=labels,
                num_resamples=args.num_resamples,
                seed=args.seed,
            )
        return scores

    def _computed(
        self,
        embedder: "LoadedEmbedder",
        table: "Table",
        rows: "ImageRows",
        generator: "LoadedGenerator | None",
    ) -> "np.ndarray":
        from factory.evaluation.features import computed_features
        from factory.evaluation.round_trip import through_autoencoder

        with progress_bar(f"features {embedder.spec.name}", len(rows)) as advance:
            return computed_features(
                table,
                rows,
                embedder,
                cache=Path(self._args.out) / "features",
                change=None if generator is None else lambda images: through_autoencoder(generator, images),
                change_identity="" if generator is None else self._autoencoder_digest(),
                progress=advance,
            )

    def _autoencoder_digest(self) -> str:
        from factory.generators.checkpoints import digest_part
        from jobs.recipe_args import get_recipe

        assert self._args.generator is not None
        name = self._args.recipe or recipe_of(self._args.generator)
        generator = get_recipe(name).generator
        return f"{digest_part(generator.vae_folder(), 'vae')}/{generator.resolution}"

    def diversity(self) -> list["ImageScore"]:
        """MS-SSIM and LPIPS among images of each class."""
        from factory.evaluation.features import read_images
        from factory.evaluation.image_comparison import diversity
        from factory.evaluation.lpips import Lpips
        from schemas.draws import draw_order

        args = self._args
        scores: list[ImageScore] = []
        lpips = None
        if args.lpips_backbone is not None and args.lpips_linear is not None:
            lpips = Lpips(backbone=args.lpips_backbone, linear=args.lpips_linear).load(args.device)
        with progress_bar("diversity", len(self._classes) * (4 if lpips else 2)) as advance:
            for label in self._classes:
                images, groups = [], []
                for table, rows in self._sides:
                    inside = [k for k, name in enumerate(rows.labels) if name == label]
                    drawn = sorted(inside, key=lambda k: draw_order(rows.ids[k]))[: args.num_diversity]
                    chosen = rows.take(sorted(drawn))
                    images.append(read_images(table, chosen))
                    groups.append(chosen.groups)
                scores += diversity(
                    *images,
                    real_groups=groups[0],
                    synthetic_groups=groups[1],
                    label=label,
                    size=args.size or max(images[1][0].shape[:2]),
                    lpips=lpips,
                    num_resamples=max(args.num_resamples, 100),
                    seed=args.seed,
                    progress=advance,
                )
        return scores


def _same(one: Any, two: Any) -> bool:
    from dataclasses import replace

    return bool(replace(one, weights=None) == replace(two, weights=None))


def recipe_of(generator: str) -> str:
    """Name of the recipe in a checkpoint's manifest."""
    from factory.generators.checkpoints import read_manifest

    return str(read_manifest(Path(generator))["recipe"].get("name"))


def load_autoencoder(checkpoint: str, recipe: str | None, device: str) -> "LoadedGenerator":
    """The generator behind a checkpoint, for its autoencoder.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, no such recipe, or a checkpoint of another one.
    """
    from jobs.recipe_args import get_recipe

    component = get_recipe(recipe or recipe_of(checkpoint)).generator
    component.weights(Path(checkpoint))
    return component.load(Path(checkpoint), device=device)


def _record(
    args: Args,
    real: "Table",
    synthetic: "Table",
    rows: tuple["ImageRows", "ImageRows"],
    scores: Sequence["ImageScore"],
) -> dict[str, Any]:
    from factory.version import code_version

    return {
        "kind": "images",
        "code_version": code_version(),
        "settings": asdict(args),
        "dataset": real.metadata.get("dataset", ""),
        "real": {"uri": args.real, "version": real.version, "split": args.reference, "rows": len(rows[0])},
        "synthetic": {
            "uri": args.table,
            "version": synthetic.version,
            "tag": args.tag,
            "rows": len(rows[1]),
            "recipes": _recipes(synthetic),
        },
        "generator": None if args.generator is None else describe_generator(Path(args.generator)),
        "scores": [score.as_json() for score in scores],
    }


def describe_generator(folder: Path) -> dict[str, Any]:
    """What was trained of a generator: part, rank of an adapter, number of its trained parameters."""
    from safetensors import safe_open

    from factory.generators.checkpoints import CHECKPOINT_PARTS, read_manifest

    manifest = read_manifest(folder)
    trainable = manifest["generator"].get("trainable") or {}
    count = 0
    for part in CHECKPOINT_PARTS:
        for path in sorted((folder / part).glob("*.safetensors")):
            with safe_open(path, framework="np") as tensors:
                names = list(tensors.keys())
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return {
        "recipe": manifest["recipe"].get("name"),
        "unet": trainable.get("unet"),
        "lora_rank": trainable.get("lora_rank") if trainable.get("unet") == "lora" else None,
        "parameters": count,
    }


def _recipes(table: "Table") -> list[str]:
    found: set[str] = set()
    for batch in table.batches(["recipe"], batch_size=1 << 16):
        found.update(batch.column(0).to_pylist())
    return sorted(found)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _write_pages(folder: Path, record: dict[str, Any]) -> None:
    from factory.report.evaluation import images_sections
    from factory.report.markdown import markdown_report
    from factory.report.page import html_report

    title = (
        f"Images of {record['synthetic']['uri']} beside {record['real']['uri']} ({record['real']['split']})"
    )
    sections = images_sections(record)
    html_report(folder / "report.html", sections, title=title)
    markdown_report(folder / "report.md", sections, title=title)


def command(argv: Sequence[str]) -> int:
    """`factory evaluate images`."""
    from jobs.query_output import text_table

    args = tyro.cli(Args, args=list(argv), prog="factory evaluate images", description=__doc__)
    result = run(args)
    from factory.report.evaluation import image_line

    lines = [image_line(score) for score in result.record["scores"]]
    print(
        text_table(
            lines, ["metric", "class", "value", "interval", "real vs real", "N real, synthetic", "features"]
        )
    )
    notes = dict.fromkeys(f"{s.metric}: {s.note}" for s in result.scores if s.note)
    print("\n".join(f"note: {note}" for note in notes))
    print(
        f"wrote {result.folder}/results.json, report.md and report.html; next: factory evaluate downstream --real "
        f"{args.real} --synthetic {args.table} --ratio 1 --out runs/downstream"
    )
    return 0
