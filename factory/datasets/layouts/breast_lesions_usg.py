"""BrEaST, "Breast-Lesions-USG" of The Cancer Imaging Archive: one image each of 256 patients.

The clinical table has, among others, CaseID, Image_filename, Mask_tumor_filename (several joined by '&',
empty for normal images), Mask_other_filename, Classification (benign, malignant, normal), BIRADS, Shape,
Margin, Echogenicity, Posterior_features, Halo, Calcifications, Pixel_size. Columns, values and file names
were read off several independent readers and the collection's page, not off the files. 252 images show a
lesion, 4 are normal (256 scans, 266 lesions).

Masks of other findings are left out. The prompts' two words are derived, and the radiologist's own kept
beside them:

- `echogenicity`: *heterogeneous* where Echogenicity is heterogeneous or complex cystic/solid, *homogeneous*
  where it is one uniform echo pattern (anechoic, hypoechoic, isoechoic, hyperechoic);
- `boundary`: *clear* where Margin is circumscribed, *unclear* where it is "not circumscribed" of any kind.

BI-RADS has no such pairs, so this is our reading. Pixel_size stays an attribute: its unit was not verified.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from factory.datasets.layout import (
    Item,
    Layout,
    Listing,
    ListingOptions,
    Problem,
    images_by_key,
    require_folder,
    single_files,
)
from factory.datasets.layouts.drawn_masks import without_lesion
from factory.datasets.layouts.tables import (
    Match,
    attributes_of,
    is_plain_name,
    keyed_rows,
    matched,
    read_table,
)

_COLUMNS = ("CaseID", "Image_filename", "Mask_tumor_filename", "Classification", "Margin", "Echogenicity")
_ATTRIBUTES = {"BIRADS": "birads", "Shape": "shape", "Margin": "margin", "Echogenicity": "echo_pattern",
               "Posterior_features": "posterior_features", "Halo": "halo", "Calcifications": "calcifications",
               "Diagnosis": "diagnosis", "Verification": "verification", "Age": "age",
               "Pixel_size": "pixel_size"}  # fmt: skip
_CLASSES = ("benign", "malignant", "normal")
ECHOGENICITY = {"heterogeneous": "heterogeneous", "complex cystic/solid": "heterogeneous", "anechoic": "homogeneous",
                "hypoechoic": "homogeneous", "isoechoic": "homogeneous", "hyperechoic": "homogeneous"}  # fmt: skip
_TREE = """\
Breast-Lesions-USG/
├── BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx
└── BrEaST-Lesions_USG-images_and_masks/
    ├── case001.png …            256 images
    ├── case001_tumor.png …      lesion masks
    └── case005_other1.png …     other findings, not read
"""


def _listing(path: Path, options: ListingOptions) -> Listing:
    expected = "BrEaST-Lesions_USG-images_and_masks/ and BrEaST-Lesions-USG-clinical-data….xlsx"
    root = require_folder(path, f"a folder with {expected}")
    tables = sorted(root.glob("BrEaST-Lesions-USG-clinical-data*.xlsx"))
    folders = sorted(p for p in root.glob("BrEaST-Lesions*images_and_masks*") if p.is_dir())
    if len(tables) != 1 or len(folders) != 1:
        raise FileNotFoundError(
            f"{root}: {len(folders)} such folder(s), {len(tables)} such table(s); expected {expected}"
        )
    problems: list[Problem] = []
    rows = keyed_rows(read_table(tables[0], _COLUMNS), "Image_filename", problems)
    found = single_files(images_by_key(folders[0], r"(?P<key>case\d+)"), root, problems)
    images = {file.name: file for file in found.values()}
    labels = {name: name for name in _CLASSES}
    items = [
        _item(match, root, problems)
        for match in matched(images, rows, "Classification", labels, root, problems)
    ]
    return Listing(items=items, class_names=_CLASSES, problems=problems)


def _item(match: Match, root: Path, problems: list[Problem]) -> Item:
    values = match.row.values
    source_path = match.file.relative_to(root).as_posix()
    names = [name.strip() for name in values["Mask_tumor_filename"].split("&") if name.strip()]
    bad = [name for name in names if not is_plain_name(name)]
    for name in bad:
        what = f"Mask_tumor_filename {name!r} is no plain file name"
        problems.append(Problem(source_path=match.row.where, what=what, remedy="correct the row"))
    masks = [] if bad else [match.file.with_name(name) for name in names]
    attributes = attributes_of(match.row, _ATTRIBUTES) | descriptors(values)
    if match.label == "normal" and not names:
        return Item(source_path=source_path, label_name=match.label, has_lesion=False, attributes=attributes,
                    make=partial(without_lesion, match.file, source_path), patient_id=values["CaseID"])  # fmt: skip
    return Item(source_path=source_path, label_name=match.label, image=match.file, masks=masks, attributes=attributes,
                has_lesion=match.label != "normal", patient_id=values["CaseID"])  # fmt: skip


def descriptors(values: Mapping[str, str]) -> dict[str, str]:
    """`echogenicity` and `boundary` as the labeller of prompts reads them; left out where not applicable."""
    found = {}
    if echo := ECHOGENICITY.get(values["Echogenicity"].lower()):
        found["echogenicity"] = echo
    margin = values["Margin"].lower()
    if margin.startswith(("circumscribed", "not circumscribed")):
        found["boundary"] = "unclear" if margin.startswith("not") else "clear"
    return found


BREAST = Layout(
    name="breast",
    about="BrEaST (TCIA Breast-Lesions-USG): breast ultrasound, benign / malignant / normal, masks, BI-RADS descriptors",
    listing=_listing,
    licence="CC BY 4.0",
    allowed_use="any with attribution; not for clinical use",
    citation="Pawlowska, Cwierz-Pienkowska, Domalik, Jagus, Kasprzak, Matkowski, Fura, Nowicki, Zolek. Curated benchmark "
    "dataset for ultrasound based breast lesion analysis. Scientific Data 11 (2024) 148. doi:10.1038/s41597-024-02984-z; "
    "data doi:10.7937/9WKK-Q141",
    unit="patient level",
    contents="breast ultrasound; 256 images; benign, malignant, normal; masks; BI-RADS descriptors",
    obtain="The Cancer Imaging Archive, collection Breast-Lesions-USG (doi:10.7937/9WKK-Q141)",
    tree=_TREE,
)
