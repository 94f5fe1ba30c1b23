"""Train, validation and test, the reserve, and folds: whole groups, classes balanced, the same for the same seed."""

import hashlib
from collections.abc import Sequence

import numpy as np

from schemas.sample import SPLITS

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
DRAWN_SPLITS = SPLITS[:3]
"""What the fractions share out; `reserve` is cut from train afterwards."""


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ValueError unless `fractions` are three positive shares for train, val, test that sum to one."""
    if len(fractions) != len(DRAWN_SPLITS) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"--split-fractions {' '.join(map(str, fractions))}: want three positive numbers for "
            f"{', '.join(DRAWN_SPLITS)} that sum to 1, e.g. 0.7 0.1 0.2"
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
    if len(names) < len(DRAWN_SPLITS):
        raise ValueError(
            f"{len(names)} group(s) of images cannot fill {len(DRAWN_SPLITS)} splits: add images of other patients"
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
    return np.asarray(DRAWN_SPLITS)[place[member]]


def _best_split(held: np.ndarray, targets: np.ndarray, group: np.ndarray) -> int:
    """Split whose missing share of the group's classes is largest, unless the group would overfill it."""
    weight = group / group.sum()
    missing = ((targets - held) / np.maximum(targets, 1e-9)) @ weight
    overfill = np.maximum(held + group - targets, 0) @ weight / np.maximum(group.sum(), 1)
    return int(np.argmax(missing - 2 * overfill))


def group_folds(
    group_ids: Sequence[str], labels: Sequence[int] | np.ndarray, num_folds: int, seed: int = 0
) -> np.ndarray:
    """Fold of every row, int64 (N,): whole groups together, classes balanced over the folds.

    Depends on names and labels alone, never on the order of rows, so that a table prepared without fold K and a
    search that leaves fold K out agree.

    Args:
        group_ids: (N,) group of each row.
        labels: (N,) class of each row; a group counts as its smallest label.

    Raises:
        ValueError: fewer than two folds, or a class with fewer groups than folds.
    """
    values = np.asarray(labels)
    if num_folds < 2:
        raise ValueError(f"folds: want at least 2, got {num_folds}")
    if len(group_ids) != len(values) or not len(values):
        raise ValueError(f"group_ids: want one for each of {len(values)} labels, got {len(group_ids)}")
    of_group = _first_labels(group_ids, values)
    fold_of: dict[str, int] = {}
    for label in sorted(set(of_group.values())):
        members = [name for name, first in of_group.items() if first == label]
        if len(members) < num_folds:
            raise ValueError(
                f"folds: class {label} has {len(members)} group(s) of images, too few for {num_folds} folds; "
                "ask for fewer folds or a larger split"
            )
        members.sort(key=lambda name: _order(f"fold/{seed}/{name}"))
        # Classes start at different folds, so that the remainders do not all fall on the first.
        fold_of |= {name: (place + label) % num_folds for place, name in enumerate(members)}
    return np.array([fold_of[name] for name in group_ids], np.int64)


def keep_training_groups(
    group_ids: Sequence[str], labels: Sequence[int] | np.ndarray, num_train: int, seed: int = 0
) -> np.ndarray:
    """Which training rows stay in train, bool (N,): at most `num_train`, whole groups, class shares kept.

    Groups come in an order drawn from `seed` and their names; a group stays as long as it overfills no class. The
    rest belongs to the reserve.

    Raises:
        ValueError: more rows are asked for than there are, or fewer than one of each class.
    """
    values = np.asarray(labels)
    classes, label = np.unique(values, return_inverse=True)
    if not len(classes) <= num_train <= len(values):
        raise ValueError(
            f"--num-train {num_train}: want {len(classes)} (one of each class) … {len(values)} (all of train)"
        )
    total = np.bincount(label, minlength=len(classes))
    exact = num_train * total / len(values)
    quota = np.maximum(np.floor(exact), 1).astype(np.int64)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    quota[order[: max(0, num_train - int(quota.sum()))]] += 1
    while quota.sum() > num_train:
        quota[quota.argmax()] -= 1
    members: dict[str, list[int]] = {}
    for row, name in enumerate(group_ids):
        members.setdefault(name, []).append(row)
    kept, held = np.zeros(len(values), bool), np.zeros(len(classes), np.int64)
    for name in sorted(members, key=lambda name: _order(f"train/{seed}/{name}")):
        counts = np.bincount(label[members[name]], minlength=len(classes))
        if (held + counts <= quota).all():
            kept[members[name]] = True
            held += counts
    if (held == 0).any():
        lacking = classes[int(np.flatnonzero(held == 0)[0])]
        raise ValueError(f"--num-train {num_train}: class {lacking} has no group small enough; ask for more")
    return kept


def _first_labels(group_ids: Sequence[str], labels: np.ndarray) -> dict[str, int]:
    first: dict[str, int] = {}
    for name, label in zip(group_ids, labels.tolist(), strict=True):
        first[name] = min(first.get(name, label), label)
    return first


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
