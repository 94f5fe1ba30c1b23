from collections import Counter
from pathlib import Path

import pytest
from layout_fixtures import box, ham10000, isic2017, isic2018, ph2, save, skin

from factory.datasets.layout import Listing, ListingOptions
from factory.datasets.layouts import LAYOUTS
from factory.datasets.verification import VerifiedImage, verify_items


def _list(name: str, root: Path) -> Listing:
    return LAYOUTS[name].listing(root, ListingOptions())


def _read(name: str, root: Path) -> list[VerifiedImage]:
    listing = _list(name, root)
    images, problems = verify_items(listing.items, listing.problems)
    assert not problems and {image.item.label_name for image in images} <= set(listing.class_names)
    return images


def _messages(name: str, root: Path) -> list[str]:
    return [str(problem) for problem in _list(name, root).problems]


def test_isic2017(tmp_path: Path) -> None:
    images = _read("isic2017", isic2017(tmp_path))
    assert [(i.item.label_name, i.attributes["official_split"]) for i in images] == [
        ("nevus", "train"), ("melanoma", "train"), ("seborrheic_keratosis", "train"), ("melanoma", "val"),
    ]  # fmt: skip
    assert images[0].item.source_path == "ISIC-2017_Training_Data/ISIC_0000000.jpg"
    assert all(
        image.image.ndim == 3 and image.mask is not None and image.mask.sum() == 240 for image in images
    )


def test_isic2017_without_labels_or_masks(tmp_path: Path) -> None:
    root = isic2017(tmp_path)
    for table in root.glob("*.csv"):
        table.unlink()
    assert {image.item.label_name for image in _read("isic2017", root)} == {"lesion"}
    validation = root / "ISIC-2017_Validation_Part1_GroundTruth"
    validation.rename(root / "away")
    with pytest.raises(
        FileNotFoundError, match="ISIC-2017_Validation_Part1_GroundTruth missing, while other parts"
    ):
        _list("isic2017", root)
    (root / "ISIC-2017_Training_Part1_GroundTruth").rename(root / "away too")
    assert all(image.mask is None for image in _read("isic2017", root))


def test_isic2017_faults(tmp_path: Path) -> None:
    root = isic2017(tmp_path)
    save(root / "ISIC-2017_Training_Part1_GroundTruth" / "ISIC_0000077_segmentation.png", box(1, 1))
    table = root / "ISIC-2017_Training_Part3_GroundTruth.csv"
    table.write_text(table.read_text().replace("ISIC_0000001,1.0,0.0", "ISIC_0000001,1.0,1.0"))
    messages = _messages("isic2017", root)
    assert len(messages) == 2 and "ISIC_0000077_segmentation.png: mask without image" in messages[0]
    assert (
        "Part3_GroundTruth.csv row 3: class 'melanoma=1.0, seborrheic_keratosis=1.0' is none of"
        in messages[1]
    )
    assert len(_list("isic2017", root).items) == 3
    with pytest.raises(FileNotFoundError, match="unpack the archives there"):
        _list("isic2017", root / "ISIC-2017_Training_Data")


def test_isic2018_task1(tmp_path: Path) -> None:
    images = _read("isic2018_task1", isic2018(tmp_path))
    assert [image.item.label_name for image in images] == ["lesion", "lesion"]
    assert all(image.mask is not None and image.mask.sum() == 240 for image in images)


def test_isic2018_task1_faults(tmp_path: Path) -> None:
    root = isic2018(tmp_path)
    masks = root / "ISIC2018_Task1_Training_GroundTruth"
    (masks / "ISIC_0000001_segmentation.png").unlink()
    with pytest.raises(ValueError, match=r"Input/ISIC_0000001\.jpg: image without mask"):
        verify_items(_list("isic2018_task1", root).items)
    masks.rename(root / "away")
    with pytest.raises(FileNotFoundError, match=r"expected the masks of ISIC2018_Task1-2_Training_Input"):
        _list("isic2018_task1", root)


def test_isic2018_task3(tmp_path: Path) -> None:
    images = _read("isic2018_task3", isic2018(tmp_path))
    labels = ["mel", "nv", "bcc", "akiec", "bkl", "df", "vasc", "mel"]
    assert [image.item.label_name for image in images] == labels
    assert all(image.mask is None for image in images)
    patients = [image.item.patient_id for image in images]
    assert patients[0] == patients[1] == "HAM_0000550" and len(set(patients[1:7])) == 6
    assert patients[7] is None, "lesions are known for the training images only"


