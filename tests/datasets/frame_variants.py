"""Variants of an image as an archive holds them: cropped, rescaled, another grey map, marked."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def cropped(image: np.ndarray, top: float, left: float, height: float, width: float) -> np.ndarray:
    h, w = image.shape[:2]
    return image[round(top * h) : round((top + height) * h), round(left * w) : round((left + width) * w)]


def darkened(image: np.ndarray, gamma: float = 1.6) -> np.ndarray:
    return (255 * (image / 255.0) ** gamma).astype(np.uint8)


def marked(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    draw.text((10, image.shape[0] - 30), "RT UOQ", fill=255, font=ImageFont.load_default(14))
    for y, x in ((60, 50), (60, 120), (40, 85), (80, 85)):
        draw.line((x - 4, y, x + 4, y), fill=255)
        draw.line((x, y - 4, x, y + 4), fill=255)
    return np.asarray(picture)


VARIANTS = {
    "same": lambda image: image,
    "half the size": lambda image: resized(image, 0.5),
    "enlarged": lambda image: resized(image, 1.7),
    "cropped to 80 %": lambda image: cropped(image, 0.1, 0.12, 0.8, 0.8),
    "top left corner, 65 %": lambda image: cropped(image, 0.0, 0.0, 0.65, 0.65),
    "cropped, rescaled, darkened": lambda image: darkened(
        resized(cropped(image, 0.05, 0.2, 0.85, 0.75), 0.8)
    ),
    "marked": marked,
    "bottom cut off": lambda image: cropped(image, 0.0, 0.0, 0.7, 1.0),
}
