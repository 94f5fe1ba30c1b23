from pathlib import Path

import numpy as np
import pytest
from layout_fixtures import (
    BREAST_ROWS,
    SIDE,
    box,
    breast,
    bus_bra,
    bus_uclm,
    ddti,
    ddti_case,
    phantom,
    qamebi,
    region,
    save,
    udiat,
    write_xlsx,
)

from factory.datasets.layout import Listing, ListingOptions
from factory.datasets.layouts import LAYOUTS
from factory.datasets.layouts.breast_lesions_usg import descriptors
from factory.datasets.verification import VerifiedImage, verify_items


def _list(name: str, root: Path) -> Listing:
    return LAYOUTS[name].listing(root, ListingOptions())


def _read(name: str, root: Path) -> dict[str, VerifiedImage]:
    listing = _list(name, root)
    images, problems = verify_items(listing.items, listing.problems)
    assert not problems and {image.item.label_name for image in images} <= set(listing.class_names)
    return {image.item.source_path: image for image in images}


def _messages(name: str, root: Path) -> list[str]:
    return [str(problem) for problem in _list(name, root).problems]


def _area(image: VerifiedImage) -> int:
    assert image.mask is not None
    return int(image.mask.sum())


def test_udiat(tmp_path: Path) -> None:
    images = _read("udiat", udiat(tmp_path / "BUS"))
    assert [(path, image.item.label_name) for path, image in images.items()] == [
        ("original/000001.png", "benign"), ("original/000002.png", "malignant"), ("original/000010.png", "benign"),
    ]  # fmt: skip
    for index, image in zip((1, 2, 10), images.values()):
        assert np.array_equal(image.image, phantom(index)[0])
        assert image.mask is not None and np.array_equal(image.mask, phantom(index)[1] // 255)
    assert _read("udiat", tmp_path).keys() == images.keys(), "the folder above BUS/ will do"


def test_udiat_names_what_does_not_agree(tmp_path: Path) -> None:
    root = udiat(tmp_path)
    save(root / "original" / "000011.png", phantom(3)[0])
    save(root / "GT" / "000012.png", box(1, 1))
    write_xlsx(root / "DatasetB.xlsx", [["Image", "Type"], [1, "Benign"], ["000002", "cyst"], [10, "Benign"], [44, "Benign"],
                                        ["../10", "Benign"], [10, "Malignant"]])  # fmt: skip
    messages = _messages("udiat", root)
    expected = ["GT/000012.png: mask without image", "original/000011.png: no row for 000011",
                "DatasetB.xlsx row 3: Type 'cyst' is none of benign, malignant",
                "DatasetB.xlsx row 5: row without image: 000044", "row 6: Image '0../10' is no plain file name",
                "row 7: a second row for 000010"]  # fmt: skip
    for part in expected:
        assert any(part in message for message in messages), (part, messages)
    assert len(messages) == len(expected)
    (root / "DatasetB.xlsx").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"DatasetB\.xlsx: no such file; expected a table with Image, Type"
    ):
        _list("udiat", root)


def test_breast(tmp_path: Path) -> None:
    images = list(_read("breast", breast(tmp_path)).values())
    assert [image.item.label_name for image in images] == ["malignant", "benign", "normal"]
    assert [image.item.patient_id for image in images] == ["1", "2", "3"]
    assert [_area(image) for image in images] == [240, 480, 0], (
        "two lesions are merged, other findings are not"
    )
    malignant, benign, normal = (image.attributes for image in images)
    assert (malignant["echogenicity"], malignant["boundary"]) == ("heterogeneous", "unclear")
    assert (benign["echogenicity"], benign["boundary"]) == ("homogeneous", "clear")
    assert not {"echogenicity", "boundary"} & normal.keys()
    assert malignant["margin"] == "not circumscribed - angular&indistinct" and malignant["birads"] == "4b"
    assert normal["birads"] == "1" and benign["pixel_size"] == "0.0071"


def test_breast_descriptors_are_what_the_labeller_takes() -> None:
    from typing import get_args

    from factory.sources.labeller import Boundary, Echogenicity

    for echo in (
        "heterogeneous",
        "complex cystic/solid",
        "anechoic",
        "hypoechoic",
        "isoechoic",
        "hyperechoic",
    ):
        found = descriptors({"Echogenicity": echo, "Margin": "not circumscribed - spiculated"})
        assert found["echogenicity"] in get_args(Echogenicity) and found["boundary"] in get_args(Boundary)
    assert descriptors({"Echogenicity": "not applicable", "Margin": "not applicable"}) == {}


