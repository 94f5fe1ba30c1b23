"""Every format, read back by its own reader: pixels, masks and labels equal those in the tables."""

import csv
import hashlib
import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from export_tables import HOSTILE, LABELS, SIZE, WITHOUT_MASK, stored_rows, two_lesions
from PIL import Image

from factory.export import FORMATS, NEEDS_MASK
from factory.export.coco import instances, run_lengths
from factory.export.items import ExportItem, ExportLayout
from factory.export.selection import Choice
from factory.export.write import ExportSettings, plan_export, write_export
from factory.imaging import decode_png, encode_png
from factory.storage import open_table

Rows = dict[str, dict]


@pytest.fixture(scope="module")
def rows(synthetic_uri: str, real_uri: str) -> Rows:
    """Every stored row of both tables by id."""
    return stored_rows(synthetic_uri, "request_id") | stored_rows(real_uri, "image_id")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, synthetic_uri: str, real_uri: str) -> dict[str, Path]:
    """One mixed export per format, with validation rows."""
    root = tmp_path_factory.mktemp("exports")
    for name in FORMATS:
        settings = ExportSettings(format=name, out=str(root / name), rows_per_shard=10)
        tables = open_table(synthetic_uri), open_table(real_uri)
        write_export(plan_export(*tables, Choice(ratio=1, include_val=True), settings), settings)
    return {name: root / name for name in FORMATS}


