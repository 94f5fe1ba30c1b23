"""How much synthetic data, of which classes, behind which filter? A search that never reads the test split.

    factory explore ratio --real real.lance --synthetic synthetic.lance --tag curated-1 --task classification \\
        --model mobilenetv2_100 --ratios 0,0.25,0.5,1,2,4,8,only --seeds 3 --out runs/ratio
    factory explore ratio --real real.lance --synthetic synthetic.lance --task segmentation --model unet \\
        --per-class benign=1,malignant=4 benign=0,malignant=2 --where "" "scores['contrast'] > 20" --out runs/ratio
    factory explore ratio --real real.lance --synthetic synthetic.lance --task classification --search optuna \\
        --num-trials 30 --trial-scheduler asha --out runs/per_class
    factory explore ratio --real real.lance --fold-table 0=s0.lance 1=s1.lance 2=s2.lance --task classification \\
        --out runs/nested

The generator behind --synthetic has seen the train split, so folds of the validation groups rotate: one scores, the
others stop the training early. With --fold-table K=TABLE the train split itself is folded, and fold K scores models
whose synthetic rows come from a generator that never saw it (`factory prepare --reserve-fold K/F` makes its table).
Synthetic rows of a generator that was made from other real rows than the training rows are refused. The one-standard-
error rule chooses, ties to the smaller ratio, 0 included. Running the same command again goes on where it stopped.
"""

import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tune.ratio_inputs import Args, Inputs, mean_ratios, optuna_ratios, read_inputs

if TYPE_CHECKING:
    from factory.tracking import Run
    from tune.ratio_results import RatioAnswer
    from tune.ratio_search import SearchData, TrialRecord
    from tune.ratio_tune import TuneSettings


@dataclass(frozen=True, kw_only=True)
class RatioResult:
    """Where the answer is, the answer itself, and every trial."""

    out: Path
    answer: "RatioAnswer"
    trials: "tuple[TrialRecord, ...]"
    resumed: bool
    seconds: float


def run(args: Args) -> RatioResult:
    """Search, or go on with the search that --out holds.

    Raises:
        ValueError, FileNotFoundError: bad input, before any training.
        RuntimeError: trials failed.
    """
    from factory.evaluation.scores import PRIMARY_METRIC
    from factory.tracking import track
    from jobs.cluster import start_ray
    from tune.ratio_results import answer, write_answer
    from tune.ratio_tune import TuneSettings, run_search

    started = time.perf_counter()
    args = dataclasses.replace(args, out=str(Path(args.out).expanduser().resolve()))
    inputs = read_inputs(args)
    settings = TuneSettings(
        num_seeds=args.seeds,
        search=args.search,
        num_trials=args.num_trials,
        ratios=optuna_ratios(args),
        trial_scheduler=args.trial_scheduler,
        cpus_per_trial=args.cpus_per_trial,
        gpus_per_trial=args.gpus_per_trial,
        max_concurrent=args.max_concurrent,
    )
    _check_optuna(inputs, settings)
    out = Path(args.out)
    if args.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    total = args.num_trials if args.search == "optuna" else len(inputs.data.trials(args.seeds))
    with track(
        "explore ratio",
        recipe_parameters=inputs.about["settings"],
        inputs={"real": f"{args.real}@{inputs.about['real']['version']}"},
    ) as tracked:
        print(
            f"{total} trials: {len(inputs.data.points)} points, {len(inputs.data.folds)} folds, {args.seeds} seeds"
        )
        with _tune_environment(), start_ray(args.address, args.num_cpus):
            found = run_search(inputs.data, settings, out, tell=_Teller(total, inputs.data).tell)
        ratios = inputs.ratios if args.search == "grid" else mean_ratios(found.points, inputs.data.folds)
        metric = PRIMARY_METRIC[args.task]
        result = answer(metric, found.points, ratios, found.trials, wheres=inputs.wheres, notes=inputs.notes)
        written = write_answer(result, found.trials, inputs.about, out, num_seeds=args.seeds)
        _track(tracked, result, written)
    return RatioResult(
        out=out,
        answer=result,
        trials=found.trials,
        resumed=found.resumed,
        seconds=time.perf_counter() - started,
    )


