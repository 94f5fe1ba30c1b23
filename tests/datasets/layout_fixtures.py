"""Small folders in exactly the layouts of public datasets, made of phantoms, and XLSX files without a library."""

import json
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from factory.datasets.phantom import PhantomConfig, phantom_sample

SIDE = 64
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_LINK = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
Cell = str | int | float | None


@cache
def phantom(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask, uint8 (SIDE, SIDE), lesion = 255; different for every index."""
    sample = phantom_sample(PhantomConfig(size=SIDE), 5, index)
    return sample.image, sample.mask * 255


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write a picture, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def box(top: int, left: int, height: int = 12, width: int = 20) -> np.ndarray:
    """A mask, uint8 (SIDE, SIDE), 255 in one rectangle."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[top : top + height, left : left + width] = 255
    return mask


def coloured(mask: np.ndarray, channel: int) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3), the mask in one channel."""
    drawn = np.zeros((*mask.shape, 3), np.uint8)
    drawn[..., channel] = mask
    return drawn


def write_xlsx(path: Path, rows: Sequence[Sequence[Cell]]) -> Path:
    """An XLSX file as Excel writes it: shared strings, empty cells left out. Its sheet is not called sheet1.xml."""
    strings: list[str] = []
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for column, value in enumerate(row):
            reference = f"{chr(ord('A') + column)}{number}"
            if isinstance(value, str):
                strings.append(value)
                cells.append(f'<c r="{reference}" t="s"><v>{len(strings) - 1}</v></c>')
            elif value is not None:
                cells.append(f'<c r="{reference}"><v>{value}</v></c>')
        if cells:
            lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    items = "".join(f"<si><r><t>{escape(s[:1])}</t></r><r><t>{escape(s[1:])}</t></r></si>" for s in strings)
    relation = "http://schemas.openxmlformats.org/package/2006/relationships"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", f'<workbook xmlns="{_MAIN}" xmlns:r="{_LINK}"><sheets>'
                         '<sheet name="clinical" sheetId="4" r:id="rId7"/></sheets></workbook>')  # fmt: skip
        archive.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{relation}">'
                         '<Relationship Id="rId7" Target="worksheets/clinical.xml"/></Relationships>')  # fmt: skip
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{_MAIN}">{items}</sst>')
        archive.writestr("xl/worksheets/clinical.xml",
                         f'<worksheet xmlns="{_MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>')  # fmt: skip
    return path


def udiat(root: Path) -> Path:
    """Three images; numbers in the table are numbers."""
    for index in (1, 2, 10):
        save(root / "original" / f"{index:06d}.png", phantom(index)[0])
        save(root / "GT" / f"{index:06d}.png", phantom(index)[1])
    write_xlsx(root / "DatasetB.xlsx", [["Image", "Type"], [1, "Benign"], [2, "Malignant"], [10, "Benign"]])
    return root


BREAST_COLUMNS = ["CaseID", "Image_filename", "Mask_tumor_filename", "Mask_other_filename", "Pixel_size", "Age",
                  "Shape", "Margin", "Echogenicity", "Classification", "BIRADS"]  # fmt: skip
BREAST_ROWS: list[list[Cell]] = [
    [1, "case001.png", "case001_tumor.png", None, 0.0076, 57, "irregular", "not circumscribed - angular&indistinct",
     "heterogeneous", "malignant", "4b"],
    [2, "case002.png", "case002_tumor1.png&case002_tumor2.png", "case002_other1.png", 0.0071, 43, "oval",
     "circumscribed", "hypoechoic", "benign", "3"],
    [3, "case003.png", None, None, 0.0071, 39, "not applicable", "not applicable", "not applicable", "normal", 1],
]  # fmt: skip


def breast(root: Path, rows: list[list[Cell]] = BREAST_ROWS) -> Path:
    """A malignant, a benign case with two lesions, a normal one."""
    folder = root / "BrEaST-Lesions_USG-images_and_masks"
    for index in (1, 2, 3):
        save(
            folder / f"case{index:03d}.png",
            np.dstack([phantom(index)[0], np.full((SIDE, SIDE), 255, np.uint8)]),
        )
    save(folder / "case001_tumor.png", box(5, 5))
    save(folder / "case002_tumor1.png", box(5, 5))
    save(folder / "case002_tumor2.png", box(30, 30))
    save(folder / "case002_other1.png", box(50, 40))
    write_xlsx(root / "BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx", [BREAST_COLUMNS, *rows])
    return root


def bus_uclm(root: Path) -> Path:
    """Two patients, three labels."""
    rows = ["Image;Label;Doppler;Marks;Combined;Resolution"]
    for name, label, channel in (
        ("ALWI_000", "Benign", 1),
        ("ALWI_001", "Normal", -1),
        ("ANFO_000", "Malignant", 0),
    ):
        save(root / "images" / f"{name}.png", phantom(len(rows))[0])
        drawn = np.zeros((SIDE, SIDE, 3), np.uint8) if channel < 0 else coloured(box(8, 8), channel)
        save(root / "masks" / f"{name}.png", drawn)
        rows.append(f"{name}.png;{label};No;Yes;No;{SIDE}x{SIDE}")
    (root / "INFO.csv").write_text("\n".join(rows) + "\n")
    return root


def qamebi(root: Path) -> Path:
    """Two benign images, one with two masks, and a malignant one."""
    for label, numbers in {"Benign": (1, 2), "Malignant": (1,)}.items():
        for number in numbers:
            stem = f"{number} {label}"
            image = phantom(number + 3 * len(label))[0]
            save(root / label / f"{stem} Image.bmp", np.dstack([image] * 3))
            save(root / label / f"{stem} Lesion.bmp", np.dstack([image] * 3))
            save(root / label / f"{stem} Mask.tif", box(5, 5))
    save(root / "Benign" / "2 Benign Mask 2.tif", box(30, 30))
    return root


BUS_BRA_HEADER = "ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX"


def bus_bra(root: Path, num_cases: int = 3) -> Path:
    """Left and right image of each case; the cases alternate between the classes."""
    rows = [BUS_BRA_HEADER]
    for case in range(1, num_cases + 1):
        label = ("benign", "malignant")[case % 2]
        for side in "lr":
            image, mask = phantom(2 * case + (side == "r"))
            save(root / "Images" / f"bus_{case:04d}-{side}.png", image)
            save(root / "Masks" / f"mask_{case:04d}-{side}.png", mask if mask.any() else box(20, 20))
            rows.append(f'bus_{case:04d}-{side},{case},Fibroadenoma,{label},3,GE Logiq 5,{SIDE},{SIDE},'
                        f'{"left" if side == "l" else "right"},"[5,5,20,12]"')  # fmt: skip
    (root / "bus_data.csv").write_text("\n".join(rows) + "\n")
    return root


def skin(index: int) -> np.ndarray:
    """A coloured picture, uint8 (SIDE, SIDE, 3)."""
    image = phantom(index)[0]
    return np.dstack([image, image // 2, image // 3])


def isic2017(root: Path) -> Path:
    """Three training images, one for validation, with Parts 1 and 3."""
    for name, rows in {
        "Training": ("0,0.0,0.0", "1,1.0,0.0", "2,0.0,1.0"),
        "Validation": ("9,1.0,0.0",),
    }.items():
        lines = ["image_id,melanoma,seborrheic_keratosis"]
        for row in rows:
            image = f"ISIC_{int(row.split(',')[0]):07d}"
            folder = root / f"ISIC-2017_{name}_Data"
            save(folder / f"{image}.jpg", skin(int(row.split(",")[0])))
            save(folder / f"{image}_superpixels.png", skin(50))
            save(root / f"ISIC-2017_{name}_Part1_GroundTruth" / f"{image}_segmentation.png", box(6, 6))
            lines.append(f"{image},{row.partition(',')[2]}")
        (root / f"ISIC-2017_{name}_Part3_GroundTruth.csv").write_text("\n".join(lines) + "\n")
    return root


def isic2018(root: Path) -> Path:
    """Task 1 with two training images; task 3 with seven, two of them of one lesion, and one for validation."""
    for index in (0, 1):
        save(root / "ISIC2018_Task1-2_Training_Input" / f"ISIC_{index:07d}.jpg", skin(index))
        save(root / "ISIC2018_Task1_Training_GroundTruth" / f"ISIC_{index:07d}_segmentation.png", box(6, 6))
    groups = ["image,lesion_id,diagnosis_confirm_type"]
    for name, numbers in {"Training": range(24306, 24313), "Validation": range(34310, 34311)}.items():
        lines = ["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"]
        for place, number in enumerate(numbers):
            save(root / f"ISIC2018_Task3_{name}_Input" / f"ISIC_{number:07d}.jpg", skin(number % 97))
            lines.append(
                ",".join([f"ISIC_{number:07d}", *("1.0" if i == place else "0.0" for i in range(7))])
            )
            if name == "Training":
                groups.append(f"ISIC_{number:07d},HAM_000{0 if place < 2 else place}550,histopathology")
        folder = root / f"ISIC2018_Task3_{name}_GroundTruth"
        folder.mkdir(parents=True)
        (folder / f"ISIC2018_Task3_{name}_GroundTruth.csv").write_text("\n".join(lines) + "\n")
    (root / "ISIC2018_Task3_Training_LesionGroupings.csv").write_text("\n".join(groups) + "\n")
    return root


def ham10000(root: Path, *, masks: bool = True) -> Path:
    """Seven lesions with two images each, one in either part."""
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for lesion, label in enumerate(("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")):
        for part in (1, 2):
            image = f"ISIC_{24306 + 2 * lesion + part:07d}"
            save(root / f"HAM10000_images_part_{part}" / f"{image}.jpg", skin(2 * lesion + part))
            if masks:
                save(root / "HAM10000_segmentations_lesion_tschandl" / f"{image}_segmentation.png", box(9, 9))
            lines.append(f"HAM_{lesion:07d},{image},{label},histo,60.0,male,back")
    (root / "HAM10000_metadata.csv").write_text("\n".join(lines) + "\n")
    return root


PH2_HEADER = ("||   Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network | Dots/Globules | "
              "Streaks | Regression Areas | Blue-Whitish Veil ||           Colors ||")  # fmt: skip


def ph2(root: Path, *, table: str = "txt") -> Path:
    """One image of each class; the table as text or as XLSX."""
    lines = ["PH2 legend", "", PH2_HEADER]
    rows: list[list[Cell]] = [["Legends"], [None, "Asymmetry", "0 - Fully Symmetric"]] + [[None]] * 10
    rows.append(["Image Name", "Histological Diagnosis", "Common Nevus", "Atypical Nevus", "Melanoma",
                 "Asymmetry\n(0/1/2)"])  # fmt: skip
    for code, name in enumerate(("IMD003", "IMD020", "IMD413")):
        case = root / "PH2 Dataset images" / name
        save(case / f"{name}_Dermoscopic_Image" / f"{name}.bmp", skin(code))
        save(case / f"{name}_lesion" / f"{name}_lesion.bmp", box(6, 6))
        save(case / f"{name}_roi" / f"{name}_R1_Label3.bmp", box(1, 1))
        lines.append(f"|| {name} ||                        ||                  {code} ||         1 |              AT |"
                     "             A |       A |                A |                 A ||             3  4 ||")  # fmt: skip
        rows.append([name, None, *("X" if code == i else None for i in range(3)), 1])
    lines += ["", "Clinical Diagnosis: 0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma."]
    if table == "txt":
        (root / "PH2_dataset.txt").write_text("\n".join(lines) + "\n")
    else:
        write_xlsx(root / "PH2_dataset.xlsx", rows)
    return root


def region(left: int, top: int, side: int) -> dict[str, object]:
    """A square region as DDTI's JSON has it, corners in px."""
    corners = ((left, top), (left + side, top), (left + side, top + side), (left, top + side))
    return {"points": [{"x": x, "y": y} for x, y in corners], "annotation": {}, "regionType": "freehand"}


