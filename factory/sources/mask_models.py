"""Sources of masks drawn by trained models: the semantic-curvature GAN and the mask DDPM.

A model draws one mask at a time, on the CPU and on one thread, so that a request gives the same mask whatever else
is drawn, where and how often. What a model draws is thresholded, cleaned, and checked against the training masks
of its class; what does not pass is drawn anew, within a bound, and counted.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from factory import geometry
from factory.generators.mask_checkpoints import (
    MASK_MANIFEST,
    WEIGHTS,
    check_mask_model,
    mask_model_digest,
)
from factory.generators.mask_diffusion import DIFFUSION_KIND, MaskDDPM
from factory.generators.mask_gan import GAN_KIND, MaskGAN
from factory.imaging import TrainingRow
from factory.sources.masks import MaskDraw
from factory.sources.rows import lesion_rows_by_label, mask_size, rows_digest
from schemas.identity import canonical, execution_field
from schemas.request import SynthesisRequest

ENLARGING_BLUR = 0.7
"""σ, px of the model's own grid, before a mask is enlarged."""


@dataclass(frozen=True, kw_only=True)
class CurvatureGAN:
    """Masks of the semantic-curvature GAN (Pan et al. 2025, Medical Image Analysis, §3.2).

    Class and rectangle are drawn jointly: the rectangle is that of a training lesion of the label, mirrored left to
    right half of the time. z is drawn anew for each try.

    Attributes:
        model: the GAN; its settings of training are used by `factory train --part mask_gan`.
        checkpoint: the folder which that command wrote. Where it lies is execution; its digest enters the plan.
        flip: mirror rectangles with probability one half.
        min_box_iou: least IoU of the mask's bounding box with its rectangle.
        area_quantiles: of the class's training lesions; masks of an area outside are drawn anew.
        max_tries: draws per request before it fails.
    """

    model: MaskGAN = field(default_factory=MaskGAN)
    checkpoint: str = execution_field("")
    flip: bool = True
    min_box_iou: float = 0.5
    area_quantiles: tuple[float, float] = (0.005, 0.995)
    max_tries: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.min_box_iou <= 1:
            raise ValueError(f"masks.min_box_iou: want 0 … 1, got {self.min_box_iou}")
        _check_common(self.area_quantiles, self.max_tries)

    def weights(self) -> dict[str, str]:
        """Digest of the weights, by name.

        Raises:
            FileNotFoundError, ValueError: none are there, or of another model; says which command makes them.
        """
        folder = _folder(self.checkpoint, GAN_KIND)
        check_mask_model(folder, GAN_KIND, canonical(self.model))
        return {GAN_KIND: mask_model_digest(folder, GAN_KIND)}

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedCurvatureGAN":
        """Rectangles and areas of the rows' lesions.

        Raises:
            FileNotFoundError, ValueError: no weights, another model, or a class that it was not trained on.
        """
        folder = _folder(self.checkpoint, GAN_KIND)
        manifest = check_mask_model(folder, GAN_KIND, canonical(self.model))
        lesions = lesion_rows_by_label(rows)
        return FittedCurvatureGAN(
            source=self,
            folder=folder,
            size=mask_size(rows),
            classes=_classes(manifest, lesions, folder),
            boxes={label: tuple(map(_box_of, members)) for label, members in lesions.items()},
            bounds=_bounds(lesions, self.area_quantiles),
            fitted_on=rows_digest(rows),
        )


