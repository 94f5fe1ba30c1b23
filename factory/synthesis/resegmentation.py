"""Re-segmentation: what a segmenter of real images finds in synthetic ones.

resegmenter = Resegmenter("runs/segmenter")
masks = resegmenter.segment(images)      # uint8 (N, F, F), F the segmenter's frame
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from factory.predictors.examples import Examples
from factory.predictors.segmenter_folder import THRESHOLD, fit_frame, read_record


class Resegmenter:
    """Holds the network of a segmenter's folder; one per process.

    Attributes:
        record: what the segmenter was trained on, and how well it does.
    """

    def __init__(self, folder: str, *, device: str = "cpu", batch_size: int = 32) -> None:
        """Load the network.

        Raises:
            FileNotFoundError, ValueError: no segmenter there, or it is damaged.
        """
        from factory.predictors.fitting import load_fitted

        self.record = read_record(Path(folder))
        fitted = load_fitted(Path(folder))
        if fitted.task != "segmentation":
            raise ValueError(
                f"{folder}: holds a {type(fitted.predictor).__name__}, and a Segmenter is wanted"
            )
        self._network = fitted.network(device)
        self._device, self._batch_size = device, batch_size

    def segment(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Masks of images of any size, uint8 (H, W) or (H, W, 3): uint8 (N, F, F), lesion = 1."""
        from factory.predictors.fitted import predict_network

        numbers = tuple(map(str, range(len(images))))
        examples = Examples(
            images=fit_frame(images, self.record.size, self.record.channels),
            labels=np.zeros(len(images), np.int64),  # of no effect on a mask
            class_names=self.record.class_names,
            ids=numbers,
            groups=numbers,
            is_real=np.zeros(len(images), np.bool_),
        )
        found = predict_network(self._network, examples, "segmentation", self._batch_size, self._device)
        return (found > THRESHOLD).astype(np.uint8)
