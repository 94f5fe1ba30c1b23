"""From label maps to masks at latent size: the one function that training and inference share."""

import torch
from torch import Tensor


def latent_masks(masks: Tensor, side: int, *, soft: bool = False) -> Tensor:
    """Masks (B, 1, side, side) float32 of label maps uint8 (B, R, R); R is a multiple of `side`.

    A latent cell is inside where any of its pixels is (area average > 0), so that thin lesions survive (Xie et
    al. 2025 do not say how they reduce the mask). `soft` gives the covered share of each cell instead.

    Raises:
        ValueError: R is no multiple of `side`.
    """
    if masks.shape[-1] % side or masks.shape[-2] != masks.shape[-1]:
        raise ValueError(f"masks: want a square side that is a multiple of {side}, got {tuple(masks.shape)}")
    inside = (masks[:, None] > 0).to(torch.float32)
    covered = torch.nn.functional.avg_pool2d(inside, masks.shape[-1] // side)
    return covered if soft else (covered > 0).to(torch.float32)
