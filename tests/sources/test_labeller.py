"""The labeller recovers what the phantom was made with, and a reader's labels win."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from factory import geometry
from factory.imaging import TrainingRow
from factory.sources.labeller import BiradsLabeller, measure_appearance


def without_attributes(rows: list[TrainingRow]) -> list[TrainingRow]:
    return [dataclasses.replace(row, attributes={}) for row in rows]


def lesions(rows: list[TrainingRow]) -> list[TrainingRow]:
    return [row for row in rows if row.mask is not None and row.mask.any()]


@pytest.mark.parametrize(
    ("name", "positive", "least"), [("echogenicity", "heterogeneous", 0.78), ("boundary", "clear", 0.72)]
)
def test_labels_agree_with_the_phantoms_truth(
    phantom_rows: list[TrainingRow], name: str, positive: str, least: float
) -> None:
    fitted = BiradsLabeller().fit(without_attributes(phantom_rows))
    rows = lesions(phantom_rows)
    truth = np.array([row.attributes[name] == positive for row in rows])
    found = np.array([getattr(fitted.describe(r), name) == positive for r in without_attributes(rows)])
    agreement = (truth == found).mean()
    balanced = (found[truth].mean() + (~found[~truth]).mean()) / 2
    chance = truth.mean() * found.mean() + (1 - truth.mean()) * (1 - found.mean())
    kappa = (agreement - chance) / (1 - chance)
    print(name, f"agreement {agreement:.3f}, balanced {balanced:.3f}, kappa {kappa:.3f}")
    assert agreement > least
    assert balanced > least
    assert kappa > 0.45
    for label in ("benign", "malignant"):  # not by way of the class alone
        of_class = np.array([row.label_name == label for row in rows])
        hit, false_alarm = found[of_class & truth].mean(), found[of_class & ~truth].mean()
        print(" ", label, f"{positive} found in {hit:.2f} where true, {false_alarm:.2f} where not")
        assert hit > false_alarm + 0.25


def test_thresholds_are_the_training_medians(phantom_rows: list[TrainingRow]) -> None:
    rows = without_attributes(phantom_rows)
    fitted = BiradsLabeller().fit(rows)
    measured = [measure_appearance(row.image, row.mask) for row in lesions(rows) if row.mask is not None]
    assert fitted.texture_dispersion == np.median([m.texture_dispersion for m in measured])
    assert fitted.boundary_gradient == np.median([m.boundary_gradient for m in measured])
    described = [fitted.describe(row) for row in lesions(rows)]
    assert np.mean([d.echogenicity == "heterogeneous" for d in described]) == pytest.approx(0.5, abs=0.01)
    assert np.mean([d.boundary == "clear" for d in described]) == pytest.approx(0.5, abs=0.01)


def test_attributes_win_over_the_measurement(phantom_rows: list[TrainingRow]) -> None:
    fitted = BiradsLabeller().fit(without_attributes(phantom_rows))
    for row in lesions(phantom_rows):
        described = fitted.describe(row)
        assert described.echogenicity == row.attributes["echogenicity"]
        assert described.boundary == row.attributes["boundary"]
    row = lesions(phantom_rows)[0]
    measured = fitted.describe(dataclasses.replace(row, attributes={}))
    half = fitted.describe(dataclasses.replace(row, attributes={"boundary": " Unclear ", "echogenicity": ""}))
    assert (half.echogenicity, half.boundary) == (measured.echogenicity, "unclear")


def test_a_word_that_is_no_descriptor_is_named(phantom_rows: list[TrainingRow]) -> None:
    row = dataclasses.replace(lesions(phantom_rows)[0], attributes={"boundary": "fuzzy"})
    with pytest.raises(
        ValueError, match=rf"{row.image_id}: attribute boundary='fuzzy' is none of clear, unclear"
    ):
        BiradsLabeller().fit([row])


def test_rows_without_lesion_have_no_descriptors(phantom_rows: list[TrainingRow]) -> None:
    normal = next(row for row in phantom_rows if row.label_name == "normal")
    with pytest.raises(ValueError, match="no lesion mask"):
        BiradsLabeller().fit(phantom_rows).describe(normal)
    with pytest.raises(ValueError, match="none of the 1 training rows"):
        BiradsLabeller().fit([normal])
    with pytest.raises(ValueError, match="empty"):
        measure_appearance(normal.image, np.zeros_like(normal.image))


def drawn_lesion(blur: float, texture: float, gain: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = geometry.ellipse((128, 128), x=64, y=64, a=30, b=24)
    field = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 5)
    inside = 60 + texture * field / field.std()
    soft = ndimage.gaussian_filter(mask.astype(float), blur)
    image = (1 - soft) * 130 + soft * inside + 4 * rng.standard_normal(mask.shape)
    return np.clip(gain * image, 0, 255).astype(np.uint8), mask


def test_gradient_falls_with_blur_and_dispersion_grows_with_texture() -> None:
    sharp = [measure_appearance(*drawn_lesion(blur, 2)).boundary_gradient for blur in (0.5, 2, 4, 8)]
    assert sharp == sorted(sharp, reverse=True)
    rough = [measure_appearance(*drawn_lesion(1, texture)).texture_dispersion for texture in (1, 5, 10, 20)]
    assert rough == sorted(rough)


def test_boundary_does_not_depend_on_gain() -> None:
    low, high = (measure_appearance(*drawn_lesion(2, 4, gain)).boundary_gradient for gain in (0.6, 1.2))
    assert low == pytest.approx(high, rel=0.05)


def test_colour_and_grey_and_clipped_lesions_are_measured() -> None:
    image, mask = drawn_lesion(1, 5)
    assert measure_appearance(np.repeat(image[..., None], 3, 2), mask) == measure_appearance(image, mask)
    everything = measure_appearance(image[50:70, 50:70], np.ones((20, 20), np.uint8))
    corner = measure_appearance(image[64:, 64:], mask[64:, 64:])
    tiny = measure_appearance(image, geometry.ellipse(mask.shape, x=64, y=64, a=1, b=1))
    for measured in (everything, corner, tiny):
        assert np.isfinite([measured.texture_dispersion, measured.boundary_gradient]).all()


@pytest.mark.slow
def test_descriptors_are_associated_with_the_class_on_busi(busi_rows: list[TrainingRow]) -> None:
    """Malignant lesions are more often heterogeneous and unclear: an association, no truth to compare with."""
    fitted = BiradsLabeller().fit(busi_rows)
    rates = {}
    for label in ("benign", "malignant"):
        described = [fitted.describe(row) for row in lesions(busi_rows) if row.label_name == label]
        rates[label] = (
            np.mean([d.echogenicity == "heterogeneous" for d in described]),
            np.mean([d.boundary == "unclear" for d in described]),
        )
    print({k: [round(float(x), 3) for x in v] for k, v in rates.items()})
    assert rates["malignant"][0] > rates["benign"][0] + 0.1
    assert rates["malignant"][1] > rates["benign"][1] + 0.2
