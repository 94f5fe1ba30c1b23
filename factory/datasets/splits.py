"""Train, validation and test: whole groups, classes balanced, the same for the same seed."""

from collections.abc import Sequence

import numpy as np

from schemas.sample import SPLITS

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ValueError unless `fractions` are three positive shares for train, val, test that sum to one."""
    if len(fractions) != len(SPLITS) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"--split-fractions {' '.join(map(str, fractions))}: want three positive numbers for "
            f"{', '.join(SPLITS)} that sum to 1, e.g. 0.7 0.1 0.2"
        )


def assign_splits(
    groups: np.ndarray,
    labels: np.ndarray,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> np.ndarray:
    """Split of every image, whole groups together.

    Groups are placed one by one, large ones first and equal ones in an order drawn from `seed`, each where it
    leaves the counts per class nearest to their targets. A group larger than a split's share therefore goes to
    a split that can hold it, in practice train.

    Args:
        groups: (N,) int, group of each image.
        labels: (N,) int, class of each image; a group may hold several.
        fractions: shares of train, val, test.
        seed: of the order.

    Returns:
        (N,) array of "train", "val", "test".

    Raises:
        ValueError: bad fractions, or fewer groups than splits.
    """
    check_fractions(fractions)
    names, member = np.unique(groups, return_inverse=True)
    if len(names) < len(SPLITS):
        raise ValueError(
            f"{len(names)} group(s) of images cannot fill {len(SPLITS)} splits: add images of other patients"
        )
    classes, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (member, label), 1)
    total = counts.sum(axis=0)
    targets = np.outer(fractions, total)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(names))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    held = np.zeros_like(targets)
    place = np.zeros(len(names), np.intp)
    for group in order:
        place[group] = _best_split(held, targets, counts[group])
        held[place[group]] += counts[group]
    return np.asarray(SPLITS)[place[member]]


def _best_split(held: np.ndarray, targets: np.ndarray, group: np.ndarray) -> int:
    """Split whose missing share of the group's classes is largest, unless the group would overfill it."""
    weight = group / group.sum()
    missing = ((targets - held) / np.maximum(targets, 1e-9)) @ weight
    overfill = np.maximum(held + group - targets, 0) @ weight / np.maximum(group.sum(), 1)
    return int(np.argmax(missing - 2 * overfill))