def ddti_case(root: Path, number: int, tirads: str, marks: dict[int, list[dict[str, object]]]) -> Path:
    """`N.xml` and its images."""
    body = "".join(f"<mark><image>{image}</image><svg>{escape(json.dumps(shapes))}</svg></mark>"
                   for image, shapes in marks.items())  # fmt: skip
    for image in marks:
        save(root / f"{number}_{image}.jpg", np.dstack([phantom(3 * number + image)[0]] * 3))
    path = root / f"{number}.xml"
    path.write_text(f'<?xml version="1.0" encoding="UTF-8"?><case><number>{number}</number><age>49</age><sex>F</sex>'
                    "<composition>solid</composition><echogenicity>hypoechogenicity</echogenicity>"
                    f"<margins>well defined</margins><calcifications>non</calcifications><tirads>{tirads}</tirads>"
                    f"<reportbacaf/><reporteco/>{body}</case>")  # fmt: skip
    return path


def ddti(root: Path, num_cases: int = 3) -> Path:
    """Cases of all three classes, the first with two images, one of these with two regions."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, num_cases + 1):
        marks = {1: [region(10, 20, 15)]}
        if number == 1:
            marks = {1: [region(10, 20, 15), region(40, 5, 10)], 2: [region(50, 50, 40)]}
        ddti_case(root, number, ("", "2", "4a")[number % 3], marks)
    return root


FIXTURES: dict[str, Callable[[Path], Path]] = {
    "udiat": udiat, "breast": breast, "bus_uclm": bus_uclm, "qamebi": qamebi, "bus_bra": bus_bra, "isic2017": isic2017,
    "isic2018_task1": isic2018, "isic2018_task3": isic2018, "ham10000": ham10000, "ph2": ph2, "ddti": ddti,
}  # fmt: skip
