"""The loop and its learner over a small real network: accumulation, ranks, resume, kill -9."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_denoiser import (
    NUM_ROWS,
    make_denoiser,
    make_learner,
    make_settings,
    run_here,
    run_rank,
)

from factory.training.checkpoints import checkpoint_folder, checkpoint_steps, read_checkpoint
from factory.training.learners import DiffusionLearner
from factory.training.loop import train
from factory.training.metrics import Observer, read_metrics
from factory.training.mixture import BatchSampler, global_batch
from factory.training.world import World

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["factory.training.loop", "factory.training.learners"])


def _step(learner: DiffusionLearner, step: int = 0) -> dict[str, float]:
    batch = global_batch(BatchSampler(num_rows=NUM_ROWS, batch_size=learner.settings.batch_size), step)
    return {name: value.item() for name, value in learner.step(learner.draw(batch)).items()}


def _state(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: parameters, averages, optimizer moments."""
    tensors, state = read_checkpoint(out, step)
    flat = {f"{stem}.{name}": value for stem, named in tensors.items() for name, value in named.items()}
    for number, moments in state["optimizers"]["main"]["state"].items():
        flat |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return flat


def _assert_bit_equal(one: Path, two: Path, step: int) -> None:
    a, b = _state(one, step), _state(two, step)
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_accumulation_equals_the_full_batch() -> None:
    whole = make_learner(make_settings(batch_size=8))
    parts = make_learner(make_settings(batch_size=8, gradient_accumulation_steps=4))
    for step in range(3):
        a, b = _step(whole, step), _step(parts, step)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for name, value in whole.parameters.items():
        torch.testing.assert_close(value, parts.parameters[name], rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_the_mean_loss() -> None:
    learner = make_learner(make_settings(batch_size=4, learning_rate=1e-12))
    batch = learner.draw(global_batch(BatchSampler(num_rows=NUM_ROWS, batch_size=4), 0))
    model = make_denoiser()
    alpha = torch.linspace(0.999, 0.01, 50)[batch.timesteps].reshape(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise
    embeds = learner._prompt_embeds[batch.prompts]
    loss = torch.nn.functional.mse_loss(
        model(noisy, batch.timesteps, embeds, batch.masks[:, None].float()), batch.noise
    )
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    metrics = learner.step(batch)
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "tolerance"), [({"mixed_precision": "bf16"}, 0.02), ({"channels_last": True}, 1e-5)]
)
def test_execution_settings_only_change_rounding(changes: dict, tolerance: float) -> None:
    plain, changed = make_learner(make_settings()), make_learner(make_settings(**changes))
    a, b = _step(plain), _step(changed)
    assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance)
    assert all(p.dtype == torch.float32 for p in changed.parameters.values())


def test_only_trainable_parameters_change() -> None:
    learner = make_learner(make_settings())
    before = {name: p.detach().clone() for name, p in learner.denoiser.named_parameters()}
    _step(learner)
    changed = {name for name, p in learner.denoiser.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(learner.parameters) and not any("frozen" in name for name in changed)


def test_loss_decreases_and_validation_is_unmoved_by_training_draws(tmp_path: Path) -> None:
    settings = make_settings(max_steps=150, batch_size=8, validate_every=50, prompt_dropout=0.0)
    run_here(tmp_path, settings)
    losses = [line["val_loss"] for line in read_metrics(tmp_path) if "val_loss" in line]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    learner = make_learner(settings)
    assert learner.validate() == learner.validate()


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(whole, make_settings(max_steps=20))
    for max_steps in (7, 13, 20):  # extending a finished run goes on
        result = run_here(parts, make_settings(max_steps=max_steps))
        assert result.steps == max_steps
    assert result.start_step == 13
    _assert_bit_equal(whole, parts, 20)
    assert checkpoint_steps(parts) == [16, 20]
    # Checkpoints lie between reports here, and the curve is the same all the same (but for the extra last steps).
    one, two = (
        {line["step"]: line["loss"] for line in read_metrics(out) if "loss" in line} for out in (whole, parts)
    )
    assert set(two) - set(one) == {7, 13}


def test_the_curve_of_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    settings = make_settings(max_steps=12, checkpoint_every=5)
    run_here(tmp_path / "whole", settings)
    run_here(tmp_path / "parts", settings)
    shutil.rmtree(checkpoint_folder(tmp_path / "parts", 12))  # as after a kill in step 12
    assert run_here(tmp_path / "parts", settings).start_step == 10
    for a, b in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"), strict=True):
        assert a["step"] == b["step"]
        for name in {"loss", "grad_norm", "val_loss"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-6)


def test_a_run_past_max_steps_is_refused(tmp_path: Path) -> None:
    run_here(tmp_path, make_settings(max_steps=6))
    with pytest.raises(ValueError, match=r"max_steps: 5 asked for, .* holds 6"):
        run_here(tmp_path, make_settings(max_steps=5))


def test_metrics_past_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    run_here(tmp_path, make_settings(max_steps=8))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "loss": 1.0}\n{"step": 11, "lo')
    run_here(tmp_path, make_settings(max_steps=12))
    steps = [line["step"] for line in read_metrics(tmp_path) if "loss" in line]
    assert steps == [3, 6, 8, 9, 12]


def test_another_set_of_parameters_is_refused(tmp_path: Path) -> None:
    settings = make_settings(max_steps=4)
    run_here(tmp_path, settings)
    denoiser = make_denoiser()
    denoiser.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"2 trained parameters differ .* frozen.bias"):
        train(
            make_learner(settings, denoiser=denoiser),
            BatchSampler(num_rows=NUM_ROWS, batch_size=4),
            settings,
            tmp_path,
            world=World(),
        )


