"""Every axis of the ratio search, without Ray: task, filters, nested folds and seeds, per-class ratios, models."""

import itertools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))  # planted.py lies there

from planted import write_real, write_synthetic

from factory.datasets.splits import group_folds
from factory.evaluation.arms import Arm, make_training_set
from factory.evaluation.data import read_real
from factory.evaluation.leakage import rows_digest
from factory.evaluation.task_metrics import dice
from factory.predictors.fitting import fit, predict_native
from tune.ratio_inputs import Args, Inputs, read_inputs
from tune.ratio_plot import MOST_VECTORS, plot
from tune.ratio_results import RatioAnswer, answer, as_json, summary_lines
from tune.ratio_search import Point, Trial, TrialRecord, train_trial

torch.set_num_threads(1)  # layers this small are slower on several
TRAIN, CONTRAST = 16, "scores['contrast'] < 40"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("breadth")
    real = write_real(path / "real.lance", {"train": TRAIN, "val": 24, "test": 4}, 0)
    write_synthetic(path / "good.lance", real, 40, 5)
    return path


def _args(folder: Path, **changes: object) -> Args:
    values = {
        "real": str(folder / "real.lance"), "synthetic": str(folder / "good.lance"), "out": str(folder / "out"),
        "task": "classification", "model": ("small_cnn?width=4",), "ratios": "0,1", "seeds": 1, "folds": 2,
        "size": 24, "num_steps": 4, "learning_rate": 5e-3, "validate_every": 2, "augmentation": "none",
    }  # fmt: skip
    return Args(**{**values, **changes})  # type: ignore[arg-type]


def _search(args: Args, metric: str = "auc") -> tuple[Inputs, list[TrialRecord], RatioAnswer]:
    """Every trial of the grid in this process, and the answer."""
    inputs = read_inputs(args)
    trials = [train_trial(inputs.data, trial) for trial in inputs.data.trials(args.seeds)]
    return inputs, trials, answer(metric, inputs.data.points, inputs.ratios, trials, wheres=inputs.wheres)


def test_segmentation_is_judged_by_dice_at_native_size(folder: Path) -> None:
    args = _args(folder, task="segmentation", model=("unet?width=2",), size=32, ratios="0,1", num_steps=30)
    inputs, trials, found = _search(args, "dice")
    assert found.metric == "dice" and len(trials) == 4
    assert all(t.score is not None and 0 <= t.score <= 1 for t in trials)
    # One of them again by hand: the same weights, and the mean of each scored row's Dice in its own 24 px frame.
    trial = inputs.data.trials(1)[1]
    point, fold = inputs.data.points[trial.point], inputs.data.folds[trial.fold]
    training = make_training_set(point.arm, fold.real, fold.synthetic[0], seed=trial.seed)
    settings = training.settings(inputs.data.settings)
    fitted = fit(
        inputs.data.models["unet?width=2"], settings, training.examples, training.batches(settings, trial.seed),
        validation=fold.stop, seed=trial.seed,
    )  # fmt: skip
    record = next(t for t in trials if (t.point, t.fold) == (trial.point, trial.fold))
    assert fitted.digest() == record.weights_digest
    assert fold.score.native is not None
    masks = [truth.mask for truth in fold.score.native]
    predicted = list(predict_native(fitted, fold.score))
    assert all(mask is not None and mask.shape == (24, 24) == p.shape for mask, p in zip(masks, predicted))
    by_hand = np.mean([dice(mask, p) for mask, p in zip(masks, predicted) if mask is not None])
    assert record.score == pytest.approx(float(by_hand))
    assert "dice" in summary_lines(found, num_seeds=1)[0]


def test_filters_are_an_axis_with_a_curve_each(folder: Path) -> None:
    inputs, trials, found = _search(_args(folder, where=("", CONTRAST)))
    first, second = inputs.data.folds[0].synthetic
    # `contrast` counts the requests, so the filter leaves the first forty; nine of ten are accepted. The arm takes
    # the first of each class in the order of drawing, and so other rows behind each filter.
    assert set(second.ids) != set(first.ids) and [p.filter_index for p in inputs.data.points] == [0, 0, 1]
    synthetic = [t for t in trials if t.fold == 0 and t.arm == "synthetic 1×"]
    assert len({t.rows_digest for t in synthetic}) == 2
    assert [curve.where for curve in found.curves] == ["", CONTRAST]
    assert found.curves[0].point("real") == found.curves[1].point("real"), "the reference is trained once"
    assert sum(t.arm == "real" for t in trials) == 2
    assert any(CONTRAST in line for line in summary_lines(found, num_seeds=1))
    assert CONTRAST in " ".join(axes.get_title(loc="left") for axes in plot(found).axes)
    with pytest.raises(ValueError, match=r"fold 0, behind --where .*contrast.* < 3.*wants 8 row"):
        read_inputs(_args(folder, where=("", "scores['contrast'] < 3")))


def test_nested_folds_and_seeds_are_all_trained_and_averaged(folder: Path, tmp_path: Path) -> None:
    real = str(folder / "real.lance")
    train = read_real(real, ("train",), size=24, channels=1)
    numbers = group_folds(train.groups, train.labels, 2)
    words = []
    for k in range(2):
        digest = rows_digest(train.take(numbers != k))
        words.append(f"{k}=" + write_synthetic(tmp_path / f"s{k}.lance", real, 10, 50 + k, digest=digest))
    inputs, trials, found = _search(_args(folder, synthetic=None, fold_table=tuple(words), seeds=3))
    assert len(trials) == 2 * 2 * 3 and len({t.weights_digest for t in trials}) == 12
    for k, fold in enumerate(inputs.data.folds):
        assert set(fold.score.ids) == {name for name, f in zip(train.ids, numbers) if f == k}
        assert len(fold.score) + len(fold.real) == TRAIN and set(fold.real.groups).isdisjoint(
            fold.score.groups
        )
    point = found.chosen.point("synthetic 1×")
    by_fold = [np.mean([t.score for t in trials if (t.arm, t.fold) == (point.name, k)]) for k in range(2)]
    assert point.folds == pytest.approx(by_fold) and point.num_trainings == 6
    assert point.mean == pytest.approx(np.mean(by_fold))
    assert "n 6 in 2 folds" in next(
        line for line in summary_lines(found, num_seeds=3) if "synthetic 1×" in line
    )


