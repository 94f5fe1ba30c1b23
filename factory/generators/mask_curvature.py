"""Level-set curvature of soft masks, differentiable: the torch counterpart of `factory.geometry.curvature`."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from factory.geometry import CURVATURE_BLUR, REFERENCE_RADIUS, STAIRCASE_BLUR

CurvatureOperator = Literal["scale_normalised", "sobel"]
RELATIVE_BLUR = CURVATURE_BLUR / REFERENCE_RADIUS
"""σ of the blur over the equivalent radius √(A/π): .094."""
_EPSILON = 1e-4
"""Added to the squared slope, in units of the slope of a whole edge: contrasts of less than 1 % count as flat."""
_PAPER_EPSILON = 1e-8


def curvature(masks: Tensor, *, operator: CurvatureOperator = "scale_normalised") -> Tensor:
    """Mean absolute level-set curvature along the contours of each mask, with a gradient.

    Args:
        masks: float (B, H, W), 0 … 1, one shape each; outside of the frame is background.
        operator: "scale_normalised" (default): mean |κ|·√(A/π), without unit, 1 for a disc of any size. Derivatives
            are those of the mask blurred by σ = .094·√(A/π) (at least 1.8 px), the mean is weighted by |∇M| where
            it exceeds half of its maximum, and A carries no gradient. "sobel" is the paper's literal statistic:
            unnormalised Sobel of Sobel on the mask as it is, mean over the inner boundary of M > .5; it depends on
            the resolution and grows with the size of the shape; for ablation only.

    Returns:
        Float (B,); 0 for an empty mask. On hard masks as `factory.geometry.curvature`: "sobel" to rounding,
        "scale_normalised" within 5 % (that one resamples the shape instead of scaling the blur).

    Source: Pan et al. 2025, Medical Image Analysis, Eq. 10; deviates: the default is scale-normalised, weighted by
    |∇M| instead of summed over a boundary set (which has no gradient), and ε stands inside of the root, large enough
    that flat pixels neither count nor give NaN gradients.

    Raises:
        ValueError: unknown operator, or another number of axes.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks: want (B, H, W), got {tuple(masks.shape)}")
    if operator == "sobel":
        return _sobel_curvature(masks)
    if operator != "scale_normalised":
        raise ValueError(f"operator: {operator!r} is none of scale_normalised, sobel")
    radius = (masks.detach().sum(dim=(1, 2)) / math.pi).sqrt()
    sigma = (RELATIVE_BLUR * radius).clamp(min=STAIRCASE_BLUR)
    margin = math.ceil(3 * float(sigma.max())) if len(masks) else 0
    padded = functional.pad(masks, (margin,) * 4)
    dx, dy, dxx, dxy, dyy = _blurred_derivatives(padded, sigma)
    squared = dx.square() + dy.square() + _EPSILON
    bending = (dxx * dy.square() - 2 * dxy * dx * dy + dyy * dx.square()).abs()
    slope = squared.sqrt()
    steepest = slope.detach().amax(dim=(1, 2), keepdim=True)
    contour = (slope > 0.5 * steepest) & (squared > 4 * _EPSILON)
    weights = slope * contour
    # |κ| |∇M| = |bending| / |∇M|², all in units of σ and of a whole edge.
    total = (bending / squared * contour).sum(dim=(1, 2))
    return total / weights.sum(dim=(1, 2)).clamp(min=1e-6) * radius / sigma


def _blurred_derivatives(masks: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    """∂x, ∂y, ∂xx, ∂xy, ∂yy of each mask blurred by its own σ, in units of σ and of the slope of a whole edge.

    The convolutions are products with banded matrices: with a blur of its own for every mask this is faster than
    grouped convolutions, and exact over the whole frame.
    """
    height, width = masks.shape[1:]
    gy, gy1, gy2 = _kernels(height, sigma)
    gx, gx1, gx2 = (kernel.transpose(1, 2) for kernel in _kernels(width, sigma))
    blurred_y, first_y, second_y = gy @ masks, gy1 @ masks, gy2 @ masks
    edge = math.sqrt(2 * math.pi)
    fields = (blurred_y @ gx1, first_y @ gx, blurred_y @ gx2, first_y @ gx1, second_y @ gx)
    return tuple(edge * field for field in fields)


def _kernels(length: int, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (B, n, n) that blur, differentiate (times σ) and differentiate twice (times σ²) along an axis.

    Exact on constants, ramps and parabolas.
    """
    offsets = torch.arange(-(length - 1), length, device=sigma.device, dtype=sigma.dtype)
    s = sigma[:, None]
    blur = torch.exp(-0.5 * (offsets / s).square())
    blur = blur / blur.sum(dim=1, keepdim=True)
    first = offsets * blur
    first = first / (offsets * first).sum(dim=1, keepdim=True) * s
    second = (offsets.square() - (offsets.square() * blur).sum(dim=1, keepdim=True)) * blur
    second = second / (offsets.square() * second).sum(dim=1, keepdim=True) * 2 * s.square()
    places = torch.arange(length, device=sigma.device)
    difference = places[None, :] - places[:, None] + length - 1
    return blur[:, difference], first[:, difference], second[:, difference]


def _sobel_curvature(masks: Tensor) -> Tensor:
    padded = functional.pad(masks, (3,) * 4)
    dx, dy = _sobel(padded)
    (dxx, _), (dxy, dyy) = _sobel(dx), _sobel(dy)
    squared = dx.square() + dy.square() + _PAPER_EPSILON
    kappa = (dxx * dy.square() - 2 * dxy * dx * dy + dyy * dx.square()) / squared**1.5
    boundary = inner_boundary(padded > 0.5)
    return (kappa.abs() * boundary).sum(dim=(1, 2)) / boundary.sum(dim=(1, 2)).clamp(min=1)


def _sobel(fields: Tensor) -> tuple[Tensor, Tensor]:
    """Unnormalised Sobel derivatives along x and y of (B, H, W), mirrored at the border."""
    kernel = fields.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    weights = torch.stack([kernel, kernel.T])[:, None]
    framed = functional.pad(fields[:, None], (1, 1, 1, 1), mode="replicate")
    dx, dy = functional.conv2d(framed, weights).unbind(dim=1)
    return dx, dy


def inner_boundary(inside: Tensor) -> Tensor:
    """Inside pixels with a 4-neighbour outside: bool (B, H, W)."""
    framed = functional.pad(inside, (1, 1, 1, 1))
    core = framed[:, :-2, 1:-1] & framed[:, 2:, 1:-1] & framed[:, 1:-1, :-2] & framed[:, 1:-1, 2:]
    return inside & ~core


def sharpened(masks: Tensor, sharpness: float) -> Tensor:
    """sigmoid(k (M - ½)), stretched so that 0, ½ and 1 stay: soft ripples below ½ count as little as they export."""
    low = torch.sigmoid(torch.tensor(-sharpness / 2, dtype=masks.dtype)).item()
    return (torch.sigmoid(sharpness * (masks - 0.5)) - low) / (1 - 2 * low)
