from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import pictures

from factory.evaluation.arms import Arm
from factory.evaluation.comparison import compare
from factory.evaluation.downstream import ArmRun, RunFunction, plan_runs, run_arms
from factory.evaluation.scores import Scores
from factory.predictors.augmentation import Augmentation
from factory.predictors.classifiers import Classifier
from factory.predictors.examples import concatenate
from factory.predictors.segmenters import Segmenter
from factory.predictors.settings import FitSettings

torch.set_num_threads(1)  # layers this small are slower on several
ARMS = (
    Arm(kind="real"),
    Arm(kind="synthetic", ratio=4),
    Arm(kind="shuffled_labels", ratio=4),
    Arm(kind="oracle", ratio=4),
)
SETTINGS = FitSettings(
    num_steps=40,
    learning_rate=5e-3,
    validate_every=20,
    warmup_steps=2,
    augmentation=Augmentation(kind="none"),
)
PREDICTOR = Classifier(architecture="small_cnn?width=8")
ROWS: dict[str, Any] = {
    "real": pictures("train", (8, 8), 0),
    "reserve": pictures("reserve", (32, 32), 1),
    "synthetic": {0: pictures("generated", (32, 32), 2, is_real=False)},
    "evaluation": pictures("test", (40, 40), 3, native=True),
    "validation": pictures("val", (12, 12), 4),
}


def _run(out: Path, arms: Sequence[Arm] = ARMS, **changes: Any) -> Scores:
    values = {**ROWS, "predictor": PREDICTOR, "settings": SETTINGS, "task_seeds": (0, 1), **changes}
    return run_arms(arms, out=out, **values)


class Counting:
    """A map that counts what it was asked to train, and may stop as if it were killed."""

    def __init__(self, stop_after: int = 10**6) -> None:
        self.names: list[str] = []
        self._stop_after = stop_after

    def __call__(self, function: RunFunction, runs: Sequence[ArmRun]) -> Iterable[dict[str, Any]]:
        for run in reversed(runs):  # any order will do
            if len(self.names) == self._stop_after:
                raise KeyboardInterrupt
            self.names.append(run.arm.name)
            yield function(run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scores]:
    """All arms, interrupted after three trainings and then gone on with."""
    out = tmp_path_factory.mktemp("arms")
    with pytest.raises(KeyboardInterrupt):
        _run(out, executor=Counting(stop_after=3))
    again = Counting()
    scores = _run(out, executor=again)
    assert len(again.names) == 5
    return out, scores


def test_finished_trainings_are_read_back_and_changed_ones_made_again(finished: tuple[Path, Scores]) -> None:
    out, scores = finished
    nothing = Counting()
    same = _run(out, executor=nothing)
    assert nothing.names == []
    for key, value in scores.values.items():
        assert np.array_equal(same.values[key], value)
    reserve = Counting()
    _run(out, executor=reserve, reserve=pictures("reserve", (33, 33), 9))
    assert reserve.names == ["oracle 4×", "oracle 4×"]


def test_a_good_generator_gains_and_wrong_labels_do_not(finished: tuple[Path, Scores]) -> None:
    table = compare(finished[1], primary="synthetic 4×", num_resamples=300)
    found = {arm.name: arm for arm in table.arms}
    assert found["synthetic 4×"].difference is not None and found["synthetic 4×"].difference.low > 0
    assert found["synthetic 4×"].adjusted_p is not None and found["synthetic 4×"].adjusted_p < 0.05
    assert found["shuffled_labels 4×"].value.value < found["synthetic 4×"].value.value - 0.1
    assert table.is_pilot and found["synthetic 4×"].oracle_fraction is not None


