"""UDIAT, "Dataset B": 163 breast ultrasound images in `original/`, lesion masks of the same name in `GT/`.

The classes stand in DatasetB.xlsx, columns Image (1 or 000001) and Type (Benign, Malignant). Folders, names
and columns agree in several independent readers of the dataset; it is given on request, so no copy was opened
here. Counts differ between sources: 109 or 110 benign, 54 or 53 malignant. There are no patient numbers.
"""

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
from factory.datasets.layouts.tables import keyed_rows, matched, read_table

_TREE = """\
BUS/
├── DatasetB.xlsx            columns Image, Type
├── original/000001.png …    163 images
└── GT/000001.png …          masks of the same names
"""


def _listing(path: Path, options: ListingOptions) -> Listing:
    expected = "a folder with original/, GT/ and DatasetB.xlsx"
    root = folder_named(path, "BUS", expected)
    problems: list[Problem] = []
    rows = read_table(root / "DatasetB.xlsx", ("Image", "Type"))
    padded = [row._replace(values={**row.values, "Image": row.values["Image"].zfill(6)}) for row in rows]
    images = single_files(
        images_by_key(require_folder(root / "original", expected), r"(?P<key>.+)"), root, problems
    )
    masks = images_by_key(require_folder(root / "GT", expected), r"(?P<key>.+)")
    problems += masks_without_image(masks, images, root)
    labels = {"benign": "benign", "malignant": "malignant"}
    items = [
        Item(source_path=found.file.relative_to(root).as_posix(), label_name=found.label, image=found.file,
             masks=masks.get(found.key, []), has_lesion=True, device="Siemens ACUSON Sequoia C512")
        for found in matched(images, keyed_rows(padded, "Image", problems), "Type", labels, root, problems)
    ]  # fmt: skip
    return Listing(items=items, class_names=tuple(labels), problems=problems)


UDIAT = Layout(
    name="udiat",
    about="UDIAT / Dataset B: breast ultrasound, benign / malignant, lesion masks",
    listing=_listing,
    licence="agreement with the owners; no open licence",
    allowed_use="research under the owners' agreement; no redistribution",
    citation="Yap, Pons, Marti, Ganau, Sentis, Zwiggelaar, Davison, Marti. Automated breast ultrasound lesions detection "
    "using convolutional neural networks. IEEE JBHI 22(4) (2018) 1218–1226. doi:10.1109/JBHI.2017.2731873",
    contents="breast ultrasound; 163 images; benign, malignant; masks",
    obtain="on request from Moi Hoon Yap, Manchester Metropolitan University (Breast Ultrasound Lesions Dataset B)",
    tree=_TREE,
)
