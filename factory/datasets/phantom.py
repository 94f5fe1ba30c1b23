"""Procedural B-mode ultrasound: labelled, annotated images that need no download.

Physics, in the order of the code:

- *Linear scattering.* The radio-frequency echo is the convolution of point scatterers with the pulse-echo
  point-spread function (Jensen, "Field: a program for simulating ultrasound systems", Med. Biol. Eng. Comput.
  34, 1996). The pulse is a Gaussian-windowed tone at the centre frequency, the beam a Gaussian whose width is
  wavelength times f-number at the focus and grows away from it.
- *Speckle.* Many unresolved scatterers per resolution cell give a circular Gaussian signal with a Rayleigh
  envelope; few give K-like, grainy texture (Wagner, Smith, Sandrik, Lopez, "Statistics of speckle in
  ultrasound B-scans", IEEE Trans. Sonics Ultrason. 30, 1983). The scatterer density is a property of a tissue.
- *Detection.* The envelope is the magnitude of the analytic signal (Hilbert transform), here taken as the
  one-sided band around the centre frequency, demodulated and decimated as a scanner does; then log compression
  to a dynamic range in dB.
- *Attenuation* of alpha dB/(cm MHz) along each scan line, counted both ways, less a time-gain compensation that
  assumes one mean tissue and is slightly wrong. A lesion that attenuates more than its surroundings casts a
  shadow, one that attenuates less an enhancement: neither is painted. Amplified electronic noise limits depth.
- *Anatomy.* Skin, subcutaneous fat with septa, glandular tissue, retromammary fat and pectoral muscle with wavy
  boundaries and specular fasciae.

What it is not: no refraction, reverberation, phase aberration, or side lobes; a linear array only.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from factory.datasets.lesions import BENIGN, MALIGNANT, NORMAL, ClassPrior, Lesion, blend, insert_lesion
from factory.datasets.ultrasound import SCANNER_A, SCANNER_B, Scanner, Tissue, scan, smooth_field
from schemas.identity import random_generator

__all__ = [
    "BENIGN",
    "MALIGNANT",
    "NORMAL",
    "SCANNER_A",
    "SCANNER_B",
    "ClassPrior",
    "PhantomConfig",
    "PhantomSample",
    "Scanner",
    "long_tail",
    "phantom_class",
    "phantom_sample",
    "with_point_spread",
]

_GOLDEN = 0.6180339887498949


def long_tail(names: tuple[str, ...], imbalance: float = 10.0) -> tuple[ClassPrior, ...]:
    """Priors for any number of classes between the two poles, head `imbalance` times as frequent as the tail.

    Class k of K lies at k / (K - 1) on the way from BENIGN to MALIGNANT; shares fall geometrically.
    """
    count = len(names)
    priors = []
    for index, name in enumerate(names):
        t = index / max(1, count - 1)
        values: dict[str, object] = {"name": name, "share": imbalance**-t, "lesion": True}
        for item in dataclasses.fields(ClassPrior):
            if item.name in values:
                continue
            low, high = getattr(BENIGN, item.name), getattr(MALIGNANT, item.name)
            if isinstance(low, tuple):
                values[item.name] = tuple((1 - t) * a + t * b for a, b in zip(low, high))
            else:
                values[item.name] = (1 - t) * low + t * high
        priors.append(ClassPrior(**values))  # type: ignore[arg-type]
    return tuple(priors)


def with_point_spread(scanner: Scanner, factor: float) -> Scanner:
    """The scanner with a pulse `factor` times as long and a beam as much wider at the focus.

    The wrong one for images of `scanner`: anatomy and masks stay, speckle and edges do not.

    Raises:
        ValueError: `factor` is not positive.
    """
    if not factor > 0:
        raise ValueError(f"factor: want a positive number, got {factor}")
    return dataclasses.replace(
        scanner,
        name=f"{scanner.name}, point spread x {factor:g}",
        cycles=factor * scanner.cycles,
        f_number=factor * scanner.f_number,
    )


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """A population of patients and the scanner they were imaged with.

    Attributes:
        size: side of the square image, px.
        classes: priors of the classes; their order is the label order.
        scanner: the scanner.
    """

    size: int = 128
    classes: tuple[ClassPrior, ...] = (BENIGN, MALIGNANT)
    scanner: Scanner = SCANNER_A

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 1024:
            raise ValueError(f"size: {self.size} is outside 32 … 1024 px")
        names = self.class_names
        if not names or len(set(names)) != len(names):
            raise ValueError(f"classes: need at least one class, each name once; got {names}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in label order."""
        return tuple(prior.name for prior in self.classes)


@dataclass(frozen=True, kw_only=True)
class PhantomSample:
    """One phantom image.

    Attributes:
        image: uint8 (H, W), log-compressed envelope.
        mask: uint8 (H, W), lesion = 1.
        label_name: class name.
        attributes: ground truth: echogenicity (homogeneous | heterogeneous), boundary (clear | unclear),
            posterior (enhancement | shadow | none); absent where there is no lesion.
    """

    image: np.ndarray
    mask: np.ndarray
    label_name: str
    attributes: Mapping[str, str]