@dataclass(frozen=True, kw_only=True)
class MaskDiffusion:
    """Masks of a class-conditional DDPM (Xie et al. 2025).

    The paper states neither threshold nor checks. Ours: threshold ½, largest component, holes filled; area, width
    and height within the training lesions' quantiles of the class.

    Attributes:
        model: the DDPM; its settings of training are used by `factory train --part mask_diffusion`.
        checkpoint: the folder which that command wrote. Where it lies is execution; its digest enters the plan.
        quantiles: of the class's training lesions, for area and for the sides of the bounding box.
        max_tries: draws per request before it fails.
    """

    model: MaskDDPM = field(default_factory=MaskDDPM)
    checkpoint: str = execution_field("")
    quantiles: tuple[float, float] = (0.005, 0.995)
    max_tries: int = 20

    def __post_init__(self) -> None:
        _check_common(self.quantiles, self.max_tries)

    def weights(self) -> dict[str, str]:
        """Digest of the weights, by name.

        Raises:
            FileNotFoundError, ValueError: none are there, or of another model; says which command makes them.
        """
        folder = _folder(self.checkpoint, DIFFUSION_KIND)
        check_mask_model(folder, DIFFUSION_KIND, canonical(self.model))
        return {DIFFUSION_KIND: mask_model_digest(folder, DIFFUSION_KIND)}

    def fit(self, rows: Sequence[TrainingRow]) -> "FittedMaskDiffusion":
        """Areas and sides of the rows' lesions.

        Raises:
            FileNotFoundError, ValueError: no weights, another model, or a class that it was not trained on.
        """
        folder = _folder(self.checkpoint, DIFFUSION_KIND)
        manifest = check_mask_model(folder, DIFFUSION_KIND, canonical(self.model))
        lesions = lesion_rows_by_label(rows)
        return FittedMaskDiffusion(
            source=self,
            folder=folder,
            size=mask_size(rows),
            classes=_classes(manifest, lesions, folder),
            bounds=_bounds(lesions, self.quantiles),
            fitted_on=rows_digest(rows),
        )


@dataclass(frozen=True, kw_only=True)
class LesionBounds:
    """Least and greatest area (px²), box width and box height (px) of a class's lesions; None: it has none."""

    area: tuple[float, float]
    width: tuple[float, float]
    height: tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedCurvatureGAN:
    """`CurvatureGAN` with the training rows' rectangles: see there.

    Attributes:
        folder: of the weights, absolute.
        size: side of the square masks, px.
        classes: number of each label with lesions in the model.
        boxes: per label, the training lesions' rectangles with their image_id; empty for classes without lesions.
        bounds: per label with lesions.
        fitted_on: digest of the row ids.
    """

    source: CurvatureGAN
    folder: Path
    size: int
    classes: Mapping[str, int]
    boxes: Mapping[str, tuple[tuple[str, geometry.Box], ...]] = field(repr=False)
    bounds: Mapping[str, LesionBounds]
    fitted_on: str

    def draw(self, request: SynthesisRequest, rng: np.random.Generator) -> MaskDraw:
        """One mask: uint8 (size, size), lesion = 1, one component without holes; empty without lesions.

        Raises:
            ValueError: the label has no training rows, or no mask was acceptable within `max_tries`.
        """
        if request.label not in self.boxes:
            raise ValueError(f"label {request.label!r}: no training row to take rectangles from")
        choices = self.boxes[request.label]
        if not choices:
            return _empty(self.size)
        model = self.source.model

        def attempt() -> tuple[np.ndarray, dict[str, Any]]:
            image_id, box = choices[rng.integers(len(choices))]
            if self.source.flip and rng.random() < 0.5:
                box = geometry.Box(
                    top=box.top, bottom=box.bottom, left=self.size - box.right, right=self.size - box.left
                )
            noise = rng.standard_normal(model.noise_dim, dtype=np.float32)
            scaled = scaled_box(box, model.resolution / self.size, model.resolution)
            soft = _draw_gan(model, self.folder, noise, self.classes[request.label], scaled)
            edges = {"top": box.top, "left": box.left, "bottom": box.bottom, "right": box.right}
            return soft, {"box_from": image_id, **edges}

        def check(mask: np.ndarray, drawn: dict[str, Any]) -> str:
            box = geometry.Box(**{name: drawn[name] for name in ("top", "left", "bottom", "right")})
            found = geometry.bounding_box(mask)
            assert found is not None
            drawn["box_iou"] = iou_of(found, box)
            if drawn["box_iou"] < self.source.min_box_iou:
                return "box"
            at_border = min(box.top, box.left, self.size - box.bottom, self.size - box.right) <= 0
            if geometry.border_contact(mask) and not at_border:
                return "border"
            return "" if _within(geometry.area(mask), self.bounds[request.label].area) else "area"

        return _tried("curvature_gan", self.source.max_tries, self.size, request, attempt, check)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedMaskDiffusion:
    """`MaskDiffusion` with the training lesions' sizes: see there, and `FittedCurvatureGAN`."""

    source: MaskDiffusion
    folder: Path
    size: int
    classes: Mapping[str, int]
    bounds: Mapping[str, LesionBounds]
    fitted_on: str

    def draw(self, request: SynthesisRequest, rng: np.random.Generator) -> MaskDraw:
        """One mask: uint8 (size, size), lesion = 1, one component without holes; empty without lesions.

        Raises:
            ValueError: the label has no training rows, or no mask was acceptable within `max_tries`.
        """
        if request.label not in self.classes:
            raise ValueError(f"label {request.label!r}: no training row to take sizes from")
        if self.classes[request.label] < 0:
            return _empty(self.size)
        model, bounds = self.source.model, self.bounds[request.label]

        def attempt() -> tuple[np.ndarray, dict[str, Any]]:
            noise = rng.standard_normal((model.resolution, model.resolution), dtype=np.float32)
            return _draw_diffusion(model, self.folder, noise, self.classes[request.label]), {}

        def check(mask: np.ndarray, drawn: dict[str, Any]) -> str:
            box = geometry.bounding_box(mask)
            assert box is not None
            if not _within(geometry.area(mask), bounds.area):
                return "area"
            return "" if _within(box.width, bounds.width) and _within(box.height, bounds.height) else "box"

        return _tried("mask_diffusion", self.source.max_tries, self.size, request, attempt, check)


