"""BUS-UCLM: 683 breast ultrasound images of 38 patients, with coloured masks of the same name.

In `masks/` green is benign, red malignant, black neither; both count as lesion, as in the authors' own
scripts, where a pixel counts if the green or the red channel is 255. INFO.csv is separated by semicolons and
has at least Image (file name) and Label (Normal, Benign, Malignant), further Doppler, Marks, Combined and
Resolution. The four letters before the underscore name the patient (the authors split by them). Names,
colours and the patient code were read off the authors' published scripts, the columns off independent
readers. 419 normal, 174 benign, 90 malignant.

Licence: sources name CC BY 4.0 as well as CC BY-NC; the stricter is recorded until you have read the
deposit's page.
"""

from functools import partial
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
from factory.datasets.layouts.drawn_masks import with_coloured_mask
from factory.datasets.layouts.tables import attributes_of, keyed_rows, matched, read_table

_LABELS = {"benign": "benign", "malignant": "malignant", "normal": "normal"}
_TREE = """\
BUS-UCLM/
├── INFO.csv                 Image;Label;Doppler;Marks;Combined;…
├── images/ALWI_000.png …    683 images; the letters name the patient
└── masks/ALWI_000.png …     green benign, red malignant, black neither
"""


def _listing(path: Path, options: ListingOptions) -> Listing:
    expected = "a folder with images/, masks/ and INFO.csv (BUS-UCLM)"
    root = folder_named(path, "BUS-UCLM", expected)
    problems: list[Problem] = []
    rows = keyed_rows(read_table(root / "INFO.csv", ("Image", "Label"), delimiter=";"), "Image", problems)
    name = r"(?P<key>[A-Za-z]+_\d+)"
    found = single_files(images_by_key(require_folder(root / "images", expected), name), root, problems)
    masks = images_by_key(require_folder(root / "masks", expected), name)
    problems += masks_without_image(masks, found, root)
    items = []
    images = {file.name: file for file in found.values()}
    for match in matched(images, rows, "Label", _LABELS, root, problems):
        source_path = match.file.relative_to(root).as_posix()
        case, _, number = match.file.stem.partition("_")
        if match.file.stem not in masks:
            problems.append(Problem(source_path=source_path, what="image without mask",
                                    remedy=f"add masks/{match.key}, or remove the image"))  # fmt: skip
            continue
        make = partial(with_coloured_mask, match.file, masks[match.file.stem][0], source_path)
        attributes = attributes_of(
            match.row, {"Doppler": "doppler", "Marks": "marks", "Combined": "combined"}
        )
        items.append(Item(source_path=source_path, label_name=match.label, make=make, patient_id=case,
                          has_lesion=match.label != "normal", sequence=(case, int(number)),
                          device="Siemens ACUSON S2000", attributes=attributes))  # fmt: skip
    return Listing(items=items, class_names=tuple(_LABELS), problems=problems)


BUS_UCLM = Layout(
    name="bus_uclm",
    about="BUS-UCLM: breast ultrasound, benign / malignant / normal, coloured masks, patients known",
    listing=_listing,
    licence="unverified: CC BY 4.0 or CC BY-NC, sources differ",
    allowed_use="non-commercial research with attribution; not for clinical use",
    citation="Vallez, Bueno, Deniz, Rienda, Pastor. BUS-UCLM: breast ultrasound lesion segmentation dataset. Scientific "
    "Data 12 (2025) 242. doi:10.1038/s41597-025-04562-3; data doi:10.17632/7fvgj4jsp7",
    unit="patient level",
    contents="breast ultrasound; 683 images of 38 patients; benign, malignant, normal; masks",
    obtain="Mendeley Data, 7fvgj4jsp7 (doi:10.17632/7fvgj4jsp7)",
    tree=_TREE,
)
