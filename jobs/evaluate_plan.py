"""What `factory evaluate downstream` is asked: its arguments, what a search decides for it, its arms."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

if TYPE_CHECKING:
    from factory.evaluation.arms import Arm, Method, Task

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
    methods: str = ""
    """Methods for a long tail separated by commas, or all: cross_entropy, balanced_softmax, class_balanced_focal,
    logit_adjustment, resampling. Each is two further arms: real rows only, and those of the first --ratio."""
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
        ValueError: an unknown kind or method, or methods of another task.
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
        per_class = main.per_class if kind not in ("real_short", "vae_round_trip") else ()
        only = main.only and kind in ("ungated", "shuffled_masks", "shuffled_labels")
        arms.append(Arm(kind=kind, ratio=ratio, only=only, per_class=per_class))
    methods = parse_methods(plan)
    if "resampling" in methods and _base_method(plan) == "cross_entropy" and "class_balanced" in kinds:
        arms = [arm for arm in arms if arm.kind != "class_balanced"]
        notes.append('no arm class_balanced beside "real, resampling": they are the same training')
    further = [replace(arm, method=method) for method in methods for arm in (Arm(kind="real"), main)]
    return (*arms, *plan.ratios, *further), tuple(notes)


def parse_methods(plan: Plan) -> tuple["Method", ...]:
    """The methods of `--methods`, without the one that all other arms have.

    Raises:
        ValueError: an unknown method, one named twice, or a task without classes.
    """
    from factory.evaluation.arms import METHODS

    asked = [name.strip() for name in plan.args.methods.split(",") if name.strip()]
    if asked and plan.task != "classification":
        raise ValueError(f"--methods {plan.args.methods}: a long tail is one of classes; not of {plan.task}")
    names = METHODS if asked == ["all"] else asked
    unknown = [name for name in names if name not in METHODS]
    if unknown or len(set(names)) < len(names):
        raise ValueError(
            f"--methods {plan.args.methods}: want all, or some of {', '.join(METHODS)}, each once"
        )
    return tuple(method for method in METHODS if method in names and method != _base_method(plan))


def _base_method(plan: Plan) -> str:
    """Of the arms that name none."""
    return plan.args.loss or "cross_entropy"
