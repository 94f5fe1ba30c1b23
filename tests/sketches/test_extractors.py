"""Sketch extractors: edges where edges are, sparse, and the same whatever the contrast."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factory.sketches import Canny, DifferenceOfGaussians, PiDiNet
from factory.sketches.pidinet import PiDiNetwork, as_plain_convolution, kind_of, load_pidinet


def disc(size: int = 128, level: int = 60, contrast: int = 90) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    distance = np.hypot(ys - size / 2, xs - size / 2)
    rng = np.random.default_rng(0)
    return (level + contrast * (distance < size / 4) + rng.integers(0, 6, (size, size))).astype(np.uint8)


@pytest.mark.parametrize("extractor", [DifferenceOfGaussians(), Canny()])
def test_edges_lie_on_the_rim_and_are_few(extractor: Any) -> None:
    sketch = extractor.draw(disc())
    ys, xs = np.mgrid[:128, :128]
    rim = np.abs(np.hypot(ys - 64, xs - 64) - 32) < 6
    assert sketch.dtype == np.uint8 and sketch.shape == (128, 128)
    assert sketch[rim].sum() > 0.6 * sketch.sum()
    assert 0.01 < (sketch / 255).mean() < 0.15
    assert (sketch[np.hypot(ys - 64, xs - 64) < 20] < 128).mean() > 0.95


@pytest.mark.parametrize("extractor", [DifferenceOfGaussians(), Canny()])
def test_a_constant_image_has_no_edges_and_colour_is_read_as_grey(extractor: Any) -> None:
    assert not extractor.draw(np.full((64, 64), 90, np.uint8)).any()
    grey = disc()
    assert np.array_equal(extractor.draw(grey), extractor.draw(np.stack([grey] * 3, axis=2)))


def test_contrast_and_brightness_do_not_matter_to_the_difference_of_gaussians() -> None:
    bright, dark = disc(level=20, contrast=200), disc(level=20, contrast=100)
    difference = np.abs(DifferenceOfGaussians().draw(bright).astype(int) - DifferenceOfGaussians().draw(dark))
    assert difference.mean() < 6


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64)), np.zeros((64, 64, 4), np.uint8), np.zeros((4, 4), np.uint8)]
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        DifferenceOfGaussians().draw(image)


def test_digests_tell_settings_apart() -> None:
    assert DifferenceOfGaussians().digest() == DifferenceOfGaussians().digest()
    assert (
        len({DifferenceOfGaussians().digest(), DifferenceOfGaussians(sigma=0.02).digest(), Canny().digest()})
        == 3
    )
    with pytest.raises(ValueError, match="sigma"):
        DifferenceOfGaussians(sigma=0)
    with pytest.raises(ValueError, match="low"):
        Canny(low=0.9, high=0.5)


# -------------------------------------------------------------------------------------------- PiDiNet


def difference_by_definition(image: np.ndarray, weights: np.ndarray, kind: str) -> np.ndarray:
    """Σ w_i (x_i − x_i') pixel by pixel, as the paper writes it, of the inner pixels of an image (H, W)."""
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]  # clockwise
    out = np.zeros((image.shape[0] - 4, image.shape[1] - 4))
    for y in range(2, image.shape[0] - 2):
        for x in range(2, image.shape[1] - 2):
            value = 0.0
            for place, (dy, dx) in enumerate(ring):
                w = weights[1 + dy, 1 + dx]
                if kind == "central":
                    value += w * (image[y + dy, x + dx] - image[y, x])
                elif kind == "angular":
                    ny, nx = ring[(place + 1) % 8]
                    value += w * (image[y + dy, x + dx] - image[y + ny, x + nx])
            out[y - 2, x - 2] = value
    return out


@pytest.mark.parametrize("kind", ["central", "angular"])
def test_plain_convolutions_compute_the_differences(kind: Any) -> None:
    rng = np.random.default_rng(1)
    image, weights = rng.normal(size=(9, 10)), rng.normal(size=(3, 3))
    plain = as_plain_convolution(torch.from_numpy(weights)[None, None], kind)
    found = torch.nn.functional.conv2d(torch.from_numpy(image)[None, None], plain)[0, 0].numpy()[1:-1, 1:-1]
    np.testing.assert_allclose(found, difference_by_definition(image, weights, kind), atol=1e-12)


