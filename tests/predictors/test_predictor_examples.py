"""Sets of labelled images: alignment of their columns, and their files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from factory.imaging import Letterbox
from factory.predictors.examples import Examples, NativeTruth, concatenate, load_npz, save_npz


def examples(count: int = 5, *, prefix: str = "r", masks: bool = True) -> Examples:
    rng = np.random.default_rng(count)
    native = []
    for row in range(count):
        mask = rng.integers(0, 2, (20 + row, 30), np.uint8) if row % 2 == 0 else None
        box = Letterbox(height=20 + row, width=30, size=16)
        native.append(NativeTruth(letterbox=box, mask=mask, pixel_spacing=0.1 * row if row else None))
    return Examples(
        images=rng.integers(0, 256, (count, 16, 16, 1), np.uint8),
        labels=np.arange(count) % 3,
        class_names=("benigno", "maligno", "μ"),
        ids=tuple(f"{prefix}{row}" for row in range(count)),
        groups=tuple(f"g{row // 2}" for row in range(count)),
        is_real=np.arange(count) % 2 == 0,
        masks=rng.integers(0, 3, (count, 16, 16), np.uint8) if masks else None,
        has_mask=np.arange(count) != 1 if masks else None,
        native=tuple(native),
    )


def assert_same(one: Examples, other: Examples) -> None:
    for name in ("images", "labels", "is_real", "masks", "has_mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.ids, one.groups, one.class_names) == (other.ids, other.groups, other.class_names)
    assert (one.native is None) == (other.native is None)
    for a, b in zip(one.native or (), other.native or ()):
        assert (a.letterbox, a.pixel_spacing) == (b.letterbox, b.pixel_spacing)
        np.testing.assert_array_equal(a.mask, b.mask)


def test_a_set_survives_its_file(tmp_path: Path) -> None:
    for kept in (examples(), replace(examples(masks=False), native=None), examples().take([])):
        assert_same(load_npz(save_npz(kept, tmp_path / "set.npz")), kept)
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_files_are_not_unpickled(tmp_path: Path) -> None:
    path = save_npz(examples(), tmp_path / "set.npz")
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **arrays | {"ids": np.array(["a"] * 5, dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        load_npz(path)
    del arrays["groups"]
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"set\.npz: no array 'groups'"):
        load_npz(path)


def test_rows_stay_together_when_taken_and_joined() -> None:
    whole = examples()
    assert_same(concatenate(whole.take([0, 1]), whole.take(slice(2, None))), whole)
    picked = whole.take(np.array([3, 0, 3]))
    assert picked.ids == ("r3", "r0", "r3")
    np.testing.assert_array_equal(picked.images, whole.images[[3, 0, 3]])
    assert picked.native is not None and whole.native is not None
    assert picked.native[1] is whole.native[0]
    assert_same(whole.take(whole.labels == 0), whole.take([0, 3]))
    np.testing.assert_array_equal(whole.counts(), [2, 2, 1])


def test_rows_without_masks_are_known_after_joining() -> None:
    both = concatenate(examples(masks=False, prefix="a"), examples(prefix="b"))
    assert both.has_mask is not None
    np.testing.assert_array_equal(both.has_mask, [False] * 5 + [True, False, True, True, True])
    assert concatenate(examples(), replace(examples(prefix="b"), native=None)).native is None
    with pytest.raises(ValueError, match=r"class_names: part 1 has \('x',\)"):
        concatenate(examples(), replace(examples(), class_names=("x",), labels=np.zeros(5, np.int64)))


def test_digests() -> None:
    one = examples()
    assert one.digest() == one.take([4, 2, 0, 1, 3]).digest()
    assert one.digest() != one.take([0, 1, 2, 3]).digest()
    changed = one.images.copy()
    changed[2, 3, 4, 0] ^= 1
    assert replace(one, images=changed).digest() == one.digest()
    assert replace(one, images=changed).content_digest() != one.content_digest()
    relabelled = replace(one, labels=(one.labels + 1) % 3)
    assert relabelled.content_digest() != one.content_digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((5, 16, 16, 2), np.uint8)}, r"images: want uint8 \(N, S, S, 1 or 3\)"),
        ({"images": np.zeros((5, 16, 16, 1), np.float32)}, "images: want uint8"),
        ({"labels": np.array([0, 1, 7, 0, 0])}, "labels: row r2 has 7, want 0 … 2"),
        ({"labels": np.zeros(4, np.int64)}, r"labels: want int64 \(5,\)"),
        ({"groups": ("g",)}, "groups: 1 for 5 images"),
        ({"masks": None}, "has_mask: some rows have a mask, but masks is None"),
        ({"masks": np.zeros((5, 8, 8), np.uint8)}, r"masks: want uint8 \(5, 16, 16\)"),
        ({"class_names": ("a", "a", "b")}, "class_names: want at least one, each once"),
    ],
)
def test_bad_sets_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(examples(), **change)  # type: ignore[arg-type]
