"""Differentiable curvature: what it measures, what it is blind to, and that its gradient is usable."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from factory import geometry
from factory.generators.mask_curvature import curvature, inner_boundary, sharpened


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def stacked(*masks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(masks)).double()


def ellipse(a: float, b: float, side: int, angle: float = 0.0) -> np.ndarray:
    return geometry.ellipse((side, side), x=side / 2 + 0.2, y=side / 2 - 0.1, a=a, b=b, angle=angle)


def lobed(radius: float, lobes: int = 9, depth: float = 0.25) -> np.ndarray:
    side = int(3.4 * radius)
    ys, xs = np.mgrid[:side, :side] - side / 2
    reach = radius * (1 + depth * np.cos(lobes * np.arctan2(ys, xs)))
    return (np.hypot(ys, xs) < reach).astype(np.uint8)


def blob(seed: int, side: int = 72) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(side - 24, side - 24)), 5)
    return np.pad(geometry.largest_component((noise > 0.02).astype(np.uint8)), 12)


@pytest.mark.parametrize("radius", [8, 10, 16, 24, 40, 64])
def test_a_disc_has_one_over_its_radius(radius: int) -> None:
    assert curvature(stacked(ellipse(radius, radius, 3 * radius + 40))).item() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize(("a", "b", "angle"), [(60, 40, 0.0), (60, 40, 0.7), (80, 40, 0.4), (32, 24, 0.2)])
def test_a_convex_contour_has_two_pi_over_its_perimeter(a: float, b: float, angle: float) -> None:
    t = np.linspace(0, 2 * np.pi, 20001)[:-1]
    perimeter = np.hypot(a * np.sin(t), b * np.cos(t)).mean() * 2 * np.pi
    found = curvature(stacked(ellipse(a, b, 256, angle))).item()
    assert found == pytest.approx(2 * np.pi / perimeter * math.sqrt(a * b), rel=0.03)


def test_a_shape_has_the_same_curvature_at_any_size() -> None:
    values = [curvature(stacked(lobed(radius))).item() for radius in (20, 40, 80)]
    assert max(values) / min(values) < 1.05 and min(values) > 3


@pytest.mark.parametrize("operator", ["scale_normalised", "sobel"])
def test_turning_mirroring_and_moving_change_nothing(operator: str) -> None:
    shape = blob(3)
    moved = np.pad(shape, ((30, 5), (2, 33)))
    still = np.pad(shape, ((10, 25), (30, 5)))
    values = curvature(stacked(still, np.rot90(still), still[::-1], still[:, ::-1], moved), operator=operator)
    assert torch.allclose(values, values[:1], rtol=1e-10, atol=0)


def test_it_agrees_with_the_array_version_on_hard_masks() -> None:
    shapes = [blob(seed) for seed in range(6)]
    arrays = [geometry.curvature(shape) for shape in shapes]
    assert curvature(stacked(*shapes)).tolist() == pytest.approx(arrays, rel=0.05)
    arrays = [geometry.curvature(shape, operator="sobel") for shape in shapes]
    assert curvature(stacked(*shapes), operator="sobel").tolist() == pytest.approx(arrays, rel=1e-9)


def test_a_mask_does_not_depend_on_its_batch() -> None:
    small, large = ellipse(12, 9, 160), np.pad(lobed(40), 12)
    assert large.shape == small.shape
    together = curvature(stacked(small, large))
    assert together.tolist() == pytest.approx(
        [curvature(stacked(m)).item() for m in (small, large)], rel=1e-9
    )


def test_the_literal_operator_does_not_measure_curvature() -> None:
    small, large = (curvature(stacked(ellipse(r, r, 200)), operator="sobel").item() for r in (8, 64))
    assert large * 64 > 4 * small * 8  # κ·r of a disc should be constant


@pytest.mark.parametrize("operator", ["scale_normalised", "sobel"])
@pytest.mark.parametrize("kind", ["soft", "random", "zero", "half", "one", "faint"])
def test_gradients_are_finite(operator: str, kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    masks = {
        "soft": torch.sigmoid(
            (14 - torch.hypot(*torch.meshgrid(*[torch.arange(48.0) - 24] * 2, indexing="ij"))) / 3
        ),
        "random": torch.rand((48, 48), generator=rng),
        "zero": torch.zeros(48, 48),
        "half": torch.full((48, 48), 0.5),
        "one": torch.ones(48, 48),
        "faint": 1e-4 * torch.rand((48, 48), generator=rng),
    }[kind].repeat(2, 1, 1)
    masks.requires_grad_(True)
    value = curvature(masks, operator=operator)
    value.sum().backward()
    assert masks.grad is not None and torch.isfinite(value).all() and torch.isfinite(masks.grad).all()
    if operator == "scale_normalised":
        assert masks.grad.abs().max() < 1, "flat pixels must not explode"
        if kind in ("zero", "faint"):
            assert value.abs().max() == 0


def test_the_gradient_points_to_a_rounder_shape() -> None:
    """Descent on the curvature of a soft star brings it towards that of a disc."""
    star = torch.from_numpy(lobed(10, lobes=5, depth=0.3)).float()[None]
    logits = (8 * (star - 0.5)).requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    first = curvature(torch.sigmoid(logits)).item()
    for _ in range(60):
        optimizer.zero_grad()
        (curvature(torch.sigmoid(logits)) - 1.2).abs().sum().backward()
        optimizer.step()
    last = curvature((torch.sigmoid(logits) > 0.5).float()).item()
    assert first > 2 and abs(last - 1.2) < 0.4 * (first - 1.2)


def test_sharpening_keeps_zero_half_and_one() -> None:
    values = sharpened(torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64), 10.0)
    assert values[[0, 2, 4]].tolist() == pytest.approx([0, 0.5, 1])
    assert values[1] < 0.06 and values[3] > 0.94


def test_the_inner_boundary_is_that_of_the_array_version() -> None:
    shape = blob(1)
    assert np.array_equal(
        inner_boundary(torch.from_numpy(shape[None] > 0))[0].numpy(), geometry.boundary(shape)
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="'prewitt' is none of"):
        curvature(torch.zeros(1, 8, 8), operator="prewitt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masks: want \(B, H, W\), got \(8, 8\)"):
        curvature(torch.zeros(8, 8))
