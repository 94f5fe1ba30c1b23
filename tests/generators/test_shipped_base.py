"""The base that ships: small, readable, and its pictures are phantoms and not noise."""

import json

import numpy as np
import pytest
import torch

from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig, phantom_sample
from factory.diffusion.denoise import denoise, make_noise_scheduler
from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextOnly
from factory.generators.latent_diffusion import TINY_BASE, LatentDiffusion
from factory.generators.loaded import LoadedGenerator

HELD_OUT_SEED = 777
TEMPLATE = "breast ultrasound image of {} tumor with {} echogenicity and {} boundary."


@pytest.fixture(scope="module")
def loaded() -> LoadedGenerator:
    return LatentDiffusion(base="tiny", conditioning=TextOnly(), resolution=128).load()


@pytest.fixture(scope="module")
def phantoms() -> np.ndarray:
    config = PhantomConfig(size=128, classes=(BENIGN, MALIGNANT, NORMAL))
    return np.stack([phantom_sample(config, HELD_OUT_SEED, i).image for i in range(12)])


def sample(loaded: LoadedGenerator, prompt: str, count: int) -> np.ndarray:
    """(count, 128, 128) float grey levels."""
    sampling = Sampling(num_inference_steps=12, guidance_scale=2.0)
    noise = torch.randn((count, *loaded.latent_shape), generator=torch.Generator().manual_seed(0))
    conditions = loaded.conditions(loaded.encode_prompts([prompt]).expand(count, -1, -1))
    latents = denoise(
        loaded.denoiser(),
        make_noise_scheduler(sampling, loaded.noise_scheduler.config),
        noise,
        conditions,
        loaded.unconditional(conditions, loaded.null_prompt()),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
    )
    return loaded.decode(latents).float().mean(dim=-1).numpy()


def detail(images: np.ndarray) -> float:
    """Mean strength of differences between neighbouring pixels: speckle."""
    images = images.astype(float)
    return float(np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean())


def test_weights_are_small_and_all_safetensors() -> None:
    files = [path for path in TINY_BASE.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 and sum(path.stat().st_size for path in weights) < 8 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    for path in TINY_BASE.rglob("config.json"):
        assert "_name_or_path" not in json.loads(path.read_text())


def test_tokenizer_knows_the_prompts_and_survives_any_text(loaded: LoadedGenerator) -> None:
    words = TEMPLATE.format("malignant", "heterogeneous", "unclear")
    tokens = loaded.tokenizer(words).input_ids
    assert len(tokens) == len(words.rstrip(".").split()) + 3  # one per word, the full stop, begin and end
    for text in ("", "Zyste, 3×4 mm – ☃ 囊肿", "x" * 500, "\x00\n\t"):
        embeds = loaded.encode_prompts([text])
        assert embeds.shape == loaded.null_prompt().shape and embeds.isfinite().all()
    assert not torch.equal(loaded.encode_prompts(["cyst"]), loaded.encode_prompts(["zyst"]))


def test_autoencoder_keeps_held_out_phantoms(loaded: LoadedGenerator, phantoms: np.ndarray) -> None:
    mean, logvar = loaded.encode_images(phantoms)
    decoded = loaded.decode(mean).float()
    assert decoded.amax(dim=-1).sub(decoded.amin(dim=-1)).max() <= 1  # grey in, grey out
    made = decoded.mean(dim=-1).numpy()
    error = ((made - phantoms.astype(float)) ** 2).mean(axis=(1, 2))
    assert (10 * np.log10(255**2 / error)).mean() > 20.5
    assert detail(made) == pytest.approx(detail(phantoms), rel=0.15)  # speckle is not smoothed away
    latents = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert latents.std().item() == pytest.approx(1.0, abs=0.15)


def test_samples_have_the_statistics_of_phantoms(loaded: LoadedGenerator, phantoms: np.ndarray) -> None:
    made = sample(loaded, TEMPLATE.format("benign", "homogeneous", "clear"), 12)
    assert made.mean() == pytest.approx(phantoms.mean(), abs=15)
    assert made.std() == pytest.approx(phantoms.std(), rel=0.25)
    assert detail(made) == pytest.approx(detail(phantoms), rel=0.3)
    # Depth profile: bright skin, tissue layers, darker far field.
    profiles = [images.mean(axis=(0, 2)) for images in (made, phantoms.astype(float))]
    assert np.corrcoef(profiles)[0, 1] > 0.75


def test_prompt_decides_what_is_shown(loaded: LoadedGenerator) -> None:
    """The same noise under two prompts: a malignant lesion shadows, so there is more black than in normal tissue."""
    normal = sample(loaded, "breast ultrasound image of normal tissue.", 12)
    malignant = sample(loaded, TEMPLATE.format("malignant", "heterogeneous", "unclear"), 12)
    middle = slice(20, 100)
    darkest = [np.percentile(images[:, middle], 3, axis=(1, 2)).mean() for images in (normal, malignant)]
    assert darkest[1] < darkest[0] - 4
