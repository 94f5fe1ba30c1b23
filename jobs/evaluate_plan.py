"""What `factory evaluate downstream` is asked, and the rows it reads before any held-out row is opened."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

if TYPE_CHECKING:
    from factory.evaluation.arms import Arm, Task
    from factory.evaluation.final_test import Comparison
    from factory.evaluation.leakage import GeneratorRecord
    from factory.predictors.examples import Examples
    from factory.predictors.settings import FitSettings
    from factory.storage import Table

RESULTS = "results.json"
TRAINING = {
    "size": 128, "num_steps": 600, "batch_size": 16, "learning_rate": 1e-3, "validate_every": 50, "patience": None,
    "augmentation": "standard",
}  # fmt: skip
"""How a predictor is trained where neither the command line nor a search says so."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory evaluate downstream`."""

    real: str
    """Real table: train trains, val stops training early, reserve is the oracle, test judges."""
    synthetic: tuple[str, ...]
    """Synthetic tables, one for each generator, made from exactly the train split."""
    out: str
    """Folder of results.json, report.md, report.html, predictions.csv and the models until they have judged."""
    search: str | None = None
    """Folder of `factory explore ratio`: its chosen ratio, filter, model and training."""
    ratio: tuple[str, ...] = ()
    """Synthetic rows per real row of each class, or only; the first is the primary arm, others are further arms."""
    task: Literal["classification", "segmentation"] | None = None
    """What is learnt; the search's, or classification."""
    model: str | None = None
    """A timm name, small_cnn or probe:NAME; for segmentation unet[?width=N], attention_unet …, or unet:ENCODER."""
    weights: str | None = None
    """Local safetensors file of pretrained weights."""
    loss: str | None = None
    """cross_entropy, balanced_softmax, class_balanced_focal or logit_adjustment, in every arm."""
    arms: str = ""
    """Kinds of arms separated by commas; all that the data allows by default."""
    seeds: int = 5
    """Task seeds, crossed with the generators."""
    external: tuple[str, ...] = ()
    """Tables of other datasets that judge too: train here, test there."""
    tag: str | None = None
    """Tag of the synthetic tables; the search's, or their newest version."""
    where: str | None = None
    """SQL that synthetic rows must pass too; the search's, or none."""
    generator: tuple[str, ...] = ()
    """Checkpoint of each table's generator, for the arm vae_round_trip."""
    recipe: str | None = None
    """Recipe of the generators; the one in their manifests by default."""
    scenario: Literal["equal_budget", "release"] = "equal_budget"
    """release lets a generator of other real rows pass: synthetic only against real only."""
    again: bool = False
    """Open a test split that was opened before; recorded."""
    opened_by: str | None = None
    """Who opens the test split; your login name by default."""
    reason: str = "comparison of arms"
    """Why the test split is opened."""
    size: int | None = None
    """Side of the images, px (128)."""
    num_steps: int | None = None
    """Optimizer steps of every training (600)."""
    batch_size: int | None = None
    """Images of a step (16)."""
    learning_rate: float | None = None
    """The highest of a training (0.001)."""
    validate_every: int | None = None
    """Steps between validations (50)."""
    patience: int | None = None
    """Validations without improvement after which a training stops; none stops by default."""
    augmentation: Literal["none", "standard", "strong"] | None = None
    """Of training images (standard); the arm strong_augmentation has its own."""
    num_resamples: int = 10_000
    """Bootstraps behind each interval."""
    keep_models: bool = False
    """Keep the trained models after they have judged."""
    in_process: bool = False
    """Train one after the other in this process, without Ray."""
    cpus_per_run: float = 1.0
    """CPUs of a training."""
    gpus_per_run: float = 0.0
    """GPUs of a training; may be a fraction."""
    address: str | None = None
    """Ray cluster to join; --out must be on storage that all its machines share."""
    num_cpus: int | None = None
    """CPUs of a private Ray."""

    def __post_init__(self) -> None:
        if not self.synthetic:
            raise ValueError("--synthetic: want one table at least")
        if self.search is None and not self.ratio:
            raise ValueError("give --ratio, or --search with the folder of `factory explore ratio`")
        if self.generator and len(self.generator) != len(self.synthetic):
            raise ValueError(
                f"--generator: want one for each of {len(self.synthetic)} tables, got {len(self.generator)}"
            )
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds}: want at least 1")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arguments with everything that a search decides filled in.

    Attributes:
        primary: name of the arm whose comparison was declared.
    """

    args: Args
    task: "Task"
    model: str
    tag: str | None
    where: str
    ratios: tuple["Arm", ...]
    training: Mapping[str, Any]

    @property
    def primary(self) -> str:
        return self.ratios[0].name


def make_plan(args: Args) -> Plan:
    """Fill in what `--search` decides; the command line wins where it says something.

    Raises:
        ValueError: no such search, one that chose real data only, or ratios that cannot be.
    """
    from factory.evaluation.arms import Arm
    from factory.evaluation.models import DEFAULT_MODEL

    found = _read_search(args.search) if args.search is not None else {}
    settings, chosen = found.get("settings", {}), found.get("chosen", {})
    task: Task = args.task or settings.get("task") or "classification"
    if args.ratio:
        ratios = tuple(parse_ratio(text) for text in args.ratio)
    elif chosen["name"] == "real":
        raise ValueError(
            f"--search {args.search}: it chose real data only, so there is nothing to test and the test split stays "
            "closed; give --ratio to test one all the same"
        )
    else:
        pairs = tuple((name, float(ratio)) for name, ratio in chosen["per_class"])
        only = bool(chosen["only"])
        ratio = _ratio_of_name(chosen["name"]) if only else (1.0 if pairs else float(chosen["ratio"]))
        ratios = (Arm(kind="synthetic", ratio=ratio, per_class=pairs, only=only),)
    if len({arm.name for arm in ratios}) < len(ratios):
        raise ValueError(f"--ratio {' '.join(args.ratio)}: one is named twice")
    training = {
        name: next((v for v in (getattr(args, name), settings.get(name)) if v is not None), default)
        for name, default in TRAINING.items()
    }
    return Plan(
        args=args,
        task=task,
        model=args.model or chosen.get("model") or DEFAULT_MODEL[task],
        tag=args.tag or settings.get("tag"),
        where=args.where if args.where is not None else chosen.get("where", ""),
        ratios=ratios,
        training=training,
    )


def _read_search(folder: str) -> dict[str, Any]:
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"--search {folder}: no {RESULTS} there; `factory explore ratio --out` makes it"
        )
    found: dict[str, Any] = json.loads(path.read_text())
    if not {"chosen", "settings"} <= set(found):
        raise ValueError(f"--search {folder}: {RESULTS} is not that of `factory explore ratio`")
    return found


def _ratio_of_name(name: str) -> float:
    return float(name.rstrip("×").split()[-1])


def parse_ratio(text: str) -> "Arm":
    """The synthetic arm of "2", "only", "only:2" or "benign=1,malignant=4".

    Raises:
        ValueError: anything else, or a ratio of 0.
    """
    from factory.evaluation.arms import Arm

    try:
        if text.startswith("only"):
            return Arm(
                kind="synthetic", ratio=float(text.removeprefix("only").removeprefix(":") or 1), only=True
            )
        if "=" in text:
            pairs = tuple(
                (name, float(ratio)) for name, _, ratio in (p.partition("=") for p in text.split(","))
            )
            return Arm(kind="synthetic", per_class=pairs)
        ratio = float(text)
    except ValueError as error:
        raise ValueError(f"--ratio {text!r}: want 2, only, only:2 or CLASS=RATIO,… ({error})") from error
    if not ratio > 0:
        raise ValueError(f"--ratio {text!r}: 0 is the arm real, which is always there; want more than 0")
    return Arm(kind="synthetic", ratio=ratio)


def choose_arms(
    plan: Plan, *, has_masks: bool, has_reserve: bool
) -> tuple[tuple["Arm", ...], tuple[str, ...]]:
    """The arms, "real" and the ratios among them, and what was left out for want of data.

    Raises:
        ValueError: an unknown kind.
    """
    from factory.evaluation.arms import Arm, ArmKind

    placebo = "shuffled_masks" if plan.task == "segmentation" else "shuffled_labels"
    every = [
        "real",
        "real_short",
        "repeated",
        "strong_augmentation",
        "class_balanced",
        "copy_paste",
        placebo,
        "synthetic",
    ]
    every += [*(["vae_round_trip"] if plan.args.generator else []), "ungated", "oracle"]
    asked = [name.strip() for name in plan.args.arms.split(",") if name.strip()]
    unknown = [name for name in asked if name not in get_args(ArmKind)]
    if unknown:
        raise ValueError(f"--arms: {unknown[0]!r} is none of {', '.join(get_args(ArmKind))}")
    lacking = {
        "copy_paste": not has_masks and "masks",
        "oracle": not has_reserve and "reserve rows (factory prepare --num-train)",
    }
    notes = [] if asked else [f"no arm {name}: there are no {what}" for name, what in lacking.items() if what]
    kinds = cast("list[ArmKind]", [k for k in (asked or every) if asked or not lacking.get(k)])
    main = plan.ratios[0]
    arms: list[Arm] = [Arm(kind="real")]
    for kind in kinds:
        if kind == "synthetic" or kind == "real":
            continue
        ratio = main.ratio
        keep = {"per_class": main.per_class} if kind not in ("real_short", "vae_round_trip") else {}
        only = main.only and kind in ("ungated", "shuffled_masks", "shuffled_labels")
        arms.append(Arm(kind=kind, ratio=ratio, only=only, **keep))
    return (*arms, *plan.ratios), tuple(notes)


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The comparison, what the reader of its result should know, and what to record of the tables."""

    comparison: "Comparison"
    notes: tuple[str, ...]
    about: dict[str, Any]