@pytest.mark.parametrize("leak", ["evaluation", "validation"])
def test_a_planted_leak_is_refused_before_any_training(tmp_path: Path, leak: str) -> None:
    part = ROWS[leak]
    never = Counting(stop_after=0)
    with pytest.raises(ValueError, match=f"leak: .* of {leak}"):
        _run(
            tmp_path, executor=never, real=concatenate(ROWS["real"], replace(part.take([0, 1]), native=None))
        )
    stolen = replace(part.take(range(32)), native=None, is_real=np.zeros(24 if leak == "validation" else 32, bool)) \
        if leak == "evaluation" else None  # fmt: skip
    if stolen is not None:
        hidden = replace(
            stolen, ids=tuple(f"g-{i}" for i in range(32)), groups=tuple(f"g-{i}" for i in range(32))
        )
        generated = {0: concatenate(hidden, ROWS["synthetic"][0])}
        with pytest.raises(ValueError, match="share their pixels"):
            _run(tmp_path, executor=never, synthetic=generated)
    with pytest.raises(ValueError, match="is in validation and in evaluation"):
        _run(
            tmp_path, executor=never, validation=concatenate(ROWS["validation"], ROWS["evaluation"].take([0]))
        )


def test_arms_that_cannot_run_are_refused_before_any_training(tmp_path: Path) -> None:
    never = Counting(stop_after=0)
    for changes, message in (
        ({"reserve": None}, "needs reserve rows"),
        ({"synthetic": {}}, "there are no synthetic rows"),
        ({"arms": (ARMS[0], ARMS[0])}, "each name once"),
        ({"task_seeds": ()}, "task_seeds"),
        ({"predictor": Classifier(architecture="no_such_network")}, "no_such_network"),
        ({"arms": (Arm(kind="synthetic", ratio=9),)}, r"wants 72 row\(s\)"),
    ):
        with pytest.raises(ValueError, match=message):
            _run(tmp_path, executor=never, **changes)
    assert len(plan_runs(ARMS, (0, 1, 2), (0, 1))) == 2 + 6 + 6 + 2


def test_segmentation_is_scored_at_native_size(tmp_path: Path) -> None:
    from factory.imaging import Letterbox
    from factory.predictors.examples import NativeTruth

    rows = pictures("test", (3, 3), 3, native=True)
    assert rows.native is not None
    empty = NativeTruth(letterbox=Letterbox(height=24, width=24, size=24), mask=np.zeros((24, 24), np.uint8))
    # At twice the size, the predictor sees what it saw, and the truth is native.
    large = NativeTruth(
        letterbox=Letterbox(height=48, width=48, size=24),
        mask=np.kron(rows.native[1].mask, np.ones((2, 2), np.uint8)), pixel_spacing=0.5,
    )  # fmt: skip
    truths = (empty, large, *rows.native[2:])

    def widened(part: Any) -> Any:
        return replace(part, images=np.pad(part.images, ((0, 0), (4, 4), (4, 4), (0, 0))),
                       masks=np.pad(part.masks, ((0, 0), (4, 4), (4, 4))), native=None)  # fmt: skip

    scores = run_arms(
        (Arm(kind="real"),), widened(ROWS["real"]), None, {},
        replace(widened(rows), native=tuple(
            replace(t, letterbox=Letterbox(height=t.letterbox.height, width=t.letterbox.width, size=32)) for t in truths
        )), Segmenter(width=8), replace(SETTINGS, num_steps=4, validate_every=2), (0,), out=tmp_path,
    )  # fmt: skip
    values = scores.values["real", None, 0]
    assert values.shape == (6, 4) and np.isnan(values[0, :3]).all() and values[0, 3] in (0.0, 1.0)
    assert (values[1:, 0] >= 0).all() and (values[1:, 0] <= 1).all() and np.isnan(values[1:, 3]).all()
    assert values[1, 2] <= np.hypot(24, 24) + 1e-9  # mm: half of the 48 px


def test_an_arm_without_method_asks_what_it_asked_before_there_were_methods() -> None:
    # Golden: a table that was opened for such arms must know the same comparison again.
    from factory.evaluation.downstream import run_fingerprint

    content = {"real": "a", "evaluation": "b", "synthetic 0": "c"}
    found = {
        method: run_fingerprint(
            ArmRun(arm=Arm(kind="synthetic", ratio=2.0, method=method), generator_seed=0, task_seed=1),  # type: ignore[arg-type]
            Classifier(architecture="small_cnn"),
            FitSettings(),
            content,
        )
        for method in (None, "cross_entropy", "resampling")
    }
    assert found[None] == "6bb4379c5aed4ee0d060d1d6f7510d65" and len(set(found.values())) == 3
