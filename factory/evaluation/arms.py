"""The arms of a comparison: what each one trains on, and how. All have the same optimizer steps, batch size and tuning.

real                 the real training rows: what every other arm is compared with
real_short           the same for fewer steps: as many epochs over the real rows as an arm with added rows makes
repeated             real rows repeated to the count of the synthetic arm (differs from `real` only by chance)
strong_augmentation  real rows, strong augmentation
class_balanced       real rows, classes drawn equally often
copy_paste           real rows and lesions of training images pasted into training images
vae_round_trip       real rows and the same rows through the generator's autoencoder
synthetic            real rows and synthetic ones at a ratio; or synthetic ones only
ungated              as synthetic, rejected rows not left out, at equal count
shuffled_masks       placebo: the synthetic rows with each other's masks
shuffled_labels      placebo: the synthetic rows with each other's labels
oracle               real rows and as many more real ones, from the reserve

An arm may name a method for a long tail too: its loss and sampling then take the place of the comparison's own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from factory.evaluation.copy_paste import CopyPaste
from factory.predictors.batches import UnionBatches
from factory.predictors.examples import Examples, concatenate
from schemas.draws import draw_order, share_out
from schemas.identity import random_generator

if TYPE_CHECKING:
    from factory.predictors.settings import FitSettings

ArmKind = Literal[
    "real",
    "real_short",
    "repeated",
    "strong_augmentation",
    "class_balanced",
    "copy_paste",
    "vae_round_trip",
    "synthetic",
    "ungated",
    "shuffled_masks",
    "shuffled_labels",
    "oracle",
]
GENERATED = ("vae_round_trip", "synthetic", "ungated", "shuffled_masks", "shuffled_labels")
"""Arms that depend on the generator, and so are run for each generator seed."""
Task = Literal["classification", "segmentation"]
Method = Literal[
    "cross_entropy", "balanced_softmax", "class_balanced_focal", "logit_adjustment", "resampling"
]
"""How a classifier meets a long tail: by a loss over plain batches, or by cross-entropy over class-balanced ones."""
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training.

    Attributes:
        kind: what is added to the real rows; see the top of the file.
        ratio: added rows per real row of a class, ≥ 0; ignored by the arms that add none.
        per_class: (class, ratio) pairs instead of one ratio; a class that is not named gets none.
        only: leave out the real rows (synthetic, ungated and the placebos).
        method: loss and sampling of this arm; None for the comparison's own.
    """

    kind: ArmKind
    ratio: float = 1.0
    per_class: tuple[tuple[str, float], ...] = ()
    only: bool = False
    method: Method | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ArmKind):
            raise ValueError(f"Arm.kind: want one of {', '.join(get_args(ArmKind))}, got {self.kind!r}")
        for name, ratio in (("ratio", self.ratio), *self.per_class):
            if not (math.isfinite(ratio) and ratio >= 0):
                raise ValueError(f"Arm.{name}: want a finite number ≥ 0, got {ratio}")
        if len(dict(self.per_class)) != len(self.per_class):
            raise ValueError(f"Arm.per_class: a class is named twice in {self.per_class}")
        if self.only and (self.kind not in GENERATED or self.kind == "vae_round_trip"):
            raise ValueError(f"Arm.only: {self.kind} without real rows makes no sense")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"Arm.method: want one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method is not None and self.kind == "class_balanced":
            raise ValueError("Arm.method: class_balanced has a sampling of its own; take kind real")

    @property
    def adds_rows(self) -> bool:
        """Whether rows beside the real ones train."""
        return self.kind not in ("real", "real_short", "strong_augmentation", "class_balanced")

    @property
    def uses_generator(self) -> bool:
        """Whether the arm differs between generator seeds."""
        return self.kind in GENERATED

    @property
    def name(self) -> str:
        """Short and unique: "real", "synthetic 2×", "synthetic benign 1× malignant 4×", "synthetic only 1×"; a method
        stands behind a comma: "real, balanced_softmax"."""
        words: list[str] = [self.kind]
        if self.adds_rows or self.kind == "real_short":
            words += ["only"] if self.only else []
            words += [f"{label} {ratio:g}×" for label, ratio in self.per_class] or [f"{self.ratio:g}×"]
        return " ".join(words) + (f", {self.method}" if self.method else "")

    def added(self, real: Examples) -> np.ndarray:
        """Rows to add of each class, int64 (C,).

        Raises:
            ValueError: `per_class` names a class that the data lacks.
        """
        counts = dict(zip(real.class_names, real.counts().tolist(), strict=True))
        if not self.per_class:
            wanted = share_out(counts, self.ratio, balance=False)
        else:
            unknown = [name for name, _ in self.per_class if name not in counts]
            if unknown:
                raise ValueError(f"Arm.per_class: class {unknown[0]!r} is none of {', '.join(counts)}")
            ratios = dict(self.per_class)
            wanted = {name: round(number * ratios.get(name, 0.0)) for name, number in counts.items()}
        return np.array([wanted[name] for name in real.class_names], np.int64)

    def synthetic_ratio(self, real: Examples) -> float:
        """All added rows over all real rows; infinity without real rows."""
        return math.inf if self.only else float(self.added(real).sum() / len(real))


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSet:
    """What an arm trains on.

    Attributes:
        examples: all rows.
        changes: fields of the `FitSettings` that the arm sets.
        steps_share: share of the optimizer steps it makes; 1 but for `real_short`.
        notes: what the reader of the result should know.
    """

    examples: Examples
    changes: Mapping[str, Any] = field(default_factory=dict)
    steps_share: float = 1.0
    notes: tuple[str, ...] = ()

    def settings(self, base: "FitSettings") -> "FitSettings":
        """`base` with the arm's changes."""
        steps = max(1, round(base.num_steps * self.steps_share))
        return replace(base, **{**self.changes, "num_steps": steps})

    def batches(self, settings: "FitSettings", seed: int) -> UnionBatches:
        """The order of the rows under the arm's own settings."""
        examples = self.examples
        return UnionBatches(
            examples.labels, examples.num_classes, settings.batch_size, seed, settings.sampling
        )


