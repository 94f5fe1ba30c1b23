"""Does synthetic data help the real task? Every arm is trained, then the test split is opened, once.

    factory evaluate downstream --real real.lance --synthetic synthetic.lance --search runs/ratio --out runs/downstream
    factory evaluate downstream --real real.lance --synthetic s0.lance s1.lance s2.lance --task segmentation \\
        --model unet --ratio 1 --seeds 5 --external other.lance --out runs/downstream
    factory evaluate downstream --real real.lance --synthetic synthetic.lance --task classification --model resnet50 \\
        --ratio 1 2 4 only --arms real,strong_augmentation,synthetic,oracle --out runs/ratios
    factory evaluate downstream --real real.lance --synthetic synthetic.lance --ratio 1 --methods all --out runs/methods

Each --synthetic table comes from a generator trained with another seed; one of them makes a pilot. The first --ratio is
the primary arm, declared before the opening; --search takes it, the model and the training from a search that never
read the test split. Models are kept in --out until the test rows were judged; a killed run goes on where it stopped,
with the same command. Who opened the split, when and why is written into the table, beside it and into MLflow; a
second comparison on it needs --again, which is recorded too.
"""

import csv
import dataclasses
import getpass
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from jobs.evaluate_inputs import Inputs, read_inputs
from jobs.evaluate_plan import RESULTS, Args, Plan, make_plan
from jobs.progress import progress_bar

if TYPE_CHECKING:
    from factory.evaluation.arms import Arm, Task
    from factory.evaluation.comparison import ComparisonTable
    from factory.evaluation.downstream import Executor
    from factory.evaluation.final_test import Judgement
    from factory.evaluation.scores import Scores
    from factory.predictors.examples import Examples
    from jobs.evaluate_opening import Opening

INTERVAL_RESAMPLES = 1000
"""Behind the intervals of the metrics that are not compared."""


@dataclass(frozen=True, kw_only=True)
class DownstreamResult:
    """What was found and where it was written; tables by "test" and the external tables."""

    tables: Mapping[str, "ComparisonTable"]
    record: dict[str, Any]
    folder: str


# ------------------------------------------------------------------------------------------ running


def run(args: Args) -> DownstreamResult:
    """Train, open, judge, compare; or go on with what --out holds.

    Raises:
        FileNotFoundError, ValueError: bad input or a leak, before any training.
        ValueError: the test split was opened before and --again is not said; before any training too.
    """
    from factory.evaluation.final_test import comparison_fingerprint, train_all
    from factory.tracking import track
    from jobs.evaluate_opening import plan_opening

    plan = make_plan(args)
    inputs = read_inputs(plan)
    names = inputs.comparison.names()
    fingerprint = comparison_fingerprint(names, plan.primary)
    who = args.opened_by or getpass.getuser()
    # Refused before hours of training, not after.
    ask = partial(plan_opening, comparison=fingerprint, opened_by=who, reason=args.reason, again=args.again)
    planned = {uri: ask(uri) for uri in (args.real, *args.external)}
    out = Path(args.out)
    recorded = {"real": f"{args.real}@{inputs.about['real']['version']}"}
    recorded |= {
        f"synthetic_{k}": f"{s['uri']}@{s['version']}" for k, s in enumerate(inputs.about["synthetic"])
    }
    with track("evaluate downstream", recipe_parameters=asdict(args), inputs=recorded) as tracked:
        if not all(_judged(out, fingerprint, uri).is_file() for uri in planned):
            with _executor(args) as executor, progress_bar("trainings", len(names)) as advance:
                train_all(
                    inputs.comparison,
                    names,
                    out / "models",
                    device="cuda" if args.gpus_per_run > 0 else "cpu",
                    executor=executor,
                    progress=advance,
                )
        judgements = _judge(plan, inputs, names, fingerprint, planned, out)
        # As they stand on record now.
        planned = {uri: ask(uri) for uri in planned}
        tracked.set(
            {
                f"test_opening.{uri}": f"{one.number}: by {one.opened_by} at {one.time}: {one.reason}"
                for uri, one in planned.items()
            }
        )
        result = _compare(plan, inputs, names, judgements, planned, out)
        _track(tracked, result)
    if not args.keep_models:
        shutil.rmtree(out / "models", ignore_errors=True)
    return result


@contextmanager
def _executor(args: Args) -> Iterator["Executor"]:
    if args.in_process:
        yield map
        return
    from jobs.cluster import start_ray
    from jobs.evaluate_runs import ray_executor

    with start_ray(args.address, args.num_cpus):
        yield ray_executor(cpus_per_run=args.cpus_per_run, gpus_per_run=args.gpus_per_run)


