"""`factory train --part segmenter` and `factory score` on tables: trained on train rows alone, scores where they belong."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from segmenter_rows import CLASSES, SIZE, ellipse_rows, small_stage

from factory.curation.mask_fidelity import MASK_SCORES, MaskFidelity, load_mask_fidelity
from factory.curation.quality import DENSITY_SCORES, SHAPE_SCORES, TEXTURE_SCORES
from factory.diffusion.sampling import Sampling
from factory.embedding import EmbedderSpec, ImageEmbedder
from factory.imaging import TrainingRow, encode_png
from factory.predictors.segmenter_folder import read_record
from factory.recipes import RECIPES
from factory.storage import IndexSet, Table, open_table, write_table
from factory.synthesis.stages import PIXEL_SCHEMA, FinishSettings, FinishStage
from factory.training.parts import (
    PartTask,
    check_run,
    clear_any_run,
    finished_step_of,
    identity_of_run,
    train_run,
)
from factory.training.world import World
from jobs.fidelity import (
    acceptance_of,
    attempts_of,
    record_gate,
    record_regeneration,
    recorded_regeneration,
    rejected_later,
)
from jobs.score import Args, ScoreResult, command, run
from schemas.regeneration import Regeneration
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

DIM = 64
SPEC = EmbedderSpec(name="tiny", weights_digest="d" * 32, dim=DIM, size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
PLAN = SynthesisPlan(recipe="tiny", fingerprint="f", weights={}, real_digest="r", labels=CLASSES)
METADATA = {"class_names": json.dumps(CLASSES), "embedder": SPEC.to_json()}
NUM_TRAIN, NUM_VAL, NUM_TEST = 72, 12, 12
NUM_SYNTHETIC = 60
SHUFFLED = range(40, NUM_SYNTHETIC)
"""Synthetic rows whose image shows another lesion than the one that was asked for."""


def blocks(image: np.ndarray) -> tuple[float, ...]:
    small = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX), np.float32).ravel()
    centred = small - small.mean()
    return tuple((centred / np.linalg.norm(centred)).tolist())


def write_real(uri: Path, *, test_is_noise: bool = False) -> str:
    rng = np.random.default_rng(9)
    samples = []
    for number, row in enumerate(ellipse_rows(1, NUM_TRAIN + NUM_VAL + NUM_TEST)):
        split = "train" if number < NUM_TRAIN else "val" if number < NUM_TRAIN + NUM_VAL else "test"
        assert row.mask is not None
        image, mask = row.image, row.mask
        if test_is_noise and split == "test":
            image = rng.integers(0, 256, image.shape, np.uint8)
            mask = rng.integers(0, 2, mask.shape).astype(np.uint8)
        samples.append(
            RealSample(
                image_id=f"{number:032x}",
                dataset="ellipses",
                source_path=f"{number}.png",
                group_id=row.group_id,
                split=split,
                label=row.label,
                label_name=row.label_name,
                image=encode_png(image),
                mask=encode_png(mask),
                height=SIZE,
                width=SIZE,
                licence="none",
                allowed_use="tests",
                embedding=blocks(image),
            )
        )
    schema = real_schema(DIM)
    return write_table(str(uri), table_of(samples, schema), schema, metadata=METADATA).uri


def synthetic_rows() -> list[tuple[TrainingRow, np.ndarray]]:
    """Rows, and the mask that was asked for each of them."""
    rows = ellipse_rows(7, NUM_SYNTHETIC)
    others = ellipse_rows(8, NUM_SYNTHETIC)
    found = []
    for number, row in enumerate(rows):
        mask = others[number].mask if number in SHUFFLED else row.mask
        assert mask is not None
        found.append((row, mask))
    return found


def write_synthetic(uri: Path) -> str:
    samples = []
    for number, (row, requested) in enumerate(synthetic_rows()):
        request = PLAN.request(row.label_name, number)
        samples.append(
            SyntheticSample(
                request_id=request.request_id,
                plan_id=PLAN.plan_id,
                request_index=request.request_index,
                attempt=0,
                recipe="tiny",
                fingerprint="f",
                weights={},
                seed=0,
                label=row.label,
                label_name=row.label_name,
                prompt="",
                requested_mask=encode_png(requested),
                mask=encode_png(requested),
                image=encode_png(row.image),
                height=SIZE,
                width=SIZE,
                licence="none",
                num_inference_steps=1,
                guidance_scale=1.0,
                batch_size=1,
                embedding=blocks(row.image),
                code_version="0",
            )
        )
    schema = synthetic_schema(DIM)
    return write_table(str(uri), table_of(samples, schema), schema, metadata=METADATA).uri


def task_of(real: str, out: Path, num_steps: int = 40) -> PartTask:
    stage = dataclasses.replace(small_stage(num_steps), size=SIZE)
    return PartTask(
        part="segmenter",
        recipe="tiny",
        component=stage,
        generator=RECIPES["tiny"]().generator,
        real=real,
        real_version=open_table(real).version,
        out=out,
    )


def train(task: PartTask) -> None:
    check_run(task, 0)
    train_run(task, identity_of_run(task), World())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of so small a network would wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_real(tmp_path_factory.mktemp("real") / "real.lance")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory, real: str) -> str:
    out = tmp_path_factory.mktemp("segmenter")
    train(task_of(real, out))
    return str(out)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def tracking_in_tmp(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One store for the module: making one takes seconds."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write_synthetic(tmp_path / "synthetic.lance")


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, store: str, real: str, segmenter: str
) -> tuple[ScoreResult, Table]:
    """A table with every kind of score."""
    uri = write_synthetic(tmp_path_factory.mktemp("scored") / "synthetic.lance")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        result = run(Args(table=uri, real=real, segmenter=segmenter, num_threads=1))
    return result, open_table(uri)


def test_the_part_trains_on_train_rows_and_records_itself(real: str, segmenter: str) -> None:
    record = read_record(Path(segmenter))
    assert {row.image_id for row in record.out_of_fold} == {f"{n:032x}" for n in range(NUM_TRAIN)}
    assert {row.image_id for row in record.validation} == {
        f"{n:032x}" for n in range(NUM_TRAIN, NUM_TRAIN + NUM_VAL)
    }
    task = task_of(real, Path(segmenter))
    assert (
        finished_step_of(task) == task.settings.max_steps == 120
        and record.real == identity_of_run(task)["real"]
    )
    assert finished_step_of(task_of(real, Path(segmenter) / "elsewhere")) is None
    with pytest.raises(ValueError, match="--num-workers 2: the segmenter trains in one process"):
        check_run(task, 2)


def test_no_test_row_has_a_say(tmp_path: Path, real: str, table: str) -> None:
    """With every test image and mask replaced by noise, the segmenter, its record and all scores are the same."""
    noisy = write_real(tmp_path / "noisy.lance", test_is_noise=True)
    folders, scores = [], []
    for number, uri in enumerate((real, noisy)):
        folder = tmp_path / f"segmenter-{number}"
        train(task_of(uri, folder, num_steps=4))
        folders.append(folder)
        run(Args(table=table, real=uri, segmenter=str(folder), num_threads=1))
        columns = open_table(table).read(
            ["request_id", *DENSITY_SCORES, *SHAPE_SCORES, *TEXTURE_SCORES, *MASK_SCORES]
        )
        scores.append(columns.sort_by("request_id"))
    assert read_record(folders[0]) == read_record(folders[1])
    assert scores[0].equals(scores[1]), "nulls and numbers alike"
    clear_any_run(folders[0])
    assert {path.name for path in folders[0].iterdir()} == set()


def test_every_row_gets_its_scores_and_the_images_stay(scored: tuple[ScoreResult, Table]) -> None:
    result, after = scored
    assert result.rows == NUM_SYNTHETIC
    assert set(result.columns) == {*DENSITY_SCORES, *SHAPE_SCORES, *TEXTURE_SCORES, *MASK_SCORES}
    rows = {row["request_id"]: row for row in after.read().to_pylist()}
    for number, (row, requested) in enumerate(synthetic_rows()):
        stored = rows[PLAN.request(row.label_name, number).request_id]
        assert (stored["mask_dice"] is None) == (not requested.any())
        assert (stored["area_z"] is None) == (not requested.any()) and stored["density"] is not None
        assert (
            stored["image"] == encode_png(row.image) and stored["accepted"] if "accepted" in stored else True
        )
    covered = sum(row["covers_real"] for row in rows.values())
    assert result.coverage == covered / NUM_TRAIN and 0 < covered < NUM_TRAIN
    for kind in ("density", "shape", "texture", "mask_dice"):
        assert json.loads(after.metadata[f"scores.{kind}"])["fitted_on"]
    assert after.count("mask_dice > 0.5") == sum((row["mask_dice"] or 0) > 0.5 for row in rows.values())


def test_faithful_rows_pass_and_rows_with_other_masks_do_not(scored: tuple[ScoreResult, Table]) -> None:
    _, after = scored
    position = {
        row["request_id"]: row["mask_fidelity"]
        for row in after.read(["request_id", "mask_fidelity"]).to_pylist()
    }
    passes = {True: [], False: []}  # type: dict[bool, list[bool]]
    for number, (row, requested) in enumerate(synthetic_rows()):
        if requested.any() and row.mask is not None and row.mask.any():
            request = PLAN.request(row.label_name, number)
            passes[number in SHUFFLED].append(position[request.request_id] >= 0.05)
    assert np.mean(passes[False]) >= 0.9 and np.mean(passes[True]) < 0.4, passes


def test_what_is_scored_later_is_a_verdict_for_curation(scored: tuple[ScoreResult, Table]) -> None:
    _, after = scored
    rows = after.read(["request_id", "mask_fidelity"]).to_pylist()
    expected = {
        row["request_id"] for row in rows if row["mask_fidelity"] is not None and row["mask_fidelity"] < 0.05
    }
    assert rejected_later(after) == expected and len(expected) >= 8
    assert rejected_later(open_table(after.uri, version=1)) == set()


def test_single_kinds_can_be_asked_for_and_errors_name_what_is_missing(
    table: str, real: str, tmp_path: Path
) -> None:
    result = run(Args(table=table, real=real, kinds="shape"))
    assert list(result.columns) == list(SHAPE_SCORES) and result.coverage is None
    again = run(Args(table=table, real=real, kinds="shape"))
    assert again.spread == result.spread
    for changes, message in (
        ({"kinds": "sharpness"}, "--kinds: 'sharpness' is none of"),
        ({"kinds": "mask_dice"}, "give --segmenter FOLDER"),
        ({"segmenter": str(tmp_path / "none")}, "factory train --part segmenter"),
        ({"real": table}, "is not a table of real images"),
        ({"table": real}, "is not a synthetic table"),
        ({"k": 80}, "too few"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(dataclasses.replace(Args(table=table, real=real), **changes))


def test_the_command_prints_quantiles_and_acceptance(
    table: str, real: str, segmenter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command(
            [table, "--real", real, "--segmenter", segmenter, "--kinds", "mask_dice", "--num-threads", "1"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "obey the mask" in printed
        and "mask_dice" in printed
        and f"wrote 4 columns of {NUM_SYNTHETIC} rows" in printed
    )


# ------------------------------------------------------------------------------------------ in the stream


def finish_stage(segmenter: str) -> FinishStage:
    fidelity = load_mask_fidelity(MaskFidelity(), segmenter, CLASSES, read_record(Path(segmenter)).real)
    return FinishStage(
        FinishSettings(
            plan=PLAN,
            embedder=ImageEmbedder(),
            filters=(fidelity,),
            sampling=Sampling(num_inference_steps=1, guidance_scale=1.0),
            resolution=SIZE,
            licence="none",
            num_threads=1,
        )
    )


def test_the_stream_scores_and_rejects_as_the_job_does_later(
    segmenter: str, scored: tuple[ScoreResult, Table]
) -> None:
    later = {row["request_id"]: row for row in scored[1].read(["request_id", *MASK_SCORES]).to_pylist()}
    pixels = []
    for number, (row, requested) in enumerate(synthetic_rows()):
        request = PLAN.request(row.label_name, number)
        pixels.append(
            {
                "request_index": request.request_index,
                "request_id": request.request_id,
                "requested_mask": encode_png(requested),
                "prompt": "",
                "pixels": row.image.tobytes(),
                "mask_pixels": requested.tobytes(),
                "annotation_failed": False,
                "channel_spread": 0.0,
                "batch_size": 1,
                "seconds": 0.0,
            }
        )
    done = finish_stage(segmenter)(pa.Table.from_pylist(pixels, schema=PIXEL_SCHEMA)).to_pylist()
    rejected = 0
    for row in done:
        scores = dict(row["scores"])
        expected = later[row["request_id"]]
        for name in MASK_SCORES:
            assert (
                np.isnan(scores[name])
                if expected[name] is None
                else scores[name] == pytest.approx(expected[name])
            )
        assert (row["stream_reject_reason"] == "mask_not_obeyed") == (scores["mask_fidelity"] < 0.05)
        rejected += row["stream_reject_reason"] is not None
    assert rejected >= 8


def test_rejected_rows_are_asked_again_and_one_segmenter_judges_a_plan(
    tmp_path: Path, segmenter: str, table: str
) -> None:
    fidelity = load_mask_fidelity(MaskFidelity(), segmenter, CLASSES, read_record(Path(segmenter)).real)
    opened = open_table(table)
    assert any("made without a segmenter" in note for note in record_gate(opened, PLAN.plan_id, fidelity))
    assert record_gate(open_table(table), PLAN.plan_id, fidelity) == []
    other = dataclasses.replace(fidelity, segmenter_digest="x")
    with pytest.raises(ValueError, match="were judged by another segmenter"):
        record_gate(open_table(table), PLAN.plan_id, other)

    rule = Regeneration(attempts=2)
    record_regeneration(open_table(table), PLAN.plan_id, rule)
    assert recorded_regeneration(open_table(table), PLAN.plan_id) == rule
    indices = np.sort(opened.read(["request_index"])["request_index"].to_numpy())
    requested = IndexSet.of([indices])
    assert attempts_of(opened, PLAN.plan_id, requested, rule).missing.size == 0
    ids = opened.read(["request_id", "request_index"]).sort_by("request_index")
    values = pa.table(
        {
            "request_id": ids["request_id"][:3],
            "accepted": [False, False, True],
            "reject_reason": pa.array(["mask_not_obeyed", "near_copy_of_real", None]),
        }
    )
    curated = opened.write_columns(values, "request_id")
    found = attempts_of(curated, PLAN.plan_id, requested, rule)
    assert [PLAN.request_at(i).attempt for i in found.missing] == [1]
    assert found.missing[0] & ((1 << 48) - 1) == indices[0] and found.exhausted == 0
    assert acceptance_of(curated, PLAN.plan_id) == [], "these rows were made without a segmenter"
