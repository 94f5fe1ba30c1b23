"""What `factory explore ratio` is asked for, read and checked before compute is spent."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from factory.evaluation.arms import Arm, ArmKind
    from factory.predictors.examples import Examples
    from factory.predictors.settings import FitSettings
    from tune.ratio_search import Fold, Point, SearchData

Baseline = Literal["strong_augmentation", "class_balanced", "copy_paste", "repeated"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory explore ratio`."""

    real: str
    """Real table: its train split trains, its validation split judges."""
    out: str
    """Folder of results.json, curve.png, summary.txt and the state of the search."""
    task: Literal["classification", "segmentation"]
    """What is learnt: the class (scored by AUC) or the lesion mask (scored by Dice at native size)."""
    synthetic: str | None = None
    """Synthetic table made from exactly the train split; not with --fold-table."""
    tag: str | None = None
    """Tag of the synthetic table, such as curated-1; its newest version by default."""
    fold_table: tuple[str, ...] = ()
    """K=TABLE for every fold K = 0 … of the train split: nested cross-validation."""
    model: tuple[str, ...] = ()
    """Predictors: a timm name, small_cnn or probe:TIMM_NAME; for segmentation unet, attention_unet … [?width=N], or
    unet:ENCODER. By default mobilenetv2_100, or unet."""
    weights: str | None = None
    """Local safetensors file of pretrained weights, with one --model."""
    ratios: str = "0,0.25,0.5,1,2,4,8,only"
    """Synthetic rows per real row of each class; 0 is always among them, "only" leaves the real rows out."""
    per_class: tuple[str, ...] = ()
    """Further points with a ratio per class: benign=1,malignant=4."""
    where: tuple[str, ...] = ("",)
    """Filters on the synthetic rows, one curve each; "" is no filter."""
    baselines: tuple[Baseline, ...] = ()
    """Baselines to show beside the curve; they are never chosen."""
    seeds: int = 3
    """Task seeds of each point and fold."""
    folds: int = 5
    """Folds of the validation groups; with --fold-table their number is that of the tables."""
    search: Literal["grid", "optuna"] = "grid"
    """Every point, or per-class ratios that Optuna suggests (first model, first filter)."""
    num_trials: int = 20
    """Of an Optuna search; one trial is one vector over all seeds and folds."""
    trial_scheduler: Literal["fifo", "asha"] = "fifo"
    """asha stops trials with a low validation score; points it stopped cannot be chosen. Real data only always ends."""
    scenario: Literal["equal_budget", "release"] = "equal_budget"
    """release lets a generator of other real rows pass: synthetic only against real only."""
    size: int = 128
    """Side of the images, px; larger ones are letterboxed to it."""
    num_steps: int = 600
    """Optimizer steps of every training."""
    batch_size: int = 16
    """Images of a step."""
    learning_rate: float = 1e-3
    """The highest of a training."""
    validate_every: int = 50
    """Steps between validations."""
    patience: int | None = None
    """Validations without improvement after which a training stops; by default none stops."""
    augmentation: Literal["none", "standard", "strong"] = "standard"
    """Of training images, the same in every arm."""
    device: str = "auto"
    """cpu, cuda or auto: cuda where trials have a share of a GPU."""
    cpus_per_trial: float = 1.0
    """CPUs of a trial; may be a fraction."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial; may be a fraction."""
    max_concurrent: int | None = None
    """Trials at once; by default as many as the resources allow."""
    overwrite: bool = False
    """Discard the search that --out holds."""
    address: str | None = None
    """Ray cluster to join; a private Ray is started without it."""
    num_cpus: int | None = None
    """CPUs of a private Ray."""

    def __post_init__(self) -> None:
        if (self.synthetic is None) == (not self.fold_table):
            raise ValueError("give exactly one of --synthetic TABLE and --fold-table 0=TABLE 1=TABLE …")
        if self.weights is not None and len(self.model) != 1:
            raise ValueError("--weights: goes with exactly one --model")
        if self.seeds < 1 or self.folds < 2 or self.size < 16:
            raise ValueError(
                f"--seeds {self.seeds}, --folds {self.folds}, --size {self.size}: want at least 1, 2 and 16"
            )
        if not self.where:
            raise ValueError('--where: want at least one filter; "" is none')
        if self.trial_scheduler == "asha" and any(name.startswith("probe:") for name in self.model):
            raise ValueError(
                "--trial-scheduler asha: a probe takes no steps, so there is nothing to stop early"
            )


