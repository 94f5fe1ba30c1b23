"""Shortcut check: can the label be told from what is not anatomy?

A logistic regression sees frame size, grey-level and colour statistics, or burned-in marks, and nothing else.
An area under the curve well above one half means that a classifier can score without looking at a lesion, and
that synthetic images which lose the shortcut will seem worse than they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from factory.imaging import as_grey

_NUM_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class ShortcutCheck:
    """Macro one-vs-rest AUC, 0.5 … 1, of grouped cross-validation; None where it cannot be computed.

    Attributes:
        all: size, intensity and colour together.
        frame_size, intensity, colour, marks: each alone.
        reason: why there is no figure, "" where there is one.
    """

    all: float | None = None
    frame_size: float | None = None
    intensity: float | None = None
    colour: float | None = None
    marks: float | None = None
    reason: str = ""


def shortcut_check(
    images: Sequence[np.ndarray], has_marks: Sequence[bool], labels: np.ndarray, groups: np.ndarray
) -> ShortcutCheck:
    """Run the check.

    Args:
        images: uint8 (H, W) or (H, W, 3).
        has_marks: burned-in marks per image.
        labels: (N,) int.
        groups: (N,) int; a group is never on both sides of a fold.
    """
    usable = [int(c) for c in np.unique(labels) if len(np.unique(groups[labels == c])) >= _NUM_FOLDS]
    if len(usable) < 2:
        return ShortcutCheck(reason=f"needs two classes with at least {_NUM_FOLDS} groups each")
    keep = np.isin(labels, usable)
    y, g = labels[keep], groups[keep]
    columns = {
        "frame_size": np.array([_frame_size(image) for image in images])[keep],
        "intensity": np.array([_intensity(image) for image in images])[keep],
        "colour": np.array([_colour(image) for image in images])[keep],
        "marks": np.asarray(has_marks, np.float64)[keep, None],
    }
    together = np.concatenate([columns[name] for name in ("frame_size", "intensity", "colour")], axis=1)
    alone = {name: _grouped_auc(values, y, g) for name, values in columns.items()}
    return ShortcutCheck(
        all=_grouped_auc(together, y, g),
        frame_size=alone["frame_size"],
        intensity=alone["intensity"],
        colour=alone["colour"],
        marks=alone["marks"],
    )


def _frame_size(image: np.ndarray) -> list[float]:
    height, width = image.shape[:2]
    return [height, width, width / height, float(np.log(height * width))]


def _intensity(image: np.ndarray) -> list[float]:
    grey = as_grey(image)
    quantiles = np.percentile(grey, (5, 25, 50, 75, 95))
    extremes = [(grey < 4).mean(), (grey > 250).mean()]
    return [float(value) for value in (grey.mean(), grey.std(), *quantiles, *extremes)]


def _colour(image: np.ndarray) -> list[float]:
    if image.ndim == 2:
        return [0.0, 0.0, 0.0]
    spread = image.max(axis=2).astype(np.float32) - image.min(axis=2)
    return [1.0, float(spread.mean()), float((spread > 48).mean())]


def _grouped_auc(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float | None:
    if (features.std(axis=0) == 0).all():
        return 0.5
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedGroupKFold(_NUM_FOLDS, shuffle=True, random_state=0)
    classes = np.unique(labels)
    predicted = np.zeros((len(labels), len(classes)))
    for train, held_out in folds.split(features, labels, groups):
        if len(np.unique(labels[train])) < len(classes):
            return None
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
        predicted[held_out] = model.fit(features[train], labels[train]).predict_proba(features[held_out])
    areas = [roc_auc_score(labels == c, predicted[:, k]) for k, c in enumerate(classes)]
    return float(np.mean(areas[-1:] if len(classes) == 2 else areas))
