"""Class embeddings, inpainting input, placeholder tokens and another autoencoder, on real models at tiny width."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from random_generators import RESOLUTION, disturb

from factory.diffusion.conditions import Conditions
from factory.generators.conditioning import ClassLabel, TextAndInpaint, TextOnly
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.generators.loaded import LoadedGenerator


def make(base: Path, conditioning: object = TextOnly(), **changes: object) -> LatentDiffusion:
    return LatentDiffusion(
        base=str(base),
        conditioning=conditioning,  # type: ignore[arg-type]
        resolution=RESOLUTION,
        **changes,  # type: ignore[arg-type]
    )


def predict(loaded: LoadedGenerator, conditions: Conditions) -> torch.Tensor:
    latents = torch.randn((2, *loaded.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return loaded.denoiser()(latents, torch.tensor([10, 700]), **conditions.arguments())


def masks() -> torch.Tensor:
    label_maps = torch.zeros(2, RESOLUTION, RESOLUTION, dtype=torch.uint8)
    label_maps[:, 20:40, 10:50] = 1
    return label_maps


@pytest.fixture
def plain(base: Path) -> tuple[LoadedGenerator, torch.Tensor, torch.Tensor]:
    """The base, two embedded prompts, and its prediction."""
    loaded = make(base).load()
    embeds = loaded.encode_prompts(["benign tumor", ""])
    return loaded, embeds, predict(loaded, loaded.conditions(embeds))


def test_a_fresh_class_embedding_changes_nothing_and_a_trained_one_tells_classes_apart(
    base: Path, tmp_path: Path, plain: tuple[LoadedGenerator, torch.Tensor, torch.Tensor]
) -> None:
    _, embeds, expected = plain
    generator = make(base, ClassLabel(num_classes=3))
    loaded = generator.load()
    assert loaded.unet.config.num_class_embeds == 4
    first = loaded.conditions(embeds, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(predict(loaded, first), expected, rtol=0, atol=0)
    disturb(loaded, size=0.1)
    other = loaded.conditions(embeds, labels=torch.tensor([1, 2]))
    one, two = predict(loaded, first), predict(loaded, other)
    assert (one[0] - two[0]).abs().max() > 1e-3
    torch.testing.assert_close(one[1], two[1])
    loaded.save(tmp_path / "checkpoint", {"name": "sketch"})
    again = generator.load(tmp_path / "checkpoint")
    torch.testing.assert_close(predict(again, first), one, rtol=0, atol=0)


def test_no_class_is_an_embedding_of_its_own(base: Path) -> None:
    loaded = make(base, ClassLabel(num_classes=3)).load()
    conditions = loaded.conditions(loaded.encode_prompts(["", ""]), labels=torch.tensor([-1, 2]))
    assert conditions.class_labels is not None and conditions.class_labels.tolist() == [3, 2]
    null = loaded.unconditional(conditions, loaded.null_prompt())
    assert null.class_labels is not None and null.class_labels.tolist() == [3, 3]
    with pytest.raises(ValueError, match="labels: ClassLabel needs them"):
        loaded.conditions(loaded.encode_prompts([""]))


def test_a_base_with_another_number_of_classes_is_refused(base: Path, tmp_path: Path) -> None:
    loaded = make(base, ClassLabel(num_classes=3)).load()
    shutil.copytree(base, tmp_path / "base")
    loaded.unet.save_pretrained(tmp_path / "base" / "unet")
    with pytest.raises(ValueError, match="has 4 class embeddings, wants 6 .* set num_classes=3"):
        make(tmp_path / "base", ClassLabel(num_classes=5)).load()
    with pytest.raises(ValueError, match="the UNet wants a class"):
        make(tmp_path / "base").load()
    with pytest.raises(ValueError, match="unet='lora'.*all of it must be trained"):
        make(base, ClassLabel(), trainable=Trainable(unet="lora"))


def test_a_widened_input_changes_nothing_until_it_is_trained(
    base: Path, tmp_path: Path, plain: tuple[LoadedGenerator, torch.Tensor, torch.Tensor]
) -> None:
    _, embeds, expected = plain
    generator = make(base, TextAndInpaint())
    loaded = generator.load()
    images = torch.randint(0, 256, (2, RESOLUTION, RESOLUTION), dtype=torch.uint8)
    hidden, _ = loaded.encode_images(images, masks())
    conditions = loaded.conditions(embeds, masks=masks(), masked_latents=hidden)
    assert conditions.inpaint is not None
    channels, *side = loaded.latent_shape
    assert (
        conditions.inpaint.shape == (2, 1 + channels, *side)
        and loaded.unet.config.in_channels == 2 * channels + 1
    )
    assert (
        conditions.inpaint[0, 0].sum() == 3 * 6
    )  # rows 20-40 touch cells 2, 3, 4; columns 10-50 cells 1 … 6
    torch.testing.assert_close(predict(loaded, conditions), expected, rtol=0, atol=0)
    disturb(loaded, size=0.1)
    trained = predict(loaded, conditions)
    without = replace(conditions, inpaint=torch.zeros_like(conditions.inpaint))
    assert (predict(loaded, without) - trained).abs().max() > 1e-3
    loaded.save(tmp_path / "checkpoint", {"name": "inpaint"})
    torch.testing.assert_close(
        predict(generator.load(tmp_path / "checkpoint"), conditions), trained, rtol=0, atol=0
    )
    # An inpainting base comes as it is, and goes with no other conditioning.
    shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "unet")
    shutil.copytree(tmp_path / "checkpoint" / "unet", tmp_path / "base" / "unet")
    as_base = make(tmp_path / "base", TextAndInpaint()).load()
    torch.testing.assert_close(predict(as_base, conditions), trained, rtol=0, atol=0)
    with pytest.raises(ValueError, match="an inpainting base goes with conditioning TextAndInpaint"):
        make(tmp_path / "base").load()


def test_what_lies_under_the_mask_does_not_reach_the_latents(base: Path) -> None:
    loaded = make(base).load()
    one = torch.randint(0, 256, (2, RESOLUTION, RESOLUTION), dtype=torch.uint8)
    two = torch.where(masks() > 0, 255 - one, one)
    assert not torch.equal(one, two)
    torch.testing.assert_close(loaded.encode_images(one, masks()), loaded.encode_images(two, masks()))


def test_a_placeholder_is_the_mean_of_its_words_pieces(base: Path) -> None:
    plain = make(base).load()
    placeholders = (("<lesion>", "lesion"), ("<skin>", "skin"))
    loaded = make(base, placeholders=placeholders).load()
    old = plain.text_encoder.get_input_embeddings().weight
    new = loaded.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(new[: len(old)], old)
    for token, word in placeholders:
        pieces = plain.tokenizer(word, add_special_tokens=False).input_ids
        number = loaded.tokenizer.convert_tokens_to_ids(token)
        torch.testing.assert_close(new[number], old[pieces].mean(dim=0))
    positions = loaded.token_positions(["<skin> and <lesion>", "nothing"], "<lesion>")
    assert len(positions[0]) == 1 and positions[1] == []
    row = loaded.tokenize(["<skin> and <lesion>"]).input_ids[0]
    assert row[positions[0][0]] == loaded.tokenizer.convert_tokens_to_ids("<lesion>")
    assert (loaded.encode_prompts(["<lesion>"]) - loaded.encode_prompts(["<skin>"])).abs().max() > 0
    torch.testing.assert_close(loaded.encode_prompts(["tumor"]), plain.encode_prompts(["tumor"]))
    counts = loaded.num_tokens(["", "<lesion>", "<lesion> <skin>"])
    assert counts == [2, 3, 4]
    with pytest.raises(ValueError, match="placeholders: want distinct tokens"):
        make(base, placeholders=(("<a>", "lesion"), ("<a>", "skin")))


def test_another_autoencoder_takes_the_place_of_the_bases(base: Path, tmp_path: Path) -> None:
    from factory.training.latent_cache import latents_uri

    generator = make(base)
    loaded = generator.load()
    images = torch.randint(0, 256, (1, RESOLUTION, RESOLUTION), dtype=torch.uint8)
    with torch.no_grad():
        for parameter in loaded.vae.parameters():
            parameter.mul_(1.1)
    loaded.vae.save_pretrained(tmp_path / "tuned" / "vae")
    tuned = replace(generator, vae=str(tmp_path / "tuned"))
    expected = loaded.encode_images(images)
    torch.testing.assert_close(tuned.load().encode_images(images), expected)
    assert set(tuned.weights()) == {"base", "vae"} and set(generator.weights()) == {"base"}
    assert latents_uri("real.lance", tuned) != latents_uri("real.lance", generator)
    loaded = tuned.load()
    disturb(loaded)
    loaded.save(tmp_path / "checkpoint", {"name": "scmg"})
    assert set(tuned.weights(tmp_path / "checkpoint")) == {"base", "vae", "unet"}
    with pytest.raises(ValueError, match="trained upon vae"):
        generator.weights(tmp_path / "checkpoint")
    with pytest.raises(FileNotFoundError, match="factory train --part vae"):
        replace(generator, vae=str(tmp_path / "nowhere")).weights()


def test_models_are_the_librarys_own(base: Path) -> None:
    loaded = make(base, ClassLabel()).load()
    assert type(loaded.unet) is UNet2DConditionModel and type(loaded.vae) is AutoencoderKL
