import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))  # planted.py lies there

from planted import CLASSES, Quality, pictures, write_real, write_synthetic

from factory.evaluation.arms import Arm
from factory.evaluation.data import read_real
from factory.evaluation.models import parse_model
from factory.predictors.augmentation import Augmentation
from factory.predictors.classifiers import Classifier
from factory.predictors.settings import FitSettings
from tune.ratio_inputs import Args, parse_points, read_inputs
from tune.ratio_plot import plot
from tune.ratio_results import RatioAnswer, answer, as_json, summary_lines
from tune.ratio_search import Fold, Point, SearchData, Trial, TrialRecord, train_trial
from tune.ratio_tune import TuneSettings

torch.set_num_threads(1)  # layers this small are slower on several
SETTINGS = FitSettings(
    num_steps=40,
    learning_rate=5e-3,
    validate_every=20,
    warmup_steps=2,
    augmentation=Augmentation(kind="none"),
)
COUNTS = {"train": 16, "val": 60, "test": 12}


def _args(folder: Path, **changes: object) -> Args:
    values = {
        "real": str(folder / "real.lance"), "synthetic": str(folder / "good.lance"), "out": str(folder / "out"),
        "task": "classification", "model": ("small_cnn?width=8",), "ratios": "0,4", "seeds": 1, "folds": 2,
        "size": 24, "num_steps": 40, "learning_rate": 5e-3, "validate_every": 20, "augmentation": "none",
    }  # fmt: skip
    return Args(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real table, and synthetic ones of a good and a bad generator and of one that copies."""
    path = tmp_path_factory.mktemp("planted")
    real = write_real(path / "real.lance", COUNTS, 0)
    qualities: tuple[Quality, ...] = ("good", "bad", "copies")
    for quality in qualities:
        write_synthetic(path / f"{quality}.lance", real, 40, 5, quality=quality)
    return path


def _search(args: Args) -> tuple[SearchData, list[TrialRecord], RatioAnswer]:
    """The whole grid in this process: the trials are those that Tune runs."""
    inputs = read_inputs(args)
    trials = [train_trial(inputs.data, trial) for trial in inputs.data.trials(args.seeds)]
    found = answer("auc", inputs.data.points, inputs.ratios, trials, wheres=inputs.wheres, notes=inputs.notes)
    return inputs.data, trials, found


@pytest.mark.parametrize(("quality", "ratio"), [("good", 4.0), ("bad", 0.0), ("copies", 0.0)])
def test_the_planted_truth_is_decided_right(folder: Path, quality: str, ratio: float) -> None:
    args = _args(folder, synthetic=str(folder / f"{quality}.lance"), folds=3)
    _, _, found = _search(args)
    point = found.chosen_point
    assert point.ratio == ratio
    curve = found.chosen
    difference = curve.point("synthetic 4×").difference
    if quality == "good":
        assert difference > curve.minimum_detectable_effect / 2 and difference > 0.1
    elif quality == "bad":
        assert difference < -0.1
    else:
        assert abs(difference) < 0.15
    assert "smallest detectable change" in summary_lines(found, num_seeds=1)[0]


def test_test_rows_change_nothing(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    real = write_real(other / "real.lance", COUNTS, 0, scrambled="test")
    write_synthetic(other / "good.lance", real, 40, 5)
    first, second = _search(_args(folder)), _search(_args(other))
    assert first[0].identity() == second[0].identity()
    kept = [
        [(t.arm, t.fold, t.score, t.weights_digest, t.best_step) for t in run[1]] for run in (first, second)
    ]
    assert kept[0] == kept[1] and all(record[3] for record in kept[0])
    assert first[2].chosen_point == second[2].chosen_point
    # The same must notice a leak: validation rows scrambled do change the answer's identity.
    third = tmp_path / "third"
    write_synthetic(third / "good.lance", write_real(third / "real.lance", COUNTS, 0, scrambled="val"), 40, 5)
    assert read_inputs(_args(third)).data.identity() != first[0].identity()


def test_folds_are_disjoint_and_rotate(folder: Path) -> None:
    data = read_inputs(_args(folder, folds=4)).data
    scored = [name for fold in data.folds for name in fold.score.ids]
    assert len(scored) == len(set(scored)) == 60
    for fold in data.folds:
        assert set(fold.stop.ids) | set(fold.score.ids) == set(scored)
        assert set(fold.stop.ids).isdisjoint(fold.score.ids)


def test_leaks_are_refused_before_compute(folder: Path, tmp_path: Path) -> None:
    other = write_synthetic(
        tmp_path / "other.lance", str(folder / "real.lance"), 40, 5, digest="of other rows"
    )
    with pytest.raises(ValueError, match="was made from other real rows"):
        read_inputs(_args(folder, synthetic=other))
    assert any(
        "release" in note for note in read_inputs(_args(folder, synthetic=other, scenario="release")).notes
    )
    rows, val = pictures("train", (8, 8), 0), pictures("val", (20, 20), 1)
    stolen = Fold(real=rows, stop=val.take(slice(0, 20)), score=val.take(slice(10, 40)), synthetic=(rows,))
    points = (Point(arm=Arm(kind="real")),)
    models = {"small": Classifier(architecture="small_cnn?width=8")}
    with pytest.raises(ValueError, match="is in early stopping and in fold 0"):
        SearchData(folds=(stolen,), points=points, models=models, settings=SETTINGS).check()


def test_nested_folds_want_a_generator_that_never_saw_the_fold(folder: Path, tmp_path: Path) -> None:
    from factory.datasets.splits import group_folds
    from factory.evaluation.leakage import rows_digest

    train = read_real(str(folder / "real.lance"), ("train",), size=24, channels=1)
    folds = group_folds(train.groups, train.labels, 2)
    digests = [rows_digest(train.take(folds != k)) for k in range(2)]
    tables = [
        write_synthetic(tmp_path / f"s{k}.lance", str(folder / "real.lance"), 20, 50 + k, digest=digests[k])
        for k in range(2)
    ]
    words = tuple(f"{k}={table}" for k, table in enumerate(tables))
    data = read_inputs(_args(folder, synthetic=None, fold_table=words, ratios="0,1")).data
    for k, fold in enumerate(data.folds):
        assert set(fold.score.ids) == {name for name, f in zip(train.ids, folds) if f == k}
        assert set(fold.real.ids).isdisjoint(fold.score.ids) and len(fold.stop) == 60
    with pytest.raises(ValueError, match="without fold 0 of 2"):
        read_inputs(_args(folder, synthetic=None, fold_table=(f"0={tables[1]}", f"1={tables[0]}")))
    for wrong in (("0=a",), ("0=a", "2=b"), ("0=a", "0=b"), ("a=b", "1=c")):
        with pytest.raises(ValueError, match="--fold-table"):
            read_inputs(_args(folder, synthetic=None, fold_table=wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": "0,x"}, "'x' is no ratio"),
        ({"ratios": "0,-1"}, "'-1' is no ratio"),
        ({"ratios": "0,9"}, r"wants 72 row\(s\) of class"),
        ({"per_class": ("brigth=1",)}, "want CLASS=RATIO"),
        ({"per_class": ("bright=0",)}, "all ratios are 0"),
        ({"where": ("contrst > 1",)}, "contrst"),
        ({"folds": 40}, "too few for 40 folds"),
        ({"model": ("no_such_network",)}, "no_such_network"),
        ({"ratios": "0,1,1"}, "named twice"),
    ],
)
def test_bad_input_is_named_before_compute(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_inputs(_args(folder, **changes))


def test_contradicting_options_are_refused() -> None:
    for changes in (
        {"synthetic": None}, {"fold_table": ("0=a", "1=b")}, {"weights": "w", "model": ("a", "b")}, {"seeds": 0},
        {"where": ()}, {"trial_scheduler": "asha", "model": ("probe:resnet18",)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--"):
            _args(Path("nowhere"), **changes)
    with pytest.raises(ValueError, match="want 0"):
        TuneSettings(ratios=(1.0, 2.0))


def test_points_and_models_are_what_was_asked_for() -> None:
    args = _args(Path("x"), ratios="0,0.5,2,only", per_class=("bright=1,striped=4",), where=("", "seed = 1"),
                 baselines=("strong_augmentation",))  # fmt: skip
    points = parse_points(args, CLASSES)
    assert [p.arm.name for p in points if p.filter_index == 0 and p.is_candidate] == [
        "real", "synthetic 0.5×", "synthetic 2×", "synthetic only 2×", "synthetic bright 1× striped 4×",
    ]  # fmt: skip
    assert (
        len(points) == 10 and sum(p.arm.kind == "real" for p in points) == 1 and not points[-1].is_candidate
    )
    unet = parse_model("segmentation", "unet:resnet18")
    assert (unet.architecture, unet.encoder) == ("unet", "resnet18")  # type: ignore[union-attr]
    assert parse_model("segmentation", "attention_unet?width=4").width == 4  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="width=N"):
        parse_model("segmentation", "unet?depth=4")


def _record(point: int, arm: str, fold: int, score: float | None, seed: int = 0) -> TrialRecord:
    return TrialRecord(model="m", point=point, arm=arm, seed=seed, fold=fold, score=score)


def _answer(curves: Mapping[Arm, Sequence[float | None]], ratios: list[float]) -> RatioAnswer:
    points = [Point(arm=arm) for arm in curves]
    trials = [
        _record(k, a.name, f, s) for k, (a, scores) in enumerate(curves.items()) for f, s in enumerate(scores)
    ]
    return answer("auc", points, ratios, trials, wheres=("",))


def test_the_smallest_ratio_as_good_as_the_best_is_chosen() -> None:
    real, one, four, only = (
        Arm(kind="real"), Arm(kind="synthetic"), Arm(kind="synthetic", ratio=4), Arm(kind="synthetic", only=True),
    )  # fmt: skip
    curves = {
        real: [0.6, 0.62, 0.61],
        one: [0.80, 0.82, 0.85],
        four: [0.81, 0.83, 0.86],
        only: [0.3, 0.4, 0.5],
    }
    found = _answer(curves, [0, 1, 4, math.inf])
    assert found.chosen.chosen == "synthetic 1×" and found.chosen.best == "synthetic 4×"
    flat = _answer({real: [0.6, 0.7, 0.8], one: [0.61, 0.71, 0.81]}, [0, 1])
    assert flat.chosen.chosen == "real"
    stopped = _answer({**curves, one: [0.80, None, 0.85]}, [0, 1, 4, math.inf])
    assert stopped.chosen.chosen == "synthetic 4×"
    assert not stopped.chosen.point("synthetic 1×").is_complete
    told = json.loads(json.dumps(as_json(stopped, [], {"x": 1}), allow_nan=False))
    assert told["curves"][0]["points"][-1]["ratio"] == "only" and told["chosen"]["name"] == "synthetic 4×"
    assert plot(stopped).axes[0].get_xticklabels()[-1].get_text() == "only"
    with pytest.raises(ValueError, match="two folds"):
        _answer({real: [0.6], one: [0.7]}, [0, 1])


def test_seeds_are_averaged_within_a_fold() -> None:
    points = [Point(arm=Arm(kind="real")), Point(arm=Arm(kind="synthetic"))]
    trials = [_record(p, points[p].arm.name, f, 0.5 + 0.1 * p + 0.02 * f + 0.01 * s, s)
              for p in range(2) for f in range(3) for s in range(4)]  # fmt: skip
    curve = answer("auc", points, [0, 1], trials, wheres=("",)).chosen
    assert curve.point("real").folds == pytest.approx((0.515, 0.535, 0.555))
    assert curve.point("synthetic 1×").difference == pytest.approx(0.1) and curve.chosen == "synthetic 1×"
    assert curve.minimum_detectable_effect == 0.0 or curve.minimum_detectable_effect < 1e-6


def test_a_trial_is_a_function_of_its_arguments(folder: Path) -> None:
    data = read_inputs(_args(folder)).data
    trial = Trial(model=0, point=1, seed=1, fold=0)
    one, two = train_trial(data, trial), train_trial(data, trial)
    assert one.weights_digest == two.weights_digest and one.score == two.score
    other = train_trial(data, Trial(model=0, point=1, seed=2, fold=0))
    assert other.weights_digest != one.weights_digest and np.isfinite(other.score or np.nan)


_KILLED = """
import sys
from tune.explore import command
sys.exit(command(["ratio", *sys.argv[1:]]))
"""


@pytest.mark.soak
def test_a_killed_search_goes_on_to_the_same_trials(folder: Path, tmp_path: Path) -> None:
    words = [
        "--real", str(folder / "real.lance"), "--synthetic", str(folder / "good.lance"), "--task", "classification",
        "--model", "small_cnn?width=8", "--ratios", "0,1,4", "--seeds", "1", "--folds", "3", "--size", "24",
        "--num-steps", "40", "--learning-rate", "5e-3", "--validate-every", "20", "--augmentation", "none",
        "--num-cpus", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    command = [sys.executable, "-c", _KILLED, *words]
    environment = os.environ | {"TUNE_GLOBAL_CHECKPOINT_S": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "first.txt").open("w") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 400
        while "trial 3/9" not in (tmp_path / "first.txt").read_text() and time.monotonic() < deadline:
            assert first.poll() is None, (tmp_path / "first.txt").read_text()
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "(resumed)" in done.stdout
    # Trials finished before the kill are not made again.
    assert "trial 9/9" not in done.stderr and "trial 1/9" in done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {(t.arm, t.fold): t.weights_digest for t in _search(_args(folder, ratios="0,1,4", folds=3))[1]}
    assert {(t["arm"], t["fold"]): t["weights_digest"] for t in found["trials"]} == expected
    again = subprocess.run(
        [*command, "--num-steps", "41"], env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode != 0 and "holds a search over other rows" in again.stderr
