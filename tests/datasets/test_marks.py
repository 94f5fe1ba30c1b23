import numpy as np
from PIL import Image, ImageDraw, ImageFont

from factory.datasets.marks import find_marks
from factory.datasets.phantom import PhantomConfig, phantom_sample

LARGE = PhantomConfig(size=256)


def _image(index: int) -> np.ndarray:
    return phantom_sample(LARGE, 0, index).image


def test_clean_images_have_no_marks() -> None:
    assert not any(find_marks(_image(index)).any for index in range(12))


def test_text_on_a_dark_ground_is_found() -> None:
    picture = Image.fromarray((_image(0) * 0.3).astype(np.uint8))
    ImageDraw.Draw(picture).text((30, 215), "LEFT BREAST", fill=255, font=ImageFont.load_default(13))
    assert find_marks(np.asarray(picture)).num_strokes >= 2


def test_calipers_are_found() -> None:
    image = _image(1).copy()
    for y, x in ((90, 60), (90, 150)):
        image[y - 5 : y + 6, x] = 255
        image[y, x - 5 : x + 6] = 255
    assert find_marks(image).num_crosses == 2


def test_colour_overlay_is_found_but_a_photograph_is_none() -> None:
    grey = _image(2)
    overlay = np.repeat(grey[:, :, None], 3, axis=2)
    overlay[100:112, 40:60] = (220, 30, 20)
    assert find_marks(overlay).any and find_marks(overlay).colour > 0
    skin = np.stack([grey // 2 + 100, grey // 2 + 50, grey // 3], axis=2).astype(np.uint8)
    assert find_marks(skin).colour == 0
