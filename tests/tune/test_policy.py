"""REINFORCE agents: what must hold of their gradients, baseline, bounds, learning and resuming."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from tune.policy import (
    ACTIONS,
    CountBounds,
    FixedCounts,
    Learning,
    RandomActions,
    Reinforce,
    choose,
    rewards_of,
)

torch.set_num_threads(1)
PAPER = Learning(learning_rate=1e-3, reward="paper")
WIDE = CountBounds(low=0, high=100)
START = np.array([50, 50])


def agents(learning: Learning = PAPER, *, num_classes: int = 2, seed: int = 0) -> Reinforce:
    return Reinforce(num_classes=num_classes, bounds=WIDE, learning=learning, seed=seed)


def bandit(policy: Reinforce, updates: int, *, num_episodes: int = 3) -> None:
    """The first agent is paid for +2, the second for −2, on top of each other; no noise, no state."""
    for epoch in range(updates):
        actions = policy.act(START, epoch=epoch, num_episodes=num_episodes)
        scores = 0.3 + 0.2 * (actions[:, 0] == 2) + 0.2 * (actions[:, 1] == 0)
        policy.update(START, actions, scores)


def right(policy: Reinforce) -> np.ndarray:
    return policy.probabilities(START)[[0, 1], [2, 0]]


@pytest.mark.parametrize("gamma", [0.99, 0.3])
def test_the_baseline_is_a_weighted_sum_of_past_mean_rewards(gamma: float) -> None:
    policy = agents(Learning(gamma=gamma, reward="paper"))
    rng, means = np.random.default_rng(0), []
    for epoch in range(12):
        scores = rng.random(3)
        policy.update(START, policy.act(START, epoch=epoch, num_episodes=3), scores)
        means.append(((scores + 0.04) ** 3).mean())
        expected = gamma * sum((1 - gamma) ** (epoch - k) * mean for k, mean in enumerate(means))
        assert policy.baseline == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["logits", "mlp"])
@pytest.mark.parametrize("reward", ["paper", "standardised"])
def test_a_bandit_is_learned_at_five_hundredths(form: str, reward: str) -> None:
    for seed in range(2):
        policy = agents(Learning(form=form, reward=reward), seed=seed)
        bandit(policy, 200)
        assert (right(policy) > 0.9).all(), (seed, right(policy))


def test_at_the_papers_rate_thirty_updates_hardly_move_the_policy() -> None:
    for seed in range(3):
        policy = agents(seed=seed)
        bandit(policy, 30)
        assert policy.probabilities(START).max() <= 0.3475
    # Not for want of signal: the same number of updates at .05 does move it.
    quick = agents(Learning(reward="paper"))
    bandit(quick, 30)
    assert right(quick).min() > 0.4


@pytest.mark.parametrize("form", ["logits", "mlp"])
def test_no_gradient_crosses_from_one_agent_to_another(form: str) -> None:
    policy = agents(Learning(form=form), num_classes=3)
    counts = np.array([4, 8, 12])
    for agent in range(3):
        policy.optimizer.zero_grad()
        policy.log_probabilities(counts)[agent, 2].backward()
        for name, value in policy.network.named_parameters():
            assert value.grad is not None, name
            others = [c for c in range(3) if c != agent]
            assert (value.grad[others] == 0).all(), name
        last = list(policy.network.parameters())[-1].grad
        assert last is not None and (last[agent] != 0).any()


@pytest.mark.parametrize(("num_episodes", "gamma"), [(3, 0.99), (2, 0.99), (3, 0.5)])
def test_the_expected_gradient_is_scaled_by_one_minus_gamma_over_k(num_episodes: int, gamma: float) -> None:
    policy = agents(Learning(gamma=gamma, reward="paper"), num_classes=1)
    with torch.no_grad():
        policy.network.logits.copy_(torch.tensor([[0.3, -0.2, 0.5]]))
    counts, paid = np.array([50]), np.array([0.2, 0.7, 0.4])
    p = policy.probabilities(counts)[0]

    def gradient(actions: np.ndarray, advantages: np.ndarray) -> np.ndarray:
        policy.optimizer.zero_grad()
        policy.surrogate(counts, actions[:, None], advantages).backward()
        return policy.network.logits.grad[0].double().numpy().copy()

    true, estimated = np.zeros(3), np.zeros(3)
    for action in range(3):
        true += p[action] * gradient(np.array([action]), paid[[action]])
    for joint in product(range(3), repeat=num_episodes):
        rewards = paid[list(joint)]
        baseline = (1 - gamma) * 0.123 + gamma * rewards.mean()
        estimated += p[list(joint)].prod() * gradient(np.array(joint), rewards - baseline)
    np.testing.assert_allclose(estimated, (1 - gamma / num_episodes) * true, atol=1e-7)


def test_actions_come_as_often_as_their_probabilities_say() -> None:
    p = np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.6, 0.4, 0.0]])
    drawn = choose(p, np.random.default_rng(0).random((20_000, 3)))
    found = np.stack([np.bincount(drawn[:, c], minlength=3) / 20_000 for c in range(3)])
    np.testing.assert_allclose(found, p, atol=0.015)
    assert (found[p == 0] == 0).all()


def test_counts_stay_within_bounds_and_actions_without_effect_are_never_taken() -> None:
    bounds = CountBounds(low=1, high=6)
    assert bounds.allowed(np.array([1, 2, 5, 6])).tolist() == [
        [False, True, True],
        [True, True, True],
        [True, True, True],
        [True, True, False],
    ]
    for policy in (
        Reinforce(num_classes=4, bounds=bounds, learning=Learning()),
        RandomActions(num_classes=4, bounds=bounds),
    ):
        counts = np.array([2, 2, 2, 2])
        for epoch in range(60):
            actions = policy.act(counts, epoch=epoch, num_episodes=3)
            after = bounds.apply(counts, actions)
            assert ((after >= 1) & (after <= 6)).all()
            assert ((after != counts) | (ACTIONS[actions] == 0)).all()
            policy.update(counts, actions, np.random.default_rng(epoch).random(3))
            counts = after[epoch % 3]
    learned = Reinforce(num_classes=4, bounds=bounds, learning=Learning())
    assert learned.probabilities(np.array([1, 2, 5, 6]))[0] == pytest.approx([0, 0.5, 0.5], abs=1e-3)
    with pytest.raises(ValueError, match="rule out"):
        learned.update(np.array([1, 2, 5, 6]), np.zeros((3, 4), int), np.arange(3.0))


def test_equal_seeds_give_equal_actions_and_other_seeds_others() -> None:
    def run(seed: int) -> list:
        policy = agents(Learning(), seed=seed)
        actions = [policy.act(START, epoch=0, num_episodes=3)]
        bandit(policy, 5)
        return [*actions, policy.act(START, epoch=5, num_episodes=3), policy.probabilities(START)]

    assert all((one == two).all() for one, two in zip(run(1), run(1)))
    assert any((one != two).any() for one, two in zip(run(1), run(2)))


@pytest.mark.parametrize("form", ["logits", "mlp"])
def test_resuming_through_json_is_bit_exact(form: str) -> None:
    whole, first = agents(Learning(form=form)), agents(Learning(form=form))
    bandit(whole, 9)
    bandit(first, 9)
    second = agents(Learning(form=form), seed=0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for policy in (whole, second):
        bandit(policy, 7)
    assert (whole.probabilities(START) == second.probabilities(START)).all()
    assert whole.state_dict() == second.state_dict()
    with pytest.raises(ValueError, match="another policy"):
        agents(Learning(form="mlp" if form == "logits" else "logits")).load_state_dict(first.state_dict())


def test_resuming_before_the_first_update_is_exact_too() -> None:
    whole, second = agents(Learning()), agents(Learning(), seed=0)
    second.load_state_dict(json.loads(json.dumps(agents(Learning()).state_dict())))
    bandit(whole, 3)
    bandit(second, 3)
    assert whole.state_dict() == second.state_dict()


def test_rewards() -> None:
    assert rewards_of(np.array([0.46, 0.96]), "paper") == pytest.approx([0.125, 1.0])
    standard = rewards_of(np.array([0.80, 0.81, 0.85]), "standardised")
    assert (standard.mean(), standard.std()) == pytest.approx((0, 1))
    assert standard == pytest.approx(rewards_of(np.array([0.08, 0.081, 0.085]), "standardised"))
    assert rewards_of(np.array([0.7, 0.7, 0.7]), "standardised") == pytest.approx([0, 0, 0])
    with pytest.raises(ValueError, match="one episode"):
        rewards_of(np.array([0.7]), "standardised")
    with pytest.raises(ValueError, match="finite"):
        rewards_of(np.array([0.7, np.nan]), "paper")


def test_ablations_learn_nothing_and_refuse_a_learned_state() -> None:
    fixed, random = FixedCounts(num_classes=2), RandomActions(num_classes=2, bounds=WIDE)
    assert (ACTIONS[fixed.act(START, epoch=3, num_episodes=4)] == 0).all()
    drawn = np.concatenate([random.act(START, epoch=epoch, num_episodes=100) for epoch in range(10)])
    assert np.bincount(drawn.ravel()) / drawn.size == pytest.approx([1 / 3] * 3, abs=0.04)
    for policy in (fixed, random):
        assert policy.update(START, drawn[:3], np.arange(3.0)) == {}
        policy.load_state_dict(policy.state_dict())
        with pytest.raises(ValueError, match="learned policy"):
            policy.load_state_dict(agents().state_dict())


@pytest.mark.parametrize(
    "bad",
    [
        {"form": "table"},
        {"reward": "sum"},
        {"learning_rate": 0},
        {"gamma": 1.5},
        {"hidden": 0},
    ],
)
def test_settings_of_learning_are_checked(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"Learning.{next(iter(bad))}"):
        Learning(**bad)
    with pytest.raises(ValueError, match="CountBounds"):
        CountBounds(low=3, high=1)
