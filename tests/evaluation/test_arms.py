from dataclasses import replace

import numpy as np
import pytest
from planted import pictures

from factory.evaluation.arms import Arm, baseline_arms, make_training_set, shuffled
from factory.evaluation.copy_paste import CopyPaste
from factory.predictors.settings import FitSettings

REAL = pictures("real", (6, 4), 0)
SYNTHETIC = pictures("synthetic", (30, 30), 1, is_real=False)
RESERVE = pictures("reserve", (8, 3), 2)


def _ids(arm: Arm, **sources: object) -> set[str]:
    return set(make_training_set(arm, REAL, SYNTHETIC, RESERVE, seed=0, **sources).examples.ids)  # type: ignore[arg-type]


def test_ratios_count_by_class_and_larger_ones_contain_smaller_ones() -> None:
    before: set[str] = set()
    for ratio in (0.0, 0.5, 1.0, 2.0, 4.0):
        training = make_training_set(Arm(kind="synthetic", ratio=ratio), REAL, SYNTHETIC, seed=0)
        added = training.examples.take(~training.examples.is_real)
        assert added.counts().tolist() == [round(6 * ratio), round(4 * ratio)]
        assert before <= set(added.ids) and training.examples.is_real.sum() == 10
        before = set(added.ids)
    arm = Arm(kind="synthetic", per_class=(("striped", 3.0),))
    assert arm.added(REAL).tolist() == [0, 12] and arm.name == "synthetic striped 3×"
    assert arm.synthetic_ratio(REAL) == pytest.approx(1.2)
    only = make_training_set(Arm(kind="synthetic", ratio=2, only=True), REAL, SYNTHETIC, seed=0)
    assert not only.examples.is_real.any() and len(only.examples) == 20


def test_every_arm_trains_on_what_its_name_says() -> None:
    settings = FitSettings(num_steps=90)
    assert _ids(Arm(kind="real")) == set(REAL.ids)
    repeated = make_training_set(Arm(kind="repeated", ratio=2), REAL, seed=0).examples
    assert set(repeated.ids) == set(REAL.ids) and repeated.counts().tolist() == [18, 12]
    short = make_training_set(Arm(kind="real_short", ratio=2), REAL, seed=0)
    assert short.settings(settings).num_steps == 30
    strong = make_training_set(Arm(kind="strong_augmentation"), REAL, seed=0).settings(settings)
    assert strong.augmentation.kind == "strong" and strong.num_steps == 90
    balanced = make_training_set(Arm(kind="class_balanced"), REAL, seed=0)
    batches = balanced.batches(balanced.settings(settings), 0)
    assert batches.counts == pytest.approx([8, 8])
    oracle = make_training_set(Arm(kind="oracle"), REAL, None, RESERVE, seed=0)
    assert oracle.examples.is_real.all() and oracle.examples.counts().tolist() == [12, 7]
    assert "striped 3 of 4" in oracle.notes[0]
    rejected = pictures("rejected", (9, 9), 5, is_real=False)
    assert {i.split("-")[0] for i in _ids(Arm(kind="ungated"), ungated=rejected)} == {"real", "rejected"}
    passed = replace(REAL, images=REAL.images // 2, is_real=np.zeros(10, bool))
    through = make_training_set(Arm(kind="vae_round_trip"), REAL, seed=0, round_trip=passed).examples
    assert through.counts().tolist() == [12, 8] and (~through.is_real).sum() == 10


def test_placebos_break_only_what_they_name() -> None:
    masks = shuffled(SYNTHETIC, "masks", 3)
    assert np.array_equal(masks.images, SYNTHETIC.images) and np.array_equal(masks.labels, SYNTHETIC.labels)
    assert masks.masks is not None and SYNTHETIC.masks is not None
    assert not any(np.array_equal(a, b) for a, b in zip(masks.masks, SYNTHETIC.masks))
    assert sorted(m.tobytes() for m in masks.masks) == sorted(m.tobytes() for m in SYNTHETIC.masks)
    labels = shuffled(SYNTHETIC, "labels", 3)
    assert np.array_equal(labels.counts(), SYNTHETIC.counts()) and (labels.labels != SYNTHETIC.labels).any()
    assert np.array_equal(labels.labels, shuffled(SYNTHETIC, "labels", 3).labels)


def test_pasted_lesions_are_labelled_by_where_they_come_from() -> None:
    made = CopyPaste().make(REAL, np.array([3, 5]), seed=0)
    assert made.counts().tolist() == [3, 5] and not made.is_real.any()
    assert set(made.groups) <= set(REAL.groups) and len(set(made.ids)) == 8
    more = CopyPaste().make(REAL, np.array([3, 7]), seed=0)
    assert np.array_equal(more.images[:8], made.images)
    assert made.masks is not None and REAL.masks is not None
    for row, name in enumerate(made.ids):
        below = REAL.ids.index(name.split("+")[1])
        source = REAL.ids.index(name.split(":")[1].split("+")[0])
        assert REAL.labels[source] == made.labels[row] == REAL.labels[below]
        new = (made.masks[row] > 0) & (REAL.masks[below] == 0)
        far = ~_grown(made.masks[row] > 0, 3)
        assert np.array_equal(made.images[row][far], REAL.images[below][far])
        assert (made.masks[row] >= REAL.masks[below]).all() and new.sum() <= 1.6 * (
            REAL.masks[source] > 0
        ).sum()


def test_lesions_go_into_healthy_images_where_there_are_some() -> None:
    empty = pictures("healthy", (4, 0), 7)
    rows = replace(
        REAL.take(slice(0, 4)), ids=empty.ids, groups=empty.groups, masks=np.zeros((4, 24, 24), np.uint8)
    )
    from factory.predictors.examples import concatenate

    made = CopyPaste().make(concatenate(REAL, rows), np.array([4, 4]), seed=1)
    assert all(name.split("+")[1].startswith("healthy") for name in made.ids)
    assert made.masks is not None and made.masks.reshape(8, -1).any(axis=1).all()


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    from scipy import ndimage

    return ndimage.binary_dilation(mask, iterations=by, structure=np.ones((3, 3)))


def test_what_cannot_be_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"wants 36 row\(s\) of class bright, there are 30"):
        _ids(Arm(kind="synthetic", ratio=6))
    with pytest.raises(ValueError, match="needs reserve rows"):
        make_training_set(Arm(kind="oracle"), REAL, seed=0)
    with pytest.raises(ValueError, match="'other' is none of bright, striped"):
        Arm(kind="synthetic", per_class=(("other", 1.0),)).added(REAL)
    with pytest.raises(ValueError, match="needs a mask"):
        make_training_set(Arm(kind="copy_paste"), replace(REAL, masks=None, has_mask=None), seed=0)
    for values in ({"kind": "synthetic", "ratio": -1}, {"kind": "magic"}, {"kind": "oracle", "only": True}):
        with pytest.raises(ValueError, match=r"Arm\."):
            Arm(**values)  # type: ignore[arg-type]