def read_inputs(plan: Plan) -> Inputs:
    """Every row but the held-out ones, and every check that can be made without them.

    Raises:
        ValueError: leaks, too few rows of a class, one generator twice.
    """
    from factory.evaluation.data import read_real
    from factory.evaluation.downstream import Sources
    from factory.evaluation.final_test import Comparison, sealed
    from factory.evaluation.models import parse_loss, parse_model
    from factory.storage import open_table

    args = plan.args
    table = open_table(args.real)
    counts = {split: table.count(f"split = '{split}'") for split in ("train", "val", "test", "reserve")}
    for split in ("train", "val", "test"):
        if not counts[split]:
            raise ValueError(
                f"{args.real}: no row in the split {split}; prepare it with other --split-fractions"
            )
    options: dict[str, Any] = {
        "size": plan.training["size"],
        "channels": _channels(args.real),
        "version": table.version,
    }
    real, validation = (read_real(args.real, (split,), **options) for split in ("train", "val"))
    if (real.counts() == 0).any():
        lacking = real.class_names[int((real.counts() == 0).argmax())]
        raise ValueError(f"{args.real}: no training row of class {lacking}; a model cannot learn it")
    reserve = read_real(args.real, ("reserve",), **options) if counts["reserve"] else None
    for uri in args.external:
        _check_external(plan, uri, real.class_names)
    held_out = table.read(["image_id", "group_id", "label_name"], "split = 'test'")
    _check_judges(plan, args.real, held_out["label_name"].to_pylist(), real.class_names)
    arms, notes = choose_arms(plan, has_masks=real.masks is not None, has_reserve=reserve is not None)
    synthetic, ungated, sources = _read_synthetic(plan, arms, real)
    comparison = Comparison(
        arms=arms,
        sources=Sources(
            real=real,
            evaluation=sealed(held_out["image_id"].to_pylist(), held_out["group_id"].to_pylist(), real),
            validation=validation,
            reserve=reserve,
            synthetic=synthetic,
            ungated=ungated,
            round_trip=_round_trips(plan, arms, real),
        ),
        predictor=parse_model(plan.task, plan.model, args.weights),
        settings=_settings(plan, parse_loss(plan.task, args.loss)),
        task_seeds=tuple(range(args.seeds)),
    )
    about = {
        "real": {"uri": args.real, "version": table.version, **{f"{k}_rows": v for k, v in counts.items()}},
        "synthetic": sources,
    }
    notes = (*notes, *comparison.check())
    return Inputs(comparison=comparison, notes=notes, about=about)