def test_breast_faults(tmp_path: Path) -> None:
    rows = [list(row) for row in BREAST_ROWS]
    rows[0][2] = "../case001_tumor.png"
    rows[1][9] = "unclear"
    root = breast(tmp_path, rows)
    messages = _messages("breast", root)
    assert len(messages) == 2
    assert any(
        "row 2: Mask_tumor_filename '../case001_tumor.png' is no plain file name" in m for m in messages
    )
    assert any("row 3: Classification 'unclear' is none of benign, malignant, normal" in m for m in messages)
    assert [item.label_name for item in _list("breast", root).items] == ["malignant", "normal"]
    assert _list("breast", root).items[0].masks == [], "and so the image is refused when it is opened"
    next(root.glob("*.xlsx")).unlink()
    with pytest.raises(FileNotFoundError, match="0 such table"):
        _list("breast", root)


def test_bus_uclm(tmp_path: Path) -> None:
    images = _read("bus_uclm", bus_uclm(tmp_path / "BUS-UCLM"))
    assert [(i.item.label_name, i.item.patient_id, _area(i)) for i in images.values()] == [
        ("benign", "ALWI", 240), ("normal", "ALWI", 0), ("malignant", "ANFO", 240),
    ]  # fmt: skip
    first = images["images/ALWI_000.png"]
    assert first.attributes == {"doppler": "No", "marks": "Yes", "combined": "No"}
    assert first.mask is not None and first.mask[8:20, 8:28].all()


def test_bus_uclm_faults(tmp_path: Path) -> None:
    root = bus_uclm(tmp_path)
    (root / "masks" / "ALWI_000.png").unlink()
    save(root / "masks" / "ANFO_000.png", np.dstack([box(8, 8) * 0, box(8, 8) * 0, box(8, 8)]))
    save(root / "masks" / "ALWI_001.png", np.zeros((20, 30, 3), np.uint8))
    listing = _list("bus_uclm", root)
    with pytest.raises(ValueError) as caught:
        verify_items(listing.items, listing.problems)
    for part in ("images/ALWI_000.png: image without mask; add masks/ALWI_000.png",
                 "(mask ANFO_000.png): neither pure green nor pure red", f"mask is 30×20 px, the image {SIDE}×{SIDE} px"):  # fmt: skip
        assert part in str(caught.value)
    (root / "INFO.csv").write_text("Image,Label\nALWI_000.png,Benign\n")
    with pytest.raises(ValueError, match=r"INFO\.csv: no line with the columns Image, Label"):
        _list("bus_uclm", root)


def test_qamebi(tmp_path: Path) -> None:
    images = _read("qamebi", qamebi(tmp_path))
    assert [(path, image.item.label_name, _area(image)) for path, image in images.items()] == [
        ("Benign/1 Benign Image.bmp", "benign", 240), ("Benign/2 Benign Image.bmp", "benign", 480),
        ("Malignant/1 Malignant Image.bmp", "malignant", 240),
    ]  # fmt: skip


def test_qamebi_faults(tmp_path: Path) -> None:
    root = qamebi(tmp_path)
    (root / "Malignant" / "1 Malignant Image.bmp").unlink()
    (root / "Benign" / "1 Benign Mask.tif").unlink()
    assert _messages("qamebi", root) == [
        "Malignant/1 Malignant Mask.tif: mask without image; add the image of 1 or remove the mask"
    ]
    with pytest.raises(ValueError, match=r"Benign/1 Benign Image\.bmp: image without mask"):
        verify_items(_list("qamebi", root).items)
    with pytest.raises(FileNotFoundError, match="Benign/ and Malignant/"):
        _list("qamebi", tmp_path / "Benign")


