"""Sketches of images: edge maps that a generator learns to show in its features (Chen et al. 2025).

Each extractor is a frozen dataclass with `draw(image) -> uint8 (S, S)`, 0 no edge … 255 edge, and `digest()`, which
names what it computes. The paper takes PiDiNet; its users find its edges weak on textured images, so the default is a
difference of Gaussians, which needs no weights.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from factory.imaging import as_grey, as_rgb
from schemas.identity import digest_file, execution_field, fingerprint, hash_parts

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class DifferenceOfGaussians:
    """Where two blurs of the image differ most (Marr and Hildreth 1980), relative to the image itself.

    The magnitude is mapped linearly to 0 … 255 between two of its quantiles, so contrast does not matter. A
    constant image has no edges.

    Attributes:
        sigma: of the narrower blur, as a fraction of the side; wider ones ignore speckle.
        ratio: of the wider to the narrower blur; 1.6 approximates the Laplacian.
        low, high: quantiles of the magnitude that become 0 and 255: at most 1 − low of the pixels are drawn.
    """

    sigma: float = 0.012
    ratio: float = 1.6
    low: float = 0.85
    high: float = 0.98

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 0.1 or not self.ratio > 1:
            raise ValueError(
                f"DifferenceOfGaussians: want 0 < sigma ≤ .1 and ratio > 1, got {self.sigma}, {self.ratio}"
            )
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"DifferenceOfGaussians: want 0 ≤ low < high ≤ 1, got low={self.low}, high={self.high}"
            )

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Edge map uint8 (S, S) of an image uint8 (S, S[, 3])."""
        grey = _checked(image).astype(np.float32)
        sigma = self.sigma * max(grey.shape)
        narrow, wide = (ndimage.gaussian_filter(grey, s, mode="nearest") for s in (sigma, self.ratio * sigma))
        magnitude = np.abs(narrow - wide)
        low, high = np.quantile(magnitude, [self.low, self.high])
        if high - low < 1e-3:  # nothing but rounding
            return np.zeros(grey.shape, np.uint8)
        return np.round(255 * np.clip((magnitude - low) / (high - low), 0, 1)).astype(np.uint8)

    def digest(self) -> str:
        """Names what is computed."""
        return fingerprint(self)


@dataclass(frozen=True, kw_only=True)
class Canny:
    """Thin edges by hysteresis (Canny 1986; scikit-image).

    Attributes:
        sigma: of the blur, as a fraction of the side.
        low, high: quantiles of the gradient's magnitude for weak and strong edges.
    """

    sigma: float = 0.012
    low: float = 0.8
    high: float = 0.92

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 0.1:
            raise ValueError(f"Canny.sigma: want 0 < sigma ≤ .1 of the side, got {self.sigma}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"Canny: want 0 ≤ low ≤ high ≤ 1, got low={self.low}, high={self.high}")

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Edge map uint8 (S, S), 0 or 255, of an image uint8 (S, S[, 3])."""
        from skimage.feature import canny

        grey = _checked(image).astype(np.float64) / 255
        if np.ptp(grey) == 0:
            return np.zeros(grey.shape, np.uint8)
        edges = canny(
            grey,
            sigma=self.sigma * max(grey.shape),
            low_threshold=self.low,
            high_threshold=self.high,
            use_quantiles=True,
        )
        return np.where(edges, 255, 0).astype(np.uint8)

    def digest(self) -> str:
        """Names what is computed."""
        return fingerprint(self)


@dataclass(frozen=True, kw_only=True)
class PiDiNet:
    """Edges of a trained PiDiNet (Su et al. 2021), read from a local checkpoint of the published layout.

    Attributes:
        weights: .safetensors or .pth file; the digest of its bytes enters the identity, not its path.
    """

    weights: str = execution_field("")

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Edge map uint8 (S, S) of an image uint8 (S, S[, 3]): the probability of an edge times 255.

        Raises:
            FileNotFoundError: no weights.
            ValueError: the file is of another layout.
        """
        import torch

        path = self._path()
        stat = path.stat()
        model = _load_pidinet(str(path), stat.st_size, stat.st_mtime_ns)
        pixels = as_rgb(_checked(image, grey=False)).astype(np.float64) / 255
        # Mean and deviation of ImageNet, as the published weights were trained.
        normalised = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        with torch.inference_mode():
            edges = model(torch.from_numpy(normalised).float().permute(2, 0, 1)[None])[0, 0]
        return (edges * 255).round().to(torch.uint8).numpy()

    def digest(self) -> str:
        """Names what is computed: this class and the bytes of the weights."""
        return hash_parts(fingerprint(self), digest_file(self._path()))

    def _path(self) -> Path:
        path = Path(self.weights).expanduser()
        if not self.weights or not path.is_file():
            raise FileNotFoundError(
                f"PiDiNet.weights={self.weights!r}: no such file; give a PiDiNet checkpoint (.pth or .safetensors), or "
                "use DifferenceOfGaussians or Canny"
            )
        return path


Extractor = DifferenceOfGaussians | Canny | PiDiNet


def _checked(image: np.ndarray, grey: bool = True) -> np.ndarray:
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not is_image or min(image.shape[:2]) < 8:
        raise ValueError(f"image: want uint8 (S, S[, 3]) of at least 8 px, got {image.dtype} {image.shape}")
    return as_grey(image) if grey else image


@functools.lru_cache(maxsize=2)
def _load_pidinet(path: str, size: int, modified_ns: int) -> "nn.Module":
    from factory.sketches.pidinet import load_pidinet

    return load_pidinet(Path(path))
