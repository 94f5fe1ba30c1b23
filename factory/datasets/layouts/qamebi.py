"""QAMEBI (also called BUID): 232 breast ultrasound images in `Benign/` and `Malignant/`.

`12 Benign Image.bmp` has the mask `12 Benign Mask.tif`; `12 Benign Lesion.bmp` is the same image with the
outline drawn in and is not read. One source counts 236 masks, so several per image (`12 Benign Mask 2.tif`,
in any spelling that starts with Mask) are merged. Folders and names agree in four independent readers; the
names of second masks and the licence could not be verified, and patients are not numbered. 109 benign, 123
malignant.
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

_CLASSES = ("benign", "malignant")
_TREE = """\
QAMEBI/
├── Benign/
│   ├── 1 Benign Image.bmp …     109 images
│   ├── 1 Benign Lesion.bmp …    outline drawn in, not read
│   └── 1 Benign Mask.tif …      masks
└── Malignant/
    ├── 1 Malignant Image.bmp …  123 images
    └── 1 Malignant Mask.tif …
"""


def _listing(path: Path, options: ListingOptions) -> Listing:
    expected = "a folder with Benign/ and Malignant/ (QAMEBI)"
    root = require_folder(path, expected)
    items: list[Item] = []
    problems: list[Problem] = []
    for label in _CLASSES:
        folder = require_folder(root / label.capitalize(), expected)
        name = rf"(?P<key>\d+) {label.capitalize()}"
        images = single_files(images_by_key(folder, rf"{name} Image"), root, problems)
        masks = images_by_key(folder, rf"{name} Mask.*")
        problems += masks_without_image(masks, images, root)
        items += [
            Item(source_path=file.relative_to(root).as_posix(), label_name=label, image=file,
                 masks=masks.get(number, []), has_lesion=True, sequence=(label, int(number)))
            for number, file in images.items()
        ]  # fmt: skip
    return Listing(items=items, class_names=_CLASSES, problems=problems)


QAMEBI = Layout(
    name="qamebi",
    about="QAMEBI / BUID: breast ultrasound, benign / malignant, lesion masks",
    listing=_listing,
    licence="unverified: none found",
    allowed_use="unknown",
    citation="Ardakani, Mohammadi, Mirza-Aghazadeh-Attari, Acharya. An open-access breast lesion ultrasound image database. "
    "Computers in Biology and Medicine 152 (2023) 106438. doi:10.1016/j.compbiomed.2022.106438",
    contents="breast ultrasound; 232 images; benign, malignant; masks",
    obtain="the QAMEBI site (qamebi.com), breast ultrasound images database",
    tree=_TREE,
)
