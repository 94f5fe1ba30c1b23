"""Task metrics against scikit-learn, MONAI and cases worked by hand."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.metrics.meandice import compute_dice
from sklearn import metrics as reference

from factory.evaluation.task_metrics import (
    auc,
    balanced_accuracy,
    binary_auc,
    brier_score,
    class_aucs,
    class_recalls,
    classification_report,
    confusion_matrix,
    dice,
    expected_calibration_error,
    hausdorff95,
    iou,
    macro_scores,
    segmentation_report,
    sensitivity_at_specificity,
    sensitivity_specificity,
    shot_accuracies,
    size_bounds,
    size_strata,
    surface_dice,
    threshold_at_specificity,
)


def outcome(num_classes: int, count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=count)
    logits = np.round(1.5 * np.eye(num_classes)[labels] + rng.normal(size=(count, num_classes)), 1)
    odds = np.exp(logits)
    return labels, odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_classification_agrees_with_scikit_learn(num_classes: int) -> None:
    labels, p = outcome(num_classes)
    predictions = p.argmax(axis=1)
    scores = p[:, 1] if num_classes == 2 else p
    assert auc(labels, p) == pytest.approx(reference.roc_auc_score(labels, scores, multi_class="ovr"))
    expected = reference.precision_recall_fscore_support(labels, predictions, average="macro")[:3]
    assert macro_scores(labels, predictions, num_classes) == pytest.approx(expected)
    assert balanced_accuracy(labels, predictions, num_classes) == pytest.approx(
        reference.balanced_accuracy_score(labels, predictions)
    )
    assert (
        confusion_matrix(labels, predictions, num_classes) == reference.confusion_matrix(labels, predictions)
    ).all()
    report = classification_report(labels, p, train_counts=[50] * num_classes)
    assert report["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
    assert report["medium_shot_accuracy"] == pytest.approx(report["balanced_accuracy"])
    assert math.isnan(report["many_shot_accuracy"])
    brier = reference.brier_score_loss(labels, p if num_classes > 2 else p[:, 1])
    assert brier_score(labels, p) == pytest.approx(brier)


def test_a_class_never_predicted_and_one_without_rows() -> None:
    labels, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 2, 0])
    expected = reference.precision_recall_fscore_support(
        labels, predictions, average="macro", zero_division=0
    )
    assert macro_scores(labels, predictions, 4) == pytest.approx(expected[:3])
    recalls = class_recalls(labels, predictions, 4)
    assert recalls[:2] == pytest.approx([2 / 3, 0])
    assert np.isnan(recalls[2:]).all()
    assert balanced_accuracy(labels, predictions, 4) == pytest.approx(1 / 3)
    p = np.eye(3)[[0, 0, 1, 0]] * 0.7 + 0.1
    assert np.isnan(class_aucs(labels, p)[2]) and math.isnan(auc(labels, p))
    assert math.isnan(binary_auc(np.zeros(4), np.arange(4)))


def test_shots_follow_the_training_counts_with_the_bounds_in_medium() -> None:
    labels, predictions = np.array([0, 0, 1, 2, 2, 3, 3]), np.array([0, 1, 1, 2, 0, 0, 0])
    assert shot_accuracies(labels, predictions, [500, 100, 20, 19]) == {
        "many": 0.5,
        "medium": 0.75,
        "few": 0.0,
    }


def test_calibration_error_by_hand_and_of_calibrated_probabilities() -> None:
    labels = np.array([0, 0, 1, 1])
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.95, 0.05], [0.35, 0.65]])
    # Two bins of ten: three rows at .95 with 2/3 right, one at .65 that is right.
    expected = (3 * abs(2 / 3 - 0.95) + 0.35) / 4
    assert expected_calibration_error(labels, p, num_bins=10) == pytest.approx(expected)
    assert expected_calibration_error(labels, p, num_bins=2, binning="mass") == pytest.approx(
        abs(3 - 3.5) / 4
    )
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 20_000)
    p, labels = np.column_stack([1 - sure, sure]), (rng.random(20_000) < sure).astype(int)
    over = np.column_stack([(1 - sure) / 4, 1 - (1 - sure) / 4])
    for binning in ("width", "mass"):
        assert expected_calibration_error(labels, p, binning=binning) < 0.015
        assert expected_calibration_error(labels, over, binning=binning) == pytest.approx(0.1875, abs=0.01)


def test_calibration_error_of_equal_mass_does_not_depend_on_the_order_of_rows() -> None:
    labels, p = outcome(3)
    order = np.random.default_rng(1).permutation(len(labels))
    for bins in (4, 15):
        one = expected_calibration_error(labels, p, num_bins=bins, binning="mass")
        assert one == pytest.approx(
            expected_calibration_error(labels[order], p[order], num_bins=bins, binning="mass")
        )


@pytest.mark.parametrize("specificity", [0.8, 0.95, 1.0])
def test_sensitivity_at_a_specificity_is_read_off_the_roc_curve(specificity: float) -> None:
    labels, p = outcome(2, seed=3)
    false_positive, true_positive, _ = reference.roc_curve(labels, p[:, 1], drop_intermediate=False)
    expected = true_positive[1 - false_positive >= specificity - 1e-12].max()
    assert sensitivity_at_specificity(labels, p[:, 1], specificity) == pytest.approx(expected)
    threshold = threshold_at_specificity(labels, p[:, 1], specificity)
    assert sensitivity_specificity(labels, p[:, 1], threshold)[1] >= specificity - 1e-12


def test_no_threshold_is_specific_enough_where_a_negative_scores_highest() -> None:
    labels, scores = np.array([1, 0, 1]), np.array([0.1, 0.9, 0.5])
    assert threshold_at_specificity(labels, scores, 1.0) == np.inf
    assert sensitivity_at_specificity(labels, scores, 1.0) == 0.0


@pytest.mark.parametrize(
    ("labels", "p", "message"),
    [
        ([0, 1], [[0.5, 0.6], [0.5, 0.5]], "row 0 is no distribution"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "labels: want 0 … 1"),
        ([0.0, 1.0], [[0.5, 0.5], [0.5, 0.5]], "labels: want int"),
        ([0, 1], [[0.5, 0.5]], "probabilities: want"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "row 1"),
    ],
)
def test_probabilities_that_are_none_are_refused(labels: list, p: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_report(np.array(labels), np.array(p), train_counts=[9, 9])


def blobs(seed: int, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]

    def disc() -> np.ndarray:
        y, x, r = rng.uniform(10, size - 6), rng.uniform(10, size - 6), rng.uniform(4, 14)
        return (rows - y) ** 2 + 1.7 * (columns - x) ** 2 < r**2

    return disc() | disc(), disc() | disc()


def tensor(mask: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(mask)[None, None].float()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [None, (0.2, 0.35)])
def test_segmentation_agrees_with_monai(seed: int, spacing: tuple[float, float] | None) -> None:
    truth, prediction = blobs(seed)
    one, two = tensor(prediction), tensor(truth)
    scale = None if spacing is None else list(spacing)
    assert dice(truth, prediction) == pytest.approx(float(compute_dice(one, two)))
    hd = compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=scale)
    assert hausdorff95(truth, prediction, spacing=spacing) == pytest.approx(float(hd), rel=1e-5)
    tolerance = 0.5 if spacing else 2.0
    nsd = compute_surface_dice(one, two, [tolerance], include_background=True, spacing=scale)
    if spacing is None:
        assert surface_dice(truth, prediction, tolerance=tolerance) == pytest.approx(float(nsd), rel=1e-5)
    overlap = dice(truth, prediction)
    assert iou(truth, prediction) == pytest.approx(overlap / (2 - overlap))


def test_shifted_square_by_hand() -> None:
    truth, prediction = np.zeros((2, 30, 40), np.uint8)
    truth[5:15, 5:15], prediction[5:15, 8:18] = 255, 1
    assert dice(truth, prediction) == pytest.approx(0.7)
    assert iou(truth, prediction) == pytest.approx(7 / 13)
    assert hausdorff95(truth, prediction) == 3.0
    assert hausdorff95(truth, prediction, spacing=(9.0, 0.1)) == pytest.approx(0.3)
    assert surface_dice(truth, prediction, tolerance=3) == 1.0
    assert surface_dice(truth, truth, tolerance=0) == 1.0
    assert hausdorff95(truth, np.zeros_like(truth)) == 50.0
    assert hausdorff95(truth, np.zeros_like(truth), spacing=(0.2, 0.1)) == pytest.approx(math.hypot(6, 4))


def test_report_counts_empty_masks_apart_from_the_scores() -> None:
    truth, prediction = blobs(0)
    empty = np.zeros_like(truth)
    report = segmentation_report(
        [truth, truth, empty, empty, empty], [prediction, empty, empty, empty, truth], tolerance=2
    )
    assert (report.num_empty, report.num_without_lesion, report.unit) == (1, 3, "px")
    assert report.false_positive_rate == pytest.approx(1 / 3)
    assert report.dice[:2] == pytest.approx([dice(truth, prediction), 0])
    assert report.hd95[1] == pytest.approx(48 * math.sqrt(2))
    assert np.isnan(report.dice[2:]).all()
    assert report.means()["dice"] == pytest.approx(dice(truth, prediction) / 2)
    assert report.means(np.array([False, True, True, False, False]))["dice"] == 0
    assert math.isnan(report.means(np.zeros(5, bool))["iou"])
    assert math.isnan(segmentation_report([truth], [empty], tolerance=2).false_positive_rate)
    with pytest.raises(ValueError, match="truth is empty"):
        dice(empty, truth)


def test_units_are_not_mixed() -> None:
    truth, prediction = blobs(0)
    scaled = segmentation_report(
        [truth] * 2, [prediction] * 2, tolerance=0.5, spacings=[(0.1, 0.1), (0.2, 0.2)]
    )
    assert scaled.unit == "mm"
    assert scaled.hd95[1] == pytest.approx(2 * scaled.hd95[0])
    with pytest.raises(ValueError, match="first: row 1"):
        segmentation_report([truth] * 2, [prediction] * 2, tolerance=2, spacings=[(0.1, 0.1), None])
    with pytest.raises(ValueError, match="one shape"):
        segmentation_report([truth], [prediction[1:]], tolerance=2)
    with pytest.raises(ValueError, match="spacing"):
        hausdorff95(truth, prediction, spacing=(0.1, 0.0))
    with pytest.raises(ValueError, match="tolerance"):
        surface_dice(truth, prediction, tolerance=-1)


def test_size_strata_use_bounds_of_the_training_lesions() -> None:
    bounds = size_bounds([0, 10, 20, 30, 40, 50, 60, 0])
    assert bounds == pytest.approx(np.quantile(np.arange(10, 61, 10), [1 / 3, 2 / 3]))
    assert size_strata([0, 1, bounds[0], 30, 1000], bounds).tolist() == [-1, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="train_areas"):
        size_bounds([0, 0, 5])
