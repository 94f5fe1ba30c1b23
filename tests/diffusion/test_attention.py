"""Attention capture: right maps, from the right layers, without touching the output."""

import pytest
import torch
from attention_batch import LATENT_SIDE, NUM_TOKENS, WIDTH, make_latents, make_unet
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from factory.diffusion.attention import (
    attention_probabilities,
    attention_sides,
    capture,
    select_layers,
)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return make_unet()


def run(unet: nn.Module, count: int = 2) -> torch.Tensor:
    embeds = torch.randn((count, NUM_TOKENS, WIDTH), generator=torch.Generator().manual_seed(1))
    return unet(make_latents(count), torch.full((count,), 300), embeds, return_dict=False)[0]


def layers_of(unet: nn.Module, side: int) -> dict[str, tuple[str, ...]]:
    return {kind: select_layers(unet, kind, side, LATENT_SIDE) for kind in ("cross", "self")}


def test_sides_read_off_the_architecture_are_those_that_run(unet: nn.Module) -> None:
    seen: dict[str, int] = {}
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output.shape[1])
        )
        for name in attention_sides(unet, LATENT_SIDE)
    ]
    run(unet)
    for hook in hooks:
        hook.remove()
    assert seen == {name: side * side for name, side in attention_sides(unet, LATENT_SIDE).items()}
    assert set(attention_sides(unet, LATENT_SIDE).values()) == {8, 4}


def test_stable_diffusion_has_five_layers_of_each_kind_at_16_and_32() -> None:
    from diffusers import UNet2DConditionModel

    from factory.assets.base_models import SD15_UNET

    with torch.device("meta"):
        sd = UNet2DConditionModel(**SD15_UNET)
    assert len(select_layers(sd, "cross", 16, 64)) == 5
    assert len(select_layers(sd, "self", 32, 64)) == 5


def test_probabilities_times_values_are_the_fused_output(unet: nn.Module) -> None:
    for name in ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "mid_block.attentions.0.transformer_blocks.0.attn2"):  # fmt: skip
        attn = unet.get_submodule(name)
        width = attn.to_q.in_features
        hidden = torch.randn((2, 16, width), generator=torch.Generator().manual_seed(0))
        context = torch.randn((2, NUM_TOKENS, WIDTH)) if name.endswith("attn2") else None
        single = attn.heads
        # One head at a time: with the other heads' values zeroed, the average over heads is not what is compared.
        values = attn.to_v(hidden if context is None else context).reshape(2, -1, single, width // single)
        query = attn.to_q(hidden).reshape(2, 16, single, -1)
        key = attn.to_k(hidden if context is None else context).reshape(2, -1, single, width // single)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * attn.scale
        probabilities = scores.softmax(dim=-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", probabilities, values).reshape(2, 16, width)
        expected = AttnProcessor2_0()(attn, hidden, context)
        assert torch.allclose(attn.to_out[0](mixed), expected, atol=1e-5)
        captured = attention_probabilities(attn, hidden, context)
        assert torch.allclose(captured, probabilities.mean(dim=1), atol=1e-6)


def test_capture_keeps_the_output_bit_identical_and_restores_the_processors(unet: nn.Module) -> None:
    before = {name: unet.get_submodule(name).processor for name in attention_sides(unet, LATENT_SIDE)}
    plain = run(unet)
    with capture(unet, layers_of(unet, 4)) as captured:
        inside = {name: unet.get_submodule(name).processor for name in before}
        looked = run(unet)
    assert torch.equal(plain, looked)
    assert {name for name in before if inside[name] is not before[name]} == set(captured.maps)
    assert all(attention_sides(unet, LATENT_SIDE)[name] == 4 for name in captured.maps)
    assert all(unet.get_submodule(name).processor is processor for name, processor in before.items())
    assert captured.mean("cross").shape == (2, 16, NUM_TOKENS)
    assert captured.mean("self").shape == (2, 16, 16)
    for group in ("cross", "self"):
        rows = captured.mean(group).sum(dim=-1)
        assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def test_processors_come_back_after_an_error(unet: nn.Module) -> None:
    name = layers_of(unet, 4)["cross"][0]
    before = unet.get_submodule(name).processor
    with pytest.raises(RuntimeError, match="stop"), capture(unet, layers_of(unet, 4)):
        raise RuntimeError("stop")
    assert unet.get_submodule(name).processor is before


def test_gradient_reaches_weights_and_latents(unet: nn.Module) -> None:
    latents = make_latents(1).requires_grad_(True)
    embeds = torch.randn((1, NUM_TOKENS, WIDTH))
    with capture(unet, layers_of(unet, 8)) as captured:
        unet(latents, torch.tensor([300]), embeds, return_dict=False)
    weight = unet.get_submodule(captured.layers["cross"][-1]).to_k.weight
    gradients = torch.autograd.grad(captured.mean("cross")[..., 2].square().sum(), (latents, weight))
    assert all(g.abs().sum() > 0 for g in gradients)
    with torch.no_grad(), capture(unet, layers_of(unet, 8)) as captured:
        run(unet)
    assert not captured.mean("cross").requires_grad


def test_lora_weights_count() -> None:
    from peft import LoraConfig

    unet = make_unet()
    layers = layers_of(unet, 4)
    with capture(unet, layers) as plain:
        run(unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    with capture(unet, layers) as adapted:
        run(unet)
    assert (plain.mean("cross") - adapted.mean("cross")).abs().max() > 1e-3


def test_a_side_that_does_not_exist_is_named_with_those_that_do(unet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no layer with a map of 16 × 16.*sides 8, 4"):
        select_layers(unet, "cross", 16, LATENT_SIDE)
