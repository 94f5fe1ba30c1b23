"""What `factory synthesize` is asked for, read, fitted and checked before compute is spent.

The identity of a plan is made here (recipe, weights, training rows, seed), and how wide the stream runs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from factory.curation.filters import SimilarityBand
from factory.curation.mask_fidelity import FittedMaskFidelity, MaskFidelity, load_mask_fidelity
from factory.embedding import EmbedderSpec
from factory.imaging import TrainingRow
from factory.recipes import Recipe
from factory.version import code_version
from jobs.fidelity import regeneration_of
from jobs.recipe_args import parse_recipe
from schemas.regeneration import Regeneration
from schemas.request import SynthesisPlan

if TYPE_CHECKING:
    from factory.storage import IndexSet


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory synthesize`; any further `--field.of.recipe value` overrides the recipe."""

    recipe: str
    """Built-in recipe or module:function."""
    generator: str
    """Folder that `factory train` wrote."""
    real: str
    """Real table that the generator was trained on."""
    out: str
    """Synthetic table to write or extend: a path, s3://bucket/path or gs://bucket/path."""
    num_requests: int | None = None
    """Requests in all, over the classes as in the training split (or equally with --balance)."""
    labels: str | None = None
    """Requests per class instead: benign=500,malignant=500."""
    balance: bool = False
    """Equal counts per class."""
    seed: int = 0
    """Another seed is another plan: other images of the same recipe."""
    adapters: tuple[str, ...] = ()
    """LoRA adapter folders put on top of the generator."""
    plan: bool = False
    """Only print rows, bytes and checks."""
    batch_size: int | None = None
    """Images per batch; 16 on a CPU, 32 on a GPU."""
    num_synthesizers: int | None = None
    """Synthesizer actors; one per GPU, or one on a CPU machine."""
    num_embedders: int = 1
    """Embedder actors."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: str = "auto"
    """float32, bfloat16 or auto (bfloat16 on a GPU)."""
    compile: bool = False
    """torch.compile the denoiser and the decoder."""
    gpus_per_synthesizer: float = 1.0
    """Share of a GPU that a synthesizer holds when the device is cuda."""
    rows_per_fragment: int = 64
    """Rows per Lance fragment, and so per ledger record."""
    rows_per_commit: int = 256
    """Commit at least every so many rows …"""
    seconds_per_commit: float = 10.0
    """… and every so many seconds."""
    max_quarantined: float = 0.05
    """Share of the requests that may fail before the job stops."""
    max_tries: int = 3
    """Times a request may kill its process, alone, before it is quarantined."""
    segmenter: str | None = None
    """Folder of `factory train --part segmenter`: rejects images in which it does not find the mask that was asked for."""
    min_dice: float | None = None
    """With --segmenter: a Dice below which it rejects whatever it reaches on real images."""
    regenerate: int = 0
    """Further attempts, each with a new seed, at every request rejected for one of --regenerate-reasons."""
    regenerate_reasons: str = "mask_not_obeyed"
    """Reject reasons for which a request is tried again, separated by commas."""
    regenerate_budget: int | None = None
    """Further attempts in all."""
    retry_quarantined: bool = False
    """Give the quarantined requests of this plan another chance."""
    address: str | None = None
    """Ray cluster to join; a private Ray is started without it."""
    num_cpus: int | None = None
    """CPUs of a private Ray."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything checked and fitted before compute is spent."""

    recipe: Recipe
    plan: SynthesisPlan
    counts: Mapping[str, int]
    request_stage: Any
    colour: bool
    filters: tuple[Any, ...]
    embedder: Any
    embedder_spec: Any
    licence: str
    real_version: int
    fidelity: FittedMaskFidelity | None = None
    regeneration: Regeneration | None = None
    notes: tuple[str, ...] = ()

    @property
    def requested(self) -> "IndexSet":
        """Request indices of the whole plan as asked, one bit each."""
        from factory.storage import IndexSet

        return IndexSet.of(self.plan.index_blocks(self.counts))

    @property
    def indices(self) -> np.ndarray:
        """The same as an array, int64: for small plans."""
        return self.plan.indices(self.counts)

    @property
    def num_requests(self) -> int:
        """How many requests are asked for."""
        return sum(self.counts.values())


def resolve_counts(args: Args, labels: Sequence[str], train_counts: Mapping[str, int]) -> dict[str, int]:
    """Requests per class from --labels, or --num-requests by training proportions or equally.

    Raises:
        ValueError: nothing or too much is asked for, an unknown class, or a negative count.
    """
    if (args.labels is None) == (args.num_requests is None):
        raise ValueError("give exactly one of --num-requests N and --labels benign=N,malignant=N")
    if args.labels is not None:
        counts: dict[str, int] = {}
        for item in args.labels.split(","):
            name, _, value = item.strip().partition("=")
            if name not in labels:
                raise ValueError(
                    f"--labels: class {name!r} is not in the real table, which has {', '.join(labels)}"
                )
            if not value.isdigit():
                raise ValueError(f"--labels: {item.strip()!r} wants a count, such as {name}=500")
            counts[name] = counts.get(name, 0) + int(value)
        return counts
    total = args.num_requests or 0
    if total < 0:
        raise ValueError(f"--num-requests {total} is negative")
    present = [name for name in labels if train_counts.get(name, 0) > 0]
    weights = np.array([1.0 if args.balance else train_counts[name] for name in present])
    exact = total * weights / weights.sum()
    whole = np.floor(exact).astype(int)
    for position in np.argsort(-(exact - whole), kind="stable")[: total - whole.sum()]:
        whole[position] += 1
    return {name: int(count) for name, count in zip(present, whole)}


