"""Masks as the mask models' learners see them: one lesion each, drawn by (seed, step, position)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from factory import geometry
from factory.generators.mask_curvature import curvature, sharpened
from factory.generators.mask_gan import MaskGAN
from factory.imaging import TrainingRow
from factory.training.mixture import Shard
from factory.training.settings import TrainingSettings
from schemas.identity import torch_seed

MEASURED_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesions:
    """Masks to learn from, one lesion each.

    Attributes:
        masks: uint8 (N, R, R), lesion = 1.
        labels: class numbers, int64 (N,).
        classes: names of the classes with lesions, by number.
    """

    masks: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def boxes(self) -> np.ndarray:
        """Bounding rectangles, int64 (N, 4): top, left, bottom, right."""
        found = [geometry.bounding_box(mask) for mask in self.masks]
        return np.array(
            [(b.top, b.left, b.bottom, b.right) for b in found if b is not None], np.int64
        ).reshape(-1, 4)

    def curvatures(self, model: MaskGAN) -> dict[int, np.ndarray]:
        """Sorted curvatures of each class's masks, float32 (n,), as the loss sees them."""
        values = []
        with torch.no_grad():
            for start in range(0, len(self.masks), MEASURED_AT_ONCE):
                masks = torch.from_numpy(self.masks[start : start + MEASURED_AT_ONCE]).float()
                values.append(curvature(as_judged(masks, model), operator=model.operator))
        found = torch.cat(values).numpy()
        return {number: np.sort(found[self.labels == number]) for number in np.unique(self.labels).tolist()}


def as_grey_levels(masks: Tensor) -> np.ndarray:
    """Soft masks (n, 1, R, R) as uint8 (n, R, R), 0 … 255."""
    return (masks[:, 0].cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def as_judged(masks: Tensor, model: MaskGAN) -> Tensor:
    """Masks as discriminator and curvature see them."""
    return masks if model.sharpness is None else sharpened(masks, model.sharpness)


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskBatch:
    """Drawn inputs of b masks.

    Attributes:
        step: the update they are for.
        masks: float (b, 1, R, R), 0 or 1.
        labels: int64 (b,).
        boxes: int64 (b, 4).
        noise: z (b, n) of the GAN, or ε (b, 1, R, R) of the DDPM.
        curvatures: target of each mask drawn from its class, float (b,); the GAN's.
        timesteps: int64 (b,); the DDPM's.
    """

    step: int
    masks: Tensor
    labels: Tensor
    boxes: Tensor
    noise: Tensor
    curvatures: Tensor
    timesteps: Tensor

    def to(self, device: str) -> "MaskBatch":
        """The batch on a device."""
        return self._map(lambda value: value.to(device))

    def first(self, count: int) -> "MaskBatch":
        """The first `count` masks."""
        return self._map(lambda value: value[:count])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MaskBatch":
        return MaskBatch(
            step=self.step,
            masks=change(self.masks),
            labels=change(self.labels),
            boxes=change(self.boxes),
            noise=change(self.noise),
            curvatures=change(self.curvatures),
            timesteps=change(self.timesteps),
        )


class LesionDraws:
    """Draws batches of lesions."""

    def __init__(
        self,
        lesions: Lesions,
        settings: TrainingSettings,
        noise_shape: tuple[int, ...],
        curvatures: Mapping[int, np.ndarray],
        num_timesteps: int,
    ) -> None:
        self._lesions, self._settings, self._noise_shape = lesions, settings, noise_shape
        self._curvatures, self._num_timesteps = curvatures, num_timesteps
        self._boxes = lesions.boxes

    def draw(self, shard: Shard) -> MaskBatch:
        """Inputs of the shard's rows: a pure function of (seed, step, positions)."""
        seeds = [f"training/{self._settings.seed}/{shard.step}/{place}" for place in shard.positions]
        return self._draw(shard.step, shard.rows, seeds, self._settings.horizontal_flip)

    def fixed(self, rows: np.ndarray) -> MaskBatch:
        """The same inputs every time, nothing mirrored."""
        return self._draw(-1, rows, [f"validation/{row}" for row in rows], False)

    def _draw(self, step: int, rows: np.ndarray, seeds: Sequence[str], flip: bool) -> MaskBatch:
        masks = torch.from_numpy(self._lesions.masks[rows]).float()[:, None]
        labels = torch.from_numpy(self._lesions.labels[rows])
        boxes = torch.from_numpy(self._boxes[rows])
        noise = torch.empty((len(rows), *self._noise_shape))
        curvatures = torch.zeros(len(rows))
        timesteps = torch.empty(len(rows), dtype=torch.int64)
        side = masks.shape[-1]
        for i, seed in enumerate(seeds):
            rng = torch.Generator().manual_seed(torch_seed(seed, "draws"))
            mirrored, level, time = torch.rand(3, generator=rng, dtype=torch.float64).tolist()
            noise[i] = torch.randn(self._noise_shape, generator=rng)
            timesteps[i] = int(time * self._num_timesteps)
            known = self._curvatures.get(int(labels[i]))
            if known is not None:
                curvatures[i] = float(np.quantile(known, level))
            if flip and mirrored < 0.5:
                masks[i] = masks[i].flip(-1)
                left, right = int(boxes[i, 1]), int(boxes[i, 3])
                boxes[i, 1], boxes[i, 3] = side - right, side - left
        return MaskBatch(
            step=step,
            masks=masks,
            labels=labels,
            boxes=boxes,
            noise=noise,
            curvatures=curvatures,
            timesteps=timesteps,
        )


def lesions_of(rows: Sequence[TrainingRow], classes: Sequence[str]) -> Lesions:
    """The largest component of each row's mask, holes filled; rows without a lesion are left out.

    Args:
        rows: at the model's resolution R.
        classes: names of the classes with lesions; rows of others must not have any.
    """
    chosen = [row for row in rows if row.mask is not None and row.mask.any()]
    shapes = [
        geometry.fill_holes(geometry.largest_component(row.mask)) for row in chosen if row.mask is not None
    ]
    labels = [list(classes).index(row.label_name) for row in chosen]
    side = rows[0].image.shape[0] if rows else 0
    masks = np.stack(shapes) if shapes else np.zeros((0, side, side), np.uint8)
    return Lesions(masks=masks, labels=np.array(labels, np.int64), classes=tuple(classes))
