"""BUSI, `Dataset_BUSI_with_GT`: benign, malignant, normal, each with images and masks side by side.

`benign (100).png` has the masks `benign (100)_mask.png`, `benign (100)_mask_1.png`, …: one per lesion. Normal
images have an empty one.
"""

import re
from pathlib import Path

from factory.datasets.layout import Item, Layout, Listing, ListingOptions, Problem, images_in, require_folder

_CLASSES = ("benign", "malignant", "normal")
_NAME = re.compile(r"(?P<stem>(?P<label>\w+) \((?P<number>\d+)\))(?P<mask>_mask(_\d+)?)?$")


def _listing(path: Path, options: ListingOptions) -> Listing:
    expected = "the folder Dataset_BUSI_with_GT with " + ", ".join(f"{name}/" for name in _CLASSES)
    root = require_folder(path, expected)
    items: list[Item] = []
    problems: list[Problem] = []
    for label in _CLASSES:
        images: dict[str, Path] = {}
        masks: dict[str, list[Path]] = {}
        for file in images_in(require_folder(root / label, expected)):
            match = _NAME.match(file.stem)
            if match is None or match["label"] != label:
                what = f"the name is not of the form '{label} (N).png' or '{label} (N)_mask.png'"
                problems.append(
                    Problem(source_path=f"{label}/{file.name}", what=what, remedy="rename or remove it")
                )
            elif match["mask"]:
                masks.setdefault(match["stem"], []).append(file)
            else:
                images[match["stem"]] = file
        for stem in masks.keys() - images.keys():
            path_of = f"{label}/{masks[stem][0].name}"
            problems.append(
                Problem(source_path=path_of, what="mask without image", remedy=f"add '{stem}.png'")
            )
        for stem, file in images.items():
            number = int(_NAME.match(stem)["number"])  # type: ignore[index]
            items.append(Item(source_path=f"{label}/{file.name}", label_name=label, image=file,
                              masks=masks.get(stem, []), has_lesion=label != "normal",
                              sequence=(label, number)))  # fmt: skip
    return Listing(items=items, class_names=_CLASSES, problems=problems)


BUSI = Layout(
    name="busi",
    about="Dataset_BUSI_with_GT: breast ultrasound, benign / malignant / normal, lesion masks",
    listing=_listing,
    licence="unverified: article CC BY 4.0, re-hosts differ",
    allowed_use="research with attribution; no redistribution; not for clinical use",
    citation="Al-Dhabyani, Gomaa, Khaled, Fahmy. Dataset of breast ultrasound images. Data in Brief 28 (2020) 104863. "
    "doi:10.1016/j.dib.2019.104863; defects: Pawlowska, Karwat, Zolek. Data in Brief 48 (2023) 109247.",
    contents="breast ultrasound; 780 images; benign, malignant, normal; masks",
    obtain="Cairo University, page of Aly Fahmy (BUSI); re-hosted in several places",
    tree="""\
Dataset_BUSI_with_GT/        (benign/, malignant/ and normal/ alike)
└── benign/
    ├── benign (1).png …
    ├── benign (1)_mask.png …      one per image
    └── benign (4)_mask_1.png …    further lesions
""",
)
