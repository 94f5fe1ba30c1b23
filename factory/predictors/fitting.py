"""Training of a predictor: plain PyTorch, one process, a pure function of its arguments.

    fitted = fit(Classifier(architecture="resnet50"), FitSettings(), examples, batches, validation=held_out, seed=0)
    probabilities = fitted.predict(test)

Rows, augmentation and dropout of a step are functions of (seed, step), so a run that was killed and resumed from its
checkpoint ends with the same bits as one that was not (on a CPU with the same number of threads; on a GPU up to
rounding).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factory.predictors.batches import Batches
from factory.predictors.classifiers import FeatureProbe
from factory.predictors.examples import Examples
from factory.predictors.fitted import Fitted, Predictor, load_fitted, predict_native, predict_network
from factory.predictors.settings import FitSettings
from factory.predictors.training_state import DeviceRows, TrainingState
from schemas.identity import fingerprint, hash_parts, torch_seed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FitSettings", "Fitted", "Monitor", "Predictor", "fit", "load_fitted", "predict_native"]

Monitor = Callable[[Examples, np.ndarray], float]
"""Score of probabilities on validation rows; larger is better."""


def fit(
    predictor: Predictor,
    settings: FitSettings,
    examples: Examples,
    batches: Batches,
    *,
    validation: Examples | None = None,
    monitor: Monitor | None = None,
    seed: int,
    device: str = "cpu",
    start: Fitted | None = None,
    checkpoint: Path | None = None,
    keep_optimizer: bool = True,
    on_progress: Callable[[Mapping[str, float]], None] | None = None,
) -> Fitted:
    """Train; keep the weights with the best validation score, without validation the last.

    Args:
        predictor: what to train. A `FeatureProbe` takes no steps: it is fitted to all rows, weighted by how often
            `batches` would show them; augmentation, checkpoint and start have no place there.
        settings: how.
        examples: training rows.
        batches: which rows each step sees.
        validation: rows that choose the weights and stop early; never rows that are reported.
        monitor: score of the validation rows; minus their mean loss without.
        seed: of weights, augmentation and dropout. The order of rows is the batches' own.
        device: torch device.
        start: a fitted predictor of the same kind to go on from, with its optimizer's moments where it has them; the
            learning rate starts anew.
        checkpoint: file to write at every report and to resume from where it exists.
        keep_optimizer: whether the result carries the optimizer's moments, twice the size of the weights.
        on_progress: told of every entry of the history.

    Raises:
        ValueError: rows that cannot be trained on, named; a loss that is not finite; a checkpoint of another run.
    """
    _check_rows(predictor, settings, examples, batches)
    if validation is not None:
        _check_validation(predictor, examples, validation)
    elif settings.patience is not None and not isinstance(predictor, FeatureProbe):
        raise ValueError(f"FitSettings.patience: {settings.patience} needs validation rows")
    if isinstance(predictor, FeatureProbe):
        if start is not None:
            raise ValueError("start: a FeatureProbe is fitted in one go; there is nothing to go on from")
        return _fit_probe(predictor, settings, examples, batches, validation, monitor, device)
    import torch

    identity = ""
    if checkpoint is not None:
        identity = _identity(predictor, settings, examples, batches, validation, seed, start)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(torch_seed(f"fit/{seed}", "weights"))
        run = TrainingState(predictor, settings, examples, device)
        if start is not None:
            run.go_on_from(start)
        if checkpoint is not None and Path(checkpoint).exists():
            run.load(Path(checkpoint), identity)
        _train(run, examples, batches, validation, monitor, seed, checkpoint, identity, on_progress)
    tensors, moments = run.best.tensors, run.best.moments
    return Fitted(
        predictor=predictor,
        settings=settings,
        class_names=examples.class_names,
        size=examples.size,
        channels=examples.channels,
        tensors=tensors,
        optimizer=moments if keep_optimizer else None,
        history=run.history,
        best_step=run.best.step,
        best_score=run.best.score,
        rows_digest=examples.digest(),
        seconds=run.seconds,
    )


def _train(
    run: TrainingState,
    examples: Examples,
    batches: Batches,
    validation: Examples | None,
    monitor: Monitor | None,
    seed: int,
    checkpoint: Path | None,
    identity: str,
    on_progress: Callable[[Mapping[str, float]], None] | None,
) -> None:
    settings = run.settings
    rows = DeviceRows(run.predictor.task, examples, run.device)
    counts = batches.counts if run.predictor.task == "classification" else None
    begin, spent = time.perf_counter(), run.seconds
    while not run.is_done:
        run.update(rows, batches.rows(run.step), counts, seed)
        if run.step % settings.validate_every and run.step < settings.num_steps:
            continue
        entry = run.report()
        score = None
        if validation is not None:
            score = _score(run.network, validation, run.predictor.task, settings, monitor, run.device)
            entry["score"] = score
        run.keep(score)
        run.history.append(entry)
        run.seconds = spent + time.perf_counter() - begin
        if checkpoint is not None:
            run.save(Path(checkpoint), identity)
        if on_progress is not None:
            on_progress(entry)


def _score(
    network: "nn.Module",
    validation: Examples,
    task: str,
    settings: FitSettings,
    monitor: Monitor | None,
    device: str,
) -> float:
    import torch

    network.eval()
    narrow = settings.precision == "bfloat16"
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=narrow):
        probabilities = predict_network(network, validation, task, 64, device)
    return _checked_score(monitor or negative_log_likelihood, validation, probabilities)


def _checked_score(monitor: Monitor, validation: Examples, probabilities: np.ndarray) -> float:
    if not np.isfinite(probabilities).all():
        raise ValueError("validation: some predictions are not finite; lower FitSettings.learning_rate")
    score = float(monitor(validation, probabilities))
    if not math.isfinite(score):
        raise ValueError(
            f"monitor: gave {score} on {len(validation)} validation rows with {validation.counts().tolist()} rows per "
            "class; validate on rows of every class, or take another monitor"
        )
    return score


def negative_log_likelihood(examples: Examples, probabilities: np.ndarray) -> float:
    """Mean log probability of what is true: of the label, or of each pixel's mask; larger is better."""
    if probabilities.ndim == 2:
        chosen = probabilities[np.arange(len(examples)), examples.labels]
    else:
        assert examples.masks is not None
        chosen = np.where(examples.masks > 0, probabilities, 1 - probabilities)
    return float(np.log(np.maximum(chosen, 1e-7), dtype=np.float64).mean())


