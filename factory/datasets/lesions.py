"""Lesions of the phantom: what a class's look like, and how one is drawn and put into tissue."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from factory.datasets.ultrasound import smooth_field

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ClassPrior:
    """How the lesions of one class look. Ranges are uniform.

    Attributes:
        name: class name.
        share: relative frequency of the class; shares need not sum to one.
        lesion: whether there is a lesion at all.
        radius: equivalent radius of the lesion as a fraction of the image size.
        aspect: width over height; > 1 is wider than tall.
        tilt: rotation, radians, either way.
        lobulation: amplitude of smooth lobes, as a fraction of the radius.
        spicules: number of spicules.
        spicule_length: as a fraction of the radius.
        contrast: echo level of the lesion relative to glandular tissue, dB.
        attenuation: excess attenuation of the lesion, dB/(cm MHz): > 0 shadow, < 0 enhancement.
        heterogeneous: probability that the interior is heterogeneous.
        unclear: probability that the boundary is blurred.
        halo: echo level of the rim around the lesion, dB.
        calcifications: mean number of bright specks inside.
    """

    name: str
    share: float = 1.0
    lesion: bool = True
    radius: Range = (0.08, 0.2)
    aspect: Range = (1.15, 1.9)
    tilt: float = 0.25
    lobulation: Range = (0.0, 0.06)
    spicules: Range = (0, 0)
    spicule_length: Range = (0.0, 0.0)
    contrast: Range = (-30.0, -13.0)
    attenuation: Range = (-0.75, -0.1)
    heterogeneous: float = 0.15
    unclear: float = 0.15
    halo: float = 0.0
    calcifications: float = 0.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("class name: must not be empty")
        if self.share <= 0:
            raise ValueError(f"class {self.name}: share {self.share} must be positive")
        if not 0 < self.radius[0] <= self.radius[1] <= 0.3:
            raise ValueError(f"class {self.name}: radius {self.radius} must lie in (0, 0.3], low first")
        if self.aspect[0] <= 0:
            raise ValueError(f"class {self.name}: aspect {self.aspect} must be positive")


BENIGN = ClassPrior(name="benign", share=0.65)
MALIGNANT = ClassPrior(
    name="malignant", share=0.35, radius=(0.1, 0.23), aspect=(0.75, 1.45), tilt=0.6, lobulation=(0.1, 0.22),
    spicules=(3, 9), spicule_length=(0.12, 0.45), contrast=(-24.0, -13.0), attenuation=(0.3, 2.2),
    heterogeneous=0.85, unclear=0.8, halo=4.0, calcifications=4.0,
)  # fmt: skip
NORMAL = ClassPrior(name="normal", share=0.2, lesion=False)


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A drawn lesion on the (S, S) grid.

    `level` is the normalised radius: < 1 inside, 1 on the contour; `margin` the blur of the contour in the
    same unit.
    """

    level: np.ndarray
    mask: np.ndarray
    margin: float
    radius: float
    contrast: float
    attenuation: float
    halo: float
    texture: float
    calcifications: int
    attributes: Mapping[str, str]

    @staticmethod
    def draw(prior: ClassPrior, size: int, rng: np.random.Generator) -> "Lesion":
        radius = size * rng.uniform(*prior.radius)
        aspect = rng.uniform(*prior.aspect)
        half_width, half_height = radius * np.sqrt(aspect), radius / np.sqrt(aspect)
        reach = 1.0 + prior.lobulation[1] + prior.spicule_length[1] * 0.5
        x0 = _centre(size, half_width * reach, 0.0, 1.0, rng)
        y0 = _centre(size, half_height * reach, 0.16, 0.9, rng)
        level = _level_set(prior, size, (y0, x0), (half_height, half_width), rng)
        is_unclear = rng.random() < prior.unclear
        is_heterogeneous = rng.random() < prior.heterogeneous
        attenuation = rng.uniform(*prior.attenuation)
        posterior = "shadow" if attenuation > 0.15 else "enhancement" if attenuation < -0.15 else "none"
        return Lesion(
            level=level,
            mask=(level < 1.0).astype(np.uint8),
            margin=rng.uniform(0.1, 0.17) if is_unclear else rng.uniform(0.015, 0.03),
            radius=radius,
            contrast=rng.uniform(*prior.contrast),
            attenuation=attenuation,
            halo=prior.halo * rng.uniform(0.5, 1.5),
            texture=rng.uniform(4.5, 7.5) if is_heterogeneous else rng.uniform(0.3, 1.2),
            calcifications=int(rng.poisson(prior.calcifications)) if is_heterogeneous else 0,
            attributes={
                "echogenicity": "heterogeneous" if is_heterogeneous else "homogeneous",
                "boundary": "unclear" if is_unclear else "clear",
                "posterior": posterior,
            },
        )


