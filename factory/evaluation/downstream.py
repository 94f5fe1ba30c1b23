"""Train every arm, let every model judge the evaluation rows, keep each finished one.

Nothing here knows Ray: `executor` is any map over the runs. A run that was finished before, under the same
fingerprint, is read back, so an interrupted comparison goes on.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from factory.evaluation.arms import Arm, TrainingSet, make_training_set
from factory.evaluation.leakage import check_disjoint, check_parts_disjoint
from factory.evaluation.scores import SEGMENTATION_COLUMNS, Scores, lesion_shares
from factory.evaluation.task_metrics import dice, hausdorff95, iou
from factory.predictors.examples import Examples
from schemas.identity import canonical, hash_parts

if TYPE_CHECKING:
    from factory.predictors.fitted import Fitted, Predictor
    from factory.predictors.settings import FitSettings

RunFunction = Callable[["ArmRun"], dict[str, Any]]
Executor = Callable[[RunFunction, Sequence["ArmRun"]], Iterable[dict[str, Any]]]
"""A map, in any order, over picklable runs; the function is picklable and carries the examples."""


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One training: an arm, the generator seed behind its rows (None without generator), a task seed."""

    arm: Arm
    generator_seed: int | None
    task_seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """All rows that a comparison may draw on.

    Attributes:
        real: real training rows.
        evaluation: rows that judge, with native truths for segmentation.
        validation: rows that stop training early; None trains all steps.
        reserve: real rows for the oracle.
        synthetic: generator seed → accepted synthetic rows, in the order of drawing.
        ungated: the same, whatever the verdict.
        round_trip: generator seed → the real rows through its autoencoder.
    """

    real: Examples
    evaluation: Examples
    validation: Examples | None = None
    reserve: Examples | None = None
    synthetic: Mapping[int, Examples]
    ungated: Mapping[int, Examples]
    round_trip: Mapping[int, Examples]

    def training_set(self, run: ArmRun) -> TrainingSet:
        """The rows of one run."""
        of = run.generator_seed
        return make_training_set(
            run.arm,
            self.real,
            self.synthetic.get(of) if of is not None else None,
            self.reserve,
            seed=run.task_seed,
            ungated=self.ungated.get(of) if of is not None else None,
            round_trip=self.round_trip.get(of) if of is not None else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What came of one training.

    Attributes:
        values: float64 (N, V) of the evaluation rows, as in `Scores`.
        best_step: whose weights were kept; steps and seconds made.
        weights_digest: of the trained tensors.
        rows_digest: of the ids that trained.
        stop_score: best validation score that stopped the training; None without validation.
    """

    values: np.ndarray
    best_step: int
    seconds: float
    weights_digest: str
    rows_digest: str
    stop_score: float | None


def judge(fitted: "Fitted", evaluation: Examples) -> np.ndarray:
    """Values of every evaluation row, float64 (N, V).

    Classification: probabilities (N, C). Segmentation at native size: Dice, IoU, HD95 (mm where the spacing is known,
    else px; the diagonal for an empty prediction), NaN where the truth is empty; and, there, 1 if any px is called.

    Raises:
        ValueError: segmentation of rows without native truth.
    """
    if fitted.task == "classification":
        return np.asarray(fitted.predict(evaluation), np.float64)
    from factory.predictors.fitted import predict_native

    truths = evaluation.native
    if truths is None or any(truth.mask is None for truth in truths):
        raise ValueError("evaluation rows: segmentation needs a mask at native size for each of them")
    values = np.full((len(evaluation), len(SEGMENTATION_COLUMNS)), np.nan)
    # Classes say nothing of masks; those of another dataset may be unknown to the model.
    shown = replace(evaluation, class_names=fitted.class_names, labels=np.zeros(len(evaluation), np.int64))
    for row, (truth, mask) in enumerate(zip(truths, predict_native(fitted, shown), strict=True)):
        assert truth.mask is not None  # checked above
        if not truth.mask.any():
            values[row, 3] = float(mask.any())
            continue
        spacing = None if truth.pixel_spacing is None else (truth.pixel_spacing, truth.pixel_spacing)
        values[row, :3] = (
            dice(truth.mask, mask),
            iou(truth.mask, mask),
            hausdorff95(truth.mask, mask, spacing=spacing),
        )
    return values


def fit_and_judge(
    predictor: "Predictor",
    settings: "FitSettings",
    training: TrainingSet,
    *,
    validation: Examples | None,
    evaluation: Examples,
    seed: int,
    device: str = "cpu",
    on_progress: Callable[..., Any] | None = None,
) -> Judged:
    """Train one model and let it judge. The order of rows and the weights follow from `seed`.

    Raises:
        ValueError: evaluation or early-stopping rows among the training rows.
    """
    from factory.predictors.fitting import fit

    check_disjoint(training.examples, evaluation=evaluation, validation=validation)
    if validation is not None:
        check_parts_disjoint({"validation": validation, "evaluation": evaluation})
    start = time.perf_counter()
    own = training.settings(settings)
    fitted = fit(
        predictor,
        own,
        training.examples,
        training.batches(own, seed),
        validation=validation,
        seed=seed,
        device=device,
        on_progress=on_progress,
    )
    return Judged(
        values=judge(fitted, evaluation),
        best_step=int(fitted.best_step),
        seconds=time.perf_counter() - start,
        weights_digest=fitted.digest(),
        rows_digest=fitted.rows_digest,
        stop_score=fitted.best_score,
    )


def run_arms(
    arms: Sequence[Arm],
    real: Examples,
    reserve: Examples | None,
    synthetic: Mapping[int, Examples],
    evaluation: Examples,
    predictor: "Predictor",
    settings: "FitSettings",
    task_seeds: Sequence[int],
    *,
    out: Path,
    validation: Examples | None = None,
    ungated: Mapping[int, Examples] | None = None,
    round_trip: Mapping[int, Examples] | None = None,
    subgroups: Mapping[str, Sequence[str]] | None = None,
    device: str = "cpu",
    executor: Executor = map,
    progress: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Train each arm with each generator seed and each task seed, and collect what the models say.

    Args:
        arms: with different names; "real" among them if they are to be compared.
        real, reserve, synthetic, evaluation, validation, ungated, round_trip: see `Sources`.
        predictor: what is trained; its task decides what is scored.
        settings: the same for every arm but for what the arm changes.
        task_seeds: of the predictor's training, crossed with the generator seeds.
        out: folder of the finished runs, one JSON each, named by the fingerprint of all that decides it.
        subgroups: name → value of each evaluation row, for subgroup tables.
        executor: a map over runs; Ray tasks in a job.
        progress: called with 1 for each run, read back or new.

    Raises:
        ValueError: before any training: leaks, missing rows, contradicting arms.
    """
    sources = Sources(real=real, evaluation=evaluation, validation=validation, reserve=reserve,
                      synthetic=synthetic, ungated=ungated or {}, round_trip=round_trip or {})  # fmt: skip
    runs = plan_runs(arms, sorted(synthetic), task_seeds)
    notes = check_runs(runs, sources)
    predictor.build(real.num_classes, real.channels, real.size)  # refuses what cannot be built at this size
    content = content_digests(sources)
    names = {run: run_fingerprint(run, predictor, settings, content) for run in runs}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[ArmRun, dict[str, Any]] = {}
    for run in runs:
        if (record := _read_back(out, names[run])) is not None:
            found[run] = record
            progress(1)
    missing = [run for run in runs if run not in found]
    work = partial(_run, sources=sources, predictor=predictor, settings=settings, device=device)
    by_key = {_key(run): run for run in missing}
    for record in executor(work, missing) if missing else ():
        run = by_key[tuple(record["run"])]
        _write(out / f"{names[run]}.json", {**record, "fingerprint": names[run]})
        found[run] = record
        progress(1)
    return Scores(
        task=predictor.task,
        class_names=real.class_names,
        ids=evaluation.ids,
        groups=evaluation.groups,
        labels=evaluation.labels,
        areas=lesion_shares(evaluation),
        folds=np.zeros(len(evaluation), np.int64),
        arms=tuple(arms),
        generator_seeds=tuple(sorted(synthetic)),
        task_seeds=tuple(task_seeds),
        values={
            (run.arm.name, run.generator_seed, run.task_seed): _array(record["values"])
            for run, record in found.items()
        },
        train_counts=real.counts(),
        train_areas=lesion_shares(real),
        subgroups=dict(subgroups or {}),
        notes=notes,
    )


def plan_runs(arms: Sequence[Arm], generator_seeds: Sequence[int], task_seeds: Sequence[int]) -> list[ArmRun]:
    """All trainings: arms without a generator once per task seed.

    Raises:
        ValueError: arms of one name, no seeds, or a generator's arm without a generator.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"arms: want at least one, each name once; got {', '.join(names)}")
    if not len(task_seeds) or len(set(task_seeds)) < len(task_seeds):
        raise ValueError(f"task_seeds: want at least one, each once; got {list(task_seeds)}")
    runs = []
    for arm in arms:
        if arm.uses_generator and not generator_seeds:
            raise ValueError(f"arm {arm.name}: there are no synthetic rows")
        generators: Sequence[int | None] = generator_seeds if arm.uses_generator else (None,)
        runs += [ArmRun(arm=arm, generator_seed=g, task_seed=t) for g in generators for t in task_seeds]
    return runs


def check_runs(runs: Sequence[ArmRun], sources: Sources) -> tuple[str, ...]:
    """Make every training set once and look for leaks; returns what the reader should know.

    Raises:
        ValueError: a leak or missing rows, before any training.
    """
    held_out = {"evaluation": sources.evaluation, "validation": sources.validation}
    if sources.validation is not None:
        check_parts_disjoint({"validation": sources.validation, "evaluation": sources.evaluation})
    notes: dict[str, None] = {}
    checked: set[tuple[str, int | None]] = set()
    for run in runs:
        if (run.arm.name, run.generator_seed) in checked:
            continue
        checked.add((run.arm.name, run.generator_seed))
        training = sources.training_set(run)
        check_disjoint(training.examples, **held_out)
        notes |= dict.fromkeys(training.notes)
    return tuple(notes)


def _run(
    run: ArmRun, *, sources: Sources, predictor: "Predictor", settings: "FitSettings", device: str
) -> dict[str, Any]:
    """One run as plain data; in a worker process or here."""
    judged = fit_and_judge(
        predictor,
        settings,
        sources.training_set(run),
        validation=sources.validation,
        evaluation=sources.evaluation,
        seed=run.task_seed,
        device=device,
    )
    return {
        "run": list(_key(run)),
        "values": [[None if np.isnan(v) else v for v in row] for row in judged.values.tolist()],
        "best_step": judged.best_step,
        "seconds": judged.seconds,
        "weights_digest": judged.weights_digest,
        "rows_digest": judged.rows_digest,
        "stop_score": judged.stop_score,
    }


def _key(run: ArmRun) -> tuple[str, int | None, int]:
    return run.arm.name, run.generator_seed, run.task_seed


def content_digests(sources: Sources) -> dict[str, str]:
    """Digest of every part's pixels, labels and masks."""
    parts = {
        "real": sources.real,
        "evaluation": sources.evaluation,
        "validation": sources.validation,
        "reserve": sources.reserve,
        **{f"synthetic {seed}": part for seed, part in sources.synthetic.items()},
        **{f"ungated {seed}": part for seed, part in sources.ungated.items()},
        **{f"round_trip {seed}": part for seed, part in sources.round_trip.items()},
    }
    return {name: part.content_digest() for name, part in parts.items() if part is not None}


def run_fingerprint(
    run: ArmRun, predictor: "Predictor", settings: "FitSettings", content: Mapping[str, str], scope: str = ""
) -> str:
    """Of everything that decides the run; parts that the arm does not touch do not enter.

    `scope` keeps apart runs that store other things under their fingerprint.
    """
    needed = {"real", "evaluation", "validation"}
    if run.arm.kind == "oracle":
        needed.add("reserve")
    if run.arm.uses_generator:
        kind = {"ungated": "ungated", "vae_round_trip": "round_trip"}.get(run.arm.kind, "synthetic")
        needed.add(f"{kind} {run.generator_seed}")
    arm = canonical(run.arm)
    if run.arm.method is None:
        del arm["method"]  # arms without one are those that were opened before there were methods
    what = {
        "arm": arm,
        "task_seed": run.task_seed,
        "predictor": canonical(predictor),
        "settings": canonical(settings),
        "content": {name: digest for name, digest in content.items() if name in needed},
    }
    return hash_parts(scope, json.dumps(what, sort_keys=True))


def _read_back(out: Path, name: str) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as fault:
        raise ValueError(f"{path}: is no JSON ({fault}); remove it to have the run made again") from fault
    return cast("dict[str, Any]", record)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.write_text(json.dumps(record))
    partial_path.replace(path)


def _array(values: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if v is None else v for v in row] for row in values], np.float64)
