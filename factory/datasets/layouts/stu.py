"""STU-Hospital: 42 breast ultrasound lesions as `Hospital/Test_Image_N.png` with `Hospital/mask_N.png`.

Benign and malignant are not told apart, so there is one class. Some copies name the images `image_N.png`.
"""

import re
from pathlib import Path

from factory.datasets.layout import Item, Layout, Listing, ListingOptions, Problem, images_in, require_folder

_NAME = re.compile(r"(?P<kind>Test_Image|image|mask)_(?P<number>\d+)$", re.IGNORECASE)


def _listing(path: Path, options: ListingOptions) -> Listing:
    root = require_folder(path, "a folder with Test_Image_1.png, mask_1.png, … (STU-Hospital/Hospital)")
    folder = root / "Hospital" if (root / "Hospital").is_dir() else root
    found: dict[str, dict[int, Path]] = {"image": {}, "mask": {}}
    problems = []
    for file in images_in(folder):
        if match := _NAME.match(file.stem):
            kind = "mask" if match["kind"].lower() == "mask" else "image"
            found[kind][int(match["number"])] = file
    for number in sorted(found["mask"].keys() - found["image"].keys()):
        name = found["mask"][number].relative_to(root)
        remedy = f"add Test_Image_{number}.png or remove the mask"
        problems.append(Problem(source_path=str(name), what="mask without image", remedy=remedy))
    items = [
        Item(source_path=str(file.relative_to(root)), label_name="lesion", image=file, has_lesion=True,
             masks=[found["mask"][number]] if number in found["mask"] else [], sequence=("stu", number))
        for number, file in sorted(found["image"].items())
    ]  # fmt: skip
    return Listing(items=items, class_names=("lesion",), problems=problems)


STU = Layout(
    name="stu",
    about="STU-Hospital: Test_Image_N.png + mask_N.png, one class",
    listing=_listing,
    licence="none stated",
    allowed_use="unknown",
    citation="Zhuang, Li, Raj, Mahesh, Qiu. An RDAU-NET model for lesion segmentation in breast ultrasound images. "
    "PLoS ONE 14(8) (2019) e0221535. doi:10.1371/journal.pone.0221535",
    contents="breast ultrasound; 42 images; one class; masks",
    obtain="repository of the RDAU-NET article (STU-Hospital)",
    tree="""\
STU-Hospital/
└── Hospital/
    ├── Test_Image_1.png …    42 images
    └── mask_1.png …
""",
)
