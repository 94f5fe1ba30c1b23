"""Segmenters: every architecture builds, keeps the image's size and learns in all its parts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from factory.predictors.losses import DiceCrossEntropy
from factory.predictors.networks import count_parameters
from factory.predictors.segmenters import BY_WIDTH, Segmenter, num_halvings

SWIN = "swin_tiny_patch4_window7_224"
ON_ENCODERS = [
    *((name, "resnet18") for name in ("unet", "unetplusplus", "deeplabv3plus", "upernet")),
    ("unet", SWIN),
    ("upernet", SWIN),
    ("unet", "mobilenetv2_100"),
]


def check(predictor: Segmenter, size: int, channels: int) -> int:
    network = predictor.build(2, channels, size).train()
    rng = torch.Generator().manual_seed(0)
    logits = network(torch.rand((2, channels, size, size), generator=rng))
    assert logits.shape == (2, 1, size, size)
    DiceCrossEntropy().loss(
        logits, (torch.rand((2, size, size), generator=rng) > 0.5).float()
    ).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    return count_parameters(network)


@pytest.mark.parametrize("architecture", BY_WIDTH)
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_networks_by_width_learn_at_64_px(architecture: str, channels: int) -> None:
    check(Segmenter(architecture=architecture, width=4), 64, channels)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "encoder"), ON_ENCODERS)
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_networks_on_encoders_learn_at_64_px(architecture: str, encoder: str, channels: int) -> None:
    check(Segmenter(architecture=architecture, encoder=encoder), 64, channels)


def test_the_default_is_a_small_unet_at_any_multiple_of_16() -> None:
    assert check(Segmenter(), 48, 1) == 495_905


def test_the_depth_of_nnunets_network_follows_the_size() -> None:
    assert [num_halvings(size) for size in (8, 32, 64, 96, 100, 512, 2048)] == [1, 3, 4, 4, 2, 7, 7]
    sizes = [check(Segmenter(architecture="dynunet", width=4), size, 1) for size in (32, 64)]
    assert sizes[0] < sizes[1]


def test_an_encoder_starts_from_its_weights(random_weights: Callable[..., Path]) -> None:
    path = random_weights("test_resnet")
    network = Segmenter(architecture="unet", encoder="test_resnet", weights=str(path)).build(2, 1, 32)
    held, state = load_file(path), network.state_dict()
    for name in ("conv1.0.weight", "layer3.0.conv2.weight", "layer4.0.bn1.running_mean"):
        assert torch.equal(state[f"body.encoder.model.{name}"], held[name]), name
    with pytest.raises(ValueError, match="do not fit test_efficientnet"):
        Segmenter(architecture="unet", encoder="test_efficientnet", weights=str(path)).build(2, 1, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "vnet"}, "'vnet' needs one of"),
        ({"architecture": "upernet"}, "'upernet' needs an encoder"),
        ({"architecture": "dynunet", "encoder": "resnet18"}, "'dynunet' takes none"),
        ({"encoder": "hub:resnet"}, "encoder: want a timm name"),
        ({"width": 0}, "width: want 1 … 512, got 0"),
        ({"weights": "w.safetensors"}, "for an encoder, and there is none"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(**fields)  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="unet takes sizes that are multiples of 16 px, got 40"):
        Segmenter().build(2, 1, 40)
    with pytest.raises(ValueError, match="multiples of 32 px, got 48"):
        Segmenter(architecture="unet", encoder="resnet18").build(2, 1, 48)
    with pytest.raises(ValueError, match="deeplabv3plus on test_vit"):
        Segmenter(architecture="deeplabv3plus", encoder="test_vit").build(2, 1, 64)
