"""The ratio search on Ray Tune: trials as Tune functions, grid or Optuna, early stopping, going on after a kill."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from factory.evaluation.arms import Arm
from schemas.identity import hash_parts
from tune.ratio_search import REAL_ONLY, Point, SearchData, Trial, TrialRecord, train_trial

if TYPE_CHECKING:
    from ray.tune import ResultGrid

TrialScheduler = Literal["fifo", "asha"]
EXPERIMENT = "tune"
IDENTITY_FILE = "search.json"


def run_trial(config: Mapping[str, Any], data: SearchData) -> None:
    """The function that Tune runs for one trial of the grid; reports through `ray.tune.report`."""
    import torch
    from ray import tune

    torch.set_num_threads(data.num_threads)
    trial = Trial(**config["trial"])
    steps = data.settings.num_steps
    # The reference must never be stopped for being worse than a synthetic point: it is told of at its end only.
    watched = data.points[trial.point].arm.kind != "real"

    def on_progress(entry: Mapping[str, float]) -> None:
        if watched and entry["step"] < steps and "score" in entry:
            tune.report({"step": int(entry["step"]), "stop_score": entry["score"]})

    record = asdict(train_trial(data, trial, on_progress=on_progress))
    if record["stop_score"] is None:
        record["stop_score"] = math.nan  # Tune wants its metric in every report
    tune.report({"step": steps, **record, "is_done": True})


def run_vector(config: Mapping[str, Any], data: SearchData, num_seeds: int) -> None:
    """The function that Tune runs for one vector of per-class ratios: all seeds and folds of the first model.

    Reports the mean score so far after each training, so that a scheduler compares vectors on the same folds.
    """
    import torch
    from ray import tune

    torch.set_num_threads(data.num_threads)
    arm = vector_arm(data.folds[0].real.class_names, config)
    is_reference = not any(ratio for _, ratio in arm.per_class)
    judged: list[dict[str, Any]] = []
    plan = [(seed, fold) for seed in range(num_seeds) for fold in range(len(data.folds))]
    for number, (seed, fold) in enumerate(plan, start=1):
        trial = Trial(model=0, point=0, seed=seed, fold=fold)
        used = REAL_ONLY if is_reference else arm
        judged.append(asdict(train_trial(data, trial, arm=used)))
        mean = float(np.mean([entry["score"] for entry in judged]))
        if number == len(plan):
            tune.report({"step": number, "mean_score": mean, "judged": json.dumps(judged), "is_done": True})
        elif not is_reference:
            tune.report({"step": number, "mean_score": mean})


def vector_arm(class_names: Sequence[str], config: Mapping[str, Any]) -> Arm:
    """The arm of a suggested vector, ratios by class under "ratio_<class>"."""
    return Arm(
        kind="synthetic", per_class=tuple((name, float(config[f"ratio_{name}"])) for name in class_names)
    )


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How the trials are run; nothing of it changes a fitted model.

    Attributes:
        num_seeds: task seeds of each point and fold.
        search: "grid": every point. "optuna": vectors of per-class ratios, TPE.
        num_trials: of an Optuna search.
        ratios: that an Optuna search may take for a class.
        trial_scheduler: "asha" stops trials whose validation score is low at a rung; their points cannot be chosen.
        cpus_per_trial, gpus_per_trial: resources, may be fractions.
        max_concurrent: trials at once; None as many as the resources allow.
        max_failures: times a trial whose process died is started again.
        seed: of the suggestions.
    """

    num_seeds: int = 3
    search: Literal["grid", "optuna"] = "grid"
    num_trials: int = 20
    ratios: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    trial_scheduler: TrialScheduler = "fifo"
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    max_concurrent: int | None = None
    max_failures: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_seeds", "num_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"TuneSettings.{name}: want at least 1, got {getattr(self, name)}")
        if self.cpus_per_trial <= 0 or self.gpus_per_trial < 0:
            raise ValueError(
                f"TuneSettings: want cpus_per_trial > 0 and gpus_per_trial ≥ 0, got {self.cpus_per_trial} and "
                f"{self.gpus_per_trial}"
            )
        if 0.0 not in self.ratios:
            raise ValueError(f"TuneSettings.ratios: want 0 (real data only) among them, got {self.ratios}")


