"""ISIC challenges 2017 and 2018: dermoscopy, as the archives of the challenge site unpack.

ISIC 2017 has one set of images for all tasks (2000 training, 150 validation, 600 test): Part 1 gives masks
(`ISIC_0000000_segmentation.png`), Part 3 a table image_id, melanoma, seborrheic_keratosis; neither is a
nevus. 374, 254 and 1372 in training, as the challenge page says. `…_superpixels.png` beside the images is not
read. Without the Part 3 tables all images have the class `lesion`, without the Part 1 folders there are no
masks.

ISIC 2018 has two sets: task 1 with masks (2594, 100, 1000 images) and task 3 with a one-hot table image, MEL,
NV, BCC, AKIEC, BKL, DF, VASC (10015, 193, 1512). Its training images are HAM10000; LesionGroupings.csv
(image, lesion_id) says which show one lesion. Names of archives and tables were read off many independent
readers and download scripts, not off the files. The official split is kept as an attribute only: `prepare`
splits anew, by group.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.datasets.layout import (
    Item,
    Layout,
    Listing,
    ListingOptions,
    Problem,
    folder_named,
    images_by_key,
    masks_without_image,
    require_folder,
    single_files,
)
from factory.datasets.layouts.tables import TableRow, keyed_rows, matched, read_table

ISIC_2017_CLASSES = ("melanoma", "nevus", "seborrheic_keratosis")
ISIC_2018_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
_IMAGE = r"(?P<key>ISIC_\d+)"
_MASK = r"(?P<key>ISIC_\d+)_segmentation"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Names below the root of one part (training, validation, test) of a challenge."""

    split: str
    images: str
    masks: str | None = None
    table: str | None = None


def _present(path: Path, parts: Sequence[_Part]) -> tuple[Path, list[_Part]]:
    root = require_folder(path, f"a folder with {parts[0].images}/")
    found = [part for part in parts if (root / part.images).is_dir()]
    if not found:
        raise FileNotFoundError(
            f"{root}: no {' or '.join(part.images for part in parts)}; unpack the archives there"
        )
    return root, found


def _all_or_none(root: Path, names: Iterable[str], what: str) -> bool:
    """Whether all of `names` are there; False where none is.

    Raises:
        FileNotFoundError: some are there and some not.
    """
    absent = {name: not (root / name).exists() for name in names}
    if any(absent.values()) and not all(absent.values()):
        missing = ", ".join(name for name, is_absent in absent.items() if is_absent)
        raise FileNotFoundError(
            f"{root}: {missing} missing, while other parts have {what}; unpack all parts or fewer"
        )
    return not any(absent.values())


def _one_hot(
    path: Path, key: str, columns: Mapping[str, str], rest: str | None, problems: list[Problem]
) -> dict[str, TableRow]:
    """Rows by image, their class under "class": the column that is 1, `rest` where none is.

    A row that is not one-hot has its values there instead, which is no class, and so a problem further on.
    """
    rows = {}
    for name, row in keyed_rows(read_table(path, (key, *columns)), key, problems).items():
        given = [row.values[column] for column in columns]
        hot = [label for value, label in zip(given, columns.values()) if value in ("1", "1.0")]
        is_one_class = len(hot) == 1 or (not hot and rest is not None)
        if not is_one_class or not set(given) <= {"0", "0.0", "1", "1.0"}:
            label = ", ".join(f"{column}={value}" for column, value in zip(columns, given))
        else:
            label = hot[0] if hot else str(rest)
        rows[name] = row._replace(values={"class": label})
    return rows


def _items(
    root: Path, part: _Part, rows: Mapping[str, TableRow] | None, has_masks: bool, names: Sequence[str],
    lesions: Mapping[str, TableRow], problems: list[Problem],
) -> list[Item]:  # fmt: skip
    folder = folder_named(root / part.images, part.images, part.images)
    images = single_files(images_by_key(folder, _IMAGE), root, problems)
    masks: dict[str, list[Path]] = {}
    if has_masks and part.masks:
        masks = images_by_key(folder_named(root / part.masks, part.masks, part.masks), _MASK)
        problems += masks_without_image(masks, images, root)
    if rows is None:
        rows = {key: TableRow(key, {"class": names[0]}) for key in images}
    return [
        Item(source_path=match.file.relative_to(root).as_posix(), label_name=match.label, image=match.file,
             masks=masks.get(match.key, []) if has_masks else None, has_lesion=True if has_masks else None,
             patient_id=lesions[match.key].values["lesion_id"] if match.key in lesions else None,
             attributes={"official_split": part.split})
        for match in matched(images, rows, "class", {name: name for name in names}, root, problems)
    ]  # fmt: skip


def _listing_2017(path: Path, options: ListingOptions) -> Listing:
    names = {"train": "Training", "val": "Validation", "test": "Test_v2"}
    root, parts = _present(path, [
        _Part(split=split, images=f"ISIC-2017_{name}_Data", masks=f"ISIC-2017_{name}_Part1_GroundTruth",
              table=f"ISIC-2017_{name}_Part3_GroundTruth.csv")
        for split, name in names.items()
    ])  # fmt: skip
    has_masks = _all_or_none(root, [str(part.masks) for part in parts], "masks")
    has_labels = _all_or_none(root, [str(part.table) for part in parts], "labels")
    columns = {"melanoma": "melanoma", "seborrheic_keratosis": "seborrheic_keratosis"}
    classes = ISIC_2017_CLASSES if has_labels else ("lesion",)
    problems: list[Problem] = []
    items: list[Item] = []
    for part in parts:
        table = root / str(part.table)
        rows = _one_hot(table, "image_id", columns, "nevus", problems) if has_labels else None
        items += _items(root, part, rows, has_masks, classes, {}, problems)
    return Listing(items=items, class_names=classes, problems=problems)


