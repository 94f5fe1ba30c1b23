"""What can be said of an image and its lesion from statistics alone: colours, size, shape, border, texture.

The words are those that DermPrompt asks a vision-language model for (Shentu et al. 2025, §2.2): shape, size, colour
and position of the lesion, skin colour, hair and other marks. Rules of thumb, not findings of a clinician.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from factory import geometry
from factory.imaging import TrainingRow, as_grey

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "black": (12.0, 0.0, 0.0),
    "dark brown": (28.0, 12.0, 13.0),
    "brown": (40.0, 14.0, 20.0),
    "light brown": (53.0, 14.0, 24.0),
    "tan": (68.0, 11.0, 24.0),
    "red": (46.0, 42.0, 24.0),
    "pink": (70.0, 24.0, 10.0),
    "blue-grey": (45.0, -3.0, -12.0),
    "grey": (55.0, 0.0, 0.0),
    "white": (92.0, 0.0, 3.0),
    "yellow": (80.0, 4.0, 50.0),
}
"""CIE Lab of plain colour words (D65)."""
SKIN_ANGLES = ((55.0, "very light"), (41.0, "light"), (28.0, "intermediate"), (10.0, "tan"), (-30.0, "brown"))
"""Least individual typology angle, degrees, of each skin colour; dark below (Chardon et al. 1991)."""
SIZES = ((0.02, "very small"), (0.08, "small"), (0.25, "medium-sized"), (0.5, "large"))
"""Area over frame below which each word holds; "very large" above."""
POSITIONS = (
    ("upper left", "upper centre", "upper right"),
    ("left", "centre", "right"),
    ("lower left", "lower centre", "lower right"),
)
GEOMETRY = ("mask.area", "mask.x", "mask.y")
"""Attributes with numbers: area, and centroid from the left and top, as fractions of the frame."""


def geometry_of(mask: np.ndarray | None) -> dict[str, str]:
    """`GEOMETRY` of a label map, four decimals; empty without a lesion."""
    measured = None if mask is None else geometry.moments(mask)
    if measured is None or mask is None:
        return {}
    values = (
        measured.area / mask.size,
        (measured.x + 0.5) / mask.shape[1],
        (measured.y + 0.5) / mask.shape[0],
    )
    return {name: f"{value:.4f}" for name, value in zip(GEOMETRY, values, strict=True)}


def describe_row(row: TrainingRow) -> dict[str, str]:
    """Attributes of a row in words, and `GEOMETRY`.

    "diagnosis" is the class. With a lesion also size, shape, colour, border, texture and position; on colour images
    skin and, where seen, hair and marks; on grey ones "brightness" against the surroundings in the place of colour.
    """
    found = {"diagnosis": row.label_name.replace("_", " ")}
    colour = row.image.ndim == 3 and bool((np.ptp(row.image, axis=2) > 8).mean() > 0.05)
    mask = None if row.mask is None or not row.mask.any() else row.mask > 0
    content = _content(row.image)
    surroundings = content if mask is None else content & ~ndimage.binary_dilation(mask, iterations=3)
    if not surroundings.any():
        surroundings = content
    if mask is not None:
        lesion = geometry.largest_component(mask)
        found |= _shape_words(mask, lesion)
        found |= _light_words(row.image, mask, surroundings, colour)
        found |= geometry_of(row.mask)
    if colour:
        found |= _skin_words(row.image, surroundings)
    return found


def _content(image: np.ndarray) -> np.ndarray:
    """Pixels that are not black padding: bool (H, W); all of them where the image is black throughout."""
    grey = as_grey(image)
    lit = grey > 4
    rows, columns = lit.any(axis=1), lit.any(axis=0)
    inside = np.zeros(grey.shape, bool)
    if rows.any():
        top, bottom = np.flatnonzero(rows)[[0, -1]]
        left, right = np.flatnonzero(columns)[[0, -1]]
        inside[top : bottom + 1, left : right + 1] = True
    return inside if inside.any() else np.ones(grey.shape, bool)


def _shape_words(mask: np.ndarray, lesion: np.ndarray) -> dict[str, str]:
    measured = geometry.moments(lesion)
    assert measured is not None
    share = mask.mean()
    size = next((word for limit, word in SIZES if share < limit), "very large")
    elongation = _elongation(measured)
    if geometry.solidity(lesion) < 0.88:
        shape = "irregular"
    else:
        shape = "round" if elongation < 1.2 else "oval" if elongation < 1.8 else "elongated"
    row = min(2, int(3 * (measured.y + 0.5) / mask.shape[0]))
    column = min(2, int(3 * (measured.x + 0.5) / mask.shape[1]))
    return {"size": size, "shape": shape, "position": POSITIONS[row][column]}


def _elongation(measured: geometry.Moments) -> float:
    """Long over short axis of the ellipse with the same second moments."""
    mean = (measured.var_x + measured.var_y) / 2.0
    spread = math.hypot((measured.var_x - measured.var_y) / 2.0, measured.cov_xy)
    return math.sqrt((mean + spread) / max(mean - spread, 1e-9))


def _light_words(
    image: np.ndarray, mask: np.ndarray, surroundings: np.ndarray, colour: bool
) -> dict[str, str]:
    """Colour or brightness, border and texture of the lesion."""
    lightness = as_grey(image).astype(np.float32) * (100.0 / 255.0)
    found = {}
    if colour:
        found["colour"] = _colour_words(image[mask])
    else:
        difference = float(np.median(lightness[mask]) - np.median(lightness[surroundings]))
        found["brightness"] = (
            "much darker" if difference < -20 else "darker" if difference < -6
            else "much brighter" if difference > 20 else "brighter" if difference > 6 else "similar"
        )  # fmt: skip
    radius = geometry.equivalent_radius(mask)
    band = max(1.5, 0.1 * radius)
    inward, outward = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    near_in, near_out = mask & (inward <= band), ~mask & (outward <= band)
    far_in, far_out = mask & (inward > 2 * band), ~mask & (outward > 2 * band) & (outward <= 6 * band)
    if far_in.any() and far_out.any() and near_out.any():
        contrast = float(np.median(lightness[far_out]) - np.median(lightness[far_in]))
        step = float(np.median(lightness[near_out]) - np.median(lightness[near_in]))
        if abs(contrast) >= 3.0:
            found["border"] = "sharp" if step / contrast > 0.4 else "blurred"
    smoothed = ndimage.gaussian_filter(lightness, 1.0)
    spread = float(smoothed[far_in if far_in.any() else mask].std())
    found["texture"] = (
        "homogeneous" if spread < 3.5 else "slightly varied" if spread < 7.0 else "heterogeneous"
    )
    return found


def _colour_words(pixels: np.ndarray) -> str:
    """The commonest colour of RGB pixels (n, 3), and the second where it holds a quarter."""
    lab = _lab(pixels)
    names = list(COLOURS)
    reference = np.array([COLOURS[name] for name in names])
    nearest = ((lab[:, None] - reference) ** 2).sum(axis=2).argmin(axis=1)
    shares = np.bincount(nearest, minlength=len(names)) / len(nearest)
    first, second = np.argsort(-shares, kind="stable")[:2]
    return f"{names[first]} and {names[second]}" if shares[second] >= 0.25 else names[first]


def _skin_words(image: np.ndarray, surroundings: np.ndarray) -> dict[str, str]:
    """Skin colour by its typology angle, hair and pen marks."""
    lightness, _, b = np.median(_lab(image[surroundings]), axis=0)
    angle = math.degrees(math.atan2(lightness - 50.0, max(float(b), 1e-3)))
    found = {"skin": next((word for limit, word in SKIN_ANGLES if angle > limit), "dark")}
    grey = as_grey(image).astype(np.float32)
    reach = 2 * max(2, round(grey.shape[0] / 64)) + 1
    hat = ndimage.grey_closing(grey, size=(reach, reach)) - grey
    share = float((hat[surroundings] > 25.0).mean())
    if share > 0.02:
        found["hair"] = "many hairs" if share > 0.08 else "a few hairs"
    red, green, blue = (image[..., channel].astype(np.int16) for channel in range(3))
    ink = (np.maximum(blue, green) - red > 30) & surroundings
    if ink.sum() > 0.01 * surroundings.sum():
        found["marks"] = "pen marks"
    return found


def _lab(pixels: np.ndarray) -> np.ndarray:
    """(n, 3) CIE Lab of uint8 RGB (n, 3)."""
    from skimage.color import rgb2lab

    return rgb2lab(pixels[None].astype(np.float64) / 255.0)[0]
