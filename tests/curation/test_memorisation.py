"""The copy test on phantoms and, where they are there, on real images: copies are found, look-alikes are not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factory.curation.memorisation import REGIONS, CopyTest, FittedCopyTest, null_threshold
from factory.curation.planted import PLANTED, detection_power, planted_copy
from factory.datasets.phantom import PhantomConfig, phantom_sample

Picture = tuple[np.ndarray, np.ndarray]
POPULATION = 40


def blocks(image: np.ndarray) -> np.ndarray:
    """A small real embedding: block means, unit norm, (64,)."""
    grey = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX), np.float32).ravel()
    centred = grey - grey.mean()
    return centred / np.linalg.norm(centred)


def embed(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([blocks(image) for image in images])


def pictures(seed: int, count: int) -> list[Picture]:
    samples = [phantom_sample(PhantomConfig(), seed, index) for index in range(count)]
    return [(sample.image, sample.mask) for sample in samples]


def fitted(source: CopyTest, rows: Sequence[Picture], num_threads: int = 1) -> FittedCopyTest:
    frames = [source.frame(image, mask) for image, mask in rows]
    groups = [str(k) for k in range(len(rows))]
    return source.fit(frames, embed([image for image, _ in rows]), groups, num_threads=num_threads)


@pytest.fixture(scope="module")
def train() -> list[Picture]:
    return pictures(11, POPULATION)


@pytest.fixture(scope="module")
def test(train: list[Picture]) -> FittedCopyTest:
    return fitted(CopyTest(), train)


def test_planted_copies_are_found_and_traced(test: FittedCopyTest, train: list[Picture]) -> None:
    sources = [(k, *train[k]) for k in range(0, POPULATION, 8)]
    power = detection_power(test, sources, embed, size=128)
    assert set(power.detected) == set(PLANTED)
    assert min(power.detected.values()) == 1.0, power.detected
    assert power.attributed == 1.0


def test_other_patients_are_not_called_copies(test: FittedCopyTest) -> None:
    others = pictures(12, 30)
    found = [test.match(test.source.frame(*other), blocks(other[0])) for other in others]
    assert sum(match.is_copy for match in found) <= 1
    assert max(match.excess for match in found) < 1.1


def test_brightness_and_layout_alone_do_not_count(test: FittedCopyTest, train: list[Picture]) -> None:
    """Another patient's image given the low frequencies of a training image stays another patient's."""
    from scipy import ndimage

    target, other = train[0][0].astype(np.float32), pictures(12, 1)[0][0].astype(np.float32)
    mixed = other - ndimage.gaussian_filter(other, 12) + ndimage.gaussian_filter(target, 12)
    image = mixed.clip(0, 255).astype(np.uint8)
    assert not test.match(test.source.frame(image, None), blocks(target.astype(np.uint8))).is_copy


def test_a_copied_lesion_on_another_background_is_found(test: FittedCopyTest, train: list[Picture]) -> None:
    image, mask = train[2]
    rows, columns = np.nonzero(mask)
    top, bottom = max(rows.min() - 12, 0), min(rows.max() + 12, 128)
    left, right = max(columns.min() - 12, 0), min(columns.max() + 12, 128)
    background = pictures(12, 1)[0][0].copy()
    background[top:bottom, left:right] = image[top:bottom, left:right]
    match = test.match(test.source.frame(background, mask), blocks(image), regions=("lesion",))
    assert match.is_copy and match.region == "lesion" and match.reference == 2


def test_the_own_group_can_be_left_out(test: FittedCopyTest, train: list[Picture]) -> None:
    frame = test.source.frame(*train[3])
    assert test.match(frame, blocks(train[3][0])).reference == 3
    without = test.match(frame, blocks(train[3][0]), group="3")
    assert without.reference != 3 and not without.is_copy


def test_scale_and_mirror_are_reported(test: FittedCopyTest, train: list[Picture]) -> None:
    crop = Image.fromarray(train[4][0]).crop((10, 10, 118, 118)).resize((128, 128), Image.Resampling.BILINEAR)
    image = np.ascontiguousarray(np.asarray(crop)[:, ::-1])
    match = test.match(test.source.frame(image, None), blocks(image))
    assert match.is_copy and match.mirrored and match.reference == 4
    assert match.scale == pytest.approx(108 / 128, rel=0.03)


def test_threads_change_nothing(test: FittedCopyTest, train: list[Picture]) -> None:
    assert fitted(CopyTest(), train, num_threads=3).thresholds == test.thresholds


def test_thresholds_leave_the_asked_share_of_unrelated_images(test: FittedCopyTest) -> None:
    assert set(test.thresholds) == set(REGIONS)
    for region, threshold in test.thresholds.items():
        assert threshold >= test.null[region].max()
    rng = np.random.default_rng(0)
    null, fresh = np.tanh(rng.normal(0.4, 0.06, 2000)), np.tanh(rng.normal(0.4, 0.06, 20000))
    assert (fresh >= null_threshold(null, 0.01)).mean() == pytest.approx(0.008, abs=0.006)
    small = [(fresh >= null_threshold(null[k : k + 40], 0.01)).mean() for k in range(0, 2000, 40)]
    assert np.mean(np.array(small) <= 0.01) > 0.75, "the bound holds for most samples of 40"


def test_a_given_threshold_needs_no_calibration(train: list[Picture]) -> None:
    test = fitted(CopyTest(correlation=0.7), train[:3])
    assert set(test.thresholds.values()) == {0.7}
    image, mask = planted_copy("speckle", *train[1], np.random.default_rng(0))
    assert test.match(test.source.frame(image, mask), blocks(image)).reference == 1


def test_too_few_rows_to_calibrate_is_an_error_that_says_what_to_do(train: list[Picture]) -> None:
    with pytest.raises(ValueError, match="--copy-correlation"):
        fitted(CopyTest(), train[:5])


def test_empty_and_flat_images_are_no_copies(test: FittedCopyTest) -> None:
    for level in (0, 128):
        flat = np.full((128, 128), level, np.uint8)
        match = test.match(test.source.frame(flat, np.zeros_like(flat)), blocks(pictures(12, 1)[0][0]))
        assert not match.is_copy and np.isfinite(match.correlation)


def test_letterboxed_colour_images_are_compared_without_their_bars(train: list[Picture]) -> None:
    source = CopyTest()
    wide = np.repeat(train[0][0][32:96, :, None], 3, axis=2)
    frame = source.frame(wide, None)
    assert frame.grey.shape[0] <= 50 and frame.grey.shape[1] == 96 and frame.lesion is None


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_copies_move_image_and_mask_alike(kind: str, train: list[Picture]) -> None:
    image, mask = train[0]
    painted = np.where(mask > 0, 255, 40).astype(np.uint8)
    copy, moved = planted_copy(kind, painted, mask, np.random.default_rng(3))
    assert copy.shape == image.shape and copy.dtype == np.uint8
    assert moved is not None and moved.dtype == np.uint8 and set(np.unique(moved)) <= {0, 1}
    bright = copy > (float(copy[moved > 0].mean()) + float(copy[moved == 0].mean())) / 2
    overlap = (bright & (moved > 0)).sum() / (bright | (moved > 0)).sum()
    assert overlap > 0.85


@pytest.mark.parametrize(
    ("values", "word"),
    [({"side": 8}, "side"), ({"false_alarm": 0.7}, "false_alarm"), ({"correlation": 2.0}, "cor")],
)
def test_bad_settings_are_named(values: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        CopyTest(**values)


def test_on_real_images(busi_folder: Path) -> None:
    """Every 12th malignant and 24th benign image: few enough to hold no near-duplicates of each other."""
    rows = []
    for label, step in (("benign", 24), ("malignant", 12)):
        files = sorted(p for p in (busi_folder / label).glob("*.png") if "_mask" not in p.name)[::step]
        for path in files:
            mask = Image.open(path.with_name(path.stem + "_mask.png")).convert("L")
            image = np.asarray(Image.open(path).convert("L"))
            rows.append((image, (np.asarray(mask) > 0).astype(np.uint8)))
    test = fitted(CopyTest(), rows)
    assert max(test.thresholds.values()) < 0.75, test.thresholds
    power = detection_power(test, [(k, *rows[k]) for k in range(0, len(rows), 6)], embed, size=128)
    assert min(power.detected.values()) == 1.0, power.detected
