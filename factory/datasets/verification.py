"""Opening and checking every file of a dataset, the same way for every layout.

A bad item raises `BadItem` with a `Problem` that names the file and what to do. Nothing is repaired silently:
16-bit images are refused, masks must be binary and of the image's size.
"""

import concurrent.futures
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from factory.datasets.layout import Item, Problem
from factory.datasets.marks import find_marks
from factory.imaging import RASTER_FORMATS

OnError = Literal["fail", "quarantine"]
_SHOWN_PROBLEMS = 20
_MIN_SIDE = 16


class BadItem(ValueError):
    """An item that cannot be used; `problem` says why and what to do."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class VerifiedImage:
    """An opened item that passed every check.

    Attributes:
        item: where it came from.
        image: uint8, (H, W) where all channels are equal, else (H, W, 3).
        mask: uint8 (H, W), lesion = 1, or None where the dataset has no masks.
        has_marks: calipers, text or colour burned in (heuristic).
        attributes: of the item and of its pixels.
    """

    item: Item
    image: np.ndarray
    mask: np.ndarray | None
    has_marks: bool
    attributes: Mapping[str, str]


def verify_item(item: Item) -> VerifiedImage:
    """Open and check one item.

    Raises:
        BadItem: unreadable or truncated file, 16-bit image, no mask, mask of another size, mask that is not
            binary, empty mask in a lesion class, mask that is not empty in a class without lesions.
    """
    if item.make is not None:
        image, mask, attributes = item.make()
        attributes = {**item.attributes, **attributes}
    else:
        assert item.image is not None
        image, attributes = _read_image(item, item.image), item.attributes
        mask = None if item.masks is None else _merged_mask(item, image.shape[:2])
    if min(image.shape[:2]) < _MIN_SIDE:
        raise _bad(item, f"image is only {_size(image.shape)} px", f"want at least {_MIN_SIDE} px a side")
    if mask is not None:
        _check_area(item, mask)
    return VerifiedImage(
        item=item, image=image, mask=mask, has_marks=find_marks(image).any, attributes=attributes
    )


def verify_items(
    items: Iterable[Item],
    found: Iterable[Problem] = (),
    *,
    on_error: OnError = "fail",
    max_quarantined: float = 0.1,
    num_threads: int = 4,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[VerifiedImage], list[Problem]]:
    """Check every item, then decide: all problems are collected first, so one run names them all.

    Args:
        items: what a layout listed.
        found: problems the listing itself has.
        on_error: "fail" raises if there is any problem, "quarantine" leaves those items out.
        max_quarantined: greatest share of problems among all items that "quarantine" accepts.
        num_threads: files opened at the same time.
        progress: called with the number of items done.

    Returns:
        (usable images in the order given, problems).

    Raises:
        ValueError: problems with on_error="fail", more than `max_quarantined` of them, or nothing usable.
    """
    items = list(items)
    problems = list(found)
    images: list[VerifiedImage] = []
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for outcome in pool.map(_outcome, items):
            if isinstance(outcome, Problem):
                problems.append(outcome)
            else:
                images.append(outcome)
            progress(1)
    if problems and on_error == "fail":
        raise ValueError(_listed(problems, "correct them, or leave them out with --on-error quarantine"))
    if len(problems) > max_quarantined * max(1, len(items)):
        advice = (
            f"more than --max-quarantined {max_quarantined:g} of {len(items)} items: is it the right layout?"
        )
        raise ValueError(_listed(problems, advice))
    if not images:
        raise ValueError("no image found: is PATH the folder this layout expects?")
    return images, problems


def _outcome(item: Item) -> VerifiedImage | Problem:
    try:
        return verify_item(item)
    except BadItem as error:
        return error.problem


def _listed(problems: list[Problem], advice: str) -> str:
    lines = [
        f"{len(problems)} problem(s); {advice}",
        *(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]),
    ]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  … and {len(problems) - _SHOWN_PROBLEMS} more")
    return "\n".join(lines)


def _bad(item: Item, what: str, remedy: str, file: Path | None = None) -> BadItem:
    path = item.source_path
    if file is not None and item.image is not None and file != item.image:
        path = f"{path} (mask {file.name})"
    return BadItem(Problem(source_path=path, what=what, remedy=remedy))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"


def _open(item: Item, file: Path) -> Image.Image:
    """A fully loaded 8-bit (or 1-bit) picture."""
    picture: Image.Image
    try:
        with file.open("rb") as stream:
            head = stream.read(26)
            if (
                len(head) == 26 and head.startswith(b"\x89PNG") and head[24] == 16
            ):  # Pillow truncates 16-bit RGB
                raise _bad(item, "16 bits per channel", "convert it to 8 bits with a stated window", file)
            stream.seek(0)
            picture = Image.open(stream, formats=RASTER_FORMATS)
            picture.load()
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        if isinstance(error, BadItem):
            raise
        kind = "cannot be read as an image" if isinstance(error, UnidentifiedImageError) else "damaged"
        raise _bad(
            item, f"{kind} ({_reason(error)})", "replace the file with an intact copy", file
        ) from error
    if picture.mode.startswith(("I", "F")):
        what = f"more than 8 bits per channel (mode {picture.mode})"
        raise _bad(item, what, "convert it to 8 bits with a stated window", file)
    if (num_frames := getattr(picture, "n_frames", 1)) > 1:
        raise _bad(item, f"{num_frames} frames in one file", "save one frame per file", file)
    return picture


def _reason(error: Exception) -> str:
    return (
        f"none of {', '.join(RASTER_FORMATS)}"
        if isinstance(error, UnidentifiedImageError)
        else str(error) or type(error).__name__
    )


def _pixels(item: Item, picture: Image.Image, file: Path) -> np.ndarray:
    """uint8 (H, W) where all channels are equal, else (H, W, 3); transparency only where it hides nothing."""
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"))
    if "A" in picture.mode or "transparency" in picture.info:
        rgba = np.asarray(picture.convert("RGBA"))
        if (rgba[..., 3] != 255).any():
            raise _bad(item, "is partly transparent", "flatten it onto a background", file)
        pixels = np.ascontiguousarray(rgba[..., :3])
    else:
        pixels = np.asarray(picture.convert("RGB"))
    is_grey = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()
    return np.ascontiguousarray(pixels[..., 0]) if is_grey else pixels


def _read_image(item: Item, file: Path) -> np.ndarray:
    return _pixels(item, _open(item, file), file)


def _merged_mask(item: Item, shape: tuple[int, int]) -> np.ndarray:
    if not item.masks:
        raise _bad(item, "image without mask", "add its mask, or remove the image")
    merged = np.zeros(shape, np.uint8)
    for file in item.masks:
        pixels = _pixels(item, _open(item, file), file)
        if pixels.ndim != 2:
            raise _bad(item, "mask is coloured", "save it with two grey levels: 0 and 255", file)
        if pixels.shape != shape:
            what = f"mask is {_size(pixels.shape)} px, the image {_size(shape)} px"
            raise _bad(item, what, "save the mask at the size of its image, by nearest neighbour", file)
        levels = np.unique(pixels)
        if len(levels) > 2 or (len(levels) == 2 and levels[0] != 0):
            what = f"mask is not binary ({len(levels)} grey levels, {levels[0]} … {levels[-1]})"
            raise _bad(item, what, "threshold it and save it as PNG with the levels 0 and 255", file)
        merged |= pixels > 0
    return merged


def _check_area(item: Item, mask: np.ndarray) -> None:
    if mask.dtype != np.uint8 or mask.max(initial=0) > 1:
        raise _bad(item, f"mask has dtype {mask.dtype} and values up to {mask.max()}", "want uint8 0 and 1")
    if item.has_lesion and not mask.any():
        raise _bad(
            item, f"empty mask in the lesion class {item.label_name!r}", "outline the lesion or relabel it"
        )
    if item.has_lesion is False and mask.any():
        remedy = "empty the mask or relabel the image"
        raise _bad(item, f"mask with a lesion in the class {item.label_name!r}", remedy)
    if mask.all():
        raise _bad(item, "mask covers the whole image", "is it inverted, or the wrong file?")
