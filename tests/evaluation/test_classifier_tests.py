"""DeLong against its literal definition and on a published data set, clustering, McNemar's published example."""

import numpy as np
import pytest
from scipy import stats

from factory.evaluation.classifier_tests import delong, mcnemar
from factory.evaluation.task_metrics import binary_auc

# Albumin, total protein, 10 − K-G score, outcome (0 or 1) of each patient.
# DeLong, DeLong & Clarke-Pearson 1988, the 43 complete cases as printed in the SAS/STAT guide, PROC LOGISTIC.
OVARIAN = """
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1 3.7 6.7 6 1
3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1
3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1
3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1
3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1
"""


def literal(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas and covariance by comparing every positive with every negative."""
    psi = np.stack(
        [
            (s[labels == 1][:, None] > s[labels == 0]) + 0.5 * (s[labels == 1][:, None] == s[labels == 0])
            for s in scores
        ]
    )
    v10, v01 = psi.mean(axis=2), psi.mean(axis=1)
    return psi.mean(axis=(1, 2)), np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]


def two_columns(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.4).astype(int)
    shared = rng.normal(size=count)
    scores = np.stack([labels + shared + rng.normal(size=count), 0.5 * labels + shared])
    return labels, np.round(scores, 1)


@pytest.mark.parametrize("seed", range(4))
def test_fast_delong_is_the_literal_one_also_with_ties(seed: int) -> None:
    labels, scores = two_columns(70, seed)
    areas, covariance = literal(labels, scores)
    found = delong(labels, scores)
    np.testing.assert_allclose(found.areas, areas, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10)
    assert found.areas[0] == pytest.approx(binary_auc(labels, scores[0]))


def test_delong_of_the_ovarian_cancer_example() -> None:
    rows = np.array(OVARIAN.split(), float).reshape(-1, 4)
    kg, protein = 10 - rows[:, 2], rows[:, 1]
    labels = (rows[:, 3] == 1).astype(int)
    assert (len(rows), labels.sum()) == (43, 31)
    found = delong(labels, np.stack([kg, protein]))
    assert found.areas == pytest.approx([0.7258, 0.6478], abs=5e-5)
    assert np.sqrt(np.diag(found.covariance)) == pytest.approx([0.1028, 0.1000], abs=5e-5)
    np.testing.assert_allclose(found.covariance, literal(labels, np.stack([kg, protein]))[1], rtol=1e-10)
    test = found.compare(0, 1)
    assert (test.difference, test.standard_error) == pytest.approx((-0.0780, 0.1046), abs=5e-5)


def test_the_level_of_the_delong_test_holds_under_no_difference() -> None:
    rejected = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        labels = np.arange(80) % 2
        rejected += delong(labels, labels + rng.normal(size=(2, 80))).compare().p_value <= 0.05
    assert 6 <= rejected <= 36


def test_copies_of_a_patient_add_no_evidence() -> None:
    labels, scores = two_columns(60, 0)
    alone = delong(labels, scores)
    copies = delong(np.repeat(labels, 3), np.repeat(scores, 3, axis=1), groups=np.repeat(np.arange(60), 3))
    naive = delong(np.repeat(labels, 3), np.repeat(scores, 3, axis=1))
    np.testing.assert_allclose(copies.covariance, alone.covariance, rtol=1e-10)
    assert naive.covariance[0, 0] < 0.4 * alone.covariance[0, 0]
    assert copies.num_groups == 60


def test_clustered_variance_is_that_of_simulated_patients() -> None:
    areas, variances = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        labels = (rng.random(160) < 0.5).astype(int)
        patient = np.repeat(np.arange(40), 4)
        scores = labels + np.repeat(rng.normal(size=40), 4) + 0.5 * rng.normal(size=160)
        found = delong(labels, scores, groups=patient)
        areas.append(found.areas[0])
        variances.append(found.covariance[0, 0])
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.2)


def test_interval_stays_inside_and_equal_arms_do_not_differ() -> None:
    labels, scores = two_columns(60, 1)
    interval = delong(labels, scores).interval()
    assert 0 < interval.low < interval.value < interval.high < 1
    same = delong(labels, np.stack([scores[0], scores[0] * 2 + 1])).compare()
    assert (same.difference, same.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"area of 1\.0"):
        delong([0, 0, 1, 1], np.array([0.0, 1, 2, 3])).interval()


@pytest.mark.parametrize(
    ("labels", "scores"),
    [([0, 1, 2, 1], [1.0, 2, 3, 4]), ([0, 1, 1, 1], [1.0, 2, 3, 4]), ([0, 0, 1, 1], [1.0, np.nan, 3, 4])],
)
def test_delong_refuses_what_it_cannot_use(labels: list, scores: list) -> None:
    with pytest.raises(ValueError, match="want"):
        delong(np.array(labels), np.array(scores))


def test_mcnemar_of_published_counts() -> None:
    # Fagerland et al. 2013, table 2: 1 and 7 discordant of 21; exact p .070, mid-p .039.
    one = np.array([True] * 1 + [False] * 7 + [True] * 13)
    two = np.array([False] * 1 + [True] * 7 + [True] * 13)
    exact = mcnemar(one, two, groups=np.arange(21), method="exact")
    assert exact.p_value == pytest.approx(18 / 256)
    assert exact.p_value == pytest.approx(stats.binomtest(1, 8).pvalue)
    middle = mcnemar(one, two, groups=np.arange(21))
    assert middle.p_value == pytest.approx(10 / 256)
    assert middle.difference == pytest.approx(6 / 21)
    assert middle.standard_error == pytest.approx((two * 1.0 - one).std() / np.sqrt(21))


@pytest.mark.parametrize("method", ["exact", "mid-p"])
def test_mcnemar_of_equal_numbers_is_one(method: str) -> None:
    one, two = np.array([True, False, True, True]), np.array([False, True, True, True])
    assert mcnemar(one, two, groups=range(4), method=method).p_value == 1.0
    assert mcnemar(one, one, groups=range(4), method=method).p_value == 1.0


def test_mcnemar_refuses_patients_with_several_images() -> None:
    with pytest.raises(ValueError, match="sign_flip_test"):
        mcnemar(np.ones(4, bool), np.ones(4, bool), groups=[0, 0, 1, 2])