def prepare(args: Args) -> Prepared:
    """Read, fit and check everything that the stream needs. Nothing is written.

    Raises:
        ValueError, FileNotFoundError: an input is missing or does not fit, named with what to do.
    """
    from factory.generators.checkpoints import check_recipe, read_manifest
    from factory.imaging import decode_rows
    from factory.storage import class_names, open_table, real_digest, real_rows
    from jobs.assembly import all_weights, in_colour, make_request_stage

    recipe = parse_recipe(args.recipe, args.overrides)
    real = open_table(args.real)
    labels = class_names(real)
    rows_table = real_rows(args.real, splits=("train",), version=real.version)
    if rows_table.num_rows == 0:
        raise ValueError(f"{args.real}: the train split is empty; run `factory prepare` again")
    # In slices: the encoded images as Python objects, all at once, would double the memory.
    rows = [
        row
        for start in range(0, rows_table.num_rows, 256)
        for row in decode_rows(rows_table.slice(start, 256), recipe.generator.resolution)
    ]
    train_counts = {name: sum(row.label_name == name for row in rows) for name in labels}
    notes = []
    if recipe.backgrounds is not None:
        # Without a lesion nothing would be made: the row would be a copy of a patient's image.
        healthy = {name for name in labels if not any(_has_lesion(row, name) for row in rows)}
        asked = (args.labels or "").split(",")
        for name in sorted(healthy & {item.partition("=")[0].strip() for item in asked}):
            raise ValueError(
                f"--labels: class {name!r} has no lesion in any training mask, and recipe {recipe.name} paints lesions "
                "into real images; leave it out, or use a recipe that makes whole images"
            )
        if healthy and args.labels is None:
            notes.append(f"classes without lesions are left out: {', '.join(sorted(healthy))}")
            train_counts = {name: 0 if name in healthy else count for name, count in train_counts.items()}
    counts = resolve_counts(args, labels, train_counts)
    absent = [name for name, count in counts.items() if count and not train_counts.get(name)]
    if absent:
        raise ValueError(
            f"class {absent[0]!r} has no training image in {args.real}: nothing to learn its masks from"
        )
    generator = Path(args.generator)
    check_recipe(generator, recipe.name)
    digest = real_digest(real)
    if read_manifest(generator)["recipe"].get("real_digest") not in (None, digest):
        notes.append(f"the generator was trained on other real rows than the train split of {args.real}")
    embeddings = np.stack(rows_table["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    spec = EmbedderSpec.from_json(real.metadata["embedder"])
    filters = fit_filters(recipe, rows, embeddings, spec)
    for item in filters:
        for label, reason in getattr(item, "off", {}).items():
            notes.append(f"{type(item).__name__} does not judge class {labels[label]}: {reason}")
    fidelity = _fit_fidelity(args, recipe, labels, digest)
    weights = all_weights(recipe, generator, [Path(adapter) for adapter in args.adapters])
    plan = SynthesisPlan(
        recipe=recipe.name,
        fingerprint=recipe.fingerprint,
        weights=weights,
        real_digest=digest,
        seed=args.seed,
        labels=labels,
    )
    licences = sorted(set(rows_table["licence"].to_pylist()))
    return Prepared(
        recipe=recipe,
        plan=plan,
        counts=counts,
        request_stage=make_request_stage(recipe, plan, rows),
        colour=in_colour(rows),
        filters=filters if fidelity is None else (*filters, fidelity),
        fidelity=fidelity,
        regeneration=regeneration_of(args.regenerate, args.regenerate_reasons, args.regenerate_budget),
        embedder=spec.embedder(),
        embedder_spec=spec,
        licence="; ".join(licences),
        real_version=real.version,
        notes=tuple(notes),
    )


def _fit_fidelity(args: Args, recipe: Recipe, labels: Sequence[str], real: str) -> FittedMaskFidelity | None:
    """The gate of --segmenter. It marks as the recipe's filters do, so it is no part of the plan's identity."""
    if args.segmenter is None:
        if args.min_dice is not None:
            raise ValueError("--min-dice: goes with --segmenter FOLDER")
        return None
    if recipe.masks is None:
        raise ValueError(
            f"--segmenter: recipe {recipe.name} asks for no masks, so there is none to obey; leave it out"
        )
    return load_mask_fidelity(MaskFidelity(min_dice=args.min_dice), args.segmenter, labels, real)


def _has_lesion(row: TrainingRow, label: str) -> bool:
    return row.label_name == label and row.mask is not None and bool(row.mask.any())


def fit_filters(
    recipe: Recipe, rows: Sequence[TrainingRow], embeddings: np.ndarray, spec: EmbedderSpec
) -> tuple[Any, ...]:
    """The recipe's filters, fitted on the training rows; lesion crops are embedded where one looks at them."""
    fitted: list[Any] = []
    for item in recipe.filters:
        if isinstance(item, SimilarityBand) and item.needs_crops:
            fitted.append(item.fit(rows, embeddings, spec.embedder().load().embed))
        else:
            fitted.append(item.fit(rows, embeddings))
    return tuple(fitted)


def execution(
    args: Args, prepared: Prepared, cluster_cpus: float, cluster_gpus: float
) -> tuple[Any, Any, Any]:
    """Where the stream runs: settings of the stream, the synthesizers and the embedders."""
    from factory.synthesis.stages import FinishSettings
    from jobs.assembly import synthesizer_settings
    from jobs.synthesis_stream import StreamSettings

    device = args.device if args.device != "auto" else ("cuda" if cluster_gpus >= 1 else "cpu")
    on_gpu = device.startswith("cuda")
    dtype = args.dtype if args.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    batch_size = args.batch_size or (32 if on_gpu else 16)
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be at least 1")
    per_gpu = int(cluster_gpus / args.gpus_per_synthesizer) if on_gpu else 1
    num_synthesizers = args.num_synthesizers or max(per_gpu, 1)
    stream_settings = StreamSettings(
        num_synthesizers=num_synthesizers,
        num_embedders=args.num_embedders,
        gpus_per_synthesizer=args.gpus_per_synthesizer if on_gpu else 0.0,
        cpus_per_synthesizer=0.5 if on_gpu else 0.8,
        cpus_per_embedder=0.3,
        batch_size=batch_size,
        rows_per_fragment=args.rows_per_fragment,
        max_tries=args.max_tries,
    )
    # The embedder's share is small, so on a CPU machine the synthesizers may use all cores between them.
    threads = max(1, int(cluster_cpus) // num_synthesizers) if not on_gpu else None
    synthesizer = synthesizer_settings(
        prepared.recipe,
        Path(args.generator),
        [Path(adapter) for adapter in args.adapters],
        colour=prepared.colour,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        compile=args.compile,
        num_threads=threads,
    )
    finish = FinishSettings(
        plan=prepared.plan,
        embedder=prepared.embedder,
        filters=prepared.filters,
        sampling=prepared.recipe.sampling,
        resolution=prepared.recipe.generator.resolution,
        colour=prepared.colour,
        licence=prepared.licence,
        num_threads=1,
    )
    return stream_settings, synthesizer, finish


def plan_record(args: Args, prepared: Prepared) -> dict[str, Any]:
    """What `factory reproduce` needs to make any row of this plan again; stored in the table's metadata."""
    return {
        "recipe": args.recipe,
        "overrides": list(args.overrides),
        "generator": str(Path(args.generator).resolve()),
        "adapters": [str(Path(a).resolve()) for a in args.adapters],
        "real": args.real,
        "real_version": prepared.real_version,
        "seed": args.seed,
        "fingerprint": prepared.plan.fingerprint,
        "real_digest": prepared.plan.real_digest,
        "weights": dict(prepared.plan.weights),
        "labels": list(prepared.plan.labels),
        "code_version": code_version(),
        "segmenter": None if prepared.fidelity is None else prepared.fidelity.segmenter_digest,
        "segmenter_architecture": None if prepared.fidelity is None else prepared.fidelity.architecture,
    }


def table_metadata(prepared: Prepared) -> dict[str, str]:
    """Schema metadata of a synthetic table: every plan in it must agree with these."""
    return {
        "class_names": json.dumps(list(prepared.plan.labels)),
        "embedder": prepared.embedder_spec.to_json(),
    }


def print_plan(args: Args, prepared: Prepared, missing: int) -> None:
    """Rows, bytes and what was checked."""
    total = sum(prepared.counts.values())
    size = prepared.recipe.generator.resolution
    megabytes = total * (size * size * 0.75 + 4 * prepared.embedder_spec.dim + 1500) / 1e6
    print(f"plan         {prepared.plan.plan_id}")
    print(f"recipe       {prepared.recipe.name}  fingerprint {prepared.plan.fingerprint}")
    print(f"requests     {total}: " + ", ".join(f"{k}={v}" for k, v in prepared.counts.items()))
    print(f"missing      {missing} (the rest is committed or quarantined in {args.out})")
    print(f"images       {size}×{size}, about {megabytes:.1f} MB in all")
    for name, digest in prepared.plan.weights.items():
        print(f"weights      {name} {digest}")
    for note in prepared.notes:
        print(f"note         {note}")