def _fit_probe(
    probe: FeatureProbe,
    settings: FitSettings,
    examples: Examples,
    batches: Batches,
    validation: Examples | None,
    monitor: Monitor | None,
    device: str,
) -> Fitted:
    from factory.predictors.probe import fit_probe

    begin = time.perf_counter()
    fitted = Fitted(
        predictor=probe,
        settings=settings,
        class_names=examples.class_names,
        size=examples.size,
        channels=examples.channels,
        tensors=fit_probe(probe, examples, batches.row_weights, device),
        rows_digest=examples.digest(),
    )
    score = None
    if validation is not None:
        probabilities = fitted.predict(validation, device=device)
        score = _checked_score(monitor or negative_log_likelihood, validation, probabilities)
        fitted.history.append({"step": 0, "score": score})
    seconds = time.perf_counter() - begin
    return replace(fitted, best_score=score, seconds=seconds)


def _identity(
    predictor: Predictor,
    settings: FitSettings,
    examples: Examples,
    batches: Batches,
    validation: Examples | None,
    seed: int,
    start: Fitted | None,
) -> str:
    """Hash of what decides the result of `fit`."""
    return hash_parts(
        fingerprint((predictor, settings)),
        examples.content_digest(),
        batches.row_weights.tobytes(),
        *(batches.rows(step).tobytes() for step in (0, settings.num_steps - 1)),
        "" if validation is None else validation.content_digest(),
        seed,
        "" if start is None else start.digest(),
    )


def _check_rows(predictor: Predictor, settings: FitSettings, examples: Examples, batches: Batches) -> None:
    if not len(examples):
        raise ValueError("examples: no training row")
    if len(batches.row_weights) != len(examples):
        raise ValueError(
            f"batches: made for {len(batches.row_weights)} rows, there are {len(examples)} examples"
        )
    if not isinstance(predictor, FeatureProbe):
        settings.loss_of(predictor.task)
    if predictor.task == "segmentation":
        _check_masks("examples", examples)
        return
    empty = [name for name, count in zip(examples.class_names, batches.counts) if not count > 0]
    if empty:
        raise ValueError(
            f"examples: no batch has a row of class {', '.join(empty)}; add rows, or leave the class out"
        )


def _check_validation(predictor: Predictor, examples: Examples, validation: Examples) -> None:
    if not len(validation):
        raise ValueError("validation: no row; leave it out to keep the last weights")
    for name in ("size", "channels", "class_names"):
        if getattr(validation, name) != getattr(examples, name):
            raise ValueError(
                f"validation.{name}: {getattr(validation, name)}, the training rows have {getattr(examples, name)}"
            )
    shared = set(examples.ids) & set(validation.ids)
    if shared:
        raise ValueError(f"validation: {len(shared)} rows are training rows too, such as {min(shared)}")
    if predictor.task == "segmentation":
        _check_masks("validation", validation)


def _check_masks(name: str, examples: Examples) -> None:
    missing = (
        examples.ids
        if examples.has_mask is None
        else [examples.ids[row] for row in np.flatnonzero(~examples.has_mask)]
    )
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(examples)} rows have no mask ({', '.join(missing[:3])}, …); segmentation "
            "needs one for each: leave those rows out"
        )
