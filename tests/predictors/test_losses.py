"""Long-tail losses against their closed forms."""

import math

import numpy as np
import pytest
import torch

from factory.predictors.losses import (
    BalancedSoftmax,
    ClassBalancedFocal,
    CrossEntropy,
    DiceCrossEntropy,
    LogitAdjustment,
    TaskLoss,
    class_balanced_weights,
    composed_counts,
    resampling_weights,
)

torch.set_num_threads(1)
COUNTS = [500, 60, 8]
ALL: list[TaskLoss] = [CrossEntropy(), BalancedSoftmax(), LogitAdjustment(tau=0.7), ClassBalancedFocal()]


def batch(size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return 3 * torch.randn(size, 3, generator=rng), torch.arange(size) % 3


def closed(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_cross_entropy_and_balanced_softmax_are_their_closed_forms() -> None:
    logits, labels = batch()
    plain, balanced = [], []
    for z, y in zip(logits.tolist(), labels.tolist()):
        plain.append(-math.log(math.exp(z[y]) / sum(math.exp(v) for v in z)))
        balanced.append(
            -math.log(COUNTS[y] * math.exp(z[y]) / sum(n * math.exp(v) for n, v in zip(COUNTS, z)))
        )
    torch.testing.assert_close(CrossEntropy().loss(logits, labels, COUNTS), closed(plain))
    torch.testing.assert_close(BalancedSoftmax().loss(logits, labels, COUNTS), closed(balanced))


def test_logit_adjustment_is_its_closed_form_and_balanced_softmax_at_one() -> None:
    logits, labels = batch()
    shares = [n / sum(COUNTS) for n in COUNTS]
    expected = [
        math.log(1 + sum((shares[c] / shares[y]) ** 0.7 * math.exp(z[c] - z[y]) for c in range(3) if c != y))
        for z, y in zip(logits.tolist(), labels.tolist())
    ]
    torch.testing.assert_close(LogitAdjustment(tau=0.7).loss(logits, labels, COUNTS), closed(expected))
    torch.testing.assert_close(
        LogitAdjustment().loss(logits, labels, COUNTS), BalancedSoftmax().loss(logits, labels, COUNTS)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_class_balanced_focal_is_its_closed_form(gamma: float) -> None:
    logits, labels = batch()
    beta = 0.99
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    expected = []
    for z, y in zip(logits.tolist(), labels.tolist()):
        p = [1 / (1 + math.exp(-v if c == y else v)) for c, v in enumerate(z)]
        expected.append(raw[y] * 3 / sum(raw) * sum(-((1 - q) ** gamma) * math.log(q) for q in p))
    found = ClassBalancedFocal(beta=beta, gamma=gamma).loss(logits, labels, COUNTS)
    torch.testing.assert_close(found, closed(expected), rtol=1e-4, atol=1e-6)


def test_equal_counts_make_balanced_softmax_and_logit_adjustment_cross_entropy() -> None:
    logits, labels = batch()
    plain = CrossEntropy().loss(logits, labels, [40, 40, 40])
    for loss in (BalancedSoftmax(), LogitAdjustment(tau=2.0)):
        torch.testing.assert_close(loss.loss(logits, labels, [40, 40, 40]), plain)


def test_balanced_softmax_learns_scores_for_a_uniform_prior() -> None:
    # Without features, the best plain logits are log n_c and the best balanced ones are equal.
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    for loss, expected in (
        (CrossEntropy(), np.log(np.array(COUNTS) / 568)),
        (BalancedSoftmax(), np.zeros(3)),
    ):
        logits = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=50, line_search_fn="strong_wolfe")

        def closure(loss: TaskLoss = loss, logits: torch.Tensor = logits) -> torch.Tensor:
            value = loss.loss(logits.expand(len(labels), 3), labels, COUNTS).mean()
            logits.grad = torch.autograd.grad(value, logits)[0]
            return value

        optimizer.step(closure)
        found = logits.detach().numpy()
        np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=1e-2)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_a_batch_twice_gives_the_same_mean_and_extreme_logits_finite_gradients(loss: TaskLoss) -> None:
    logits, labels = batch()
    once = loss.loss(logits, labels, COUNTS)
    assert once.shape == (12,) and once.dtype == torch.float32
    twice = loss.loss(torch.cat([logits, logits]), torch.cat([labels, labels]), COUNTS)
    torch.testing.assert_close(twice.mean(), once.mean())
    far = (logits.bfloat16() * 100).requires_grad_()
    loss.loss(far, labels, COUNTS).mean().backward()
    assert far.grad is not None and torch.isfinite(far.grad).all()


def test_class_balanced_weights_go_from_none_to_inverse_frequency() -> None:
    assert class_balanced_weights(COUNTS, beta=0.0) == pytest.approx([1, 1, 1])
    inverse = 1 / np.array(COUNTS)
    assert class_balanced_weights(COUNTS, beta=1 - 1e-9) == pytest.approx(
        inverse * 3 / inverse.sum(), rel=1e-5
    )


def test_the_prior_is_that_of_the_composed_batch() -> None:
    counts = composed_counts([80, 15, 5], real_per_batch=20, synthetic_per_batch=[0, 4, 8])
    assert counts == pytest.approx([16, 7, 9])
    logits, labels = batch()
    # Synthetic rows that even the batch out leave nothing for the prior to correct: not corrected twice.
    even = composed_counts([80, 15, 5], real_per_batch=20, synthetic_per_batch=[0, 13, 15])
    torch.testing.assert_close(
        BalancedSoftmax().loss(logits, labels, even), CrossEntropy().loss(logits, labels, even)
    )
    assert composed_counts([7, 0], real_per_batch=0, synthetic_per_batch=[3, 5]) == pytest.approx([3, 5])


def test_resampling_draws_every_class_alike_or_by_the_power() -> None:
    labels = np.repeat([0, 1, 2], [16, 4, 1])
    for power, shares in ((1.0, [1, 1, 1]), (0.0, [16, 4, 1]), (0.5, [4, 2, 1])):
        weights = resampling_weights(labels, 3, power=power)
        found = np.bincount(labels, weights=weights)
        assert found == pytest.approx(np.array(shares) / sum(shares))


def test_what_has_no_prior_is_refused() -> None:
    logits, labels = batch()
    for loss in ALL:
        with pytest.raises(ValueError, match="class 1 has 0 rows"):
            loss.loss(logits, labels, [5, 0, 5])
        with pytest.raises(ValueError, match="logits: want"):
            loss.loss(logits, labels, [5, 5])
    with pytest.raises(ValueError, match="class 2 has 0 rows"):
        composed_counts([5, 5, 0], real_per_batch=4, synthetic_per_batch=[1, 1, 0])
    with pytest.raises(ValueError, match="class 1 has 0 rows"):
        resampling_weights([0, 2, 2], 3)
    for bad in (lambda: ClassBalancedFocal(beta=1.0), lambda: LogitAdjustment(tau=-1)):
        with pytest.raises(ValueError, match="want"):
            bad()


def test_dice_cross_entropy_is_its_closed_form() -> None:
    rng = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn((3, 1, 4, 4), generator=rng)
    masks = (torch.rand((3, 4, 4), generator=rng) > 0.6).float()
    masks[2] = 0  # no lesion: a loss all the same
    expected = []
    for scores, truth in zip(logits.flatten(1).tolist(), masks.flatten(1).tolist()):
        p = [1 / (1 + math.exp(-z)) for z in scores]
        entropy = -sum(math.log(q if g else 1 - q) for q, g in zip(p, truth)) / 16
        dice = (2 * sum(q * g for q, g in zip(p, truth)) + 1) / (sum(p) + sum(truth) + 1)
        expected.append(0.5 * (1 - dice) + 2 * entropy)
    loss = DiceCrossEntropy(dice_weight=0.5, cross_entropy_weight=2.0)
    torch.testing.assert_close(loss.loss(logits, masks), closed(expected))
    sure = DiceCrossEntropy().loss(40 * (2 * masks[:2, None] - 1), masks[:2])
    torch.testing.assert_close(sure, torch.zeros(2), atol=1e-6, rtol=0)


def test_dice_cross_entropy_refuses_other_shapes_and_no_weight() -> None:
    with pytest.raises(ValueError, match=r"logits: want \(B, 1, S, S\)"):
        DiceCrossEntropy().loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="two weights ≥ 0, not both 0"):
        DiceCrossEntropy(dice_weight=0, cross_entropy_weight=0)
