"""Training: it learns, is a function of its arguments, resumes to the bit, and stops where it must."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from factory.evaluation.task_metrics import binary_auc
from factory.imaging import Letterbox
from factory.predictors.augmentation import Augmentation
from factory.predictors.batches import Batches, ComposedBatches, UnionBatches
from factory.predictors.classifiers import Classifier
from factory.predictors.examples import Examples, NativeTruth
from factory.predictors.fitting import FitSettings, Fitted, fit, load_fitted, predict_native
from factory.predictors.losses import BalancedSoftmax, CrossEntropy, DiceCrossEntropy
from factory.predictors.segmenters import Segmenter

MakePhantoms = Callable[..., Examples]
TINY = Classifier(architecture="small_cnn?width=4", dropout=0.2)
SHORT = FitSettings(num_steps=10, batch_size=8, validate_every=3, warmup_steps=2)


def union(examples: Examples, settings: FitSettings = SHORT) -> UnionBatches:
    return UnionBatches(examples.labels, examples.num_classes, settings.batch_size, 0, settings.sampling)


def assert_equal(one: Fitted, other: Fitted) -> None:
    assert one.digest() == other.digest() and one.history == other.history
    assert (one.best_step, one.best_score) == (other.best_step, other.best_score)
    assert one.optimizer is not None and other.optimizer is not None
    assert one.optimizer.keys() == other.optimizer.keys()
    assert all(torch.equal(value, other.optimizer[name]) for name, value in one.optimizer.items())


def accuracy(examples: Examples, probabilities: np.ndarray) -> float:
    return float((probabilities.argmax(axis=1) == examples.labels).mean())


def mean_dice(examples: Examples, probabilities: np.ndarray) -> float:
    assert examples.masks is not None
    truth, found = examples.masks > 0, probabilities > 0.5
    both = (truth & found).sum(axis=(1, 2))
    return float((2 * both / (truth.sum(axis=(1, 2)) + found.sum(axis=(1, 2)))).mean())


# ------------------------------------------------------------------------------------------ learning


def test_a_classifier_learns_phantoms(phantoms: MakePhantoms) -> None:
    train, held_out, test = phantoms(96, 48), phantoms(40, 48, first=1000), phantoms(100, 48, first=2000)
    settings = FitSettings(num_steps=100, batch_size=32, learning_rate=3e-3)
    predictor = Classifier(architecture="small_cnn?width=8")
    fitted = fit(
        predictor, settings, train, union(train, settings), validation=held_out, monitor=accuracy, seed=0
    )
    assert binary_auc(test.labels, fitted.predict(test)[:, 1]) > 0.7
    assert fitted.best_score == max(entry["score"] for entry in fitted.history)


def test_a_segmenter_learns_phantoms(phantoms: MakePhantoms) -> None:
    train, test = phantoms(32, 48), phantoms(24, 48, first=2000, native=True)
    settings = FitSettings(num_steps=60, batch_size=8, learning_rate=5e-3)
    fitted = fit(Segmenter(width=4), settings, train, union(train, settings), seed=0)
    probabilities = fitted.predict(test)
    assert probabilities.shape == (24, 48, 48) and probabilities.dtype == np.float32
    assert mean_dice(test, probabilities) > 0.5
    for mask, probability in zip(predict_native(fitted, test), probabilities):
        np.testing.assert_array_equal(mask, probability > 0.5)  # the square itself is native here


def test_balanced_softmax_takes_the_prior_of_the_batches(phantoms: MakePhantoms) -> None:
    """Images that say nothing: cross-entropy learns the prior of the batches, balanced softmax takes it away."""
    rows = phantoms(40, 32)
    blank = replace(rows, images=np.full_like(rows.images, 90), labels=(np.arange(40) >= 32).astype(np.int64))
    batches = ComposedBatches(blank.labels, np.arange(40) < 36, 2, 18, (0, 6), 0)
    settings = FitSettings(
        num_steps=120, learning_rate=0.02, weight_decay=0.0, augmentation=Augmentation(kind="none")
    )
    for loss, expected in ((CrossEntropy(), 1 / 3), (BalancedSoftmax(), 1 / 2)):
        fitted = fit(
            Classifier(architecture="small_cnn?width=2"), replace(settings, loss=loss), blank, batches, seed=0
        )
        assert fitted.predict(blank)[0, 1] == pytest.approx(expected, abs=0.03), loss


@pytest.mark.parametrize("architecture", ["unet", "resunet", "dynunet"])
def test_the_steps_are_those_of_plain_adamw(architecture: str, phantoms: MakePhantoms) -> None:
    """Against an unfused optimizer on contiguous memory, written out here."""
    train = phantoms(8, 32)
    settings = FitSettings(
        num_steps=4, batch_size=4, augmentation=Augmentation(kind="none"), weight_decay=0.1, warmup_steps=0
    )
    predictor, batches = Segmenter(architecture=architecture, width=4), union(train, settings)
    fitted = fit(predictor, settings, train, batches, seed=0)
    first = fit(predictor, replace(settings, num_steps=1, learning_rate=1e-30), train, batches, seed=0)
    network = predictor.build(2, 1, 32)
    network.load_state_dict(dict(first.tensors))
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False, fused=False)
    network.train()
    for step in range(4):
        rows = batches.rows(step)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        assert train.masks is not None
        images = torch.from_numpy(train.images[rows]).permute(0, 3, 1, 2).float() / 255
        loss = DiceCrossEntropy().loss(network(images.contiguous()), torch.from_numpy(train.masks[rows] > 0))
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    for name, tensor in network.named_parameters():
        if tensor.ndim == 1:
            continue  # before a normalisation a bias has no gradient, which Adam turns into steps of rounding noise
        moved = tensor.detach() - first.tensors[name]
        # Adam's first steps are as long as the learning rate whatever the gradient: compare with the way gone.
        assert (fitted.tensors[name] - tensor.detach()).norm() <= 0.05 * moved.norm(), name


# ------------------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("predictor", [TINY, Segmenter(width=2)], ids=["classifier", "segmenter"])
def test_the_result_is_a_function_of_the_arguments(
    predictor: Classifier | Segmenter, phantoms: MakePhantoms
) -> None:
    train, held_out = phantoms(12, 32), phantoms(8, 32, first=1000)
    settings = replace(SHORT, augmentation=Augmentation(kind="strong"))

    def run(seed: int) -> Fitted:
        return fit(predictor, settings, train, union(train), validation=held_out, seed=seed)

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = run(3)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are left alone
    torch.manual_seed(2)
    for part in (train, held_out):
        part.images.setflags(write=False)  # as arrays from Ray's object store are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(run(3), first)
    assert run(4).digest() != first.digest()


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it, nothing is tidied up."""


