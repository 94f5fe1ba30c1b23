"""BUS-BRA: 1875 breast ultrasound images of 1064 patients, biopsy-proven, from four scanners.

bus_data.csv has the columns ID, Case, Histology, Pathology, BIRADS, Device, Width, Height, Side, BBOX. The
image of ID `bus_0001-l` is Images/bus_0001-l.png, its mask Masks/mask_0001-l.png; Case is the patient.
Columns and names agree in four independent readers, counts with the article. 1268 benign and 607 malignant
images. Its cross-validation folds are not read: `prepare` splits by patient.
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
from factory.datasets.layouts.tables import attributes_of, keyed_rows, matched, read_table

_ATTRIBUTES = {"Histology": "histology", "BIRADS": "birads", "Side": "side"}
_TREE = """\
BUSBRA/
├── bus_data.csv                  ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX
├── Images/bus_0001-l.png …       1875 images
└── Masks/mask_0001-l.png …       masks
"""


def _listing(path: Path, options: ListingOptions) -> Listing:
    expected = "a folder with Images/, Masks/ and bus_data.csv (BUSBRA)"
    root = folder_named(path, "BUSBRA", expected)
    problems: list[Problem] = []
    columns = ("ID", "Case", "Pathology", "BIRADS", "Device", "Side")
    rows = keyed_rows(read_table(root / "bus_data.csv", columns), "ID", problems)
    images = single_files(
        images_by_key(require_folder(root / "Images", expected), r"(?P<key>bus_.+)"), root, problems
    )
    found = images_by_key(require_folder(root / "Masks", expected), r"mask_(?P<key>.+)")
    masks = {f"bus_{key}": files for key, files in found.items()}
    problems += masks_without_image(masks, images, root)
    labels = {"benign": "benign", "malignant": "malignant"}
    items = [
        Item(source_path=match.file.relative_to(root).as_posix(), label_name=match.label, image=match.file,
             masks=masks.get(match.key, []), has_lesion=True, patient_id=match.row.values["Case"] or None,
             device=match.row.values["Device"] or None, attributes=attributes_of(match.row, _ATTRIBUTES))
        for match in matched(images, rows, "Pathology", labels, root, problems)
    ]  # fmt: skip
    return Listing(items=items, class_names=tuple(labels), problems=problems)


BUS_BRA = Layout(
    name="bus_bra",
    about="BUS-BRA: breast ultrasound, benign / malignant, masks, BI-RADS category, patients known",
    listing=_listing,
    licence="CC BY 4.0 (as secondary sources give it)",
    allowed_use="research with attribution; not for clinical use",
    citation="Gomez-Flores, Gregorio-Calas, Coelho de Albuquerque Pereira. BUS-BRA: a breast ultrasound dataset for assessing "
    "computer-aided diagnosis systems. Medical Physics 51(4) (2024) 3110–3123. doi:10.1002/mp.16812",
    unit="patient level",
    contents="breast ultrasound; 1875 images of 1064 patients; benign, malignant; masks; BI-RADS category",
    obtain="Zenodo, record 8231412",
    tree=_TREE,
)
