"""ErodedMask: the label lies inside the request, and small lesions keep theirs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from factory import geometry
from factory.synthesis.eroded_mask import ErodedMask


def disc(radius: float, size: int = 512) -> np.ndarray:
    return geometry.ellipse((size, size), x=size / 2, y=size / 2, a=radius, b=radius)


def bind(masks: list[np.ndarray] | None, **fields: Any) -> Any:
    batch: Any = SimpleNamespace(masks=None if masks is None else torch.from_numpy(np.stack(masks)))
    return ErodedMask(**fields).bind(batch)


def test_the_label_is_the_request_less_a_rim_of_two_to_three_pixels_at_512() -> None:
    request = disc(100)
    label = bind([request, request]).annotate(1, np.zeros((512, 512), np.uint8))
    assert label.dtype == np.uint8 and label.shape == request.shape
    assert (label <= request).all()
    lost = geometry.equivalent_radius(request) - geometry.equivalent_radius(label)
    assert 2 <= lost <= 3


def test_the_radius_follows_the_resolution() -> None:
    label = bind([disc(50, 256)], radius=5 / 512).annotate(0, np.zeros((256, 256, 3), np.uint8))
    assert geometry.equivalent_radius(disc(50, 256)) - geometry.equivalent_radius(label) == pytest.approx(
        2.5, abs=0.6
    )


def test_a_small_lesion_keeps_its_mask() -> None:
    small = disc(12)
    bound = bind([small, small * 0])
    assert np.array_equal(bound.annotate(0, small), small)
    assert not bound.annotate(1, small).any()
    lost = 1 - bind([small], max_loss=0.9).annotate(0, small).sum() / small.sum()
    assert 0.2 < lost < 0.9


def test_each_class_of_a_label_map_is_eroded_by_itself() -> None:
    request = disc(100) * 2
    request[:60, :200] = 1
    label = bind([request]).annotate(0, request)
    assert set(np.unique(label)) == {0, 1, 2}
    assert (label[label > 0] == request[label > 0]).all() and (label > 0).sum() < (request > 0).sum()


def test_masks_are_needed_and_settings_checked() -> None:
    assert ErodedMask().needs_mask and bind([disc(9)]).hooks == ()
    with pytest.raises(ValueError, match="no masks were requested"):
        bind(None)
    for fields in ({"radius": -0.1}, {"radius": 0.2}, {"max_loss": 1.0}):
        with pytest.raises(ValueError, match="ErodedMask"):
            ErodedMask(**fields)