def samples(folder: Path) -> list[dict[str, str]]:
    with (folder / "samples.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def same_pixels(data: bytes | np.ndarray | Image.Image, stored: bytes) -> bool:
    pixels = decode_png(data) if isinstance(data, bytes) else np.asarray(data)
    return bool(np.array_equal(pixels, decode_png(stored)))


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_export_lists_its_rows_and_checks(name: str, exports: dict[str, Path], rows: Rows) -> None:
    folder = exports[name]
    listed = samples(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [row["id"] for row in listed] == [row["id"] for row in manifest["rows"]]
    assert len({row["id"] for row in listed}) == len(listed) == 42 == manifest["num_rows"]
    for line, entry in zip(listed, manifest["rows"]):
        stored = rows[line["id"]]
        is_real = "image_id" in stored
        assert (
            line["origin"]
            == entry["origin"]
            == ("real" if is_real else "derived" if stored["derived"] else "synthetic")
        )
        assert (int(line["label"]), line["label_name"]) == (stored["label"], stored["label_name"])
        assert line["split"] == stored["split"] and stored["split"] != "test"
        assert line["image_sha256"] == hashlib.sha256(stored["image"]).hexdigest()
        assert "patient-secret" not in json.dumps(line)
    done = subprocess.run(
        ["sha256sum", "-c", "--quiet", "checksums.sha256"], cwd=folder, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout
    summed = {line[66:] for line in (folder / "checksums.sha256").read_text().splitlines()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert summed == there - {"checksums.sha256"}
    assert all(path.resolve().is_relative_to(folder) for path in folder.rglob("*"))
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("name", list(FORMATS))
def test_names_of_classes_never_become_paths(name: str, exports: dict[str, Path]) -> None:
    assert any(row["label_name"] == HOSTILE for row in samples(exports[name]))
    assert not (exports[name].parent / "etc").exists()
    assert not [path for path in exports[name].parent.rglob("*") if "passwd" in path.name]


def test_image_folders_load_with_the_labels_of_the_table(exports: dict[str, Path], rows: Rows) -> None:
    folder = exports["folder"]
    classes = sorted(path.name for path in (folder / "train" / "images").iterdir())
    files = sorted((folder / "train" / "images").rglob("*.png"))
    assert len(files) == 36
    for path in files:
        stored = rows[path.stem]
        assert classes.index(path.parent.name) == stored["label"]
        assert same_pixels(path.read_bytes(), stored["image"])
    for row in samples(folder):
        stored = rows[row["id"]]
        assert (row["mask"] == "") == (stored["mask"] is None)
        if row["mask"]:
            assert same_pixels((folder / row["mask"]).read_bytes(), stored["mask"])
    assert json.loads((folder / "classes.json").read_text()) == {"0": "benign", "1": HOSTILE}


@pytest.mark.slow  # torchvision takes long to import
def test_torchvision_reads_the_folders(exports: dict[str, Path], rows: Rows) -> None:
    from torchvision.datasets import ImageFolder

    loaded = ImageFolder(str(exports["folder"] / "train" / "images"))
    assert len(loaded) == 36
    assert all(label == rows[Path(path).stem]["label"] for path, label in loaded.samples)


def test_class_folders_sort_by_number(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(11)]
    layout = ExportLayout(name="x", class_names=names, splits=("train",), num_items=1)
    FORMATS["folder"](tmp_path, layout).finish()
    folders = sorted(path.name for path in (tmp_path / "train" / "images").iterdir())
    assert [int(name) for name in folders] == list(range(11))


def test_nnunet_raw_data_is_complete(exports: dict[str, Path], rows: Rows) -> None:
    folder = exports["nnunet"]
    about = json.loads((folder / "dataset.json").read_text())
    cases = sorted(path.name.removesuffix(".png") for path in (folder / "labelsTr").iterdir())
    images = sorted(path.name.removesuffix("_0000.png") for path in (folder / "imagesTr").iterdir())
    assert cases == images and about["numTraining"] == len(cases) == 42
    assert about["channel_names"] == {"0": "greyscale"} and about["file_ending"] == ".png"
    values = set(about["labels"].values())
    assert values == {0, 1}
    for case in cases:
        image = (folder / "imagesTr" / f"{case}_0000.png").read_bytes()
        mask = (folder / "labelsTr" / f"{case}.png").read_bytes()
        assert same_pixels(image, rows[case]["image"]) and same_pixels(mask, rows[case]["mask"])
        assert decode_png(image).shape == decode_png(mask).shape
        assert set(np.unique(decode_png(mask)).tolist()) <= values
    (split,) = json.loads((folder / "splits_final.json").read_text())
    assert sorted(split["train"] + split["val"]) == cases
    assert all(rows[case]["split"] == "val" for case in split["val"]) and len(split["val"]) == 6


def test_nnunet_with_one_value_per_class(tmp_path: Path, synthetic_uri: str, rows: Rows) -> None:
    settings = ExportSettings(format="nnunet", out=str(tmp_path / "n"), mask_values="class", channels="rgb")
    write_export(plan_export(open_table(synthetic_uri), None, Choice(), settings), settings)
    about = json.loads((tmp_path / "n" / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "benign": 1, HOSTILE: 2}
    assert list(about["channel_names"].values()) == ["R", "G", "B"]
    assert not (tmp_path / "n" / "splits_final.json").exists()
    for path in (tmp_path / "n" / "labelsTr").iterdir():
        assert np.array_equal(decode_png(path.read_bytes()), two_lesions() * (rows[path.stem]["label"] + 1))
        image = decode_png((tmp_path / "n" / "imagesTr" / f"{path.stem}_0000.png").read_bytes())
        assert np.array_equal(image, np.repeat(decode_png(rows[path.stem]["image"])[:, :, None], 3, axis=2))


def test_hugging_face_loads_from_disk(exports: dict[str, Path], rows: Rows) -> None:
    import datasets

    loaded = datasets.load_from_disk(str(exports["huggingface"]))
    assert {split: len(loaded[split]) for split in loaded} == {"train": 36, "validation": 6}
    assert loaded["train"].features["label"].names == list(LABELS)
    seen = [row for split in loaded for row in loaded[split]]
    assert any(row["mask"] is None for row in seen) == any(rows[row["id"]]["mask"] is None for row in seen)
    for row in seen:
        stored = rows[row["id"]]
        assert same_pixels(row["image"], stored["image"]) and row["label"] == stored["label"]
        if stored["mask"] is not None:
            assert same_pixels(row["mask"], stored["mask"])
    for line in samples(exports["huggingface"]):
        assert loaded[line["image"]][int(line["image_member"])]["id"] == line["id"]


def test_rows_without_mask_leave_in_formats_that_can_say_so(tmp_path: Path, synthetic_uri: str) -> None:
    import datasets

    settings = ExportSettings(format="huggingface", out=str(tmp_path / "h"))
    write_export(plan_export(open_table(synthetic_uri), None, Choice(), settings), settings)
    masks = datasets.load_from_disk(str(tmp_path / "h"))["train"]["mask"]
    assert sum(mask is None for mask in masks) == len(WITHOUT_MASK)


def test_webdataset_reads_its_shards(exports: dict[str, Path], rows: Rows) -> None:
    import webdataset

    shards = sorted(str(path) for path in exports["webdataset"].glob("*.tar"))
    assert [Path(name).name for name in shards] == [
        *(f"train-{number:06d}.tar" for number in range(4)),
        "val-000000.tar",
    ]
    seen = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert sorted(sample["__key__"] for sample in seen) == sorted(
        r["id"] for r in samples(exports["webdataset"])
    )
    for sample in seen:
        stored = rows[sample["__key__"]]
        assert sample["json"]["label"] == stored["label"]
        assert np.array_equal(np.asarray(sample["image.png"].convert("L")), decode_png(stored["image"]))
        assert ("mask.png" in sample) == (stored["mask"] is not None)
        if "mask.png" in sample:
            assert np.array_equal(np.asarray(sample["mask.png"].convert("L")), decode_png(stored["mask"]))


def test_shards_have_the_same_bytes_every_time(
    exports: dict[str, Path], tmp_path: Path, synthetic_uri: str, real_uri: str
) -> None:
    settings = ExportSettings(format="webdataset", out=str(tmp_path / "webdataset"), rows_per_shard=10)
    tables = open_table(synthetic_uri), open_table(real_uri)
    write_export(plan_export(*tables, Choice(ratio=1, include_val=True), settings), settings)
    for name in ("checksums.sha256", "manifest.json", "README.md", "train-000002.tar"):
        assert (tmp_path / "webdataset" / name).read_bytes() == (exports["webdataset"] / name).read_bytes()


def decoded(segmentation: dict) -> np.ndarray:
    """Uncompressed run-length encoding back to (H, W), after the COCO definition."""
    counts = segmentation["counts"]
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    return values.reshape(segmentation["size"], order="F").astype(bool)


def test_coco_annotations_add_up_to_the_masks(exports: dict[str, Path], rows: Rows) -> None:
    folder = exports["coco"]
    ids: list[int] = []
    for split, number in (("train", 36), ("val", 6)):
        document = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        assert [category["name"] for category in document["categories"]] == list(LABELS)
        assert len(document["images"]) == number
        for image in document["images"]:
            stored = rows[Path(image["file_name"]).stem]
            assert same_pixels((folder / split / image["file_name"]).read_bytes(), stored["image"])
            own = [a for a in document["annotations"] if a["image_id"] == image["id"]]
            union = sum(decoded(annotation["segmentation"]).astype(int) for annotation in own)
            assert np.array_equal(union, decode_png(stored["mask"]))  # also: no pixel twice
            assert len(own) == 2 and {a["category_id"] for a in own} == {stored["label"] + 1}
            assert sorted(a["bbox"] for a in own) == [[0, 0, 4, 3], [8, 8, 7, 6]]
            assert sorted(a["area"] for a in own) == [12, int(two_lesions()[8:].sum())]
            ids += [annotation["id"] for annotation in own]
    assert len(set(ids)) == len(ids)


def test_pycocotools_reads_the_masks(exports: dict[str, Path], rows: Rows) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    loaded = coco_module.COCO(str(exports["coco"] / "annotations" / "instances_train.json"))
    for image_id, image in loaded.imgs.items():
        masks = [loaded.annToMask(annotation) for annotation in loaded.imgToAnns[image_id]]
        stored = decode_png(rows[Path(image["file_name"]).stem]["mask"])
        assert np.array_equal(np.sum(masks, axis=0), stored)


def test_run_lengths_begin_with_zeros() -> None:
    inside = np.array([[1, 0], [1, 1]], bool)
    assert run_lengths(inside) == [0, 2, 1, 1]
    assert run_lengths(~inside) == [2, 1, 1]
    assert run_lengths(np.zeros((2, 3), bool)) == [6]
    assert run_lengths(np.ones((2, 3), bool)) == [0, 6]
    assert list(instances(np.zeros((4, 4), np.uint8))) == []


def item(**changes: object) -> ExportItem:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[2:4, 2:4] = 1
    values: dict = {
        "row_id": "a1",
        "origin": "synthetic",
        "split": "train",
        "label": 0,
        "label_name": "benign",
        "image": encode_png(mask),
        "mask": encode_png(mask),
    }
    return ExportItem(**(values | changes))


@pytest.mark.parametrize("row_id", ["../x", "", "a/b", "/abs", "..", ".hidden", "a\0b", "a.b", "-rf", "a\nb"])
def test_a_row_id_that_could_be_a_path_is_refused(row_id: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        item(row_id=row_id)


def test_the_test_split_is_refused_to_the_last() -> None:
    with pytest.raises(ValueError, match="only train and val"):
        item(split="test")


@pytest.mark.parametrize("name", sorted(NEEDS_MASK))
def test_bad_masks_are_refused_with_the_row(name: str, tmp_path: Path) -> None:
    layout = ExportLayout(name="x", class_names=LABELS, splits=("train",), num_items=1)
    writer = FORMATS[name](tmp_path, layout)
    with pytest.raises(ValueError, match="row a1 has no mask"):
        writer.add(item(mask=None))
    with pytest.raises(ValueError, match=r"row a1: mask \(3, 3\)"):
        writer.add(item(mask=encode_png(np.zeros((3, 3), np.uint8))))


def test_nnunet_refuses_unknown_values_and_other_channels(tmp_path: Path) -> None:
    layout = ExportLayout(name="x", class_names=LABELS, splits=("train",), num_items=1)
    writer = FORMATS["nnunet"](tmp_path, layout)
    with pytest.raises(ValueError, match=r"mask values \[7\].*--mask-values class"):
        writer.add(item(mask=encode_png(np.full((SIZE, SIZE), 7, np.uint8))))
    writer.add(item())
    colour = encode_png(np.zeros((SIZE, SIZE, 3), np.uint8))
    with pytest.raises(ValueError, match="row b2 has 3 channel"):
        writer.add(item(row_id="b2", image=colour))
    palette = io.BytesIO()
    Image.new("P", (SIZE, SIZE)).save(palette, "PNG")
    with pytest.raises(ValueError, match="mode P"):
        writer.add(item(row_id="c3", image=palette.getvalue()))
