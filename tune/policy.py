"""Policies of the class-adaptive sampler: how many synthetic images of each class join a batch (paper 000, RL-CAS).

One agent per class picks from {−2, 0, +2}. The agents share a reward and nothing else: each is plain REINFORCE, and
no gradient crosses between them. Next to the learned policy stand the ablations that say whether learning matters:
random actions, a fixed ratio, no synthetic images, all with the same best of K episodes.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from schemas.identity import random_generator, torch_seed

if TYPE_CHECKING:
    from torch import Tensor, nn

ACTIONS = np.array([-2, 0, 2])
"""Change of a class's synthetic count per batch, by action number."""


@dataclass(frozen=True, kw_only=True)
class CountBounds:
    """Synthetic images of each class in a batch stay within low … high."""

    low: int = 0
    high: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"CountBounds: want 0 ≤ low ≤ high, got {self.low} and {self.high}")

    def apply(self, counts: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Counts after the actions (numbers 0, 1, 2), int64 (…, C), clipped."""
        return np.clip(counts + ACTIONS[actions], self.low, self.high)

    def allowed(self, counts: np.ndarray) -> np.ndarray:
        """Actions that do something, bool (C, 3): those the bounds turn into staying are out, staying is in.

        Without this an agent at its bound is paid for an action that changes nothing.
        """
        after = np.clip(counts[:, None] + ACTIONS, self.low, self.high)
        return (after != counts[:, None]) | (ACTIONS == 0)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the learned policy is updated.

    Attributes:
        form: "logits", three free numbers per agent; "mlp", a small network per agent on the counts of all classes.
        learning_rate: of Adam. The paper's 1e-3 with free logits moves a probability from .333 to at most .347 in
            30 updates; .05 is the smallest round rate that learns within such a budget.
        gamma: weight of the newest mean reward in the baseline.
        reward: "standardised" within the K episodes, since one image of a small validation set is a whole step of
            the score; "paper" is (score + 0.04)³.
        hidden: width of "mlp".
    """

    form: Literal["logits", "mlp"] = "logits"
    learning_rate: float = 0.05
    gamma: float = 0.99
    reward: Literal["standardised", "paper"] = "standardised"
    hidden: int = 16

    def __post_init__(self) -> None:
        if self.form not in ("logits", "mlp"):
            raise ValueError(f"Learning.form: want 'logits' or 'mlp', got {self.form!r}")
        if self.reward not in ("standardised", "paper"):
            raise ValueError(f"Learning.reward: want 'standardised' or 'paper', got {self.reward!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"Learning.learning_rate: want a positive number, got {self.learning_rate}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"Learning.gamma: want 0 … 1, got {self.gamma}")
        if self.hidden < 1:
            raise ValueError(f"Learning.hidden: want at least 1, got {self.hidden}")


def rewards_of(scores: np.ndarray, kind: Literal["standardised", "paper"]) -> np.ndarray:
    """Rewards of the K episodes of an epoch, float64 (K,), from validation scores (K,).

    "standardised": (ε − mean) / standard deviation over the K, zeros where all are equal; needs K ≥ 2.
    "paper": (ε + 0.04)³.

    Raises:
        ValueError: scores that are not finite, or one episode to standardise.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"scores: want finite (K,), got {scores}")
    if kind == "paper":
        return (values + 0.04) ** 3
    if len(values) < 2:
        raise ValueError("scores: one episode cannot be standardised; use 2 or more, or the paper's reward")
    spread = values.std()
    return (values - values.mean()) / spread if spread > 1e-12 else np.zeros_like(values)


def choose(probabilities: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Action numbers int64 (K, C) from probabilities (C, 3) and uniform draws (K, C); never one of probability 0."""
    edges = probabilities.cumsum(axis=1)
    edges /= edges[:, -1:]
    return (uniforms[:, :, None] >= edges[None]).sum(axis=2)


def _uniforms(seed: int, epoch: int, num_episodes: int, num_classes: int) -> np.ndarray:
    # A function of (seed, epoch), with no state: resuming draws what the uninterrupted run would have drawn.
    return random_generator(f"sampler/{seed}/{epoch}", "actions").random((num_episodes, num_classes))


def _logits(learning: Learning, num_classes: int, seed: int) -> "nn.Module":
    """A module from counts, float32 (C,) scaled to 0 … 1, to logits (C, 3), with parameters apart for each agent."""
    import torch
    from torch import nn

    rng = torch.Generator().manual_seed(torch_seed(f"sampler/{seed}", "policy"))

    class FreeLogits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(1e-3 * torch.randn(num_classes, 3, generator=rng))

        def forward(self, counts: "Tensor") -> "Tensor":
            return self.logits

    class Networks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = torch.randn(num_classes, num_classes, learning.hidden, generator=rng)
            last = torch.randn(num_classes, learning.hidden, 3, generator=rng)
            self.first = nn.Parameter(first / math.sqrt(num_classes))
            self.first_bias = nn.Parameter(torch.zeros(num_classes, learning.hidden))
            self.last = nn.Parameter(1e-3 * last)
            self.last_bias = nn.Parameter(torch.zeros(num_classes, 3))

        def forward(self, counts: "Tensor") -> "Tensor":
            hidden = torch.tanh(torch.einsum("s,csh->ch", counts, self.first) + self.first_bias)
            return torch.einsum("ch,cha->ca", hidden, self.last) + self.last_bias

    return FreeLogits() if learning.form == "logits" else Networks()


class Reinforce:
    """C independent REINFORCE agents with a shared reward and the paper's moving baseline.

    The update maximises (1/K) Σ_k (R_k − B_t) Σ_c log π_c(a_kc) with B_t = (1 − γ) B_{t−1} + γ R̄_t and B_0 = 0.
    As B_t holds R̄_t, the expected gradient is 1 − γ/K times the true one: same direction, smaller.

    Args:
        num_classes: C.
        bounds: actions that these make ineffective have probability 0.
        learning: form, rate, baseline, reward.
        seed: of the initial parameters and of the actions.
    """

    def __init__(self, *, num_classes: int, bounds: CountBounds, learning: Learning, seed: int = 0) -> None:
        from torch.optim import Adam

        if num_classes < 1:
            raise ValueError(f"num_classes: want at least 1, got {num_classes}")
        self.num_classes, self.bounds, self.learning, self.seed = num_classes, bounds, learning, seed
        self.network = _logits(learning, num_classes, seed)
        self.optimizer = Adam(self.network.parameters(), lr=learning.learning_rate)
        self.baseline = 0.0

    def log_probabilities(self, counts: np.ndarray) -> "Tensor":
        """Of each agent's actions, float32 (C, 3), minus infinity where the bounds rule one out."""
        import torch

        scaled = torch.as_tensor(counts / max(self.bounds.high, 1), dtype=torch.float32)
        allowed = torch.as_tensor(self.bounds.allowed(counts))
        return self.network(scaled).masked_fill(~allowed, -math.inf).log_softmax(dim=1)

    def probabilities(self, counts: np.ndarray) -> np.ndarray:
        """Of each agent's actions, float64 (C, 3), rows summing to 1."""
        return self.log_probabilities(counts).detach().double().exp().numpy()

    def act(self, counts: np.ndarray, *, epoch: int, num_episodes: int) -> np.ndarray:
        """Joint actions of the K episodes of an epoch, numbers int64 (K, C)."""
        return choose(self.probabilities(counts), _uniforms(self.seed, epoch, num_episodes, self.num_classes))

    def surrogate(self, counts: np.ndarray, actions: np.ndarray, advantages: np.ndarray) -> "Tensor":
        """The scalar whose negative gradient is the REINFORCE estimate, for actions (K, C), advantages (K,)."""
        import torch

        chosen = self.log_probabilities(counts)[torch.arange(self.num_classes), torch.as_tensor(actions)]
        return -(torch.as_tensor(advantages, dtype=torch.float32) * chosen.sum(dim=1)).mean()

    def update(self, counts: np.ndarray, actions: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """One Adam step from the scores (K,) of the episodes that took these actions (K, C) from these counts.

        Returns:
            reward_mean, baseline, entropy (mean over agents before the step, nats).

        Raises:
            ValueError: an action that the bounds rule out, or shapes that do not agree.
        """
        actions = np.asarray(actions)
        if actions.shape != (len(scores), self.num_classes):
            raise ValueError(f"actions: want ({len(scores)}, {self.num_classes}), got {actions.shape}")
        if not self.bounds.allowed(counts)[np.arange(self.num_classes), actions].all():
            raise ValueError(
                f"actions: {actions.tolist()} holds one that the bounds rule out at {counts.tolist()}"
            )
        rewards = rewards_of(scores, self.learning.reward)
        mean = float(rewards.mean())
        self.baseline = (1 - self.learning.gamma) * self.baseline + self.learning.gamma * mean
        before = self.probabilities(counts)
        self.optimizer.zero_grad(set_to_none=True)
        self.surrogate(counts, actions, rewards - self.baseline).backward()
        self.optimizer.step()
        entropy = -(before * np.log(np.where(before > 0, before, 1))).sum(axis=1).mean()
        return {"reward_mean": mean, "baseline": self.baseline, "entropy": float(entropy)}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimizer and baseline as plain lists and numbers: exact as JSON, no pickle."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "parameters": {name: value.detach().tolist() for name, value in self.network.named_parameters()},
            "adam": [
                {key: value.tolist() for key, value in moments[place].items()} for place in sorted(moments)
            ],
            "baseline": self.baseline,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: the state of a policy of another form or number of classes.
        """
        import torch

        parameters = dict(self.network.named_parameters())
        found = {name: tuple(torch.tensor(value).shape) for name, value in state["parameters"].items()}
        wanted = {name: tuple(value.shape) for name, value in parameters.items()}
        if found != wanted:
            raise ValueError(f"state: parameters {found} are those of another policy; this one has {wanted}")
        with torch.no_grad():
            for name, value in state["parameters"].items():
                parameters[name].copy_(torch.tensor(value))
        whole = self.optimizer.state_dict()
        whole["state"] = {
            place: {key: torch.tensor(value, dtype=torch.float32) for key, value in moments.items()}
            for place, moments in enumerate(state["adam"])
        }
        self.optimizer.load_state_dict(whole)
        self.baseline = float(state["baseline"])


@dataclass(frozen=True, kw_only=True)
class RandomActions:
    """Actions drawn uniformly from those the bounds allow; learns nothing. With best of K it is population search."""

    num_classes: int
    bounds: CountBounds
    seed: int = 0

    def act(self, counts: np.ndarray, *, epoch: int, num_episodes: int) -> np.ndarray:
        """Joint actions of the K episodes of an epoch, numbers int64 (K, C)."""
        allowed = self.bounds.allowed(counts).astype(np.float64)
        uniforms = _uniforms(self.seed, epoch, num_episodes, self.num_classes)
        return choose(allowed / allowed.sum(axis=1, keepdims=True), uniforms)

    def update(self, counts: np.ndarray, actions: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore; a learned policy's state is refused."""
        _refuse_state(state)


@dataclass(frozen=True, kw_only=True)
class FixedCounts:
    """Counts stay as they start: a fixed ratio, or no synthetic images where they start at 0."""

    num_classes: int

    def act(self, counts: np.ndarray, *, epoch: int, num_episodes: int) -> np.ndarray:
        """Staying, in all K episodes, numbers int64 (K, C)."""
        return np.full((num_episodes, self.num_classes), int(np.flatnonzero(ACTIONS == 0)[0]))

    def update(self, counts: np.ndarray, actions: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore; a learned policy's state is refused."""
        _refuse_state(state)


def _refuse_state(state: dict[str, Any]) -> None:
    if state:
        raise ValueError(f"state: {sorted(state)} belong to a learned policy, and this one learns nothing")


Policy = Reinforce | RandomActions | FixedCounts