def _listing_2018_task1(path: Path, options: ListingOptions) -> Listing:
    names = {"train": "Training", "val": "Validation", "test": "Test"}
    root, parts = _present(path, [
        _Part(split=split, images=f"ISIC2018_Task1-2_{name}_Input", masks=f"ISIC2018_Task1_{name}_GroundTruth")
        for split, name in names.items()
    ])  # fmt: skip
    problems: list[Problem] = []
    for part in parts:
        require_folder(root / str(part.masks), f"the masks of {part.images}")
    items = [item for part in parts for item in _items(root, part, None, True, ("lesion",), {}, problems)]
    return Listing(items=items, class_names=("lesion",), problems=problems)


def _listing_2018_task3(path: Path, options: ListingOptions) -> Listing:
    names = {"train": "Training", "val": "Validation", "test": "Test"}
    root, parts = _present(path, [
        _Part(split=split, images=f"ISIC2018_Task3_{name}_Input",
              table=f"ISIC2018_Task3_{name}_GroundTruth/ISIC2018_Task3_{name}_GroundTruth.csv")
        for split, name in names.items()
    ])  # fmt: skip
    problems: list[Problem] = []
    grouping = root / "ISIC2018_Task3_Training_LesionGroupings.csv"
    lesions: dict[str, TableRow] = {}
    if any(part.split == "train" for part in parts):
        lesions = keyed_rows(read_table(grouping, ("image", "lesion_id")), "image", problems)
    columns = {name.upper(): name for name in ISIC_2018_CLASSES}
    items: list[Item] = []
    for part in parts:
        rows = _one_hot(root / str(part.table), "image", columns, None, problems)
        items += _items(root, part, rows, False, ISIC_2018_CLASSES, lesions, problems)
    return Listing(items=items, class_names=ISIC_2018_CLASSES, problems=problems)


_OBTAIN = "ISIC challenge data page (challenge.isic-archive.com/data)"
_CITATION_2018 = (
    "Codella, Rotemberg, Tschandl, Celebi, Dusza, Gutman, Helba, Kalloo, Liopyris, Marchetti, Kittler, Halpern. Skin lesion "
    "analysis toward melanoma detection 2018. arXiv:1902.03368; Tschandl, Rosendahl, Kittler. The HAM10000 dataset. "
    "Scientific Data 5 (2018) 180161. doi:10.1038/sdata.2018.161"
)

ISIC_2017 = Layout(
    name="isic2017",
    about="ISIC 2017: dermoscopy, melanoma / nevus / seborrheic keratosis (Part 3), lesion masks (Part 1)",
    listing=_listing_2017,
    licence="CC0 1.0 (as secondary sources give it)",
    allowed_use="any; cite the challenge",
    citation="Codella, Gutman, Celebi, Helba, Marchetti, Dusza, Kalloo, Liopyris, Mishra, Kittler, Halpern. Skin lesion "
    "analysis toward melanoma detection: a challenge at ISBI 2017. ISBI (2018) 168–172. arXiv:1710.05006",
    contents="dermoscopy; 2750 images; melanoma, nevus, seborrheic keratosis; masks",
    obtain=_OBTAIN,
    tree="""\
ISIC2017/                                          (also Validation and Test_v2 in place of Training)
├── ISIC-2017_Training_Data/ISIC_0000000.jpg …
├── ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png …
└── ISIC-2017_Training_Part3_GroundTruth.csv       image_id,melanoma,seborrheic_keratosis
""",
)

ISIC_2018_TASK1 = Layout(
    name="isic2018_task1",
    about="ISIC 2018 task 1: dermoscopy, one class, lesion masks",
    listing=_listing_2018_task1,
    licence="CC BY-NC 4.0 (as secondary sources give it)",
    allowed_use="non-commercial research with attribution",
    citation=_CITATION_2018,
    contents="dermoscopy; 3694 images; one class; masks",
    obtain=_OBTAIN,
    tree="""\
ISIC2018/                                          (also Validation and Test in place of Training)
├── ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg …
└── ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png …
""",
)

ISIC_2018_TASK3 = Layout(
    name="isic2018_task3",
    about="ISIC 2018 task 3: dermoscopy, seven classes, no masks; lesions of the training images known",
    listing=_listing_2018_task3,
    licence="CC BY-NC 4.0 (as secondary sources give it)",
    allowed_use="non-commercial research with attribution",
    citation=_CITATION_2018,
    unit="lesion level in the training images, image-group level in the others; patients unknown",
    contents="dermoscopy; 11720 images; akiec, bcc, bkl, df, mel, nv, vasc; no masks",
    obtain=_OBTAIN,
    tree="""\
ISIC2018/                                          (also Validation and Test in place of Training)
├── ISIC2018_Task3_Training_Input/ISIC_0024306.jpg …
├── ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv    image,MEL,NV,BCC,AKIEC,BKL,DF,VASC
└── ISIC2018_Task3_Training_LesionGroupings.csv    image,lesion_id,diagnosis_confirm_type
""",
)
