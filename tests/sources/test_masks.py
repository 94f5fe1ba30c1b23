"""Drawn masks: one clean piece inside the frame, distributed as the training masks are."""

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import ks_2samp

from factory import geometry
from factory.imaging import TrainingRow
from factory.sources.masks import CITED_DEFORMATION, DeformedEllipse, FittedDeformedEllipse, RealMasks
from schemas.identity import fingerprint, random_generator
from schemas.request import SynthesisPlan

FOUR = ndimage.generate_binary_structure(2, 1)


def draw_many(fitted: FittedDeformedEllipse, plan: SynthesisPlan, label: str, num: int) -> list[np.ndarray]:
    requests = [plan.request(label, ordinal) for ordinal in range(num)]
    return [fitted.draw(r, random_generator(r.request_id, "mask")).mask for r in requests]


def measures(mask: np.ndarray) -> tuple[float, ...]:
    lesion = geometry.largest_component(mask)
    m = geometry.moments(lesion)
    assert m is not None
    box = geometry.box_aspect(lesion)
    return (
        math.sqrt(m.area) / len(mask),
        box,
        m.aspect,
        m.x / len(mask),
        m.y / len(mask),
        geometry.solidity(lesion),
    )


NAMES = ("radius", "box aspect", "moment aspect", "x", "y", "solidity")


def distances(rows: list[TrainingRow], masks: list[np.ndarray], label: str) -> dict[str, float]:
    """Kolmogorov–Smirnov distance per measure between training and drawn masks."""
    real = np.array([measures(r.mask) for r in rows if r.label_name == label and r.mask is not None])
    drawn = np.array([measures(mask) for mask in masks])
    return {name: float(ks_2samp(real[:, k], drawn[:, k]).statistic) for k, name in enumerate(NAMES)}


# ------------------------------------------------------------------------------------------ deformed ellipses


@pytest.mark.parametrize("label", ["benign", "malignant"])
@pytest.mark.parametrize("orientation", ["empirical", "strict"])
def test_every_mask_is_one_filled_piece_inside(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan, label: str, orientation: str
) -> None:
    source = DeformedEllipse(orientation=orientation, deformation=(0.3, 0.4), border=2)
    for mask in draw_many(source.fit(phantom_rows), plan, label, 100):
        assert mask.dtype == np.uint8 and mask.shape == (128, 128) and set(np.unique(mask)) == {0, 1}
        assert ndimage.label(mask, FOUR)[1] == 1
        assert ndimage.label(mask == 0, FOUR)[1] == 1
        assert not mask[:2].any() and not mask[-2:].any() and not mask[:, :2].any() and not mask[:, -2:].any()