@dataclass(frozen=True, kw_only=True)
class SearchRun:
    """All trials of a search.

    Attributes:
        points: of the grid, or the vectors an Optuna search tried.
        trials: one record per training.
        resumed: whether an interrupted search was gone on with.
        seconds: of this run.
    """

    points: tuple[Point, ...]
    trials: tuple[TrialRecord, ...]
    resumed: bool
    seconds: float


@dataclass
class _Watcher:
    """Who is told of finished trials; reached by the callback through this module, since Tune pickles callbacks."""

    tell: Callable[[Mapping[str, Any], Mapping[str, Any]], None]
    seen: set[str] = field(default_factory=set)


_watchers: list[_Watcher] = []


def _callback() -> Any:
    from ray.tune import Callback

    class Told(Callback):
        """Passes finished trials on to the watcher of this process."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            # A restored callback was pickled by value, its globals with it: only an import finds this process's.
            from tune.ratio_tune import tell_watcher

            tell_watcher(trial.trial_id, trial.config, trial.last_result or {})

    return Told()


def tell_watcher(trial_id: str, config: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Tell whoever runs a search in this process that a trial ended, once."""
    if _watchers and trial_id not in _watchers[-1].seen:
        _watchers[-1].seen.add(trial_id)
        _watchers[-1].tell(config, result)


def run_search(
    data: SearchData,
    settings: TuneSettings,
    out: Path,
    *,
    tell: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = lambda config, result: None,
) -> SearchRun:
    """Run the search, or go on with the one that `out` holds. Ray is up (`jobs.cluster.start_ray`).

    Args:
        tell: called in this process with the configuration and last result of each trial that ends.

    Raises:
        ValueError: `out` holds another search.
        RuntimeError: trials failed; names the first.
    """
    from ray.tune import Tuner

    started = time.perf_counter()
    out = Path(out).resolve()
    _check_same(out, data, settings)
    trainable = _trainable(data, settings)
    folder = out / EXPERIMENT
    resumed = Tuner.can_restore(str(folder))
    if resumed:
        tuner = Tuner.restore(str(folder), trainable=trainable, restart_errored=True)
    else:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # killed before Tune's first snapshot: nothing in it can be used
        tuner = _new_tuner(trainable, data, settings, out)
    _watchers.append(_Watcher(tell))
    try:
        grid = tuner.fit()
    finally:
        _watchers.pop()
    points, trials = _collect(grid, data, settings)
    return SearchRun(points=points, trials=trials, resumed=resumed, seconds=time.perf_counter() - started)


def search_identity(data: SearchData, settings: TuneSettings) -> str:
    """Hash of the search: its rows, points, models and seeds, not where it runs."""
    kind = (settings.search, settings.num_seeds, settings.trial_scheduler)
    if settings.search == "optuna":
        kind = (*kind, settings.num_trials, settings.seed, *settings.ratios)  # type: ignore[assignment]
    return hash_parts(data.identity(), *map(str, kind))


def _check_same(out: Path, data: SearchData, settings: TuneSettings) -> None:
    path, identity = out / IDENTITY_FILE, search_identity(data, settings)
    if path.exists():
        if json.loads(path.read_text())["identity"] != identity:
            raise ValueError(
                f"{out} holds a search over other rows, points, models or settings; choose another --out, or "
                "--overwrite it"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"identity": identity}))


def _trainable(data: SearchData, settings: TuneSettings) -> Any:
    from ray import tune

    resources = {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial}
    if settings.search == "optuna":
        function = tune.with_parameters(run_vector, data=data, num_seeds=settings.num_seeds)
    else:
        function = tune.with_parameters(run_trial, data=data)
    return tune.with_resources(function, resources)


