"""Trains a classifier under the class-adaptive sampler: K episodes per epoch, the best carried over, resumable.

`class_adaptive` says which episodes to train and learns from their scores; here they are trained and scored. The
caller gives the `Executor`: a plain loop, or Ray tasks that share one broadcast checkpoint. Several searches (a policy
and its ablations) advance together, so that all their episodes of an epoch run side by side.

The validation groups are dealt into three folds. Two of them alternate between the reward and the choice of the
episode to carry over; the third never pays or chooses within an epoch, it says which epoch's classifier is kept and
when to stop. Nothing here sees a test row.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from factory.evaluation import task_metrics
from factory.evaluation.leakage import check_disjoint
from factory.predictors.batches import ComposedBatches
from factory.predictors.classifiers import Classifier
from factory.predictors.examples import Examples, concatenate
from factory.predictors.fitting import FitSettings, Fitted, fit, load_fitted
from schemas.identity import fingerprint, hash_parts
from tune.class_adaptive import NUM_FOLDS, ClassAdaptiveSampler, Episode, EpochRecord, SamplerSettings

Score = Literal["auc", "macro_f1", "balanced_accuracy", "log_likelihood"]
STATE_FILE = "sampler.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchData:
    """What every episode of a search sees.

    Attributes:
        train: real training rows followed by the synthetic ones.
        folds: two validation folds that alternate between reward and carry-over, and the one that picks the epoch.
    """

    train: Examples
    folds: tuple[Examples, Examples, Examples]

    @property
    def synthetic_counts(self) -> np.ndarray:
        """Synthetic rows of each class, int64 (C,)."""
        chosen = self.train.labels[~self.train.is_real]
        return np.bincount(chosen, minlength=len(self.train.class_names))

    def digest(self) -> str:
        """Of the rows of every part, pixels and labels included."""
        return hash_parts(*(part.content_digest() for part in (self.train, *self.folds)))


def make_search_data(
    real: Examples, synthetic: Examples | None, validation: Examples, *, seed: int = 0
) -> SearchData:
    """The training rows, and the validation rows dealt into three folds by group.

    Args:
        real, synthetic: training rows; None for no synthetic ones, as under policy "none".
        validation: real rows of groups that are in neither.

    Raises:
        ValueError: validation shares rows, groups or pixels with training, a class has validation rows of fewer than three groups,
            or rows that should be real are not.
    """
    if not real.is_real.all() or not validation.is_real.all():
        raise ValueError("real, validation: hold synthetic rows; only real rows train as such and judge")
    if synthetic is not None and synthetic.is_real.any():
        raise ValueError("synthetic: holds real rows; they would be counted twice")
    train = real if synthetic is None else concatenate(real, synthetic)
    check_disjoint(train, validation=validation)
    return SearchData(train=train, folds=_three_folds(validation, seed))


def _three_folds(validation: Examples, seed: int) -> tuple[Examples, Examples, Examples]:
    from sklearn.model_selection import StratifiedGroupKFold

    groups = np.asarray(validation.groups)
    for label, name in enumerate(validation.class_names):
        count = len(set(groups[validation.labels == label].tolist()))
        if count < NUM_FOLDS + 1:
            raise ValueError(
                f"validation: class {name!r} has {count} group(s), and reward, carry-over and stopping need one each; "
                "prepare the table with a larger share of validation rows"
            )
    splitter = StratifiedGroupKFold(n_splits=NUM_FOLDS + 1, shuffle=True, random_state=seed)
    # The largest fold picks the epoch: a maximum over many epochs is the choice that noise misleads most.
    dealt = sorted(
        (rows for _, rows in splitter.split(groups, validation.labels, groups)), key=len, reverse=True
    )
    last, one, two = (validation.take(np.sort(rows)) for rows in dealt)
    for part in (one, two, last):
        missing = [name for name, count in zip(part.class_names, part.counts()) if not count]
        if missing:
            raise ValueError(
                f"validation: a fold would hold no row of class {missing[0]!r}; its groups are too few or too unequal"
            )
    return one, two, last


@dataclass(frozen=True, kw_only=True)
class EpisodeTraining:
    """How one episode trains and is scored; the same for all of them.

    Attributes:
        predictor: the classifier.
        fit: its training; `num_steps` is the length of an episode.
        real_per_batch: real rows in each batch; the synthetic ones come on top.
        score: of the validation folds, larger is better. "auc" (one class against the rest, averaged) is the smooth
            one: a step of the others is a whole image. "log_likelihood" is the mean over classes of the mean
            log-probability of the true class.
    """

    predictor: Classifier
    fit: FitSettings
    real_per_batch: int = 16
    score: Score = "auc"

    def __post_init__(self) -> None:
        if self.real_per_batch < 1:
            raise ValueError(f"EpisodeTraining.real_per_batch: want at least 1, got {self.real_per_batch}")
        if self.score not in ("auc", "macro_f1", "balanced_accuracy", "log_likelihood"):
            raise ValueError(
                "EpisodeTraining.score: want 'auc', 'macro_f1', 'balanced_accuracy' or 'log_likelihood', "
                f"got {self.score!r}"
            )


def score_of(kind: Score, labels: np.ndarray, probabilities: np.ndarray) -> float:
    """One score of predictions, larger is better.

    Args:
        labels: int (N,), every class present.
        probabilities: (N, C).
    """
    classes = probabilities.shape[1]
    if kind == "auc":
        return task_metrics.auc(labels, probabilities)
    if kind == "log_likelihood":
        true = np.log(np.maximum(probabilities[np.arange(len(labels)), labels].astype(np.float64), 1e-12))
        return float(np.mean([true[labels == label].mean() for label in range(classes)]))
    predictions = probabilities.argmax(axis=1)
    if kind == "macro_f1":
        return task_metrics.macro_scores(labels, predictions, classes)[2]
    return task_metrics.balanced_accuracy(labels, predictions, classes)


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeJob:
    """One episode to train: with these synthetic rows of each class in a batch, from this classifier on.

    Attributes:
        counts: synthetic rows of each class in a batch, (C,).
        seed: of batches, augmentation and, at the start, weights.
        start: what every episode of the epoch starts from; None in the first epoch.
    """

    counts: tuple[int, ...]
    seed: int
    start: Fitted | None


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeResult:
    """A trained episode: the classifier, its score on the three folds, and the seconds it took."""

    fitted: Fitted
    scores: tuple[float, float, float]
    seconds: float


Executor = Callable[[Sequence[tuple[EpisodeTraining, SearchData, EpisodeJob]]], list[EpisodeResult]]
"""Trains any number of episodes and returns their results in order."""


def train_episode(
    training: EpisodeTraining, data: SearchData, job: EpisodeJob, *, device: str = "cpu"
) -> EpisodeResult:
    """Train and score one episode; equal arguments give bit-equal results on one machine's CPU."""
    started = time.perf_counter()
    batches = ComposedBatches(
        labels=data.train.labels,
        is_real=data.train.is_real,
        num_classes=len(data.train.class_names),
        real_per_batch=training.real_per_batch,
        synthetic_per_class=job.counts,
        seed=job.seed,
    )
    fitted = fit(
        training.predictor,
        training.fit,
        data.train,
        batches,
        validation=None,
        seed=job.seed,
        device=device,
        start=job.start,
    )
    scores = [
        score_of(training.score, fold.labels, fitted.predict(fold, device=device)) for fold in data.folds
    ]
    return EpisodeResult(
        fitted=fitted, scores=(scores[0], scores[1], scores[2]), seconds=time.perf_counter() - started
    )


