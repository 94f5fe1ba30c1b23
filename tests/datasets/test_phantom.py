import numpy as np
import pytest
from scipy import ndimage, spatial

from factory.datasets.phantom import (
    BENIGN,
    MALIGNANT,
    NORMAL,
    SCANNER_A,
    SCANNER_B,
    PhantomConfig,
    Scanner,
    long_tail,
    phantom_class,
    phantom_sample,
)
from factory.datasets.ultrasound import Tissue, scan

DEFAULT = PhantomConfig()


def _uniform(size: int, attenuation: float = 0.62) -> Tissue:
    flat = np.zeros((size, size), np.float32)
    return Tissue(echo=flat, attenuation=flat + attenuation, density=flat + 1, specular=flat)


def test_the_same_seed_and_index_give_the_same_image_whatever_was_drawn_before() -> None:
    first = phantom_sample(DEFAULT, 3, 17)
    phantom_sample(DEFAULT, 3, 4)
    again = phantom_sample(DEFAULT, 3, 17)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, phantom_sample(DEFAULT, 4, 17).image)
    assert not np.array_equal(first.image, phantom_sample(DEFAULT, 3, 18).image)


def test_shapes_and_types() -> None:
    for size in (64, 128, 160):
        sample = phantom_sample(PhantomConfig(size=size), 0, 0)
        assert sample.image.shape == sample.mask.shape == (size, size)
        assert sample.image.dtype == sample.mask.dtype == np.uint8
        assert set(np.unique(sample.mask)) == {0, 1}
        assert sample.image.std() > 20


@pytest.mark.parametrize("num_images", [20, 200, 1000])
def test_class_shares_hold_for_any_number_of_images(num_images: int) -> None:
    config = PhantomConfig(classes=(BENIGN, MALIGNANT, NORMAL))
    names = [phantom_class(config, 0, index).name for index in range(num_images)]
    total = sum(prior.share for prior in config.classes)
    for prior in config.classes:
        assert abs(names.count(prior.name) - num_images * prior.share / total) <= 4


def test_long_tail_of_five_classes() -> None:
    config = PhantomConfig(classes=long_tail(("a", "b", "c", "d", "e"), imbalance=20))
    names = [phantom_class(config, 0, index).name for index in range(500)]
    counts = [names.count(name) for name in config.class_names]
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0
    assert counts[0] / counts[-1] == pytest.approx(20, rel=0.3)
    tail = next(i for i, name in enumerate(names) if name == "e")
    assert phantom_sample(config, 0, tail).mask.any()


def test_lesion_classes_have_one_lesion_inside_the_image_and_normals_none() -> None:
    config = PhantomConfig(classes=(BENIGN, MALIGNANT, NORMAL), size=96)
    for index in range(30):
        sample = phantom_sample(config, 1, index)
        if sample.label_name == "normal":
            assert not sample.mask.any() and not sample.attributes
            continue
        assert 0.008 < sample.mask.mean() < 0.25
        assert not np.concatenate([sample.mask[[0, -1]].ravel(), sample.mask[:, [0, -1]].ravel()]).any()
        assert ndimage.label(sample.mask)[1] == 1
        assert set(sample.attributes) == {"echogenicity", "boundary", "posterior"}


def test_fully_developed_speckle_has_the_spread_of_a_log_compressed_rayleigh_envelope() -> None:
    """20 log10 of a Rayleigh amplitude has a standard deviation of 5.57 dB (Wagner et al. 1983)."""
    scanner = Scanner(smoothing=0, noise=-120, tgc_error=0, dynamic_range=120, cycles=5)
    image = scan(scanner, _uniform(128), np.random.default_rng(0)).astype(float)
    decibel = image[20:-20] / 255 * scanner.dynamic_range
    assert 4.9 < decibel.std() < 5.8


def test_attenuation_darkens_with_depth_by_the_physical_amount() -> None:
    scanner = Scanner(smoothing=0, noise=-160, tgc_error=0, dynamic_range=140)
    rows = []
    for attenuation in (0.62, 0.92):
        image = scan(scanner, _uniform(128, attenuation), np.random.default_rng(1)).astype(float)
        rows.append(image.mean(axis=1) / 255 * scanner.dynamic_range)
    lost = rows[0] - rows[1]
    depth = (np.arange(128) + 0.5) / 128 * scanner.depth / 10
    expected = 0.3 * 2 * depth * scanner.centre_frequency
    assert np.polyfit(expected, lost, 1)[0] == pytest.approx(1, abs=0.05)


