"""PH²: 200 dermoscopic images (80 common nevi, 80 atypical nevi, 40 melanomas), one folder each.

`PH2 Dataset images/IMD003/IMD003_Dermoscopic_Image/IMD003.bmp` has the mask
`IMD003_lesion/IMD003_lesion.bmp`; masks of colours in `IMD003_roi/` are not read. PH2_dataset.txt separates
columns by `||` and `|`; Clinical Diagnosis is 0 (common nevus), 1 (atypical nevus) or 2 (melanoma). Without
it PH2_dataset.xlsx is read, where an X marks the class below twelve lines of legend. Folders, codes and both
tables were read off several independent readers, one of which documents the true files; counts and terms of
use off copies of the database page's text.
"""

import re
from pathlib import Path

from factory.datasets.layout import (
    Item,
    Layout,
    Listing,
    ListingOptions,
    Problem,
    folder_named,
    images_by_key,
    natural_order,
    require_folder,
    single_files,
)
from factory.datasets.layouts.tables import TableRow, attributes_of, keyed_rows, matched, read_table

_CLASSES = ("common_nevus", "atypical_nevus", "melanoma")
_CODES = dict(zip("012", _CLASSES))
_MARKED = {"Common Nevus": "0", "Atypical Nevus": "1", "Melanoma": "2"}
_ATTRIBUTES = {"Histological Diagnosis": "histology", "Asymmetry": "asymmetry", "Pigment Network": "pigment_network",
               "Dots/Globules": "dots_globules", "Streaks": "streaks", "Regression Areas": "regression_areas",
               "Blue-Whitish Veil": "blue_whitish_veil", "Colors": "colours"}  # fmt: skip
_TREE = """\
PH2Dataset/
├── PH2_dataset.txt          (or PH2_dataset.xlsx)
└── PH2 Dataset images/
    └── IMD003/ …            200 folders
        ├── IMD003_Dermoscopic_Image/IMD003.bmp
        ├── IMD003_lesion/IMD003_lesion.bmp
        └── IMD003_roi/ …    not read
"""


def _listing(path: Path, options: ListingOptions) -> Listing:
    expected = "a folder with 'PH2 Dataset images/' and PH2_dataset.txt or .xlsx (PH2Dataset)"
    root = folder_named(path, "PH2Dataset", expected)
    folder = require_folder(root / "PH2 Dataset images", expected)
    problems: list[Problem] = []
    found: dict[str, list[Path]] = {}
    cases = sorted(
        (p for p in folder.iterdir() if re.fullmatch(r"IMD\d+", p.name)), key=lambda p: natural_order(p.name)
    )
    for case in cases:
        place = case / f"{case.name}_Dermoscopic_Image"
        files = images_by_key(place, rf"(?P<key>{case.name})") if place.is_dir() else {}
        if not files:
            problems.append(Problem(source_path=case.relative_to(root).as_posix(), what="folder without image",
                                    remedy=f"add {place.name}/{case.name}.bmp or remove the folder"))  # fmt: skip
        found |= files
    images = single_files(found, root, problems)
    rows = keyed_rows(_rows(root), "Name", problems)
    items = [
        Item(source_path=match.file.relative_to(root).as_posix(), label_name=match.label, image=match.file,
             masks=_masks(folder / match.key, match.key), has_lesion=True,
             attributes=attributes_of(match.row, _ATTRIBUTES))
        for match in matched(images, rows, "Clinical Diagnosis", _CODES, root, problems)
    ]  # fmt: skip
    return Listing(items=items, class_names=_CLASSES, problems=problems)


def _masks(case: Path, name: str) -> list[Path]:
    place = case / f"{name}_lesion"
    return images_by_key(place, rf"(?P<key>{name})_lesion").get(name, []) if place.is_dir() else []


def _rows(root: Path) -> list[TableRow]:
    text = root / "PH2_dataset.txt"
    if text.is_file():
        return _text_rows(text)
    rows = []
    for row in read_table(root / "PH2_dataset.xlsx", ("Image Name", *_MARKED)):
        codes = [code for column, code in _MARKED.items() if row.values[column].upper() == "X"]
        values = {
            "Name": row.values["Image Name"],
            "Clinical Diagnosis": codes[0] if len(codes) == 1 else "unclear",
        }
        rows.append(TableRow(row.where, values))
    return rows


def _text_rows(path: Path) -> list[TableRow]:
    """Rows of PH2_dataset.txt; the legend below the table is left out.

    Raises:
        ValueError: no header.
    """
    rows: list[TableRow] = []
    names: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip().startswith("||"):
            continue
        cells = [
            cell.strip() for cell in re.split(r"\|\|?", line.strip().removeprefix("||").removesuffix("||"))
        ]
        if not names:
            names = cells
        elif re.fullmatch(r"IMD\d+", cells[0]):
            rows.append(TableRow(f"{path.name} line {number}", dict(zip(names, cells))))
    if not {"Name", "Clinical Diagnosis"} <= set(names):
        raise ValueError(f"{path}: no line '|| Name || … || Clinical Diagnosis || …'; download it again")
    return rows


PH2 = Layout(
    name="ph2",
    about="PH2: dermoscopy, common nevus / atypical nevus / melanoma, lesion masks",
    listing=_listing,
    licence="terms of the ADDI project: research and education, no redistribution, no commercial use",
    allowed_use="non-commercial research and education with citation; no redistribution",
    citation="Mendonça, Ferreira, Marques, Marçal, Rozeira. PH² – a dermoscopic image database for research and "
    "benchmarking. 35th Int. Conf. of the IEEE EMBS (2013) 5437–5440. doi:10.1109/EMBC.2013.6610779",
    contents="dermoscopy; 200 images; common nevus, atypical nevus, melanoma; masks",
    obtain="ADDI project, University of Porto (PH² database page)",
    tree=_TREE,
)
