"""What a dataset layout is: where its images, masks and labels are, and what may be done with them.

A layout lists items; it opens no image. `factory.datasets.verification` opens and checks every item the same
way, whatever the layout.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class Pixels(NamedTuple):
    """What `Item.make` returns: uint8 (H, W) or (H, W, 3), uint8 (H, W) or None, further attributes."""

    image: np.ndarray
    mask: np.ndarray | None
    attributes: Mapping[str, str] = {}  # a default of a NamedTuple, never written to


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why an item cannot be used, and what its owner can do.

    Attributes:
        source_path: the file, relative to the source folder where it lies below it.
        what: what is wrong.
        remedy: what to do.
    """

    source_path: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.source_path}: {self.what}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a dataset, not opened yet: files, or a function that makes the pixels.

    Attributes:
        source_path: path relative to the source folder, or the name of a made item.
        label_name: class name.
        image: the image file; None where `make` is given.
        masks: mask files of the image, merged by OR; None where the dataset has no masks.
        make: returns the pixels, for datasets that are not files.
        has_lesion: True: an empty mask is an error. False: a mask that is not empty is one. None: either.
        patient_id: as the dataset gives it.
        sequence: name and number where file names are numbered: neighbours may be of one examination.
        device: scanner or camera where known.
        pixel_spacing: mm per px where known.
        attributes: free descriptors.
    """

    source_path: str
    label_name: str
    image: Path | None = None
    masks: Sequence[Path] | None = ()
    make: Callable[[], Pixels] | None = None
    has_lesion: bool | None = None
    patient_id: str | None = None
    sequence: tuple[str, int] | None = None
    device: str | None = None
    pixel_spacing: float | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.image is None) == (self.make is None):
            raise ValueError(f"item {self.source_path}: needs either an image file or a function")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a layout found.

    Attributes:
        items: one per image, in a stable order.
        class_names: label order.
        problems: what is wrong with the set of files, before any is opened.
        settings: choices of the layout that determine the rows; kept in the table's metadata.
    """

    items: Sequence[Item]
    class_names: tuple[str, ...]
    problems: Sequence[Problem] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ListingOptions:
    """Choices for datasets that are made rather than found.

    Attributes:
        num_images: how many to make; None for the layout's default.
        seed: of the population.
    """

    num_images: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A public dataset layout.

    Attributes:
        name: as on the command line.
        about: one line of help.
        listing: from the folder (or file) to what is in it.
        is_made: the layout makes its images and reads no path; `ListingOptions` apply to it alone.
        licence: of the images, as far as known.
        allowed_use: what that licence allows; "unknown" where not known.
        citation: what to cite.
        unit: what the splits keep apart: patients, or image groups where patients are unknown.
        contents: modality, number of images, classes, masks.
        obtain: where the dataset comes from.
        tree: the folder this layout expects, as text.
    """

    name: str
    about: str
    listing: Callable[[Path, ListingOptions], Listing]
    licence: str
    allowed_use: str
    citation: str
    unit: str = "image-group level, patients unknown"
    is_made: bool = False
    contents: str = ""
    obtain: str = ""
    tree: str = ""


def require_folder(path: Path, expected: str) -> Path:
    """`path` if it is a folder.

    Raises:
        FileNotFoundError: it is not there, or is a file; says what was expected.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; expected {expected}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: is a file; expected {expected}")
    return path


def images_in(folder: Path) -> list[Path]:
    """Image files directly in `folder`, by name, numbers in numeric order; hidden files left out."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(files, key=lambda path: natural_order(path.name))


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts 'benign (2)' before 'benign (10)'."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def folder_named(path: Path, name: str, expected: str) -> Path:
    """`path`/`name` if that folder is there, else `path` itself: archives unpack with and without their top folder.

    Raises:
        FileNotFoundError: `path` is no folder.
    """
    root = require_folder(path, expected)
    return root / name if (root / name).is_dir() else root


def images_by_key(folder: Path, pattern: str) -> dict[str, list[Path]]:
    """Image files directly in `folder` whose name without suffix matches `pattern` as a whole, by its group `key`."""
    found: dict[str, list[Path]] = {}
    for file in images_in(folder):
        if match := re.fullmatch(pattern, file.stem):
            found.setdefault(match["key"], []).append(file)
    return found


def single_files(found: Mapping[str, Sequence[Path]], root: Path, problems: list[Problem]) -> dict[str, Path]:
    """The one file of each key; a second one becomes a problem."""
    for files in found.values():
        for extra in files[1:]:
            what = f"a second image of the name of {files[0].name}"
            problems.append(
                Problem(
                    source_path=extra.relative_to(root).as_posix(), what=what, remedy="remove one of them"
                )
            )
    return {key: files[0] for key, files in found.items()}


def masks_without_image(
    masks: Mapping[str, Sequence[Path]], images: Mapping[str, Path], root: Path
) -> list[Problem]:
    """A problem for every key of `masks` that `images` lacks."""
    return [
        Problem(source_path=masks[key][0].relative_to(root).as_posix(), what="mask without image",
                remedy=f"add the image of {key} or remove the mask")
        for key in sorted(masks.keys() - images.keys(), key=natural_order)
    ]  # fmt: skip