def _centre(size: int, half: float, low: float, high: float, rng: np.random.Generator) -> float:
    """A coordinate such that `half` on both sides stays inside (low, high) of the image where it fits."""
    start, stop = size * low + half + 2, size * high - half - 2
    return rng.uniform(start, stop) if start < stop else 0.5 * (start + stop)


def _level_set(
    prior: ClassPrior,
    size: int,
    centre: tuple[float, float],
    half: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Radius over the contour's radius in the same direction, (S, S) float32."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    y, x = y - np.float32(centre[0]), x - np.float32(centre[1])
    tilt = rng.uniform(-prior.tilt, prior.tilt)
    u = (np.cos(tilt) * x + np.sin(tilt) * y) / half[1]
    v = (np.cos(tilt) * y - np.sin(tilt) * x) / half[0]
    angles = np.linspace(-np.pi, np.pi, 721)
    contour = np.ones_like(angles)
    lobulation = rng.uniform(*prior.lobulation)
    for order in range(2, 8):
        weight = lobulation / np.sqrt(order - 1) * rng.normal()
        contour += weight * 0.7 * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
    num_spicules = int(rng.integers(int(prior.spicules[0]), int(prior.spicules[1]) + 1))
    for _ in range(num_spicules):
        kappa = rng.uniform(18, 70)  # narrow von Mises bumps
        bump = np.exp(kappa * (np.cos(angles - rng.uniform(-np.pi, np.pi)) - 1))
        contour += rng.uniform(*prior.spicule_length) * bump
    contour = np.maximum(contour, 0.55)
    contour /= np.sqrt(np.mean(contour**2))  # the area stays that of the ellipse
    return (np.hypot(u, v) / np.interp(np.arctan2(v, u), angles, contour)).astype(np.float32)


def blend(field: np.ndarray, value: np.ndarray | np.float32, weight: np.ndarray) -> None:
    field *= 1 - weight
    field += weight * value


def insert_lesion(
    lesion: Lesion,
    scale: float,
    echo: np.ndarray,
    attenuation: np.ndarray,
    density: np.ndarray,
    specular: np.ndarray,
    rng: np.random.Generator,
) -> None:
    shape = echo.shape
    rough = smooth_field(shape, (1.6 * scale, 1.6 * scale), rng)
    level = lesion.level + lesion.margin * 0.9 * rough  # a blurred margin is also ragged
    inside = 1.0 / (1.0 + np.exp(np.clip((level - 1.0) / (0.45 * lesion.margin), -30, 30)))
    texture = smooth_field(shape, (2.4 * scale, 2.8 * scale), rng)
    if lesion.halo:
        echo += lesion.halo * np.exp(-0.5 * ((level - 1.18) / 0.14) ** 2)
    blend(echo, lesion.contrast + lesion.texture * texture, inside)
    blend(density, np.float32(0.7), inside)
    attenuation += inside * np.float32(lesion.attenuation)
    np.maximum(attenuation, 0.02, out=attenuation)
    specular *= 1 - inside
    if lesion.attributes["boundary"] == "clear":
        # A capsule across the beam, top and bottom, returns a thin bright line.
        slope = np.abs(np.gradient(lesion.level, axis=0)) * lesion.radius
        specular += (
            0.45
            * np.exp(-0.5 * ((lesion.level - 1.0) / (0.6 * scale / lesion.radius)) ** 2)
            * (np.clip(slope - 0.75, 0, 1))
        )
    where = np.argwhere(lesion.level < 0.75)
    if lesion.calcifications and len(where):
        for y, x in where[rng.integers(len(where), size=lesion.calcifications)]:
            specular[y, x] += rng.uniform(2.0, 5.0)
