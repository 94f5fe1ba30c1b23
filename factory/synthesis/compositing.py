"""A generated lesion put into its background, pixel by pixel."""

import numpy as np
from scipy import ndimage

from factory.imaging import as_grey, as_rgb


def composite(image: np.ndarray, background: np.ndarray, mask: np.ndarray, feather_px: float) -> np.ndarray:
    """`image` under the mask, `background` away from it, a linear transition of `feather_px` outside the mask.

    A VAE changes pixels that its latents left alone (Xie et al. 2025 do not mention it), so that a blend in latent
    space alone gives a background that nobody acquired. Here every pixel under the mask is the image's, every
    pixel farther than `feather_px` from it is the background's, exactly.

    Args:
        image: uint8 (S, S) or (S, S, 3).
        background: uint8 (S, S) or (S, S, 3); brought to the channels of `image`.
        mask: label map (S, S); 0 is background.
        feather_px: width of the transition, px; 0 is a hard edge.

    Returns:
        uint8, shape of `image`.

    Raises:
        ValueError: another dtype, sizes that differ, or a negative width.
    """
    if image.dtype != np.uint8 or background.dtype != np.uint8:
        raise ValueError(f"composite: want uint8 images, got {image.dtype} and {background.dtype}")
    if image.shape[:2] != background.shape[:2] or image.shape[:2] != mask.shape:
        raise ValueError(
            f"composite: sizes differ: image {image.shape[:2]}, background {background.shape[:2]}, mask {mask.shape}"
        )
    if not feather_px >= 0:
        raise ValueError(f"composite: want feather_px of 0 or more, got {feather_px}")
    below = as_grey(background) if image.ndim == 2 else as_rgb(background)
    inside = mask > 0
    if not inside.any():
        return below.copy()
    distance = ndimage.distance_transform_edt(~inside)
    share = np.clip(1.0 - distance / (feather_px + 1e-9), 0.0, 1.0)
    if image.ndim == 3:
        share = share[:, :, None]
    mixed = share * image.astype(np.float64) + (1.0 - share) * below.astype(np.float64)
    return np.round(mixed).astype(np.uint8)
