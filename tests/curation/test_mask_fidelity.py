"""Mask fidelity: calibrated by real images alone, falls with every pixel of shift, shuffled masks go, faithful ones stay."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from factory import geometry
from factory.curation.filter_batch import FilterBatch
from factory.curation.mask_fidelity import FittedMaskFidelity, MaskFidelity, acceptance, load_mask_fidelity
from factory.predictors.segmenter_folder import (
    SEGMENTER_TENSORS,
    RowDice,
    SegmenterRecord,
    dice_scores,
    read_record,
    segmenter_digest,
    write_record,
)
from schemas.sample import RejectReason

CLASSES = ("benign", "malignant", "normal")
FRAME = 64


def real_results(num: int = 400, seed: int = 0) -> tuple[RowDice, ...]:
    """Out-of-fold results as a segmenter gives them: small lesions are segmented worse; malignant ones worse still."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        label = CLASSES[number % 3]
        area = 0.0 if label == "normal" else float(rng.uniform(0.01, 0.2))
        worse = 0.1 * (label == "malignant") + 0.15 * (area < 0.06)
        dice = None if area == 0 else float(np.clip(rng.normal(0.88 - worse, 0.05), 0, 1))
        false_area = max(0.0, float(rng.normal(-0.01, 0.01)))
        rows.append(
            RowDice(
                image_id=f"{number:04d}",
                label_name=label,
                area=area,
                dice=dice,
                segmented_area=false_area if area == 0 else area,
            )
        )
    return tuple(rows)


def record(rows: tuple[RowDice, ...] = real_results()) -> SegmenterRecord:
    return SegmenterRecord(
        predictor={"architecture": "unet", "encoder": None},
        class_names=CLASSES,
        size=FRAME,
        channels=1,
        real="r",
        rows_digest="rows",
        validation_digest=None,
        weights_digest="w",
        num_folds=5,
        out_of_fold=rows,
        validation=(),
    )


FITTED = MaskFidelity().fit(record(), "folder")


def disc(radius: float, *, x: float = 32.0, size: int = FRAME) -> np.ndarray:
    return geometry.ellipse((size, size), x=x, y=size / 2, a=radius, b=radius)


def batch(requested: list[np.ndarray | None], segmented: list[np.ndarray], label: int = 0) -> FilterBatch:
    return FilterBatch(
        images=segmented,
        requested_masks=requested,
        masks=requested,
        labels=np.full(len(requested), label),
        embeddings=np.zeros((len(requested), 1), np.float32),
        segmented_masks=np.stack(segmented),
    )


def test_dice_falls_with_every_pixel_of_shift_and_the_verdict_follows() -> None:
    shifted = [disc(14.0, x=32.0 + d) for d in range(0, 20, 2)]
    scores = FITTED.score(batch([disc(14.0)] * len(shifted), shifted))
    assert scores["mask_dice"][0] == 1 and (np.diff(scores["mask_dice"]) < 0).all()
    assert (np.diff(scores["mask_fidelity"]) <= 0).all()
    verdicts = FITTED.verdict(scores)
    assert verdicts[0] is None and verdicts[-1] is RejectReason.MASK_NOT_OBEYED
    first = next(i for i, reason in enumerate(verdicts) if reason)
    assert all(verdicts[first:]) and not any(verdicts[:first]), "once rejected, further shifts are too"


def test_about_the_stated_share_of_real_images_would_be_rejected() -> None:
    """In every class and size quartile, on real images that the gate was not calibrated on."""
    others = real_results(1500, seed=1)
    values = []
    for row in others:
        quartile = (
            -1
            if row.area == 0
            else int(np.searchsorted(FITTED.bounds[row.label_name], row.area, side="right"))
        )
        reference = FITTED.reference(row.label_name, quartile)
        reached = -row.segmented_area if row.dice is None else row.dice
        values.append(
            (row.label_name, quartile, np.searchsorted(reference, reached, side="right") / len(reference))
        )
    share = np.array([value for *_, value in values])
    assert np.mean(share < FITTED.source.quantile) == pytest.approx(0.05, abs=0.02)
    for label, quartile in {(label, quartile) for label, quartile, _ in values}:
        mine = np.array([s for name, q, s in values if (name, q) == (label, quartile)])
        assert np.mean(mine < 0.05) < 0.15, (label, quartile)


def test_thresholds_follow_class_and_size() -> None:
    thresholds = FITTED.thresholds()
    assert set(thresholds) == {"benign", "malignant"}
    assert (
        thresholds["malignant"][3] < thresholds["benign"][3]
        and thresholds["benign"][0] < thresholds["benign"][3]
    )
    floor = MaskFidelity(min_dice=0.9).fit(record(), "folder").thresholds()
    assert min(floor["malignant"]) == 0.9


def test_an_image_without_a_lesion_is_judged_by_its_false_positive() -> None:
    empty = np.zeros((FRAME, FRAME), np.uint8)
    scores = FITTED.score(batch([empty, empty], [empty, disc(16.0)], label=2))
    assert np.isnan(scores["mask_dice"]).all() and scores["size_quartile"].tolist() == [-1, -1]
    assert FITTED.verdict(scores) == [None, RejectReason.MASK_NOT_OBEYED]
    assert scores["segmented_area"][1] == pytest.approx(geometry.area(disc(16.0)) / FRAME**2)


