"""Frozen features and logistic regression, against scikit-learn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from factory.evaluation.task_metrics import binary_auc
from factory.predictors.batches import ComposedBatches, UnionBatches
from factory.predictors.classifiers import FeatureProbe
from factory.predictors.examples import Examples
from factory.predictors.fitted import predict_network
from factory.predictors.fitting import FitSettings, fit, load_fitted
from factory.predictors.probe import _logistic_regression, probe_features

MakePhantoms = Callable[..., Examples]


@pytest.fixture(scope="module")
def probe(random_weights: Callable[..., Path]) -> FeatureProbe:
    path = random_weights("test_resnet")
    return FeatureProbe(architecture="test_resnet", weights=str(path), c=0.1, input_size=64)


def features_of(probe: FeatureProbe, examples: Examples) -> np.ndarray:
    return probe_features(probe, examples, lambda: probe.build(2, 1, examples.size).eval(), "cpu")  # type: ignore[arg-type,return-value]


def sklearn_model() -> object:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))


def test_the_probe_is_sklearns_pipeline(probe: FeatureProbe, phantoms: MakePhantoms) -> None:
    train, test = phantoms(40, 48), phantoms(20, 48, first=100)
    fitted = fit(probe, FitSettings(), train, UnionBatches(train.labels, 2, 16, 0), seed=0)
    model = sklearn_model()
    model.fit(features_of(probe, train).astype(np.float64), train.labels)  # type: ignore[attr-defined]
    expected = model.predict_proba(features_of(probe, test).astype(np.float64))  # type: ignore[attr-defined]
    probabilities = fitted.predict(test)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert probabilities.std() > 0.02  # not the prior for all
    # The saved network says the same, without the memory of features.
    whole = predict_network(fitted.network(), test, "classification", 64, "cpu")
    np.testing.assert_allclose(whole, probabilities, atol=1e-5)


def test_three_classes_and_weights_are_sklearns() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)) * [1, 10, 0.1, 1, 1] + 3, np.arange(60) % 3
    features[:, 0] += labels
    weights = rng.uniform(0.5, 2, 60)
    for count in (2, 3):
        rows = labels < count
        weight, bias = _logistic_regression(features[rows], labels[rows], weights[rows], 0.5)
        scaler = StandardScaler().fit(features[rows], sample_weight=weights[rows])
        model = LogisticRegression(C=0.5, max_iter=5000)
        model.fit(scaler.transform(features[rows]), labels[rows], sample_weight=weights[rows])
        logits = features @ weight.T + bias
        found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found, model.predict_proba(scaler.transform(features)), atol=1e-6)


def test_rows_count_as_often_as_batches_show_them(probe: FeatureProbe, phantoms: MakePhantoms) -> None:
    rows = phantoms(24, 48)
    is_real = np.arange(24) < 16
    batches = ComposedBatches(rows.labels, is_real, 2, 16, (8, 0), 0)
    synthetic = np.flatnonzero(~is_real & (rows.labels == 0))
    used = np.flatnonzero(is_real | np.isin(np.arange(24), synthetic))
    weights = np.where(is_real[used], 1.0, 8 / len(synthetic)) * len(used) / 24
    weight, bias = _logistic_regression(
        features_of(probe, rows.take(used)).astype(np.float64), rows.labels[used], weights, probe.c
    )
    fitted = fit(probe, FitSettings(), rows, batches, seed=0)
    np.testing.assert_allclose(fitted.tensors["head.weight"].numpy(), weight, atol=1e-5)
    np.testing.assert_allclose(fitted.tensors["head.bias"].numpy(), bias, rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_their_company(probe: FeatureProbe, phantoms: MakePhantoms) -> None:
    rows = phantoms(40, 32, first=500)
    some = features_of(probe, rows.take([37, 2, 2, 19]))
    network = probe.build(2, 1, 32).eval()
    whole = features_of(probe, rows)
    np.testing.assert_array_equal(some, whole[[37, 2, 2, 19]])
    with torch.inference_mode():
        alone = network.features(torch.from_numpy(rows.images[5:6]).permute(0, 3, 1, 2).float() / 255)  # type: ignore[operator]
    np.testing.assert_allclose(whole[5], alone[0].numpy(), rtol=1e-4, atol=1e-5)


def test_a_saved_probe_needs_no_weights_file(
    probe: FeatureProbe, phantoms: MakePhantoms, tmp_path: Path
) -> None:
    train, test = phantoms(20, 32), phantoms(10, 32, first=700)
    fitted = fit(
        probe,
        FitSettings(),
        train,
        UnionBatches(train.labels, 2, 8, 0),
        validation=phantoms(12, 32, first=900),
        monitor=lambda examples, scores: float((scores.argmax(1) == examples.labels).mean()),
        seed=0,
    )
    loaded = load_fitted(fitted.save(tmp_path / "probe"))
    assert isinstance(loaded.predictor, FeatureProbe) and loaded.predictor.weights is None
    np.testing.assert_array_equal(loaded.predict(test), fitted.predict(test))
    assert loaded.history == [{"step": 0, "score": loaded.best_score}]
    with pytest.raises(ValueError, match="start: a FeatureProbe is fitted in one go"):
        fit(probe, FitSettings(), train, UnionBatches(train.labels, 2, 8, 0), seed=0, start=fitted)
    with pytest.raises(ValueError, match="FeatureProbe.weights: give the file with digest"):
        fit(loaded.predictor, FitSettings(), train, UnionBatches(train.labels, 2, 8, 0), seed=0)


def test_bad_fields_are_refused(probe: FeatureProbe) -> None:
    with pytest.raises(ValueError, match="frozen features need weights"):
        FeatureProbe(architecture="test_resnet")
    with pytest.raises(ValueError, match="c: want a number > 0, got 0"):
        FeatureProbe(architecture="test_resnet", weights=probe.weights, c=0)
    with pytest.raises(ValueError, match="want a timm name, got 'small_cnn'"):
        FeatureProbe(architecture="small_cnn", weights=probe.weights)


def test_real_weights_know_benign_from_malignant_phantoms(
    mobilenet_weights: Path, phantoms: MakePhantoms
) -> None:
    predictor = FeatureProbe(
        architecture="mobilenetv2_100?pad_type=same&mean=0.5&std=0.5", weights=str(mobilenet_weights), c=0.01
    )
    train, test = phantoms(48, 64), phantoms(40, 64, first=2000)
    fitted = fit(predictor, FitSettings(), train, UnionBatches(train.labels, 2, 16, 0), seed=0)
    assert binary_auc(test.labels, fitted.predict(test)[:, 1]) > 0.75
