"""The class-adaptive sampler: epochs of K episodes, the best carried over, the policy updated (paper 000, RL-CAS).

Only the logic: `propose` says what the K episodes of an epoch are, whoever trains them gives their validation scores
to `observe`. The state between two epochs is a small JSON-able dict, so a run resumes exactly.

Two validation folds alternate: in each epoch one gives the reward and the other picks the episode to carry over, so
that the same images never both pay for an action and crown its result.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from schemas.identity import torch_seed
from tune.policy import CountBounds, FixedCounts, Learning, Policy, RandomActions, Reinforce

NUM_FOLDS = 2


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What the sampler does; the paper's values where it gives them.

    Attributes:
        policy: "learned", or an ablation at equal compute: "random" actions, "fixed" counts, "none" synthetic.
        num_epochs: epochs, one policy update each.
        num_episodes: K, trainings per epoch from one checkpoint; the best is carried over.
        initial_count: synthetic images of each class in a batch at the start; 0 under "none".
        bounds: of those counts.
        learning: of the learned policy.
        same_episode_seed: all K episodes of an epoch train with one seed, so that equal actions give bit-equal
            results and rewards differ by the actions alone. Off, K seeds also differ, and best of K picks luck too.
        seed: of everything.
    """

    policy: Literal["learned", "random", "fixed", "none"] = "learned"
    num_epochs: int = 30
    num_episodes: int = 3
    initial_count: int = 2
    bounds: CountBounds = field(default_factory=CountBounds)
    learning: Learning = field(default_factory=Learning)
    same_episode_seed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in ("learned", "random", "fixed", "none"):
            raise ValueError(
                f"SamplerSettings.policy: want 'learned', 'random', 'fixed' or 'none', got {self.policy!r}"
            )
        if self.num_epochs < 1 or self.num_episodes < 1:
            raise ValueError(
                f"SamplerSettings: want num_epochs, num_episodes ≥ 1, got {self.num_epochs}, {self.num_episodes}"
            )
        if self.policy == "learned" and self.learning.reward == "standardised" and self.num_episodes < 2:
            raise ValueError(
                "SamplerSettings.num_episodes: rewards standardised within the epoch need 2 or more"
            )
        if not self.bounds.low <= self.initial_count <= self.bounds.high:
            raise ValueError(
                f"SamplerSettings.initial_count: want {self.bounds.low} … {self.bounds.high}, got {self.initial_count}"
            )
        if self.same_episode_seed and self.policy in ("fixed", "none") and self.num_episodes > 1:
            raise ValueError(
                f"SamplerSettings.same_episode_seed: under policy {self.policy!r} all episodes would be one and the "
                "same; switch it off, or use num_episodes 1"
            )


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One training of an epoch.

    Attributes:
        epoch, number: which epoch, 0 …, and which of its K episodes, 0 ….
        counts: synthetic images of each class in a batch, (C,).
        actions: action numbers that led there, (C,).
        seed: of the training, 63 bits.
    """

    epoch: int
    number: int
    counts: tuple[int, ...]
    actions: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What an epoch did.

    Attributes:
        epoch: 0 ….
        episodes: the K trainings.
        scores: (K, 2) validation score of each in both folds, larger is better.
        reward_fold: the fold that paid; the other chose.
        best: number of the episode carried over, the first of equals.
        counts: synthetic images of each class after the epoch, (C,).
        metrics: of the policy update.
    """

    epoch: int
    episodes: tuple[Episode, ...]
    scores: tuple[tuple[float, float], ...]
    reward_fold: int
    best: int
    counts: tuple[int, ...]
    metrics: dict[str, float]


