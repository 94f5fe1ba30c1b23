"""Training the segmenter of real images: out-of-fold predictions of every training row, then one network on all of them.

Only training rows teach; validation rows choose the best step; no test row is read. A run that was killed goes on: a
finished fold is read from its file, an unfinished one from its checkpoint.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factory.geometry import area
from factory.imaging import TrainingRow
from factory.predictors.batches import UnionBatches
from factory.predictors.examples import Examples
from factory.predictors.segmenter_folder import (
    THRESHOLD,
    RowDice,
    SegmenterRecord,
    dice_scores,
    fit_frame,
    segmenter_digest,
    write_record,
)
from factory.training.segmenter_stage import FOLDS_FOLDER, SegmenterStage
from schemas.identity import canonical

if TYPE_CHECKING:
    from factory.predictors.fitting import Fitted
    from factory.training.loop import TrainingResult
    from factory.training.metrics import MetricsLog, Observer


def examples_of(rows: Sequence[TrainingRow], class_names: tuple[str, ...], channels: int) -> Examples:
    """Annotated rows, decoded at one size, as a predictor takes them.

    Raises:
        ValueError: no row, or one without a mask.
    """
    if not rows:
        raise ValueError("segmenter: no row with a mask to train on")
    missing = [row.image_id for row in rows if row.mask is None]
    if missing:
        raise ValueError(f"segmenter: row {missing[0]} has no mask; leave such rows out")
    return Examples(
        images=fit_frame([row.image for row in rows], len(rows[0].image), channels),
        labels=np.array([class_names.index(row.label_name) for row in rows], np.int64),
        class_names=class_names,
        ids=tuple(row.image_id for row in rows),
        groups=tuple(row.group_id for row in rows),
        is_real=np.ones(len(rows), np.bool_),
        masks=np.stack([(row.mask > 0).astype(np.uint8) for row in rows if row.mask is not None]),
    )


def fold_of_rows(examples: Examples, num_folds: int, seed: int) -> np.ndarray:
    """Fold of each row, int64 (N,): groups stay whole, classes are shared out evenly.

    Raises:
        ValueError: fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups = len(set(examples.groups))
    if groups < num_folds:
        raise ValueError(
            f"segmenter_stage.num_folds: {num_folds} folds of {groups} patient groups with masks; ask for fewer folds, or "
            "use more real images"
        )
    least = int(min(count for count in examples.counts() if count))
    labels = examples.labels if least >= num_folds else np.zeros(len(examples), np.int64)
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(examples), np.int64)
    for number, (_, held_out) in enumerate(splitter.split(labels, labels, examples.groups)):
        folds[held_out] = number
    return folds