# ------------------------------------------------------------------------------------------ what both do


def _tried(
    name: str,
    max_tries: int,
    size: int,
    request: SynthesisRequest,
    attempt: Callable[[], tuple[np.ndarray, dict[str, Any]]],
    check: Callable[[np.ndarray, dict[str, Any]], str],
) -> MaskDraw:
    """Draws until a cleaned mask passes; says how often and why not."""
    rejected: Counter[str] = Counter()
    for tries in range(1, max_tries + 1):
        soft, drawn = attempt()
        mask = cleaned(resized(soft, size))
        reason = check(mask, drawn) if mask.any() else "empty"
        if not reason:
            drawn |= {"area": geometry.area(mask), "tries": tries}
            drawn |= {f"rejected_{why}": count for why, count in rejected.items()}
            return MaskDraw(mask=mask, parameters={"mask_source": name, **drawn})
        rejected[reason] += 1
    counts = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
    raise ValueError(
        f"{name}: no acceptable mask for label {request.label!r} in {max_tries} tries ({counts}); train the mask model "
        "longer, widen its quantiles, or raise max_tries"
    )


def resized(soft: np.ndarray, size: int) -> np.ndarray:
    """A soft mask (R, R) at (size, size): averaged over areas where smaller, smoothed and by splines where larger.

    Enlarged as it is, the staircase of its pixels becomes part of the shape: twice enlarged, real benign outlines
    of BUSI lose .02 of their solidity and gain a tenth of curvature. A blur of .7 source px takes that away.
    """
    from skimage.transform import resize

    if soft.shape == (size, size):
        return soft
    if size < soft.shape[0]:
        return resize(soft, (size, size), order=1, anti_aliasing=True, mode="edge")
    smooth = ndimage.gaussian_filter(soft.astype(np.float64), ENLARGING_BLUR)
    return resize(smooth, (size, size), order=3, anti_aliasing=False, mode="edge")


def cleaned(soft: np.ndarray) -> np.ndarray:
    """Threshold ½, largest component, holes filled: uint8 (H, W)."""
    return geometry.fill_holes(geometry.largest_component(soft > 0.5, connectivity=4))


def scaled_box(box: geometry.Box, factor: float, size: int) -> geometry.Box:
    """A rectangle at another resolution, at least one pixel wide and high, inside of the frame."""
    top = min(max(0, round(box.top * factor)), size - 1)
    left = min(max(0, round(box.left * factor)), size - 1)
    bottom = min(max(top + 1, round(box.bottom * factor)), size)
    right = min(max(left + 1, round(box.right * factor)), size)
    return geometry.Box(top=top, left=left, bottom=bottom, right=right)


def iou_of(a: geometry.Box, b: geometry.Box) -> float:
    """Intersection over union of two rectangles."""
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    width = min(a.right, b.right) - max(a.left, b.left)
    shared = max(0, height) * max(0, width)
    return shared / (a.height * a.width + b.height * b.width - shared)


