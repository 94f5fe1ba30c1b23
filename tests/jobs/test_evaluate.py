"""`factory evaluate`: what is read and what is not, what is recorded, and that order and repeats change nothing."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_tables import CLASSES, downstream, write_real, write_synthetic

from factory.storage import open_table, test_accesses
from jobs import evaluate
from jobs.evaluate_downstream import run as run_downstream
from jobs.evaluate_images import Args as ImagesArgs
from jobs.evaluate_images import run as run_images
from jobs.evaluate_opening import openings
from jobs.evaluate_plan import Args, choose_arms, make_plan, parse_ratio
from jobs.evaluate_report import Args as ReportArgs
from jobs.evaluate_report import read_results
from jobs.evaluate_report import run as run_report


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for the file: making one costs more than most tests."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def tracked_in_one_store(tracking_in_tmp: None, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tables")
    real = write_real(folder)
    return real, write_synthetic(folder, real)


# ------------------------------------------------------------------------------------------ images


def images(tables: tuple[str, str], out: Path, **changes: object) -> ImagesArgs:
    return ImagesArgs(table=tables[1], real=tables[0], out=str(out), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compared(tables: tuple[str, str], store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of `evaluate images` with classes; made once."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        run_images(images(tables, folder / "out", per_class=True))
    return folder / "out"


def test_every_metric_comes_with_what_is_needed_to_read_it(compared: Path) -> None:
    record = read_results(str(compared))
    scores = {(s["metric"], s["label"]): s for s in record["scores"]}
    for name in ("fid", "kid", "cmmd", "precision", "recall", "density", "coverage"):
        for label in ("all", *CLASSES):
            score = scores[name, label]
            assert score["low"] <= score["value"] <= score["high"] or name in (
                "precision",
                "recall",
                "coverage",
            )
            assert (
                score["floor"] is not None
                and score["features"] == "tiny"
                and "24 px" in score["preprocessing"]
            )
    assert scores["fid", "all"]["num_real"] == 24 and scores["fid", "round"]["num_real"] == 12
    accepted = sum(index % 9 != 8 for index in range(60))
    assert scores["fid", "all"]["num_synthetic"] == accepted, "rejected rows are left out"
    assert "2 scales" in scores["ms_ssim", "long"]["features"]
    assert scores["lpips", "long"]["value"] is None and "no weights given" in scores["lpips", "long"]["note"]
    assert "not the published CMMD" in scores["cmmd", "all"]["note"]
    page, text = (compared / "report.html").read_text(), (compared / "report.md").read_text()
    for words in ("real vs real", "no weights given", "kid"):
        assert words in page and words in text
    assert "<script" not in page and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_images_do_not_depend_on_the_order_of_rows_and_say_a_shift(
    tables: tuple[str, str], tmp_path: Path
) -> None:
    backwards = write_synthetic(tmp_path, tables[0], backwards=True)
    options = {"num_resamples": 100}
    one = run_images(images(tables, tmp_path / "one", **options))
    two = run_images(images((tables[0], backwards), tmp_path / "two", **options))
    assert [s.as_json() for s in one.scores] == [s.as_json() for s in two.scores]
    assert not (tmp_path / "one" / "features").exists(), "stored embeddings need no image"
    bright = write_synthetic(tmp_path, tables[0], brighter=60, name="bright")
    shifted = run_images(images((tables[0], bright), tmp_path / "three", **options))
    kid = [next(s for s in found.scores if s.metric == "kid") for found in (one, shifted)]
    assert kid[1].value is not None and kid[1].floor is not None and kid[0].value is not None
    assert kid[1].value > kid[0].value and kid[1].value > kid[1].floor


def test_computed_features_are_cached_and_equal_those_in_the_table_of_the_same_embedder(
    tables: tuple[str, str], tmp_path: Path
) -> None:
    from factory.embedding import ImageEmbedder
    from factory.evaluation.features import computed_features, list_rows, read_images

    table = open_table(tables[1])
    rows = list_rows(table, "accepted", most=10)
    assert len(rows) == 10 and list(rows.ids) == sorted(rows.ids)
    embedder = ImageEmbedder().load(num_threads=1)
    done: list[int] = []
    found = computed_features(table, rows, embedder, cache=tmp_path / "cache", progress=done.append)
    np.testing.assert_allclose(found, embedder.embed(read_images(table, rows)), atol=1e-6)
    assert done == [10] and len(list((tmp_path / "cache").glob("*.npy"))) == 1
    embedder._forward = None  # type: ignore[assignment]  # nothing is computed a second time
    np.testing.assert_array_equal(found, computed_features(table, rows, embedder, cache=tmp_path / "cache"))


def test_images_that_cannot_be_compared_are_named(tables: tuple[str, str], tmp_path: Path) -> None:
    real, synthetic = tables
    with pytest.raises(ValueError, match="0 image"):
        run_images(images(tables, tmp_path, where="label_name = 'none'"))
    few = write_real(tmp_path, {"train": 6, "val": 2, "test": 2}, seed=3)
    with pytest.raises(ValueError, match="want 12 of each"):
        run_images(images((few, synthetic), tmp_path / "few"))
    derived = write_synthetic(tmp_path, real, derived_from=3, name="derived")
    with pytest.raises(ValueError, match="synthetic of 3 backgrounds"):
        run_images(images((real, derived), tmp_path / "derived"))
    with pytest.raises(ValueError, match="not a synthetic table"):
        run_images(images((real, real), tmp_path))
    with pytest.raises(ValueError, match="belong together"):
        run_images(images(tables, tmp_path, lpips_backbone="vgg.pth"))
    assert not test_accesses(few)


def test_the_autoencoder_of_a_checkpoint_keeps_the_rows_and_roughly_the_pixels(
    real_table: str, generator_folder: Path
) -> None:
    from factory.evaluation.data import read_real
    from factory.evaluation.round_trip import examples_through_autoencoder, through_autoencoder
    from jobs.evaluate_images import describe_generator, load_autoencoder

    generator = load_autoencoder(str(generator_folder), None, "cpu")
    real = read_real(real_table, ("val",), size=64, channels=1)
    passed = examples_through_autoencoder(generator, real)
    assert passed.ids == real.ids and passed.images.shape == real.images.shape and passed.masks is real.masks

    def error(one: np.ndarray, two: np.ndarray) -> float:
        return float(np.abs(one.astype(float) - two.astype(float)).mean())

    assert 0 < error(passed.images, real.images) < 0.7 * error(passed.images, np.roll(real.images, 1, axis=0))
    colour = np.repeat(real.images[0], 3, axis=2)
    assert through_autoencoder(generator, [colour])[0].shape == (generator.resolution,) * 2 + (3,)
    about = describe_generator(generator_folder)
    trained = sum(p.numel() for p in generator.controlnet.parameters()) if generator.controlnet else 0
    assert about["recipe"] == "tiny" and about["parameters"] >= trained > 0
    with pytest.raises(ValueError, match="none of"):
        load_autoencoder(str(generator_folder), "no_such_recipe", "cpu")


# ------------------------------------------------------------------------------------------ downstream


@pytest.fixture(scope="module")
def judged(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """A finished comparison with an external table: real, synthetic and the folder of results."""
    folder = tmp_path_factory.mktemp("downstream")
    real = write_real(folder)
    synthetic = write_synthetic(folder, real, backwards=True)
    # Two rows of the external table show what the training table shows.
    other = write_real(
        folder, {"train": 6, "test": 12}, seed=7, name="other", copies=[("test", 0), ("train", 0)]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        run_downstream(downstream(real, synthetic, folder / "out", external=(other,)))
    return real, synthetic, folder / "out"


def test_downstream_opens_the_test_split_once_and_writes_down_who_and_why(
    judged: tuple[str, str, Path],
) -> None:
    real, _, out = judged
    (opening,) = openings(real)
    assert (opening.number, opening.opened_by, opening.reason, opening.again) == (
        1,
        "a tester",
        "to see",
        False,
    )
    readings = test_accesses(real)
    assert (
        len(readings) == 1
        and "a tester" in readings[0]["opened_by"]
        and opening.comparison in readings[0]["reason"]
    )
    record = read_results(str(out))
    assert [part["name"] for part in record["evaluations"]] == ["test", "other.lance"]
    assert record["evaluations"][0]["opening"]["number"] == 1
    assert len(openings(record["evaluations"][1]["uri"])) == 1
    assert not (out / "models").exists()


def test_downstream_says_power_pilot_subgroups_and_what_to_beware_of(judged: tuple[str, str, Path]) -> None:
    _, _, out = judged
    record = read_results(str(out))
    table = record["evaluations"][0]["comparison"]
    names = [arm["name"] for arm in table["arms"]]
    assert names == [
        "real",
        "strong_augmentation",
        "shuffled_labels 1×",
        "ungated 1×",
        "oracle 1×",
        "synthetic 1×",
    ]
    assert table["is_pilot"] and table["minimum_detectable_effect"] > 0 and table["primary"] == "synthetic 1×"
    assert table["num_rows"] == 24
    groups = {group["name"] for group in table["arms"][0]["subgroups"]}
    assert {"device linear", "device convex", "size small"} <= groups
    intervals = record["evaluations"][0]["intervals"]["synthetic 1×"]
    assert intervals["macro_f1"]["low"] <= intervals["macro_f1"]["value"] <= intervals["macro_f1"]["high"]
    page = (out / "report.html").read_text()
    for words in (
        "PILOT",
        "image-group level, patients unknown",
        "memorisation",
        "smallest detectable",
        "AUC 0.62",
    ):
        assert words in page and words in (out / "report.md").read_text()
    external = record["evaluations"][1]["comparison"]
    assert any("2 row(s)" in note and "show what trained here" in note for note in external["notes"])
    assert external["num_rows"] == 18


def test_predictions_are_there_for_every_model_and_row_with_opaque_ids(judged: tuple[str, str, Path]) -> None:
    real, _, out = judged
    with (out / "predictions-test.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 24 * 2 * 6 and len({row["row"] for row in rows}) == 24
    text = (out / "predictions-test.csv").read_text()
    held = open_table(real).read(["image_id", "group_id"], "split = 'test'")
    assert not any(name in text for name in [*held["image_id"].to_pylist(), *held["group_id"].to_pylist()])
    assert all(float(row["p_round"]) + float(row["p_long"]) == pytest.approx(1, abs=1e-5) for row in rows)


def test_the_test_split_cannot_be_opened_twice(judged: tuple[str, str, Path], tmp_path: Path) -> None:
    real, synthetic, out = judged
    before = read_results(str(out))
    other = str(before["evaluations"][1]["uri"])
    again = run_downstream(downstream(real, synthetic, out, external=(other,)))
    assert len(test_accesses(real)) == 1, "the same comparison reads what it wrote"
    tables = [record["evaluations"][0]["comparison"] for record in (before, again.record)]
    assert tables[0] == tables[1]
    for changes in ({"num_steps": 11}, {"ratio": ("0.5", "1")}, {"loss": "balanced_softmax"}):
        with pytest.raises(ValueError, match="opened before, by a tester"):
            run_downstream(downstream(real, synthetic, tmp_path, **changes))
    assert len(test_accesses(real)) == 1 and len(openings(real)) == 1
    assert not (tmp_path / "models").exists(), "refused before anything is trained"
    second = run_downstream(
        downstream(
            real, synthetic, tmp_path, arms="real", num_steps=2, seeds=1, again=True, reason="a second look"
        )
    )
    assert [one.number for one in openings(real)] == [1, 2] and openings(real)[1].again
    assert second.record["evaluations"][0]["opening"]["reason"] == "a second look"
    assert "opening 2 of the test split" in (tmp_path / "report.md").read_text()


def test_a_killed_judgement_goes_on_and_results_do_not_depend_on_the_order_of_synthetic_rows(
    tmp_path: Path,
) -> None:
    from unittest.mock import patch  # to kill, not to replace: the real functions run before and after

    real = write_real(tmp_path)
    results = []
    for name, backwards in (("one", False), ("two", True)):
        synthetic = write_synthetic(tmp_path, real, name=name, backwards=backwards)
        args = downstream(
            real, synthetic, tmp_path / "out", arms="real", seeds=1, num_steps=4, num_resamples=100
        )
        if not backwards:
            with (
                patch("factory.evaluation.final_test.judge", side_effect=KeyboardInterrupt),
                pytest.raises(KeyboardInterrupt),
            ):
                run_downstream(args)
            trained = sorted(p.name for p in (tmp_path / "out" / "models").iterdir())
            assert len(trained) == 2 and len(openings(real)) == 1
        results.append(run_downstream(args))
        # The rows are the same whatever their order, so it is the same comparison and no second opening.
        assert len(openings(real)) == 1
    one, two = (r.record["evaluations"][0]["comparison"]["arms"] for r in results)
    assert one == two


def test_bad_input_is_refused_before_the_test_split_is_opened(
    tables: tuple[str, str], tmp_path: Path
) -> None:
    real, synthetic = tables
    out = tmp_path / "out"
    fewer = write_real(tmp_path, {"train": 20, "val": 8, "test": 8}, seed=2, name="fewer")
    one_class = write_synthetic(tmp_path, real, label=0, name="round")
    one_sided = write_real(tmp_path, {"train": 24, "val": 8, "test": 1}, name="one_sided")
    cases: list[tuple[str, Args]] = [
        ("made from other real rows", downstream(fewer, synthetic, out)),
        ("row\\(s\\) of class long", downstream(real, one_class, out, arms="real")),
        ("there are", downstream(real, synthetic, out, ratio=("8",))),
        ("none of", downstream(real, synthetic, out, arms="magic")),
        (
            "needs reserve rows",
            downstream(fewer, write_synthetic(tmp_path, fewer, name="s"), out, arms="oracle"),
        ),
        (
            "no row in the split",
            downstream(write_real(tmp_path, {"train": 8, "val": 4}, name="no_test"), synthetic, out),
        ),
        ("AUC needs two", downstream(one_sided, synthetic, out)),
        ("the table of --real", downstream(real, synthetic, out, external=(real,))),
    ]
    for message, args in cases:
        with pytest.raises(ValueError, match=message):
            run_downstream(args)
    twice = Args(
        real=real,
        synthetic=(synthetic, write_synthetic(tmp_path, real, name="same")),
        out=str(out),
        ratio=("1",),
    )
    with pytest.raises(ValueError, match="same generator weights"):
        run_downstream(twice)
    assert not out.exists() and not test_accesses(real) and not openings(real)


def test_trainings_as_ray_tasks_give_the_same_models(
    ray_local: None, tables: tuple[str, str], tmp_path: Path
) -> None:
    from factory.evaluation.final_test import train_all
    from jobs.evaluate_inputs import read_inputs
    from jobs.evaluate_runs import ray_executor

    args = downstream(*tables, tmp_path, arms="shuffled_labels", seeds=1, num_steps=3)
    comparison = read_inputs(make_plan(args)).comparison
    names = comparison.names()
    done: list[int] = []
    train_all(comparison, names, tmp_path / "here")
    executor = ray_executor(cpus_per_run=1, gpus_per_run=0)
    train_all(comparison, names, tmp_path / "tasks", executor=executor, progress=done.append)
    assert sum(done) == len(names) == 3
    for name in names.values():
        one, two = (
            (tmp_path / where / name / "tensors.safetensors").read_bytes() for where in ("here", "tasks")
        )
        assert one == two
    train_all(comparison, names, tmp_path / "tasks", executor=None, progress=done.append)  # type: ignore[arg-type]
    assert sum(done) == 6, "what is trained is not trained again"


def test_a_test_row_in_a_training_set_is_found_before_and_a_copied_one_after_the_opening(
    tmp_path: Path,
) -> None:
    from dataclasses import replace

    from factory.evaluation.data import read_real
    from factory.evaluation.final_test import judge_all
    from factory.storage import TestAccess
    from jobs.evaluate_inputs import read_inputs

    real = write_real(tmp_path)
    inputs = read_inputs(make_plan(downstream(real, write_synthetic(tmp_path, real), tmp_path)))
    comparison = inputs.comparison
    assert not comparison.sources.evaluation.images.any(), "held-out rows are sealed"
    opened = read_real(
        real, ("test",), size=24, channels=1, native=True, access=TestAccess(opened_by="test", reason="leak")
    )
    leaked = replace(comparison.sources, reserve=replace(opened.take([0, 1]), native=None))
    with pytest.raises(ValueError, match="leak.*held out|leak.*evaluation"):
        replace(comparison, sources=leaked).check()
    synthetic = comparison.sources.synthetic[0]
    images = synthetic.images.copy()
    images[:] = opened.images[0]
    copied = replace(comparison.sources, synthetic={0: replace(synthetic, images=images)})
    with pytest.raises(ValueError, match="pixels"):
        judge_all(
            replace(comparison, sources=copied, arms=comparison.arms[-1:]),
            dict.fromkeys(replace(comparison, arms=comparison.arms[-1:]).runs(), "none"),
            tmp_path,
            opened,
        )


def test_rows_of_fewer_classes_are_judged_among_these(tmp_path: Path) -> None:
    from factory.evaluation.arms import Arm
    from factory.evaluation.final_test import of_classes
    from factory.evaluation.scores import Scores

    values = np.array([[0.6, 0.3, 0.1], [0.2, 0.0, 0.8]])
    scores = Scores(
        task="classification", class_names=("a", "b", "c"), ids=("1", "2"), groups=("1", "2"),
        labels=np.array([0, 2]), areas=np.full(2, np.nan), folds=np.zeros(2, np.int64), arms=(Arm(kind="real"),),
        generator_seeds=(), task_seeds=(0,), values={("real", None, 0): values}, train_counts=np.array([5, 6, 7]),
        train_areas=np.zeros(0),
    )  # fmt: skip
    found = of_classes(scores, np.array([0, 2]))
    assert found.class_names == ("a", "c") and found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.values["real", None, 0], [[0.6 / 0.7, 0.1 / 0.7], [0.2, 0.8]])
    assert found.train_counts.tolist() == [5, 7] and "a, c only" in found.notes[-1]
    assert of_classes(scores, np.arange(3)) is scores


def test_the_search_decides_ratio_model_and_training(tmp_path: Path) -> None:
    chosen = {
        "model": "resnet50",
        "where": "height > 1",
        "name": "synthetic 2×",
        "ratio": 2.0,
        "per_class": [],
        "only": False,
    }
    settings = {"task": "classification", "size": 64, "num_steps": 7, "tag": "curated-2", "patience": None}
    found = {"chosen": chosen, "settings": settings, "metric": "auc", "curves": []}
    (tmp_path / "results.json").write_text(json.dumps(found))
    args = Args(real="r", synthetic=("s",), out="o", search=str(tmp_path), num_steps=9)
    plan = make_plan(args)
    assert (plan.primary, plan.model, plan.tag, plan.where) == (
        "synthetic 2×",
        "resnet50",
        "curated-2",
        "height > 1",
    )
    assert (
        plan.training["size"] == 64 and plan.training["num_steps"] == 9 and plan.training["batch_size"] == 16
    )
    only = chosen | {"name": "synthetic only 4×", "ratio": "only", "only": True}
    (tmp_path / "results.json").write_text(json.dumps(found | {"chosen": only}))
    assert make_plan(args).primary == "synthetic only 4×"
    vector = chosen | {
        "name": "synthetic round 1× long 4×",
        "ratio": 2.5,
        "per_class": [["round", 1.0], ["long", 4.0]],
    }
    (tmp_path / "results.json").write_text(json.dumps(found | {"chosen": vector}))
    plan = make_plan(args)
    assert plan.primary == "synthetic round 1× long 4×"
    arms, notes = choose_arms(plan, has_masks=True, has_reserve=False)
    assert next(a for a in arms if a.kind == "ungated").per_class == (("round", 1.0), ("long", 4.0))
    assert any("no arm oracle" in note for note in notes)
    (tmp_path / "results.json").write_text(
        json.dumps(found | {"chosen": chosen | {"name": "real", "ratio": 0.0}})
    )
    with pytest.raises(ValueError, match="stays closed"):
        make_plan(args)


@pytest.mark.parametrize("text", ["0", "-1", "much", "only:x", "a=b"])
def test_a_ratio_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_ratio(text)


# ------------------------------------------------------------------------------------------ report


def test_report_fills_the_papers_tables_and_names_what_was_not_run(
    judged: tuple[str, str, Path], compared: Path, tmp_path: Path
) -> None:
    page, text = run_report(ReportArgs(results=(str(compared), str(judged[2])), out=str(tmp_path)))
    markdown, html = text.read_text(), page.read_text()
    tables = ["000, Table 1", "000, Table 2", "001, Table 1", "001, Table 2", "001, Table 3", "001, Table 4",
              "002, Table 2", "002, Table 3", "003, Table 5", "003, Table 6", "004, Table 1", "004, Table 3",
              "004, Table 4"]  # fmt: skip
    for name in tables:
        assert f"## Paper {name}" in markdown and f"Paper {name}" in html
    record = read_results(str(judged[2]))
    auc = next(a for a in record["evaluations"][0]["comparison"]["arms"] if a["name"] == "synthetic 1×")[
        "value"
    ]
    told = f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]"
    cells = [
        line
        for line in markdown.splitlines()
        if line.startswith("| blobs, small_cnn?width=4 | Cross-entropy + synthetic ")
    ]
    assert cells and told in cells[0]
    marks = set(re.findall(r"not run: (\[\d+\])", markdown))
    assert marks and all(f"\n{mark}\n" in markdown for mark in marks), "every mark has its command"
    assert "factory evaluate downstream --real" in markdown and "--ratio 1 --methods all" in markdown
    for row in re.findall(r"^\|.*\|$", markdown, flags=re.MULTILINE):
        assert not re.search(r"\bnan\b|\bNone\b", row), row
        if "Paper" not in row and "caution" not in row:
            assert not re.search(r"\|\s+\|\s+\d", row), f"a blank number: {row}"


def test_report_of_nothing_is_all_commands_and_of_another_file_an_error(tmp_path: Path) -> None:
    from factory.report.paper_tables import paper_tables

    for table in paper_tables([]):
        for row in table.rows:
            assert len(row) == len(table.header), table.title
        assert table.missing, table.title
        assert any("not run" in cell for row in table.rows for cell in row), table.title
    (tmp_path / "results.json").write_text('{"some": "thing"}')
    with pytest.raises(ValueError, match="not a result of"):
        run_report(ReportArgs(results=(str(tmp_path),), out=str(tmp_path / "out")))
    with pytest.raises(FileNotFoundError, match="no results.json"):
        run_report(ReportArgs(results=(str(tmp_path / "none"),), out=str(tmp_path / "out")))


def test_evaluate_without_a_word_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.command([]) == 2 and evaluate.command(["--help"]) == 0
    assert "images,downstream,report" in capsys.readouterr().out
    with pytest.raises(ValueError, match="want one of images, downstream, report"):
        evaluate.command(["everything"])
