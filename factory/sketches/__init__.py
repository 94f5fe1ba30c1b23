"""Edge maps of images, and what draws them. torch is imported by PiDiNet alone, when it draws."""

from factory.sketches.extractors import Canny, DifferenceOfGaussians, Extractor, PiDiNet

__all__ = ["Canny", "DifferenceOfGaussians", "Extractor", "PiDiNet"]