def test_strict_orientation_obeys_the_rule(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    fitted = DeformedEllipse(orientation="strict").fit(phantom_rows)
    assert all(geometry.box_aspect(mask) > 1 for mask in draw_many(fitted, plan, "benign", 100))
    assert all(geometry.box_aspect(mask) < 1 for mask in draw_many(fitted, plan, "malignant", 100))
    reversed_rule = DeformedEllipse(
        orientation="strict", orientations=(("benign", "tall"), ("malignant", "wide"))
    )
    masks = draw_many(reversed_rule.fit(phantom_rows), plan, "benign", 30)
    assert all(geometry.box_aspect(mask) < 1 for mask in masks)


def test_strict_orientation_needs_a_rule_for_every_lesion_class(phantom_rows: list[TrainingRow]) -> None:
    source = DeformedEllipse(orientation="strict", orientations=(("benign", "wide"),))
    with pytest.raises(ValueError, match="'malignant'"):
        source.fit(phantom_rows)


def test_without_deformation_and_jitter_the_mask_is_the_recorded_ellipse(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = DeformedEllipse(deformation=(0, 0), irregularity="none", jitter=0).fit(phantom_rows)
    for ordinal in range(40):
        draw = fitted.draw(plan.request("malignant", ordinal), np.random.default_rng(ordinal))
        p = {name: float(draw.parameters[name]) for name in ("a", "b", "x", "y")}
        assert draw.parameters["sigma"] == draw.parameters["fine_sigma"] == 0
        np.testing.assert_array_equal(draw.mask, geometry.ellipse((128, 128), **p))
        assert geometry.area(draw.mask) == pytest.approx(math.pi * p["a"] * p["b"], abs=1)


def test_draws_depend_on_the_generator_alone(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    fitted = DeformedEllipse().fit(phantom_rows)
    again = pickle.loads(pickle.dumps(DeformedEllipse().fit(phantom_rows[::-1])))  # noqa: S301
    assert again.fitted_on == fitted.fitted_on
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    first = [fitted.draw(plan.request("benign", k), np.random.default_rng(k)) for k in range(10)]
    second = [again.draw(plan.request("benign", k), np.random.default_rng(k)) for k in reversed(range(10))][
        ::-1
    ]
    for one, two in zip(first, second):
        np.testing.assert_array_equal(one.mask, two.mask)
        assert one.parameters == two.parameters
    assert len({one.mask.tobytes() for one in first}) == 10
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # type: ignore[index]


def test_parameters_are_plain_json_and_complete(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    draw = DeformedEllipse().fit(phantom_rows).draw(plan.request("benign", 0), np.random.default_rng(0))
    parameters = json.loads(json.dumps(dict(draw.parameters)))
    names = {"mask_source", "a", "b", "x", "y", "solidity", "sigma", "fine_sigma", "tries"}
    assert set(parameters) == names
    radius = math.sqrt(parameters["a"] * parameters["b"])
    assert 0.125 <= parameters["sigma"] / radius <= 0.3125
    assert geometry.equivalent_radius(draw.mask) == pytest.approx(radius, rel=0.45)


def test_default_deformation_lies_within_the_cited_ranges() -> None:
    ratios = [sigma / radius for radius, sigmas in CITED_DEFORMATION.items() for sigma in sigmas]
    low, high = DeformedEllipse().deformation
    assert min(ratios) <= low < high <= max(ratios)


@pytest.mark.parametrize("label", ["benign", "malignant"])
def test_drawn_masks_follow_the_training_masks(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan, label: str
) -> None:
    masks = draw_many(DeformedEllipse().fit(phantom_rows), plan, label, 400)
    ks = distances(phantom_rows, masks, label)
    print(label, {name: round(value, 3) for name, value in ks.items()})
    for name in ("radius", "box aspect", "moment aspect", "x", "y"):
        assert ks[name] < 0.22, name


@pytest.mark.slow
@pytest.mark.parametrize("label", ["benign", "malignant"])
def test_drawn_masks_follow_busi(busi_rows: list[TrainingRow], plan: SynthesisPlan, label: str) -> None:
    masks = draw_many(DeformedEllipse().fit(busi_rows), plan, label, 400)
    ks = distances(busi_rows, masks, label)
    print(label, {name: round(value, 3) for name, value in ks.items()})
    for name in ("radius", "box aspect", "moment aspect", "x", "y"):
        assert ks[name] < 0.12, name
    assert ks["solidity"] < 0.25


@pytest.mark.slow
def test_irregularity_brings_the_curvature_of_malignant_masks(
    busi_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    """Plain elastic ellipses are as smooth as ellipses; the finer deformation closes most of the gap."""
    real = [geometry.curvature(geometry.largest_component(r.mask)) for r in busi_rows if r.label == 1]  # type: ignore[arg-type]
    ks = {}
    for irregularity in ("empirical", "none"):
        fitted = DeformedEllipse(irregularity=irregularity).fit(busi_rows)  # type: ignore[arg-type]
        drawn = [geometry.curvature(mask) for mask in draw_many(fitted, plan, "malignant", 200)]
        ks[irregularity] = float(ks_2samp(real, drawn).statistic)
    print({name: round(value, 3) for name, value in ks.items()})
    assert ks["empirical"] < 0.4 < 0.8 < ks["none"]


def test_position_and_size_are_drawn_jointly(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    """Two kinds of lesion, small on the left and large on the right: no mixed kind appears."""
    rows = []
    for k in range(20):
        x, radius = (30 + k % 3, 6 + k % 2) if k % 2 else (90 - k % 3, 20 + k % 2)
        mask = geometry.ellipse((128, 128), x=x, y=64, a=radius * 1.3, b=radius / 1.3)
        rows.append(dataclasses.replace(phantom_rows[0], image_id=str(k), label_name="benign", mask=mask))
    masks = draw_many(DeformedEllipse(jitter=0.1).fit(rows), plan, "benign", 100)
    values = np.array([measures(mask) for mask in masks])
    left, small = values[:, 3] < 0.5, values[:, 0] < 0.15
    np.testing.assert_array_equal(left, small)
    assert 0.3 < left.mean() < 0.7


def test_class_without_lesions_gets_empty_masks(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    for source in (DeformedEllipse(), RealMasks()):
        draw = source.fit(phantom_rows).draw(plan.request("normal", 0), np.random.default_rng(0))
        assert draw.mask.shape == (128, 128) and not draw.mask.any()
        assert draw.parameters == {"mask_source": "empty"}


def test_failure_after_the_bound_names_the_parameters(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = DeformedEllipse(deformation=(5, 6), max_tries=20).fit(phantom_rows)
    with pytest.raises(ValueError, match=r"'benign' in 20 tries .*a=.*sigma=.*lower `deformation` \(5, 6\)"):
        for ordinal in range(50):
            fitted.draw(plan.request("benign", ordinal), np.random.default_rng(ordinal))


def test_label_without_training_rows_is_named(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    rows = [row for row in phantom_rows if row.label_name != "malignant"]
    for source in (DeformedEllipse(), RealMasks()):
        with pytest.raises(ValueError, match="'malignant': no training row"):
            source.fit(rows).draw(plan.request("malignant", 0), np.random.default_rng(0))


def test_rows_without_masks_are_refused(phantom_rows: list[TrainingRow]) -> None:
    bare = [dataclasses.replace(row, mask=None) for row in phantom_rows]
    for source in (DeformedEllipse(), RealMasks()):
        with pytest.raises(ValueError, match="none of the 300 training rows has a mask"):
            source.fit(bare)
        with pytest.raises(ValueError, match="label 'benign': no training row has a mask"):
            source.fit([b if b.label_name == "benign" else r for b, r in zip(bare, phantom_rows)])
        with pytest.raises(ValueError, match="one square size"):
            source.fit(
                [dataclasses.replace(phantom_rows[0], mask=np.ones((64, 64), np.uint8)), *phantom_rows]
            )


@pytest.mark.parametrize(
    "fields",
    [
        {"orientation": "tall"},
        {"orientations": (("benign", "round"),)},
        {"deformation": (0.3, 0.1)},
        {"deformation": (-1.0, 0.1)},
        {"irregularity": "some"},
        {"jitter": 1.5},
        {"area_tolerance": 0.0},
        {"border": -1},
        {"max_tries": 0},
    ],
)
def test_bad_settings_are_named(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields)).removesuffix("s")):
        DeformedEllipse(**fields)


def test_one_row_is_enough(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    rows = [row for row in phantom_rows if row.label_name == "benign"][:1]
    assert all(mask.any() for mask in draw_many(DeformedEllipse().fit(rows), plan, "benign", 5))


def test_every_setting_enters_the_fingerprint() -> None:
    changed = [{"jitter": 0.1}, {"deformation": (0.1, 0.2)}, {"orientation": "strict"}, {"border": 3}]
    changed.append({"irregularity": "none"})
    prints = {fingerprint(DeformedEllipse(**fields)) for fields in [{}, *changed]}
    assert len(prints) == 6


# ------------------------------------------------------------------------------------------ real masks


def test_unjittered_real_masks_are_training_masks_of_the_label(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = RealMasks(flip=False).fit(phantom_rows)
    by_id = {row.image_id: row for row in phantom_rows}
    seen = set()
    for ordinal in range(60):
        draw = fitted.draw(plan.request("malignant", ordinal), np.random.default_rng(ordinal))
        row = by_id[str(draw.parameters["image_id"])]
        assert row.label_name == "malignant"
        np.testing.assert_array_equal(draw.mask, row.mask)
        seen.add(row.image_id)
    assert len(seen) > 30


def test_flip_mirrors_left_and_right_half_of_the_time(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = pickle.loads(pickle.dumps(RealMasks().fit(phantom_rows)))  # noqa: S301
    by_id = {row.image_id: row for row in phantom_rows}
    flips = 0
    for ordinal in range(200):
        draw = fitted.draw(plan.request("benign", ordinal), np.random.default_rng(ordinal))
        mask = by_id[str(draw.parameters["image_id"])].mask
        assert mask is not None
        flips += int(draw.parameters["flipped"])
        np.testing.assert_array_equal(draw.mask, mask[:, ::-1] if draw.parameters["flipped"] else mask)
    assert 70 < flips < 130


def test_jitter_moves_turns_and_scales_as_recorded(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = RealMasks(flip=False, rotation=20, scale=0.15, shift=0.03).fit(phantom_rows)
    by_id = {row.image_id: row for row in phantom_rows}
    for ordinal in range(40):
        draw = fitted.draw(plan.request("benign", ordinal), np.random.default_rng(ordinal))
        p = draw.parameters
        json.dumps(dict(p))
        before, after = geometry.moments(by_id[str(p["image_id"])].mask), geometry.moments(draw.mask)  # type: ignore[arg-type]
        assert before is not None and after is not None
        assert after.area == pytest.approx(before.area * float(p["scale"]) ** 2, rel=0.06)
        assert after.x - before.x == pytest.approx(float(p["dx"]), abs=0.8)
        assert after.y - before.y == pytest.approx(float(p["dy"]), abs=0.8)
        assert geometry.curvature(draw.mask) < 3 and set(np.unique(draw.mask)) == {0, 1}


def test_label_maps_keep_their_classes(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    mask = geometry.ellipse((128, 128), x=60, y=60, a=20, b=15) * 2
    mask[55:65, 55:65] = 1
    row = dataclasses.replace(phantom_rows[0], label_name="benign", mask=mask)
    draw = RealMasks(rotation=5).fit([row]).draw(plan.request("benign", 0), np.random.default_rng(1))
    assert set(np.unique(draw.mask)) == {0, 1, 2}


def test_impossible_jitter_fails_after_the_bound(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = RealMasks(shift=50.0, max_tries=5).fit(phantom_rows)
    with pytest.raises(ValueError, match=r"'benign' stayed in the frame in 5 tries.*shift 50.0"):
        fitted.draw(plan.request("benign", 0), np.random.default_rng(0))
    with pytest.raises(ValueError, match="rotation"):
        RealMasks(rotation=-1)


@pytest.mark.slow
def test_curvature_separates_the_classes_of_busi(busi_rows: list[TrainingRow]) -> None:
    """Scale-normalised curvature of real masks: area under the curve benign against malignant about .99."""
    from sklearn.metrics import roc_auc_score

    lesions = [(row.label, geometry.largest_component(row.mask)) for row in busi_rows if row.mask.any()]  # type: ignore[union-attr, arg-type]
    label, area = np.array([k for k, _ in lesions]), np.array([geometry.area(m) for _, m in lesions])
    curvature = np.array([geometry.curvature(mask) for _, mask in lesions])
    sobel = np.array([geometry.curvature(mask, operator="sobel") for _, mask in lesions])
    auc = {
        "curvature": float(roc_auc_score(label, curvature)),
        "area": float(roc_auc_score(label, area)),
        "sobel": float(roc_auc_score(label, sobel)),
    }
    correlation = float(np.corrcoef(curvature, np.log(area))[0, 1])
    print(
        auc,
        "correlation with log area",
        correlation,
        "sobel means",
        [sobel[label == k].mean() for k in (0, 1)],
    )
    assert auc["curvature"] > 0.97
    assert auc["curvature"] > auc["area"] + 0.1
    assert correlation < 0.5
    assert sobel[label == 0].mean() < sobel[label == 1].mean()
