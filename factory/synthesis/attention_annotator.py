"""The mask of a generated image, read off the attention of the last denoising step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import ndimage

from factory import geometry

if TYPE_CHECKING:
    from factory.diffusion.attention_maps import AttentionRecord
    from factory.diffusion.guidance import DenoisingBatch, Guidance


@dataclass(frozen=True, kw_only=True)
class AttentionOtsu:
    """Otsu's threshold on self-attention^τ · cross-attention of a word (Shentu et al. 2025, Eq. 7).

    Both maps are averaged over heads and over the layers of their side, at the last step. What the paper leaves
    open is ours: closing (its "dilation followed by erosion") with a disk of `closing` px, hole filling, the largest
    component; an annotation fails where nothing is left or more than `max_area` of the frame. Labels of this kind are
    graded by the model that drew the image: check them against an independent segmenter.

    Attributes:
        word: whose cross-attention is read.
        power: τ.
        power_form: "matrix" (default; stays row-stochastic, leaves constants alone) or "paper", the exponent of
            Eq. 7 taken element by element.
        cross_side, self_side: sides of the attention maps. Stable Diffusion at 512 px has 64, 32, 16, 8.
        closing: diameter of the closing, px; odd, 1 for none.
        max_area: greatest share of the frame that a lesion may fill.
    """

    word: str = "<lesion>"
    power: int = 4
    power_form: Literal["matrix", "paper"] = "matrix"
    cross_side: int = 16
    self_side: int = 32
    closing: int = 5
    max_area: float = 0.6
    needs_mask = False

    def __post_init__(self) -> None:
        if not self.word:
            raise ValueError("AttentionOtsu.word: want a word of the prompt")
        if self.power < 1:
            raise ValueError(f"AttentionOtsu.power={self.power}: want at least 1")
        if self.power_form not in ("matrix", "paper"):
            raise ValueError(f"AttentionOtsu.power_form={self.power_form!r}: want matrix or paper")
        if self.cross_side < 1 or self.self_side < 1:
            raise ValueError(
                f"AttentionOtsu.cross_side={self.cross_side}, self_side={self.self_side}: want at least 1"
            )
        if self.closing < 1 or self.closing % 2 == 0:
            raise ValueError(f"AttentionOtsu.closing={self.closing}: want an odd number of px; 1 for none")
        if not 0.0 < self.max_area <= 1.0:
            raise ValueError(f"AttentionOtsu.max_area={self.max_area}: want more than 0, at most 1")

    @property
    def words(self) -> tuple[str, ...]:
        """Words that every prompt must have."""
        return (self.word,)

    def bind(self, batch: "DenoisingBatch") -> "BoundAttentionOtsu":
        """The annotator of one batch.

        Raises:
            ValueError: a prompt lacks the word.
        """
        from factory.diffusion.attention_maps import AttentionRecord

        record = AttentionRecord(
            batch,
            self.word,
            cross_side=self.cross_side,
            self_side=self.self_side,
            power=self.power,
            form=self.power_form,
        )
        return BoundAttentionOtsu(self, record)


class BoundAttentionOtsu:
    """See `AttentionOtsu`."""

    def __init__(self, source: AttentionOtsu, record: "AttentionRecord") -> None:
        self._source, self._record = source, record
        self.hooks: Sequence[Guidance] = (record,)

    def annotate(self, position: int, image: np.ndarray) -> np.ndarray | None:
        """Label map (R, R) uint8 of an image of the batch, or None; the pixels themselves are not looked at."""
        levels = self._record.maps()[position].numpy()
        return mask_of(levels, closing=self._source.closing, max_area=self._source.max_area)


def otsu_threshold(levels: np.ndarray) -> int | None:
    """Otsu's threshold t of uint8 values: the classes are ≤ t and > t (Otsu 1979); None where all are equal.

    The first of equally good thresholds, as skimage and OpenCV take it.
    """
    counts = np.bincount(levels.ravel(), minlength=256).astype(np.float64)
    values = np.arange(256, dtype=np.float64)
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * values)
    above = total - below
    both = (below > 0) & (above > 0)
    if not both.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = sums / below - (sums[-1] - sums) / above
        between = np.where(both, below * above * distance**2, -1.0)
    return int(np.argmax(between))


def mask_of(levels: np.ndarray, *, closing: int, max_area: float) -> np.ndarray | None:
    """Label map uint8 (R, R) of a map uint8 (R, R): threshold, closing, holes, largest component; None where it fails."""
    threshold = otsu_threshold(levels)
    if threshold is None:
        return None
    mask = levels > threshold
    if closing > 1:
        reach = closing // 2
        ys, xs = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        disk = ys**2 + xs**2 <= (reach + 0.5) ** 2
        padded = np.pad(mask, reach, mode="edge")  # so that closing takes nothing away at the border
        mask = ndimage.binary_closing(padded, disk, border_value=0)[reach:-reach, reach:-reach] | mask
    filled = geometry.largest_component(geometry.fill_holes(mask.astype(np.uint8)))
    area = int(filled.sum())
    return None if area == 0 or area > max_area * filled.size else filled
