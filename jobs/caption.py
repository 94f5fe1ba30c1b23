"""Caption the images of a real table, or write new captions for synthesis from those there are.

    factory caption --real real.lance --out captions.lance
    factory caption --real real.lance --out captions.lance --captioner vlm:owner/name --use-gpu
    factory caption --expand 500 --captions captions.lance
    factory caption --expand 500 --captions captions.lance --language-model owner/name

The template captioner (default) writes from statistics of the pixels and needs no model. Captions are kept within
what the recipe's text encoder has room for behind the prefix (`--recipe`, and its `--generator.base` and
`--prompts.prefix`). Only training and validation images are captioned, and new captions come from training images alone.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from jobs.progress import progress_bar
from jobs.recipe_args import parse_args, parse_recipe

if TYPE_CHECKING:
    import pyarrow as pa

    from factory.captions.table import Caption

TEMPLATE, VLM = "template", "vlm:"
_SIZE = 256
_COLUMNS = ("image_id", "label", "label_name", "group_id", "image", "mask", "attributes", "split")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory caption`; any further `--field.of.recipe value` overrides the recipe."""

    real: str | None = None
    """Real table whose images are captioned."""
    out: str | None = None
    """Caption table to write."""
    captioner: str = TEMPLATE
    """template, or vlm:<hub id or local folder> of an image-text-to-text model."""
    expand: int | None = None
    """Write so many new captions per class into --captions, in the place of earlier new ones."""
    captions: str | None = None
    """Caption table to expand."""
    language_model: str | None = None
    """Hub id or local folder of a causal language model that writes the new captions; else attributes are recombined."""
    recipe: str = "didgen"
    """Recipe whose text encoder and prefix limit the captions."""
    name_class: bool = True
    """Whether captions begin with the class, so that it can be asked for."""
    min_shared: int = 2
    """Attributes that two captions must share to be recombined."""
    max_failed: float = 0.02
    """Greatest share of images for which the captioner may fail."""
    seed: int = 0
    """Of the new captions."""
    batch_size: int = 4
    """Images per call of a model."""
    use_gpu: bool = False
    """Run models on GPUs, one per actor."""
    num_workers: int = 1
    """Actors that hold the vision-language model."""
    overwrite: bool = False
    """Replace a table that is there."""
    address: str | None = None
    """Ray cluster to join; a private Ray is started without it."""
    num_cpus: int | None = None
    """CPUs of a private Ray."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class CaptionSummary:
    """What was written.

    Attributes:
        uri: the table.
        counts: rows by kind: real, expanded, error.
        shortened: captions that lost attributes or words to the text encoder's limit.
        seconds: of the whole job.
    """

    uri: str
    counts: Mapping[str, int]
    shortened: int
    seconds: float


def run(args: Args) -> CaptionSummary:
    """Caption or expand.

    Raises:
        ValueError: contradicting options, too many failures, or a class with too few captions.
        FileNotFoundError, FileExistsError: a table or model is missing, or the table is there.
    """
    started = time.perf_counter()
    _check(args)
    fits = _limits(args)
    if args.expand is not None:
        uri, captions, shortened = _expand(args, fits)
    else:
        uri, captions, shortened = _caption(args, fits)
    from factory.captions.table import write_captions

    write_captions(uri, captions, overwrite=args.overwrite or args.expand is not None)
    return CaptionSummary(
        uri=uri,
        counts=dict(Counter(caption.kind for caption in captions)),
        shortened=shortened,
        seconds=time.perf_counter() - started,
    )


def _check(args: Args) -> None:
    if args.expand is None:
        if args.real is None or args.out is None:
            raise ValueError("factory caption: give --real and --out, or --expand N and --captions")
        if args.captioner != TEMPLATE and not args.captioner.startswith(VLM):
            raise ValueError(f"--captioner {args.captioner}: want template or vlm:<hub id or local folder>")
        if args.captions is not None or args.language_model is not None:
            raise ValueError("--captions and --language-model go with --expand N")
    else:
        if args.captions is None or args.real is not None or args.out is not None:
            raise ValueError(
                "--expand: give the table as --captions; --real and --out are for captioning images"
            )
        if args.expand < 1:
            raise ValueError(f"--expand {args.expand}: want at least 1")
    if not 0.0 <= args.max_failed < 1.0:
        raise ValueError(f"--max-failed {args.max_failed}: want 0 … 1")
    if args.batch_size < 1 or args.num_workers < 1:
        raise ValueError(f"--batch-size {args.batch_size}, --num-workers {args.num_workers}: want at least 1")


def _limits(args: Args) -> Callable[[str], bool]:
    """Whether the recipe's text encoder has room for a caption behind the prefix."""
    from factory.captions.budget import TokenBudget
    from factory.sources.captions import CaptionTable

    recipe = parse_recipe(args.recipe, args.overrides)
    if not isinstance(recipe.prompts, CaptionTable):
        raise ValueError(
            f"--recipe {args.recipe}: its prompts are {type(recipe.prompts).__name__}, no CaptionTable; choose a recipe "
            "that reads captions (`factory recipes`)"
        )
    added = [token for token, _ in recipe.generator.placeholders]
    budget = TokenBudget(recipe.generator.base_folder(), added)
    fits = budget.fits(recipe.prompts.compose)
    if not fits(""):
        raise ValueError(
            f"--prompts.prefix {recipe.prompts.prefix!r}: {budget.count(recipe.prompts.compose(''))} tokens, but the text "
            f"encoder takes {budget.limit}"
        )
    return fits


