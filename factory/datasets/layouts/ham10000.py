"""HAM10000: 10015 dermoscopic images of 7470 lesions, seven diagnoses.

HAM10000_metadata.csv (or without ending, or .tab, as Dataverse serves it) has the columns lesion_id,
image_id, dx, dx_type, age, sex, localization, in later versions dataset. Images lie in HAM10000_images_part_1
and _part_2, the later masks in HAM10000_segmentations_lesion_tschandl (`ISIC_0024306_segmentation.png`);
without that folder there are no masks. Images of one lesion stay together through `patient_id`, which holds
lesion_id: patients are not published. Names and columns were read off many independent readers. The training
images of ISIC 2018 task 3 are the same ones.
"""

from pathlib import Path

from factory.datasets.layout import (
    Item,
    Layout,
    Listing,
    ListingOptions,
    Problem,
    images_by_key,
    masks_without_image,
    require_folder,
    single_files,
)
from factory.datasets.layouts.tables import attributes_of, keyed_rows, matched, read_table

_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
_ATTRIBUTES = {
    "dx_type": "dx_type",
    "age": "age",
    "sex": "sex",
    "localization": "localization",
    "dataset": "origin",
}
_TABLES = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
_MASKS = "HAM10000_segmentations_lesion_tschandl"
_TREE = """\
HAM10000/
├── HAM10000_metadata.csv                         lesion_id,image_id,dx,dx_type,age,sex,localization
├── HAM10000_images_part_1/ISIC_0024306.jpg …
├── HAM10000_images_part_2/ISIC_0029306.jpg …
└── HAM10000_segmentations_lesion_tschandl/ISIC_0024306_segmentation.png …    (may be left out)
"""


def _listing(path: Path, options: ListingOptions) -> Listing:
    root = require_folder(path, "a folder with HAM10000_metadata.csv and HAM10000_images_part_1/")
    folders = [
        root / name for name in ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_images")
    ]
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        raise FileNotFoundError(f"{root}: no HAM10000_images_part_1/; unpack the archives there")
    problems: list[Problem] = []
    found: dict[str, list[Path]] = {}
    for folder in present:
        for key, files in images_by_key(folder, r"(?P<key>ISIC_\d+)").items():
            found.setdefault(key, []).extend(files)
    images = single_files(found, root, problems)
    masks = (
        images_by_key(root / _MASKS, r"(?P<key>ISIC_\d+)_segmentation") if (root / _MASKS).is_dir() else None
    )
    problems += masks_without_image(masks or {}, images, root)
    table = next((root / name for name in _TABLES if (root / name).is_file()), root / _TABLES[0])
    delimiter = "\t" if table.suffix == ".tab" else ","
    rows = keyed_rows(
        read_table(table, ("lesion_id", "image_id", "dx"), delimiter=delimiter), "image_id", problems
    )
    items = [
        Item(source_path=match.file.relative_to(root).as_posix(), label_name=match.label, image=match.file,
             masks=None if masks is None else masks.get(match.key, []), has_lesion=None if masks is None else True,
             patient_id=match.row.values["lesion_id"] or None, attributes=attributes_of(match.row, _ATTRIBUTES))
        for match in matched(images, rows, "dx", {name: name for name in _CLASSES}, root, problems)
    ]  # fmt: skip
    return Listing(items=items, class_names=_CLASSES, problems=problems)


HAM10000 = Layout(
    name="ham10000",
    about="HAM10000: dermoscopy, seven classes, lesion masks where their folder is there, lesions known",
    listing=_listing,
    licence="CC BY-NC 4.0 (as secondary sources give it; some copies say CC BY-NC-SA 4.0)",
    allowed_use="non-commercial research with attribution",
    citation="Tschandl, Rosendahl, Kittler. The HAM10000 dataset, a large collection of multi-source dermatoscopic images of "
    "common pigmented skin lesions. Scientific Data 5 (2018) 180161. doi:10.1038/sdata.2018.161; "
    "data doi:10.7910/DVN/DBW86T",
    unit="lesion level, patients unknown",
    contents="dermoscopy; 10015 images of 7470 lesions; akiec, bcc, bkl, df, mel, nv, vasc; masks optional",
    obtain="Harvard Dataverse (doi:10.7910/DVN/DBW86T)",
    tree=_TREE,
)
