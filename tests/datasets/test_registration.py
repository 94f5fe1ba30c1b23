import numpy as np
import pytest
from frame_variants import VARIANTS, cropped, resized
from PIL import Image

from factory.datasets.phantom import PhantomConfig, phantom_sample
from factory.datasets.registration import Registrar, normalised

LARGE = PhantomConfig(size=256)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [phantom_sample(LARGE, 0, index).image for index in range(6)]


def _best(registrar: Registrar, first: int, second: int) -> float:
    found = []
    for template, target in ((first, second), (second, first)):
        _, placement = registrar.coarse(template, [target])[0]
        found.append(registrar.refine(template, target, placement))
    return max(match.correlation for match in found if match.overlap > 0.5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_a_frame_registers(frames: list[np.ndarray], variant: str) -> None:
    registrar = Registrar([frames[0], VARIANTS[variant](frames[0])])
    assert _best(registrar, 0, 1) > 0.75


def test_other_frames_do_not(frames: list[np.ndarray]) -> None:
    registrar = Registrar(frames)
    others = [_best(registrar, a, b) for a in range(6) for b in range(a)]
    assert max(others) < 0.27


def test_the_placement_is_where_the_crop_was(frames: list[np.ndarray]) -> None:
    crop = resized(cropped(frames[1], 0.1, 0.2, 0.6, 0.6), 1.3)
    registrar = Registrar([crop, frames[1]])
    _, placement = registrar.coarse(0, [1])[0]
    match = registrar.refine(0, 1, placement)
    assert np.allclose(match.placement.scale, 0.6, atol=0.01)
    assert np.allclose(match.placement.offset, (0.1, 0.2), atol=0.01)
    assert match.overlap > 0.95


def test_separate_scales_of_the_axes_are_found(frames: list[np.ndarray]) -> None:
    squeezed = np.asarray(Image.fromarray(frames[2]).resize((256, 236), Image.Resampling.BICUBIC))
    registrar = Registrar([squeezed, frames[2]])
    _, placement = registrar.coarse(0, [1])[0]
    match = registrar.refine(0, 1, placement)
    assert match.correlation > 0.9
    assert match.placement.scale[0] / match.placement.scale[1] == pytest.approx(256 / 236, abs=0.01)


def test_brightness_and_contrast_do_not_matter() -> None:
    frame = phantom_sample(LARGE, 0, 3).image
    darker = (40 + 0.5 * frame).astype(np.uint8)
    a, b = normalised(frame, 96, 4.0), normalised(darker, 96, 4.0)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98


def test_blank_images_have_no_correlation() -> None:
    blank = np.full((100, 120), 30, np.uint8)
    registrar = Registrar([blank, blank.copy(), phantom_sample(LARGE, 0, 0).image])
    for other in (1, 2):
        _, placement = registrar.coarse(0, [other])[0]
        assert abs(registrar.refine(0, other, placement).correlation) < 0.1