def phantom_sample(config: PhantomConfig, seed: int, index: int) -> PhantomSample:
    """The `index`-th image of the population `seed`: the same on every machine, whatever was drawn before.

    Any run of consecutive indices has the class shares almost exactly (a golden-ratio sequence).

    Raises:
        ValueError: `index` is negative.
    """
    if index < 0:
        raise ValueError(f"index: {index} is negative")
    prior = phantom_class(config, seed, index)
    identity = f"phantom/{seed}/{index}"
    lesion = Lesion.draw(prior, config.size, random_generator(identity, "lesion")) if prior.lesion else None
    tissue = lay_tissue(config.size, lesion, random_generator(identity, "anatomy"))
    image = scan(config.scanner, tissue, random_generator(identity, "speckle"))
    if lesion is None:
        return PhantomSample(
            image=image, mask=np.zeros(image.shape, np.uint8), label_name=prior.name, attributes={}
        )
    return PhantomSample(image=image, mask=lesion.mask, label_name=prior.name, attributes=lesion.attributes)


def phantom_class(config: PhantomConfig, seed: int, index: int) -> ClassPrior:
    """The class of the `index`-th image, without making it."""
    offset = random_generator(f"phantom/{seed}", "classes").random()
    shares = np.cumsum([prior.share for prior in config.classes])
    position = (offset + index * _GOLDEN) % 1.0 * shares[-1]
    return config.classes[min(int(np.searchsorted(shares, position, side="right")), len(shares) - 1)]


# name, share of depth, echo level dB, attenuation dB/(cm MHz), scatterer density, texture dB, texture sigma px
_LAYERS = (
    ("skin", 0.045, 4.0, 1.0, 1.0, 1.0, (2.0, 12.0)),
    ("fat", 0.20, -11.0, 0.5, 0.35, 2.5, (3.0, 7.0)),
    ("glandular", 0.40, 0.0, 0.75, 0.8, 5.0, (1.6, 6.5)),
    ("retromammary fat", 0.11, -12.0, 0.5, 0.35, 2.0, (2.5, 7.0)),
    ("muscle", 0.17, -8.0, 0.9, 0.6, 5.5, (1.0, 20.0)),
    ("chest wall", 1.0, -16.0, 1.8, 0.5, 3.0, (3.0, 9.0)),
)


def lay_tissue(size: int, lesion: Lesion | None, rng: np.random.Generator) -> Tissue:
    scale = size / 128
    shape = (size, size)
    rows = np.arange(size, dtype=np.float32)[:, None]
    echo, attenuation, density, specular = (np.zeros(shape, np.float32) for _ in range(4))
    top = np.zeros(size, np.float32)
    for depth_index, (_, share, level, alpha, dens, spread, sigma) in enumerate(_LAYERS):
        thickness = size * share * rng.uniform(0.65, 1.35)
        waviness = (0.004, 0.02, 0.035, 0.02, 0.02, 0.0)[depth_index] * size
        wave = smooth_field((1, size), (1e-6, 13.0 * scale), rng)[0]
        inside = (rows >= top).astype(np.float32) if depth_index else np.ones(shape, np.float32)
        texture = smooth_field(shape, (sigma[0] * scale, sigma[1] * scale), rng)
        blend(echo, level + rng.uniform(-2, 2) + spread * texture, inside)
        blend(attenuation, np.float32(alpha), inside)
        blend(density, np.float32(dens), inside)
        if depth_index:
            # A fascia reflects where it lies across the beam: brighter where it is flat, in pieces.
            flat = np.exp(-((np.gradient(top) / 0.25) ** 2))
            pieces = np.clip(0.7 + 0.8 * smooth_field((1, size), (1e-6, 5.0 * scale), rng)[0], 0, 2)
            line = np.exp(-0.5 * ((rows - top) / (0.5 * scale)) ** 2)
            specular += (1.7 if depth_index in (1, 4) else 0.8) * line * (flat * pieces)
        top = top + thickness + waviness * wave
    # Whole regions of a breast scatter more or less; collagen strands return short bright lines.
    echo += 2.5 * smooth_field(shape, (12.0 * scale, 16.0 * scale), rng)
    strands = np.clip(smooth_field(shape, (0.75 * scale, 5.0 * scale), rng) - 1.2, 0, None)
    specular += np.float32(rng.uniform(0.5, 1.6)) * strands * (echo > -7)
    specular += _septa(shape, scale, echo, rng)
    if lesion is not None:
        insert_lesion(lesion, scale, echo, attenuation, density, specular, rng)
    return Tissue(echo=echo, attenuation=attenuation, density=density, specular=specular)


def _septa(shape: tuple[int, int], scale: float, echo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cooper's ligaments: thin bright curves through the fat: zero crossings of an oblique random field."""
    field = smooth_field(shape, (5.0 * scale, 24.0 * scale), rng)
    shown = np.clip(smooth_field(shape, (6.0 * scale, 10.0 * scale), rng), 0, 1.2)
    return (0.5 * np.exp(-((field / 0.07) ** 2)) * shown * (echo < -5)).astype(np.float32)