def _behind(image: np.ndarray, mask: np.ndarray) -> float:
    """Grey level below the lesion less that beside it at the same depth."""
    rows, columns = np.nonzero(mask)
    below = slice(rows.max() + 3, min(rows.max() + 20, len(mask) - 2))
    middle, width = int(columns.mean()), max(2, (columns.max() - columns.min()) // 4)
    shadow = image[below, middle - width : middle + width]
    beside = np.delete(image[below], range(columns.min(), columns.max() + 1), axis=1)
    return float(shadow.mean() - beside.mean())


def test_benign_lesions_enhance_and_malignant_ones_shadow() -> None:
    differences: dict[str, list[float]] = {"benign": [], "malignant": []}
    for index in range(80):
        sample = phantom_sample(DEFAULT, 5, index)
        if np.nonzero(sample.mask)[0].max() < 110:
            differences[sample.label_name].append(_behind(sample.image.astype(float), sample.mask))
    assert np.mean(differences["benign"]) > 3 and np.mean(differences["malignant"]) < -10


def test_lesions_are_darker_than_what_surrounds_them() -> None:
    for index in range(12):
        sample = phantom_sample(DEFAULT, 6, index)
        ring = ndimage.binary_dilation(sample.mask, iterations=8) & (sample.mask == 0)
        inner = ndimage.binary_erosion(sample.mask, iterations=2)
        assert sample.image[inner].mean() < sample.image[ring].mean()


def test_malignant_shapes_are_rougher_and_less_wide() -> None:
    solidity: dict[str, list[float]] = {"benign": [], "malignant": []}
    aspect: dict[str, list[float]] = {"benign": [], "malignant": []}
    for index in range(40):
        sample = phantom_sample(DEFAULT, 7, index)
        rows, columns = np.nonzero(sample.mask)
        hull = spatial.ConvexHull(np.stack([rows, columns], axis=1))
        solidity[sample.label_name].append(sample.mask.sum() / hull.volume)  # volume in 2-d: area
        aspect[sample.label_name].append(np.ptp(columns) / np.ptp(rows))
    assert np.mean(solidity["benign"]) > np.mean(solidity["malignant"]) + 0.05
    assert np.mean(aspect["benign"]) > np.mean(aspect["malignant"]) + 0.2


def test_echogenicity_is_what_the_attributes_say() -> None:
    spread: dict[str, list[float]] = {"homogeneous": [], "heterogeneous": []}
    for index in range(60):
        sample = phantom_sample(DEFAULT, 8, index)
        inner = ndimage.binary_erosion(sample.mask, iterations=4)
        if inner.sum() > 60:
            smooth = ndimage.gaussian_filter(sample.image.astype(float), 2)
            spread[sample.attributes["echogenicity"]].append(smooth[inner].std())
    assert np.mean(spread["heterogeneous"]) > 1.3 * np.mean(spread["homogeneous"])


def test_two_scanners_see_the_same_anatomy_differently() -> None:
    a = phantom_sample(PhantomConfig(scanner=SCANNER_A), 0, 2)
    b = phantom_sample(PhantomConfig(scanner=SCANNER_B), 0, 2)
    assert np.array_equal(a.mask, b.mask) and a.label_name == b.label_name
    assert not np.array_equal(a.image, b.image)
    widths = []
    for scanner in (SCANNER_A, SCANNER_B):
        image = scan(scanner, _uniform(128), np.random.default_rng(0)).astype(float)[40:80]
        image -= image.mean()
        widths.append((image[:, 2:] * image[:, :-2]).mean() / image.var())
    assert widths[1] > widths[0] + 0.05  # coarser speckle sideways


def test_bad_configurations_are_named() -> None:
    with pytest.raises(ValueError, match="size: 8"):
        PhantomConfig(size=8)
    with pytest.raises(ValueError, match="each name once"):
        PhantomConfig(classes=(BENIGN, BENIGN))
    with pytest.raises(ValueError, match="centre_frequency"):
        Scanner(centre_frequency=0)
    with pytest.raises(ValueError, match="index: -1"):
        phantom_sample(DEFAULT, 0, -1)
