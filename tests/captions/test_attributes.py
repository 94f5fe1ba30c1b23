"""The template captioner's words against planted images."""

import numpy as np
import pytest

from factory.captions.attributes import COLOURS, describe_row, geometry_of
from factory.datasets.skin_phantom import skin_sample
from factory.imaging import TrainingRow


def row_of(image: np.ndarray, mask: np.ndarray | None, label: str = "mole") -> TrainingRow:
    return TrainingRow(
        image_id="i", label=0, label_name=label, group_id="g", image=image, mask=mask, attributes={}
    )


def ellipse(size: int, x: float, y: float, a: float, b: float) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    return (((xs - x) / a) ** 2 + ((ys - y) / b) ** 2 <= 1).astype(np.uint8)


def painted(mask: np.ndarray, inside: tuple[int, int, int], outside: tuple[int, int, int]) -> np.ndarray:
    return np.where(mask[..., None] > 0, np.uint8(inside), np.uint8(outside)).astype(np.uint8)


@pytest.mark.parametrize(
    ("axes", "centre", "size", "shape", "position"),
    [
        ((8, 8), (64, 64), "very small", "round", "centre"),
        ((20, 13), (25, 25), "small", "oval", "upper left"),
        ((14, 34), (105, 64), "medium-sized", "elongated", "right"),
        ((50, 50), (64, 64), "large", "round", "centre"),
        ((63, 63), (64, 64), "very large", "round", "centre"),
    ],
)
def test_size_shape_and_position(axes: tuple, centre: tuple, size: str, shape: str, position: str) -> None:
    mask = ellipse(128, *centre, *axes)
    found = describe_row(row_of(painted(mask, (90, 60, 40), (230, 190, 170)), mask))
    assert (found["size"], found["shape"], found["position"]) == (size, shape, position)


def test_an_indented_outline_is_irregular() -> None:
    ys, xs = np.mgrid[:128, :128] - 64
    mask = (np.hypot(ys, xs) < 28 * (1 + 0.4 * np.cos(5 * np.arctan2(ys, xs)))).astype(np.uint8)
    assert describe_row(row_of(painted(mask, (90, 60, 40), (230, 190, 170)), mask))["shape"] == "irregular"


@pytest.mark.parametrize("name", ["black", "dark brown", "brown", "light brown", "red", "blue-grey"])
def test_colours_by_name(name: str) -> None:
    from skimage.color import lab2rgb

    rgb = tuple(int(v) for v in np.round(lab2rgb(np.array(COLOURS[name])[None])[0] * 255))
    mask = ellipse(96, 48, 48, 20, 20)
    assert describe_row(row_of(painted(mask, rgb, (230, 190, 170)), mask))["colour"] == name  # type: ignore[arg-type]


def test_two_colours_and_skin() -> None:
    mask = ellipse(96, 48, 48, 24, 24)
    image = painted(mask, (64, 38, 27), (60, 42, 34))
    image[(mask > 0) & (np.mgrid[:96, :96][1] < 44)] = (184, 76, 72)
    found = describe_row(row_of(image, mask))
    assert found["colour"] == "dark brown and red"
    assert found["skin"] == "dark"


def test_phantom_truth_is_recognised_mostly() -> None:
    samples = [skin_sample(128, 3, i) for i in range(40)]
    found = [describe_row(row_of(s.image, s.mask)) for s in samples]
    hair = np.mean([("hair" in f) == (s.attributes["hair"] == "yes") for f, s in zip(found, samples)])
    border = np.mean([f.get("border") == s.attributes["border"] for f, s in zip(found, samples)])
    brown = np.mean([(s.attributes["colour"] in f["colour"]) for f, s in zip(found, samples)])
    assert hair > 0.9 and border > 0.8 and brown > 0.9, (hair, border, brown)


def test_grey_images_get_brightness_not_colour() -> None:
    mask = ellipse(96, 48, 48, 20, 14)
    image = np.where(mask > 0, 40, 140).astype(np.uint8)
    found = describe_row(row_of(image, mask, "benign_mass"))
    assert found["brightness"] == "much darker" and found["border"] == "sharp"
    assert not {"colour", "skin", "hair"} & found.keys()
    assert found["diagnosis"] == "benign mass"


def test_without_a_lesion_only_the_surroundings_are_described() -> None:
    image = painted(np.zeros((96, 96), np.uint8), (0, 0, 0), (235, 205, 190))
    for mask in (None, np.zeros((96, 96), np.uint8)):
        found = describe_row(row_of(image, mask, "normal"))
        assert set(found) == {"diagnosis", "skin"}


def test_padding_does_not_count_as_skin() -> None:
    mask = ellipse(96, 48, 48, 14, 14)
    image = painted(mask, (90, 60, 40), (240, 208, 196))
    image[:20] = image[-20:] = 0
    assert describe_row(row_of(image, mask))["skin"] in ("very light", "light")


def test_geometry_is_in_fractions_of_the_frame() -> None:
    mask = np.zeros((100, 200), np.uint8)
    mask[40:60, 20:60] = 1
    assert geometry_of(mask) == {"mask.area": "0.0400", "mask.x": "0.2000", "mask.y": "0.5000"}
    assert geometry_of(np.zeros((4, 4), np.uint8)) == {} and geometry_of(None) == {}