def test_a_ratio_per_class_trains_so_many_rows_of_each(folder: Path) -> None:
    inputs, trials, found = _search(_args(folder, per_class=("bright=1,striped=3", "striped=2")))
    fold = inputs.data.folds[0]
    for name, wanted in (("synthetic bright 1× striped 3×", [8, 24]), ("synthetic striped 2×", [0, 16])):
        point = next(p for p in inputs.data.points if p.arm.name == name)
        examples = make_training_set(point.arm, fold.real, fold.synthetic[0], seed=0).examples
        assert np.bincount(examples.labels[~examples.is_real], minlength=2).tolist() == wanted
        record = next(t for t in trials if (t.arm, t.fold) == (name, 0))
        assert record.rows_digest == examples.digest()
        shown = found.chosen.point(name)
        assert shown.ratio == pytest.approx(sum(wanted) / TRAIN) and shown.num_trainings == 2
    told = json.loads(json.dumps(as_json(found, trials, {})))["curves"][0]["points"]
    vector = next(p for p in told if p["name"] == "synthetic bright 1× striped 3×")
    assert vector["per_class"] == [["bright", 1.0], ["striped", 3.0]]
    assert {"mean", "low", "high", "num_trainings", "folds"} <= set(vector)


def test_models_are_an_axis_with_a_curve_each(folder: Path) -> None:
    models = ("small_cnn?width=4", "small_cnn?width=6")
    _, trials, found = _search(_args(folder, model=models))
    assert [curve.model for curve in found.curves] == list(models)
    assert {(t.model, t.arm, t.fold) for t in trials} == {
        (m, a, f) for m in models for a in ("real", "synthetic 1×") for f in (0, 1)
    }
    best = max(found.curves, key=lambda curve: curve.point(curve.chosen).mean)
    assert found.chosen.model == best.model
    assert summary_lines(found, num_seeds=1)[-1].count(best.model) == 1


def _wide(num_vectors: int) -> RatioAnswer:
    """Two models, two filters, four ratios, synthetic only, and vectors of which the last is the best."""
    arms = [Arm(kind="real"), *(Arm(kind="synthetic", ratio=r) for r in (0.5, 1, 2)),
            Arm(kind="synthetic", ratio=2, only=True)]  # fmt: skip
    vectors = [
        Arm(kind="synthetic", per_class=(("bright", float(k)), ("striped", 9.0))) for k in range(num_vectors)
    ]
    ratios: Mapping[Arm, float] = {
        **dict(zip(arms, (0.0, 0.5, 1.0, 2.0, math.inf))), **{v: 4 + k / 10 for k, v in enumerate(vectors)}
    }  # fmt: skip
    points = [Point(arm=arms[0])]
    points += [Point(arm=arm, filter_index=k) for k in range(2) for arm in (*arms[1:], *vectors)]
    rng = np.random.default_rng(0)
    trials = [
        TrialRecord(model=model, point=k, arm=point.arm.name, seed=s, fold=f,
                    score=0.6 + (0.01 * ratios[point.arm] if point.arm in vectors else 0) + 0.002 * float(rng.normal()))
        for model in ("m0", "m1") for k, point in enumerate(points) for s in range(2) for f in range(3)
    ]  # fmt: skip
    return answer("auc", points, [ratios[p.arm] for p in points], trials, wheres=("", CONTRAST))


def test_the_plot_stays_readable_with_many_points() -> None:
    found = _wide(20)
    figure = plot(found)
    figure.draw_without_rendering()
    curves, lists = figure.axes[0::2], figure.axes[1::2]
    assert len(curves) == len(lists) == 4
    assert len({axes.get_ylim() for axes in curves}) == 1 and len({axes.get_xlim() for axes in lists}) == 1
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes, curve in zip(lists, found.curves, strict=True):
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        assert len(names) == MOST_VECTORS and "the 12 best of 20" in axes.get_title(loc="left")
        assert curve.chosen.removeprefix("synthetic ") in names, "the chosen point is always listed"
        boxes = sorted(
            (tick.get_window_extent(renderer) for tick in axes.get_yticklabels()), key=lambda b: b.y0
        )
        assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes)), "names lie on one another"
        assert all(box.x0 >= 0 for box in boxes), "a name is cut off"
    for axes in curves:
        boxes = sorted(
            (tick.get_window_extent(renderer) for tick in axes.get_xticklabels()), key=lambda b: b.x0
        )
        assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))
        assert not axes.texts, "no name is written between the points"
    assert len(plot(_wide(0)).axes) == 4, "without per-class ratios there are no lists"


def test_a_trial_names_its_model_and_point(folder: Path) -> None:
    data = read_inputs(_args(folder, model=("small_cnn?width=4", "small_cnn?width=6"))).data
    record = train_trial(data, Trial(model=1, point=1, seed=0, fold=1))
    assert (record.model, record.arm, record.fold) == ("small_cnn?width=6", "synthetic 1×", 1)
