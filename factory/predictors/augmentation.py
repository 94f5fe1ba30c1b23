"""Ordinary augmentation of a batch, all rows at once: image and mask move together.

Row i of a batch gets parameters that are a function of (identity, i) only, so that a step can be repeated exactly and
a longer batch leaves the rows before unchanged.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from schemas.identity import random_generator, torch_seed

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["none", "standard", "strong"]
NUM_DRAWS = 65
"""Uniform numbers per row: the first 15 have each their use, the last 2 · KNOTS² bend the grid."""
KNOTS = 5
"""Control points along each side of the elastic field."""


@dataclass(frozen=True, kw_only=True)
class _Strength:
    """Half-widths of uniform ranges. Lengths are shares of the side, angles degrees, intensities of 0 … 1.

    Scale, gain, gamma are factors e^±x. `noise` is the largest standard deviation, `blur` the largest weight of a
    5 × 5 binomial blur, `bend` the largest displacement of a control point; each is off for half of the images.
    """

    rotation: float
    scale: float
    shift: float
    brightness: float
    contrast: float
    shear: float = 0.0
    gamma: float = 0.0
    tint: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    bend: float = 0.0


_STRENGTHS = {
    "standard": _Strength(rotation=10, scale=0.1, shift=0.05, brightness=0.1, contrast=0.1),
    # The transforms of nnU-Net's default pipeline (Isensee et al. 2021, supplement) without low-resolution
    # simulation, as one affine resampling, and an elastic field.
    "strong": _Strength(
        rotation=25, scale=0.25, shift=0.1, brightness=0.15, contrast=0.3, shear=0.1, gamma=0.35, tint=0.08,
        noise=0.05, blur=1.0, bend=0.03,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images; never to validation or test images.

    Attributes:
        kind: "none"; "standard" mirrors left to right, rotates ≤ 10°, scales ≤ 10 %, shifts ≤ 5 %, changes brightness
            and contrast ≤ 10 %; "strong" goes two to three times as far and adds shear, elastic bending, gamma, tint of
            colour images, noise and blur. Nothing turns an image upside down: in ultrasound depth has a direction.
    """

    kind: Kind = "standard"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"augmentation: want one of {', '.join(get_args(Kind))}, got {self.kind!r}")

    def apply(
        self, images: "Tensor", masks: "Tensor | None", identity: str
    ) -> tuple["Tensor", "Tensor | None"]:
        """An augmented batch on the device of `images`.

        Args:
            images: uint8 (B, S, S, K).
            masks: uint8 (B, S, S) label maps, or None.
            identity: names the draws, such as "fit/3/step 17".

        Returns:
            float32 (B, K, S, S) in 0 … 1 (channels last in memory) and float32 (B, S, S) of 0 and 1, or None. What
            moves in from outside is 0, as letterboxing pads.
        """
        import torch

        pixels = unit_pixels(images)
        target = None if masks is None else (masks > 0).float()
        if self.kind == "none":
            return pixels, target
        strength = _STRENGTHS[self.kind]
        draws = random_generator(identity, "augmentation").random((len(images), NUM_DRAWS))
        grid = _grid(strength, draws, images.shape[1]).to(images.device)
        pixels = torch.nn.functional.grid_sample(pixels, grid, mode="bilinear", align_corners=False)
        if target is not None:
            moved = torch.nn.functional.grid_sample(
                target[:, None], grid, mode="nearest", align_corners=False
            )
            target = moved[:, 0]
        pixels = _intensities(strength, draws, pixels, torch_seed(identity, "noise"))
        return pixels.contiguous(memory_format=torch.channels_last), target


def unit_pixels(images: "Tensor") -> "Tensor":
    """uint8 (B, S, S, K) → float32 (B, K, S, S) in 0 … 1, channels last in memory."""
    import torch

    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last) / 255


def _centred(draws: np.ndarray) -> np.ndarray:
    return 2 * draws - 1


def _sometimes(draws: np.ndarray) -> np.ndarray:
    """0 for half of the draws, uniform in 0 … 1 for the others."""
    return np.maximum(_centred(draws), 0)


def _grid(strength: _Strength, draws: np.ndarray, size: int) -> "Tensor":
    """Where each output pixel is read from, float32 (B, S, S, 2) of (x, y) in −1 … 1: the inverse of the motion."""
    import torch
    from torch.nn.functional import affine_grid, interpolate

    mirror = np.where(draws[:, 0] < 0.5, -1.0, 1.0)
    angle = np.deg2rad(strength.rotation) * _centred(draws[:, 1])
    zoom = np.exp(strength.scale * _centred(draws[:, 2]))
    shear = strength.shear * _centred(draws[:, 3])
    theta = np.empty((len(draws), 2, 3))
    theta[:, 0, 0], theta[:, 0, 1] = mirror * np.cos(angle), shear - np.sin(angle)
    theta[:, 1, 0], theta[:, 1, 1] = mirror * np.sin(angle), np.cos(angle)
    theta[:, :, :2] *= zoom[:, None, None]
    theta[:, :, 2] = 2 * strength.shift * _centred(draws[:, 4:6])
    grid = affine_grid(torch.from_numpy(theta).float(), [len(draws), 1, size, size], align_corners=False)
    if strength.bend:
        knots = _centred(draws[:, -2 * KNOTS**2 :]) * (2 * strength.bend * _sometimes(draws[:, 6]))[:, None]
        field = torch.from_numpy(knots).float().reshape(-1, 2, KNOTS, KNOTS)
        smooth = interpolate(field, size=(size, size), mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    return grid


def _intensities(strength: _Strength, draws: np.ndarray, pixels: "Tensor", noise_seed: int) -> "Tensor":
    """Blur, contrast about the image's own mean, brightness, gamma, tint, noise; float32 (B, K, S, S) in 0 … 1."""
    import torch

    def per_row(values: np.ndarray) -> "Tensor":
        return torch.from_numpy(values).float().to(pixels.device).reshape(len(pixels), -1, 1, 1)

    if strength.blur:
        weight = per_row(strength.blur * _sometimes(draws[:, 7]))
        pixels = pixels + weight * (_blurred(pixels) - pixels)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    gain = per_row(np.exp(strength.contrast * _centred(draws[:, 8])))
    pixels = (pixels - mean) * gain + mean + per_row(strength.brightness * _centred(draws[:, 9]))
    if strength.tint and pixels.shape[1] == 3:
        pixels = pixels * per_row(np.exp(strength.tint * _centred(draws[:, 10:13])))
    pixels = pixels.clamp(0, 1)
    if strength.gamma:
        pixels = pixels ** per_row(np.exp(strength.gamma * _centred(draws[:, 13])))
    if strength.noise:
        rng = torch.Generator().manual_seed(noise_seed)
        noise = torch.randn(pixels.shape, generator=rng).to(pixels.device)
        pixels = (pixels + per_row(strength.noise * _sometimes(draws[:, 14])) * noise).clamp(0, 1)
    return pixels


def _blurred(pixels: "Tensor") -> "Tensor":
    import torch
    from torch.nn.functional import conv2d, pad

    channels = pixels.shape[1]
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=pixels.device) / 16
    row = weights.reshape(1, 1, 1, 5).expand(channels, 1, 1, 5)
    padded = pad(pixels, (2, 2, 2, 2), mode="replicate")
    return conv2d(conv2d(padded, row, groups=channels), row.transpose(2, 3), groups=channels)
