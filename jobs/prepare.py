"""Read, verify, split and embed a real dataset into a table.

    factory prepare busi Dataset_BUSI_with_GT --out real.lance
    factory prepare folder my_images --out real.lance --on-error quarantine
    factory prepare phantom --num-images 512 --out phantom.lance
    factory prepare busi Dataset_BUSI_with_GT --num-train 80 --out small.lance
    factory prepare medmnist breastmnist.npz --out real.lance \\
        --embedder "timm:mobilenetv2_100?pad_type=same&mean=0.5&std=0.5" --embedder-weights mobilenetv2.safetensors

Every file is opened and checked first; near-duplicates are found and kept in one split; what is in the dataset,
and what to beware of, is printed and stored with the table.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from jobs.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np

    from factory.datasets.layout import Layout, Listing, Problem
    from factory.datasets.preparation import PreparedDataset
    from factory.datasets.summary import Summary
    from factory.datasets.verification import VerifiedImage
    from factory.embedding import EmbedderSpec, LoadedEmbedder
    from factory.tracking import Run

_SHEET_IMAGES = 24
_EMBED_CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory prepare`."""

    layout: Positional[str]
    """Name of a dataset layout; `factory datasets` lists them."""
    path: Positional[str] = ""
    """Folder (or .npz file) of the dataset; not for phantom."""
    out: str
    """Table to write."""
    embedder: str = "tiny"
    """tiny, dinov2:<hub id or folder>, or timm:<model>[?option=value&…]."""
    embedder_weights: str | None = None
    """Local .safetensors file for a timm model."""
    device: str = "cpu"
    """Where to embed: cpu or cuda."""
    on_error: Literal["fail", "quarantine"] = "fail"
    """What to do if files are damaged or wrong: stop and name all of them, or leave them out and record why."""
    max_quarantined: float = 0.1
    """Greatest share of items that quarantine accepts."""
    seed: int = 0
    """Of the splits, and of the phantom population."""
    split_fractions: Annotated[tuple[float, float, float], tyro.conf.arg(metavar="TRAIN VAL TEST")] = (
        0.7,
        0.1,
        0.2,
    )
    """Shares of the images; whole groups are kept together."""
    num_train: int | None = None
    """Keep at most so many training images; whole groups of the others go to the split `reserve`, which no model sees."""
    reserve_fold: str | None = None
    """K/F: training fold K (0 …) of F goes to `reserve` too. A generator trained on what is left serves
    `factory explore ratio --fold-table K=TABLE`."""
    num_images: int | None = None
    """Phantoms to make (256 by default)."""
    overwrite: bool = False
    """Replace a table that is there."""


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What was written.

    Attributes:
        uri, version: the table.
        summary: counts and warnings.
        quarantined: items left out, with reasons.
        seconds: duration of each step.
    """

    uri: str
    version: int
    summary: "Summary"
    quarantined: Sequence["Problem"]
    seconds: dict[str, float]


def run(args: Args) -> PrepareResult:
    """Prepare a dataset.

    Raises:
        FileNotFoundError: PATH or the embedder's weights are not there.
        FileExistsError: the table is there and --overwrite is not given.
        ValueError: bad arguments or, with --on-error fail, bad files, all named.
    """
    from factory.datasets.layout import ListingOptions
    from factory.datasets.layouts import get_layout
    from factory.datasets.splits import check_fractions
    from factory.embedding import ImageEmbedder
    from factory.tracking import track

    layout = get_layout(args.layout)
    _check(args, layout)
    check_fractions(args.split_fractions)
    parse_fold(args.reserve_fold)
    embedder = ImageEmbedder(name=args.embedder, weights=args.embedder_weights)
    what = {"layout": args.layout, "seed": args.seed, "split_fractions": args.split_fractions,
            "num_train": args.num_train, "reserve_fold": args.reserve_fold,
            "num_images": args.num_images, "embedder": embedder.name}  # fmt: skip
    how = {"path": args.path, "out": args.out, "device": args.device, "on_error": args.on_error,
           "max_quarantined": args.max_quarantined}  # fmt: skip
    listing = layout.listing(Path(args.path), ListingOptions(num_images=args.num_images, seed=args.seed))
    with track("prepare", recipe_parameters=what, execution_parameters=how) as tracked:
        return _run(args, layout, listing, embedder.load(args.device), tracked)


def parse_fold(text: str | None) -> tuple[int, int] | None:
    """(K, F) of "K/F"; None for None.

    Raises:
        ValueError: no such fold.
    """
    if text is None:
        return None
    number, _, num_folds = text.partition("/")
    if not (number.isdigit() and num_folds.isdigit() and int(number) < int(num_folds) and int(num_folds) > 1):
        raise ValueError(f"--reserve-fold {text!r}: want K/F with 0 ≤ K < F and F ≥ 2, e.g. 0/5")
    return int(number), int(num_folds)


def _check(args: Args, layout: "Layout") -> None:
    if layout.is_made and args.path:
        raise ValueError(f"PATH {args.path!r}: {layout.name} reads no path; leave it out")
    if not layout.is_made and not args.path:
        raise ValueError(f"PATH is missing: where is the dataset? ({layout.about})")
    if not layout.is_made and args.num_images is not None:
        raise ValueError(f"--num-images is for phantom; {layout.name} takes all that is there")
    if not 0 <= args.max_quarantined <= 1:
        raise ValueError(f"--max-quarantined {args.max_quarantined} is outside 0 … 1")
    if "://" not in args.out and Path(args.out).exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} is there already; choose another --out or add --overwrite")


def _run(
    args: Args, layout: "Layout", listing: "Listing", embedder: "LoadedEmbedder", tracked: "Run"
) -> PrepareResult:
    from factory.datasets.near_duplicates import NearDuplicates
    from factory.datasets.preparation import prepare_dataset
    from factory.datasets.verification import verify_items

    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    with clock.step("verify"), progress_bar("verify", len(listing.items)) as advance:
        images, problems = verify_items(
            listing.items,
            listing.problems,
            on_error=args.on_error,
            max_quarantined=args.max_quarantined,
            progress=advance,
        )
    with clock.step("embed"):
        embeddings = _embed(embedder, images)
    with clock.step("group and split"), progress_bar("near-duplicates", len(images)) as advance:
        prepared = prepare_dataset(
            images,
            embeddings,
            layout,
            listing.class_names,
            search=None if layout.is_made else NearDuplicates(),
            fractions=args.split_fractions,
            seed=args.seed,
            num_train=args.num_train,
            reserve_fold=parse_fold(args.reserve_fold),
            num_quarantined=len(problems),
            progress=advance,
        )
    with clock.step("write"):
        version = _write(args, prepared, listing, problems, embedder.spec)
    _track(tracked, prepared, problems, seconds, f"{args.out}@{version}")
    return PrepareResult(
        uri=args.out, version=version, summary=prepared.summary, quarantined=problems, seconds=seconds
    )


class _Clock:
    """Seconds of named steps."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._name = ""
        self._start = 0.0

    def step(self, name: str) -> "_Clock":
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._seconds[self._name] = round(time.perf_counter() - self._start, 2)


