"""Closed-form tests of classifiers on the same rows: areas under ROC curves (DeLong) and errors (McNemar)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from factory.evaluation.statistics import Comparison, Interval


@dataclass(frozen=True, kw_only=True)
class AreaUnderCurve:
    """Areas under the ROC curves of M score columns on the same rows, with their covariance.

    Attributes:
        areas: float64 (M,).
        covariance: float64 (M, M).
        num_groups: independent units.
    """

    areas: np.ndarray
    covariance: np.ndarray
    num_groups: int

    def interval(self, column: int = 0, *, level: float = 0.95) -> Interval:
        """Interval of one area on the logit scale, so it stays inside (0, 1).

        Raises:
            ValueError: an area of 0 or 1 has no variance estimate; use the bootstrap or more rows.
        """
        area, error = float(self.areas[column]), math.sqrt(max(0.0, float(self.covariance[column, column])))
        if not 0 < area < 1:
            raise ValueError(f"areas: an area of {area} has no DeLong interval; report the counts instead")
        half = float(stats.norm.ppf((1 + level) / 2)) * error / (area * (1 - area))
        centre = math.log(area / (1 - area))
        return Interval(
            value=area,
            low=float(1 / (1 + math.exp(-(centre - half)))),
            high=float(1 / (1 + math.exp(-(centre + half)))),
            level=level,
            standard_error=error,
            method="DeLong, logit",
            num_groups=self.num_groups,
        )

    def compare(self, one: int = 0, two: int = 1) -> Comparison:
        """z test of areas[two] − areas[one]; p is 1 where both arms rank every pair alike."""
        difference = float(self.areas[two] - self.areas[one])
        c = self.covariance
        error = math.sqrt(max(0.0, float(c[one, one] + c[two, two] - 2 * c[one, two])))
        if error > 1e-12:
            p = float(2 * stats.norm.sf(abs(difference) / error))
        elif abs(difference) < 1e-12:
            p = 1.0
        else:
            raise ValueError(
                f"scores: areas differ by {difference} with zero variance; use the sign-flip test"
            )
        return Comparison(
            difference=difference,
            p_value=p,
            standard_error=error,
            method="DeLong",
            num_groups=self.num_groups,
        )


def delong(
    labels: np.ndarray, scores: np.ndarray, *, groups: Sequence | np.ndarray | None = None
) -> AreaUnderCurve:
    """Areas under ROC curves and their covariance, by midranks (DeLong 1988; Sun & Xu 2014, O(n log n)).

    With groups of several rows the variance is that of clustered data (Obuchowski 1997); groups of one row each give
    DeLong's exactly.

    Args:
        labels: (N,) 0 or 1.
        scores: (M, N), or (N,) for one column; larger means positive.
        groups: (N,) patient or near-duplicate group; None only where each row is its own.

    Raises:
        ValueError: another label, wrong shapes, or fewer than two groups in a class.
    """
    labels, scores = np.asarray(labels), np.atleast_2d(np.asarray(scores, np.float64))
    if scores.shape[1:] != labels.shape or not np.isin(labels, (0, 1)).all() or not np.isfinite(scores).all():
        raise ValueError(
            f"scores: want finite (M, N) with labels 0 or 1 (N,), got {scores.shape}, {labels.shape}"
        )
    positive = labels == 1
    names = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if names.shape != labels.shape:
        raise ValueError(f"groups: want one for each of {len(labels)} rows, got shape {names.shape}")
    _, group = np.unique(names, return_inverse=True)
    num = int(group.max()) + 1
    with_positive, with_negative = len(set(group[positive])), len(set(group[~positive]))
    if min(with_positive, with_negative) < 2:
        raise ValueError(f"labels: want ≥ 2 groups of each class, got {with_positive} and {with_negative}")
    positives, negatives = int(positive.sum()), int((~positive).sum())
    all_ranks = stats.rankdata(scores, axis=1)
    above = (all_ranks[:, positive] - stats.rankdata(scores[:, positive], axis=1)) / negatives
    below = 1 - (all_ranks[:, ~positive] - stats.rankdata(scores[:, ~positive], axis=1)) / positives
    areas = above.mean(axis=1)

    def sums(components: np.ndarray, of: np.ndarray) -> np.ndarray:
        centred = components - areas[:, None]
        return np.stack([np.bincount(of, weights=row, minlength=num) for row in centred])

    one, two = sums(above, group[positive]), sums(below, group[~positive])
    cross = num / (num - 1) * (one @ two.T) / (positives * negatives)
    covariance = (
        with_positive / (with_positive - 1) * (one @ one.T) / positives**2
        + with_negative / (with_negative - 1) * (two @ two.T) / negatives**2
        + cross
        + cross.T
    )
    return AreaUnderCurve(areas=areas, covariance=covariance, num_groups=num)


def mcnemar(
    one_correct: np.ndarray,
    two_correct: np.ndarray,
    *,
    groups: Sequence | np.ndarray,
    method: Literal["exact", "mid-p"] = "mid-p",
) -> Comparison:
    """Do two classifiers err equally often on the same rows? (McNemar 1947; mid-p as Fagerland et al. 2013.)

    Args:
        one_correct, two_correct: bool (N,).
        groups: (N,); each row must be a group of its own.

    Raises:
        ValueError: a group of several rows (use `sign_flip_test` there).
    """
    one, two = np.asarray(one_correct, bool), np.asarray(two_correct, bool)
    names = np.asarray(groups)
    if not one.shape == two.shape == names.shape or one.ndim != 1 or not len(one):
        raise ValueError(
            f"one_correct, two_correct, groups: want (N,), got {one.shape} {two.shape} {names.shape}"
        )
    if len(np.unique(names)) < len(names):
        raise ValueError("groups: some hold several rows, which are not independent; use sign_flip_test")
    if method not in ("exact", "mid-p"):
        raise ValueError(f"method: want 'exact' or 'mid-p', got {method!r}")
    gained, lost = int((two & ~one).sum()), int((one & ~two).sum())
    fewer, discordant = min(gained, lost), gained + lost
    p = 2 * float(stats.binom.cdf(fewer, discordant, 0.5))
    if gained == lost:
        p = 1.0
    elif method == "mid-p":
        p -= float(stats.binom.pmf(fewer, discordant, 0.5))
    return Comparison(
        difference=(gained - lost) / len(one),
        p_value=min(1.0, p),
        standard_error=math.sqrt(discordant - (gained - lost) ** 2 / len(one)) / len(one),
        method=f"McNemar, {method}",
        num_groups=len(one),
    )