def test_a_row_without_a_requested_mask_is_not_judged() -> None:
    scores = FITTED.score(batch([None], [disc(10.0)]))
    assert (
        np.isnan(scores["mask_dice"][0])
        and np.isnan(scores["mask_fidelity"][0])
        and FITTED.verdict(scores) == [None]
    )


def test_the_requested_mask_may_have_another_size_than_the_segmenters_frame() -> None:
    scores = FITTED.score(batch([disc(28.0, x=64.0, size=128)], [disc(14.0)]))
    assert scores["mask_dice"][0] > 0.97


def test_rare_classes_fall_back_and_too_few_rows_are_refused() -> None:
    rows = real_results(400)
    few = [row for row in rows if row.label_name == "malignant"][:10]
    fitted = MaskFidelity().fit(record((*few, *(r for r in rows if r.label_name == "benign"))), "folder")
    every = sorted(row.dice for row in (*few, *rows) if row.label_name == "benign" and row.dice is not None)
    assert len(fitted.reference("malignant", 1)) == len(every) + 10 and fitted.reference("normal", -1) == ()
    with pytest.raises(ValueError, match="measured on 10 real lesions, and MaskFidelity.min_rows = 20"):
        MaskFidelity().fit(record(tuple(few)), "folder")


def test_a_segmenter_that_misses_lesions_is_said_not_to_judge_them() -> None:
    blind = tuple(
        dataclasses.replace(r, dice=0.0) if r.dice is not None and r.area < 0.06 else r
        for r in real_results()
    )
    notes = MaskFidelity().fit(record(blind), "folder").notes()
    assert any("benign of size quartile 1" in note for note in notes) and FITTED.notes() == []


def test_verdicts_need_the_scores_alone_and_thresholds_can_change_later() -> None:
    scores = FITTED.score(batch([disc(14.0)] * 3, [disc(14.0), disc(12.0), disc(6.0)]))
    again = pickle.loads(pickle.dumps(FITTED))  # noqa: S301 (our own bytes, as Ray sends them)
    assert again.verdict(scores) == FITTED.verdict(scores) == MaskFidelity().verdict(scores)
    recorded = FittedMaskFidelity.of_record(json.loads(json.dumps(FITTED.record())))
    assert recorded.verdict(scores) == FITTED.verdict(scores) and recorded.segmenter_digest == "w"
    assert MaskFidelity(min_dice=0.99).verdict(scores)[1:] == [RejectReason.MASK_NOT_OBEYED] * 2
    with pytest.raises(ValueError, match="scored without that filter"):
        FITTED.verdict({})
    with pytest.raises(ValueError, match="no segmented_masks"):
        FITTED.score(dataclasses.replace(batch([disc(9.0)], [disc(9.0)]), segmented_masks=None))


def test_acceptance_by_class_and_size() -> None:
    found = acceptance(
        ["a", "a", "b", "a"],
        np.array([0.0, 0.0, np.nan, -1.0]),
        [None, RejectReason.MASK_NOT_OBEYED, None, None],
    )
    assert [(item.label_name, item.size_quartile, item.rows, item.obeyed) for item in found] == [
        ("a", -1, 1, 1),
        ("a", 0, 2, 1),
    ]
    assert found[1].line() == "a, size quartile 1: 1 of 2 obey the mask (50%)"


def test_a_folder_is_checked_before_it_judges(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="factory train --part segmenter"):
        load_mask_fidelity(MaskFidelity(), str(tmp_path), CLASSES, "r")
    (tmp_path / SEGMENTER_TENSORS).write_bytes(b"weights")
    written = dataclasses.replace(record(), weights_digest=segmenter_digest(tmp_path))
    write_record(tmp_path, written)
    assert read_record(tmp_path) == written
    assert load_mask_fidelity(MaskFidelity(), str(tmp_path), CLASSES, "r").thresholds() == FITTED.thresholds()
    with pytest.raises(ValueError, match="train one on this table"):
        load_mask_fidelity(MaskFidelity(), str(tmp_path), ("benign", "malignant"), "r")
    with pytest.raises(ValueError, match="trained on other real rows than the training split"):
        load_mask_fidelity(MaskFidelity(), str(tmp_path), CLASSES, "other")
    (tmp_path / SEGMENTER_TENSORS).write_bytes(b"others")
    with pytest.raises(ValueError, match="the weights are not those"):
        read_record(tmp_path)


def test_dice_of_known_overlaps() -> None:
    truth = np.zeros((3, 4, 4), np.uint8)
    truth[0, :2], truth[1, 0, 0] = 1, 7
    predicted = np.zeros((3, 4, 4), np.uint8)
    predicted[0, 1:3], predicted[2, 0] = 1, 1
    scores = dice_scores(truth, predicted)
    assert scores[0] == 0.5 and scores[1] == 0 and np.isnan(scores[2])


@pytest.mark.parametrize(
    ("values", "named"),
    [({"quantile": 0.0}, "quantile"), ({"min_dice": 1.5}, "min_dice"), ({"min_rows": 0}, "min_rows")],
)
def test_settings_out_of_range_are_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MaskFidelity(**values)  # type: ignore[arg-type]
