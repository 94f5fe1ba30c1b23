"""The sampler on real trainings: planted bad class, resuming after kills, leaks refused, one command's arithmetic."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig, phantom_sample
from factory.evaluation.task_metrics import auc
from factory.predictors.augmentation import Augmentation
from factory.predictors.classifiers import Classifier
from factory.predictors.examples import Examples
from factory.predictors.fitting import FitSettings, load_fitted
from factory.predictors.losses import BalancedSoftmax
from tests.evaluation.planted import pictures, write_real, write_synthetic
from tune.class_adaptive import SamplerSettings
from tune.explore_sampler import (
    Args,
    make_loss,
    make_searches,
    make_training,
    read_data,
    run,
)
from tune.policy import CountBounds, Learning
from tune.sampler_results import counts_plot, summarise
from tune.sampler_search import (
    EpisodeResult,
    EpisodeTraining,
    SamplerSearch,
    SearchData,
    make_search_data,
    run_searches,
    score_of,
    train_episode,
    train_here,
)

torch.set_num_threads(1)
SHARES = {"benign": 0.6, "malignant": 0.3, "normal": 0.1}


def phantoms(seed: int, count: int, *, is_real: bool, balanced: bool = False) -> Examples:
    """A long tail of three classes at 32 px, or the same classes equally often."""
    classes = tuple(
        dataclasses.replace(prior, share=1.0 if balanced else SHARES[prior.name])
        for prior in (BENIGN, MALIGNANT, NORMAL)
    )
    config = PhantomConfig(size=32, classes=classes)
    samples = [phantom_sample(config, seed, index) for index in range(count)]
    ids = tuple(f"{seed}-{index}" for index in range(count))
    return Examples(
        images=np.stack([sample.image for sample in samples])[..., None],
        labels=np.array([config.class_names.index(sample.label_name) for sample in samples], np.int64),
        class_names=config.class_names,
        ids=ids,
        groups=ids,
        is_real=np.full(count, is_real),
    )


@pytest.fixture(scope="module")
def real() -> Examples:
    return phantoms(1, 120, is_real=True)


@pytest.fixture(scope="module")
def validation() -> Examples:
    return phantoms(2, 180, is_real=True)


@pytest.fixture(scope="module")
def synthetic() -> Examples:
    return phantoms(3, 180, is_real=False, balanced=True)


def with_wrong_labels(synthetic: Examples, label: int) -> Examples:
    """Images of the other classes under the name of one."""
    images = synthetic.images.copy()
    rows, others = np.flatnonzero(synthetic.labels == label), np.flatnonzero(synthetic.labels != label)
    images[rows] = images[others[: len(rows)]]
    return dataclasses.replace(synthetic, images=images)


def training(num_steps: int = 10) -> EpisodeTraining:
    return EpisodeTraining(
        predictor=Classifier(architecture="small_cnn?width=8"),
        fit=FitSettings(
            num_steps=num_steps,
            learning_rate=2e-3,
            warmup_steps=0,
            schedule="constant",
            loss=BalancedSoftmax(),
            augmentation=Augmentation(kind="none"),
        ),
        real_per_batch=12,
    )


def small(policy: str = "learned", **changes: Any) -> SamplerSettings:
    return SamplerSettings(**{"policy": policy, "num_epochs": 4, "num_episodes": 2, "seed": 5, **changes})


def finish(search: SamplerSearch) -> SamplerSearch:
    for _ in run_searches({"one": search}):
        pass
    return search


def outcome(search: SamplerSearch) -> tuple[list[dict[str, Any]], str]:
    """What must be equal after a resume: all but seconds."""
    epochs = [{**epoch.as_json(), "seconds": 0} for epoch in search.epochs]
    return json.loads(json.dumps(epochs)), search.best().digest()


def test_the_count_of_a_class_with_wrong_labels_goes_to_its_floor_over_seeds(tmp_path: Path) -> None:
    real, validation = pictures("real", (45, 15), 1), pictures("validation", (120, 120), 2)
    good = pictures("synthetic", (60, 60), 3, is_real=False)
    for seed, bad in enumerate((0, 1, 1)):
        images = good.images.copy()
        images[good.labels == bad] = good.images[good.labels != bad]
        data = make_search_data(real, dataclasses.replace(good, images=images), validation, seed=seed)
        settings = SamplerSettings(
            num_epochs=12,
            num_episodes=4,
            initial_count=4,
            bounds=CountBounds(high=8),
            learning=Learning(learning_rate=0.2),
            same_episode_seed=True,
            seed=seed,
        )
        how = dataclasses.replace(training(8), real_per_batch=8, score="log_likelihood")
        search = finish(SamplerSearch(settings, how, data, tmp_path / str(seed)))
        last = np.array([epoch.record.counts for epoch in search.epochs[-5:]]).mean(axis=0)
        assert last[bad] < 1 < 3 < last[1 - bad], (seed, last)


def test_a_search_that_is_killed_anywhere_ends_with_the_same_result(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    data = make_search_data(real, synthetic, validation)
    whole = outcome(finish(SamplerSearch(small(), training(3), data, tmp_path / "whole")))

    class Killed(Exception):
        pass

    trained = 0

    def dying(jobs: Sequence[Any]) -> list[EpisodeResult]:
        nonlocal trained
        trained += 1
        if trained == 3:
            raise Killed
        return train_here(jobs)

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        list(run_searches({"one": SamplerSearch(small(), training(3), data, folder)}, dying))
    assert len(SamplerSearch(small(), training(3), data, folder).epochs) == 2
    # Killed while the checkpoint of the third epoch was written, and again after it, before the state was.
    shutil.copytree(folder / "epoch_0001", folder / "epoch_0002.partial")
    shutil.copytree(folder / "epoch_0001", folder / "epoch_0002")
    resumed = finish(SamplerSearch(small(), training(3), data, folder))
    assert outcome(resumed) == whole
    kept = {path.name for path in folder.glob("epoch_*")}
    assert kept == {"epoch_0003", f"epoch_{resumed.best_epoch:04d}"}


def test_more_epochs_go_on_from_a_finished_search_and_other_rows_or_settings_are_refused(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    data = make_search_data(real, synthetic, validation)
    finish(SamplerSearch(small(num_epochs=1), training(2), data, tmp_path / "a"))
    longer = finish(SamplerSearch(small(num_epochs=2), training(2), data, tmp_path / "a"))
    at_once = finish(SamplerSearch(small(num_epochs=2), training(2), data, tmp_path / "b"))
    assert outcome(longer) == outcome(at_once)
    with pytest.raises(ValueError, match=r"seed 5 \(now 6\)"):
        SamplerSearch(small(num_epochs=2, seed=6), training(2), data, tmp_path / "a")
    with pytest.raises(ValueError, match="another classifier, training or rows"):
        SamplerSearch(small(num_epochs=2), training(3), data, tmp_path / "a")
    other = make_search_data(real, with_wrong_labels(synthetic, 0), validation)
    with pytest.raises(ValueError, match="another classifier, training or rows"):
        SamplerSearch(small(num_epochs=2), training(2), other, tmp_path / "a")


def test_equal_actions_and_seeds_give_bit_equal_episodes(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    data = make_search_data(real, synthetic, validation)
    search = SamplerSearch(small(same_episode_seed=True), training(3), data, tmp_path)
    job = search.jobs()[0]
    one, two = (train_episode(search.training, data, job) for _ in range(2))
    assert one.fitted.digest() == two.fitted.digest() and one.scores == two.scores
    other = dataclasses.replace(job, counts=tuple(count + 2 for count in job.counts))
    assert train_episode(search.training, data, other).fitted.digest() != one.fitted.digest()


def test_every_episode_starts_from_the_one_that_was_carried_over(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    search = SamplerSearch(small(), training(2), make_search_data(real, synthetic, validation), tmp_path)
    results = train_here([(search.training, search.data, job) for job in search.jobs()])
    epoch = search.observe(results)
    carried = results[epoch.record.best].fitted.digest()
    assert {job.start.digest() for job in search.jobs() if job.start is not None} == {carried}
    chosen_by = [result.scores[1 - epoch.record.reward_fold] for result in results]
    assert epoch.record.best == int(np.argmax(chosen_by))
    assert epoch.stop_score == results[epoch.record.best].scores[2]


def test_folds_hold_whole_groups_and_nothing_of_training(
    real: Examples, synthetic: Examples, validation: Examples
) -> None:
    pairs = dataclasses.replace(
        validation, groups=tuple(f"patient {row // 2}" for row in range(len(validation)))
    )
    data = make_search_data(real, synthetic, pairs, seed=3)
    groups = [set(fold.groups) for fold in data.folds]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 90
    assert sum(map(len, data.folds)) == 180
    assert all(fold.counts().min() > 0 for fold in data.folds)
    leaking = dataclasses.replace(validation, groups=(real.groups[7], *validation.groups[1:]))
    with pytest.raises(ValueError, match="share their group with the training set"):
        make_search_data(real, synthetic, leaking)
    copied = synthetic.images.copy()
    copied[5] = validation.images[9]
    with pytest.raises(ValueError, match="share their pixels with the training set"):
        make_search_data(real, dataclasses.replace(synthetic, images=copied), validation)
    rare = validation.take(
        np.flatnonzero((validation.labels != 2) | (np.cumsum(validation.labels == 2) <= 2))
    )
    with pytest.raises(ValueError, match=r"class 'normal' has 2 group\(s\)"):
        make_search_data(real, synthetic, rare)


def test_real_and_synthetic_rows_cannot_be_mixed_up(
    real: Examples, synthetic: Examples, validation: Examples
) -> None:
    with pytest.raises(ValueError, match="only real rows"):
        make_search_data(synthetic, real, validation)
    with pytest.raises(ValueError, match="counted twice"):
        make_search_data(real, phantoms(4, 12, is_real=True), validation)
    with pytest.raises(ValueError, match="only real rows"):
        make_search_data(real, synthetic, dataclasses.replace(validation, is_real=~validation.is_real))


def test_a_class_without_synthetic_rows_has_no_agent(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    tail = synthetic.take(np.flatnonzero(synthetic.labels > 0))
    search = SamplerSearch(small(), training(2), make_search_data(real, tail, validation), tmp_path)
    assert search.sampler.num_classes == 2
    assert {job.counts[0] for job in search.jobs()} == {0}
    assert finish(search).result()["classes_with_agent"] == ["malignant", "normal"]
    nothing = make_search_data(real, None, validation)
    with pytest.raises(ValueError, match="no synthetic rows to add"):
        SamplerSearch(small(), training(2), nothing, tmp_path / "nothing")
    none = SamplerSearch(small("none"), training(2), nothing, tmp_path / "none")
    assert {job.counts for job in none.jobs()} == {(0, 0, 0)}


def test_patience_stops_on_the_third_fold_and_the_best_epoch_is_kept(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    data = make_search_data(real, synthetic, validation)
    search = SamplerSearch(small(num_epochs=9), training(2), data, tmp_path, patience=2)
    thirds = iter([0.5, 0.7, 0.6, 0.65, 0.9])

    def planted(jobs: Sequence[Any]) -> list[EpisodeResult]:
        third = next(thirds)
        return [dataclasses.replace(one, scores=(*one.scores[:2], third)) for one in train_here(jobs)]

    assert [epoch.stop_score for _, epoch in run_searches({"one": search}, planted)] == [0.5, 0.7, 0.6, 0.65]
    assert search.is_done and search.best_epoch == 1
    again = SamplerSearch(small(num_epochs=9), training(2), data, tmp_path, patience=2)
    assert again.is_done and again.best().digest() == search.best().digest()


def test_searches_advance_together_and_each_as_it_would_alone(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    data = make_search_data(real, synthetic, validation)
    sizes = []

    def counting(jobs: Sequence[Any]) -> list[EpisodeResult]:
        sizes.append(len(jobs))
        return train_here(jobs)

    together = {
        name: SamplerSearch(small(name, num_epochs=epochs), training(2), data, tmp_path / name)
        for name, epochs in (("random", 2), ("fixed", 1))
    }
    assert [name for name, _ in run_searches(together, counting)] == ["random", "fixed", "random"]
    assert sizes == [4, 2]
    alone = finish(SamplerSearch(small("random", num_epochs=2), training(2), data, tmp_path / "alone"))
    assert outcome(together["random"]) == outcome(alone)


def test_scores() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.5, 0.5]], np.float32)
    assert score_of("auc", labels, probabilities) == auc(labels, probabilities) == pytest.approx(2 / 3)
    assert score_of("balanced_accuracy", labels, probabilities) == pytest.approx((2 / 3 + 0) / 2)
    expected = (np.log([0.9, 0.6, 0.4]).mean() + np.log(0.5)) / 2
    assert score_of("log_likelihood", labels, probabilities) == pytest.approx(expected)
    assert score_of("macro_f1", labels, np.eye(2)[labels]) == 1
    with pytest.raises(ValueError, match="EpisodeTraining.score"):
        dataclasses.replace(training(), score="accuracy")


def test_summary_pairs_policies_by_seed_and_the_plot_shows_every_epoch(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    data = make_search_data(real, synthetic, validation)
    results = {}
    for policy in ("learned", "random"):
        for seed in (5, 6):
            folder = tmp_path / f"{policy}{seed}"
            search = SamplerSearch(small(policy, num_epochs=1, seed=seed), training(2), data, folder)
            results[folder.name] = finish(search).result()
    summary = summarise(results)
    pairs = [results[f"learned{s}"]["stop_score"] - results[f"random{s}"]["stop_score"] for s in (5, 6)]
    assert summary["learned"]["difference_to_random"] == pairs
    assert "difference_to_random" not in summary["random"]
    assert summary["learned"]["num_steps"] == summary["random"]["num_steps"] == [4, 4]
    upper, lower = counts_plot(results["learned5"]).axes
    assert [line.get_label() for line in upper.lines] == ["benign", "malignant", "normal"]
    assert all(len(line.get_xdata()) == 1 for line in upper.lines)
    assert lower.get_ylabel() == "validation score"


def test_arguments() -> None:
    with pytest.raises(ValueError, match="--synthetic is needed"):
        Args(real="r", out="o")
    assert Args(real="r", out="o", policy="none").policies == ("none",)
    both = Args(real="r", out="o", synthetic="s", compare=("learned", "random", "learned"))
    assert both.policies == ("learned", "random")
    with pytest.raises(ValueError, match="--steps-per-epoch 0"):
        Args(real="r", out="o", policy="none", steps_per_epoch=0)
    with pytest.raises(ValueError, match="--reward paper takes a score in 0"):
        Args(real="r", out="o", policy="none", reward="paper", score="log_likelihood")
    assert make_loss("balanced_softmax") == BalancedSoftmax()


def test_the_effective_counts_reach_the_loss(
    real: Examples, synthetic: Examples, validation: Examples, tmp_path: Path
) -> None:
    # Of equal batches, the loss must see those of the composed batch: planted by a loss that records them.
    seen: list[np.ndarray] = []

    class Recording(BalancedSoftmax):
        def loss(self, logits: Any, labels: Any, counts: Any) -> Any:
            seen.append(np.asarray(counts))
            assert len(labels) == 12 + 2 + 4
            return super().loss(logits, labels, counts)

    data = make_search_data(real, synthetic, validation)
    settings = dataclasses.replace(training(1).fit, loss=Recording())
    search = SamplerSearch(small(), training(1), data, tmp_path)
    job = dataclasses.replace(search.jobs()[0], counts=(0, 2, 4))
    train_episode(dataclasses.replace(training(1), fit=settings), data, job)
    assert np.allclose(seen[0], 12 * real.counts() / len(real) + [0, 2, 4])


def test_search_data_digest_covers_pixels_and_labels(
    real: Examples, synthetic: Examples, validation: Examples
) -> None:
    one = make_search_data(real, synthetic, validation)
    assert one.digest() == make_search_data(real, synthetic, validation).digest()
    relabelled = dataclasses.replace(synthetic, labels=(synthetic.labels + 1) % 3)
    for other in (with_wrong_labels(synthetic, 1), relabelled):
        assert make_search_data(real, other, validation).digest() != one.digest()
    assert isinstance(one, SearchData) and one.synthetic_counts.tolist() == synthetic.counts().tolist()


@pytest.mark.slow
def test_the_command_trains_in_ray_as_in_this_process_and_goes_on_where_it_stopped(
    ray_local: None, tmp_path: Path
) -> None:
    real = write_real(tmp_path / "real.lance", {"train": 24, "val": 24, "test": 4}, 1)
    made = write_synthetic(tmp_path / "synthetic.lance", real, 12, 2)
    args = Args(
        real=real,
        synthetic=made,
        out=str(tmp_path / "out"),
        compare=("learned", "none"),
        epochs=1,
        episodes=2,
        steps_per_epoch=3,
        model="small_cnn?width=4",
        size=24,
        real_per_batch=6,
        cpus_per_episode=0.5,
    )
    first = run(args)
    in_ray = run(dataclasses.replace(args, epochs=2))
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["summary"] == json.loads(json.dumps(in_ray.summary))
    assert (tmp_path / "out" / "learned-seed-0.png").stat().st_size > 1000
    assert len(first.searches["learned-seed-0"]["epochs"]) == 1
    assert in_ray.searches["learned-seed-0"]["epochs"][0] == first.searches["learned-seed-0"]["epochs"][0]

    here = dataclasses.replace(args, epochs=2, out=str(tmp_path / "here"))
    data, inputs = read_data(here)
    assert set(inputs) == {"real", "synthetic"} and data.train.is_real.sum() == 24
    searches = make_searches(here, make_training(here), data)
    for _ in run_searches(searches):
        pass
    for name, search in searches.items():
        checkpoint = tmp_path / "out" / name / in_ray.searches[name]["checkpoint"]
        assert load_fitted(checkpoint).digest() == search.best().digest()
    with pytest.raises(ValueError, match="training diverged"):
        run(dataclasses.replace(args, out=str(tmp_path / "diverged"), task_learning_rate=1e30))


def test_synthetic_rows_of_another_generator_are_refused(tmp_path: Path) -> None:
    real = write_real(tmp_path / "real.lance", {"train": 12, "val": 12, "test": 2}, 1)
    made = write_synthetic(tmp_path / "synthetic.lance", real, 4, 2, digest="other rows")
    with pytest.raises(ValueError, match="made from other real rows"):
        read_data(Args(real=real, synthetic=made, out=str(tmp_path / "out"), size=24))
    fitting = write_synthetic(tmp_path / "fitting.lance", real, 4, 2)
    with pytest.raises(ValueError, match="no accepted row where label = 7"):
        read_data(Args(real=real, synthetic=fitting, out=str(tmp_path / "out"), size=24, where="label = 7"))
