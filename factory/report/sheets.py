"""Contact sheets: images side by side with mask contours and captions, as one PNG."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from factory.imaging import as_rgb, letterbox

PALETTE = ((255, 210, 74), (74, 222, 128), (244, 114, 182), (96, 165, 250), (251, 146, 60))
"""Colours of mask labels 1, 2, … on grey images, RGB; `report.css` has the same."""
_GAP, _LINE, _FONT_SIZE = 6, 14, 11


def require_equal_lengths(num_images: int, **others: Sequence | None) -> None:
    """Raise ValueError where `others` do not give one value per image."""
    for name, values in others.items():
        if values is not None and len(values) != num_images:
            raise ValueError(f"{name}: {len(values)} given for {num_images} images")


def _outline(mask: np.ndarray, size: int) -> np.ndarray:
    """Label (uint8) of the boundary pixels of a mask letterboxed to (size, size), 0 elsewhere."""
    outline = np.zeros((size, size), np.uint8)
    for label in np.unique(mask[mask > 0]):
        # Scaled as grey and cut at one half, so that the contour of a small mask is smooth.
        inside = letterbox((mask == label).astype(np.uint8) * 255, size) > 127
        padded = np.pad(inside, 1, mode="edge")
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        outline[inside & ~core] = label
    return outline


def draw_mask(image: np.ndarray, mask: np.ndarray | None, size: int | None = None) -> np.ndarray:
    """The image as RGB with the contour of each mask label in its colour.

    Args:
        image: uint8 (H, W) or (H, W, 3).
        mask: uint8 label map (H, W) or None.
        size: letterbox to this many px a side; the longer side of the image by default.

    Returns:
        uint8 (size, size, 3).
    """
    size = size or max(image.shape[:2])
    pixels = letterbox(as_rgb(image), size)
    if mask is not None:
        outline = _outline(mask, size)
        for label in np.unique(outline[outline > 0]):
            pixels[outline == label] = PALETTE[(int(label) - 1) % len(PALETTE)]
    return pixels


def contact_sheet(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None] | None = None,
    captions: Sequence[str] | None = None,
    *,
    columns: int = 8,
    cell: int = 128,
) -> Image.Image:
    """Images side by side with mask contours in colour and captions below.

    Args:
        images: uint8 (H, W) or (H, W, 3), of any sizes; letterboxed to the cell.
        masks: uint8 label map per image, or None where there is none.
        captions: text per image; lines are split at newlines and cut to the cell's width.
        columns: images per row.
        cell: side of an image on the sheet, px.

    Raises:
        ValueError: no images, another number of masks or captions, or columns or cell below 1.
    """
    if not images:
        raise ValueError("images: a contact sheet needs at least one")
    if columns < 1 or cell < 1:
        raise ValueError(f"columns {columns} and cell {cell} must be at least 1")
    require_equal_lengths(len(images), masks=masks, captions=captions)
    lines = [caption.splitlines() for caption in captions or [""] * len(images)]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    text_height = _LINE * max(map(len, lines)) + (4 if captions else 0)
    width, height = columns * (cell + _GAP) + _GAP, rows * (cell + text_height + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), (24, 28, 37))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for position, image in enumerate(images):
        x = _GAP + position % columns * (cell + _GAP)
        y = _GAP + position // columns * (cell + text_height + _GAP)
        sheet.paste(Image.fromarray(draw_mask(image, masks[position] if masks else None, cell)), (x, y))
        for number, line in enumerate(lines[position]):
            at = (x, y + cell + 3 + number * _LINE)
            draw.text(at, _cut(line, cell, font), fill=(220, 225, 235), font=font)
    return sheet


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
