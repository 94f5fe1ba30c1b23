"""A generator in memory: fresh parts change nothing, saved parts come back, nothing is lost silently."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import PeftModel
from random_generators import disturb, inputs, mask_generator, random_base
from safetensors.torch import load_file, save_file

from factory.generators.checkpoints import digest_parts
from factory.generators.conditioning import TextAndMask, TextOnly
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.generators.loaded import LoadedGenerator, to_uint8


def predict(loaded: LoadedGenerator, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return loaded.denoiser()(*inputs(loaded, seed=seed))


def predict_unet(unet: torch.nn.Module, loaded: LoadedGenerator) -> torch.Tensor:
    latents, timesteps, embeds, _ = inputs(loaded)
    with torch.no_grad():
        return unet(latents, timesteps, embeds).sample


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> tuple[LatentDiffusion, LoadedGenerator, Path]:
    """A "trained" LoRA and ControlNet, and where it was saved."""
    generator = mask_generator(base)
    loaded = generator.load()
    disturb(loaded)
    folder = tmp_path / "checkpoint"
    loaded.save(folder, {"name": "tiny", "steps": 3})
    return generator, loaded, folder


@pytest.mark.parametrize("unet", ["frozen", "full", "lora"])
def test_fresh_parts_leave_the_base_output_equal(base: Path, unet: str) -> None:
    loaded = mask_generator(base, unet).load()
    plain = UNet2DConditionModel.from_pretrained(base / "unet").eval()
    torch.testing.assert_close(predict(loaded), predict_unet(plain, loaded), rtol=0, atol=0)


def test_trained_controlnet_obeys_the_mask(trained: tuple[LatentDiffusion, LoadedGenerator, Path]) -> None:
    _, loaded, _ = trained
    disturb(loaded, size=0.2)
    latents, timesteps, embeds, condition = inputs(loaded)
    with torch.no_grad():
        with_mask = loaded.denoiser()(latents, timesteps, embeds, condition)
        without = loaded.denoiser()(latents, timesteps, embeds, torch.zeros_like(condition))
    assert (with_mask - without).abs().max() > 1e-2


def test_fresh_parts_depend_on_the_seed_alone(base: Path) -> None:
    generator = mask_generator(base)
    states = []
    for seed in (3, 3, 4):
        torch.rand(5)
        loaded = generator.load(seed=seed)
        states.append({name: p.detach().clone() for name, p in loaded.named_trainable_parameters().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize(
    ("unet", "controlnet", "expected"),
    [
        ("frozen", True, {"controlnet"}),
        ("full", True, {"controlnet", "unet"}),
        ("lora", True, {"controlnet", "lora"}),
    ],
)
def test_exactly_the_trainable_parts_get_gradients(
    base: Path, unet: str, controlnet: bool, expected: set[str]
) -> None:
    loaded = mask_generator(base, unet, controlnet=controlnet).load()
    disturb(loaded)  # zero-initialised outputs would block gradients into the ControlNet
    loaded.denoiser()(*inputs(loaded)).square().mean().backward()
    touched = {
        "lora" if "lora_" in name else name.split(".")[0]
        for name, parameter in loaded.denoiser().named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    assert touched == expected
    frozen = [*loaded.parameters_of("vae"), *loaded.parameters_of("text_encoder")]
    assert all(not p.requires_grad and p.grad is None for p in frozen)


def test_text_only_has_no_controlnet(base: Path) -> None:
    loaded = LatentDiffusion(base=str(base), conditioning=TextOnly(), resolution=64).load()
    latents, timesteps, embeds, _ = (*inputs(mask_generator(base).load()),)
    assert loaded.controlnet is None and loaded.condition(np.zeros((1, 64, 64), np.uint8)) is None
    with pytest.raises(ValueError, match="controlnet_cond"):
        loaded.denoiser()(latents, timesteps, embeds, torch.zeros(2, 1, 64, 64))


@pytest.mark.parametrize("unet", ["full", "lora"])
def test_saved_and_loaded_is_bit_equal(base: Path, tmp_path: Path, unet: str) -> None:
    generator = mask_generator(base, unet)
    loaded = generator.load()
    disturb(loaded)
    loaded.save(tmp_path / "checkpoint", {"name": "tiny"})
    again = generator.load(tmp_path / "checkpoint")
    torch.testing.assert_close(predict(again), predict(loaded), rtol=0, atol=0)
    assert list(again.named_trainable_parameters()) == list(loaded.named_trainable_parameters())
    again.save(tmp_path / "again", {"name": "tiny"})
    assert digest_parts(tmp_path / "again") == digest_parts(tmp_path / "checkpoint")


def test_checkpoint_loads_with_plain_diffusers_and_peft(
    base: Path, trained: tuple[LatentDiffusion, LoadedGenerator, Path]
) -> None:
    _, loaded, folder = trained
    wanted = predict_unet(loaded.unet, loaded)
    plain = UNet2DConditionModel.from_pretrained(base / "unet")
    assert (predict_unet(plain, loaded) - wanted).abs().max() > 1e-3
    with_peft = PeftModel.from_pretrained(plain, folder / "unet_lora").eval()
    torch.testing.assert_close(predict_unet(with_peft, loaded), wanted, rtol=0, atol=0)
    with_diffusers = UNet2DConditionModel.from_pretrained(base / "unet")
    with_diffusers.load_lora_adapter(
        folder / "unet_lora", prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    torch.testing.assert_close(predict_unet(with_diffusers, loaded), wanted, rtol=0, atol=0)
    controlnet, info = ControlNetModel.from_pretrained(folder / "controlnet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(controlnet.parameters(), loaded.parameters_of("controlnet")))


def test_merging_keeps_the_output_and_unmerging_the_weights(
    trained: tuple[LatentDiffusion, LoadedGenerator, Path],
) -> None:
    _, loaded, _ = trained
    before = predict(loaded)
    weights = {name: p.detach().clone() for name, p in loaded.unet.named_parameters()}
    loaded.unet.fuse_lora()
    torch.testing.assert_close(predict(loaded), before, rtol=1e-4, atol=1e-5)
    loaded.unet.unfuse_lora()
    for name, parameter in loaded.unet.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=1e-6)
    loaded.merge_adapters()
    torch.testing.assert_close(predict(loaded), before, rtol=1e-4, atol=1e-5)
    assert not any("lora_" in name for name, _ in loaded.unet.named_parameters())


def test_what_can_no_longer_be_saved_is_refused(
    trained: tuple[LatentDiffusion, LoadedGenerator, Path], tmp_path: Path
) -> None:
    _, loaded, _ = trained
    loaded.merge_adapters()
    with pytest.raises(ValueError, match="merged"):
        loaded.save(tmp_path / "merged", {"name": "tiny"})
    with pytest.raises(ValueError, match="name"):
        loaded.save(tmp_path / "merged", {})


@pytest.mark.parametrize("damage", ["lost", "added", "shape"])
@pytest.mark.parametrize("part", ["controlnet", "unet_lora"])
def test_damaged_weights_are_refused(
    trained: tuple[LatentDiffusion, LoadedGenerator, Path], part: str, damage: str
) -> None:
    generator, _, folder = trained
    path = next((folder / part).glob("*.safetensors"))
    state = load_file(path)
    name = sorted(state)[-1]
    if damage == "lost":
        del state[name]
    elif damage == "added":
        state["base_model.model.other.lora_A.weight"] = torch.zeros(2, 2)
    else:
        state[name] = torch.zeros(3, 5)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="fit|size mismatch|shape"):
        generator.load(folder)


def test_pickled_weights_are_never_read(
    trained: tuple[LatentDiffusion, LoadedGenerator, Path],
) -> None:
    generator, _, folder = trained
    path = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        generator.load(folder)


def test_checkpoint_of_another_generator_or_base_is_refused(
    base: Path, trained: tuple[LatentDiffusion, LoadedGenerator, Path], tmp_path: Path
) -> None:
    _, _, folder = trained
    for wrong, words in (
        (
            LatentDiffusion(base=str(base), resolution=128, trainable=Trainable(unet="lora", lora_rank=4)),
            "resolution is 64",
        ),
        (mask_generator(base, rank=2), "lora_rank=4"),
        (mask_generator(base, "full"), "unet=full"),
        (
            LatentDiffusion(
                base=str(base),
                resolution=64,
                conditioning=TextAndMask(num_mask_classes=3),
                trainable=Trainable(unet="lora", lora_rank=4),
            ),
            "num_mask_classes=1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            wrong.load(folder)
        with pytest.raises(ValueError, match=words):
            wrong.weights(folder)
    other = mask_generator(random_base(tmp_path / "other", seed=9))
    with pytest.raises(ValueError, match="trained upon base"):
        other.load(folder)


def test_adapting_a_trained_generator_to_a_new_domain(base: Path, tmp_path: Path) -> None:
    generator = mask_generator(base, "full")
    loaded = generator.load()
    disturb(loaded)
    first = tmp_path / "first"
    loaded.save(first, {"name": "clinical_prior"})

    adapter = mask_generator(base, "lora", controlnet=False, rank=2)
    adapting = adapter.load(adapt_from=first)
    torch.testing.assert_close(predict(adapting), predict(loaded), rtol=0, atol=0)
    assert all("lora_" in name for name in adapting.named_trainable_parameters())
    disturb(adapting, seed=1)
    second = tmp_path / "second"
    adapting.save(second, {"name": "clinical_prior"})
    assert {p.name for p in second.iterdir()} == {"unet_lora", "generator.json"}

    both = generator.load(first, adapters=(second,))
    torch.testing.assert_close(predict(both), predict(adapting), rtol=0, atol=0)
    resumed = adapter.load(second, adapt_from=first)
    torch.testing.assert_close(predict(resumed), predict(adapting), rtol=0, atol=0)
    assert set(generator.weights(first, (second,))) == {"base", "unet", "controlnet", "adapter_0"}

    with pytest.raises(ValueError, match="adapted from"):
        adapter.load(second)
    with pytest.raises(ValueError, match="no unet_lora"):
        generator.load(first, adapters=(first,))
    manifest = json.loads((second / "generator.json").read_text())
    assert set(manifest["built_on"]) == {"base", "unet", "controlnet"}


def test_mask_planes_are_one_hot(base: Path) -> None:
    generator = LatentDiffusion(base=str(base), conditioning=TextAndMask(num_mask_classes=3), resolution=64)
    loaded = generator.load()
    labels = np.random.default_rng(0).integers(0, 4, (2, 64, 64)).astype(np.uint8)
    planes = loaded.condition(labels)
    assert planes is not None and planes.shape == (2, 3, 64, 64)
    for number in (1, 2, 3):
        np.testing.assert_array_equal(planes[:, number - 1].numpy(), labels == number)
    with pytest.raises(ValueError, match="class 4"):
        loaded.condition(np.full((1, 64, 64), 4, np.uint8))
    with pytest.raises(ValueError, match="want uint8"):
        loaded.condition(np.zeros((1, 32, 64), np.uint8))


def test_images_go_in_and_out_as_uint8(base: Path) -> None:
    loaded = mask_generator(base).load()
    grey = np.random.default_rng(0).integers(0, 256, (2, 64, 64)).astype(np.uint8)
    mean, logvar = loaded.encode_images(grey)
    assert mean.shape == logvar.shape == (2, *loaded.latent_shape)
    from_rgb, _ = loaded.encode_images(np.repeat(grey[..., None], 3, axis=-1))
    assert torch.equal(from_rgb, mean)
    decoded = loaded.decode(mean)
    assert decoded.dtype == torch.uint8 and decoded.shape == (2, 64, 64, 3)
    with pytest.raises(ValueError, match="want uint8"):
        loaded.encode_images(grey.astype(np.uint16))
    # Scaled latents: the scaling factor enters mean and variance alike, and decoding takes it out again.
    loaded.vae.register_to_config(scaling_factor=2 * loaded.vae.config.scaling_factor)
    doubled, doubled_logvar = loaded.encode_images(grey)
    torch.testing.assert_close(doubled, 2 * mean)
    torch.testing.assert_close((doubled_logvar / 2).exp(), 2 * (logvar / 2).exp())
    torch.testing.assert_close(loaded.decode(doubled), decoded)


def test_uint8_conversion_rounds_and_clips() -> None:
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0, float("nan"), float("inf")])
    assert to_uint8(pixels).tolist() == [0, 0, 128, 255, 255, 0, 0]


def test_base_that_is_no_base_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        LatentDiffusion(base=str(tmp_path / "nothing")).load()
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        mask_generator(broken).weights()
    with pytest.raises(ValueError, match="multiple of 16"):
        LatentDiffusion(base=str(base), resolution=72).load()
