"""Which mask a generated image is labelled with."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RequestedMask:
    """The label is the mask that was asked for; whether the image obeys it is for filters to say."""

    def annotate(self, requested_mask: np.ndarray | None, image: np.ndarray) -> np.ndarray | None:
        """The label map (R, R) uint8 for `image` (R, R) uint8; None where no mask was requested."""
        return None if requested_mask is None else requested_mask.copy()
