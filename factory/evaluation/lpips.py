"""Learned perceptual distance of two images (Zhang et al. 2018, LPIPS v0.1), from local weights.

    d(x, y) = Σ_l 1/(H_l W_l) Σ_hw Σ_c w_lc (x̂_lhwc − ŷ_lhwc)²

x̂ are the activations of five layers of VGG16 or AlexNet after their ReLU, scaled to unit length over channels; w are
the published non-negative weights (`lin0 … lin4`). Neither set of weights is part of the factory: torchvision's
`vgg16` or `alexnet`, and `vgg.pth` or `alex.pth` of the lpips project (torchmetrics carries the latter in
`torchmetrics/functional/image/lpips_models`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.evaluation.features import load_weights
from factory.imaging import as_rgb

if TYPE_CHECKING:
    from torch import Tensor

ENDS = {"vgg16": (4, 9, 16, 23, 30), "alexnet": (2, 5, 8, 10, 12)}
"""Number of layers of torchvision's `features` up to each of the five activations."""
CHANNELS = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pixels in −1 … 1; the published network's own normalisation."""
LEAST_SIDE = {"vgg16": 16, "alexnet": 63}
"""px; smaller images have no pixel left in the last activation."""


@dataclass(frozen=True, kw_only=True)
class Lpips:
    """Where the weights lie.

    Attributes:
        backbone: torchvision's `vgg16` or `alexnet`, .safetensors or .pth; which of them is seen from the file.
        linear: the lpips weights that belong to it.
    """

    backbone: str
    linear: str

    def load(self, device: str = "cpu") -> "LoadedLpips":
        """The network in memory.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another network, or two that do not belong together.
        """
        import torch
        from torchvision import models

        state = load_weights(self.backbone)
        first = tuple(state["features.0.weight"].shape) if "features.0.weight" in state else ()
        name = {(64, 3, 3, 3): "vgg16", (64, 3, 11, 11): "alexnet"}.get(first)
        if name is None:
            raise ValueError(f"LPIPS backbone {self.backbone}: want torchvision's vgg16 or alexnet")
        network = getattr(models, name)(weights=None).features
        kept = {key.removeprefix("features."): v for key, v in state.items() if key.startswith("features.")}
        try:
            network.load_state_dict(kept)
        except RuntimeError as error:
            raise ValueError(f"LPIPS backbone {self.backbone}: not torchvision's {name} ({error})") from error
        found = load_weights(self.linear)
        weights = []
        for layer, channels in enumerate(CHANNELS[name]):
            value = found.get(f"lin{layer}.model.1.weight")
            if value is None or tuple(value.shape) != (1, channels, 1, 1):
                raise ValueError(
                    f"LPIPS weights {self.linear}: lin{layer}.model.1.weight is not (1, {channels}, 1, 1), as {name} "
                    "needs; give the file of the same network"
                )
            weights.append(value.to(device, torch.float32))
        return LoadedLpips(name, network.eval().to(device), weights, device)


class LoadedLpips:
    """Distances of images. `name` is "vgg16" or "alexnet"."""

    def __init__(self, name: str, network: Any, weights: list["Tensor"], device: str) -> None:
        self.name = name
        self._network, self._weights, self._device = network, weights, device

    def activations(self, image: np.ndarray) -> list["Tensor"]:
        """Scaled activations of each layer, float32 (1, C, h, w), times √w / √(h w): distances are plain then.

        Args:
            image: uint8 (H, W) or (H, W, 3).

        Raises:
            ValueError: the image is too small for the network.
        """
        import torch

        if min(image.shape[:2]) < LEAST_SIDE[self.name]:
            raise ValueError(
                f"image: {image.shape[:2]} px is too small for {self.name} ({LEAST_SIDE[self.name]} px)"
            )
        with torch.inference_mode():
            pixels = (
                torch.from_numpy(as_rgb(image).astype(np.float32)).permute(2, 0, 1)[None].to(self._device)
            )
            shift, scale = (torch.tensor(v, device=self._device)[None, :, None, None] for v in (SHIFT, SCALE))
            x = (pixels / 127.5 - 1 - shift) / scale
            found, start = [], 0
            for end, weight in zip(ENDS[self.name], self._weights, strict=True):
                x = self._network[start:end](x)
                unit = x / torch.sqrt(1e-8 + (x**2).sum(dim=1, keepdim=True))
                found.append(unit * torch.sqrt(weight / (unit.shape[2] * unit.shape[3])))
                start = end
        return found

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """LPIPS of two images of one shape, uint8 (H, W) or (H, W, 3)."""
        if one.shape[:2] != two.shape[:2]:
            raise ValueError(f"images: want one shape, got {one.shape} and {two.shape}")
        return _distance(self.activations(one), self.activations(two))

    def matrix(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Distance of every pair, float64 (N, N)."""
        activations = [self.activations(image) for image in images]
        out = np.zeros((len(images), len(images)))
        for row in range(len(images)):
            for column in range(row):
                out[row, column] = out[column, row] = _distance(activations[row], activations[column])
        return out


def _distance(one: list["Tensor"], two: list["Tensor"]) -> float:
    return float(sum(float(((a - b) ** 2).sum()) for a, b in zip(one, two, strict=True)))