def test_isic2018_task3_faults(tmp_path: Path) -> None:
    root = isic2018(tmp_path)
    folder = root / "ISIC2018_Task3_Training_GroundTruth"
    table = folder / "ISIC2018_Task3_Training_GroundTruth.csv"
    text = table.read_text()
    table.write_text(text.replace("ISIC_0024306,1.0", "ISIC_0024306,0.0"))
    assert [
        "row 2: class 'AKIEC=0.0, BCC=0.0" in message for message in _messages("isic2018_task3", root)
    ] == [True]
    table.write_text(text.replace("VASC", "VASE"))
    with pytest.raises(
        ValueError, match=r"no line with the columns image, AKIEC.*; its first line has image, MEL"
    ):
        _list("isic2018_task3", root)
    table.write_text(text)
    (root / "ISIC2018_Task3_Training_LesionGroupings.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"LesionGroupings\.csv: no such file"):
        _list("isic2018_task3", root)


def test_ham10000(tmp_path: Path) -> None:
    images = _read("ham10000", ham10000(tmp_path))
    assert Counter(image.item.label_name for image in images) == dict.fromkeys(
        _list("ham10000", tmp_path).class_names, 2
    )
    assert set(Counter(image.item.patient_id for image in images).values()) == {2}
    folders = [image.item.source_path.partition("/")[0] for image in images]
    assert folders[:2] == ["HAM10000_images_part_1", "HAM10000_images_part_2"], (
        "sorted by image over both parts"
    )
    assert images[0].attributes == {"dx_type": "histo", "age": "60.0", "sex": "male", "localization": "back"}
    assert all(image.mask is not None and image.mask.sum() == 240 for image in images)


def test_ham10000_from_dataverse_without_masks(tmp_path: Path) -> None:
    root = ham10000(tmp_path, masks=False)
    table = root / "HAM10000_metadata.csv"
    (root / "HAM10000_metadata.tab").write_text(table.read_text().replace(",", "\t"))
    table.unlink()
    images = _read("ham10000", root)
    assert len(images) == 14 and all(image.mask is None for image in images)


def test_ham10000_faults(tmp_path: Path) -> None:
    root = ham10000(tmp_path)
    save(root / "HAM10000_images_part_2" / "ISIC_0024307.jpg", skin(40))
    table = root / "HAM10000_metadata.csv"
    table.write_text(table.read_text().replace(",nv,", ",nevus,", 1))
    messages = _messages("ham10000", root)
    assert len(messages) == 2 and "HAM10000_images_part_2/ISIC_0024307.jpg: a second image" in messages[0]
    assert "row 12: dx 'nevus' is none of akiec, bcc" in messages[1]
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"HAM10000_metadata\.csv: no such file"):
        _list("ham10000", root)


@pytest.mark.parametrize("table", ["txt", "xlsx"])
def test_ph2(tmp_path: Path, table: str) -> None:
    images = _read("ph2", ph2(tmp_path / "PH2Dataset", table=table))
    assert [image.item.label_name for image in images] == ["common_nevus", "atypical_nevus", "melanoma"]
    assert images[0].item.source_path == "PH2 Dataset images/IMD003/IMD003_Dermoscopic_Image/IMD003.bmp"
    assert all(image.mask is not None and image.mask.sum() == 240 for image in images), (
        "masks of colours are not read"
    )
    if table == "txt":
        assert images[0].attributes["pigment_network"] == "AT" and images[0].attributes["colours"] == "3  4"
        assert "histology" not in images[0].attributes


def test_ph2_faults(tmp_path: Path) -> None:
    root = ph2(tmp_path)
    case = root / "PH2 Dataset images" / "IMD020"
    (case / "IMD020_Dermoscopic_Image" / "IMD020.bmp").unlink()
    (root / "PH2 Dataset images" / "IMD003" / "IMD003_lesion" / "IMD003_lesion.bmp").unlink()
    messages = _messages("ph2", root)
    assert (
        len(messages) == 2
        and "IMD020: folder without image; add IMD020_Dermoscopic_Image/IMD020.bmp" in messages[0]
    )
    assert "PH2_dataset.txt line 5: row without image: IMD020" in messages[1]
    with pytest.raises(ValueError, match=r"IMD003\.bmp: image without mask"):
        verify_items(_list("ph2", root).items)
    (root / "PH2_dataset.txt").write_text("no table\n")
    with pytest.raises(ValueError, match=r"PH2_dataset\.txt: no line '\|\| Name"):
        _list("ph2", root)
