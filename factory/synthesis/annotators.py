"""Which mask a generated image is labelled with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from factory.diffusion.guidance import DenoisingBatch, Guidance


@dataclass(frozen=True, kw_only=True)
class RequestedMask:
    """The label is the mask that was asked for; whether the image obeys it is for filters to say."""

    needs_mask = True

    def bind(self, batch: "DenoisingBatch") -> "BoundRequestedMask":
        """The masks of a batch, as they are.

        Raises:
            ValueError: the batch has none.
        """
        if batch.masks is None:
            raise ValueError("RequestedMask: no masks were requested; use a recipe with a source of masks")
        return BoundRequestedMask(batch.masks.cpu().numpy())


class BoundRequestedMask:
    """The requested masks of one batch, uint8 (B, R, R)."""

    hooks: "Sequence[Guidance]" = ()

    def __init__(self, masks: np.ndarray) -> None:
        self._masks = masks

    def annotate(self, position: int, image: np.ndarray) -> np.ndarray | None:
        """The label map (R, R) uint8 that was asked for."""
        return self._masks[position].copy()
