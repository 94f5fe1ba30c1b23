"""Every method at tiny width, from the real table to rows read back: trained, sampled, annotated, filtered, stored."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory.imaging import decode_png
from factory.recipes import RECIPES
from factory.storage import create_table, open_table, real_rows, write_table
from factory.synthesis.stages import ACCOUNTS, FinishStage, SynthesisStage
from jobs import synthesis_plan
from jobs.train import Args as TrainArgs
from jobs.train import run as run_train
from schemas.sample import synthetic_schema

FEW_STEPS = ("--sampling.num-inference-steps", "4", "--training.batch-size", "2")


@pytest.fixture(scope="module")
def skin_table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve images in colour."""
    from PIL import Image

    from factory.datasets.skin_phantom import skin_sample
    from jobs.prepare import Args, run

    folder = tmp_path_factory.mktemp("skin")
    for index in range(12):
        sample = skin_sample(96, 0, index)
        for kind, pixels in (("images", sample.image), ("masks", sample.mask * 255)):
            place = folder / "data" / kind / sample.label_name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{index}.png")
    run(Args(layout="folder", path=str(folder / "data"), out=str(folder / "skin.lance")))
    return str(folder / "skin.lance")


def train(
    recipe: str, real: str, out: Path, *overrides: str, part: str = "generator", steps: int = 2
) -> Path:
    run_train(
        TrainArgs(recipe=recipe, part=part, real=real, out=str(out), max_steps=steps, overrides=overrides)
    )
    return out


def synthesize(
    recipe: str, real: str, generator: Path, out: Path, *overrides: str, labels: str | None = None
) -> list[dict[str, Any]]:
    """What the stream does, in one plain process; the rows as they are read back."""
    args = synthesis_plan.Args(
        recipe=recipe,
        generator=str(generator),
        real=real,
        out=str(out),
        labels=labels,
        num_requests=None if labels else 4,
        batch_size=4,
        overrides=overrides,
    )
    prepared = synthesis_plan.prepare(args)
    _, synthesizer, finish = synthesis_plan.execution(args, prepared, 1.0, 0.0)
    pixels = SynthesisStage(synthesizer, prepared.plan)(prepared.request_stage(prepared.indices))
    rows = FinishStage(finish)(pixels)
    assert rows["error"].to_pylist() == [None] * rows.num_rows
    schema = synthetic_schema(prepared.embedder_spec.dim)
    create_table(str(out), schema, metadata=synthesis_plan.table_metadata(prepared))
    write_table(f"{out}.copy", rows.drop_columns(list(ACCOUNTS)), schema)
    return open_table(f"{out}.copy").read().to_pylist()


def check_rows(rows: Sequence[dict[str, Any]], recipe: str, *, colour: bool = False) -> None:
    resolution = RECIPES[recipe]().generator.resolution
    shape = (resolution, resolution, 3) if colour else (resolution, resolution)
    assert len(rows) == 4 and len({row["request_id"] for row in rows}) == 4
    for row in rows:
        image = decode_png(row["image"])
        assert image.shape == shape and image.dtype == np.uint8
        assert row["recipe"] == recipe and row["fingerprint"]
    assert len({row["image"] for row in rows}) == 4


def test_sketch_ldm_makes_labelled_images_without_masks(three_class_table: str, tmp_path: Path) -> None:
    generator = train("sketch_ldm_tiny", three_class_table, tmp_path / "run", *FEW_STEPS)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "SketchPerception" in metrics and "NoisePrediction" in metrics
    assert not list((tmp_path / "run").rglob("*sketch*")), "the sketch branch is no part of the generator"
    rows = synthesize("sketch_ldm_tiny", three_class_table, generator, tmp_path / "out.lance", *FEW_STEPS)
    check_rows(rows, "sketch_ldm_tiny")
    assert all(row["mask"] is None and row["requested_mask"] is None and row["prompt"] == "" for row in rows)
    assert len({row["label_name"] for row in rows}) > 1


def test_scmg_trains_its_three_parts_and_uses_them(three_class_table: str, tmp_path: Path) -> None:
    small = ("--masks.model.training.batch-size", "4", "--vae-stage.training.batch-size", "2")
    vae = train("scmg_tiny", three_class_table, tmp_path / "vae", *small, part="vae")
    masks = train("scmg_tiny", three_class_table, tmp_path / "masks", *small, part="mask_gan", steps=30)
    given = ("--generator.vae", str(vae), "--masks.checkpoint", str(masks), *small, *FEW_STEPS)
    generator = train("scmg_tiny", three_class_table, tmp_path / "run", *given)
    # A GAN of thirty steps draws poor masks: any box will do here.
    lenient = ("--masks.min-box-iou", "0", "--masks.area-quantiles", "0", "1", "--masks.max-tries", "400")
    rows = synthesize(
        "scmg_tiny", three_class_table, generator, tmp_path / "out.lance", *given, *lenient, labels="normal=4"
    )
    check_rows(rows, "scmg_tiny")
    weights = dict(rows[0]["weights"])
    assert {"base", "vae", "controlnet", "mask_gan"} <= set(weights)
    assert all(row["mask"] == row["requested_mask"] for row in rows)


