"""Burned-in marks: calipers, text, Doppler colour. A heuristic, made to be counted and shown, not trusted.

Marks can tell a classifier the label (who measures a lesion has found one), so their share per class is part
of a dataset's summary.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from factory.imaging import as_grey

_SATURATION = 48
_MIN_COLOUR_SHARE = 3e-4
_MIN_STROKE_CONTRAST = 110
_MIN_STROKE_LEVEL = 170
_MIN_CROSS_CONTRAST = 25
_MIN_CROSS_LEVEL = 100
_STROKE = 5
"""px: wider than the strokes of text and calipers in images of 200 to 1000 px."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What was found.

    Attributes:
        colour: share of clearly coloured pixels in an image that is otherwise grey.
        num_strokes: thin, bright, isolated components that look like characters.
        num_crosses: upright crosses, as calipers draw them.
    """

    colour: float
    num_strokes: int
    num_crosses: int

    @property
    def any(self) -> bool:
        """Colour overlay, a character or a caliper."""
        return self.colour >= _MIN_COLOUR_SHARE or self.num_strokes + self.num_crosses > 0


def find_marks(image: np.ndarray) -> Marks:
    """Marks of an image, uint8 (H, W) or (H, W, 3).

    An image most of which is coloured (a photograph) has no colour *overlay*.
    """
    colour = 0.0
    if image.ndim == 3:
        spread = image.max(axis=2).astype(np.int16) - image.min(axis=2)
        colour = float((spread > _SATURATION).mean())
        if np.median(spread) > 12:
            colour = 0.0
    grey = as_grey(image)
    return Marks(colour=colour, num_strokes=_count_strokes(grey), num_crosses=_count_crosses(grey))


def _count_strokes(grey: np.ndarray) -> int:
    """Components of a white top-hat that are thin and lie on a flat ground: speckle is neither."""
    opened = ndimage.grey_opening(grey, size=(_STROKE, _STROKE))
    strokes = (grey.astype(np.int16) - opened > _MIN_STROKE_CONTRAST) & (grey >= _MIN_STROKE_LEVEL)
    labels, count = ndimage.label(strokes, structure=np.ones((3, 3)))
    if not count:
        return 0
    found = 0
    for index, place in enumerate(ndimage.find_objects(labels), start=1):
        height, width = (s.stop - s.start for s in place)
        if not (3 <= max(height, width) <= 40 and min(height, width) >= 2):
            continue
        inside = labels[place] == index
        rows = slice(max(0, place[0].start - 3), place[0].stop + 3)
        columns = slice(max(0, place[1].start - 3), place[1].stop + 3)
        near = ndimage.binary_dilation(labels[rows, columns] > 0, iterations=2)
        ground = grey[rows, columns][~near]
        if inside.sum() >= 5 and ground.size and ground.std() < 9 and ground.max() < 110:
            found += 1
    return found


def _count_crosses(grey: np.ndarray) -> int:
    """Places where four arms of 3 px are all brighter than everything in the four corners between them."""
    padded = np.pad(grey.astype(np.int16), 4, mode="edge")
    height, width = grey.shape

    def at(y: int, x: int) -> np.ndarray:
        return padded[4 + y : 4 + y + height, 4 + x : 4 + x + width]

    arms = [at(dy * r, dx * r) for r in (1, 2, 3) for dy, dx in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    corners = [
        at(sy * a, sx * b) for a, b in ((2, 2), (2, 3), (3, 2), (3, 3)) for sy in (1, -1) for sx in (1, -1)
    ]
    lowest, highest = np.minimum.reduce(arms), np.maximum.reduce(corners)
    crosses = (lowest - highest > _MIN_CROSS_CONTRAST) & (lowest > _MIN_CROSS_LEVEL)
    return int(ndimage.label(crosses, structure=np.ones((3, 3)))[1])
