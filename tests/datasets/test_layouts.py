from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factory.datasets.layout import ListingOptions, natural_order
from factory.datasets.layouts import LAYOUTS, get_layout
from factory.datasets.layouts.phantom import phantom_listing
from factory.datasets.verification import verify_item, verify_items

OPTIONS = ListingOptions()


def _picture(path: Path, pixels: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.name)).integers(0, 256, (32, 40), np.uint8)
    Image.fromarray(values if pixels is None else pixels).save(path)


def _mask(path: Path, *, top: int = 4, empty: bool = False) -> None:
    pixels = np.zeros((32, 40), np.uint8)
    if not empty:
        pixels[top : top + 5, 5:15] = 255
    _picture(path, pixels)


def _busi(root: Path) -> Path:
    for label, numbers in {"benign": (1, 2, 10), "malignant": (1,), "normal": (1, 2)}.items():
        for number in numbers:
            _picture(root / label / f"{label} ({number}).png")
            _mask(root / label / f"{label} ({number})_mask.png", empty=label == "normal")
    _mask(root / "benign" / "benign (10)_mask_1.png", top=20)
    return root


def test_every_layout_says_what_may_be_done_with_it() -> None:
    assert {"busi", "medmnist", "stu", "folder", "phantom"} <= set(LAYOUTS)
    for name, layout in LAYOUTS.items():
        assert layout.name == name and layout.licence and layout.allowed_use and layout.about


def test_an_unknown_layout_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'busi'"):
        get_layout("bussi")


def test_numbers_sort_as_numbers() -> None:
    names = ["benign (10).png", "benign (2).png", "benign (1).png"]
    assert sorted(names, key=natural_order) == ["benign (1).png", "benign (2).png", "benign (10).png"]


def test_busi(tmp_path: Path) -> None:
    listing = LAYOUTS["busi"].listing(_busi(tmp_path), OPTIONS)
    assert listing.class_names == ("benign", "malignant", "normal") and not listing.problems
    images, problems = verify_items(listing.items)
    assert len(images) == 6 and not problems
    assert [item.source_path for item in listing.items][:3] == [
        "benign/benign (1).png", "benign/benign (2).png", "benign/benign (10).png",
    ]  # fmt: skip
    ten = images[2]
    assert ten.item.sequence == ("benign", 10)
    assert ten.mask is not None and ten.mask.sum() == 2 * 5 * 10
    assert all(not image.mask.any() for image in images if image.item.label_name == "normal")  # type: ignore[union-attr]


def test_busi_names_what_does_not_belong(tmp_path: Path) -> None:
    root = _busi(tmp_path)
    _picture(root / "benign" / "thumb.png")
    _mask(root / "malignant" / "malignant (7)_mask.png")
    (root / "benign" / "benign (1)_mask.png").unlink()
    listing = LAYOUTS["busi"].listing(root, OPTIONS)
    messages = [str(problem) for problem in listing.problems]
    assert len(messages) == 2
    assert "benign/thumb.png: the name is not of the form" in messages[0]
    assert "malignant/malignant (7)_mask.png: mask without image" in messages[1]
    with pytest.raises(ValueError, match=r"benign/benign \(1\)\.png: image without mask"):
        verify_items(listing.items)


def test_a_missing_folder_says_what_was_expected(tmp_path: Path) -> None:
    for name in ("busi", "stu", "folder"):
        with pytest.raises(FileNotFoundError, match="no such folder; expected"):
            LAYOUTS[name].listing(tmp_path / "absent", OPTIONS)
    with pytest.raises(FileNotFoundError, match="benign/"):
        LAYOUTS["busi"].listing(tmp_path, OPTIONS)
    with pytest.raises(FileNotFoundError, match="breastmnist"):
        LAYOUTS["medmnist"].listing(tmp_path / "absent.npz", OPTIONS)


@pytest.mark.parametrize("pattern", ["Hospital/Test_Image_{}.png", "Test_Image_{}.png", "image_{}.png"])
def test_stu(tmp_path: Path, pattern: str) -> None:
    for number in (1, 2, 12):
        image = tmp_path / pattern.format(number)
        _picture(image)
        _mask(image.with_name(f"mask_{number}.png"))
    listing = LAYOUTS["stu"].listing(tmp_path, OPTIONS)
    assert listing.class_names == ("lesion",) and not listing.problems
    assert [item.sequence for item in listing.items] == [("stu", 1), ("stu", 2), ("stu", 12)]
    assert len(verify_items(listing.items)[0]) == 3


def test_stu_mask_without_image(tmp_path: Path) -> None:
    _mask(tmp_path / "mask_3.png")
    problems = LAYOUTS["stu"].listing(tmp_path, OPTIONS).problems
    assert [str(p) for p in problems] == [
        "mask_3.png: mask without image; add Test_Image_3.png or remove the mask"
    ]


