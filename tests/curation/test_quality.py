"""Quality scores: density and coverage against a brute-force count, z-scores that move with what they name."""

import numpy as np
import pytest
from scipy import ndimage

from factory import geometry
from factory.curation.quality import (
    Coverage,
    EmbeddingDensity,
    ImageTexture,
    MaskShape,
    measure_shape,
    measure_texture,
)
from factory.datasets.phantom import PhantomConfig, phantom_sample


def unit(rng: np.random.Generator, rows: int, dim: int = 8, centre: float = 3.0) -> np.ndarray:
    vectors = rng.normal(size=(rows, dim)) + np.array([centre] + [0.0] * (dim - 1))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(0)
REAL = unit(RNG, 80)
IDS = [f"{n:03d}" for n in range(80)]
GROUPS = [f"patient-{n // 2}" for n in range(80)]
FITTED = EmbeddingDensity(k=3).fit(IDS, GROUPS, REAL)


def test_density_counts_the_balls_of_real_images_as_naeem_et_al() -> None:
    rows = unit(np.random.default_rng(1), 50)
    expected = []
    for y in rows:
        inside = 0
        for i, x in enumerate(REAL):
            others = sorted((float(REAL[j] @ x) for j in range(80) if GROUPS[j] != GROUPS[i]), reverse=True)
            inside += float(x @ y) >= others[2]
        expected.append(inside / 3)
    assert FITTED.density(rows) == pytest.approx(
        np.array(expected), abs=1 / 3 + 1e-6
    )  # one ball: rounding of float32
    assert np.mean(FITTED.density(rows) == np.array(expected, np.float32)) > 0.9


def test_density_is_about_one_for_the_same_population_and_zero_far_away() -> None:
    same = FITTED.density(unit(np.random.default_rng(2), 400))
    assert 0.6 < same.mean() < 1.5
    assert FITTED.density(-REAL).max() == 0


def test_coverage_counts_each_real_image_once_whatever_the_order_and_blocks() -> None:
    rows = unit(np.random.default_rng(3), 60)
    rows[7] = rows[3]  # two rows alike: the first by name covers
    names = [f"s{n:02d}" for n in range(60)]

    def covered(order: np.ndarray, block: int) -> Coverage:
        found = Coverage(FITTED)
        for start in range(0, 60, block):
            part = order[start : start + block]
            found.add([names[i] for i in part], rows[part])
        return found

    whole = covered(np.arange(60), 60)
    shuffled = covered(np.random.default_rng(4).permutation(60), 7)
    assert whole.covers_real() == shuffled.covers_real() and "s07" not in whole.covers_real()
    inside = (rows @ REAL.T >= FITTED.reach).any(axis=0)
    assert whole.share == inside.mean() == sum(whole.covers_real().values()) / 80
    assert 0.3 < whole.share < 1 and Coverage(FITTED).share == 0


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        EmbeddingDensity(k=3).fit(IDS[:4], GROUPS[:4], REAL[:4])
    with pytest.raises(ValueError, match="k: want at least 1"):
        EmbeddingDensity(k=0)


def ellipse(a: float, b: float) -> np.ndarray:
    return geometry.ellipse((64, 64), x=32, y=32, a=a, b=b)


def test_shape_z_scores_name_what_differs() -> None:
    rng = np.random.default_rng(5)
    real = [("benign", ellipse(a, a * rng.uniform(0.8, 1.25))) for a in rng.uniform(9, 14, 60)]
    fitted = MaskShape.fit([*real, ("rare", ellipse(9, 9)), ("normal", None)], fitted_on="d")
    usual, large, thin = ellipse(11, 11), ellipse(26, 26), ellipse(28, 5)
    notched = ellipse(11, 11)
    notched[20:32, 31:34] = 0
    scores = fitted.score([usual, large, thin, notched], ["benign"] * 4)
    assert abs(scores["area_z"][0]) < 1 and scores["area_z"][1] > 3
    assert scores["elongation_z"][2] > 3 and abs(scores["elongation_z"][1]) < 2
    assert scores["solidity_z"][3] < -3 < scores["solidity_z"][0]
    nothing = fitted.score([None, np.zeros((64, 64), np.uint8), usual], ["benign", "benign", "rare"])
    assert all(np.isnan(values).all() for values in nothing.values())


def test_shape_does_not_depend_on_the_size_of_the_image() -> None:
    small, large = (
        measure_shape(ellipse(12, 8)),
        measure_shape(np.kron(ellipse(12, 8), np.ones((4, 4), np.uint8))),
    )
    assert small is not None and large is not None
    assert large == pytest.approx(small, abs=0.12)


def test_texture_z_scores_fall_with_blur_and_speckle_rises_with_noise() -> None:
    config = PhantomConfig(size=64)
    images = [phantom_sample(config, 1, index).image for index in range(40)]
    fitted = ImageTexture.fit(images[:30], size=64, fitted_on="d")
    own = fitted.score(images[30:])
    assert np.abs([values.mean() for values in own.values()]).max() < 1.5
    blurred = [ndimage.gaussian_filter(image, 1.5) for image in images[30:]]
    rng = np.random.default_rng(0)
    noisy = [np.clip(i * rng.normal(1, 0.6, i.shape), 0, 255).astype(np.uint8) for i in images[30:]]
    assert (fitted.score(blurred)["sharpness_z"] < own["sharpness_z"] - 3).all()
    assert (fitted.score(blurred)["speckle_z"] < own["speckle_z"]).all()
    assert (fitted.score(noisy)["speckle_z"] > own["speckle_z"]).all()
    with pytest.raises(ValueError, match="want images of 64 px"):
        fitted.score([np.zeros((32, 32), np.uint8)])


def test_texture_of_padding_and_blank_images() -> None:
    image = phantom_sample(PhantomConfig(size=64), 1, 0).image
    padded = np.pad(image, ((32, 32), (0, 0)))
    assert measure_texture(padded)[1] == pytest.approx(measure_texture(image)[1], rel=0.25)
    assert np.isnan(measure_texture(np.zeros((64, 64), np.uint8))).all()


def test_too_few_real_rows_give_no_score_rather_than_a_wild_one() -> None:
    image = phantom_sample(PhantomConfig(size=64), 1, 0).image
    fitted = ImageTexture.fit([image] * 3, size=64, fitted_on="d")
    assert np.isnan(fitted.score([image])["sharpness_z"]).all()