def _embed(embedder: "LoadedEmbedder", images: Sequence["VerifiedImage"]) -> "np.ndarray":
    import numpy as np

    chunks = []
    with progress_bar("embed", len(images)) as advance:
        for start in range(0, len(images), _EMBED_CHUNK):
            part = images[start : start + _EMBED_CHUNK]
            chunks.append(embedder.embed([verified.image for verified in part]))
            advance(len(part))
    return np.concatenate(chunks)


def _write(
    args: Args,
    prepared: "PreparedDataset",
    listing: "Listing",
    problems: Sequence["Problem"],
    spec: "EmbedderSpec",
) -> int:
    from dataclasses import asdict

    from factory.storage import write_table

    metadata = {
        "class_names": json.dumps(list(prepared.class_names)),
        "embedder": spec.to_json(),
        "dataset": prepared.layout.name,
        "licence": prepared.layout.licence,
        "allowed_use": prepared.layout.allowed_use,
        "citation": prepared.layout.citation,
        "layout_settings": json.dumps(dict(listing.settings)),
        "summary": json.dumps(prepared.summary.as_json()),
        "quarantined": json.dumps([asdict(problem) for problem in problems]),
    }
    table = write_table(
        args.out, prepared.batches(), prepared.schema, metadata=metadata, overwrite=args.overwrite
    )
    return table.version


def _track(
    tracked: "Run",
    prepared: "PreparedDataset",
    problems: Sequence["Problem"],
    seconds: dict[str, float],
    written: str,
) -> None:
    from factory.report import contact_sheet

    summary = prepared.summary
    values: dict[str, float] = {"num_images": summary.num_images, "num_quarantined": len(problems),
              "num_groups": summary.duplicates.num_groups, "num_conflicts": len(summary.conflicts)}  # fmt: skip
    values |= {f"num_pairs.{kind}": count for kind, count in summary.duplicates.num_pairs.items()}
    values |= {f"seconds.{name}": value for name, value in seconds.items()}
    if summary.shortcuts.all is not None:
        values["shortcut_auc"] = summary.shortcuts.all
    tracked.metrics(values)
    tracked.set({"output": written})
    tracked.artifact("summary.json", summary.as_json())
    if problems:
        tracked.artifact("quarantined.txt", "\n".join(map(str, problems)))
    shown = [i for i, split in enumerate(prepared.splits) if split == "train"][
        :: max(1, len(prepared.splits) // 32)
    ]
    shown = shown[:_SHEET_IMAGES]
    sheet = contact_sheet(
        [prepared.images[i].image for i in shown],
        [prepared.images[i].mask for i in shown],
        [prepared.images[i].item.label_name for i in shown],
        columns=6,
    )
    tracked.artifact("contact_sheet.png", sheet)


def print_result(result: PrepareResult) -> None:
    """Print what is in the dataset and what to beware of."""
    from rich.console import Console

    from jobs.prepare_report import counts_table, remarks

    console = Console(width=None if Console().is_terminal else 110)
    console.print(counts_table(result.summary))
    for remark in remarks(result.summary, result.quarantined):
        console.print(remark, highlight=False, markup=False)
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    console.print(f"time: {steps}", highlight=False)


def command(argv: Sequence[str]) -> int:
    """`factory prepare`."""
    args = tyro.cli(Args, args=list(argv), prog="factory prepare", description=__doc__)
    result = run(args)
    print_result(result)
    print(
        f"wrote {result.uri} (version {result.version}, {result.summary.num_images} images); "
        f"next: factory train --recipe tiny --real {result.uri} --out runs/generator"
    )
    return 0


if __name__ == "__main__":
    import sys

    from jobs.cli import run_verb

    sys.exit(run_verb("prepare", sys.argv[1:]))
