"""Masks that are no black and white picture: polygons, coloured regions, or "there is no lesion".

Each is an `Item.make`: it runs when the item is opened, and what is wrong is a `BadItem`, as for files.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from factory.datasets.layout import Item, Pixels, Problem
from factory.datasets.verification import BadItem, verify_item

Polygon = Sequence[tuple[float, float]]


def read_picture(file: Path, source_path: str) -> np.ndarray:
    """uint8 (H, W) where all channels are equal, else (H, W, 3).

    Raises:
        BadItem: it is not there, unreadable, 16-bit or partly transparent.
    """
    return verify_item(Item(source_path=source_path, label_name="", image=file, masks=None)).image


def without_lesion(file: Path, source_path: str) -> Pixels:
    """The image with an empty mask, for images that the dataset says show no lesion."""
    image = read_picture(file, source_path)
    return Pixels(image, np.zeros(image.shape[:2], np.uint8))


def with_polygons(file: Path, source_path: str, polygons: Sequence[Polygon]) -> Pixels:
    """The image, and the union of the filled `polygons`, vertices (x, y) in px; what lies outside is cut off."""
    from skimage.draw import polygon

    image = read_picture(file, source_path)
    mask = np.zeros(image.shape[:2], np.uint8)
    for vertices in polygons:
        x, y = np.asarray(vertices, float).T
        rows, columns = polygon(y, x, mask.shape)
        mask[rows, columns] = 1
    return Pixels(image, mask)


def with_coloured_mask(file: Path, mask_file: Path, source_path: str) -> Pixels:
    """The image, and what is pure red or pure green in a picture of the same size.

    Raises:
        BadItem: another size, or drawn in other colours only.
    """
    image = read_picture(file, source_path)
    path = f"{source_path} (mask {mask_file.name})"
    drawn = read_picture(mask_file, path)
    if drawn.shape[:2] != image.shape[:2]:
        sizes = [f"{shape[1]}×{shape[0]} px" for shape in (drawn.shape, image.shape)]
        raise BadItem(Problem(source_path=path, what=f"mask is {sizes[0]}, the image {sizes[1]}",
                              remedy="save the mask at the size of its image, by nearest neighbour"))  # fmt: skip
    inside = drawn == 255 if drawn.ndim == 2 else (drawn[..., :2] == 255).any(axis=2)
    if drawn.any() and not inside.any():
        raise BadItem(Problem(source_path=path, what="neither pure green nor pure red in the mask",
                              remedy="save it as PNG: green is benign, red malignant, black neither"))  # fmt: skip
    return Pixels(image, inside.astype(np.uint8))
