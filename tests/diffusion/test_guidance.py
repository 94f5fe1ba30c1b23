"""BoundMaskedBlend: what lies outside the mask is kept exactly, what lies inside is a sample."""

from typing import Any

import pytest
import torch
from test_denoise import NAMES, GaussianDenoiser, run

from factory.diffusion.guidance import BoundMaskedBlend, draw_noise


def rngs(batch: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(batch)]


def blend(mask: torch.Tensor, batch: int = 4, **kwargs: Any) -> BoundMaskedBlend:
    background = torch.randn((batch, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    return BoundMaskedBlend(background=background, mask=mask[:batch], **kwargs)


def half() -> torch.Tensor:
    mask = torch.zeros(4, 1, 16, 16)
    mask[:, :, :8] = 1
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_outside_the_mask_is_bit_identical(name: str) -> None:
    guidance = blend(half())
    latents = run(GaussianDenoiser("epsilon", 1.0), name, guidances=[guidance], rngs=rngs(4))
    assert torch.equal(latents[:, :, 8:], guidance.background[:, :, 8:])
    assert latents[:, :, :8].std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_full_mask(name: str) -> None:
    empty = blend(torch.zeros(4, 1, 16, 16))
    latents = run(GaussianDenoiser("epsilon", 1.0), name, guidances=[empty], rngs=rngs(4))
    assert torch.equal(latents, empty.background)
    full = blend(torch.ones(4, 1, 16, 16))
    latents = run(GaussianDenoiser("epsilon", 1.0), name, guidances=[full], rngs=rngs(4))
    assert torch.equal(latents, run(GaussianDenoiser("epsilon", 1.0), name))


class VarianceRecorder(BoundMaskedBlend):
    """BoundMaskedBlend that notes how much the latents outside the mask vary after each step."""

    def after_step(self, latents: torch.Tensor, step: Any) -> torch.Tensor:
        latents = super().after_step(latents, step)
        self.__dict__.setdefault("stds", []).append(latents[:, :, 8:].std().item())
        return latents


def test_blended_background_has_the_noise_of_its_step() -> None:
    """q(x_{t−1} | z₀) of unit-variance z₀ has unit variance at every step; without the noise it would not."""
    guidance = VarianceRecorder(background=blend(half()).background, mask=half())
    run(GaussianDenoiser("epsilon", 1.0), guidances=[guidance], rngs=rngs(4))
    assert len(guidance.stds) == 50
    assert all(std == pytest.approx(1.0, abs=0.1) for std in guidance.stds)


def test_stop_leaves_the_last_steps_free() -> None:
    guidance = blend(half(), start=0.0, stop=0.5)
    latents = run(GaussianDenoiser("epsilon", 1.0), guidances=[guidance], rngs=rngs(4))
    assert not torch.equal(latents[:, :, 8:], guidance.background[:, :, 8:])


def test_result_does_not_depend_on_the_batch() -> None:
    together = run(GaussianDenoiser("epsilon", 0.7), guidances=[blend(half())], rngs=rngs(4))
    one = blend(half())
    alone = BoundMaskedBlend(background=one.background[:1], mask=one.mask[:1])
    single = run(GaussianDenoiser("epsilon", 0.7), batch=1, guidances=[alone], rngs=rngs(1))
    torch.testing.assert_close(single[0], together[0], rtol=1e-5, atol=1e-5)


def test_noise_belongs_to_its_generator() -> None:
    both = draw_noise((2, 3), rngs(2), torch.device("cpu"))
    assert torch.equal(both[1:], draw_noise((2, 3), rngs(1, first=1), torch.device("cpu")))


def test_shapes_and_generators_are_checked() -> None:
    with pytest.raises(ValueError, match="mask"):
        BoundMaskedBlend(background=torch.zeros(2, 4, 8, 8), mask=torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="rngs"):
        run(GaussianDenoiser("epsilon", 1.0), guidances=[blend(half())])
