"""DDTI, the Digital Database of Thyroid Images: ultrasound with contours in one XML file per case.

`12.xml` has the elements number, age, sex, composition, echogenicity, margins, calcifications, tirads, and
one `mark` per outlined image: `image` K means `12_K.jpg`, `svg` holds JSON, a list of regions with `points`
[{"x": …, "y": …}, …] in px. Several regions of an image are merged. Elements and names were read off several
independent readers, and that the JSON of 197.xml and 205.xml is cut off off one of them: such images are
problems, named as any other.

TI-RADS is a grade of suspicion, no pathology, and many cases have none, so the classes are `tirads_low` (2,
3), `tirads_high` (4a, 4b, 4c, 5) and `tirads_unknown`; the grade itself is an attribute. Published sources
split at 2 or at 3 and call it benign and malignant. Descriptors have the prefix `thyroid_`, as they are not
those of breast prompts. A region of fewer than three points has no area and is counted in the attribute
`stray_regions`. The number of images differs between releases (sources give from 134 to 480) and was not
verified. Case stands for patient.
"""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from factory.datasets.layout import (
    Item,
    Layout,
    Listing,
    ListingOptions,
    Problem,
    images_by_key,
    natural_order,
    require_folder,
    single_files,
)
from factory.datasets.layouts.drawn_masks import with_polygons
from factory.datasets.layouts.tables import parse_xml

CLASSES = ("tirads_low", "tirads_high", "tirads_unknown")
_GRADES = {"": 2, "2": 0, "3": 0, "4a": 1, "4b": 1, "4c": 1, "5": 1}
_DESCRIPTORS = ("composition", "echogenicity", "margins", "calcifications")
_TREE = """\
DDTI/
├── 1.xml …       one per case: tirads, and per mark an image number and its contours
└── 1_1.jpg …     image 1 of case 1
"""


class _Regions(NamedTuple):
    polygons: list[list[tuple[float, float]]]
    num_stray: int


def _listing(path: Path, options: ListingOptions) -> Listing:
    root = require_folder(path, "a folder with 1.xml, 1_1.jpg, … (DDTI)")
    problems: list[Problem] = []
    images = single_files(images_by_key(root, r"(?P<key>\d+_\d+)"), root, problems)
    tables = sorted(root.glob("[0-9]*.xml"), key=lambda file: natural_order(file.name))
    if not tables:
        raise FileNotFoundError(f"{root}: no case such as 1.xml; expected 1.xml, 1_1.jpg, … (DDTI)")
    items: list[Item] = []
    for table in tables:
        try:
            case = parse_xml(table.read_bytes(), table.name)
        except ValueError as error:
            problems.append(
                Problem(source_path=table.name, what=str(error), remedy="replace it, or remove the case")
            )
            case = ElementTree.Element("case")
        items += _items_of(table, case, images, problems)
    named = {f"{table.stem}_" for table in tables}
    for key, file in images.items():
        if f"{key.split('_')[0]}_" not in named:
            problems.append(Problem(source_path=file.name, what="image without XML file",
                                    remedy=f"add {key.split('_')[0]}.xml or remove the image"))  # fmt: skip
    return Listing(items=items, class_names=CLASSES, problems=problems)


def _items_of(
    table: Path, case: ElementTree.Element, images: dict[str, Path], problems: list[Problem]
) -> list[Item]:
    """Items of one case; each of its images that has no usable contour becomes a problem."""
    grade = _field(case, "tirads").lower()
    if grade not in _GRADES:
        what = f"tirads {grade!r} is none of {', '.join(filter(None, _GRADES))}"
        problems.append(Problem(source_path=table.name, what=what, remedy="correct it, or leave it empty"))
    attributes = {f"thyroid_{name}": value for name in _DESCRIPTORS if (value := _field(case, name))}
    attributes |= {name: value for name in ("tirads", "age", "sex") if (value := _field(case, name))}
    contours = _contours(table, case, images, problems)
    items = []
    for key, file in images.items():
        if key.split("_")[0] != table.stem:
            continue
        regions = contours.get(key)
        if regions is None or not regions.polygons:
            problems.append(Problem(source_path=file.name, what=f"no usable contour in {table.name}",
                                    remedy="outline the nodule or remove the image"))  # fmt: skip
        elif grade in _GRADES:
            stray = {"stray_regions": str(regions.num_stray)} if regions.num_stray else {}
            items.append(Item(source_path=file.name, label_name=CLASSES[_GRADES[grade]], has_lesion=True,
                              make=partial(with_polygons, file, file.name, regions.polygons),
                              patient_id=table.stem, attributes=attributes | stray))  # fmt: skip
    return items


def _contours(
    table: Path, case: ElementTree.Element, images: dict[str, Path], problems: list[Problem]
) -> dict[str, _Regions]:
    """Regions by image; an image any of whose marks is unreadable has none."""
    found: dict[str, _Regions] = {}
    unreadable: set[str] = set()
    for mark in case.iter("mark"):
        key = f"{table.stem}_{_field(mark, 'image')}"
        if key not in images:
            problems.append(Problem(source_path=table.name, what=f"contour without image {key}.jpg",
                                    remedy="add the image or remove the mark"))  # fmt: skip
            continue
        try:
            new = _regions(_field(mark, "svg"))
        except ValueError as error:
            what = f"contour of image {key}.jpg is unreadable ({error})"
            problems.append(Problem(source_path=table.name, what=what, remedy="repair the JSON in <svg>"))
            unreadable.add(key)
            continue
        old = found.get(key, _Regions([], 0))
        found[key] = _Regions(old.polygons + new.polygons, old.num_stray + new.num_stray)
    return {key: regions for key, regions in found.items() if key not in unreadable}


def _field(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _regions(text: str) -> _Regions:
    """Polygons of the JSON in one `svg` element, vertices (x, y) in px; none where it is empty.

    Raises:
        ValueError: not JSON, or not a list of regions with points.
    """
    regions = json.loads(text) if text else []
    try:
        shapes = [
            [(float(point["x"]), float(point["y"])) for point in region["points"]] for region in regions
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(f"want a list of regions with points, missing {error}") from error
    polygons = [shape for shape in shapes if len(shape) >= 3]
    return _Regions(polygons, len(shapes) - len(polygons))


DDTI = Layout(
    name="ddti",
    about="DDTI: thyroid ultrasound, contours from XML, TI-RADS low / high / unknown",
    listing=_listing,
    licence="none stated where we looked",
    allowed_use="unknown",
    citation="Pedraza, Vargas, Narváez, Durán, Muñoz, Romero. An open access thyroid ultrasound image database. 10th Int. "
    "Symposium on Medical Information Processing and Analysis, Proc. SPIE 9287 (2015) 92870W. doi:10.1117/12.2073532",
    unit="case level",
    contents="thyroid ultrasound; 134 to 480 images, by release; TI-RADS low, high, unknown; masks",
    obtain="CIM@LAB, Universidad Nacional de Colombia (Digital Database of Thyroid Images)",
    tree=_TREE,
)