def parse_points(args: Args, class_names: Sequence[str]) -> "tuple[Point, ...]":
    """Candidates and baselines: real data only first, then each filter's ratios and vectors.

    Raises:
        ValueError: a ratio or class that cannot be.
    """
    from factory.evaluation.arms import Arm
    from tune.ratio_search import REAL_ONLY, Point

    finite, with_only = _ratios(args.ratios)
    arms = [Arm(kind="synthetic", ratio=ratio) for ratio in finite if ratio > 0]
    if with_only:
        arms.append(Arm(kind="synthetic", ratio=max([*finite, 1.0]), only=True))
    arms += [_vector(text, class_names) for text in args.per_class]
    points = [Point(arm=REAL_ONLY)]
    points += [Point(arm=arm, filter_index=number) for number in range(len(args.where)) for arm in arms]
    kinds: tuple[ArmKind, ...] = args.baselines
    points += [Point(arm=Arm(kind=kind), is_candidate=False) for kind in kinds]
    if len(set(points)) < len(points):
        raise ValueError("--ratios, --per-class, --baselines: a point is named twice")
    return tuple(points)


def _ratios(text: str) -> tuple[list[float], bool]:
    finite, with_only = [], False
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word == "only":
            with_only = True
            continue
        try:
            ratio = float(word)
        except ValueError:
            ratio = math.nan
        if not (math.isfinite(ratio) and ratio >= 0):
            raise ValueError(f"--ratios: {word!r} is no ratio; want numbers ≥ 0 and perhaps only")
        finite.append(ratio)
    return finite, with_only


def _vector(text: str, class_names: Sequence[str]) -> "Arm":
    from factory.evaluation.arms import Arm

    pairs = []
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        try:
            ratio = float(value)
        except ValueError:
            ratio = math.nan
        if name not in class_names or not (math.isfinite(ratio) and ratio >= 0):
            raise ValueError(
                f"--per-class {text!r}: want CLASS=RATIO,… with classes of {', '.join(class_names)} and ratios ≥ 0"
            )
        pairs.append((name, ratio))
    if not any(ratio for _, ratio in pairs):
        raise ValueError(
            f"--per-class {text!r}: all ratios are 0, which is real data only and always a point"
        )
    return Arm(kind="synthetic", per_class=tuple(pairs))


@dataclass(frozen=True)
class Inputs:
    """The search's rows and what they came from.

    Attributes:
        data: rows, points and models.
        ratios: synthetic rows per real row of each point.
        about: what results.json says of the inputs.
        notes: what the reader should know.
        wheres: filters of the synthetic rows.
    """

    data: "SearchData"
    ratios: tuple[float, ...]
    about: Mapping[str, Any]
    notes: tuple[str, ...]
    wheres: tuple[str, ...]


def read_inputs(args: Args) -> Inputs:
    """Tables read and every check made, before compute is spent.

    Raises:
        ValueError: leaks, too few rows, contradicting options.
    """
    from factory.evaluation.data import read_real
    from factory.evaluation.leakage import check_parts_disjoint
    from factory.evaluation.models import DEFAULT_MODEL, parse_model
    from factory.storage import open_table
    from tune.ratio_search import SearchData

    models = args.model or (DEFAULT_MODEL[args.task],)
    if len(set(models)) < len(models):
        raise ValueError(f"--model: {', '.join(models)} names one twice")
    predictors = {name: parse_model(args.task, name, args.weights) for name in models}
    version = open_table(args.real).version
    channels = _channels(args.real, version)
    train = read_real(
        args.real,
        ("train",),
        version=version,
        native=bool(args.fold_table),
        size=args.size,
        channels=channels,
    )
    val = read_real(args.real, ("val",), version=version, native=True, size=args.size, channels=channels)
    check_parts_disjoint({"train": train, "val": val})
    points = parse_points(args, train.class_names)
    folds, sources = _folds(args, points, train, val)
    data = SearchData(
        folds=folds,
        points=points,
        models=predictors,
        settings=_settings(args),
        device=_device(args),
        num_threads=max(1, int(args.cpus_per_trial)),
    )
    notes = [*data.check(args.where), *_notes(args)]
    about = {
        "real": {"uri": args.real, "version": version, "rows": len(train), "validation_rows": len(val)},
        "synthetic": sources,
        "settings": {k: v for k, v in dataclasses.asdict(args).items() if k not in ("address", "num_cpus")},
    }
    return Inputs(data, mean_ratios(points, folds), about, tuple(notes), args.where)


def _channels(uri: str, version: int) -> int:
    from factory.storage import real_rows

    kinds = real_rows(uri, splits=("train", "val"), columns=["photometric"], version=version)
    return 1 if set(kinds["photometric"].to_pylist()) <= {"grey"} else 3


def _settings(args: Args) -> "FitSettings":
    from factory.predictors.augmentation import Augmentation
    from factory.predictors.settings import FitSettings

    return FitSettings(
        num_steps=args.num_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        validate_every=args.validate_every,
        patience=args.patience,
        augmentation=Augmentation(kind=args.augmentation),
    )


