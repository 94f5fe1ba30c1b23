"""Image classifiers: any timm network, a small one of ours, and frozen features with logistic regression.

    Classifier(architecture="resnet50")
    Classifier(architecture="mobilenetv2_100?pad_type=same&mean=0.5&std=0.5", weights="file.safetensors")
    Classifier(architecture="small_cnn?width=16")
    FeatureProbe(architecture="mobilenetv2_100?pad_type=same&mean=0.5&std=0.5", weights="file.safetensors", c=0.1)

Importing this file imports neither torch nor timm.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from factory.predictors.backbones import (
    Architecture,
    check_present,
    check_weights,
    classification_network,
    keeps_statistics,
)
from schemas.identity import execution_field

if TYPE_CHECKING:
    from torch import nn

SMALL_CNN = "small_cnn"
CLASSIFIERS = (
    "resnet50",
    "densenet121",
    "efficientnet_b0",
    "mobilenetv2_100",
    "vgg16",
    "vit_small_patch16_224",
    SMALL_CNN,
)
"""Architectures that the tests build; any other name of timm does as well."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A network whose every part learns, or only its head.

    Attributes:
        architecture: `name[?option=value&…]`: a timm name, or "small_cnn" (option `width`).
        weights: local safetensors file in timm's layout to start from; random without. Where it lies does not enter
            the identity.
        frozen: only the head learns.
        frozen_statistics: batch normalisation keeps the statistics of the weights: for small batches, and for weights
            whose normalisation was folded into the convolutions. By default just for the latter.
        dropout: before the head.
        weights_digest: of the bytes of `weights`; found from the file.
    """

    architecture: str = "mobilenetv2_100"
    weights: str | None = execution_field(None)
    frozen: bool = False
    frozen_statistics: bool | None = None
    dropout: float = 0.0
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        Architecture.parse(self.architecture, "Classifier.architecture")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Classifier.dropout: want 0 ≤ p < 1, got {self.dropout}")
        digest = check_weights(self.weights, self.weights_digest, "Classifier")
        object.__setattr__(self, "weights_digest", digest)
        object.__setattr__(self, "frozen_statistics", keeps_statistics(self.weights, self.frozen_statistics))
        if self.frozen and digest is None:
            raise ValueError("Classifier.frozen: a frozen network needs weights")
        if self.frozen and self.dropout:
            raise ValueError(f"Classifier.dropout: {self.dropout} has no effect on a frozen network; use 0")

    @property
    def task(self) -> Literal["classification"]:
        """What the outputs mean: one logit per class."""
        return "classification"

    def build(self, num_classes: int, channels: int, size: int) -> "nn.Module":
        """The network with its starting weights: float32 pixels (B, K, S, S) in 0 … 1 → logits (B, C).

        Random numbers come from torch's global state.

        Raises:
            ValueError: the network cannot be built at this size, or the weights do not fit.
        """
        check_present(self.weights, self.weights_digest, "Classifier")
        return self._network(num_classes, channels, size, self.weights)

    def skeleton(self, num_classes: int, channels: int, size: int) -> "nn.Module":
        """The same network before any weights are loaded: for putting trained tensors into."""
        return self._network(num_classes, channels, size, None)

    def _network(self, num_classes: int, channels: int, size: int, weights: str | None) -> "nn.Module":
        from factory.predictors.networks import Normalised, SmallCnn

        architecture = Architecture.parse(self.architecture, "Classifier.architecture")
        if architecture.name == SMALL_CNN:
            width = _width_of(architecture, weights)
            body: nn.Module = SmallCnn(
                in_channels=channels, num_classes=num_classes, width=width, dropout=self.dropout
            )
            mean = 0.5 if architecture.mean is None else architecture.mean
            std = 0.25 if architecture.std is None else architecture.std
            kept = body if self.frozen_statistics else None
            return Normalised(body, [mean] * channels, [std] * channels, statistics_of=kept)
        body = classification_network(
            architecture, weights, num_classes=num_classes, size=size, dropout=self.dropout
        )
        frozen: list[nn.Module] = []
        if self.frozen:
            head = {id(module) for module in body.get_classifier().modules()}  # type: ignore[operator]
            leaves = (module for module in body.modules() if not list(module.children()))
            body.requires_grad_(False)
            body.get_classifier().requires_grad_(True)  # type: ignore[operator]
            frozen = [module for module in leaves if id(module) not in head]
        kept = body if self.frozen_statistics else None
        return Normalised(body, *architecture.normalisation(), frozen=frozen, statistics_of=kept)


@dataclass(frozen=True, kw_only=True)
class FeatureProbe:
    """Frozen pooled features, standardised, then L2-regularised logistic regression (scikit-learn); no steps.

    Attributes:
        architecture: as of `Classifier`, a timm name.
        weights: local safetensors file in timm's layout; needed.
        c: inverse strength of the regularisation.
        input_size: side in px to which images are resized (bilinear) before the network; None takes them as they are.
        weights_digest: of the bytes of `weights`; found from the file.
    """

    architecture: str = "mobilenetv2_100"
    weights: str | None = execution_field(None)
    c: float = 1.0
    input_size: int | None = None
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        if Architecture.parse(self.architecture, "FeatureProbe.architecture").name == SMALL_CNN:
            raise ValueError(f"FeatureProbe.architecture: want a timm name, got {self.architecture!r}")
        if not (np.isfinite(self.c) and self.c > 0):
            raise ValueError(f"FeatureProbe.c: want a number > 0, got {self.c}")
        if self.input_size is not None and self.input_size < 16:
            raise ValueError(f"FeatureProbe.input_size: want at least 16 px, got {self.input_size}")
        digest = check_weights(self.weights, self.weights_digest, "FeatureProbe")
        if digest is None:
            raise ValueError("FeatureProbe.weights: frozen features need weights")
        object.__setattr__(self, "weights_digest", digest)

    @property
    def task(self) -> Literal["classification"]:
        """What the outputs mean: one logit per class."""
        return "classification"

    def build(self, num_classes: int, channels: int, size: int) -> "nn.Module":
        """Features with the declared weights and a zero head: pixels (B, K, S, S) in 0 … 1 → logits (B, C)."""
        check_present(self.weights, self.weights_digest, "FeatureProbe")
        return self._network(num_classes, size, self.weights)

    def skeleton(self, num_classes: int, channels: int, size: int) -> "nn.Module":
        """The same network before any weights are loaded."""
        return self._network(num_classes, size, None)

    def _network(self, num_classes: int, size: int, weights: str | None) -> "nn.Module":
        from torch import nn

        from factory.predictors.networks import LinearHead, Normalised, Resized

        architecture = Architecture.parse(self.architecture, "FeatureProbe.architecture")
        features = classification_network(
            architecture, weights, num_classes=0, size=self.input_size or size, dropout=0.0
        )
        num_features = int(getattr(features, "head_hidden_size", features.num_features))  # type: ignore[arg-type]
        normalised: nn.Module = Normalised(features, *architecture.normalisation(), frozen=[features])
        if self.input_size is not None:
            normalised = Resized(normalised, self.input_size)
        network = LinearHead(normalised, num_features, num_classes)
        nn.init.zeros_(network.head.weight)
        nn.init.zeros_(network.head.bias)
        return network


def _width_of(architecture: Architecture, weights: str | None) -> int:
    options = dict(architecture.options)
    width = options.pop("width", 16)
    if options or not isinstance(width, int) or not 1 <= width <= 256:
        raise ValueError(
            f"architecture {SMALL_CNN}: want small_cnn?width=1 … 256, got {architecture.options}"
        )
    if weights is not None:
        raise ValueError(f"architecture {SMALL_CNN}: there are no published weights for it; got {weights}")
    return width
