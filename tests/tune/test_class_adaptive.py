"""Epochs of the class-adaptive sampler against an environment whose best counts are known."""

import json

import numpy as np
import pytest
import torch

from tune.class_adaptive import ClassAdaptiveSampler, EpochRecord, SamplerSettings
from tune.policy import CountBounds, Learning

torch.set_num_threads(1)
WORTH = np.array([0.004, 0.004, -0.01])
"""Gain of the score per synthetic image of each class: two good classes, one whose images carry wrong labels."""


def scored(sampler: ClassAdaptiveSampler, noise: float = 0.0) -> np.ndarray:
    """Validation scores (K, 2) of a task that is linear in the counts, noise drawn by the episode's seed."""
    rows = []
    for episode in sampler.propose():
        rng = np.random.default_rng(episode.seed)
        rows.append(0.6 + WORTH @ np.array(episode.counts) + noise * rng.normal(size=2))
    return np.array(rows)


def run(settings: SamplerSettings, noise: float = 0.0) -> tuple[ClassAdaptiveSampler, list[EpochRecord]]:
    sampler, records = ClassAdaptiveSampler(settings, num_classes=3), []
    while not sampler.is_done:
        records.append(sampler.observe(scored(sampler, noise)))
    return sampler, records


def test_the_bad_classs_count_goes_to_its_floor_and_the_good_ones_up_over_seeds() -> None:
    for seed in range(6):
        settings = SamplerSettings(num_epochs=60, initial_count=4, bounds=CountBounds(high=12), seed=seed)
        sampler, records = run(settings, noise=0.01)
        assert np.mean([record.counts[2] for record in records[-10:]]) <= 1, seed
        assert sampler.counts[:2].mean() >= 8, (seed, sampler.counts)


def test_the_learned_policy_itself_turns_against_the_bad_class() -> None:
    # Apart from the choice of the best episode: what the agents would do from the middle.
    middle, down = np.array([6, 6, 6]), []
    for seed in range(5):
        settings = SamplerSettings(num_epochs=80, initial_count=6, bounds=CountBounds(high=100), seed=seed)
        sampler = ClassAdaptiveSampler(settings, num_classes=3)
        while not sampler.is_done:
            sampler.counts = middle
            sampler.observe(scored(sampler, 0.005))
        down.append(sampler.policy.probabilities(middle)[2, 0])
    assert np.mean(down) > 0.6, down


def test_folds_alternate_between_paying_and_choosing() -> None:
    sampler = ClassAdaptiveSampler(SamplerSettings(policy="random"), num_classes=3)
    first_best, last_best = [[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]], [[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]]
    for epoch, (scores, best) in enumerate(
        [(first_best, 2), (first_best, 0), (last_best, 0), (last_best, 2)]
    ):
        record = sampler.observe(scores)
        assert (record.epoch, record.reward_fold, record.best) == (epoch, epoch % 2, best)
        assert record.counts == record.episodes[best].counts == tuple(sampler.counts)


def test_only_the_reward_fold_reaches_the_policy() -> None:
    def after(choosing: list[float]) -> np.ndarray:
        sampler = ClassAdaptiveSampler(SamplerSettings(seed=3), num_classes=3)
        sampler.observe(np.column_stack([[0.2, 0.5, 0.9], choosing]))
        return sampler.policy.probabilities(np.array([4, 4, 4]))

    assert (after([0.1, 0.2, 0.3]) == after([0.9, 0.2, 0.1])).all()


def test_ablations() -> None:
    fixed, records = run(SamplerSettings(policy="fixed", num_epochs=5))
    assert fixed.counts.tolist() == [2, 2, 2]
    assert len({episode.seed for record in records for episode in record.episodes}) == 15
    _, records = run(SamplerSettings(policy="none", num_epochs=5, bounds=CountBounds(low=2)))
    assert {episode.counts for record in records for episode in record.episodes} == {(0, 0, 0)}
    random, _ = run(SamplerSettings(policy="random", num_epochs=60, bounds=CountBounds(high=12)))
    assert random.counts[2] <= 2 and random.counts[:2].mean() >= 8  # best of K alone climbs too


def test_one_training_seed_per_epoch_makes_equal_actions_equal_episodes() -> None:
    sampler = ClassAdaptiveSampler(SamplerSettings(same_episode_seed=True), num_classes=3)
    assert len({episode.seed for episode in sampler.propose()}) == 1
    before = sampler.propose()[0].seed
    sampler.observe(scored(sampler))
    assert sampler.propose()[0].seed != before
    assert sampler.propose() == sampler.propose()
    with pytest.raises(ValueError, match="one and the same"):
        SamplerSettings(policy="fixed", same_episode_seed=True)


@pytest.mark.parametrize("policy", ["learned", "random", "fixed", "none"])
def test_resuming_through_json_gives_the_uninterrupted_run(policy: str) -> None:
    settings = SamplerSettings(policy=policy, num_epochs=12, learning=Learning(form="mlp"))
    _, whole = run(settings, noise=0.02)
    first = ClassAdaptiveSampler(settings, num_classes=3)
    for _ in range(5):
        first.observe(scored(first, 0.02))
    second = ClassAdaptiveSampler(settings, num_classes=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = []
    while not second.is_done:
        rest.append(second.observe(scored(second, 0.02)))
    assert rest == whole[5:]


def test_a_state_of_other_settings_is_refused_but_more_epochs_are_not() -> None:
    state = ClassAdaptiveSampler(SamplerSettings(num_epochs=3), num_classes=3).state_dict()
    ClassAdaptiveSampler(SamplerSettings(num_epochs=9), num_classes=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\)"):
        ClassAdaptiveSampler(SamplerSettings(seed=1), num_classes=3).load_state_dict(state)
    with pytest.raises(ValueError, match="num_classes 3"):
        ClassAdaptiveSampler(SamplerSettings(), num_classes=2).load_state_dict(state)


def test_scores_that_do_not_fit_are_refused_and_change_nothing() -> None:
    sampler = ClassAdaptiveSampler(SamplerSettings(num_epochs=1), num_classes=3)
    before = sampler.state_dict()
    for bad in (np.ones((2, 2)), np.ones((3, 1)), np.full((3, 2), np.nan)):
        with pytest.raises(ValueError, match="scores: want finite"):
            sampler.observe(bad)
    assert sampler.state_dict() == before
    sampler.observe(np.ones((3, 2)))
    with pytest.raises(ValueError, match="epochs are done"):
        sampler.propose()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"policy": "greedy"}, "policy"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"num_episodes": 1}, "num_episodes"),
        ({"initial_count": 20}, "initial_count"),
    ],
)
def test_settings_are_checked(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**bad)
