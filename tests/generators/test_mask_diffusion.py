"""The mask DDPM: its schedule, its sampler, its class, its file."""

import json
from pathlib import Path

import pytest
import torch

from factory.generators.mask_checkpoints import MASK_MANIFEST, WEIGHTS, mask_model_digest
from factory.generators.mask_diffusion import MaskDDPM
from factory.generators.mask_diffusion_model import MaskDenoiser, ddim_scheduler, ddpm_scheduler
from factory.training.parts import save_mask_model

TINY = {
    "resolution": 8,
    "channels": (8, 16),
    "norm_groups": 4,
    "layers_per_block": 1,
    "num_inference_steps": 5,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def denoiser() -> MaskDenoiser:
    torch.manual_seed(0)
    return MaskDDPM(**TINY).network(2).eval()  # type: ignore[arg-type]


def test_the_schedule_is_the_cosine_one() -> None:
    alphas = ddpm_scheduler(MaskDDPM(**TINY)).alphas_cumprod  # type: ignore[arg-type]
    t = (torch.arange(1, 1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
    expected = t.cos().square() / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)).square()
    assert torch.allclose(alphas[:990].double(), expected[:990], atol=2e-4)
    assert torch.equal(alphas, ddim_scheduler(MaskDDPM(**TINY)).alphas_cumprod)  # type: ignore[arg-type]


def test_the_sampler_recovers_a_known_mask() -> None:
    """With the exact noise for one target, DDIM must end at that target."""

    class Exact(MaskDenoiser):
        def forward(
            self, noisy: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor
        ) -> torch.Tensor:
            level = ddpm_scheduler(self.model).alphas_cumprod[timesteps][:, None, None, None]
            return (noisy - level.sqrt() * target) / (1 - level).sqrt()

    target = torch.where(torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5, 1.0, -1.0)
    exact = Exact(MaskDDPM(**TINY), 2)  # type: ignore[arg-type]
    drawn = exact.draw(torch.randn(1, 1, 8, 8), torch.tensor([0]))
    assert torch.allclose(drawn, (target + 1) / 2, atol=1e-3)


def test_a_draw_depends_on_noise_and_class_only(denoiser: MaskDenoiser) -> None:
    noise = torch.randn(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    drawn = denoiser.draw(noise, labels)
    assert drawn.shape == (2, 1, 8, 8) and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(drawn, denoiser.draw(noise, labels))
    with torch.no_grad():
        predictions = [denoiser(noise[:1], torch.tensor([500]), torch.tensor([label])) for label in (0, 1)]
    assert (predictions[0] - predictions[1]).abs().max() > 1e-4


def test_saved_and_loaded_it_draws_the_same(tmp_path: Path, denoiser: MaskDenoiser) -> None:
    model = denoiser.model
    save_mask_model(tmp_path, model, denoiser, ("benign", "malignant"), {"steps": 3})
    noise = torch.randn(1, 1, 8, 8)
    loaded = model.load(tmp_path)
    assert torch.equal(loaded.draw(noise, torch.tensor([1])), denoiser.draw(noise, torch.tensor([1])))
    digest = mask_model_digest(tmp_path, "mask_diffusion")
    manifest = json.loads((tmp_path / MASK_MANIFEST).read_text())
    (tmp_path / MASK_MANIFEST).write_text(json.dumps({**manifest, "classes": ["malignant", "benign"]}))
    assert mask_model_digest(tmp_path, "mask_diffusion") != digest, (
        "the order of the classes decides what is drawn"
    )
    with pytest.raises(ValueError, match=r"another model: num_inference_steps is 5 there and 6 here"):
        MaskDDPM(**{**TINY, "num_inference_steps": 6}).load(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind mask_diffusion, wanted mask_gan"):
        mask_model_digest(tmp_path, "mask_gan")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no model.safetensors there; `factory train --part mask_diffusion"
    ):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("channels", (8, 10), "want widths divisible by norm_groups = 4"),
        ("resolution", 9, "9 px is not a multiple of 2"),
        ("num_inference_steps", 0, "want 1 … 1000"),
        ("layers_per_block", 0, "layers_per_block: want 1 or more"),
    ],
)
def test_bad_fields_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskDDPM(**{**TINY, field: value})  # type: ignore[arg-type]