def make_training_set(
    arm: Arm,
    real: Examples,
    synthetic: Examples | None = None,
    reserve: Examples | None = None,
    *,
    seed: int,
    ungated: Examples | None = None,
    round_trip: Examples | None = None,
    copy_paste: CopyPaste | None = None,
) -> TrainingSet:
    """The rows of an arm, and what its method changes.

    Args:
        real: real training rows.
        synthetic: accepted synthetic rows in the order of drawing.
        reserve: real rows that nothing else has seen, for the oracle.
        seed: of shuffling and pasting.
        ungated: synthetic rows whatever the verdict, in the order of drawing.
        round_trip: the real rows, decoded from their own latents.

    Raises:
        ValueError: what the arm needs is missing, or too few rows of a class.
    """
    if not arm.adds_rows:
        made = _without_added(arm, real)
    else:
        pool = ungated if arm.kind == "ungated" else synthetic
        made = _with_added(arm, real, pool, reserve, round_trip, copy_paste or CopyPaste(), seed)
    if arm.method is None:
        return made
    return replace(made, changes={**made.changes, **method_settings(arm.method)})


def method_settings(method: Method) -> dict[str, Any]:
    """Fields of the `FitSettings` that a method sets: loss and sampling.

    A loss over plain batches gets the classes' shares of the batches, added rows included (`Batches.counts`).
    """
    from factory.evaluation.models import parse_loss

    is_resampling = method == "resampling"
    loss = parse_loss("classification", "cross_entropy" if is_resampling else method)
    return {"loss": loss, "sampling": "class_balanced" if is_resampling else "plain"}


def _with_added(
    arm: Arm,
    real: Examples,
    pool: Examples | None,
    reserve: Examples | None,
    round_trip: Examples | None,
    copy_paste: CopyPaste,
    seed: int,
) -> TrainingSet:
    wanted = arm.added(real)
    name = f"arm {arm.name}"
    if arm.kind == "repeated":
        return TrainingSet(
            examples=concatenate(real, first_of_each_class(_endless(real, wanted), wanted, name))
        )
    if arm.kind == "copy_paste":
        return TrainingSet(examples=concatenate(real, copy_paste.make(real, wanted, seed=seed)))
    if arm.kind == "oracle":
        added, notes = _most(
            _needed(reserve, name, "reserve rows (factory prepare --num-train)"), wanted, name
        )
        return TrainingSet(examples=concatenate(real, added), notes=notes)
    if arm.kind == "vae_round_trip":
        passed = _needed(round_trip, name, "the real rows through the autoencoder")
        return TrainingSet(
            examples=concatenate(real, first_of_each_class(_endless(passed, wanted), wanted, name))
        )
    added = first_of_each_class(_needed(pool, name, "synthetic rows"), wanted, name)
    if arm.kind in ("shuffled_masks", "shuffled_labels"):
        added = shuffled(added, "masks" if arm.kind == "shuffled_masks" else "labels", seed)
    if not len(added) and arm.only:
        raise ValueError(f"{name}: has no row to train on")
    return TrainingSet(examples=added if arm.only else concatenate(real, added))