def _archive(path: Path, **changes: np.ndarray) -> Path:
    arrays = {}
    for split, count in {"train": 6, "val": 2, "test": 2}.items():
        arrays[f"{split}_images"] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).reshape(-1, 1).astype(np.uint8)
    np.savez(path, **(arrays | changes))
    return path


def test_medmnist_label_zero_is_malignant(tmp_path: Path) -> None:
    listing = LAYOUTS["medmnist"].listing(_archive(tmp_path / "breastmnist.npz"), OPTIONS)
    assert listing.class_names == ("malignant", "normal_or_benign")
    assert listing.items[0].label_name == "malignant" and listing.items[1].label_name == "normal_or_benign"
    verified = verify_item(listing.items[7])
    assert verified.mask is None and verified.image.shape == (28, 28)
    assert verified.attributes == {"official_split": "val"}


def test_medmnist_other_archives_and_faults(tmp_path: Path) -> None:
    assert LAYOUTS["medmnist"].listing(_archive(tmp_path / "organ.npz"), OPTIONS).class_names == (
        "class_0",
        "class_1",
    )
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"bad\.npz: not a readable npz"):
        LAYOUTS["medmnist"].listing(tmp_path / "bad.npz", OPTIONS)
    np.savez(tmp_path / "half.npz", train_images=np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="lacks train_labels"):
        LAYOUTS["medmnist"].listing(tmp_path / "half.npz", OPTIONS)
    several = _archive(tmp_path / "chest.npz", train_labels=np.zeros((6, 14), np.uint8))
    with pytest.raises(ValueError, match="multi-label"):
        LAYOUTS["medmnist"].listing(several, OPTIONS)


def test_folder_without_labels_uses_class_folders(tmp_path: Path) -> None:
    for name in ("cyst/1.png", "cyst/2.png", "solid/1.png"):
        _picture(tmp_path / "images" / name)
        _mask(tmp_path / "masks" / name)
    listing = LAYOUTS["folder"].listing(tmp_path, OPTIONS)
    assert listing.class_names == ("cyst", "solid") and not listing.problems
    assert len(verify_items(listing.items)[0]) == 3


def test_folder_without_anything_has_one_class_and_no_masks(tmp_path: Path) -> None:
    _picture(tmp_path / "images" / "a.png")
    listing = LAYOUTS["folder"].listing(tmp_path, OPTIONS)
    assert listing.class_names == ("lesion",)
    assert verify_item(listing.items[0]).mask is None


def test_folder_with_labels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _picture(tmp_path / "images" / f"{name}.png")
        _mask(tmp_path / "masks" / f"{name}_mask.png")
    (tmp_path / "labels.csv").write_text(
        "image,label,patient_id,pixel_spacing,birads\na.png,benign,p1,0.2,3\nb,malignant,,,\n"
    )
    listing = LAYOUTS["folder"].listing(tmp_path, OPTIONS)
    assert not listing.problems and listing.class_names == ("benign", "malignant")
    first, second = listing.items
    assert (first.patient_id, first.pixel_spacing, dict(first.attributes)) == ("p1", 0.2, {"birads": "3"})
    assert (second.label_name, second.patient_id, second.pixel_spacing, dict(second.attributes)) == (
        "malignant", None, None, {},
    )  # fmt: skip


def test_folder_names_every_fault_of_the_labels(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        _picture(tmp_path / "images" / f"{name}.png")
    _mask(tmp_path / "masks" / "a.png")
    _mask(tmp_path / "masks" / "z.png")
    rows = [
        "image,label,pixel_spacing",
        "a.png,benign,wide",
        "b.png,,",
        "b.png,benign,",
        "b.png,benign,",
        "q.png,x,",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    messages = [str(problem) for problem in LAYOUTS["folder"].listing(tmp_path, OPTIONS).problems]
    expected = ["line 2: pixel_spacing 'wide'", "line 3: no label for b.png", "line 5: a second row for b.png",
                "masks/z.png: mask without image", "images/a.png: no row in labels.csv",
                "images/c.png: no row in labels.csv", "labels.csv: q.png: row without image"]  # fmt: skip
    for part in expected:
        assert any(part in message for message in messages), part
    assert len(messages) == len(expected)


def test_folder_labels_without_the_needed_columns(tmp_path: Path) -> None:
    _picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels.csv").write_text("name,class\na.png,benign\n")
    with pytest.raises(ValueError, match="column image and label missing; it has name, class"):
        LAYOUTS["folder"].listing(tmp_path, OPTIONS)


def test_phantom() -> None:
    listing = phantom_listing(num_images=8, seed=2)
    images, _ = verify_items(listing.items)
    assert [image.item.source_path for image in images] == [f"phantom/2/{index}" for index in range(8)]
    assert all(image.attributes["echogenicity"] for image in images)
    assert len({image.item.patient_id for image in images}) == 8
    with pytest.raises(ValueError, match="--num-images 0"):
        phantom_listing(num_images=0)
