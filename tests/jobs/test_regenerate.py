"""`factory synthesize --segmenter --regenerate`: rejected requests are asked again in rounds, counted, and never twice."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from factory.predictors.augmentation import Augmentation
from factory.predictors.segmenters import Segmenter
from factory.predictors.settings import FitSettings
from factory.recipes import RECIPES
from factory.storage import open_table
from factory.training.parts import PartTask, identity_of_run, train_run
from factory.training.segmenter_stage import SegmenterStage
from factory.training.world import World
from jobs.status import Args as StatusArgs
from jobs.status import lines
from jobs.status import run as status
from jobs.synthesis_plan import Args
from jobs.synthesize import run
from schemas.sample import RejectReason

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory, real_table: str) -> str:
    """A segmenter that has hardly been trained: here it only has to judge, and to be the same for all."""
    out = tmp_path_factory.mktemp("segmenter")
    stage = SegmenterStage(
        predictor=Segmenter(architecture="unet", width=2),
        fit=FitSettings(num_steps=2, batch_size=4, validate_every=2, augmentation=Augmentation(kind="none")),
        num_folds=2,
        size=32,
    )
    task = PartTask(
        part="segmenter",
        recipe="tiny",
        component=stage,
        generator=RECIPES["tiny"]().generator,
        real=real_table,
        real_version=open_table(real_table).version,
        out=out,
    )
    train_run(task, identity_of_run(task), World())
    return str(out)


def args_of(folder: Path, real_table: str, generator_folder: Path, segmenter: str) -> Args:
    return Args(
        recipe="tiny",
        generator=str(generator_folder),
        real=real_table,
        out=str(folder / "synthetic.lance"),
        labels="benign=2,malignant=1",
        batch_size=4,
        segmenter=segmenter,
        min_dice=1.0,  # no image reaches it, so every attempt is rejected
        regenerate=2,
        regenerate_reasons=",".join(RejectReason),
        overrides=("--sampling.num-inference-steps", "2"),
    )


@pytest.mark.soak
def test_every_rejected_request_is_tried_k_times_more_and_the_sum_is_right(
    tmp_path: Path, real_table: str, generator_folder: Path, segmenter: str
) -> None:
    args = args_of(tmp_path, real_table, generator_folder, segmenter)
    first = run(args)
    assert first is not None
    assert (first.first_attempts, first.requested, first.committed, first.made) == (3, 9, 9, 9)
    assert first.accepted == first.pending == 0
    assert (
        "6 further attempts of 3 rejected requests, 0 of them accepted in the end, 3 given up"
        in first.regeneration
    )
    table = open_table(args.out)
    rows = table.read(["request_id", "attempt", "scores", "stream_reject_reason"]).to_pylist()
    assert len({row["request_id"] for row in rows}) == 9
    assert Counter(row["attempt"] for row in rows) == {0: 3, 1: 3, 2: 3}
    assert all({"mask_dice", "mask_fidelity"} <= dict(row["scores"]).keys() for row in rows)
    gate = json.loads(table.metadata[f"gate.{first.plan_id}"])
    assert gate["architecture"] == "unet" and gate["min_dice"] == 1.0

    again = run(args)
    assert again is not None and again.made == 0 and again.requested == first.requested, (
        "nothing is made twice"
    )
    ((record, found),) = status(StatusArgs(table=args.out))
    assert found.reconciliation.complete and found.reconciliation.requested == first.requested
    assert any("100% done" in line for line in lines(record, found))

    with pytest.raises(ValueError, match="are judged by a segmenter"):
        run(dataclasses.replace(args, segmenter=None, min_dice=None))


def test_bad_rules_are_refused_before_anything_is_written(
    tmp_path: Path, real_table: str, generator_folder: Path, segmenter: str
) -> None:
    args = args_of(tmp_path, real_table, generator_folder, segmenter)
    for changes, message in (
        ({"regenerate_reasons": "ugly"}, "--regenerate-reasons: 'ugly' is none of"),
        ({"regenerate": -1}, "regenerate: want 1"),
        ({"segmenter": None}, "--min-dice: goes with --segmenter"),
        ({"segmenter": str(tmp_path)}, "factory train --part segmenter"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(dataclasses.replace(args, **changes))
    assert not Path(args.out).exists()