def _judge(
    plan: Plan,
    inputs: Inputs,
    names: Mapping[Any, str],
    fingerprint: str,
    planned: Mapping[str, "Opening"],
    out: Path,
) -> dict[str, "Judgement"]:
    """What the models say of every held-out table; a table that was judged is not opened again."""
    from factory.evaluation.final_test import Judgement, judge_all
    from jobs.evaluate_opening import record_opening

    judgements = {}
    for uri, opening in planned.items():
        path = _judged(out, fingerprint, uri)
        if not path.is_file():
            opening = record_opening(uri, opening)
            if uri == plan.args.real:
                opened, notes = _open_own(plan, inputs, opening)
            else:
                opened, notes = _open_external(plan, inputs, uri, opening)
            with progress_bar(f"judging {_place(uri)}", len(names)) as advance:
                judged = judge_all(
                    inputs.comparison,
                    names,
                    out / "models",
                    opened,
                    subgroups=_devices(uri, opened),
                    notes=notes,
                    progress=advance,
                )
            judged.save(path)
        judgements[uri] = Judgement.load(path)
    return judgements


def _judged(out: Path, fingerprint: str, uri: str) -> Path:
    return out / "judgements" / f"{fingerprint}-{_place(uri)}.npz"


def _place(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _open_own(plan: Plan, inputs: Inputs, opening: "Opening") -> tuple["Examples", list[str]]:
    from factory.evaluation.data import read_real

    real = inputs.comparison.sources.real
    opened = read_real(
        plan.args.real,
        ("test",),
        size=real.size,
        channels=real.channels,
        access=opening.access(),
        native=True,
    )
    return _judgeable(plan.task, opened)


def _judgeable(task: "Task", opened: "Examples") -> tuple["Examples", list[str]]:
    """The rows that can be scored: those with a mask, for segmentation; says how many were left out."""
    if task == "classification":
        return opened, []
    assert opened.native is not None
    kept = [row for row, truth in enumerate(opened.native) if truth.mask is not None]
    if len(kept) == len(opened):
        return opened, []
    if not kept:
        raise ValueError("none of the held-out rows has a mask, so no segmentation can be scored")
    return opened.take(kept), [f"{len(opened) - len(kept)} held-out row(s) have no mask and were not scored"]


def _open_external(plan: Plan, inputs: Inputs, uri: str, opening: "Opening") -> tuple["Examples", list[str]]:
    """All rows of another table but those that show what trained here."""
    from factory.evaluation.data import read_external
    from factory.evaluation.leakage import images_shared_between
    from factory.storage import open_table

    real, access = inputs.comparison.sources.real, opening.access()
    splits = sorted(set(open_table(uri).read(["split"])["split"].to_pylist()))
    shared = images_shared_between(plan.args.real, ("train", "val"), uri, splits, access=access)
    gone = {one.other_id for one in shared}
    notes = [f"{len(gone)} row(s) of {uri} show what trained here and did not judge"] if gone else []
    opened, match = read_external(
        plan.args.real,
        uri,
        splits,
        size=real.size,
        channels=real.channels,
        task=plan.task,
        access=access,
        left_out=sorted(gone),
    )
    notes += [match.note()] if match.note() else []
    opened, more = _judgeable(plan.task, opened)
    return opened, [*notes, *more]


def _devices(uri: str, opened: "Examples") -> dict[str, list[str]]:
    """Device of each row, where the table knows any."""
    from factory.storage import open_table

    rows = open_table(uri).read(["image_id", "device"])
    known = dict(zip(rows["image_id"].to_pylist(), rows["device"].to_pylist(), strict=True))
    found = [known[name] for name in opened.ids]
    return {"device": [name or "unknown" for name in found]} if any(found) else {}


# ------------------------------------------------------------------------------------------ telling


def _compare(
    plan: Plan,
    inputs: Inputs,
    names: Mapping[Any, str],
    judgements: Mapping[str, "Judgement"],
    planned: Mapping[str, "Opening"],
    out: Path,
) -> DownstreamResult:
    from factory.evaluation.comparison import compare
    from factory.evaluation.final_test import predictions_table, reliability, scores_of

    tables, parts, args = {}, [], plan.args
    for uri, judgement in judgements.items():
        scores = _named(scores_of(inputs.comparison, names, judgement, inputs.notes))
        with progress_bar(f"intervals {_place(uri)}", len(scores.arms)) as advance:
            table = compare(
                scores,
                primary=plan.primary,
                num_resamples=args.num_resamples,
                progress=advance,
            )
        place = "test" if uri == args.real else _place(uri)
        tables[place] = table
        header, lines = predictions_table(scores)
        file = f"predictions-{place}.csv"
        with (out / file).open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *lines])
        bins = {}
        if plan.task == "classification":
            for arm in scores.arms:
                values = scores.of(arm)
                bins[arm.name] = reliability(scores.labels, values.reshape(-1, *values.shape[2:]))
        parts.append(
            {
                "name": place,
                "uri": uri,
                "opening": asdict(planned[uri]),
                "comparison": table.as_json(),
                "intervals": {arm.name: _intervals(scores, arm, args) for arm in scores.arms},
                "reliability": bins,
                "predictions": file,
            }
        )
    record = _record(plan, inputs, parts)
    _write(out, record)
    return DownstreamResult(tables=tables, record=record, folder=args.out)