def test_divergence_stops_before_the_next_checkpoint(tmp_path: Path) -> None:
    settings = make_settings(max_steps=20, log_every=100)
    learner = make_learner(settings)
    learner.examples.latents.mean[...] = np.float16(np.inf)
    with pytest.raises(ValueError, match=r"diverged by step 4: loss, grad_norm is not finite"):
        train(learner, BatchSampler(num_rows=NUM_ROWS, batch_size=4), settings, tmp_path, world=World())
    assert checkpoint_steps(tmp_path) == []


def test_observer_and_previews(tmp_path: Path) -> None:
    settings = make_settings(max_steps=10, sample_every=4)
    learner = make_learner(settings)
    seen: list = []
    weights: list = []

    def preview(path: Path) -> None:
        path.write_bytes(b"image")
        weights.append(learner.denoiser.out.bias.detach().clone())

    observer = Observer(
        on_start=lambda step: seen.append(("start", step)),
        on_metrics=lambda step, values: seen.append((step, *sorted(values))),
        on_preview=lambda step, path: seen.append((step, path.name)),
    )
    sampler = BatchSampler(num_rows=NUM_ROWS, batch_size=4)
    train(
        learner,
        sampler,
        settings,
        tmp_path,
        world=World(),
        observer=observer,
        preview=preview,
        constants={"kl": 2.0},
    )
    report = ("epoch", "grad_norm", "images_per_second", "learning_rate", "loss", "steps_per_second")
    assert seen == [
        ("start", 0), (0, "kl"), (3, *report), (4, "step-00000004.png"), (5, "val_loss"), (6, *report),
        (8, "step-00000008.png"), (9, *report), (10, *report), (10, "val_loss"), (10, "step-00000010.png"),
    ]  # fmt: skip
    assert torch.equal(weights[-1], learner.ema.tensors()["out.bias"])
    assert not torch.equal(weights[-1], learner.denoiser.out.bias)


def test_killed_at_any_moment_and_run_again_ends_bit_equal(tmp_path: Path) -> None:
    settings = make_settings(max_steps=250, checkpoint_every=7, log_every=5, validate_every=50)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = SPAWN.Process(target=run_here, args=(whole, settings))
    reference.start()
    rng = random.Random(1)
    resumed_from = []
    for _ in range(4):
        process = SPAWN.Process(target=run_here, args=(killed, settings))
        process.start()
        target = max(checkpoint_steps(killed), default=0) + rng.randrange(1, 60)
        while process.is_alive() and max(checkpoint_steps(killed), default=0) < target:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # anywhere in a step, a checkpoint or a report
        process.kill()
        process.join()
        resumed_from.append(max(checkpoint_steps(killed), default=0))
    process = SPAWN.Process(target=run_here, args=(killed, settings))
    process.start()
    process.join()
    reference.join()
    assert (process.exitcode, reference.exitcode) == (0, 0)
    assert resumed_from == sorted(set(resumed_from)) and 0 < resumed_from[-1] < 250
    _assert_bit_equal(whole, killed, 250)
    steps = [line["step"] for line in read_metrics(killed) if "loss" in line]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_equal_one_process(tmp_path: Path, accumulation: int) -> None:
    settings = make_settings(max_steps=6, batch_size=8, gradient_accumulation_steps=accumulation, log_every=1)
    alone, together = tmp_path / "alone", tmp_path / "together"
    run_here(alone, settings)
    processes = [
        SPAWN.Process(target=run_rank, args=(together, settings, rank, 2, tmp_path / "rendezvous"))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one = [line for line in read_metrics(alone) if "loss" in line]
    two = [line for line in read_metrics(together) if "loss" in line]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    a, b = _state(alone, 6), _state(together, 6)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)