@dataclass
class DeadlyBatches:
    """Batches that end the process when they are asked for step `last`."""

    batches: Batches
    last: int

    @property
    def counts(self) -> np.ndarray:
        return self.batches.counts

    @property
    def row_weights(self) -> np.ndarray:
        return self.batches.row_weights

    def rows(self, step: int) -> np.ndarray:
        if step == self.last:
            raise Killed
        return self.batches.rows(step)


@pytest.mark.parametrize("with_validation", [True, False])
def test_a_killed_run_ends_like_one_that_was_not(
    with_validation: bool, phantoms: MakePhantoms, tmp_path: Path
) -> None:
    train = phantoms(12, 32)
    held_out = phantoms(8, 32, first=1000) if with_validation else None
    whole = fit(TINY, SHORT, train, union(train), validation=held_out, seed=0)
    path = tmp_path / "run" / "checkpoint.pt"
    for last in (2, 5, 7):
        with pytest.raises(Killed):
            fit(
                TINY,
                SHORT,
                train,
                DeadlyBatches(union(train), last),
                validation=held_out,
                seed=0,
                checkpoint=path,
            )
    steps: list[float] = []
    resumed = fit(
        TINY,
        SHORT,
        train,
        union(train),
        validation=held_out,
        seed=0,
        checkpoint=path,
        on_progress=lambda entry: steps.append(entry["step"]),
    )
    assert steps == [9, 10]
    assert_equal(resumed, whole)
    assert_equal(fit(TINY, SHORT, train, union(train), validation=held_out, seed=0, checkpoint=path), whole)
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(
    phantoms: MakePhantoms, tmp_path: Path
) -> None:
    train, path = phantoms(12, 32), tmp_path / "checkpoint.pt"
    fit(TINY, SHORT, train, union(train), seed=0, checkpoint=path)
    relabelled = replace(train, labels=1 - train.labels)
    for other in (
        lambda: fit(TINY, SHORT, train, union(train), seed=1, checkpoint=path),
        lambda: fit(TINY, replace(SHORT, learning_rate=2e-3), train, union(train), seed=0, checkpoint=path),
        lambda: fit(TINY, SHORT, relabelled, union(train), seed=0, checkpoint=path),
        lambda: fit(TINY, SHORT, train, UnionBatches(train.labels, 2, 8, 5), seed=0, checkpoint=path),
    ):
        with pytest.raises(ValueError, match="is of a run with another predictor, settings, rows or seed"):
            other()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"checkpoint\.pt: cannot be read"):
        fit(TINY, SHORT, train, union(train), seed=0, checkpoint=path)


