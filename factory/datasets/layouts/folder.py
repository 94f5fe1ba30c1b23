"""Your own images: `images/NAME.png`, `masks/NAME.png` (or `NAME_mask*.png`), and optionally `labels.csv`.

Without labels.csv, folders inside images/ are the classes (`images/benign/1.png`, `masks/benign/1.png`), or all
images have the class `lesion`. labels.csv has the columns `image` (name below images/) and `label`; optional
`patient_id`, `device`, `pixel_spacing` (mm per px); every further column becomes an attribute of the row.
"""

import csv
from pathlib import Path

from factory.datasets.layout import (
    Item,
    Layout,
    Listing,
    ListingOptions,
    Problem,
    images_in,
    natural_order,
    require_folder,
)

_OWN_COLUMNS = ("image", "label", "patient_id", "device", "pixel_spacing")
Row = dict[str, str]


def _listing(path: Path, options: ListingOptions) -> Listing:
    root = require_folder(path, "a folder with images/ and masks/")
    images = require_folder(root / "images", "images/ with one file per image")
    has_masks = (root / "masks").is_dir()
    files = _images_below(images)
    problems: list[Problem] = []
    labels = _read_labels(root / "labels.csv", problems) if (root / "labels.csv").exists() else None
    by_stem = {name.rsplit(".", 1)[0]: name for name in files}
    masks = _masks_by_image(root / "masks", by_stem, problems) if has_masks else {}
    items = []
    for name, file in files.items():
        source_path = f"images/{name}"
        row = {} if labels is None else labels.get(name) or labels.get(name.rsplit(".", 1)[0])
        if row is None:
            problems.append(Problem(source_path=source_path, what="no row in labels.csv",
                                    remedy=f"add a row with image={name} and its label"))  # fmt: skip
            continue
        spacing = row.get("pixel_spacing") or None
        items.append(
            Item(source_path=source_path, label_name=row["label"] if labels else _class_of(name), image=file,
                 masks=masks.get(name, []) if has_masks else None, patient_id=row.get("patient_id") or None,
                 device=row.get("device") or None, pixel_spacing=None if spacing is None else float(spacing),
                 attributes={k: v for k, v in row.items() if k not in _OWN_COLUMNS and v})
        )  # fmt: skip
    _report_unused_rows(labels, files, problems)
    names = tuple(sorted({item.label_name for item in items}))
    return Listing(items=items, class_names=names, problems=problems)


def _class_of(name: str) -> str:
    return name.split("/")[0] if "/" in name else "lesion"


def _images_below(folder: Path) -> dict[str, Path]:
    """Path relative to `folder` → file, one level of class folders deep."""
    folders = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))]
    files = [file for place in folders for file in images_in(place)]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: names[name] for name in sorted(names, key=natural_order)}


def _masks_by_image(folder: Path, by_stem: dict[str, str], problems: list[Problem]) -> dict[str, list[Path]]:
    masks: dict[str, list[Path]] = {}
    for name, file in _images_below(folder).items():
        stem = name.rsplit(".", 1)[0]
        image = by_stem.get(stem) or by_stem.get(stem.rpartition("_mask")[0])
        if image is None:
            problems.append(Problem(source_path=f"masks/{name}", what="mask without image",
                                    remedy=f"add images/{name} or remove the mask"))  # fmt: skip
        else:
            masks.setdefault(image, []).append(file)
    return masks


def _read_labels(path: Path, problems: list[Problem]) -> dict[str, Row]:
    """Image name → row of labels.csv.

    Raises:
        ValueError: a needed column is missing, or the file is not UTF-8 text.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a UTF-8 CSV file ({error}); save it as CSV UTF-8") from error
    absent = [column for column in ("image", "label") if column not in columns]
    if absent:
        raise ValueError(f"{path}: column {' and '.join(absent)} missing; it has {', '.join(columns)}")
    labels: dict[str, Row] = {}
    for line, values in enumerate(rows, start=2):
        row = {
            key: (value or "").strip()
            for key, value in values.items()
            if isinstance(value, (str, type(None)))
        }
        problem = _row_problem(row, labels)
        if problem:
            problems.append(
                Problem(source_path=f"labels.csv line {line}", what=problem, remedy="correct the row")
            )
        elif row.get("image"):
            labels[row["image"]] = row
    return labels


def _row_problem(row: Row, labels: dict[str, Row]) -> str | None:
    if not row["image"]:
        return "no image name"
    if row["image"] in labels:
        return f"a second row for {row['image']}"
    if not row["label"]:
        return f"no label for {row['image']}"
    try:
        usable = not row.get("pixel_spacing") or float(row["pixel_spacing"]) > 0
    except ValueError:
        usable = False
    return None if usable else f"pixel_spacing {row['pixel_spacing']!r} is not a positive number of mm"


def _report_unused_rows(
    labels: dict[str, Row] | None, files: dict[str, Path], problems: list[Problem]
) -> None:
    stems = {name.rsplit(".", 1)[0] for name in files}
    for image in labels or {}:
        if image not in files and image not in stems:
            problems.append(Problem(source_path=f"labels.csv: {image}", what="row without image",
                                    remedy=f"add images/{image} or remove the row"))  # fmt: skip


FOLDER = Layout(
    name="folder",
    about="images/ + masks/ + optional labels.csv",
    listing=_listing,
    licence="not stated",
    allowed_use="unknown",
    citation="",
    contents="your own images; masks and labels optional",
    obtain="you have it",
    tree="""\
my_images/
├── labels.csv            image,label[,patient_id,device,pixel_spacing,…]; or folders as classes
├── images/a.png …
└── masks/a_mask.png …    (or a.png)
""",
)
