from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factory.datasets.layout import Item, Problem
from factory.datasets.verification import BadItem, verify_item, verify_items

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 50), np.uint8)
MASK = np.zeros((40, 50), np.uint8)
MASK[10:20, 10:30] = 255


def _save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def _item(folder: Path, image: Path | None = None, masks: list[Path] | None = None, **more: object) -> Item:
    image = image or _save(folder / "a.png", GREY)
    if masks is None:
        masks = [_save(folder / "a_mask.png", MASK)]
    return Item(
        source_path=image.name, label_name="benign", image=image, masks=masks, has_lesion=True, **more
    )  # type: ignore[arg-type]


def test_a_good_item_comes_back_as_grey_and_a_binary_mask(tmp_path: Path) -> None:
    verified = verify_item(_item(tmp_path))
    assert np.array_equal(verified.image, GREY)
    assert np.array_equal(verified.mask, (MASK > 0).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_masks_of_every_mode_read_the_same(tmp_path: Path, mode: str) -> None:
    mask = _save(tmp_path / "m.png", MASK, mode)
    assert np.array_equal(verify_item(_item(tmp_path, masks=[mask])).mask, (MASK > 0).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_images_stored_as_colour_are_grey(tmp_path: Path, mode: str) -> None:
    image = _save(tmp_path / "c.png", GREY, mode)
    assert np.array_equal(verify_item(_item(tmp_path, image=image)).image, GREY)


def test_colour_images_stay_coloured(tmp_path: Path) -> None:
    pixels = np.stack([GREY, GREY, 255 - GREY], axis=2)
    assert np.array_equal(verify_item(_item(tmp_path, image=_save(tmp_path / "c.png", pixels))).image, pixels)


def test_several_masks_are_merged(tmp_path: Path) -> None:
    other = np.zeros_like(MASK)
    other[30:35, 40:45] = 255
    masks = [_save(tmp_path / "m.png", MASK), _save(tmp_path / "m_1.png", other, "1")]
    merged = verify_item(_item(tmp_path, masks=masks)).mask
    assert merged is not None and np.array_equal(merged, ((MASK | other) > 0).astype(np.uint8))


def _truncated(folder: Path) -> Item:
    image = _save(folder / "t.png", RNG.integers(0, 256, (200, 200), np.uint8))
    image.write_bytes(image.read_bytes()[:9000])
    return _item(folder, image=image)


def _not_an_image(folder: Path) -> Item:
    (folder / "n.png").write_text("hello")
    return _item(folder, image=folder / "n.png")


def _empty_file(folder: Path) -> Item:
    (folder / "e.png").touch()
    return _item(folder, image=folder / "e.png")


def _sixteen_bit(folder: Path) -> Item:
    return _item(folder, image=_save(folder / "s.png", GREY.astype(np.uint16) * 257))


def _sixteen_bit_rgb(folder: Path) -> Item:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(50 * 6) for _ in range(40))
    header = struct.pack(">IIBBBBB", 50, 40, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / "r.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return _item(folder, image=folder / "r.png")


def _floating_point(folder: Path) -> Item:
    Image.fromarray(GREY.astype(np.float32)).save(folder / "f.tif")
    return _item(folder, image=folder / "f.tif")


def _mask_of(pixels: np.ndarray) -> Callable[[Path], Item]:
    return lambda folder: _item(folder, masks=[_save(folder / "m.png", pixels)])


GREYISH = MASK.copy()
GREYISH[0, 0] = 7
COLOURED = np.stack([MASK, MASK, np.zeros_like(MASK)], axis=2)
TRANSPARENT = np.dstack([GREY, GREY, GREY, MASK])

BAD = {
    "truncated": (_truncated, "damaged .*truncated.*intact copy"),
    "not an image": (_not_an_image, "cannot be read as an image"),
    "empty file": (_empty_file, "cannot be read as an image"),
    "16 bits": (_sixteen_bit, "16 bits per channel.*stated window"),
    "16-bit RGB": (_sixteen_bit_rgb, "16 bits per channel"),
    "floating point": (_floating_point, "more than 8 bits"),
    "absent image": (lambda f: _item(f, image=f / "absent.png"), "No such file"),
    "no mask": (lambda f: _item(f, masks=[]), "image without mask"),
    "mask of another size": (_mask_of(MASK[:-1]), r"mask m\.png\): mask is 50×39 px, the image 50×40 px"),
    "grey mask": (_mask_of(GREYISH), "not binary .3 grey levels"),
    "mask without background level": (_mask_of(np.maximum(MASK, 5)), "not binary"),
    "coloured mask": (_mask_of(COLOURED), "mask is coloured"),
    "empty lesion mask": (_mask_of(np.zeros_like(MASK)), "empty mask in the lesion class 'benign'"),
    "full mask": (_mask_of(np.full_like(MASK, 255)), "covers the whole image"),
    "transparent": (lambda f: _item(f, image=_save(f / "t.png", TRANSPARENT)), "partly transparent"),
    "tiny": (lambda f: _item(f, image=_save(f / "t.png", GREY[:8]), masks=[_save(f / "m.png", MASK[8:16])]),
             "only 50×8 px"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_every_fault_is_named_with_the_file_and_a_remedy(tmp_path: Path, kind: str) -> None:
    make, message = BAD[kind]
    item = make(tmp_path)
    with pytest.raises(BadItem, match=message) as caught:
        verify_item(item)
    assert item.source_path in str(caught.value)
    assert caught.value.problem.remedy


def test_a_lesion_in_a_class_without_lesions_is_refused(tmp_path: Path) -> None:
    image, mask = _save(tmp_path / "n.png", GREY), _save(tmp_path / "m.png", MASK)
    item = Item(source_path="n.png", label_name="normal", image=image, masks=[mask], has_lesion=False)
    with pytest.raises(BadItem, match="mask with a lesion in the class 'normal'"):
        verify_item(item)


def test_fail_names_every_problem_at_once(tmp_path: Path) -> None:
    items = [_item(tmp_path), _truncated(tmp_path), _sixteen_bit(tmp_path)]
    listed = [Problem(source_path="x.csv", what="no row", remedy="add one")]
    with pytest.raises(ValueError, match="3 problem") as caught:
        verify_items(items, listed)
    for name in ("t.png", "s.png", "x.csv"):
        assert name in str(caught.value)


def test_quarantine_keeps_the_good_and_returns_the_bad(tmp_path: Path) -> None:
    done: list[int] = []
    items = [_item(tmp_path), _truncated(tmp_path), _item(tmp_path)]
    images, problems = verify_items(items, on_error="quarantine", max_quarantined=0.5, progress=done.append)
    assert [image.item for image in images] == [items[0], items[2]]
    assert [problem.source_path for problem in problems] == ["t.png"]
    assert sum(done) == 3


def test_too_much_quarantine_is_an_error(tmp_path: Path) -> None:
    items = [_item(tmp_path), _truncated(tmp_path)]
    with pytest.raises(ValueError, match="--max-quarantined 0.1 of 2 items"):
        verify_items(items, on_error="quarantine")


def test_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image found"):
        verify_items([])