def _check_external(plan: Plan, uri: str, class_names: Sequence[str]) -> None:
    """What can be known of an external table before it is opened.

    Raises:
        FileNotFoundError: no table there.
        ValueError: not a table of real images, the training table itself, or too few classes in common.
    """
    from factory.storage import open_table

    table = open_table(uri)
    if not {"image_id", "split"} <= set(table.schema.names) or "embedder" not in table.metadata:
        raise ValueError(f"--external {uri}: not a table of real images; `factory prepare` makes one")
    if Path(uri).resolve() == Path(plan.args.real).resolve():
        raise ValueError(f"--external {uri}: is the table of --real")
    found = table.read(["label_name"])["label_name"].to_pylist()
    _check_judges(plan, uri, found, class_names)


def _check_judges(plan: Plan, uri: str, labels: Sequence[str], class_names: Sequence[str]) -> None:
    """Refuse rows that no AUC can be computed of; their labels may be read before the opening.

    Raises:
        ValueError: fewer than two of the classes that are learnt.
    """
    known = sorted(set(labels) & set(class_names))
    if plan.task == "classification" and len(known) < 2:
        raise ValueError(
            f"{uri}: of the classes {', '.join(class_names)} the rows that are to judge have only "
            f"{', '.join(known) or 'none'} (they are of {', '.join(sorted(set(labels)))}); AUC needs two"
        )


