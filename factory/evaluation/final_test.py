"""The one use of held-out rows: every model is trained and kept first, then the rows are opened and judged once.

While models train, the held-out rows are known by id and group only, which is enough to find most leaks (`sealed`).
What the models say of the opened rows is written down before anything is computed from it, so that an interrupted
judgement goes on, and a report can be made again, without opening them a second time.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.evaluation.arms import Arm
from factory.evaluation.downstream import (
    ArmRun,
    Executor,
    Sources,
    check_runs,
    content_digests,
    judge,
    plan_runs,
    run_fingerprint,
)
from factory.evaluation.leakage import check_disjoint
from factory.evaluation.scores import Scores, lesion_shares
from factory.predictors.examples import Examples
from schemas.identity import hash_parts

if TYPE_CHECKING:
    from factory.predictors.fitted import Predictor
    from factory.predictors.settings import FitSettings


def sealed(ids: Sequence[str], groups: Sequence[str], like: Examples) -> Examples:
    """Held-out rows of which only ids and groups are known: blank images, for looking for leaks before the opening."""
    shape = (len(ids), like.size, like.size, like.channels)
    return Examples(
        images=np.zeros(shape, np.uint8),
        labels=np.zeros(len(ids), np.int64),
        class_names=like.class_names,
        ids=tuple(ids),
        groups=tuple(groups),
        is_real=np.ones(len(ids), bool),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What is to be compared: all arms, seeds and rows but the held-out ones.

    Attributes:
        arms: with different names, "real" among them.
        sources: rows; `sources.evaluation` is sealed.
        predictor, settings: what is trained, and how.
        task_seeds: of the predictor's training, crossed with the generator seeds.
    """

    arms: tuple[Arm, ...]
    sources: Sources
    predictor: "Predictor"
    settings: "FitSettings"
    task_seeds: tuple[int, ...]

    @property
    def generator_seeds(self) -> tuple[int, ...]:
        return tuple(sorted(self.sources.synthetic))

    def runs(self) -> list[ArmRun]:
        """Every training."""
        return plan_runs(self.arms, self.generator_seeds, self.task_seeds)

    def check(self) -> tuple[str, ...]:
        """Make every training set once and look for leaks; returns what the reader should know.

        Raises:
            ValueError: a leak or missing rows.
        """
        return check_runs(self.runs(), self.sources)

    def names(self) -> dict[ArmRun, str]:
        """Fingerprint of every training: of all that decides its weights, the held-out ids included."""
        content = content_digests(self.sources)
        return {
            run: run_fingerprint(run, self.predictor, self.settings, content, "final test")
            for run in self.runs()
        }


def comparison_fingerprint(names: Mapping[ArmRun, str], primary: str) -> str:
    """Of all trainings of a comparison and its declared arm: two openings with the same one ask the same question."""
    return hash_parts(primary, *sorted(names.values()))


