"""`factory evaluate downstream`: methods for a long tail beside each other, and tables of other datasets that judge."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_tables import CLASSES, downstream, write_real, write_synthetic

from factory.evaluation.arms import METHODS
from factory.evaluation.final_test import train_all
from factory.storage import test_accesses
from jobs.evaluate_downstream import run as run_downstream
from jobs.evaluate_inputs import read_inputs
from jobs.evaluate_opening import openings
from jobs.evaluate_plan import make_plan
from jobs.evaluate_report import read_results

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for the file: making one costs more than most tests."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def tracked_in_one_store(tracking_in_tmp: None, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@pytest.fixture(scope="module")
def long_tail(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A real table with three rows of the first class for one of the second, and a synthetic one."""
    folder = tmp_path_factory.mktemp("long_tail")
    real = write_real(folder, {"train": 24, "val": 8, "test": 24}, every=4)
    return real, write_synthetic(folder, real)


# ------------------------------------------------------------------------------------------ methods


@pytest.fixture(scope="module")
def judged(long_tail: tuple[str, str], store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with every method; made once."""
    out = tmp_path_factory.mktemp("methods")
    args = downstream(*long_tail, out, arms="class_balanced", methods="all", seeds=1, num_resamples=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        run_downstream(args)
    return out


def predictions(out: Path, place: str = "test") -> dict[str, list[dict[str, str]]]:
    """Lines of the file of predictions, by arm."""
    found: dict[str, list[dict[str, str]]] = {}
    with (out / f"predictions-{place}.csv").open() as stream:
        for line in csv.DictReader(stream):
            found.setdefault(line["arm"], []).append(line)
    return found


def test_one_run_has_every_method_on_real_rows_and_with_synthetic_ones(judged: Path) -> None:
    record = read_results(str(judged))
    methods = [method for method in METHODS if method != "cross_entropy"]
    names = [arm["name"] for arm in record["evaluations"][0]["comparison"]["arms"]]
    further = [f"{data}, {method}" for method in methods for data in ("real", "synthetic 1×")]
    assert names == ["real", "synthetic 1×", *further], "class_balanced is real, resampling"
    assert record["methods"] == {name: name.partition(", ")[2] for name in further}
    assert record["evaluations"][0]["comparison"]["primary"] == "synthetic 1×"
    assert len(openings(record["real"]["uri"])) == 1, "one opening for all methods"
    told = {
        arm: np.array([float(line["p_long"]) for line in lines]) for arm, lines in predictions(judged).items()
    }
    for data in ("real", "synthetic 1×"):
        plain, balanced = told[data], told[f"{data}, balanced_softmax"]
        # With τ = 1 both losses are cross-entropy of logits + log n, up to a constant.
        np.testing.assert_allclose(balanced, told[f"{data}, logit_adjustment"], atol=1e-3)
        for other in ("class_balanced_focal", "resampling"):
            assert np.abs(plain - told[f"{data}, {other}"]).max() > 1e-3
    gap = np.abs(told["real"] - told["real, balanced_softmax"]).max()
    assert gap > 1e-3 and told["real, balanced_softmax"].mean() > told["real"].mean(), "the tail is raised"


def test_one_run_fills_the_table_of_methods(judged: Path) -> None:
    from factory.report.paper_tables import long_tail_ablation, long_tail_methods
    from factory.report.tables import Results

    record = read_results(str(judged))
    table = long_tail_methods(Results([record]))
    auc = {arm["name"]: arm["value"]["value"] for arm in record["evaluations"][0]["comparison"]["arms"]}
    arms = {
        "Baseline (Balanced Softmax)": ", balanced_softmax", "Cross-entropy": "", "CBFocal": ", class_balanced_focal",
        "Logit-Adjust": ", logit_adjustment", "Re-sampling": ", resampling",
    }  # fmt: skip
    rows = {row[1]: row for row in table.rows}
    for method, behind in arms.items():
        for name, data in ((method, "real"), (f"{method} + synthetic", "synthetic 1×")):
            assert rows[name][-1].split("[")[0].strip("* ") == f"{auc[data + behind]:.3f}", name
            assert not any("not run" in cell for cell in (*rows[name][:-2], rows[name][-1]))
    assert all("not run" in cell for cell in rows["Cross-entropy + as many more real images"][2:-2])
    ablation = {row[1]: row for row in long_tail_ablation(Results([record])).rows}
    assert "not run" not in ablation["Re-sampling"][2] and ablation["Baseline"][2] == rows["Cross-entropy"][2]


def test_methods_change_loss_and_sampling_and_nothing_else(
    long_tail: tuple[str, str], tmp_path: Path
) -> None:
    args = downstream(*long_tail, tmp_path, arms="real", methods="all", seeds=2)
    comparison = read_inputs(make_plan(args)).comparison
    base = comparison.settings
    for run in comparison.runs():
        training = comparison.sources.training_set(run)
        own, method = training.settings(base), run.arm.method
        changed = {name for name in vars(base) if getattr(own, name) != getattr(base, name)}
        expected = {None: set(), "resampling": {"loss", "sampling"}}.get(method, {"loss"})
        assert changed == expected, method
        plain = comparison.sources.training_set(
            type(run)(
                arm=comparison.arms[0] if run.arm.kind == "real" else comparison.arms[1],
                generator_seed=run.generator_seed,
                task_seed=run.task_seed,
            )
        )
        assert training.examples.ids == plain.examples.ids
        # The prior of the losses is that of the batches, added rows included.
        counts = training.batches(own, 0).counts
        share = training.examples.counts() / len(training.examples)
        np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.5] if method == "resampling" else share)


def test_an_arm_with_a_method_is_the_model_of_a_run_with_that_loss(
    long_tail: tuple[str, str], tmp_path: Path
) -> None:
    weights = []
    for name, changes in (
        ("arm", {"methods": "balanced_softmax"}),
        ("run", {"loss": "balanced_softmax", "methods": "balanced_softmax"}),
    ):
        comparison = read_inputs(
            make_plan(downstream(*long_tail, tmp_path, arms="real", seeds=1, num_steps=3, **changes))
        ).comparison
        if name == "run":
            assert [arm.method for arm in comparison.arms] == [None, None], "every arm has it already"
        wanted = {
            run: f"{run.arm.kind}"
            for run in comparison.runs()
            if run.arm.method == ("balanced_softmax" if name == "arm" else None)
        }
        assert len(wanted) == 2
        train_all(comparison, wanted, tmp_path / name)
        weights.append(
            {kind: (tmp_path / name / kind / "tensors.safetensors").read_bytes() for kind in wanted.values()}
        )
    assert weights[0] == weights[1]


def test_methods_that_cannot_be_are_refused_before_anything_is_opened(
    long_tail: tuple[str, str], tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"a network that is never built")
    probe: dict[str, Any] = {"model": "probe:resnet18", "weights": str(weights)}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("want all, or some of cross_entropy, balanced_softmax", {"methods": "magic"}),
        ("each once", {"methods": "resampling,resampling"}),
        ("not of segmentation", {"methods": "all", "task": "segmentation", "model": "unet?width=4"}),
        ("has no other loss; leave out balanced_softmax", {"methods": "all", **probe}),
        ("has no other loss; leave out balanced_softmax", {"loss": "balanced_softmax", **probe}),
    ]  # fmt: skip
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            read_inputs(make_plan(downstream(*long_tail, tmp_path, **{"arms": "real", **changes})))
    arms = read_inputs(
        make_plan(downstream(*long_tail, tmp_path, arms="real", methods="resampling", **probe))
    ).comparison.arms
    assert [arm.method for arm in arms] == [None, None, "resampling", "resampling"]


# ------------------------------------------------------------------------------------------ other datasets


def segmentation(real: str, synthetic: str, out: Path, **changes: object) -> Any:
    options: dict[str, object] = {
        "task": "segmentation", "model": "unet?width=4", "arms": "real", "seeds": 1, "size": 32, "num_steps": 40,
        "learning_rate": 0.03,
        "num_resamples": 100,
    }  # fmt: skip
    return downstream(real, synthetic, out, **{**options, **changes})


def test_a_segmentation_is_judged_by_tables_with_other_classes_or_none(tmp_path: Path) -> None:
    real = write_real(tmp_path)
    counts = {"train": 6, "test": 10}
    names: dict[str, tuple[str, ...]] = {
        "same": CLASSES, "stu": ("lesion",), "none": (), "partly": ("strange", "long"),
    }  # fmt: skip
    tables = {
        name: write_real(tmp_path, counts, seed=7, name=name, class_names=classes, copies=[("test", 0)])
        for name, classes in names.items()
    }
    out = tmp_path / "out"
    args = segmentation(real, write_synthetic(tmp_path, real), out, external=tuple(tables.values()))
    run_downstream(args)
    parts = {part["name"]: part["comparison"] for part in read_results(str(out))["evaluations"]}
    same = parts["same.lance"]
    known = {
        "same": {"round", "long"}, "stu": {"unknown"}, "none": {"unknown"}, "partly": {"unknown", "long"},
    }  # fmt: skip
    for name, classes in known.items():
        part = parts[f"{name}.lance"]
        # The same pictures under other names: masks judge alike, whatever their classes are called.
        assert part["num_rows"] == 16, "the row that trained here did not judge"
        for arm, twin in zip(part["arms"], same["arms"], strict=True):
            assert (arm["value"], arm["other"]) == (twin["value"], twin["other"])
            found = {group["name"] for group in arm["subgroups"] if group["name"].startswith("class ")}
            assert found == {f"class {one}" for one in classes}
        lines = [line for found in predictions(out, f"{name}.lance").values() for line in found]
        assert {line["label"] for line in lines} == classes
        notes = " ".join(part["notes"])
        assert "1 row(s)" in notes and ("without class" in notes) == ("unknown" in classes)
    assert same["arms"][0]["value"]["value"] != parts["test"]["arms"][0]["value"]["value"]
    assert len(openings(tables["stu"])) == 1 and len(test_accesses(tables["stu"])) >= 1


def test_a_table_that_cannot_judge_is_refused_before_any_table_is_opened(tmp_path: Path) -> None:
    real = write_real(tmp_path)
    synthetic = write_synthetic(tmp_path, real)
    tables = {
        name: write_real(tmp_path, {"train": 4, "test": 4}, seed=7, name=name, **changes)  # type: ignore[arg-type]
        for name, changes in {
            "stu": {"class_names": ("lesion",)},
            "none": {"class_names": ()},
            "unmarked": {"with_masks": False},
        }.items()
    }
    cases = [
        (r"stu.lance: its classes lesion have none in common.*--task segmentation", downstream, "stu"),
        (r"none.lance: it has no classes.*--task segmentation", downstream, "none"),
        (r"unmarked.lance: none of its rows has a mask", segmentation, "unmarked"),
    ]
    for message, arguments, name in cases:
        with pytest.raises(ValueError, match=message):
            run_downstream(arguments(real, synthetic, tmp_path / "out", external=(tables[name],)))
    for uri in (real, *tables.values()):
        assert not openings(uri) and not test_accesses(uri)
