"""Logistic regression on frozen features: each image passes through the network once per process."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

from factory.predictors.augmentation import unit_pixels
from factory.predictors.classifiers import FeatureProbe
from factory.predictors.examples import Examples
from schemas.identity import hash_parts

if TYPE_CHECKING:
    from torch import Tensor

    from factory.predictors.fitted import Fitted
    from factory.predictors.networks import LinearHead

FEATURE_BATCH = 16
"""Images per forward pass, the last filled up, so that an image's features do not depend on its company."""
MEMORY_BYTES = 256 << 20
"""Of features kept in memory."""


class _Memory:
    """Features by (network, image), the least recently used dropped first. Safe for threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._rows: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> np.ndarray | None:
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
            return self._rows.get(key)

    def put(self, key: tuple[str, str], row: np.ndarray) -> None:
        with self._lock:
            if key in self._rows:
                return
            self._rows[key] = row
            self._held += row.nbytes
            while self._held > self._limit:
                self._held -= self._rows.popitem(last=False)[1].nbytes


_MEMORY = _Memory(MEMORY_BYTES)


def probe_features(
    probe: FeatureProbe, examples: Examples, network: "Callable[[], LinearHead]", device: str
) -> np.ndarray:
    """Pooled features, float32 (N, D).

    Args:
        probe: names the network.
        examples: any images of one size.
        network: gives `probe.build(…)` or a fitted probe's network, in evaluation mode on `device`; called only for
            images not seen before.
        device: torch device.
    """
    import torch

    owner = hash_parts(probe.architecture, str(probe.weights_digest), str(probe.input_size), device)
    shape = "x".join(map(str, examples.images.shape[1:]))
    keys = [(owner, hash_parts(shape, image.tobytes())) for image in examples.images]
    known: dict[tuple[str, str], np.ndarray] = {}
    missing: dict[tuple[str, str], int] = {}
    for row, key in enumerate(keys):
        held = _MEMORY.get(key)
        if held is not None:
            known[key] = held
        else:
            missing.setdefault(key, row)
    todo = list(missing.items())
    features = network().features if todo else None
    for first in range(0, len(todo), FEATURE_BATCH):
        part = todo[first : first + FEATURE_BATCH]
        images = np.zeros((FEATURE_BATCH, *examples.images.shape[1:]), np.uint8)
        images[: len(part)] = examples.images[[row for _, row in part]]
        assert features is not None
        with torch.inference_mode():
            found = features(unit_pixels(torch.from_numpy(images).to(device))).float().cpu().numpy()
        for (key, _), values in zip(part, found):
            known[key] = values.copy()
            _MEMORY.put(key, known[key])
    return np.stack([known[key] for key in keys])


def fit_probe(
    probe: FeatureProbe, examples: Examples, row_weights: np.ndarray, device: str
) -> "dict[str, Tensor]":
    """Tensors of the probe's network after logistic regression, the standardisation folded into its head.

    Args:
        probe: what to fit.
        examples: training rows.
        row_weights: expected appearances of each row in a batch, float64 (N,); rows at 0 are left out.
        device: of the features.

    Raises:
        ValueError: a class without rows, or a regression that does not converge.
    """
    import torch

    used = np.flatnonzero(row_weights > 0)
    weights = row_weights[used] * len(used) / row_weights[used].sum()
    network = cast("LinearHead", probe.build(examples.num_classes, examples.channels, examples.size))
    network.eval().to(device)
    features = probe_features(probe, examples.take(used), lambda: network, device).astype(np.float64)
    weight, bias = _logistic_regression(features, examples.labels[used], weights, probe.c)
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(weight))
        network.head.bias.copy_(torch.from_numpy(bias))
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def _logistic_regression(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray, c: float
) -> tuple[np.ndarray, np.ndarray]:
    """(weight (C, D), bias (C,)) of logits, on features as they are."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features, sample_weight=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model = LogisticRegression(C=c, max_iter=5000)
            model.fit(scaler.transform(features), labels, sample_weight=weights)
        except ConvergenceWarning as error:
            raise ValueError(
                f"FeatureProbe.c: {c}: the regression does not converge; take a smaller c"
            ) from error
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # two classes: scikit-learn gives the second one's log odds
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    weight = weight / scaler.scale_
    return weight, bias - weight @ scaler.mean_


def probe_probabilities(fitted: "Fitted", examples: Examples, device: str) -> np.ndarray:
    """Class probabilities of a fitted probe, float32 (N, C)."""
    probe = cast(FeatureProbe, fitted.predictor)
    features = probe_features(probe, examples, lambda: cast("LinearHead", fitted.network(device)), device)
    logits = features @ fitted.tensors["head.weight"].numpy().T + fitted.tensors["head.bias"].numpy()
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
