"""The segmenter of real images, trained for real: out of fold, resumed, and worth something as a gate."""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from segmenter_rows import CLASSES, SIZE, ellipse_rows, phantom_rows, small_stage

from factory.curation.filter_batch import FilterBatch
from factory.curation.mask_fidelity import FittedMaskFidelity, MaskFidelity, load_mask_fidelity
from factory.imaging import TrainingRow
from factory.predictors.augmentation import Augmentation
from factory.predictors.segmenter_folder import SegmenterRecord, dice_scores, read_record
from factory.synthesis.resegmentation import Resegmenter
from factory.training.metrics import Observer, read_metrics
from factory.training.segmenter_run import examples_of, fold_of_rows, row_dice, train_segmenter
from factory.training.segmenter_stage import FOLDS_FOLDER, SegmenterStage

TRAIN = examples_of(ellipse_rows(1, 96), CLASSES, 1)
VAL = examples_of(ellipse_rows(2, 12), CLASSES, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segmenter")
    train_segmenter(small_stage(), TRAIN, VAL, out, real="digest")
    return out


@pytest.fixture(scope="module")
def record(folder: Path) -> SegmenterRecord:
    return read_record(folder)


def score(
    folder: Path, rows: list[TrainingRow], masks: list[np.ndarray]
) -> tuple[FittedMaskFidelity, FilterBatch]:
    fitted = load_mask_fidelity(MaskFidelity(min_rows=10), str(folder), CLASSES, read_record(folder).real)
    images = [row.image for row in rows]
    batch = FilterBatch(
        images=images,
        requested_masks=masks,
        masks=masks,
        labels=np.array([row.label for row in rows]),
        embeddings=np.zeros((len(rows), 1), np.float32),
        segmented_masks=Resegmenter(str(folder)).segment(images),
    )
    return fitted, batch


def test_every_training_row_is_measured_out_of_fold(folder: Path, record: SegmenterRecord) -> None:
    assert {row.image_id for row in record.out_of_fold} == set(TRAIN.ids)
    assert {row.image_id for row in record.validation} == set(VAL.ids)
    assert record.rows_digest == TRAIN.digest() and record.validation_digest == VAL.digest()
    assert record.mean_dice(record.out_of_fold) > 0.6
    assert (record.architecture, record.class_names, record.size, record.real) == (
        "unet",
        CLASSES,
        SIZE,
        "digest",
    )
    assert {path.name for path in folder.iterdir()} == {
        "fitted.json", "metrics.jsonl", "segmenter.json", "tensors.safetensors",
    }  # fmt: skip
    last = read_metrics(folder)[-1]
    assert last["out_of_fold_dice"] == pytest.approx(record.mean_dice(record.out_of_fold))


def test_the_resegmenter_gives_what_was_measured_on_validation_rows(
    folder: Path, record: SegmenterRecord
) -> None:
    assert VAL.masks is not None
    masks = Resegmenter(str(folder), batch_size=5).segment(list(VAL.images[..., 0]))
    assert row_dice(VAL, masks) == record.validation
    colour = Resegmenter(str(folder)).segment([np.repeat(image, 3, axis=2) for image in VAL.images])
    assert np.array_equal(colour, masks), "a grey segmenter takes the mean of colours"


def kept_of(folder: Path, rows: list[TrainingRow]) -> tuple[float, float]:
    """Share that passes of rows with their own masks, and of the same rows with one another's."""
    rows = [row for row in rows if row.mask is not None and row.mask.any()]
    masks = [row.mask for row in rows if row.mask is not None]
    fitted, batch = score(folder, rows, masks)
    mixed = [masks[i] for i in np.random.default_rng(0).permutation(len(rows))]
    other = dataclasses.replace(batch, requested_masks=mixed, masks=mixed)
    own, others = (fitted.verdict(fitted.score(each)) for each in (batch, other))
    return float(np.mean([reason is None for reason in own])), float(
        np.mean([reason is None for reason in others])
    )


def test_faithful_images_stay_and_shuffled_masks_go(folder: Path) -> None:
    """Images of the same population with their own masks are what a perfect generator makes."""
    faithful, shuffled = kept_of(folder, ellipse_rows(3, 120))
    assert faithful >= 0.9 and shuffled < 0.3, (faithful, shuffled)


@pytest.mark.soak
def test_faithful_phantoms_stay_and_shuffled_masks_go(tmp_path: Path) -> None:
    """The same on ultrasound phantoms, where lesions are hard to see: the gate of a good segmenter."""
    stage = small_stage(num_steps=300)
    stage = dataclasses.replace(
        stage,
        predictor=dataclasses.replace(stage.predictor, width=8),
        fit=dataclasses.replace(stage.fit, learning_rate=5e-3, augmentation=Augmentation()),
    )
    examples = examples_of(phantom_rows(1, 200, 64), CLASSES, 1)
    train_segmenter(stage, examples, examples_of(phantom_rows(2, 24, 64), CLASSES, 1), tmp_path, real="d")
    faithful, shuffled = kept_of(tmp_path, phantom_rows(3, 150, 64))
    assert faithful >= 0.9 and shuffled < 0.4, (faithful, shuffled)


def test_dice_falls_as_the_requested_mask_is_moved(folder: Path) -> None:
    rows = [row for row in ellipse_rows(4, 60) if row.mask is not None and row.mask.any()]
    means = []
    for shift in range(0, 10, 2):
        masks = [np.roll(row.mask, shift, axis=1) for row in rows if row.mask is not None]
        fitted, batch = score(folder, rows, masks)
        means.append(float(np.nanmean(fitted.score(batch)["mask_dice"])))
    assert all(after < before for before, after in itertools.pairwise(means)), means


def test_folds_keep_patients_together_and_share_out_classes() -> None:
    folds = fold_of_rows(TRAIN, 4, 0)
    by_group: dict[str, set[int]] = {}
    for group, fold in zip(TRAIN.groups, folds.tolist()):
        by_group.setdefault(group, set()).add(fold)
    assert all(len(found) == 1 for found in by_group.values())
    for label in range(len(CLASSES)):
        counts = np.bincount(folds[TRAIN.labels == label], minlength=4)
        assert counts.max() - counts.min() <= 4, (CLASSES[label], counts)
    with pytest.raises(ValueError, match="num_folds: 60 folds of 48 patient groups"):
        fold_of_rows(TRAIN, 60, 0)


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    stage = small_stage(num_steps=4)
    rows, held_out = TRAIN.take(slice(0, 24)), VAL.take(slice(0, 6))

    def train(out: Path, observer: Observer | None = None) -> SegmenterRecord:
        train_segmenter(stage, rows, held_out, out, real="d", observer=observer)
        return read_record(out)

    whole = train(tmp_path / "whole")

    def die_at(limit: int) -> Observer:
        def on_metrics(step: int, values: object) -> None:
            if step >= limit:
                raise _Killed

        return Observer(on_metrics=on_metrics)

    for limit in (2, 6, 12):  # within the first fold, the second, and at the end of the fit on all rows
        with pytest.raises(_Killed):
            train(tmp_path / "killed", die_at(limit))
        assert (tmp_path / "killed" / FOLDS_FOLDER).is_dir()
    assert train(tmp_path / "killed") == whole
    steps = [line["step"] for line in read_metrics(tmp_path / "killed")]
    assert steps == sorted(steps) and steps[-1] == stage.total_steps == 12


def test_rows_and_settings_that_cannot_be_trained_on_are_named(tmp_path: Path) -> None:
    rows = ellipse_rows(1, 4)
    with pytest.raises(ValueError, match=r"row 1-0001 has no mask"):
        examples_of([rows[0], dataclasses.replace(rows[1], mask=None)], CLASSES, 1)
    with pytest.raises(ValueError, match="no row with a mask"):
        examples_of([], CLASSES, 1)
    with pytest.raises(ValueError, match="num_folds: want at least 2"):
        SegmenterStage(num_folds=1)


def test_scores_are_those_of_the_masks(folder: Path) -> None:
    rows = ellipse_rows(5, 12)
    masks = [row.mask for row in rows if row.mask is not None]
    fitted, batch = score(folder, rows, masks)
    assert batch.segmented_masks is not None
    expected = dice_scores(np.stack(masks), batch.segmented_masks)
    np.testing.assert_allclose(fitted.score(batch)["mask_dice"], expected, rtol=1e-6)