def test_didgen_reads_masks_off_the_attention_of_colour_images(skin_table: str, tmp_path: Path) -> None:
    from jobs.caption import Args as CaptionArgs
    from jobs.caption import run as run_caption

    captions = tmp_path / "captions.lance"
    run_caption(CaptionArgs(real=skin_table, out=str(captions), recipe="didgen_tiny"))
    given = ("--prompts.captions", str(captions), *FEW_STEPS)
    generator = train("didgen_tiny", skin_table, tmp_path / "run", *given)
    rows = synthesize("didgen_tiny", skin_table, generator, tmp_path / "out.lance", *given)
    check_rows(rows, "didgen_tiny", colour=True)
    for row in rows:
        assert row["prompt"].startswith("An image of <lesion> on <skin>.")
        failed = row["stream_reject_reason"] == "annotation_failed"
        assert failed == (row["mask"] is None)
        assert row["requested_mask"] is not None and row["mask"] != row["requested_mask"]
    assert "captions" in dict(rows[0]["weights"])


@pytest.mark.parametrize("recipe", ["meddiff_ft_tiny", "meddiff_inpaint_tiny"])
def test_meddiff_paints_lesions_into_real_backgrounds(
    recipe: str, three_class_table: str, tmp_path: Path
) -> None:
    given = ("masks:deformed-ellipse", *FEW_STEPS)
    generator = train(recipe, three_class_table, tmp_path / "run", *given)
    rows = synthesize(
        recipe, three_class_table, generator, tmp_path / "out.lance", *given, labels="benign=2,malignant=2"
    )
    check_rows(rows, recipe)
    real = {row["image_id"]: row for row in real_rows(three_class_table).to_pylist()}
    for row in rows:
        assert row["derived"] and row["group_id"] == real[row["background_id"]]["group_id"]
        assert real[row["background_id"]]["label_name"] == "normal" and row["split"] == "train"
        image, background = decode_png(row["image"]), decode_png(real[row["background_id"]]["image"])
        mask, requested = decode_png(row["mask"]), decode_png(row["requested_mask"])
        assert mask.any() and not (mask > requested).any()
        far = np.pad(requested, 8, mode="edge")
        near = np.max(
            [far[8 + dy : 136 + dy, 8 + dx : 136 + dx] for dy in (-6, 0, 6) for dx in (-6, 0, 6)], axis=0
        )
        if background.shape == image.shape:
            assert np.array_equal(image[near == 0], background[near == 0]), (
                "the background is the patient's, exactly"
            )
        assert not np.array_equal(image[requested > 0], background[requested > 0])


def test_meddiff_refuses_a_class_without_lesions(three_class_table: str, tmp_path: Path) -> None:
    given = ("masks:deformed-ellipse", *FEW_STEPS)
    generator = train("meddiff_ft_tiny", three_class_table, tmp_path / "run", *given)
    with pytest.raises(ValueError, match="class 'normal' has no lesion"):
        synthesize(
            "meddiff_ft_tiny", three_class_table, generator, tmp_path / "out.lance", *given, labels="normal=4"
        )


def test_masks_of_a_trained_ddpm_are_requested(three_class_table: str, tmp_path: Path) -> None:
    small = ("masks:mask-diffusion", "--masks.model.resolution", "16", "--masks.model.channels", "8", "16")
    small += (
        "--masks.model.norm-groups",
        "4",
        "--masks.model.num-inference-steps",
        "4",
        "--masks.model.layers-per-block",
        "1",
    )
    lenient = ("--masks.quantiles", "0", "1", "--masks.max-tries", "300")
    masks = train("tiny", three_class_table, tmp_path / "masks", *small, part="mask_diffusion", steps=5)
    given = (*small, *lenient, "--masks.checkpoint", str(masks), *FEW_STEPS)
    generator = train("tiny", three_class_table, tmp_path / "run", *given)
    rows = synthesize("tiny", three_class_table, generator, tmp_path / "out.lance", *given, labels="normal=4")
    check_rows(rows, "tiny")
    assert "mask_diffusion" in dict(rows[0]["weights"])


def test_an_adapter_for_another_scanner_is_stacked_at_synthesis(
    three_class_table: str, tmp_path: Path
) -> None:
    generator = train("tiny", three_class_table, tmp_path / "run", *FEW_STEPS)
    run_train(
        TrainArgs(
            recipe="tiny",
            real=three_class_table,
            out=str(tmp_path / "adapter"),
            max_steps=2,
            adapt_from=str(generator),
            lora_rank=2,
            overrides=FEW_STEPS,
        )
    )
    manifest = json.loads((tmp_path / "adapter" / "unet_lora" / "adapter_config.json").read_text())
    assert manifest["r"] == 2
    args = synthesis_plan.Args(
        recipe="tiny",
        generator=str(generator),
        real=three_class_table,
        out=str(tmp_path / "out.lance"),
        num_requests=4,
        adapters=(str(tmp_path / "adapter"),),
        overrides=FEW_STEPS,
    )
    prepared = synthesis_plan.prepare(args)
    assert "adapter_0" in prepared.plan.weights
    without = synthesis_plan.prepare(dataclasses.replace(args, adapters=()))
    assert without.plan.plan_id != prepared.plan.plan_id
