"""Lesion copy-paste: the cheap augmentation that synthetic images must beat.

A lesion of one training image is put into another training image (Ghiasi et al. 2021, "Simple Copy-Paste"; deviates:
one lesion per image, flipped and scaled a little, its edge feathered so that it is not learnt instead of the lesion).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from factory.predictors.examples import Examples
from schemas.identity import random_generator

MOST_TRIES = 20
"""Placements tried for one image before the lesion is pasted where it was."""


@dataclass(frozen=True, kw_only=True)
class CopyPaste:
    """How lesions are pasted.

    Attributes:
        feather: width of the edge's transition, as a fraction of the side.
        margin: rim around the lesion that comes along, as a fraction of the side.
        scale: largest relative change of the lesion's size.
    """

    feather: float = 0.02
    margin: float = 0.02
    scale: float = 0.2

    def __post_init__(self) -> None:
        for name in ("feather", "margin", "scale"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"CopyPaste.{name}: want 0 … 0.5, got {getattr(self, name)}")

    def make(self, real: Examples, counts: np.ndarray, *, seed: int) -> Examples:
        """New images of each class, made of training images alone.

        The lesion gives the label. The image below is one without a lesion where there are such; else one of the
        same class, whose own lesion stays in the mask.

        Args:
            real: training rows with masks.
            counts: int (C,) images to make of each class; a class without lesions gets copies of its own images.
            seed: of all draws; image k of a class is the same whatever `counts` asks for beside.

        Returns:
            Examples with masks; `groups` are those of the lesion's image, ids name both images.

        Raises:
            ValueError: rows without masks, or a class that has no image.
        """
        if real.masks is None or real.has_mask is None or not real.has_mask.all():
            raise ValueError(
                "copy_paste: needs a mask for every real training row; leave the arm out for this dataset"
            )
        has_lesion = np.asarray(real.masks.reshape(len(real), -1).any(axis=1))
        healthy = np.flatnonzero(~has_lesion)
        made = []
        for label, count in enumerate(np.asarray(counts).tolist()):
            members = np.flatnonzero(real.labels == label)
            lesions = members[has_lesion[members]]
            if count and not len(members):
                raise ValueError(f"copy_paste: class {real.class_names[label]} has no training image")
            below = healthy if len(healthy) and len(lesions) else members
            sources = lesions if len(lesions) else members
            for number in range(count):
                rng = random_generator(f"copy-paste/{seed}/{label}/{number}", "draws")
                made.append((label, number, int(rng.choice(sources)), int(rng.choice(below)), rng))
        return self._examples(real, made, seed)

    def _examples(
        self, real: Examples, made: list[tuple[int, int, int, int, np.random.Generator]], seed: int
    ) -> Examples:
        assert real.masks is not None  # checked by make
        size = real.images.shape[1]
        images = np.empty((len(made), *real.images.shape[1:]), np.uint8)
        masks = np.empty((len(made), size, size), np.uint8)
        for row, (_, _, source, below, rng) in enumerate(made):
            images[row], masks[row] = self.paste(
                real.images[source], real.masks[source], real.images[below], real.masks[below], rng
            )
        return Examples(
            images=images,
            labels=np.array([label for label, *_ in made], np.int64),
            class_names=real.class_names,
            ids=tuple(
                f"copy-paste/{seed}/{label}/{number}:{real.ids[source]}+{real.ids[below]}"
                for label, number, source, below, _ in made
            ),
            groups=tuple(real.groups[source] for _, _, source, _, _ in made),
            is_real=np.zeros(len(made), bool),
            masks=masks,
            has_mask=np.ones(len(made), bool),
        )

    def paste(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        below: np.ndarray,
        below_mask: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The lesion of `image` in `below`: uint8 (S, S, K) and label map (S, S).

        Without a lesion in `mask`, `below` as it is.
        """
        if not mask.any():
            return below.copy(), below_mask.copy()
        size = len(mask)
        rim = max(1, round(self.margin * size))
        rows, columns = np.nonzero(mask)
        top, left = max(0, rows.min() - rim), max(0, columns.min() - rim)
        box = (
            slice(top, min(size, rows.max() + rim + 1)),
            slice(left, min(size, columns.max() + rim + 1)),
        )
        piece, shape = _changed(image[box], mask[box], 1 + rng.uniform(-self.scale, self.scale), rng, size)
        y, x = self._place(shape, below_mask, rng, size)
        lesion = np.zeros((size, size), np.uint8)
        lesion[y : y + len(shape), x : x + shape.shape[1]] = shape
        pixels = below.copy()
        pixels[y : y + len(shape), x : x + shape.shape[1]] = piece
        distance = ndimage.distance_transform_edt(lesion == 0)
        share = np.clip(1 - distance / (self.feather * size + 1e-9), 0, 1)[:, :, None]
        # Outside the piece `pixels` is `below`, so a feather wider than the rim changes nothing there.
        mixed = np.round(share * pixels + (1 - share) * below).astype(np.uint8)
        return mixed, np.where(lesion > 0, lesion, below_mask).astype(np.uint8)

    def _place(
        self, shape: np.ndarray, taken: np.ndarray, rng: np.random.Generator, size: int
    ) -> tuple[int, int]:
        """Top left corner where the lesion lies on none that is there, if one is found."""
        height, width = shape.shape
        for _ in range(MOST_TRIES):
            y, x = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
            if not (taken[y : y + height, x : x + width][shape > 0]).any():
                break
        return y, x


def _changed(
    image: np.ndarray, mask: np.ndarray, scale: float, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A crop scaled (so far as it fits into `size` px) and flipped left to right half of the time."""
    height, width = mask.shape
    scale = min(scale, size / height, size / width)
    to = (max(1, int(width * scale)), max(1, int(height * scale)))
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image[:, :, k])).resize(to, Image.Resampling.BILINEAR)
        )
        for k in range(image.shape[2])
    ]
    small = np.asarray(Image.fromarray(np.ascontiguousarray(mask)).resize(to, Image.Resampling.NEAREST))
    piece = np.stack(planes, axis=2)
    return (piece[:, ::-1], small[:, ::-1]) if rng.random() < 0.5 else (piece, small)
