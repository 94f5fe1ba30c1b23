"""The requested mask a little smaller: the label that fits what was painted into it (Xie et al. 2025, §2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from factory import geometry

if TYPE_CHECKING:
    from factory.diffusion.guidance import DenoisingBatch, Guidance


@dataclass(frozen=True, kw_only=True)
class ErodedMask:
    """The requested mask eroded by a disc, since a painted lesion rarely fills its mask to the edge.

    The paper states no kernel; a disc of 2–3 px at 512 px and the guard are ours. A lesion that would lose more
    than `max_loss` of its area keeps its mask whole: the row then has equal `mask` and `requested_mask`, by which it
    can be told. Each class of a label map is eroded by itself.

    Attributes:
        radius: of the disc, as a fraction of the image side.
        max_loss: share of the area above which nothing is eroded.
    """

    radius: float = 2.5 / 512
    max_loss: float = 0.2
    needs_mask = True

    def __post_init__(self) -> None:
        if not 0 <= self.radius <= 0.05:
            raise ValueError(
                f"annotator.ErodedMask.radius: want 0 … .05 of the image side, got {self.radius}"
            )
        if not 0 <= self.max_loss < 1:
            raise ValueError(f"annotator.ErodedMask.max_loss: want 0 ≤ max_loss < 1, got {self.max_loss}")

    def erode(self, mask: np.ndarray) -> np.ndarray:
        """Eroded label map, uint8 (R, R), of one (R, R); a subset of it."""
        out = np.zeros(mask.shape, np.uint8)
        for label in np.unique(mask[mask > 0]):
            kept, _ = geometry.erode(mask == label, self.radius * mask.shape[0], max_area_loss=self.max_loss)
            out[kept > 0] = label
        return out

    def bind(self, batch: "DenoisingBatch") -> "BoundErodedMask":
        """The eroded masks of a batch.

        Raises:
            ValueError: the batch has none.
        """
        if batch.masks is None:
            raise ValueError("ErodedMask: no masks were requested; use a recipe with a source of masks")
        return BoundErodedMask(self, batch.masks.cpu().numpy())


class BoundErodedMask:
    """The requested masks of one batch, uint8 (B, R, R), eroded when asked for."""

    hooks: "Sequence[Guidance]" = ()

    def __init__(self, source: ErodedMask, masks: np.ndarray) -> None:
        self._source, self._masks = source, masks

    def annotate(self, position: int, image: np.ndarray) -> np.ndarray | None:
        """The label map (R, R) uint8 of image `position`."""
        return self._source.erode(self._masks[position])