def test_bus_bra(tmp_path: Path) -> None:
    images = _read("bus_bra", bus_bra(tmp_path / "BUSBRA", num_cases=2))
    assert [(i.item.label_name, i.item.patient_id, i.attributes["side"]) for i in images.values()] == [
        ("malignant", "1", "left"), ("malignant", "1", "right"), ("benign", "2", "left"), ("benign", "2", "right"),
    ]  # fmt: skip
    first = images["Images/bus_0001-l.png"]
    assert first.item.device == "GE Logiq 5"
    assert first.attributes == {"histology": "Fibroadenoma", "birads": "3", "side": "left"}
    assert first.mask is not None and np.array_equal(first.mask, phantom(2)[1] // 255)


def test_bus_bra_faults(tmp_path: Path) -> None:
    root = bus_bra(tmp_path)
    (root / "Images" / "bus_0003-r.png").unlink()
    messages = _messages("bus_bra", root)
    assert len(messages) == 2 and "Masks/mask_0003-r.png: mask without image" in messages[0]
    assert "bus_data.csv row 7: row without image: bus_0003-r" in messages[1]
    (root / "bus_data.csv").write_bytes("ID,Case\nbus_0001-l,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"bus_data\.csv: not a UTF-8 CSV file"):
        _list("bus_bra", root)


def test_ddti(tmp_path: Path) -> None:
    images = _read("ddti", ddti(tmp_path))
    assert [(path, i.item.label_name, i.item.patient_id) for path, i in images.items()] == [
        ("1_1.jpg", "tirads_low", "1"), ("1_2.jpg", "tirads_low", "1"), ("2_1.jpg", "tirads_high", "2"),
        ("3_1.jpg", "tirads_unknown", "3"),
    ]  # fmt: skip
    two, cut = images["1_1.jpg"].mask, images["1_2.jpg"].mask
    assert two is not None and two[20:36, 10:26].all() and two[5:16, 40:51].all()
    assert two.sum() == 16 * 16 + 11 * 11, "corners are inside, both regions count"
    assert cut is not None and cut.sum() == 14 * 14, "what lies outside the image is cut off"
    attributes = images["2_1.jpg"].attributes
    assert attributes["tirads"] == "4a" and attributes["thyroid_echogenicity"] == "hypoechogenicity"
    assert "echogenicity" not in attributes, "the breast prompts' word has other values"
    assert "tirads" not in images["3_1.jpg"].attributes


def test_ddti_names_every_fault_and_keeps_the_rest(tmp_path: Path) -> None:
    root = ddti(tmp_path, num_cases=1)
    good = region(10, 20, 15)
    cut = ddti_case(root, 197, "4a", {1: [good], 2: [good]})
    cut.write_text(cut.read_text().replace('"freehand"}]', '"freeh', 1))
    ddti_case(root, 5, "7", {1: [good]})
    ddti_case(root, 6, "2", {1: []})
    ddti_case(root, 7, "2", {1: [good, {"points": [{"x": 1, "y": 1}]}], 2: [{"shape": 3}]})
    missing = ddti_case(root, 8, "2", {1: [good], 2: [good]})
    (root / "8_2.jpg").unlink()
    save(root / "99_1.jpg", phantom(3)[0])
    (root / "9.xml").write_text('<!DOCTYPE case [<!ENTITY a "2">]><case><tirads>&a;</tirads></case>')
    messages = _messages("ddti", root)
    expected = ["197.xml: contour of image 197_1.jpg is unreadable", "197_1.jpg: no usable contour in 197.xml",
                "5.xml: tirads '7' is none of 2, 3, 4a", "6_1.jpg: no usable contour in 6.xml",
                "7.xml: contour of image 7_2.jpg is unreadable (want a list of regions with points, missing 'points')",
                "7_2.jpg: no usable contour", f"{missing.name}: contour without image 8_2.jpg",
                "99_1.jpg: image without XML file", "9.xml: 9.xml: XML with a document type"]  # fmt: skip
    for part in expected:
        assert any(part in message for message in messages), (part, messages)
    assert len(messages) == len(expected)
    items = {item.source_path: item for item in _list("ddti", root).items}
    assert items.keys() == {"1_1.jpg", "1_2.jpg", "197_2.jpg", "7_1.jpg", "8_1.jpg"}
    assert items["7_1.jpg"].attributes["stray_regions"] == "1"
    with pytest.raises(FileNotFoundError, match=r"expected 1\.xml, 1_1\.jpg"):
        _list("ddti", save(tmp_path / "empty" / "1_1.jpg", phantom(1)[0]).parent)
