"""Masks drawn by trained models: the same for a request, in their rectangle, checked, and refused with a reason."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from factory import geometry
from factory.sources.mask_models import (
    CurvatureGAN,
    FittedCurvatureGAN,
    MaskDiffusion,
    cleaned,
    iou_of,
    resized,
    scaled_box,
)
from schemas.identity import fingerprint, random_generator
from schemas.request import SynthesisPlan, SynthesisRequest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from mask_rows import CLASSES, SIDE, rows, settings, tiny_ddpm, tiny_gan

PLAN = SynthesisPlan(
    recipe="r", fingerprint="f", weights={}, real_digest="d", labels=("benign", "malignant", "normal")
)
ROWS = rows(40, side=48)


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> CurvatureGAN:
    """A GAN after a short training: boxes are learnt first."""
    from factory.training.loop import train
    from factory.training.mask_batches import lesions_of
    from factory.training.mask_learners import MaskGANLearner
    from factory.training.mixture import BatchSampler
    from factory.training.parts import save_mask_model
    from factory.training.world import World

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("gan"), tiny_gan(curvature_weight=0.0)
    run = settings(max_steps=60, log_every=60, validate_every=0, checkpoint_every=60)
    lesions = lesions_of(rows(40), CLASSES)
    learner = MaskGANLearner(
        model=model, lesions=lesions, settings=run, world=World(), networks=model.networks(2)
    )
    train(learner, BatchSampler(num_rows=40, batch_size=8), run, folder, world=World())
    learner.finish()
    save_mask_model(folder, model, learner.network, CLASSES, {})
    return CurvatureGAN(model=model, checkpoint=str(folder), min_box_iou=0.4)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> MaskDiffusion:
    """An untrained DDPM: what it draws is arbitrary."""
    from factory.training.parts import save_mask_model

    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("ddpm"), tiny_ddpm()
    save_mask_model(folder, model, model.network(2), CLASSES, {})
    return MaskDiffusion(model=model, checkpoint=str(folder))


def draw(fitted: FittedCurvatureGAN, label: str, ordinal: int):  # type: ignore[no-untyped-def]
    request = PLAN.request(label, ordinal)
    return fitted.draw(request, random_generator(request.request_id, "mask"))


def test_a_request_fixes_its_mask(gan: CurvatureGAN) -> None:
    fitted = gan.fit(ROWS)
    first = [draw(fitted, "malignant", ordinal) for ordinal in range(4)]
    copied = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    torch.set_num_threads(2)
    again = [draw(copied, "malignant", ordinal) for ordinal in (3, 1, 2, 0)]
    assert torch.get_num_threads() == 2, "the caller's threads are left as they were"
    torch.set_num_threads(1)
    for one, other in zip(first, (again[3], again[1], again[2], again[0])):
        assert np.array_equal(one.mask, other.mask) and one.parameters == other.parameters
    assert len({one.mask.tobytes() for one in first}) == 4
    assert gan.fit(ROWS[::-1]).boxes == fitted.boxes, "the order of the table changes nothing"


def test_masks_lie_in_the_rectangle_of_a_training_lesion(gan: CurvatureGAN) -> None:
    fitted = gan.fit(ROWS)
    known = {image_id: box for label in CLASSES for image_id, box in fitted.boxes[label]}
    for label in CLASSES:
        for ordinal in range(6):
            made = draw(fitted, label, ordinal)
            parameters = made.parameters
            assert made.mask.shape == (48, 48) and set(np.unique(made.mask)) == {0, 1}
            assert ndimage.label(made.mask)[1] == 1 and np.array_equal(
                geometry.fill_holes(made.mask), made.mask
            )
            box, found = known[str(parameters["box_from"])], geometry.bounding_box(made.mask)
            asked = geometry.Box(
                **{name: int(parameters[name]) for name in ("top", "left", "bottom", "right")}
            )
            assert (
                found is not None
                and iou_of(found, asked) == pytest.approx(parameters["box_iou"])
                and parameters["box_iou"] >= 0.4
            )
            assert (asked.top, asked.bottom) == (box.top, box.bottom)
            assert asked.left in (box.left, 48 - box.right)
            assert parameters["area"] == made.mask.sum() and int(parameters["tries"]) >= 1
            low, high = fitted.bounds[label].area
            assert low - 1 <= made.mask.sum() <= high + 1


def test_classes_without_lesions_get_empty_masks(gan: CurvatureGAN, ddpm: MaskDiffusion) -> None:
    for source in (gan, ddpm):
        made = draw(source.fit(ROWS), "normal", 0)
        assert (
            not made.mask.any()
            and made.mask.shape == (48, 48)
            and made.parameters == {"mask_source": "empty"}
        )
    with pytest.raises(ValueError, match="label 'other': no training row"):
        gan.fit(ROWS).draw(
            SynthesisRequest(
                request_id="0", plan_id="0", request_index=0, label="other", label_index=3, ordinal=0
            ),
            np.random.default_rng(0),
        )


def test_what_is_never_acceptable_fails_with_its_counts(gan: CurvatureGAN, ddpm: MaskDiffusion) -> None:
    with pytest.raises(
        ValueError, match=r"curvature_gan: no acceptable mask for label 'benign' in 3 tries \(box 3\)"
    ):
        draw(replace(gan, min_box_iou=1.0, max_tries=3).fit(ROWS), "benign", 0)
    with pytest.raises(
        ValueError, match=r"mask_diffusion: no acceptable mask .* in 2 tries \((area|box|empty) "
    ):
        draw(replace(ddpm, max_tries=2).fit(ROWS), "benign", 0)


def test_the_ddpm_draws_when_its_checks_let_it(ddpm: MaskDiffusion) -> None:
    fitted = ddpm.fit(ROWS)
    wide = (0.0, 48.0 * 48.0)
    bounds = {
        name: replace(bound, area=wide, width=wide, height=wide) for name, bound in fitted.bounds.items()
    }
    lenient = replace(fitted, bounds=bounds)
    made = [draw(lenient, label, 0) for label in CLASSES]
    assert all(item.mask.any() and item.mask.shape == (48, 48) for item in made)
    sent = draw(pickle.loads(pickle.dumps(lenient)), "benign", 0)  # noqa: S301
    assert np.array_equal(sent.mask, made[0].mask)
    assert made[0].parameters["mask_source"] == "mask_diffusion" and made[0].parameters["tries"] >= 1


def test_weights_are_identity_and_their_place_is_not(gan: CurvatureGAN, tmp_path: Path) -> None:
    import shutil

    copied = replace(gan, checkpoint=str(shutil.copytree(gan.checkpoint, tmp_path / "copy")))
    assert copied.weights() == gan.weights() and set(gan.weights()) == {"mask_gan"}
    assert fingerprint(copied) == fingerprint(gan) != fingerprint(replace(gan, flip=False))
    longer = replace(gan.model, training=replace(gan.model.training, max_steps=9))
    assert fingerprint(replace(gan, model=longer)) == fingerprint(gan), (
        "training enters by the digest of the weights"
    )
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert copied.weights() != gan.weights()


def test_missing_or_other_weights_say_what_makes_them(
    gan: CurvatureGAN, ddpm: MaskDiffusion, tmp_path: Path
) -> None:
    for source, part in ((CurvatureGAN(), "mask_gan"), (MaskDiffusion(), "mask_diffusion")):
        with pytest.raises(
            FileNotFoundError, match=f"masks.checkpoint: not set; `factory train --part {part}"
        ):
            source.weights()
        with pytest.raises(
            FileNotFoundError, match=f"no mask_model.json there; `factory train --part {part}"
        ):
            replace(source, checkpoint=str(tmp_path)).fit(ROWS)
    with pytest.raises(ValueError, match="another model: channels is 16 there and 32 here"):
        replace(gan, model=replace(gan.model, channels=32)).weights()
    with pytest.raises(ValueError, match="kind mask_diffusion, wanted mask_gan"):
        replace(gan, checkpoint=ddpm.checkpoint).weights()
    other = [replace(row, label_name="cyst") if row.label == 1 else row for row in ROWS]
    with pytest.raises(
        ValueError, match="trained on benign, malignant, but the training rows have lesions of cyst"
    ):
        gan.fit(other)


def test_resizing_keeps_the_shape() -> None:
    disc = geometry.ellipse((32, 32), x=15.5, y=15.5, a=9, b=6).astype(np.float32)
    for size in (16, 48, 128):
        mask = cleaned(resized(disc, size))
        assert mask.shape == (size, size)
        assert geometry.area(mask) / size**2 == pytest.approx(geometry.area(disc) / 32**2, rel=0.06)
    assert resized(disc, 32) is disc
    assert scaled_box(geometry.Box(top=10, left=0, bottom=11, right=48), SIDE / 48, SIDE) == geometry.Box(
        top=7, left=0, bottom=8, right=32
    )


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_does_not_make_a_staircase_part_of_the_shape(factor: int) -> None:
    for radius in (7, 8, 9, 10):
        disc = geometry.ellipse((32, 32), x=15.7, y=16.1, a=radius, b=radius).astype(np.float32)
        smooth = cleaned(resized(disc, 32 * factor))
        blocks = np.kron(disc, np.ones((factor, factor))).astype(np.uint8)
        excess, blocky = (geometry.curvature(mask) - 1 for mask in (smooth, blocks))
        assert abs(excess) < 0.3 * blocky and blocky > 0.1
        assert geometry.solidity(smooth) > geometry.solidity(blocks)


def test_cleaning_keeps_one_component_without_holes() -> None:
    soft = np.zeros((20, 20))
    soft[2:9, 2:9] = 0.9
    soft[5, 5] = 0.1
    soft[15:17, 15:17] = 0.8
    soft[12, :] = 0.4
    found = cleaned(soft)
    assert found[5, 5] == 1 and found[16, 16] == 0 and found.sum() == 49


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CurvatureGAN(min_box_iou=1.5), r"masks.min_box_iou: want 0 … 1"),
        (lambda: CurvatureGAN(area_quantiles=(0.9, 0.1)), "want quantiles 0 ≤ least < greatest ≤ 1"),
        (lambda: MaskDiffusion(max_tries=0), "masks.max_tries: want 1 or more"),
    ],
)
def test_bad_fields_are_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