def _check_optuna(inputs: Inputs, settings: "TuneSettings") -> None:
    """Refuse a search that would ask for more rows than there are, before compute."""
    from factory.evaluation.arms import Arm, make_training_set

    if settings.search != "optuna":
        return
    if len(inputs.wheres) > 1 or len(inputs.data.models) > 1:
        raise ValueError("--search optuna: takes one --model and one --where")
    largest = Arm(kind="synthetic", ratio=max(settings.ratios))
    for fold in inputs.data.folds:
        make_training_set(largest, fold.real, fold.synthetic[0], seed=0)


@contextmanager
def _tune_environment() -> Iterator[None]:
    """Tune without its own log files and progress tables, in the folder where the operator stands."""
    wanted = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0",
              "RAY_CHDIR_TO_TRIAL_DIR": "0"}  # fmt: skip
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Teller:
    """Prints a line and keeps a nested MLflow run for each trial that ends."""

    def __init__(self, total: int, data: "SearchData") -> None:
        self._total, self._data = total, data
        self._done = 0
        self._start = time.perf_counter()

    def tell(self, config: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A trial ended: finished, or stopped by the scheduler."""
        from factory.tracking import track

        self._done += 1
        told = self._named(config)
        values = {
            name: float(result[name])
            for name in ("score", "mean_score", "stop_score", "best_step", "seconds")
            if isinstance(result.get(name), (int, float)) and math.isfinite(result[name])
        }
        with track("explore ratio trial", recipe_parameters=told) as tracked:
            tracked.metrics(values)
            tracked.set({"stopped": str(not result.get("is_done", False)),
                         "weights_digest": str(result.get("weights_digest", ""))})  # fmt: skip
        score = values.get("score", values.get("mean_score"))
        outcome = f"{score:.3f}" if score is not None and result.get("is_done") else "stopped early"
        left = (time.perf_counter() - self._start) / self._done * (self._total - self._done)
        words = " ".join(f"{key} {value}" for key, value in told.items())
        print(f"trial {self._done}/{self._total}: {words}: {outcome}; about {left:.0f} s left",
              file=sys.stderr, flush=True)  # fmt: skip

    def _named(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if "trial" not in config:
            return {name.removeprefix("ratio_"): value for name, value in config.items()}
        spec = config["trial"]
        point = self._data.points[spec["point"]]
        return {
            "model": list(self._data.models)[spec["model"]],
            "arm": point.arm.name,
            "filter": point.filter_index,
            "seed": spec["seed"],
            "fold": spec["fold"],
        }


def _track(tracked: "Run", result: "RatioAnswer", written: Sequence[Path]) -> None:
    point = result.chosen_point
    values = {"chosen_mean": point.mean, "chosen_difference": point.difference,
              "minimum_detectable_effect": result.chosen.minimum_detectable_effect}  # fmt: skip
    if math.isfinite(point.ratio):
        values["chosen_ratio"] = point.ratio
    tracked.metrics(values)
    tracked.set({"chosen": point.name, "model": result.chosen.model, "where": result.chosen.where})
    for path in written:
        tracked.artifact(path)


def command(argv: Sequence[str]) -> int:
    """`factory explore ratio`."""
    from tune.ratio_results import summary_lines

    args = tyro.cli(Args, args=list(argv), prog="factory explore ratio", description=__doc__)
    result = run(args)
    for line in summary_lines(result.answer, num_seeds=args.seeds):
        print(line)
    print(
        f"wrote {result.out} in {result.seconds:.0f} s{' (resumed)' if result.resumed else ''}; next: factory evaluate "
        f"downstream --real {args.real}, once, with this ratio"
    )
    return 0