def _caption(args: Args, fits: Callable[[str], bool]) -> tuple[str, list["Caption"], int]:
    from factory.captions.models import check_model
    from factory.storage import real_rows

    assert args.real is not None and args.out is not None
    if args.captioner.startswith(VLM):
        check_model(args.captioner.removeprefix(VLM))
    _check_absent(args)
    table = real_rows(args.real, splits=("train", "val"), columns=_COLUMNS).sort_by("image_id")
    if not len(table):
        raise ValueError(f"--real {args.real}: no training or validation images")
    if args.captioner == TEMPLATE:
        captions, shortened = _by_template(args, table, fits)
    else:
        captions, shortened = _by_model(args, table, fits)
    failed = [caption for caption in captions if caption.kind == "error"]
    if len(failed) > args.max_failed * len(captions):
        raise ValueError(
            f"--captioner {args.captioner}: failed for {len(failed)} of {len(captions)} images (first: image_id "
            f"{failed[0].image_id}, {failed[0].error}), more than --max-failed {args.max_failed}; nothing was written"
        )
    return args.out, captions, shortened


def _check_absent(args: Args) -> None:
    """Fail before the work, not after it."""
    from factory.storage import open_table

    if args.overwrite or args.out is None:
        return
    try:
        open_table(args.out)
    except FileNotFoundError:
        return
    raise FileExistsError(f"{args.out} exists already; choose another path or give --overwrite")


def _by_template(args: Args, table: "pa.Table", fits: Callable[[str], bool]) -> tuple[list["Caption"], int]:
    from factory.captions.attributes import describe_row
    from factory.captions.table import Caption
    from factory.captions.writing import shorten

    captions, shortened = [], 0
    with progress_bar("captions", len(table)) as advance:
        for row, split in _decoded(table):
            attributes = describe_row(row)
            text, left_out = shorten(attributes, fits, name_class=args.name_class)
            shortened += left_out > 0
            captions.append(
                Caption(
                    image_id=row.image_id,
                    split=split,
                    label_name=row.label_name,
                    caption=text,
                    attributes=attributes,
                    captioner=TEMPLATE,
                )
            )
            advance(1)
    return captions, shortened


def _decoded(table: "pa.Table", chunk: int = 64) -> Any:
    """Rows of the real table decoded a few at a time, each with its split."""
    from factory.imaging import decode_rows

    for start in range(0, len(table), chunk):
        part = table.slice(start, chunk)
        yield from zip(decode_rows(part, _SIZE), part["split"].to_pylist(), strict=True)


def _by_model(args: Args, table: "pa.Table", fits: Callable[[str], bool]) -> tuple[list["Caption"], int]:
    from factory.captions.attributes import geometry_of
    from factory.captions.table import Caption
    from factory.captions.writing import shorten_text

    answers = _answers(args, table)
    captions, shortened = [], 0
    for row, split in _decoded(table):
        text, error = answers[row.image_id]
        if error is None:
            prefix = f"{row.label_name.replace('_', ' ')}, " if args.name_class else ""
            try:
                written = shorten_text(prefix + text, fits)
            except ValueError as fault:
                error = str(fault)
            else:
                shortened += written != prefix + text
        captions.append(
            Caption(
                image_id=row.image_id,
                split=split,
                label_name=row.label_name,
                caption="" if error else written,
                kind="error" if error else "real",
                attributes=geometry_of(row.mask),
                captioner=args.captioner,
                error=error,
            )
        )
    return captions, shortened


class CaptionActor:
    """Holds the vision-language model."""

    def __init__(self, name: str, device: str, num_threads: int | None) -> None:
        from factory.captions.models import VisionLanguageCaptioner

        dtype = "bfloat16" if device == "cuda" else "float32"
        self._captioner = VisionLanguageCaptioner(name, device=device, dtype=dtype, num_threads=num_threads)

    def __call__(self, rows: "pa.Table") -> "pa.Table":
        """Columns image_id and image (PNG) → image_id, text, error. An image that fails fails alone."""
        import pyarrow as pa

        from factory.captions.models import Answer
        from factory.imaging import decode_png

        images = [decode_png(data) for data in rows["image"].to_pylist()]
        try:
            answers = self._captioner.caption(images)
        except (ValueError, RuntimeError):
            answers = []
            for image in images:
                try:
                    answers += self._captioner.caption([image])
                except (ValueError, RuntimeError) as error:
                    answers.append(Answer(error=f"{type(error).__name__}: {error}"[:200]))
        return pa.table(
            {
                "image_id": rows["image_id"],
                "text": pa.array([answer.text for answer in answers], pa.string()),
                "error": pa.array([answer.error for answer in answers], pa.string()),
            }
        )


