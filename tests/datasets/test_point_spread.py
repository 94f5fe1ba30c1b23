"""The wrong point-spread function: the same anatomy, coarser speckle."""

import dataclasses

import numpy as np
import pytest

from factory.datasets.phantom import SCANNER_A, PhantomConfig, phantom_sample, with_point_spread


def lateral_correlation(image: np.ndarray) -> float:
    """Correlation of neighbours along a row, means of rows and columns removed."""
    values = image.astype(float)
    values -= values.mean(axis=1, keepdims=True)
    values -= values.mean(axis=0, keepdims=True)
    return float(np.corrcoef(values[:, 1:].ravel(), values[:, :-1].ravel())[0, 1])


def test_masks_stay_and_speckle_grows() -> None:
    right = PhantomConfig(size=64)
    wrong = dataclasses.replace(right, scanner=with_point_spread(SCANNER_A, 3.0))
    before, after = [], []
    for index in range(6):
        one, two = phantom_sample(right, 0, index), phantom_sample(wrong, 0, index)
        assert (one.mask == two.mask).all() and one.label_name == two.label_name
        before.append(lateral_correlation(one.image))
        after.append(lateral_correlation(two.image))
    assert np.mean(after) > np.mean(before) + 0.08, (before, after)


def test_the_factor_scales_pulse_and_beam_and_must_be_positive() -> None:
    wide = with_point_spread(SCANNER_A, 2.0)
    assert (wide.cycles, wide.f_number) == (2 * SCANNER_A.cycles, 2 * SCANNER_A.f_number)
    assert wide.centre_frequency == SCANNER_A.centre_frequency and wide.name != SCANNER_A.name
    with pytest.raises(ValueError, match="factor: want a positive number, got 0"):
        with_point_spread(SCANNER_A, 0)
