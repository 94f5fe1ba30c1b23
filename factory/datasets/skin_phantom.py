"""Procedural dermoscopy: RGB lesions on skin with hair, for tests, documentation and learning checks.

A picture, not a simulation: skin of a drawn tone with slow shading, a lesion whose outline is an ellipse with a
few harmonics, pigment that thins out towards its rim, and dark hairs. What is true of an image (colour, border,
hair) is returned with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from factory import geometry
from factory.datasets.ultrasound import smooth_field
from schemas.identity import random_generator

NAEVUS, MELANOMA = "naevus", "melanoma"
SKIN_TONES: Mapping[str, tuple[int, int, int]] = {
    "very light": (238, 205, 190),
    "light": (224, 180, 158),
    "tan": (196, 150, 118),
    "brown": (148, 104, 76),
}
PIGMENTS: Mapping[str, tuple[int, int, int]] = {
    "light brown": (150, 102, 70),
    "brown": (112, 70, 46),
    "dark brown": (70, 42, 30),
    "red": (184, 76, 72),
}


@dataclass(frozen=True, kw_only=True)
class SkinSample:
    """One image.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        mask: uint8 (H, W), lesion = 1.
        label_name: "naevus" (even, round) or "melanoma" (irregular, two colours more often).
        attributes: truth: skin, colour, border (sharp | blurred), hair (no | yes).
    """

    image: np.ndarray
    mask: np.ndarray
    label_name: str
    attributes: Mapping[str, str]


def skin_sample(size: int, seed: int, index: int) -> SkinSample:
    """The `index`-th image of the population `seed`, `size` × `size`; even indices are naevi.

    Raises:
        ValueError: `size` is outside 32 … 1024 px, or `index` is negative.
    """
    if not 32 <= size <= 1024:
        raise ValueError(f"size: {size} is outside 32 … 1024 px")
    if index < 0:
        raise ValueError(f"index: {index} is negative")
    rng = random_generator(f"skin/{seed}/{index}", "image")
    label = NAEVUS if index % 2 == 0 else MELANOMA
    malignant = label == MELANOMA
    skin_name = list(SKIN_TONES)[rng.integers(len(SKIN_TONES))]
    darker = [name for name in PIGMENTS if sum(PIGMENTS[name]) < sum(SKIN_TONES[skin_name]) - 120]
    colour = darker[rng.integers(len(darker))]
    border: Literal["sharp", "blurred"] = "blurred" if rng.random() < (0.6 if malignant else 0.3) else "sharp"
    level = _outline(size, malignant, rng)
    mask = (level > 0).astype(np.uint8)
    pixels = np.array(SKIN_TONES[skin_name], np.float32) * np.ones((size, size, 1), np.float32)
    pixels *= 1.0 + 0.03 * smooth_field((size, size), (size / 6, size / 6), rng)[..., None]
    softness = size * (0.035 if border == "blurred" else 0.008)
    opacity = 1.0 / (1.0 + np.exp(-level / softness))
    spots = smooth_field((size, size), (size / 24, size / 24), rng)
    pigment = np.array(PIGMENTS[colour], np.float32) * (
        1.0 + (0.18 if malignant else 0.06) * spots[..., None]
    )
    pixels += opacity[..., None] * (pigment - pixels)
    has_hair = bool(rng.random() < 0.4)
    if has_hair:
        pixels *= (1.0 - 0.75 * _hairs(size, rng))[..., None]
    pixels += rng.normal(0.0, 2.0, pixels.shape)
    return SkinSample(
        image=pixels.clip(0, 255).round().astype(np.uint8),
        mask=geometry.largest_component(mask),
        label_name=label,
        attributes={
            "skin": skin_name,
            "colour": colour,
            "border": border,
            "hair": "yes" if has_hair else "no",
        },
    )


def _outline(size: int, malignant: bool, rng: np.random.Generator) -> np.ndarray:
    """(H, W): distance to the outline along the ray from the centre, px, positive inside."""
    cx, cy = rng.uniform(0.34, 0.66, 2) * size
    radius = rng.uniform(0.12, 0.27) * size
    aspect = rng.uniform(1.0, 1.5)
    tilt = rng.uniform(0.0, np.pi)
    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    dx, dy = xs - cx, ys - cy
    u, v = dx * np.cos(tilt) + dy * np.sin(tilt), dy * np.cos(tilt) - dx * np.sin(tilt)
    distance = np.hypot(u / np.sqrt(aspect), v * np.sqrt(aspect))
    angle = np.arctan2(v, u)
    rim = np.full_like(angle, radius)
    for order in range(2, 7):
        strength = (0.09 if malignant else 0.02) * radius / np.sqrt(order - 1)
        rim += strength * rng.normal() * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return rim - distance


def _hairs(size: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W) in 0 … 1: a few slightly bent dark lines across the frame."""
    ys, xs = np.mgrid[:size, :size].astype(np.float32) / size
    shown = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(4, 10))):
        angle, offset, bend = rng.uniform(0, np.pi), rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5)
        along = (xs - 0.5) * np.cos(angle) + (ys - 0.5) * np.sin(angle)
        across = (ys - 0.5) * np.cos(angle) - (xs - 0.5) * np.sin(angle)
        shown = np.maximum(shown, np.exp(-0.5 * ((across - offset - bend * along**2) / 0.006) ** 2))
    return shown