def _new_tuner(trainable: Any, data: SearchData, settings: TuneSettings, out: Path) -> Any:
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    space, algorithm, samples = _space(data, settings)
    metric = "mean_score" if settings.search == "optuna" else "stop_score"
    scheduler = _scheduler(data, settings, metric) if settings.trial_scheduler == "asha" else None
    return Tuner(
        trainable,
        param_space=space,
        tune_config=TuneConfig(
            metric=metric,
            mode="max",
            search_alg=algorithm,
            scheduler=scheduler,
            num_samples=samples,
            max_concurrent_trials=settings.max_concurrent,
            reuse_actors=True,
            trial_dirname_creator=_short_name,
        ),
        run_config=RunConfig(
            name=EXPERIMENT,
            storage_path=str(out),
            callbacks=[_callback()],
            failure_config=FailureConfig(max_failures=settings.max_failures),
            verbose=0,
        ),
    )


def _short_name(trial: Any) -> str:
    return f"trial_{trial.trial_id}"


def _space(data: SearchData, settings: TuneSettings) -> tuple[dict[str, Any] | None, Any, int]:
    """Search space, search algorithm and number of samples."""
    from ray import tune

    if settings.search == "grid":
        return {"trial": tune.grid_search([asdict(t) for t in data.trials(settings.num_seeds)])}, None, 1
    from ray.tune.search.optuna import OptunaSearch

    names = data.folds[0].real.class_names
    space = {f"ratio_{name}": tune.choice(list(settings.ratios)) for name in names}
    same = [dict.fromkeys(space, ratio) for ratio in settings.ratios]
    algorithm = OptunaSearch(
        metric="mean_score", mode="max", points_to_evaluate=same[: settings.num_trials], seed=settings.seed
    )
    return space, algorithm, settings.num_trials


def _scheduler(data: SearchData, settings: TuneSettings, metric: str) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    if settings.search == "optuna":
        longest, first = settings.num_seeds * len(data.folds), 1
    else:
        longest, first = (
            data.settings.num_steps,
            min(2 * data.settings.validate_every, data.settings.num_steps),
        )
    return ASHAScheduler(time_attr="step", max_t=longest, grace_period=first, reduction_factor=2)


def _collect(
    grid: "ResultGrid", data: SearchData, settings: TuneSettings
) -> tuple[tuple[Point, ...], tuple[TrialRecord, ...]]:
    if grid.errors:
        raise RuntimeError(
            f"{len(grid.errors)} of {len(grid)} trials failed; run the same command again to repeat them; the first: "
            f"{grid.errors[0]}"
        )
    results = [(result.config or {}, result.metrics or {}) for result in grid]
    if settings.search == "optuna":
        return _vectors(results, data)
    records = [_record(config["trial"], metrics, data) for config, metrics in results]
    return data.points, tuple(sorted(records, key=lambda r: (r.model, r.point, r.seed, r.fold)))


def _record(spec: Mapping[str, int], found: Mapping[str, Any], data: SearchData) -> TrialRecord:
    """What a trial reported; without a score where the scheduler stopped it."""
    if found.get("is_done"):
        values = {item.name: found[item.name] for item in fields(TrialRecord)}
        stop = values["stop_score"]
        return TrialRecord(**{**values, "stop_score": None if math.isnan(stop) else stop})
    return TrialRecord(
        model=list(data.models)[spec["model"]],
        point=spec["point"],
        arm=data.points[spec["point"]].arm.name,
        seed=spec["seed"],
        fold=spec["fold"],
        score=None,
        stop_score=found.get("stop_score"),
    )


def _vectors(
    results: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], data: SearchData
) -> tuple[tuple[Point, ...], tuple[TrialRecord, ...]]:
    """Each different vector as a point; one suggested twice gave the same result twice."""
    names = data.folds[0].real.class_names
    points: dict[Arm, Point] = {}
    records: list[TrialRecord] = []
    ordered = sorted(results, key=lambda pair: [pair[0][f"ratio_{name}"] for name in names])
    for config, found in ordered:
        arm = vector_arm(names, config)
        arm = REAL_ONLY if not any(ratio for _, ratio in arm.per_class) else arm
        if arm in points:
            continue
        points[arm] = Point(arm=arm)
        number = len(points) - 1
        if found.get("is_done"):
            records += [TrialRecord(**{**entry, "point": number}) for entry in json.loads(found["judged"])]
        else:
            model = next(iter(data.models))
            records.append(TrialRecord(model=model, point=number, arm=arm.name, seed=0, fold=0, score=None))
    return tuple(points.values()), tuple(records)