class ClassAdaptiveSampler:
    """Proposes the episodes of an epoch and learns from their scores.

    Args:
        settings: what to do.
        num_classes: C.
    """

    def __init__(self, settings: SamplerSettings, *, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: want at least 1, got {num_classes}")
        self.settings, self.num_classes = settings, num_classes
        self.policy = _policy(settings, num_classes)
        self.epoch = 0
        start = 0 if settings.policy == "none" else settings.initial_count
        self.counts = np.full(num_classes, start, np.int64)

    @property
    def is_done(self) -> bool:
        """All epochs were observed."""
        return self.epoch >= self.settings.num_epochs

    def propose(self) -> tuple[Episode, ...]:
        """The K episodes of the present epoch: a pure function of the state, so asking twice gives the same.

        Raises:
            ValueError: after the last epoch.
        """
        if self.is_done:
            raise ValueError(f"num_epochs: all {self.settings.num_epochs} epochs are done")
        k = self.settings.num_episodes
        actions = self.policy.act(self.counts, epoch=self.epoch, num_episodes=k)
        moved = np.broadcast_to(self.counts, actions.shape)
        if self.settings.policy in ("learned", "random"):
            moved = self.settings.bounds.apply(self.counts, actions)
        return tuple(
            Episode(
                epoch=self.epoch,
                number=number,
                counts=tuple(moved[number].tolist()),
                actions=tuple(actions[number].tolist()),
                seed=self._seed(number),
            )
            for number in range(k)
        )

    def _seed(self, number: int) -> int:
        stream = "episodes" if self.settings.same_episode_seed else f"episode {number}"
        return torch_seed(f"sampler/{self.settings.seed}/{self.epoch}", stream)

    def observe(self, scores: Sequence[Sequence[float]] | np.ndarray) -> EpochRecord:
        """Learn from the scores of the proposed episodes and move on to the next epoch.

        Args:
            scores: (K, 2) validation score of each episode in both folds, in the order of `propose`.

        Raises:
            ValueError: another shape, or a score that is not finite (a diverged training): decide what it is worth.
        """
        values = np.asarray(scores, np.float64)
        if values.shape != (self.settings.num_episodes, NUM_FOLDS) or not np.isfinite(values).all():
            raise ValueError(
                f"scores: want finite ({self.settings.num_episodes}, {NUM_FOLDS}) of epoch {self.epoch}, "
                f"got {values.tolist()}"
            )
        episodes = self.propose()
        reward_fold = self.epoch % NUM_FOLDS
        actions = np.array([episode.actions for episode in episodes])
        metrics = self.policy.update(self.counts, actions, values[:, reward_fold])
        best = int(values[:, 1 - reward_fold].argmax())
        self.counts = np.array(episodes[best].counts, np.int64)
        record = EpochRecord(
            epoch=self.epoch,
            episodes=episodes,
            scores=tuple((float(one), float(two)) for one, two in values),
            reward_fold=reward_fold,
            best=best,
            counts=episodes[best].counts,
            metrics=metrics,
        )
        self.epoch += 1
        return record

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, JSON-able: settings, epoch, counts, policy."""
        return {
            "settings": asdict(self.settings),
            "num_classes": self.num_classes,
            "epoch": self.epoch,
            "counts": self.counts.tolist(),
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; only `num_epochs` may differ.

        Raises:
            ValueError: a state of other settings or classes.
        """
        mine = {**asdict(self.settings), "num_classes": self.num_classes, "num_epochs": None}
        theirs = {**state["settings"], "num_classes": state["num_classes"], "num_epochs": None}
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            told = ", ".join(f"{key} {theirs.get(key)} (now {mine.get(key)})" for key in differing)
            raise ValueError(f"state: was made with {told}; resume with the same settings or start afresh")
        self.policy.load_state_dict(state["policy"])
        self.epoch, self.counts = int(state["epoch"]), np.array(state["counts"], np.int64)


def _policy(settings: SamplerSettings, num_classes: int) -> Policy:
    if settings.policy == "learned":
        return Reinforce(
            num_classes=num_classes, bounds=settings.bounds, learning=settings.learning, seed=settings.seed
        )
    if settings.policy == "random":
        return RandomActions(num_classes=num_classes, bounds=settings.bounds, seed=settings.seed)
    return FixedCounts(num_classes=num_classes)
