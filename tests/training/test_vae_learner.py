"""The VAE stage: its loss, exact resume, and that fine-tuning on a domain improves its reconstruction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from mask_rows import settings

from factory.imaging import TrainingRow
from factory.training.checkpoints import read_checkpoint
from factory.training.loop import train
from factory.training.metrics import read_metrics
from factory.training.mixture import BatchSampler
from factory.training.vae_learner import VAELearner, to_tensor, vae_terms
from factory.training.vae_stage import VAEStage
from factory.training.world import World

SIDE = 32


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = 3
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=0.5,
    )


def images(count: int, seed: int = 0, colour: bool = False) -> list[TrainingRow]:
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:SIDE, :SIDE]
    rows = []
    for number in range(count):
        y, x = rng.uniform(10, 22, 2)
        grey = np.where(np.hypot(ys - y, xs - x) < 7, 200, 60).astype(np.uint8)
        image = np.stack([grey, grey // 2, grey // 4], axis=2) if colour else grey
        rows.append(
            TrainingRow(
                image_id=str(number),
                label=0,
                label_name="a",
                group_id="",
                image=image,
                mask=None,
                attributes={},
            )
        )
    return rows


def make(run: Any, kl_weight: float = 1e-6, **changes: Any) -> VAELearner:
    return VAELearner(
        vae=tiny_vae(),
        rows=images(10, **changes),
        kl_weight=kl_weight,
        settings=run,
        world=World(),
        held_out=images(5, seed=1),
    )


def run_to(out: Path, max_steps: int, kl_weight: float = 1e-6, **changes: Any) -> VAELearner:
    values = {"batch_size": 4, "learning_rate": 3e-3, "adam_betas": (0.9, 0.999), **changes}
    run = settings(max_steps=max_steps, **values)
    learner = make(run, kl_weight)
    train(learner, BatchSampler(num_rows=10, batch_size=run.batch_size), run, out, world=World())
    return learner


def test_the_kl_is_that_of_torch() -> None:
    mean, logvar = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    made = images_ = torch.rand(3, 3, 8, 8)
    error, kl = vae_terms(images_, made, mean, logvar)
    unit = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()), unit)
    assert torch.allclose(kl, expected.sum(dim=(1, 2, 3)), rtol=1e-5)
    assert error.tolist() == [0, 0, 0]
    assert vae_terms(images_, made + 0.5, mean, logvar)[0].tolist() == pytest.approx([0.25] * 3)


def test_interrupted_and_extended_runs_end_bit_equal(tmp_path: Path) -> None:
    run_to(tmp_path / "whole", 4)
    run_to(tmp_path / "parts", 2)
    run_to(tmp_path / "parts", 4)
    whole, parts = (read_checkpoint(tmp_path / name, 4)[0] for name in ("whole", "parts"))
    assert [n for n, value in whole["ema"].items() if not torch.equal(value, parts["ema"][n])] == []


def test_accumulation_is_the_same_step() -> None:
    run = settings(batch_size=4, learning_rate=1e-3)
    metrics = []
    for parts in (1, 2):
        learner = make(settings(batch_size=4, learning_rate=1e-3, gradient_accumulation_steps=parts))
        from factory.training.mixture import global_batch

        batch = learner.draw(global_batch(BatchSampler(num_rows=10, batch_size=4), 0))
        metrics.append({name: value.item() for name, value in learner.step(batch).items()})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4) and run.max_steps


def test_fine_tuning_improves_held_out_reconstruction(tmp_path: Path) -> None:
    run_to(tmp_path, 60, validate_every=20, log_every=20, checkpoint_every=60)
    errors = [line["val_loss"] for line in read_metrics(tmp_path) if "val_loss" in line]
    assert errors[-1] < 0.5 * errors[0]
    assert all(line["val_latent_std"] > 0 for line in read_metrics(tmp_path) if "val_latent_std" in line)


def test_the_paper_weight_lets_the_kl_win(tmp_path: Path) -> None:
    changes = {"log_every": 60, "validate_every": 60, "checkpoint_every": 60}
    run_to(tmp_path / "ours", 60, **changes)
    run_to(tmp_path / "paper", 60, kl_weight=1.0, **changes)
    ours, paper = (read_metrics(tmp_path / name)[-1] for name in ("ours", "paper"))
    last = [max(read_metrics(tmp_path / name), key=lambda line: "kl" in line) for name in ("ours", "paper")]
    assert last[1]["kl"] < 0.1 * last[0]["kl"]
    assert paper["val_loss"] > 2 * ours["val_loss"]


def test_colour_stays_and_grey_is_replicated() -> None:
    grey, colour = (to_tensor([row.image for row in images(2, colour=flag)]) for flag in (False, True))
    assert grey.shape == colour.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(grey[:, 0], grey[:, 2]) and not torch.equal(colour[:, 0], colour[:, 2])
    assert grey.min() >= -1 and to_tensor([np.full((4, 4), 255, np.uint8)]).max() == 1
    real, drawn = make(settings(batch_size=4)).previews(2)
    assert real.shape == drawn.shape == (2, SIDE, SIDE, 3)
    assert np.array_equal(real[0, :, :, 0], images(5, seed=1)[0].image)


def test_bad_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"vae_stage.kl_weight: want 0 or more, got -1"):
        VAEStage(kl_weight=-1)
    with pytest.raises(ValueError, match="min_snr_gamma and compile are of the generator"):
        VAEStage(training=settings(min_snr_gamma=5.0))