def _answers(args: Args, table: "pa.Table") -> dict[str, tuple[str, str | None]]:
    """(text, error) of every image, by a pool of actors."""
    import ray.data

    from jobs.cluster import configure_data, start_ray

    wanted = table.select(["image_id", "image"])
    found: dict[str, tuple[str, str | None]] = {}
    with start_ray(args.address, args.num_cpus) as handle:
        configure_data()
        # One block per batch: a table in one block would be captioned by one actor.
        blocks = [wanted.slice(start, args.batch_size) for start in range(0, len(wanted), args.batch_size)]
        threads = max(1, int((handle.num_cpus - 1) // args.num_workers))
        dataset = ray.data.from_arrow(blocks).map_batches(
            CaptionActor,
            fn_constructor_args=(
                args.captioner.removeprefix(VLM),
                "cuda" if args.use_gpu else "cpu",
                None if args.use_gpu else threads,
            ),
            batch_format="pyarrow",
            batch_size=args.batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(args.num_workers, len(blocks))),
            num_cpus=0 if args.use_gpu else threads * 0.9,
            num_gpus=1 if args.use_gpu else 0,
        )
        with progress_bar("captions", len(table)) as advance:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    found[row["image_id"]] = (row["text"], row["error"])
                advance(len(batch))
    return found


def _expand(args: Args, fits: Callable[[str], bool]) -> tuple[str, list["Caption"], int]:
    from factory.captions.expand import recombine
    from factory.captions.table import by_label, read_captions

    assert args.captions is not None and args.expand is not None
    old = [caption for caption in read_captions(args.captions) if caption.kind != "expanded"]
    classes = by_label(old, "real")
    if not classes:
        raise ValueError(f"--captions {args.captions}: holds no caption of a training image")
    made: list[Caption] = []
    if args.language_model is not None:
        made = _by_language_model(args, classes, fits)
    else:
        for label, captions in classes.items():
            made += recombine(
                captions,
                args.expand,
                label=label,
                fits=fits,
                min_shared=args.min_shared,
                seed=args.seed,
                name_class=args.name_class,
            )
    counts = Counter(caption.label_name for caption in made)
    for label in classes:
        if counts[label] < args.expand:
            print(
                f"note: {label}: {counts[label]} of {args.expand} new captions; there are no more combinations to give"
            )
    if not made:
        raise ValueError("--expand: no new caption could be made; lower --min-shared, or caption more images")
    return args.captions, old + made, 0


def _by_language_model(
    args: Args, classes: Mapping[str, Sequence["Caption"]], fits: Callable[[str], bool]
) -> list["Caption"]:
    from factory.captions.models import MAX_SHOWN, LanguageModelWriter
    from factory.captions.table import expanded_caption
    from factory.captions.writing import shorten_text
    from schemas.identity import random_generator

    assert args.language_model is not None and args.expand is not None
    device = "cuda" if args.use_gpu else "cpu"
    writer = LanguageModelWriter(
        args.language_model, device=device, dtype="bfloat16" if args.use_gpu else "float32"
    )
    made: list[Caption] = []
    failed = tried = 0
    with progress_bar("new captions", args.expand * len(classes)) as advance:
        for label, captions in classes.items():
            seen = {caption.caption for caption in captions}
            for number in range(args.expand):
                tried += 1
                name = f"captions/{args.seed}/{label}/{number}"
                rng = random_generator(name, "examples")
                order = rng.permutation(len(captions))[:MAX_SHOWN]
                answer = writer.write(label, [captions[int(i)].caption for i in order], name)
                advance(1)
                fault = answer.error
                if fault is None:
                    try:
                        text = shorten_text(answer.text, fits)
                    except ValueError as error:
                        fault = str(error)
                if fault is not None or text in seen:
                    failed += 1
                    continue
                seen.add(text)
                made.append(expanded_caption(label, text, f"lm:{args.language_model}"))
    if failed:
        print(f"note: {failed} of {tried} answers of {args.language_model} were empty or repeated a caption")
    return made


def command(argv: Sequence[str]) -> int:
    """`factory caption`."""
    args = parse_args(Args, argv, "factory caption", __doc__ or "")
    summary = run(args)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.counts.items()))
    print(f"wrote {summary.uri}: {counts} ({summary.shortened} shortened to fit) in {summary.seconds:.1f} s")
    if args.expand is None:
        print(f"next: factory caption --expand 500 --captions {summary.uri}")
    else:
        print(f"next: factory synthesize --recipe {args.recipe} --prompts.captions {summary.uri} …")
    return 0