def _device(args: Args) -> str:
    return args.device if args.device != "auto" else ("cuda" if args.gpus_per_trial > 0 else "cpu")


def _folds(
    args: Args, points: "Sequence[Point]", train: "Examples", val: "Examples"
) -> "tuple[tuple[Fold, ...], list[dict[str, Any]]]":
    """The folds, and what is recorded of the generators behind the synthetic rows."""
    from factory.datasets.splits import group_folds
    from factory.evaluation.leakage import rows_digest
    from tune.ratio_search import Fold

    if not args.fold_table:
        assert args.synthetic is not None  # Args wants one of the two
        synthetic, sources = _synthetic(
            args, args.synthetic, points, train, rows_digest(train), "the train split"
        )
        numbers = group_folds(val.groups, val.labels, args.folds)
        return tuple(
            Fold(real=train, stop=val.take(numbers != k), score=val.take(numbers == k), synthetic=synthetic)
            for k in range(args.folds)
        ), sources
    tables = _fold_tables(args.fold_table)
    numbers = group_folds(train.groups, train.labels, len(tables))
    folds, sources = [], []
    for k, table in enumerate(tables):
        kept = train.take(numbers != k)
        what = f"the train split without fold {k} of {len(tables)}"
        synthetic, found = _synthetic(args, table, points, kept, rows_digest(kept), what)
        folds.append(Fold(real=kept, stop=val, score=train.take(numbers == k), synthetic=synthetic))
        sources += found
    return tuple(folds), sources


def _fold_tables(words: Sequence[str]) -> list[str]:
    found: dict[int, str] = {}
    for word in words:
        number, _, table = word.partition("=")
        if not number.isdigit() or not table or int(number) in found:
            raise ValueError(f"--fold-table {word!r}: want K=TABLE, each K once")
        found[int(number)] = table
    if sorted(found) != list(range(len(found))) or len(found) < 2:
        raise ValueError(f"--fold-table: want tables of folds 0, 1, …, at least two; got {sorted(found)}")
    return [found[number] for number in range(len(found))]


def _synthetic(
    args: Args, uri: str, points: "Sequence[Point]", real: "Examples", digest: str, what: str
) -> "tuple[tuple[Examples, ...], list[dict[str, Any]]]":
    """Rows under each filter, as many as any point takes, and records of their generators, checked."""
    from factory.evaluation.data import plan_ids, read_synthetic
    from factory.evaluation.leakage import check_real_budget, generator_records
    from factory.storage import open_table

    table = open_table(uri, tag=args.tag)
    most = _most_wanted(args, points, real)
    parts, records = [], {}
    for where in args.where:
        for record in generator_records(table, plan_ids(uri, where=where, version=table.version)):
            records[record.plan_id] = record
        parts.append(
            read_synthetic(
                uri,
                size=args.size,
                channels=real.channels,
                class_names=real.class_names,
                where=where,
                limits=most,
                version=table.version,
            )
        )
    check_real_budget(uri, list(records.values()), digest, scenario=args.scenario, what=what)
    about = [
        {"uri": uri, "version": table.version, "tag": args.tag, **dataclasses.asdict(r)}
        for r in records.values()
    ]
    return tuple(parts), about


def _most_wanted(args: Args, points: "Sequence[Point]", real: "Examples") -> dict[str, int]:
    """Most rows of each class that any point takes."""
    import numpy as np

    wanted = [p.arm.added(real) for p in points if p.arm.uses_generator]
    if args.search == "optuna":
        wanted.append(np.ceil(real.counts() * max(optuna_ratios(args))).astype(np.int64))
    most = np.max([np.zeros(real.num_classes, np.int64), *wanted], axis=0)
    return dict(zip(real.class_names, most.tolist(), strict=True))


def optuna_ratios(args: Args) -> tuple[float, ...]:
    """Ratios that an Optuna search may take for a class: those of --ratios, and 0."""
    return tuple(sorted({0.0, *_ratios(args.ratios)[0]}))


def mean_ratios(points: "Sequence[Point]", folds: "Sequence[Fold]") -> tuple[float, ...]:
    """Synthetic rows per real row of each point, averaged over folds; 0 for arms that add none."""
    found = []
    for point in points:
        ratios = [point.arm.synthetic_ratio(f.real) if point.arm.uses_generator else 0.0 for f in folds]
        found.append(sum(ratios) / len(ratios))
    return tuple(found)


def _notes(args: Args) -> list[str]:
    notes = []
    if args.scenario == "release":
        notes.append("scenario release: the generator may have seen real rows that the real-only arm lacks")
    if not args.fold_table:
        notes.append(
            "folds are of the validation split; the generator and the training rows are the same in each of them"
        )
    return notes