# ------------------------------------------------------------------------------------------ going on, choosing


def test_going_on_takes_weights_and_moments(phantoms: MakePhantoms, tmp_path: Path) -> None:
    """Two runs of five steps at a constant rate are one run of ten, where nothing else depends on the step."""
    train = phantoms(8, 32)  # one batch holds all rows
    settings = replace(
        SHORT, schedule="constant", warmup_steps=0, augmentation=Augmentation(kind="none"), validate_every=5
    )
    predictor = Classifier(architecture="small_cnn?width=4")
    whole = fit(predictor, settings, train, union(train), seed=0)
    half = replace(settings, num_steps=5)
    first = fit(predictor, half, train, union(train), seed=0)
    saved = load_fitted(first.save(tmp_path / "first"))
    assert_equal(saved, first)
    np.testing.assert_array_equal(saved.predict(train), first.predict(train))
    second = fit(predictor, half, train, union(train), seed=9, start=saved)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(second.tensors[name], tensor, rtol=2e-3, atol=2e-5, msg=name)
    bare = fit(predictor, half, train, union(train), seed=9, start=replace(first, optimizer=None))
    assert bare.digest() != second.digest()
    with pytest.raises(ValueError, match="start: is Classifier"):
        fit(TINY, half, train, union(train), seed=0, start=first)
    with pytest.raises(ValueError, match="size: the predictor was trained on 32, the examples have 48"):
        fit(predictor, half, phantoms(8, 48), union(train), seed=0, start=first)