def train_here(jobs: Sequence[tuple[EpisodeTraining, SearchData, EpisodeJob]]) -> list[EpisodeResult]:
    """The executor without Ray: one episode after the other in this process."""
    return [train_episode(*job) for job in jobs]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch as it is kept: what the sampler did, and the third fold's score of the episode carried over."""

    record: EpochRecord
    stop_score: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Epoch":
        record = dict(value["record"])
        episodes = tuple(
            Episode(**{**item, "counts": tuple(item["counts"]), "actions": tuple(item["actions"])})
            for item in record["episodes"]
        )
        record |= {
            "episodes": episodes,
            "scores": tuple((one, two) for one, two in record["scores"]),
            "counts": tuple(record["counts"]),
        }
        return Epoch(record=EpochRecord(**record), stop_score=value["stop_score"], seconds=value["seconds"])


class SamplerSearch:
    """One run of the sampler in a folder of its own; making it again there goes on after the last whole epoch.

    The state, a small JSON file, is replaced in one step after the epoch's checkpoint is complete, and names that
    checkpoint; so a kill at any moment costs at most the epoch that ran.

    Args:
        settings: of the sampler.
        training: of the episodes.
        data: of the episodes.
        folder: of state and checkpoints.
        patience: epochs without a better score of the third fold after which the search stops; None trains all.

    Raises:
        ValueError: the folder holds a search with other settings or rows; synthetic rows are asked for and none given.
    """

    def __init__(
        self,
        settings: SamplerSettings,
        training: EpisodeTraining,
        data: SearchData,
        folder: Path,
        *,
        patience: int | None = None,
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience: want at least 1 epoch, got {patience}")
        self.settings, self.training, self.data, self.patience = settings, training, data, patience
        self.folder = Path(folder)
        self.classes = np.flatnonzero(data.synthetic_counts)
        if settings.policy == "none":
            self.classes = np.arange(len(data.train.class_names))
        elif not len(self.classes):
            raise ValueError(
                f"policy {settings.policy!r}: there are no synthetic rows to add; use policy 'none'"
            )
        self.sampler = ClassAdaptiveSampler(settings, num_classes=len(self.classes))
        self.epochs: list[Epoch] = []
        self._start: Fitted | None = None
        self._fingerprint = fingerprint([training, data.digest()])
        self._load()

    def _load(self) -> None:
        path = self.folder / STATE_FILE
        if not path.is_file():
            return
        state = json.loads(path.read_text())
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"{self.folder}: holds a search with another classifier, training or rows; choose another folder"
            )
        self.sampler.load_state_dict(state["sampler"])
        self.epochs = [Epoch.from_json(item) for item in state["epochs"]]
        self._start = load_fitted(self._checkpoint(len(self.epochs) - 1))

    @property
    def is_done(self) -> bool:
        """All epochs were trained, or the third fold has not improved for `patience` epochs."""
        waited = len(self.epochs) - 1 - self.best_epoch if self.epochs else 0
        return self.sampler.is_done or (self.patience is not None and waited >= self.patience)

    @property
    def best_epoch(self) -> int:
        """The first epoch whose classifier the third fold likes best."""
        return int(np.argmax([epoch.stop_score for epoch in self.epochs]))

    def jobs(self) -> list[EpisodeJob]:
        """The episodes of the present epoch."""
        return [
            EpisodeJob(counts=self.all_counts(episode.counts), seed=episode.seed, start=self._start)
            for episode in self.sampler.propose()
        ]

    def all_counts(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Counts of all classes, zero for those without synthetic rows, from those that have an agent."""
        full = np.zeros(len(self.data.train.class_names), np.int64)
        full[self.classes] = counts
        return tuple(full.tolist())

    def observe(self, results: Sequence[EpisodeResult]) -> Epoch:
        """Learn from the trained episodes, carry the best over and save."""
        record = self.sampler.observe([result.scores[:NUM_FOLDS] for result in results])
        best = results[record.best]
        epoch = Epoch(
            record=record,
            stop_score=best.scores[NUM_FOLDS],
            seconds=sum(result.seconds for result in results),
        )
        self.epochs.append(epoch)
        self._start = best.fitted
        self._save()
        return epoch

    def _checkpoint(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}"

    def _save(self) -> None:
        assert self._start is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self._checkpoint(len(self.epochs) - 1)
        partial = last.with_name(f"{last.name}.partial")
        for leftover in (partial, last):
            shutil.rmtree(leftover, ignore_errors=True)
        self._start.save(partial)
        partial.rename(last)
        write_json(
            self.folder / STATE_FILE,
            {
                "fingerprint": self._fingerprint,
                "sampler": self.sampler.state_dict(),
                "epochs": [epoch.as_json() for epoch in self.epochs],
            },
        )
        needed = {last.name, self._checkpoint(self.best_epoch).name}
        for old in self.folder.glob("epoch_*"):
            if old.name not in needed:
                shutil.rmtree(old)

    def best(self) -> Fitted:
        """The classifier of the best epoch."""
        if not self.epochs:
            raise ValueError(f"{self.folder}: no epoch is finished")
        return load_fitted(self._checkpoint(self.best_epoch))

    def result(self) -> dict[str, Any]:
        """The search as JSON: settings, every epoch with its episodes, the chosen one."""
        names = self.data.train.class_names
        chosen = self.epochs[self.best_epoch]
        return {
            "settings": dataclasses.asdict(self.settings),
            "class_names": list(names),
            "classes_with_agent": [names[label] for label in self.classes],
            "best_epoch": self.best_epoch,
            "best_counts": list(self.all_counts(chosen.record.counts)),
            "stop_score": chosen.stop_score,
            "checkpoint": self._checkpoint(self.best_epoch).name,
            "num_steps": len(self.epochs) * self.settings.num_episodes * self.training.fit.num_steps,
            "seconds": sum(epoch.seconds for epoch in self.epochs),
            "epochs": [epoch.as_json() for epoch in self.epochs],
        }


def run_searches(
    searches: Mapping[str, SamplerSearch], executor: Executor = train_here
) -> Iterator[tuple[str, Epoch]]:
    """Advance all searches epoch by epoch until each is done; yields the name and epoch as each is saved."""
    while waiting := {name: search for name, search in searches.items() if not search.is_done}:
        jobs = {name: search.jobs() for name, search in waiting.items()}
        flat = [(waiting[name].training, waiting[name].data, job) for name in waiting for job in jobs[name]]
        results = iter(executor(flat))
        for name, search in waiting.items():
            yield name, search.observe([next(results) for _ in jobs[name]])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
