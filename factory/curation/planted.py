"""Planted copies: real images, slightly changed, to measure what share of copies the copy test finds."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from factory.curation.memorisation import FittedCopyTest
from factory.imaging import as_grey, letterbox
from schemas.identity import random_generator


def _affine(pixels: np.ndarray, *, zoom: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Zoom about the middle, then shift by fractions of the sides; same shape."""
    height, width = pixels.shape[:2]
    kept_h, kept_w = height / zoom, width / zoom
    top, left = (height - kept_h) / 2 - shift[0] * height, (width - kept_w) / 2 - shift[1] * width
    box = (left, top, left + kept_w, top + kept_h)
    resample = Image.Resampling.BILINEAR
    return np.asarray(
        Image.fromarray(pixels).transform((width, height), Image.Transform.EXTENT, box, resample)
    )


def _signs(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.choice((-1, 1))), int(rng.choice((-1, 1)))


def _brightness_contrast(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gain, gamma = (1.3, 0.8) if rng.random() < 0.5 else (0.75, 1.25)
    values = (grey / 255.0) ** gamma * gain + rng.uniform(-0.05, 0.05)
    return (values.clip(0, 1) * 255).astype(np.uint8)


def _jpeg(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def _shifted(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    vertical, horizontal = _signs(rng)
    return _affine(grey, shift=(0.05 * vertical, 0.07 * horizontal))


def _cropped(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    vertical, horizontal = _signs(rng)
    return _affine(grey, zoom=1 / 0.9, shift=(0.03 * vertical, 0.03 * horizontal))


def _speckled(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (grey * (1 + 0.2 * rng.standard_normal(grey.shape))).clip(0, 255).astype(np.uint8)


def _blurred(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(grey.astype(np.float32), max(grey.shape) / 128).round().astype(np.uint8)


def _mirrored(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(grey[:, ::-1])


PLANTED: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "brightness_contrast": _brightness_contrast,
    "jpeg_75": _jpeg,
    "shift": _shifted,
    "crop_90": _cropped,
    "speckle": _speckled,
    "blur": _blurred,
    "mirror": _mirrored,
}
"""Ways of slightly changing an image: uint8 (H, W) grey and a generator → uint8 (H, W)."""
_MOVED = ("shift", "crop_90", "mirror")


def planted_copy(
    kind: str, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """A slightly changed grey copy of a real image, uint8 (H, W), and the mask that goes with it.

    Args:
        kind: one of `PLANTED`.
        image: uint8 (H, W) or (H, W, 3).
        mask: uint8 (H, W), or None.
        rng: decides signs and noise; image and mask are moved alike.
    """
    if kind not in PLANTED:
        raise ValueError(f"planted copy {kind!r}: there are {', '.join(PLANTED)}")
    state = rng.bit_generator.state
    copy = PLANTED[kind](as_grey(image), rng)
    if mask is None or kind not in _MOVED:
        return copy, mask
    rng.bit_generator.state = state
    moved = PLANTED[kind](((mask > 0) * 255).astype(np.uint8), rng)
    return copy, (moved > 127).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Power:
    """What the copy test found of planted copies.

    Attributes:
        detected: share found, per kind of change.
        attributed: share of all planted copies whose best match is the image they were made from.
        num_images: real images that copies were made of.
    """

    detected: Mapping[str, float]
    attributed: float
    num_images: int


def detection_power(
    test: FittedCopyTest,
    sources: Sequence[tuple[int, np.ndarray, np.ndarray | None]],
    embed: Callable[[Sequence[np.ndarray]], np.ndarray],
    *,
    size: int,
    seed: str = "planted",
    progress: Callable[[int], None] = lambda count: None,
) -> Power:
    """Share of planted copies that the test finds, searched like synthetic images.

    Args:
        test: the fitted test.
        sources: position among the references, image and mask of the real images to copy.
        embed: uint8 images → float32 (N, D), unit norm, by the embedder of the tables.
        size: px of the square that copies are letterboxed to, as synthetic images are.
        seed: of the changes.
        progress: called with the number of copies tested since the last call.
    """
    detected, right = {}, 0
    for kind in PLANTED:
        copies = []
        for position, image, mask in sources:
            rng = random_generator(f"{seed}/{position}", kind)
            square = letterbox(as_grey(image), size)
            small = None if mask is None else letterbox(mask, size, is_mask=True)
            copies.append(planted_copy(kind, square, small, rng))
        vectors = embed([copy for copy, _ in copies])
        found = 0
        for (position, _, _), (copy, mask), vector in zip(sources, copies, vectors):
            match = test.match(test.source.frame(copy, mask), vector)
            found += match.is_copy
            right += match.reference == position
            progress(1)
        detected[kind] = found / max(len(sources), 1)
    return Power(
        detected=detected,
        attributed=right / max(len(sources) * len(PLANTED), 1),
        num_images=len(sources),
    )