def _without_added(arm: Arm, real: Examples) -> TrainingSet:
    if arm.kind == "strong_augmentation":
        from factory.predictors.augmentation import Augmentation

        return TrainingSet(examples=real, changes={"augmentation": Augmentation(kind="strong")})
    if arm.kind == "class_balanced":
        return TrainingSet(examples=real, changes={"sampling": "class_balanced"})
    share = 1 / (1 + arm.ratio) if arm.kind == "real_short" else 1.0
    return TrainingSet(examples=real, steps_share=share)


def _needed(examples: Examples | None, name: str, what: str) -> Examples:
    if examples is None:
        raise ValueError(f"{name}: needs {what}; give them or leave the arm out")
    return examples


def first_of_each_class(pool: Examples, wanted: np.ndarray, name: str) -> Examples:
    """The first rows of each class, as many as wanted, in the order of the pool: a larger count holds the smaller.

    Raises:
        ValueError: a class has too few rows; says how many.
    """
    have = pool.counts()
    for label in np.flatnonzero(have < wanted).tolist():
        raise ValueError(
            f"{name}: wants {wanted[label]} row(s) of class {pool.class_names[label]}, there are {have[label]}; "
            "make more, ask for less, or leave the class out with --per-class"
        )
    place = np.zeros(len(pool), np.int64)
    for label in range(pool.num_classes):
        rows = np.flatnonzero(pool.labels == label)
        place[rows] = np.arange(len(rows))
    return pool.take(place < np.asarray(wanted)[pool.labels])


def _most(pool: Examples, wanted: np.ndarray, name: str) -> tuple[Examples, tuple[str, ...]]:
    """As many reserve rows as wanted, or all there are, which is said; in an order drawn from their ids."""
    order = np.argsort([draw_order(row) for row in pool.ids], kind="stable")
    counts = np.minimum(wanted, pool.counts())
    notes: tuple[str, ...] = ()
    if (counts < wanted).any():
        short = ", ".join(
            f"{pool.class_names[c]} {counts[c]} of {wanted[c]}" for c in np.flatnonzero(counts < wanted)
        )
        notes = (f"{name}: the reserve is smaller than asked for: {short}",)
    if not counts.any():
        raise ValueError(f"{name}: the reserve has no row of the classes wanted")
    return first_of_each_class(pool.take(order), counts, name), notes


def _endless(pool: Examples, wanted: np.ndarray) -> Examples:
    """The pool often enough, one after the other, that every class has as many rows as wanted."""
    have = pool.counts()
    empty = (have == 0) & (wanted > 0)
    if empty.any():
        raise ValueError(f"class {pool.class_names[int(empty.argmax())]} has no row to repeat")
    times = int(np.ceil(wanted / np.maximum(have, 1)).max(initial=1))
    return concatenate(*[pool] * max(times, 1))


def shuffled(examples: Examples, what: Literal["masks", "labels"], seed: int) -> Examples:
    """Each row with another row's masks or labels (one cycle through all rows, so that none keeps its own mask).

    Raises:
        ValueError: masks of rows without masks.
    """
    order = random_generator(f"placebo/{seed}", what).permutation(len(examples))
    source = np.empty(len(order), np.int64)
    source[order] = np.roll(order, 1)
    if what == "labels":
        return replace(examples, labels=examples.labels[source])
    if examples.masks is None or examples.has_mask is None:
        raise ValueError("shuffled_masks: the synthetic rows have no masks; leave the arm out")
    return replace(examples, masks=examples.masks[source], has_mask=examples.has_mask[source])


def baseline_arms(task: Task, *, ratio: float = 1.0, with_masks: bool, with_reserve: bool) -> tuple[Arm, ...]:
    """Every baseline, placebo and control that the data at hand allows, beside the synthetic arm itself.

    `vae_round_trip` and `ungated` need inputs of their own and are added by the caller who has them.
    """
    ratio = ratio if ratio > 0 else 1.0
    kinds: list[ArmKind] = ["real", "real_short", "repeated", "strong_augmentation", "class_balanced"]
    if with_masks:
        kinds.append("copy_paste")
    kinds.append("shuffled_masks" if task == "segmentation" else "shuffled_labels")
    if with_reserve:
        kinds.append("oracle")
    return tuple(Arm(kind=kind, ratio=ratio) for kind in kinds)
