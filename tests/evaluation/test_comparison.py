from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from factory.evaluation.arms import Arm, Task
from factory.evaluation.comparison import ArmResult, ComparisonTable, compare
from factory.evaluation.scores import Scores, mean_auc, pool_folds, subgroup_rows
from factory.evaluation.task_metrics import binary_auc

ARMS = (Arm(kind="real"), Arm(kind="synthetic"), Arm(kind="oracle"), Arm(kind="shuffled_labels"))
FEW: Any = {"num_resamples": 120}


def _scores(
    gains: dict[str, float],
    *,
    task: Task = "classification",
    seed: int = 0,
    count: int = 120,
    generators: int = 3,
) -> Scores:
    """Models whose log-odds (or Dice) follow the truth, better by the gain of their arm."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    groups = tuple(f"patient {number // 2}" for number in range(count))
    shared = rng.normal(size=count)
    values = {}
    for arm in ARMS:
        for g in range(generators) if arm.uses_generator else (None,):
            for t in range(2):
                noise = 0.7 * shared + 0.5 * rng.normal(size=count)
                gain = 0.8 + gains.get(arm.kind, 0.0)
                if task == "classification":
                    odds = gain * (2 * labels - 1) + noise
                    p = 1 / (1 + np.exp(-odds))
                    values[arm.name, g, t] = np.stack([1 - p, p], axis=1)
                else:
                    dice = np.clip(0.5 + 0.1 * gain + 0.1 * noise, 0, 1)
                    values[arm.name, g, t] = np.stack(
                        [dice, dice / 2, 9 - dice, np.full(count, np.nan)], axis=1
                    )
    return Scores(
        task=task, class_names=("benign", "malignant"), ids=tuple(map(str, range(count))), groups=groups,
        labels=labels, areas=rng.uniform(0.01, 0.3, count), folds=np.zeros(count, np.int64), arms=ARMS,
        generator_seeds=tuple(range(generators)), task_seeds=(0, 1), values=values,
        train_counts=np.array([10, 10]), train_areas=rng.uniform(0.01, 0.3, 30),
        subgroups={"device": ["A", "B", "B", "A"] * (count // 4)},
    )  # fmt: skip


def _arm(table: ComparisonTable, kind: str) -> ArmResult:
    return next(arm for arm in table.arms if arm.name.split(" ")[0] == kind)


def test_the_mean_auc_is_that_of_each_model_and_fold() -> None:
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(2, size=60), np.repeat([0, 1], 30)
    p = rng.random((3, 60, 1)).round(1)
    both = np.concatenate([1 - p, p], axis=2)
    one_by_one = [binary_auc(labels[folds == f], model[folds == f, 1]) for model in both for f in (0, 1)]
    assert mean_auc(labels, both, folds) == pytest.approx(np.mean(one_by_one))
    assert np.isnan(mean_auc(labels, both, np.arange(60)))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_planted_gain_is_found_and_no_gain_is_not(task: Task) -> None:
    table = compare(_scores({"synthetic": 0.6, "oracle": 1.2}, task=task), primary="synthetic 1×", **FEW)
    synthetic, placebo, oracle = (_arm(table, kind) for kind in ("synthetic", "shuffled_labels", "oracle"))
    assert synthetic.difference is not None and synthetic.difference.low > 0 and synthetic.adjusted_p < 0.05
    assert placebo.difference is not None and placebo.difference.low < 0 < placebo.difference.high
    assert placebo.adjusted_p is not None and placebo.adjusted_p > 0.05
    assert synthetic.oracle_fraction is not None and 0.2 < synthetic.oracle_fraction < 0.95
    assert oracle.oracle_fraction is None and _arm(table, "real").difference is None
    assert 0 < table.minimum_detectable_effect < 0.3 and not table.is_pilot
    assert "smallest detectable change" in table.lines()[0] and "primary p" in "\n".join(table.lines())


def test_the_primary_comparison_alone_is_not_corrected() -> None:
    table = compare(_scores({"oracle": 0.3}), primary="synthetic 1×", **FEW)
    primary = _arm(table, "synthetic")
    assert primary.adjusted_p == primary.p_value
    others = [arm for arm in table.arms if arm.p_value is not None and arm.name != table.primary]
    assert all(arm.adjusted_p >= arm.p_value for arm in others)
    assert max(arm.adjusted_p / arm.p_value for arm in others) > 1.5


def test_null_differences_are_called_significant_about_as_often_as_promised() -> None:
    found = [
        compare(
            _scores({}, task="segmentation", seed=seed, count=40), primary="synthetic 1×", num_resamples=100
        )
        for seed in range(20)
    ]
    # Seeds vary more than groups say, so this is an upper bound with room, not the nominal 5 %.
    assert np.mean([_arm(table, "shuffled_labels").p_value < 0.05 for table in found]) <= 0.2


def test_one_generator_seed_is_a_pilot() -> None:
    table = compare(_scores({}, generators=1), primary="synthetic 1×", **FEW)
    assert table.is_pilot and "PILOT" in table.lines()[0] and _arm(table, "synthetic").value.is_pilot
    assert not _arm(table, "real").value.is_pilot


def test_subgroups_cover_the_rows_by_size_and_by_what_the_caller_names() -> None:
    scores = _scores({"synthetic": 0.5}, task="segmentation")
    rows = subgroup_rows(scores)
    assert sum(rows[f"size {name}"].sum() for name in ("small", "medium", "large")) == 120
    table = compare(scores, primary="synthetic 1×", **FEW)
    named = {group.name: group for group in _arm(table, "synthetic").subgroups}
    assert {"size small", "class malignant", "device A", "device B"} <= set(named)
    assert named["device A"].num_rows == 60 and named["device A"].difference is not None
    assert all(group.difference is None for group in _arm(table, "oracle").subgroups)


def test_a_subgroup_without_a_class_is_judged_on_the_classes_it_has() -> None:
    """Healthy images have no lesion, so no lesion size holds all three classes."""
    scores = _scores({"synthetic": 0.5})
    labels, areas = scores.labels.copy(), scores.areas.copy()
    labels[:20], areas[:20] = 2, 0
    healthy = np.where(labels == 2, 0.5, 0.1)[:, None]
    values = {
        key: np.concatenate(
            [value * (1 - healthy), np.broadcast_to(healthy, (*value.shape[:-1], 1))], axis=-1
        )
        for key, value in scores.values.items()
    }
    three = replace(
        scores, class_names=(*scores.class_names, "normal"), labels=labels, areas=areas, values=values,
        train_counts=np.array([10, 10, 10]),
    )  # fmt: skip
    named = {
        group.name: group
        for group in _arm(compare(three, primary="synthetic 1×", **FEW), "synthetic").subgroups
    }
    assert {"size small", "size medium", "size large", "device A"} <= set(named)
    assert all(0.5 < group.value < 1 and group.difference is not None for group in named.values())


def test_empty_truths_leave_dice_and_enter_the_false_positive_rate() -> None:
    scores = _scores({}, task="segmentation")
    values = {key: value.copy() for key, value in scores.values.items()}
    for value in values.values():
        value[:20, :3], value[:20, 3] = np.nan, np.arange(20) < 5
    areas = scores.areas.copy()
    areas[:20] = 0
    table = compare(replace(scores, areas=areas, values=values), primary="synthetic 1×", **FEW)
    assert table.num_rows == 100 and _arm(table, "real").other["false_positive_rate"] == pytest.approx(0.25)
    assert np.isfinite(_arm(table, "real").other["hd95"])


def test_outer_folds_are_pooled_and_a_group_judged_twice_is_refused() -> None:
    one = _scores({"synthetic": 0.5}, seed=1)
    two = replace(
        _scores({"synthetic": 0.5}, seed=2), groups=tuple(f"other {g}" for g in one.groups),
        ids=tuple(f"other {i}" for i in one.ids),
    )  # fmt: skip
    pooled = pool_folds([one, two])
    assert len(pooled.ids) == 240 and pooled.folds.tolist() == [0] * 120 + [1] * 120
    single = [compare(part, primary="synthetic 1×", **FEW) for part in (one, two, pooled)]
    means = [_arm(table, "real").value.value for table in single]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2)
    with pytest.raises(ValueError, match="was judged in fold 0 too"):
        pool_folds([one, one])


def test_what_cannot_be_compared_is_refused() -> None:
    scores = _scores({})
    with pytest.raises(ValueError, match="is none of real"):
        compare(scores, primary="synthetic 3×")
    with pytest.raises(ValueError, match="want an arm without generator"):
        compare(scores, primary="real")
    with pytest.raises(ValueError, match="of each class one"):
        compare(replace(scores, labels=np.zeros(120, np.int64)), primary="synthetic 1×")