def train_all(
    comparison: Comparison,
    names: Mapping[ArmRun, str],
    models: Path,
    *,
    device: str = "cpu",
    executor: Executor = map,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Train every model that `models` lacks and keep it there; a killed training goes on from its checkpoint.

    Raises:
        ValueError: a training set with held-out rows.
    """
    models.mkdir(parents=True, exist_ok=True)
    missing = [run for run in names if not is_trained(models / names[run])]
    progress(len(names) - len(missing))
    work = partial(
        _train, comparison=comparison, names=dict(names), models=str(models.resolve()), device=device
    )
    for _ in executor(work, missing) if missing else ():
        progress(1)


def is_trained(folder: Path) -> bool:
    """Whether a model is kept there; its record is written last."""
    return (folder / "fitted.json").is_file()


def _train(
    run: ArmRun, *, comparison: Comparison, names: Mapping[ArmRun, str], models: str, device: str
) -> dict[str, Any]:
    from factory.predictors.classifiers import FeatureProbe
    from factory.predictors.fitting import fit

    sources = comparison.sources
    training = sources.training_set(run)
    check_disjoint(training.examples, held_out=sources.evaluation, validation=sources.validation)
    own = training.settings(comparison.settings)
    folder = Path(models) / names[run]
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = None if isinstance(comparison.predictor, FeatureProbe) else folder / "checkpoint"
    fitted = fit(
        comparison.predictor,
        own,
        training.examples,
        training.batches(own, run.task_seed),
        validation=sources.validation,
        seed=run.task_seed,
        device=device,
        checkpoint=checkpoint,
        keep_optimizer=False,
    )
    fitted.save(folder)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return {"name": names[run], "seconds": fitted.seconds}


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """What every model said of one set of held-out rows, and what the rows truly are.

    Attributes:
        ids, groups: of the rows.
        labels: int64 (N,).
        areas: lesion shares, float64 (N,), NaN without a mask.
        values: fingerprint of a training → float64 (N, V), as in `Scores`.
        subgroups: name → value of each row.
        notes: what the reader should know of the rows.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray
    areas: np.ndarray
    values: Mapping[str, np.ndarray]
    subgroups: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """One npz of plain arrays, whole or not at all."""
        arrays: dict[str, np.ndarray] = {
            "ids": np.array(self.ids, np.str_), "groups": np.array(self.groups, np.str_),
            "labels": self.labels, "areas": self.areas, "notes": np.array(self.notes, np.str_),
        }  # fmt: skip
        arrays |= {f"values/{name}": value for name, value in self.values.items()}
        arrays |= {f"subgroup/{name}": np.array(value, np.str_) for name, value in self.subgroups.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with partial_path.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        partial_path.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Judgement":
        """What `save` wrote; nothing is unpickled."""
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

        return cls(
            ids=tuple(arrays["ids"].tolist()),
            groups=tuple(arrays["groups"].tolist()),
            labels=arrays["labels"],
            areas=arrays["areas"],
            values=part("values/"),
            subgroups={name: tuple(value.tolist()) for name, value in part("subgroup/").items()},
            notes=tuple(arrays["notes"].tolist()),
        )


def judge_all(
    comparison: Comparison,
    names: Mapping[ArmRun, str],
    models: Path,
    opened: Examples,
    *,
    subgroups: Mapping[str, Sequence[str]] | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> Judgement:
    """Every kept model judges the opened rows.

    Raises:
        ValueError: a training image that equals an opened one, which only the pixels show.
    """
    from factory.predictors.fitted import load_fitted

    checked: set[tuple[str, int | None]] = set()
    values = {}
    for run, name in names.items():
        if (run.arm.name, run.generator_seed) not in checked:
            checked.add((run.arm.name, run.generator_seed))
            check_disjoint(comparison.sources.training_set(run).examples, held_out=opened)
        values[name] = judge(load_fitted(models / name), opened)
        progress(1)
    return Judgement(
        ids=opened.ids,
        groups=opened.groups,
        labels=opened.labels,
        areas=lesion_shares(opened),
        values=values,
        subgroups={name: tuple(value) for name, value in (subgroups or {}).items()},
        notes=tuple(notes),
    )


def scores_of(
    comparison: Comparison, names: Mapping[ArmRun, str], judgement: Judgement, notes: Sequence[str] = ()
) -> Scores:
    """The judgement in the form that `compare` takes, among the classes that the rows have (see `of_classes`)."""
    real = comparison.sources.real
    scores = Scores(
        task=comparison.predictor.task,
        class_names=real.class_names,
        ids=judgement.ids,
        groups=judgement.groups,
        labels=judgement.labels,
        areas=judgement.areas,
        folds=np.zeros(len(judgement.ids), np.int64),
        arms=comparison.arms,
        generator_seeds=comparison.generator_seeds,
        task_seeds=comparison.task_seeds,
        values={
            (run.arm.name, run.generator_seed, run.task_seed): judgement.values[name]
            for run, name in names.items()
        },
        train_counts=real.counts(),
        train_areas=lesion_shares(real),
        subgroups=judgement.subgroups,
        notes=(*notes, *judgement.notes),
    )
    return of_classes(scores, np.unique(judgement.labels)) if scores.task == "classification" else scores


def of_classes(scores: Scores, kept: np.ndarray) -> Scores:
    """Probabilities among some of the classes, summing to 1: for rows of another dataset that lacks the others.

    Args:
        kept: numbers of the classes, in increasing order; every row is of one of them.
    """
    if len(kept) == len(scores.class_names):
        return scores
    values = {}
    for key, value in scores.values.items():
        among = np.maximum(value[:, kept], 1e-12)
        values[key] = among / among.sum(axis=1, keepdims=True)
    names = tuple(scores.class_names[c] for c in kept.tolist())
    note = f"these rows are of {', '.join(names)} only: probabilities are among these classes"
    return replace(
        scores,
        class_names=names,
        labels=np.searchsorted(kept, scores.labels),
        values=values,
        train_counts=scores.train_counts[kept],
        notes=(*scores.notes, note),
    )


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, *, num_bins: int = 10
) -> list[dict[str, float]]:
    """Rows of a reliability diagram: confidence, accuracy and number of rows in bins of equal width, empty ones left out.

    Args:
        labels: int (N,).
        probabilities: (M, N, C) of M models, pooled.
    """
    confidence = probabilities.max(axis=2).ravel()
    correct = (probabilities.argmax(axis=2) == labels).ravel()
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    return [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(correct[bins == b].mean()),
            "rows": int((bins == b).sum()) / len(probabilities),
        }
        for b in np.unique(bins).tolist()
    ]


def opaque(name: str) -> str:
    """An id that says nothing of the source's own: 16 hex characters."""
    return hash_parts("opaque", name)[:16]


def predictions_table(scores: Scores) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of a CSV file: every model's word on every row, ids and groups opaque."""
    from factory.evaluation.scores import SEGMENTATION_COLUMNS

    is_class = scores.task == "classification"
    columns = [f"p_{name}" for name in scores.class_names] if is_class else list(SEGMENTATION_COLUMNS)
    header = ["row", "group", "label", "lesion_share", "arm", "generator_seed", "task_seed", *columns]
    lines = []
    for (arm, generator, task), values in sorted(scores.values.items(), key=lambda item: str(item[0])):
        for row, value in enumerate(values.tolist()):
            about = [
                opaque(scores.ids[row]),
                opaque(scores.groups[row]),
                scores.class_names[scores.labels[row]],
            ]
            area = scores.areas[row]
            share = "" if np.isnan(area) else f"{area:.6f}"
            told = ["" if np.isnan(v) else f"{v:.6f}" for v in value]
            lines.append([*about, share, arm, "" if generator is None else generator, task, *told])
    return header, lines
