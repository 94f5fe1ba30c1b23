"""What `factory train --part segmenter` leaves beside the weights, and what is asked of such a segmenter.

    tensors.safetensors, fitted.json    the segmenter, trained on all training rows with a mask (`load_fitted`)
    segmenter.json                      what it was trained on, and how well it does on rows that it had not seen

The Dice values of `segmenter.json` calibrate the gate on synthetic images (`factory.curation.mask_fidelity`), so each
training row's is that of a segmenter trained without the row's group. Numpy only; torch comes in where weights are read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factory.imaging import as_grey, as_rgb, letterbox
from schemas.identity import digest_file, hash_parts

SEGMENTER_MANIFEST = "segmenter.json"
SEGMENTER_TENSORS = "tensors.safetensors"
THRESHOLD = 0.5
"""Probability from which a pixel is lesion, when the segmenter is measured and when it judges."""


@dataclass(frozen=True, kw_only=True)
class RowDice:
    """How well one real row was segmented by a segmenter that had not seen its group.

    Attributes:
        image_id, label_name: of the row.
        area: of the true lesion, fraction of the frame; 0 where there is none.
        segmented_area: of the predicted one.
        dice: of the two; None where there is no lesion, whose false positive `segmented_area` then is.
    """

    image_id: str
    label_name: str
    area: float
    segmented_area: float
    dice: float | None

    def __post_init__(self) -> None:
        if (self.dice is None) != (self.area == 0):
            raise ValueError(
                f"row {self.image_id}: want a Dice exactly where there is a lesion, got dice {self.dice} of area {self.area}"
            )


@dataclass(frozen=True, kw_only=True)
class SegmenterRecord:
    """`segmenter.json`.

    Attributes:
        predictor: the network, in canonical form: type, architecture, encoder, width, …
        class_names: of the real table.
        size, channels: of the images it takes; 1 grey, 3 RGB.
        real: content digest of the training split.
        rows_digest: of the ids of the rows it was trained on (`Examples.digest`).
        validation_digest: of the rows that chose its best step; None without validation rows.
        weights_digest: of the bytes of its tensors.
        num_folds: of the out-of-fold predictions.
        out_of_fold: one entry per training row.
        validation: one entry per validation row, from the segmenter of the folder.
    """

    predictor: Mapping[str, Any]
    class_names: tuple[str, ...]
    size: int
    channels: int
    real: str
    rows_digest: str
    validation_digest: str | None
    weights_digest: str
    num_folds: int
    out_of_fold: tuple[RowDice, ...]
    validation: tuple[RowDice, ...]

    @property
    def architecture(self) -> str:
        """Of the network, and its encoder where it has one."""
        encoder = self.predictor.get("encoder")
        return str(self.predictor["architecture"]) + (f" on {encoder}" if encoder else "")

    def mean_dice(self, rows: Sequence[RowDice]) -> float:
        """Mean over the rows with a lesion; NaN without any."""
        values = [row.dice for row in rows if row.dice is not None]
        return float(np.mean(values)) if values else float("nan")


def write_record(folder: Path, record: SegmenterRecord) -> None:
    """Write `segmenter.json`, whole or not at all."""
    path = Path(folder) / SEGMENTER_MANIFEST
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(record), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    partial.replace(path)


def read_record(folder: Path) -> SegmenterRecord:
    """`segmenter.json` of a folder, whose weights are checked to be the ones it speaks of.

    Raises:
        FileNotFoundError: there is no trained segmenter; says which command makes one.
        ValueError: the folder is damaged.
    """
    folder = Path(folder)
    path = folder / SEGMENTER_MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {SEGMENTER_MANIFEST} there; `factory train --part segmenter --recipe RECIPE --real REAL --out "
            "FOLDER` makes it"
        )
    try:
        values = json.loads(path.read_text())
        for name in ("out_of_fold", "validation"):
            values[name] = tuple(RowDice(**row) for row in values[name])
        values["class_names"] = tuple(values["class_names"])
        record = SegmenterRecord(**values)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a segmenter's record ({error}); train it again with --overwrite"
        ) from error
    if segmenter_digest(folder) != record.weights_digest:
        raise ValueError(
            f"{folder}: the weights are not those that {SEGMENTER_MANIFEST} speaks of; train it again with --overwrite"
        )
    return record


def segmenter_digest(folder: Path) -> str:
    """Digest of the tensors' bytes.

    Raises:
        FileNotFoundError: they are not there.
    """
    path = Path(folder) / SEGMENTER_TENSORS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {SEGMENTER_TENSORS} there; train the segmenter again with --overwrite"
        )
    return hash_parts("segmenter", digest_file(path))


def fit_frame(images: Sequence[np.ndarray], size: int, channels: int) -> np.ndarray:
    """Images as a segmenter takes them: uint8 (N, size, size, channels), letterboxed.

    Args:
        images: uint8 (H, W) or (H, W, 3) each, of any size.
        size: px.
        channels: 1 grey (the mean of colours) or 3 RGB (a grey image replicated).
    """
    out = np.empty((len(images), size, size, channels), np.uint8)
    for place, image in enumerate(images):
        pixels = image if image.shape[:2] == (size, size) else letterbox(image, size)
        out[place] = (as_grey(pixels) if channels == 1 else as_rgb(pixels)).reshape(size, size, channels)
    return out


def dice_scores(truths: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """2 |A ∩ B| / (|A| + |B|) of N pairs of label maps (N, S, S), lesion > 0: float64 (N,), NaN for an empty truth."""
    if truths.shape != predictions.shape or truths.ndim != 3:
        raise ValueError(
            f"masks: want two of one shape (N, S, S), got {truths.shape} and {predictions.shape}"
        )
    one, two = truths > 0, predictions > 0
    both = np.count_nonzero(one & two, axis=(1, 2))
    own, other = np.count_nonzero(one, axis=(1, 2)), np.count_nonzero(two, axis=(1, 2))
    return np.where(own > 0, 2.0 * both / np.maximum(own + other, 1), np.nan)