def test_the_best_weights_are_kept_and_patience_ends_the_run(phantoms: MakePhantoms) -> None:
    train, held_out = phantoms(12, 32), phantoms(8, 32, first=1000)
    scores = iter([0.2, 0.7, 0.7, 0.1, 0.9, 0.9])
    settings = replace(SHORT, num_steps=18, patience=2)
    arguments = {"validation": held_out, "seed": 0}
    fitted = fit(TINY, settings, train, union(train), monitor=lambda *_: next(scores), **arguments)  # type: ignore[arg-type]
    assert [entry["step"] for entry in fitted.history] == [3, 6, 9, 12]
    assert (fitted.best_step, fitted.best_score) == (6, 0.7)
    # The weights are those after six steps of the same run.
    kept = iter([1.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    impatient = replace(settings, patience=None)
    other = fit(TINY, impatient, train, union(train), monitor=lambda *_: next(kept), **arguments)  # type: ignore[arg-type]
    assert other.history[-1]["step"] == 18 and other.best_step == 6
    assert other.digest() == fitted.digest()


def test_the_score_without_a_monitor_is_minus_the_loss(phantoms: MakePhantoms) -> None:
    train, held_out = phantoms(12, 32), phantoms(8, 32, first=1000)
    fitted = fit(TINY, SHORT, train, union(train), validation=held_out, seed=0)
    probabilities = fitted.predict(held_out)
    expected = np.log(probabilities[np.arange(8), held_out.labels]).mean()
    assert fitted.best_score == pytest.approx(expected, rel=1e-4)


def test_native_masks_undo_the_letterbox(phantoms: MakePhantoms) -> None:
    train = phantoms(8, 32)
    fitted = fit(Segmenter(width=2), replace(SHORT, num_steps=2), train, union(train), seed=0)
    box = Letterbox(height=40, width=64, size=32)
    seen = replace(train.take([0]), native=(NativeTruth(letterbox=box),))
    probability = fitted.predict(seen)[0]
    threshold = float(np.median(probability[6:26]))
    (mask,) = predict_native(fitted, seen, threshold=threshold)
    assert mask.shape == (40, 64) and set(np.unique(mask)) <= {0, 1}
    expected = box.invert((probability > threshold).astype(np.uint8), is_mask=True)
    assert (mask == expected).mean() > 0.85
    with pytest.raises(ValueError, match="want a segmenter, and examples with native sizes"):
        predict_native(fitted, train)


# ------------------------------------------------------------------------------------------ refusals


def test_a_diverging_run_stops(phantoms: MakePhantoms) -> None:
    train = phantoms(12, 32)
    wild = replace(SHORT, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(
        ValueError, match=r"diverged by step 3: mean loss nan.*lower FitSettings\.learning_rate"
    ):
        fit(TINY, wild, train, union(train), seed=0)


def test_rows_without_masks_are_named_before_training(phantoms: MakePhantoms) -> None:
    train = phantoms(12, 32)
    has_mask = np.ones(12, np.bool_)
    has_mask[[2, 5]] = False
    mixed = replace(train, has_mask=has_mask)
    with pytest.raises(ValueError, match=r"2 of 12 rows have no mask \(phantom 2, phantom 5"):
        fit(Segmenter(width=2), SHORT, mixed, union(train), seed=0)
    with pytest.raises(ValueError, match="validation: 12 of 12 rows have no mask"):
        bare = replace(phantoms(12, 32, first=50), masks=None, has_mask=None)
        fit(Segmenter(width=2), SHORT, train, union(train), validation=bare, seed=0)
    assert len(fit(TINY, replace(SHORT, num_steps=1), mixed, union(train), seed=0).history) == 1


def test_what_cannot_be_trained_on_is_refused(phantoms: MakePhantoms) -> None:
    train = phantoms(12, 32)
    nan = float("nan")
    cases: list[tuple[str, Callable[[], object]]] = [
        (
            "no batch has a row of class malignant",
            lambda: fit(TINY, SHORT, (e := train.take(train.labels == 0)), union(e), seed=0),
        ),
        ("batches: made for 12 rows, there are 5", lambda: fit(TINY, SHORT, train.take(slice(5)), union(train), seed=0)),
        (
            "validation: 1 rows are training rows too, such as phantom 3",
            lambda: fit(TINY, SHORT, train, union(train), validation=train.take([3]), seed=0),
        ),
        (
            "validation.size: 48, the training rows have 32",
            lambda: fit(TINY, SHORT, train, union(train), validation=phantoms(4, 48, first=50), seed=0),
        ),
        (
            "monitor: gave nan on 4 validation rows",
            lambda: fit(
                TINY, SHORT, train, union(train), validation=phantoms(4, 32, first=50), monitor=lambda *_: nan, seed=0
            ),
        ),
        ("patience: 3 needs validation rows", lambda: fit(TINY, replace(SHORT, patience=3), train, union(train), seed=0)),
        (
            "DiceCrossEntropy is no loss of classification",
            lambda: fit(TINY, replace(SHORT, loss=DiceCrossEntropy()), train, union(train), seed=0),
        ),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    fitted = fit(TINY, replace(SHORT, num_steps=1), train, union(train), seed=0)
    with pytest.raises(ValueError, match="channels: the predictor was trained on 1, the examples have 3"):
        fitted.predict(phantoms(2, 32, channels=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps: want at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: want a number > 0"),
        ({"weight_decay": -1.0}, "weight_decay: want a number ≥ 0"),
        ({"schedule": "linear"}, "schedule: want one of cosine, constant"),
        ({"precision": "float16"}, "precision: want one of float32, bfloat16"),
        ({"patience": 0}, "patience ≥ 1"),
    ],
)
def test_bad_settings_are_refused(fields: Mapping[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitSettings(**fields)  # type: ignore[arg-type]


def test_the_learning_rate_rises_and_falls() -> None:
    settings = FitSettings(num_steps=100, learning_rate=2.0, warmup_steps=9)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] > 1.9
    assert rates[99] < 1e-3 and rates[54] == pytest.approx(1.0, abs=0.15)
    constant = replace(settings, schedule="constant")
    assert constant.learning_rate_at(9) == constant.learning_rate_at(99) == 2.0


@pytest.mark.gpu
def test_training_on_a_gpu_agrees_with_the_cpu(phantoms: MakePhantoms) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    train, test = phantoms(32, 48), phantoms(8, 48, first=2000)
    settings = FitSettings(num_steps=20, batch_size=8, warmup_steps=0)
    for predictor in (Classifier(architecture="small_cnn?width=8"), Segmenter(width=8)):
        runs = [fit(predictor, settings, train, union(train), seed=0, device=d) for d in ("cpu", "cuda")]
        assert runs[1].history[0]["loss"] == pytest.approx(runs[0].history[0]["loss"], rel=0.02)
        narrow = fit(
            predictor, replace(settings, precision="bfloat16"), train, union(train), seed=0, device="cuda"
        )
        assert np.isfinite(narrow.predict(test, device="cuda")).all()
