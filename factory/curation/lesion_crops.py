"""Crops of lesions for embedding: what a generated lesion shares with real ones, without the background around it."""

from collections.abc import Callable, Sequence

import numpy as np

from factory import geometry

MARGIN = 0.25
"""Margin on each side of the bounding box, in units of its longer side."""

Embed = Callable[[list[np.ndarray]], np.ndarray]
"""Images uint8 (h, w[, 3]) of any size → unit-norm float32 (N, D)."""


def lesion_crop(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """The square around the mask's bounding box with its margin, moved into the frame; None without a lesion.

    Args:
        image: uint8 (S, S) or (S, S, 3).
        mask: label map (S, S), or None.

    Returns:
        uint8 (c, c[, 3]); c is at most S, so a lesion that fills the frame gives the frame.

    Raises:
        ValueError: the mask has another size than the image.
    """
    if mask is None:
        return None
    if mask.shape != image.shape[:2]:
        raise ValueError(f"lesion_crop: the mask is {mask.shape}, the image {image.shape[:2]}")
    box = geometry.bounding_box(mask)
    if box is None:
        return None
    height, width = mask.shape
    side = min(round(max(box.height, box.width) * (1 + 2 * MARGIN)), height, width)
    rows, columns = box.slices
    top = min(max(0, (rows.start + rows.stop - side) // 2), height - side)
    left = min(max(0, (columns.start + columns.stop - side) // 2), width - side)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def lesion_area(mask: np.ndarray | None) -> float:
    """Area of the lesion as a fraction of the frame; NaN without one."""
    if mask is None or not mask.any():
        return float("nan")
    return geometry.area(mask) / mask.size


def embed_crops(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], embed: Embed, dim: int
) -> np.ndarray:
    """Embeddings of the lesion crops of N images, float32 (N, dim); NaN rows where there is no lesion."""
    out = np.full((len(images), dim), np.nan, np.float32)
    crops = [lesion_crop(image, mask) for image, mask in zip(images, masks, strict=True)]
    places = [place for place, crop in enumerate(crops) if crop is not None]
    if places:
        out[places] = embed([crop for crop in crops if crop is not None])
    return out