def _channels(uri: str) -> int:
    from factory.storage import real_rows

    kinds = real_rows(uri, splits=("train", "val"), columns=["photometric"])["photometric"].to_pylist()
    return 1 if set(kinds) <= {"grey"} else 3


def _settings(plan: Plan, loss: Any) -> "FitSettings":
    from factory.predictors.augmentation import Augmentation
    from factory.predictors.settings import FitSettings

    values = {k: v for k, v in plan.training.items() if k not in ("size", "augmentation")}
    return FitSettings(loss=loss, augmentation=Augmentation(kind=plan.training["augmentation"]), **values)


def _read_synthetic(
    plan: Plan, arms: Sequence["Arm"], real: "Examples"
) -> tuple[dict[int, "Examples"], dict[int, "Examples"], list[dict[str, Any]]]:
    """Accepted rows and all rows of each table, as many as any arm takes; what to record of the generators."""
    import numpy as np

    from factory.evaluation.data import plan_ids, read_synthetic
    from factory.evaluation.leakage import check_real_budget, generator_records, rows_digest
    from factory.storage import open_table

    wanted = [arm.added(real) for arm in arms if arm.uses_generator]
    most = np.max([np.zeros(real.num_classes, np.int64), *wanted], axis=0)
    limits = dict(zip(real.class_names, most.tolist(), strict=True))
    accepted, ungated = {}, {}
    about: list[dict[str, Any]] = []
    for number, uri in enumerate(plan.args.synthetic):
        table = open_table(uri, tag=plan.tag)
        options: dict[str, Any] = {"where": plan.where, "version": table.version}
        found = generator_records(table, plan_ids(uri, accepted_only=False, **options))
        check_real_budget(uri, found, rows_digest(real), scenario=plan.args.scenario)
        options |= {
            "size": real.size,
            "channels": real.channels,
            "class_names": real.class_names,
            "limits": limits,
        }
        accepted[number] = read_synthetic(uri, **options)
        if any(arm.kind == "ungated" for arm in arms):
            ungated[number] = read_synthetic(uri, accepted_only=False, **options)
        about.append(
            {
                "uri": uri,
                "version": table.version,
                "tag": plan.tag,
                "plans": [
                    asdict(record) | {"overrides": _overrides(table.metadata, record)} for record in found
                ],
                "backgrounds": _num_backgrounds(table, plan.where),
                "memorisation": _memorisation(table, plan.tag),
            }
        )
    _check_different(plan.args.synthetic, about)
    return accepted, ungated, about


def _overrides(metadata: Mapping[str, str], record: "GeneratorRecord") -> list[str]:
    found: list[str] = json.loads(metadata[f"plan.{record.plan_id}"]).get("overrides", [])
    return found


def _num_backgrounds(table: "Table", where: str) -> int:
    """Different real images that the usable rows keep pixels of."""
    from factory.evaluation.data import synthetic_filter

    found: set[str] = set()
    for batch in table.query_batches(synthetic_filter(where), columns=["background_id"], batch_size=1 << 16):
        found.update(name for name in batch.column(0).to_pylist() if name)
    return len(found)


def _check_different(uris: Sequence[str], about: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the same generator under two names: it is no second seed."""
    seen: dict[str, str] = {}
    for uri, one in zip(uris, about, strict=True):
        weights = json.dumps(
            sorted({json.dumps(dict(plan["weights"]), sort_keys=True) for plan in one["plans"]})
        )
        if weights in seen:
            raise ValueError(
                f"--synthetic {uri}: made by the same generator weights as {seen[weights]}; intervals over generator "
                "seeds need generators trained with different seeds. Leave one out, or train another"
            )
        seen[weights] = uri


def _memorisation(table: "Table", tag: str | None) -> dict[str, Any]:
    """The verdict of the curation in force; says so where there is none."""
    from factory.export.card import curation_record

    found = curation_record(table, tag)
    text = table.metadata.get(f"memorisation.{found[0]}") if found is not None else None
    if text is None:
        return {"not_done": "no curation tested this version (factory curate)"}
    verdict: dict[str, Any] = json.loads(text)
    return verdict


def _round_trips(plan: Plan, arms: Sequence["Arm"], real: "Examples") -> dict[int, "Examples"]:
    from factory.evaluation.round_trip import examples_through_autoencoder
    from jobs.evaluate_images import load_autoencoder

    if not any(arm.kind == "vae_round_trip" for arm in arms):
        return {}
    if not plan.args.generator:
        raise ValueError("--arms vae_round_trip: give --generator for each synthetic table")
    return {
        number: examples_through_autoencoder(load_autoencoder(folder, plan.args.recipe, "cpu"), real)
        for number, folder in enumerate(plan.args.generator)
    }
