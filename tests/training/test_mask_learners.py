"""The mask models' learners: exact resume, what the losses do, and that they learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_rows import CLASSES, SIDE, lesions, rows, settings, tiny_ddpm, tiny_gan

from factory.generators.mask_curvature import curvature
from factory.generators.mask_gan import MaskGAN
from factory.training.checkpoints import read_checkpoint
from factory.training.loop import TrainingResult, train
from factory.training.mask_batches import as_judged, lesions_of
from factory.training.mask_learners import MaskDDPMLearner, MaskGANLearner, curvature_distance
from factory.training.metrics import read_metrics
from factory.training.mixture import BatchSampler, global_batch
from factory.training.settings import TrainingSettings
from factory.training.world import World

COUNT = 24


def gan_learner(model: MaskGAN | None = None, run: TrainingSettings | None = None) -> MaskGANLearner:
    model = model or tiny_gan()
    torch.manual_seed(0)
    return MaskGANLearner(
        model=model,
        lesions=lesions(COUNT),
        held_out=lesions(16, seed=1),
        settings=run or settings(),
        world=World(),
        networks=model.networks(2),
    )


def ddpm_learner(run: TrainingSettings | None = None) -> MaskDDPMLearner:
    model = tiny_ddpm()
    torch.manual_seed(0)
    small = lesions_of(rows(COUNT, side=16), CLASSES)
    return MaskDDPMLearner(
        denoiser=model.network(2), lesions=small, held_out=small, settings=run or settings(), world=World()
    )


def run_to(learner: Any, out: Path, max_steps: int, **changes: Any) -> TrainingResult:
    run = settings(**{"max_steps": max_steps, **changes})
    learner.settings = run
    return train(learner, BatchSampler(num_rows=COUNT, batch_size=run.batch_size), run, out, world=World())


@pytest.mark.parametrize("make", [gan_learner, ddpm_learner])
def test_interrupted_and_extended_runs_end_bit_equal(make: Any, tmp_path: Path) -> None:
    run_to(make(), tmp_path / "whole", 5)
    run_to(make(), tmp_path / "parts", 3)
    assert run_to(make(), tmp_path / "parts", 5).start_step == 3
    whole, parts = (read_checkpoint(tmp_path / name, 5)[0] for name in ("whole", "parts"))
    for kind in ("trainable", "ema"):
        assert whole[kind].keys() == parts[kind].keys() and len(whole[kind]) > 10
        assert [
            name for name, value in whole[kind].items() if not torch.equal(value, parts[kind][name])
        ] == []
    curves = [
        [(m["step"], m["loss"]) for m in read_metrics(tmp_path / name) if "loss" in m]
        for name in ("whole", "parts")
    ]
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [1, 2, 3, 4, 5]


def test_a_draw_is_a_function_of_step_and_place() -> None:
    learner = gan_learner()
    sampler = BatchSampler(num_rows=COUNT, batch_size=8)
    whole = learner.draw(global_batch(sampler, 3))
    halves = [learner.draw(part) for part in global_batch(sampler, 3).split(2)]
    for name in ("masks", "boxes", "noise", "curvatures"):
        joined = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(getattr(whole, name), joined), name
    assert not torch.equal(whole.noise, learner.draw(global_batch(sampler, 4)).noise)
    for mask, box in zip(whole.masks[:, 0], whole.boxes.tolist()):  # mirrored together
        ys, xs = torch.nonzero(mask, as_tuple=True)
        assert box == [ys.min(), xs.min(), ys.max() + 1, xs.max() + 1]
    known = lesions(COUNT).curvatures(learner.model)
    for target, label in zip(whole.curvatures, whole.labels.tolist()):
        assert known[label][0] <= target + 1e-6 and target - 1e-6 <= known[label][-1]


def test_curvature_loss_is_zero_at_the_target_only() -> None:
    model = tiny_gan(sharpness=None)
    real = lesions(8)
    found = curvature(as_judged(torch.from_numpy(real.masks).float(), model))
    labels = torch.from_numpy(real.labels)
    for pairing in ("rank", "item"):
        assert curvature_distance(found, found, labels, pairing) == 0
        assert curvature_distance(found, found + 0.5, labels, pairing) == pytest.approx(0.5)
    # Another order of the same values within a class is the same distribution, but not the same items.
    swapped = found[[2, 3, 0, 1, 6, 7, 4, 5]]
    assert curvature_distance(found, swapped, labels, "rank") == 0
    assert curvature_distance(found, swapped, labels, "item") > 0


def test_rank_pairing_keeps_the_spread_that_item_pairing_loses() -> None:
    """Free values fitted to targets that are drawn anew: the distribution, or its median everywhere."""
    rng = np.random.default_rng(0)
    spreads = {}
    for pairing in ("rank", "item"):
        values = torch.linspace(-0.1, 0.1, 32).requires_grad_(True)
        optimizer = torch.optim.Adam([values], lr=0.02)
        for _ in range(500):
            targets = torch.from_numpy(rng.normal(size=32).astype(np.float32))
            optimizer.zero_grad()
            curvature_distance(values, targets, torch.zeros(32, dtype=torch.int64), pairing).backward()
            optimizer.step()
        spreads[pairing] = values.std().item()
    assert spreads["rank"] > 0.8 and spreads["item"] < 0.4


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, {"loss_adversarial", "loss_curvature"}, {"loss_class", "loss_classifier"}),
        ({"class_term": "acgan"}, {"loss_class", "loss_classifier"}, set()),
        ({"class_term": "paper", "box_weight": 0.0}, {"loss_classifier", "box_iou"}, {"loss_class"}),
        ({"curvature_weight": 0.0}, {"loss_adversarial"}, {"loss_curvature"}),
        ({"operator": "sobel", "sharpness": None, "curvature_pairing": "item"}, {"loss_curvature"}, set()),
    ],
)
def test_each_form_of_the_losses_takes_a_step(
    changes: dict[str, Any], present: set[str], absent: set[str]
) -> None:
    learner = gan_learner(tiny_gan(**changes))
    before = {name: value.detach().clone() for name, value in learner.parameters.items()}
    values = learner.step(learner.draw(global_batch(BatchSampler(num_rows=COUNT, batch_size=8), 0)))
    assert present <= set(values) and not absent & set(values)
    assert all(torch.isfinite(value) for value in values.values())
    moved = {
        name.split(".")[0]
        for name, value in learner.parameters.items()
        if not torch.equal(value, before[name])
    }
    assert moved == {"generator", "discriminator"}


def test_the_generator_gets_a_class_term_except_in_the_paper_form() -> None:
    """Eq. 15 has none: with it left out, the loss is adversarial, curvature and box alone."""
    for class_term, has_term in (("acgan", True), ("paper", False)):
        learner = gan_learner(tiny_gan(class_term=class_term))
        values = learner.step(learner.draw(global_batch(BatchSampler(num_rows=COUNT, batch_size=8), 0)))
        rest = values["loss_adversarial"] + values["loss_curvature"] + 1 - values["box_iou"]
        assert (values["loss"] - rest).abs().item() < 1e-5 or has_term
        assert (values["loss"] - rest).item() > 0.3 or not has_term


@pytest.mark.slow
def test_the_gan_learns_boxes_and_the_order_of_the_classes(tmp_path: Path) -> None:
    learner = gan_learner()
    changes = {"batch_size": 12, "validate_every": 250, "checkpoint_every": 250, "log_every": 250}
    result = run_to(learner, tmp_path, 250, **changes)
    assert result.metrics["val_box_iou"] > 0.8
    assert result.metrics["val_ripple"] < 0.1
    assert result.metrics["val_curvature_malignant"] > 1.25 * result.metrics["val_curvature_benign"]


def test_the_ddpm_learns(tmp_path: Path) -> None:
    run_to(
        ddpm_learner(), tmp_path, 40, validate_every=20, log_every=20, checkpoint_every=40, learning_rate=3e-3
    )
    first, last = (line["val_loss"] for line in read_metrics(tmp_path) if "val_loss" in line)
    assert last < 0.8 * first


def test_lesions_are_largest_components_without_holes() -> None:
    real = rows(4)
    assert real[0].mask is not None
    real[0].mask[0:2, 0:2] = 1
    real[0].mask[16, 16] = 0
    found = lesions_of(real, CLASSES)
    assert (
        len(found.masks) == 4
        and found.masks.shape[1:] == (SIDE, SIDE)
        and found.labels.tolist() == [0, 1, 0, 1]
    )
    assert found.masks[0, 0, 0] == 0 and found.masks[0, 16, 16] == 1
    assert set(np.unique(found.masks)) == {0, 1}


def test_previews_show_held_out_and_drawn() -> None:
    for learner in (gan_learner(), ddpm_learner()):
        real, drawn = learner.previews(3)
        assert real.shape == drawn.shape and len(real) == 3 and real.dtype == drawn.dtype == np.uint8
        assert set(np.unique(real)) == {0, 255}