def _named(scores: "Scores") -> "Scores":
    """The scores with a name for rows of an external table whose class the training table does not know."""
    from factory.evaluation.data import with_unknown

    if scores.labels.max() < len(scores.class_names):
        return scores
    counts = np.append(scores.train_counts, 0)
    return dataclasses.replace(scores, class_names=with_unknown(scores.class_names), train_counts=counts)


def _intervals(scores: "Scores", arm: "Arm", args: Args) -> dict[str, dict[str, float]]:
    from factory.evaluation.metric_intervals import metric_intervals

    found = metric_intervals(scores, arm, num_resamples=min(args.num_resamples, INTERVAL_RESAMPLES))
    return {name: {"value": i.value, "low": i.low, "high": i.high} for name, i in found.items()}


def _record(plan: Plan, inputs: Inputs, parts: list[dict[str, Any]]) -> dict[str, Any]:
    from factory.storage import open_table
    from factory.version import code_version

    metadata = open_table(plan.args.real).metadata
    summary = json.loads(metadata.get("summary", "{}"))
    real = inputs.comparison.sources.real
    record = {
        "kind": "downstream",
        "code_version": code_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dataset": metadata.get("dataset", ""),
        "unit": summary.get("unit", "patients unknown (the table has no summary)"),
        "shortcut_auc": (summary.get("shortcuts") or {}).get("all"),
        "task": plan.task,
        "model": plan.model,
        "loss": plan.args.loss
        or ("cross_entropy" if plan.task == "classification" else "dice_cross_entropy"),
        "primary": plan.primary,
        "search": plan.args.search,
        "where": plan.where,
        "training": dict(plan.training),
        "methods": {arm.name: arm.method for arm in inputs.comparison.arms if arm.method},
        "class_names": list(real.class_names),
        "train_counts": real.counts().tolist(),
        "settings": asdict(plan.args),
        **inputs.about,
        "evaluations": parts,
    }
    found: dict[str, Any] = finite(record)
    return found


def finite(value: Any) -> Any:
    """Plain JSON data: numbers that are not finite are null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(out: Path, record: dict[str, Any]) -> None:
    from factory.report.evaluation import downstream_sections
    from factory.report.markdown import markdown_report
    from factory.report.page import html_report

    sections = downstream_sections(record)
    title = (
        f"Does it help? {record['task']} on {record['dataset'] or record['real']['uri']}, {record['model']}"
    )
    html_report(out / "report.html", sections, title=title)
    markdown_report(out / "report.md", sections, title=title)
    partial = out / f"{RESULTS}.partial"
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(out / RESULTS)


def _track(tracked: Any, result: DownstreamResult) -> None:
    for place, table in result.tables.items():
        values = {f"{place}.minimum_detectable_effect": table.minimum_detectable_effect}
        for arm in table.arms:
            values[f"{place}.{arm.name}.{table.metric}"] = arm.value.value
            if arm.difference is not None:
                values[f"{place}.{arm.name}.difference"] = arm.difference.value
        tracked.metrics(values)
    for name in (RESULTS, "report.md", "report.html"):
        tracked.artifact(Path(result.folder) / name)
    tracked.set({"output": result.folder, "primary": result.record["primary"]})


def command(argv: Sequence[str]) -> int:
    """`factory evaluate downstream`."""
    args = tyro.cli(Args, args=list(argv), prog="factory evaluate downstream", description=__doc__)
    result = run(args)
    from factory.report.evaluation import cautions

    for place, table in result.tables.items():
        print(f"{place}:")
        for line in table.lines():
            print(f"  {line}")
    for caution in cautions(result.record):
        print(f"beware: {caution}")
    print(f"wrote {result.folder}/results.json, report.html, report.md; next: factory evaluate report {result.folder} "
          "--out runs/report")  # fmt: skip
    return 0