def _check_common(quantiles: tuple[float, float], max_tries: int) -> None:
    low, high = quantiles
    if not 0 <= low < high <= 1:
        raise ValueError(f"masks: want quantiles 0 ≤ least < greatest ≤ 1, got {quantiles}")
    if max_tries < 1:
        raise ValueError(f"masks.max_tries: want 1 or more, got {max_tries}")


def _folder(checkpoint: str, kind: str) -> Path:
    if not checkpoint:
        raise FileNotFoundError(
            f"masks.checkpoint: not set; `factory train --part {kind} --recipe RECIPE --real REAL --out FOLDER` makes them, "
            "then give --masks.checkpoint FOLDER"
        )
    return Path(checkpoint).expanduser().resolve()


def _classes(
    manifest: Mapping[str, Any], lesions: Mapping[str, Sequence[TrainingRow]], folder: Path
) -> dict[str, int]:
    """Number of each label in the model, -1 for labels without lesions."""
    known = list(manifest["classes"])
    unknown = sorted(label for label, members in lesions.items() if members and label not in known)
    if unknown:
        raise ValueError(
            f"masks.checkpoint={folder}: trained on {', '.join(known)}, but the training rows have lesions of "
            f"{', '.join(unknown)}; train the mask model on this table"
        )
    return {label: known.index(label) if members else -1 for label, members in lesions.items()}


def _box_of(row: TrainingRow) -> tuple[str, geometry.Box]:
    assert row.mask is not None
    box = geometry.bounding_box(geometry.largest_component(row.mask))
    assert box is not None
    return row.image_id, box


def _bounds(
    lesions: Mapping[str, Sequence[TrainingRow]], quantiles: tuple[float, float]
) -> dict[str, LesionBounds]:
    """Quantiles of the largest component of each label's masks."""
    out = {}
    for label, members in lesions.items():
        shapes = [geometry.largest_component(row.mask) for row in members if row.mask is not None]
        boxes = [box for shape in shapes if (box := geometry.bounding_box(shape)) is not None]
        if not boxes:
            continue
        columns = (
            [geometry.area(shape) for shape in shapes],
            [box.width for box in boxes],
            [box.height for box in boxes],
        )
        low_high = [tuple(np.quantile(column, quantiles).tolist()) for column in columns]
        out[label] = LesionBounds(area=low_high[0], width=low_high[1], height=low_high[2])
    return out


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return math.floor(bounds[0]) <= value <= math.ceil(bounds[1])


def _empty(size: int) -> MaskDraw:
    return MaskDraw(mask=np.zeros((size, size), np.uint8), parameters={"mask_source": "empty"})


# ------------------------------------------------------------------------------------------ the models


def _draw_gan(model: MaskGAN, folder: Path, noise: np.ndarray, label: int, box: geometry.Box) -> np.ndarray:
    """One soft mask, float32 (R, R)."""
    import torch

    from factory.generators.mask_gan_model import box_maps

    generator = _loaded(model, folder)
    edges = torch.tensor([[box.top, box.left, box.bottom, box.right]])
    with _one_thread(), torch.no_grad():
        masks = generator(
            torch.from_numpy(noise)[None], torch.tensor([label]), box_maps(edges, model.resolution)
        )
    return masks[0, 0].numpy()


def _draw_diffusion(model: MaskDDPM, folder: Path, noise: np.ndarray, label: int) -> np.ndarray:
    """One soft mask, float32 (R, R)."""
    import torch

    denoiser = _loaded(model, folder)
    with _one_thread():
        return denoiser.draw(torch.from_numpy(noise)[None, None], torch.tensor([label]))[0, 0].numpy()


def _loaded(model: MaskGAN | MaskDDPM, folder: Path) -> Any:
    """The model in memory, once per process and version of its files."""
    stamps = tuple((folder / name).stat().st_mtime_ns for name in (MASK_MANIFEST, WEIGHTS))
    return _load(model, folder, stamps)


@functools.lru_cache(maxsize=4)
def _load(model: MaskGAN | MaskDDPM, folder: Path, stamps: tuple[int, ...]) -> Any:
    return model.load(folder)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads may differ in the last bit from those of one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
