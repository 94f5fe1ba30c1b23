import numpy as np
import pytest
import torch
from small_denoiser import NUM_TIMESTEPS, make_examples, make_settings

from factory.training.examples import DiffusionBatch, Examples, Latents
from factory.training.mixture import BatchSampler, global_batch


def _fields(batch: DiffusionBatch) -> list[torch.Tensor]:
    assert batch.masks is not None
    return [batch.latents, batch.noise, batch.timesteps, batch.prompts, batch.masks]


@pytest.mark.parametrize("workers", [2, 4])
def test_draws_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    settings = make_settings(batch_size=8, prompt_dropout=0.5)
    examples = make_examples(settings)
    batch = global_batch(BatchSampler(num_rows=len(examples), batch_size=8), 7)
    whole = _fields(examples.draw(batch))
    parts = [_fields(examples.draw(shard)) for shard in batch.split(workers)]
    for name, value in enumerate(whole):
        assert torch.equal(value, torch.cat([part[name] for part in parts]))


def test_noise_differs_by_step_position_and_seed() -> None:
    examples = make_examples(make_settings())
    sampler = BatchSampler(num_rows=len(examples), batch_size=4)
    first, second = (examples.draw(global_batch(sampler, step)).noise for step in (0, 1))
    other = make_examples(make_settings(seed=1)).draw(global_batch(sampler, 0)).noise
    rows = [*first, *second, *other]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_draws_have_the_right_distribution() -> None:
    settings = make_settings(batch_size=1000, prompt_dropout=0.2, horizontal_flip=True)
    examples = make_examples(settings)
    examples.latents.flipped_mean[...] = 50
    batch = examples.draw(global_batch(BatchSampler(num_rows=len(examples), batch_size=1000), 0))
    assert abs((batch.prompts == 0).float().mean() - 0.2) < 0.04
    assert abs((batch.latents.mean((1, 2, 3)) > 25).float().mean() - 0.5) < 0.05
    assert batch.timesteps.min() == 0 and batch.timesteps.max() == NUM_TIMESTEPS - 1
    assert abs(batch.noise.mean()) < 0.02 and abs(batch.noise.std() - 1) < 0.02


def test_posterior_is_sampled_with_its_variance() -> None:
    mean = np.full((1, 2, 16, 16), 3.0, np.float16)
    logvar = np.full((1, 2, 16, 16), 2 * np.log(0.5), np.float16)
    examples = Examples(
        latents=Latents(mean=mean, logvar=logvar), prompts=np.array([1]), masks=None, num_timesteps=10
    )
    batch = examples.draw(global_batch(BatchSampler(num_rows=1, batch_size=16), 0))
    assert abs(batch.latents.mean() - 3) < 0.02 and abs(batch.latents.std() - 0.5) < 0.02
    assert batch.masks is None


def test_mask_is_mirrored_with_its_image() -> None:
    examples = make_examples(make_settings())
    examples.latents.flipped_mean[...] = 50
    sampler = BatchSampler(num_rows=len(examples), batch_size=40)
    batch = global_batch(sampler, 0)
    drawn = examples.draw(batch)
    plain = examples.fixed(batch.rows, [str(i) for i in range(40)])
    flipped = drawn.latents.mean((1, 2, 3)) > 25
    assert 0 < flipped.sum() < 40
    assert torch.equal(drawn.masks[flipped], plain.masks[flipped].flip(2))
    assert torch.equal(drawn.masks[~flipped], plain.masks[~flipped])


def test_fixed_inputs_never_change() -> None:
    settings = make_settings(prompt_dropout=0.9)
    names = [f"image-{i}" for i in range(6)]
    one, two = (make_examples(settings).fixed(np.arange(6), names) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(_fields(one), _fields(two)))
    assert (one.prompts > 0).all()
    assert one.timesteps.tolist() == [4, 12, 20, 29, 37, 45]


def test_flip_needs_flipped_latents() -> None:
    latents = Latents(mean=np.zeros((1, 1, 2, 2), np.float16), logvar=np.zeros((1, 1, 2, 2), np.float16))
    with pytest.raises(ValueError, match="horizontal_flip"):
        Examples(latents=latents, prompts=np.array([1]), masks=None, num_timesteps=5, horizontal_flip=True)
