"""Modules of the predictors: input normalisation, a small convolutional classifier. Imports torch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Normalised(nn.Module):
    """(pixels in 0 … 1 − mean) / std, then a network; a grey image is repeated to as many channels as means.

    Args:
        body: the network, float32 (B, len(mean), S, S) → logits.
        mean, std: per channel.
        frozen: parts of the body that neither learn nor leave evaluation mode.
        statistics_of: part of the body whose batch normalisation keeps its statistics and normalises by them in training too.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        frozen: Sequence[nn.Module] = (),
        statistics_of: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self._frozen = tuple(frozen)
        for part in self._frozen:
            part.requires_grad_(False)
        kept = statistics_of.modules() if statistics_of is not None else ()
        self._always_evaluated = (
            *self._frozen,
            *(module for module in kept if isinstance(module, _BatchNorm)),
        )

    def train(self, mode: bool = True) -> "Normalised":
        """Training mode, but for the frozen parts."""
        super().train(mode)
        for part in self._always_evaluated:
            part.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of float32 pixels (B, K, S, S) in 0 … 1."""
        channels = self.mean.shape[1]
        if pixels.shape[1] != channels:
            pixels = pixels.expand(-1, channels, -1, -1)
        return self.body((pixels - self.mean) / self.std)


class SmallCnn(nn.Module):
    """Four 3 × 3 convolutions of stride 2 with batch normalisation, global average, linear head.

    About 0.1 M parameters at width 16: for quick experiments at 32 … 96 px on a CPU.
    """

    def __init__(self, *, in_channels: int, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(4):
            out_channels = width * 2**index
            layers += [
                nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) of (B, K, S, S)."""
        return self.head(self.dropout(self.features(pixels).mean(dim=(2, 3))))


class LinearHead(nn.Module):
    """A feature network and a linear layer on its pooled features."""

    def __init__(self, features: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) of (B, K, S, S)."""
        return self.head(self.features(pixels))


class Resized(nn.Module):
    """Bilinear resizing to (size, size) px, then a network."""

    def __init__(self, body: nn.Module, size: int) -> None:
        super().__init__()
        self.body = body
        self.size = size

    def forward(self, pixels: Tensor) -> Tensor:
        """Whatever `body` gives for the resized pixels."""
        shape = (self.size, self.size)
        if pixels.shape[2:] != shape:
            pixels = nn.functional.interpolate(pixels, shape, mode="bilinear", antialias=True)
        return self.body(pixels)


class LastOutput(nn.Module):
    """The last of the outputs of a network that gives a list."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels: Tensor) -> Tensor:
        """The last output."""
        return self.body(pixels)[-1]


def count_parameters(network: nn.Module) -> int:
    """Learnable and frozen parameters, without buffers."""
    return sum(parameter.numel() for parameter in network.parameters())