def train_segmenter(
    stage: SegmenterStage,
    examples: Examples,
    validation: Examples | None,
    out: Path,
    *,
    real: str,
    device: str = "cpu",
    observer: "Observer | None" = None,
) -> "TrainingResult":
    """Measure the segmenter out of fold, train it on all rows, and leave it in `out` with its record.

    Args:
        stage: what to train.
        examples, validation: rows of the train and val splits, each with a mask.
        out: the run's folder.
        real: content digest of the training split, for the record.
        device: torch device.
        observer: told of losses, with steps counted over all fits.

    Raises:
        ValueError: too few groups for the folds, a size that the network does not take, or a loss that is not finite.
    """
    from factory.training.loop import TrainingResult
    from factory.training.metrics import MetricsLog, Observer

    begin = time.perf_counter()
    folds = fold_of_rows(examples, stage.num_folds, stage.seed)
    work = Path(out) / FOLDS_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    finished = sum((work / f"fold-{number}.npz").is_file() for number in range(stage.num_folds))
    observer = observer or Observer()
    log = MetricsLog(Path(out), finished * stage.fit.num_steps, observer)
    observer.on_start(finished * stage.fit.num_steps)
    predicted = np.zeros(examples.images.shape[:3], np.uint8)
    for number in range(stage.num_folds):
        held_out = np.flatnonzero(folds == number)
        predicted[held_out] = _fold_masks(stage, examples, held_out, validation, work, number, device, log)
    fitted = _fit(stage, examples, validation, work, stage.num_folds, device, log)
    fitted.save(out)
    out_of_fold = row_dice(examples, predicted)
    held = () if validation is None else row_dice(validation, _segment(fitted, validation, device))
    record = SegmenterRecord(
        predictor=canonical(stage.predictor),
        class_names=examples.class_names,
        size=examples.size,
        channels=examples.channels,
        real=real,
        rows_digest=examples.digest(),
        validation_digest=None if validation is None else validation.digest(),
        weights_digest=segmenter_digest(out),
        num_folds=stage.num_folds,
        out_of_fold=out_of_fold,
        validation=held,
    )
    write_record(out, record)
    seconds = time.perf_counter() - begin
    taken = stage.total_steps - finished * stage.fit.num_steps
    values = {"out_of_fold_dice": record.mean_dice(out_of_fold), "steps_per_second": taken / seconds}
    if held:
        values["val_dice"] = record.mean_dice(held)
    log.write(stage.total_steps, {name: value for name, value in values.items() if np.isfinite(value)})
    shutil.rmtree(work)
    return TrainingResult(
        start_step=finished * stage.fit.num_steps,
        steps=stage.total_steps,
        seconds=seconds,
        step_seconds=seconds,
        metrics=dict(log.latest),
    )


def row_dice(examples: Examples, predicted: np.ndarray) -> tuple[RowDice, ...]:
    """The result of each row, from the masks predicted for it, uint8 (N, S, S)."""
    assert examples.masks is not None
    scores = dice_scores(examples.masks, predicted)
    pixels = examples.size**2
    return tuple(
        RowDice(
            image_id=image_id,
            label_name=examples.class_names[label],
            area=area(truth) / pixels,
            segmented_area=area(mask) / pixels,
            dice=None if np.isnan(score) else float(score),
        )
        for image_id, label, truth, mask, score in zip(
            examples.ids, examples.labels, examples.masks, predicted, scores
        )
    )


def _fold_masks(
    stage: SegmenterStage,
    examples: Examples,
    held_out: np.ndarray,
    validation: Examples | None,
    work: Path,
    number: int,
    device: str,
    log: "MetricsLog",
) -> np.ndarray:
    """Masks of the held-out rows, uint8 (n, S, S), by a segmenter of the others; from its file where it is done."""
    path = work / f"fold-{number}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            return archive["masks"]
    others = np.setdiff1d(np.arange(len(examples)), held_out)
    fitted = _fit(stage, examples.take(others), validation, work, number, device, log)
    masks = _segment(fitted, examples.take(held_out), device)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, masks=masks)
    partial.replace(path)
    return masks


def _fit(
    stage: SegmenterStage,
    examples: Examples,
    validation: Examples | None,
    work: Path,
    number: int,
    device: str,
    log: "MetricsLog",
) -> "Fitted":
    from factory.predictors.fitting import fit

    settings = stage.fit

    def report(entry: Mapping[str, float]) -> None:
        values = {"loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        if "score" in entry:
            values["val_loss"] = -entry["score"]
        log.write(number * settings.num_steps + int(entry["step"]), values)

    return fit(
        stage.predictor,
        settings,
        examples,
        UnionBatches(
            examples.labels, examples.num_classes, settings.batch_size, stage.seed, sampling=settings.sampling
        ),
        validation=validation,
        seed=stage.seed,
        device=device,
        checkpoint=work / f"fit-{number}.checkpoint",
        keep_optimizer=False,
        on_progress=report,
    )


def _segment(fitted: "Fitted", examples: Examples, device: str) -> np.ndarray:
    return (fitted.predict(examples, device=device) > THRESHOLD).astype(np.uint8)
