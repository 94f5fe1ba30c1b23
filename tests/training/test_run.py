"""Whole runs with the real classes at tiny width: what is trained, saved, loaded and refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_table import LABELS, RESOLUTION, make_rows, make_task, write_base, write_real
from safetensors.torch import load_file

from factory.generators.conditioning import TextOnly
from factory.generators.latent_diffusion import Trainable
from factory.training.checkpoints import checkpoint_steps, read_checkpoint
from factory.training.metrics import read_metrics
from factory.training.run import train_generator
from factory.training.run_identity import check_identity
from factory.training.task import (
    TrainingTask,
    adapted,
    check_task,
    finished_step,
    identity_of,
    load_rows,
)
from factory.training.world import World


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_real(tmp_path_factory.mktemp("data") / "real.lance", make_rows())


def _train(task: TrainingTask) -> Any:
    torch.set_num_threads(1)
    check_task(task, 0)
    identity = identity_of(task)
    check_identity(task.out, identity)
    return train_generator(task, identity, World())


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    names = sorted(folder.glob("*/*.safetensors"))
    return {f"{p.parent.name}.{name}": value for p in names for name, value in load_file(p).items()}


def test_a_run_leaves_a_generator_that_loads_and_a_curve(
    tmp_path: Path, random_base: Path, real: str
) -> None:
    task = make_task(random_base, real, tmp_path / "out")
    result = _train(task)
    assert (result.start_step, result.steps, finished_step(task)) == (0, 4, 4)
    assert {p.name for p in task.out.iterdir()} == {
        "checkpoints", "controlnet", "generator.json", "metrics.jsonl", "samples", "training.json", "unet_lora",
    }  # fmt: skip
    manifest = json.loads((task.out / "generator.json").read_text())
    assert manifest["recipe"]["name"] == "tiny" and manifest["recipe"]["labels"] == list(LABELS)
    assert manifest["recipe"]["steps"] == 4 and manifest["recipe"]["real"] == identity_of(task)["real"]
    lines = read_metrics(task.out)
    assert set(lines[0]) == {"step", "latent_kl", "latent_kl_per_number"} and lines[0]["latent_kl"] > 0
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4]
    with Image.open(task.out / "samples" / "step-00000004.png") as grid:
        assert grid.size == (4 * RESOLUTION + 3 * 2, 3 * RESOLUTION)
    # What is saved are the averaged weights, and a fresh process finds exactly them.
    loaded = task.generator.load(task.out)
    averages = read_checkpoint(task.out, 4)[0]["ema"]
    assert set(loaded.named_trainable_parameters()) == set(averages)
    for name, value in loaded.named_trainable_parameters().items():
        assert torch.equal(value, averages[name]), name
    assert set(task.generator.weights(task.out)) == {"base", "unet_lora", "controlnet"}


def test_interrupted_and_extended_runs_end_bit_equal(tmp_path: Path, random_base: Path, real: str) -> None:
    whole = make_task(random_base, real, tmp_path / "whole", max_steps=5)
    parts = make_task(random_base, real, tmp_path / "parts", max_steps=3)
    _train(whole)
    _train(parts)
    extended = replace(parts, settings=replace(parts.settings, max_steps=5))
    assert _train(extended).start_step == 3
    a, b = _weights(whole.out), _weights(parts.out)
    assert a.keys() == b.keys() and len(a) > 50
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    ("trainable", "prefixes"),
    [
        (Trainable(unet="lora", controlnet=True, lora_rank=2), ("unet_lora", "controlnet")),
        (Trainable(unet="lora", controlnet=False, lora_rank=2), ("unet_lora",)),
        (Trainable(unet="frozen", controlnet=True), ("controlnet",)),
        (Trainable(unet="full", controlnet=True), ("unet", "controlnet")),
    ],
    ids=["lora+controlnet", "lora", "frozen unet", "full"],
)
def test_only_the_trainable_part_is_trained(
    tmp_path: Path, random_base: Path, real: str, trainable: Trainable, prefixes: tuple[str, ...]
) -> None:
    task = make_task(random_base, real, tmp_path / "out", trainable=trainable, max_steps=2, sample_every=0)
    if not trainable.controlnet:
        task = replace(task, generator=replace(task.generator, conditioning=TextOnly()))
    _train(task)
    assert {p.name for p in task.out.iterdir()} & {"unet", "unet_lora", "controlnet"} == set(prefixes)
    names = set(read_checkpoint(task.out, 2)[0]["trainable"])
    is_lora = [name for name in names if "lora_" in name]
    is_controlnet = [name for name in names if name.startswith("controlnet.")]
    rest = names - set(is_lora) - set(is_controlnet)
    assert (bool(is_lora), bool(is_controlnet), bool(rest)) == tuple(
        part in prefixes for part in ("unet_lora", "controlnet", "unet")
    )
    base, trained = task.generator.load(), task.generator.load(task.out)
    before, after = base.denoiser().state_dict(), trained.denoiser().state_dict()
    frozen = [name for name in before if name not in names]
    assert [name for name in frozen if not torch.equal(before[name], after[name])] == []


def test_adapting_to_another_domain_trains_and_saves_an_adapter(
    tmp_path: Path, random_base: Path, real: str
) -> None:
    first = make_task(random_base, real, tmp_path / "first", max_steps=2, sample_every=0)
    _train(first)
    other = write_real(tmp_path / "other.lance", make_rows(seed=7))
    task = replace(
        make_task(random_base, other, tmp_path / "adapter", max_steps=2),
        generator=adapted(first.generator, 3),
        adapt_from=first.out,
    )
    _train(task)
    assert {p.name for p in task.out.iterdir()} & {"unet", "unet_lora", "controlnet"} == {"unet_lora"}
    weights = first.generator.weights(first.out, (task.out,))
    assert "adapter_0" in weights
    loaded = first.generator.load(first.out, adapters=(task.out,))
    plain = first.generator.load(first.out)
    inputs = (torch.randn(1, *loaded.latent_shape), torch.tensor([500]), loaded.null_prompt())
    cond = loaded.condition(np.ones((1, RESOLUTION, RESOLUTION), np.uint8))
    with torch.no_grad():
        difference = (loaded.denoiser()(*inputs, cond) - plain.denoiser()(*inputs, cond)).abs().max()
    assert difference > 1e-6
    assert identity_of(task)["adapt_from"].keys() == {"unet_lora", "controlnet"}


def test_training_learns_the_latents(tmp_path: Path, random_base: Path, real: str) -> None:
    task = make_task(
        random_base, real, tmp_path / "out", trainable=Trainable(unet="full"), max_steps=50, batch_size=8,
        validate_every=25, sample_every=0, checkpoint_every=50, learning_rate=3e-3, log_every=25, ema_decay=0.8,
    )  # fmt: skip
    _train(task)
    first, last = (line["val_loss"] for line in read_metrics(task.out) if "val_loss" in line)
    assert last < 0.9 * first < 0.9


def test_velocity_base_trains(tmp_path: Path, real: str) -> None:
    base = write_base(tmp_path / "base", "v_prediction")
    _train(make_task(base, real, tmp_path / "out", max_steps=1, sample_every=0, horizontal_flip=True))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, random_base: Path, real: str) -> None:
    curves = []
    for name, checkpointing in (("plain", False), ("lean", True)):
        task = make_task(
            random_base,
            real,
            tmp_path / name,
            max_steps=2,
            sample_every=0,
            gradient_checkpointing=checkpointing,
        )
        _train(task)
        curves.append([line["loss"] for line in read_metrics(task.out) if "loss" in line])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_killed_between_last_checkpoint_and_saving(tmp_path: Path, random_base: Path, real: str) -> None:
    task = make_task(random_base, real, tmp_path / "out", max_steps=2)
    _train(task)
    expected = _weights(task.out)
    (task.out / "generator.json").unlink()
    assert finished_step(task) is None
    result = _train(task)
    assert (result.start_step, result.steps, finished_step(task)) == (2, 2, 2)
    assert checkpoint_steps(task.out) == [2]
    after = _weights(task.out)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_another_identity_is_refused(tmp_path: Path, random_base: Path, real: str) -> None:
    task = make_task(random_base, real, tmp_path / "out", max_steps=1, sample_every=0)
    _train(task)
    faster = replace(task.settings, gradient_accumulation_steps=2, checkpoint_every=9, max_steps=7)
    check_identity(task.out, identity_of(replace(task, settings=faster)))
    with pytest.raises(ValueError, match=r"training.seed was 0, now 1\."):
        check_identity(task.out, identity_of(replace(task, settings=replace(task.settings, seed=1))))
    other = write_real(tmp_path / "other.lance", make_rows(seed=3))
    with pytest.raises(ValueError, match=r"identity: real was '"):
        check_identity(task.out, identity_of(replace(task, real=other)))


def _rows_without(label: int) -> list:
    return [row for row in make_rows() if row.label != label or row.split == "val"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: replace(t, real=write_real(p / "r.lance", make_rows(with_masks=False))), "14 training or validation rows have no mask"),
        (lambda t, p: replace(t, real=write_real(p / "r.lance", _rows_without(1))), "no training row of class malignant"),
        (lambda t, p: replace(t, real=write_real(p / "r.lance", make_rows(num_train=0))), "no row in split 'train'"),
        (lambda t, p: replace(t, out=Path("/proc/nothing/out")), "--out /proc/nothing/out: cannot make"),
        (lambda t, p: replace(t, settings=replace(t.settings, batch_size=5)), "batch_size: 5 is not divisible by 2 workers"),
        (lambda t, p: replace(t, adapt_from=p), "generator.json: no such file"),
        (lambda t, p: replace(t, generator=replace(t.generator, base=str(p / "nowhere"))), "nowhere: no such folder"),
        (lambda t, p: replace(t, generator=replace(t.generator, resolution=72)), "resolution: 72 px, but .* a multiple of 16"),
        (lambda t, p: replace(t, generator=replace(t.generator, base=str(write_base(p / "b", "sample")))), "predicts 'sample'"),
    ],
    ids=["no masks", "class without rows", "no rows", "out", "batch", "adapt-from", "base", "resolution", "prediction"],
)  # fmt: skip
def test_bad_input_is_refused_before_any_model_loads(
    tmp_path: Path,
    random_base: Path,
    real: str,
    change: Callable[[TrainingTask, Path], TrainingTask],
    message: str,
) -> None:
    task = change(make_task(random_base, real, tmp_path / "out"), tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_task(replace(task, real_version=1), 2)


def test_a_folder_with_other_files_is_not_written_into(tmp_path: Path, random_base: Path, real: str) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex"):
        check_task(make_task(random_base, real, tmp_path), 0)


def test_rows_come_in_one_order(tmp_path: Path, random_base: Path) -> None:
    rows = make_rows()
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    tasks = [
        make_task(random_base, write_real(tmp_path / f"{i}.lance", r), tmp_path / "out")
        for i, r in enumerate((rows, shuffled))
    ]
    one, two = ([row.image_id for row in load_rows(task, "train")] for task in tasks)
    assert one == two
    assert identity_of(tasks[0])["real"] == identity_of(tasks[1])["real"]
