"""The mask GAN's networks and its box term: what they can and cannot see."""

import itertools

import pytest
import torch

from factory.generators.mask_gan import MaskGAN
from factory.generators.mask_gan_model import (
    MaskDiscriminator,
    MaskGenerator,
    Spade,
    box_iou,
    box_maps,
    fourier_magnitude,
)

SIZES = {
    "resolution": 16, "noise_dim": 6, "channels": 16, "base_size": 4, "min_channels": 8, "spade_hidden": 8,
    "discriminator_channels": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def boxes(*edges: tuple[int, int, int, int]) -> torch.Tensor:
    return torch.tensor(edges)


def test_a_constant_map_gives_a_spatially_uniform_affine() -> None:
    spade, features = Spade(5, 2, 4), torch.randn(2, 5, 9, 9)
    constant = torch.randn(2, 2, 1, 1).expand(-1, -1, 9, 9)
    out, normal = spade(features, constant), spade.norm(features)
    for item, channel in itertools.product(range(2), range(5)):
        x, y = normal[item, channel].flatten(), out[item, channel].flatten()
        slope = (y[1] - y[0]) / (x[1] - x[0])
        assert torch.allclose(y, y[0] + slope * (x - x[0]), atol=1e-5)
    uneven = constant.clone()
    uneven[:, :, 3:6, 3:6] += 1
    assert (spade(features, uneven) - out)[:, :, 3:6, 3:6].abs().max() > 1e-3


def test_fourier_magnitude_is_blind_to_shifts_and_has_a_gradient() -> None:
    masks = (torch.rand(2, 1, 16, 16) > 0.6).float()
    moved = masks.roll((3, -5), dims=(2, 3))
    assert torch.allclose(fourier_magnitude(masks), fourier_magnitude(moved), atol=1e-5)
    assert not torch.allclose(fourier_magnitude(masks[:1]), fourier_magnitude(masks[1:]), atol=0.1)
    empty = torch.zeros(1, 1, 8, 8, requires_grad=True)
    fourier_magnitude(empty).sum().backward()
    assert empty.grad is not None and torch.isfinite(empty.grad).all()
    assert fourier_magnitude(torch.ones(1, 1, 8, 8))[0, 0].argmax() == 4 * 8 + 4, (
        "zero frequency in the middle"
    )


def test_the_generator_sees_noise_class_and_rectangle() -> None:
    generator = MaskGenerator(MaskGAN(**SIZES), 2)
    noise, maps = torch.randn(1, 6), box_maps(boxes((2, 3, 9, 12)), 16)
    base = generator(noise, torch.tensor([0]), maps)
    assert base.shape == (1, 1, 16, 16) and base.min() > 0 and base.max() < 1
    others = (
        generator(torch.randn(1, 6), torch.tensor([0]), maps),
        generator(noise, torch.tensor([1]), maps),
        generator(noise, torch.tensor([0]), box_maps(boxes((5, 5, 14, 9)), 16)),
    )
    assert all((base - other).abs().max() > 1e-3 for other in others)


def test_a_class_that_is_only_concatenated_has_no_influence() -> None:
    """The paper's literal input: instance norm subtracts the broadcast class. Why it is not the default."""
    generator = MaskGenerator(MaskGAN(**SIZES, class_input="concatenation"), 2)
    noise, maps = torch.randn(1, 6), box_maps(boxes((2, 3, 9, 12)), 16)
    first, second = (generator(noise, torch.tensor([label]), maps) for label in (0, 1))
    assert (first - second).abs().max() < 1e-5


@pytest.mark.parametrize("class_term", ["projection", "acgan", "paper"])
def test_the_discriminator_uses_both_branches_and_the_class(class_term: str) -> None:
    discriminator = MaskDiscriminator(MaskGAN(**SIZES, class_term=class_term), 3)  # type: ignore[arg-type]
    masks, maps = torch.rand(2, 1, 16, 16), box_maps(boxes((2, 3, 9, 12), (1, 1, 15, 15)), 16)
    labels = torch.tensor([0, 2])
    judged = discriminator(masks, labels, maps)
    assert judged.realness.shape == (2,)
    moved = discriminator(masks, (labels + 1) % 3, maps)
    if class_term == "projection":
        assert judged.class_logits is None and (judged.realness - moved.realness).abs().max() > 1e-3
    else:
        assert judged.class_logits is not None and judged.class_logits.shape == (2, 3)
        assert torch.equal(judged.realness, moved.realness)
    judged.realness.sum().backward()
    for branch in (discriminator.spatial, discriminator.fourier):
        assert branch.layers[0].weight.grad.abs().max() > 0
    assert (discriminator(masks, labels, maps.flip(-1)).realness - judged.realness).abs().max() > 1e-5


def test_box_iou_is_exact_for_binary_masks_and_pulls_soft_ones() -> None:
    wanted = boxes((2, 3, 8, 9), (2, 3, 8, 9), (2, 3, 8, 9))
    masks = torch.zeros(3, 1, 16, 16)
    masks[0, 0, 2:8, 3:9] = 1
    masks[1, 0, 2:8, 6:12] = 1  # half of it overlaps: 18 / 54
    masks[2, 0, 10:14, 10:14] = 1
    assert box_iou(masks, wanted).tolist() == pytest.approx([1, 18 / 54, 0])
    cross = torch.zeros(1, 1, 16, 16)
    cross[0, 0, 4, 3:9] = cross[0, 0, 2:8, 5] = 1
    assert box_iou(cross, wanted[:1]).item() == 1, "the box, not the area, is compared"
    logits = torch.zeros(1, 1, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        (1 - box_iou(torch.sigmoid(logits), wanted[:1])).sum().backward()
        optimizer.step()
    assert box_iou((torch.sigmoid(logits) > 0.5).float(), wanted[:1]).item() > 0.8


def test_networks_have_the_sizes_of_the_component() -> None:
    generator, _ = MaskGAN(**{**SIZES, "resolution": 64, "channels": 32}).networks(2)
    assert len(generator.blocks) == 4
    assert [block.convolution.out_channels for block in generator.blocks] == [16, 8, 8, 8]
    assert MaskGAN().num_blocks == 5  # 8² → 256²


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resolution", 48, "not base_size = 4 px times a power of two"),
        ("resolution", 4, "not base_size"),
        ("channels", 0, "model.channels: want 1 or more, got 0"),
        ("curvature_weight", -1.0, "model.curvature_weight: want 0 or more"),
        ("class_term", "none", "model.class_term: 'none' is none of projection, acgan, paper"),
        ("operator", "gradient", "model.operator: 'gradient' is none of"),
        ("sharpness", 0.0, "model.sharpness: want a positive number or None"),
        ("discriminator_learning_rate", 0.0, "discriminator_learning_rate: want > 0"),
    ],
)
def test_bad_fields_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskGAN(**{**SIZES, field: value})  # type: ignore[arg-type]
