"""Does a generator lie closer to the images it was trained on than to images it never saw?

The sign of memorising that needs no single copy: for every synthetic image, how similar its nearest training image
is, against how similar its nearest held-out image is, with as many references on both sides. Where the generator has
learned the distribution and no more, training and held-out groups could be exchanged; so their labels are permuted.
A pass says "not detected", at the power that planted copies show, and nothing more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_GROUPS = 10
_PLANTED_NOISE = 0.2


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """Outcome of the test.

    Attributes:
        difference: mean over synthetic images of (similarity to the nearest training reference − to the nearest
            held-out reference), cosine.
        p_value: one-sided: share of permuted references with at least this difference.
        num_references: references on each side, one image per group.
        num_synthetic: images looked at.
        planted: share of planted near-copies → p-value with them: the power of the test on this data.
        control: p-value of real training images that are no reference, in the place of the synthetic ones; NaN where
            too few are left.
    """

    difference: float
    p_value: float
    num_references: int
    num_synthetic: int
    planted: dict[float, float]
    control: float

    def is_detected(self, level: float = 0.01) -> bool:
        """Whether the generator lies closer to its training images than chance allows."""
        return self.p_value <= level


def compare_closeness(
    synthetic: np.ndarray,
    training: np.ndarray,
    training_groups: Sequence[str],
    held_out: np.ndarray,
    held_out_groups: Sequence[str],
    *,
    num_permutations: int = 999,
    max_synthetic: int = 1000,
    planted_shares: Sequence[float] = (0.05, 0.2),
    seed: int = 0,
) -> Closeness | None:
    """Compare nearest similarities to training and held-out images; None with fewer than 10 groups on a side.

    Args:
        synthetic: unit-norm embeddings (M, D); at most `max_synthetic` of them are drawn.
        training, held_out: unit-norm embeddings (n, D), (m, D) of real images; held-out ones from the validation
            split, never from the test split.
        training_groups, held_out_groups: patient and near-duplicate group of each; one image per group is used.
        num_permutations: of the references' sides.
        planted_shares: shares of the synthetic images that are replaced by noisy training references to show what
            would be found.
        seed: of every draw.

    Raises:
        ValueError: the embeddings are of different widths, or there is no synthetic image.
    """
    widths = {x.shape[1] for x in (synthetic, training, held_out) if x.ndim == 2}
    if len(widths) != 1 or not len(synthetic):
        raise ValueError(
            f"embeddings: want (N, D) of one width and some synthetic images, got {synthetic.shape}, "
            f"{training.shape}, {held_out.shape}"
        )
    rng = np.random.default_rng(seed)
    drawn = _draw(
        synthetic, training, training_groups, held_out, held_out_groups, max_synthetic=max_synthetic, rng=rng
    )
    if drawn is None:
        return None
    queries, references, count = drawn.queries, drawn.references, drawn.count
    sides = [rng.permutation(2 * count) for _ in range(num_permutations)]
    difference, p_value = _test(queries @ references.T, sides)
    planted = {}
    for share in planted_shares:
        copies = queries.copy()
        places = rng.permutation(len(copies))[: max(1, round(share * len(copies)))]
        copies[places] = _noisy(references[rng.integers(count, size=len(places))], rng)
        planted[float(share)] = _test(copies @ references.T, sides)[1]
    others = training[drawn.spare].astype(np.float32)
    control = _test(others @ references.T, sides)[1] if len(others) >= MIN_GROUPS else float("nan")
    return Closeness(
        difference=difference,
        p_value=p_value,
        num_references=count,
        num_synthetic=len(queries),
        planted=planted,
        control=control,
    )


def reference_similarities(
    synthetic: np.ndarray,
    training: np.ndarray,
    training_groups: Sequence[str],
    held_out: np.ndarray,
    held_out_groups: Sequence[str],
    *,
    max_synthetic: int = 1000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray] | None:
    """What `compare_closeness` compares: similarity of each synthetic image to the nearest training reference, and to
    the nearest held-out one, float32 (M,) each; None where there are too few groups. Arguments are the same.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw(
        synthetic, training, training_groups, held_out, held_out_groups, max_synthetic=max_synthetic, rng=rng
    )
    if drawn is None:
        return None
    similarity = drawn.queries @ drawn.references.T
    return similarity[:, : drawn.count].max(axis=1), similarity[:, drawn.count :].max(axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """Queries (M, D); references (2n, D), training first; n; training rows that are no reference."""

    queries: np.ndarray
    references: np.ndarray
    count: int
    spare: np.ndarray


def _draw(
    synthetic: np.ndarray,
    training: np.ndarray,
    training_groups: Sequence[str],
    held_out: np.ndarray,
    held_out_groups: Sequence[str],
    *,
    max_synthetic: int,
    rng: np.random.Generator,
) -> _Drawn | None:
    """As many training as held-out references, one per group; and some synthetic rows."""
    train_one, held_one = _one_per_group(training_groups, rng), _one_per_group(held_out_groups, rng)
    count = min(len(train_one), len(held_one))
    if count < MIN_GROUPS:
        return None
    train_one, held_one = rng.permutation(train_one), rng.permutation(held_one)[:count]
    chosen = rng.permutation(len(synthetic))[:max_synthetic]
    return _Drawn(
        queries=synthetic[chosen].astype(np.float32),
        references=np.concatenate([training[train_one[:count]], held_out[held_one]]).astype(np.float32),
        count=count,
        spare=train_one[count : 2 * count],
    )


def _one_per_group(groups: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """The place of one member of each group, in random order."""
    order = rng.permutation(len(groups))
    first = {groups[place]: place for place in order}
    return np.array(sorted(first.values()), np.int64)


def _noisy(references: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """References turned by a random direction, unit norm: what a slightly changed copy looks like."""
    noise = rng.standard_normal(references.shape).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    changed = references + _PLANTED_NOISE * noise
    return changed / np.linalg.norm(changed, axis=1, keepdims=True)


def _test(similarity: np.ndarray, sides: Sequence[np.ndarray]) -> tuple[float, float]:
    """Difference and p-value for similarities (M, 2n), the training references first."""
    half = similarity.shape[1] // 2

    def difference(order: np.ndarray) -> float:
        return float(
            (similarity[:, order[:half]].max(axis=1) - similarity[:, order[half:]].max(axis=1)).mean()
        )

    observed = difference(np.arange(2 * half))
    at_least = sum(difference(order) >= observed - 1e-12 for order in sides)
    return observed, (1 + at_least) / (1 + len(sides))