def test_radial_weights_subtract_the_inner_from_the_outer_ring_in_the_same_direction() -> None:
    weights = torch.arange(9.0).reshape(1, 1, 3, 3)
    wide = as_plain_convolution(weights, "radial")[0, 0]
    assert wide.shape == (5, 5) and wide.sum() == 0 and wide[2, 2] == 0
    outer = [(0, 0), (0, 2), (0, 4), (2, 0), (2, 4), (4, 0), (4, 2), (4, 4)]
    for number, (y, x) in enumerate(outer, start=1):
        inner = ((y + 2) // 2, (x + 2) // 2)
        assert wide[y, x] == number and wide[inner] == -number


def published_state(
    width: int = 8, dilation: int | None = 6, attention: bool = True
) -> dict[str, torch.Tensor]:
    """Random weights in the layout of the public checkpoints: difference convolutions are 3×3 there."""
    torch.manual_seed(0)
    state = PiDiNetwork(width, dilation, attention).state_dict()
    for name, value in state.items():
        if name.endswith("conv1.weight") and value.shape[-1] == 5:
            state[name] = 0.1 * torch.randn(*value.shape[:2], 3, 3)
    # As strong as trained ones: torch's initial weights let a signal fade over sixteen layers.
    return {name: 2.4 * value if name.endswith("weight") else value for name, value in state.items()}


def test_checkpoints_of_both_formats_draw_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = published_state()
    save_file(state, tmp_path / "weights.safetensors")
    wrapped = {"epoch": 19, "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(wrapped, tmp_path / "weights.pth")
    one, two = (PiDiNet(weights=str(tmp_path / name)) for name in ("weights.safetensors", "weights.pth"))
    sketch = one.draw(disc(64))
    assert sketch.shape == (64, 64) and sketch.dtype == np.uint8 and len(np.unique(sketch)) > 10
    assert np.array_equal(sketch, two.draw(disc(64)))
    assert one.digest() != two.digest()


def test_difference_layers_ignore_brightness(tmp_path: Path) -> None:
    """The first layer takes central differences: a constant shift of the image changes nothing but the border."""
    torch.save(published_state(), tmp_path / "weights.pth")
    model = load_pidinet(tmp_path / "weights.pth")
    images = torch.randn(1, 3, 40, 40)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(
        model.init_block(images + 3)[inner], model.init_block(images)[inner], atol=1e-4, rtol=1e-4
    )
    kinds = [kind_of(stage, n) for stage, count in ((1, 3), (2, 4), (4, 4)) for n in range(1, count + 1)]
    four = ["central", "angular", "radial", "plain"]
    assert kinds == [*four[1:], *four, *four]


@pytest.mark.parametrize(("dilation", "attention"), [(None, False), (None, True), (6, False)])
def test_variants_follow_from_the_file(tmp_path: Path, dilation: int | None, attention: bool) -> None:
    torch.save(published_state(8, dilation, attention), tmp_path / "weights.pth")
    assert PiDiNet(weights=str(tmp_path / "weights.pth")).draw(disc(64)).any()


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        PiDiNet(weights=str(tmp_path / "no.pth")).draw(disc(64))
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no PiDiNet checkpoint"):
        PiDiNet(weights=str(tmp_path / "other.pth")).draw(disc(64))
    state = published_state()
    del state["block3_2.conv2.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"block3_2\.conv2\.weight is None"):
        load_pidinet(tmp_path / "part.pth")


def test_published_widths_have_the_papers_parameters() -> None:
    """Su et al. 2021, Table 4: 710 K for the full network (60 channels, dilation 24, attention)."""
    count = sum(p.numel() for p in PiDiNetwork(60, 24, True).parameters())
    radial = 16 * (60 + 120 + 240 + 240)  # 5×5 instead of 3×3 after conversion
    assert count - radial == pytest.approx(710_000, rel=0.01)