def test_the_baselines_fit_the_task_and_have_names_of_their_own() -> None:
    arms = baseline_arms("segmentation", ratio=2, with_masks=True, with_reserve=True)
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names) and "shuffled_masks 2×" in names and "oracle 2×" in names
    assert not {"copy_paste", "oracle"} & {
        arm.kind for arm in baseline_arms("classification", with_masks=False, with_reserve=False)
    }


def test_a_method_keeps_the_rows_and_sets_loss_and_sampling() -> None:
    from factory.predictors.augmentation import Augmentation
    from factory.predictors.losses import BalancedSoftmax, CrossEntropy

    settings = FitSettings(num_steps=90, sampling="square_root", loss=BalancedSoftmax())
    for kind in ("real", "synthetic", "strong_augmentation", "real_short"):
        plain = make_training_set(Arm(kind=kind, ratio=2), REAL, SYNTHETIC, seed=0)  # type: ignore[arg-type]
        for method, sampling in (("cross_entropy", "plain"), ("resampling", "class_balanced")):
            arm = Arm(kind=kind, ratio=2, method=method)  # type: ignore[arg-type]
            training = make_training_set(arm, REAL, SYNTHETIC, seed=0)
            own = training.settings(settings)
            assert training.examples.ids == plain.examples.ids and arm.name.endswith(f", {method}")
            assert own.loss == CrossEntropy() and own.sampling == sampling
            assert own.num_steps == (30 if kind == "real_short" else 90)
            assert own.augmentation == Augmentation(
                kind="strong" if kind == "strong_augmentation" else "standard"
            )
    for values in ({"kind": "real", "method": "magic"}, {"kind": "class_balanced", "method": "resampling"}):
        with pytest.raises(ValueError, match=r"Arm\.method"):
            Arm(**values)  # type: ignore[arg-type]
