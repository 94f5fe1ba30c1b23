"""Parameter counts on the Stable Diffusion 1.5 shape, without its weights (Pan et al. 2025, Table 2)."""

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft.tuners.lora import LoraLayer

from factory.assets.base_models import SD15_UNET
from factory.generators.lora import add_lora


def num_parameters(module: torch.nn.Module, marker: str = "") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if marker in name)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15_UNET)


def test_unet_and_controlnet_have_the_published_size(unet: UNet2DConditionModel) -> None:
    with torch.device("meta"):
        controlnet = ControlNetModel.from_unet(unet)
    assert num_parameters(unet) == 859_520_964
    assert num_parameters(controlnet) == 361_279_120


@pytest.mark.parametrize(("rank", "count"), [(2, 398_592), (4, 797_184), (8, 1_594_368)])
def test_lora_has_the_published_size(unet: UNet2DConditionModel, rank: int, count: int) -> None:
    add_lora(unet, rank)
    assert num_parameters(unet, "lora_") == count == 199_296 * rank
    assert num_parameters(unet) - count == 859_520_964


def test_lora_sits_on_four_projections_of_every_attention(unet: UNet2DConditionModel) -> None:
    add_lora(unet, 4)
    names = [name for name, module in unet.named_modules() if isinstance(module, LoraLayer)]
    assert len(names) == 32 * 4  # 16 self- and 16 cross-attentions
    assert all(name.split(".attn")[1][2:] in ("to_q", "to_k", "to_v", "to_out.0") for name in names)
    assert all(module.scaling["trained"] == 1.0 for module in unet.modules() if isinstance(module, LoraLayer))
