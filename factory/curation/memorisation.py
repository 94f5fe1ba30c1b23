"""Is a synthetic image a copy of a real training image? A test on registered crops.

Embeddings only say where to look: most true twins lie below the similarity that unrelated images of one class
reach. So each image is registered against its nearest real training images (position, scale 0.8 … 1.25, mirror)
by normalised cross-correlation (Lewis, "Fast normalized cross-correlation", 1995), coarse to fine. What is
correlated is locally normalised, so that brightness, contrast and the layout that all images share do not count,
at no more detail than the generator has. Two crops are tried: the middle of the frame, and the lesion with a margin.

The threshold comes from real training images against those of other groups, which cannot be copies, searched in
exactly the same way. How many copies the test would find is measured on planted ones (`factory.curation.planted`).
A test that finds nothing says "not detected", at that power.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from factory.curation.crops import (
    REGIONS,
    Frame,
    Region,
    Target,
    banded,
    correlations,
    crop_template,
    make_target,
    thumbnail_of,
    thumbnails_of,
)
from factory.imaging import as_grey, letterbox

_COARSE = 64
_SCALES = tuple(float(s) for s in np.geomspace(0.8, 1.25, 7))
_FINE_STEPS = (0.965, 0.98, 1.0, 1.02, 1.035)
_BAR_LEVEL = 8
"""Grey level below which a whole row or column is letterboxing or an empty margin."""
_CACHED = 1024


@dataclass(frozen=True, kw_only=True)
class CopyMatch:
    """Where an image is most like a real one.

    Attributes:
        reference: position of the real image, -1 where there was none to compare with.
        correlation: at the best alignment, -1 … 1.
        region: which crop was compared.
        scale: of the image in the real one.
        mirrored: whether it was mirrored to fit.
        excess: correlation over the threshold of that region; a copy where it is at least 1.
    """

    reference: int
    correlation: float
    region: Region
    scale: float
    mirrored: bool
    excess: float

    @property
    def is_copy(self) -> bool:
        """Whether the correlation reaches the threshold."""
        return self.excess >= 1


@dataclass(frozen=True, kw_only=True)
class CopyTest:
    """How copies are searched and when one is called.

    Attributes:
        side: px that frames are compared at; no more than the synthetic images have.
        candidates: real images compared, nearest by embedding; a few more are added by thumbnail.
        false_alarm: share of images of other patients that may be called copies.
        correlation: threshold for both regions; None: calibrated on real images.
        margin: of the lesion crop, as a fraction of the lesion's box on each side.
        least_correlation: calibrated thresholds are not lower: below it, less than a fifth of the fine structure's
            variance is shared, however rare that is among real images.
        least_crop: side of a crop at least, as a fraction of the frame.
    """

    side: int = 96
    candidates: int = 6
    false_alarm: float = 0.01
    correlation: float | None = None
    margin: float = 0.5
    least_correlation: float = 0.45
    least_crop: float = 0.45

    def __post_init__(self) -> None:
        if self.side < 32 or self.candidates < 1:
            raise ValueError(f"want side ≥ 32 px, candidates ≥ 1: got {self.side}, {self.candidates}")
        if not 0 < self.false_alarm < 0.5:
            raise ValueError(f"false_alarm: {self.false_alarm} is outside (0, .5)")
        if self.correlation is not None and not 0 < self.correlation <= 1:
            raise ValueError(f"correlation: {self.correlation} is outside (0, 1]")

    def frame(self, image: np.ndarray, mask: np.ndarray | None) -> Frame:
        """Make an image ready.

        Args:
            image: uint8 (H, W) or (H, W, 3).
            mask: uint8 label map (H, W) of the same image, or None.
        """
        grey = letterbox(as_grey(image), self.side)
        rows, columns = (np.flatnonzero((grey > _BAR_LEVEL).any(axis=axis)) for axis in (1, 0))
        if min(len(rows), len(columns)) < 16:
            return Frame(grey=grey, lesion=None)
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        if min(bottom - top, right - left) < 16:
            return Frame(grey=grey, lesion=None)
        cut = grey[top:bottom, left:right]
        inside = (
            None if mask is None else letterbox(mask, self.side, is_mask=True)[top:bottom, left:right] > 0
        )
        if inside is None or not inside.any():
            return Frame(grey=cut, lesion=None)
        spans = [self._span(np.flatnonzero(inside.any(axis=axis)), inside.shape[1 - axis]) for axis in (1, 0)]
        return Frame(grey=cut, lesion=(spans[0][0], spans[1][0], spans[0][1], spans[1][1]))

    def _span(self, positions: np.ndarray, size: int) -> tuple[float, float]:
        """First and last fraction of one side of the lesion crop."""
        low, high = float(positions[0]), float(positions[-1] + 1)
        half = max((high - low) * (0.5 + self.margin), self.least_crop * size / 2)
        middle = min(max((low + high) / 2, half), size - half)
        return max(0.0, (middle - half) / size), min(1.0, (middle + half) / size)

    def fit(
        self,
        frames: Sequence[Frame],
        embeddings: np.ndarray,
        groups: Sequence[str],
        *,
        calibrated_on: int = 500,
        num_threads: int = 1,
        progress: Callable[[int], None] = lambda count: None,
    ) -> "FittedCopyTest":
        """Thresholds from real training images, each against those of other groups.

        Args:
            frames: of the real training rows.
            embeddings: float32 (n, D), unit norm, of the same rows.
            groups: patient and near-duplicate group of each.
            calibrated_on: at most so many rows are used, evenly spread; all are references.
            num_threads: rows compared at a time; changes nothing but time.
            progress: called with the number of rows done since the last call.

        Raises:
            ValueError: no threshold given and fewer than 20 rows have one of another group to compare with.
        """
        thumbnails = thumbnails_of(frames)
        references = References(frames=frames, embeddings=embeddings, groups=groups, thumbnails=thumbnails)
        if self.correlation is not None:
            given = dict.fromkeys(REGIONS, self.correlation)
            return FittedCopyTest(source=self, references=references, thresholds=given, null={})
        blind = FittedCopyTest(
            source=self, references=references, thresholds=dict.fromkeys(REGIONS, 1.0), null={}
        )
        if len(set(groups)) < 2 or len(frames) < 20:
            raise ValueError(
                f"{len(frames)} real training rows of {len(set(groups))} group(s) are too few to calibrate the copy "
                "test (20 rows, 2 groups); give --copy-correlation or --no-copy-test"
            )
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(calibrated_on, len(frames))).astype(int))
        found: dict[Region, list[float]] = {region: [] for region in REGIONS}

        def matches(row: int) -> list[CopyMatch]:
            return blind.matches(frames[row], embeddings[row], groups[row])

        with ThreadPoolExecutor(num_threads) as pool:
            for of_row in pool.map(matches, chosen.tolist()):
                for match in of_row:
                    found[match.region].append(match.correlation)
                progress(1)
        null = {region: np.sort(np.array(values)) for region, values in found.items() if len(values) >= 20}
        # Two regions are tried, so each has half of the false alarms.
        thresholds = {
            region: max(self.least_correlation, null_threshold(values, self.false_alarm / len(null)))
            for region, values in null.items()
        }
        return FittedCopyTest(source=self, references=references, thresholds=thresholds, null=null)


def null_threshold(correlations: np.ndarray, false_alarm: float) -> float:
    """The correlation that unrelated images reach with probability `false_alarm`.

    The quantile of the sample, or where that is higher the one-sided 95 % tolerance bound of a normal distribution
    of the Fisher-transformed correlations, its deviation taken from the interquartile range: the quantile of a
    small sample is its maximum, and too low half of the time.
    """
    count = len(correlations)
    empirical = float(np.quantile(correlations, 1 - false_alarm, method="higher"))
    transformed = np.arctanh(np.clip(correlations, -0.999, 0.999))
    low, middle, high = np.quantile(transformed, [0.25, 0.5, 0.75])
    wanted = stats.norm.ppf(1 - false_alarm) * np.sqrt(count)
    factor = stats.nct.ppf(0.95, count - 1, wanted) / np.sqrt(count)
    fitted = float(np.tanh(middle + factor * (high - low) / 1.349))
    return min(max(empirical, fitted), 0.999)


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Real training images: frames, embeddings (n, D), groups, thumbnails (n, 576), all of the same rows."""

    frames: Sequence[Frame] = field(repr=False)
    embeddings: np.ndarray = field(repr=False)
    groups: Sequence[str] = field(repr=False)
    thumbnails: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        sizes = {len(self.frames), len(self.embeddings), len(self.groups), len(self.thumbnails)}
        if len(sizes) > 1:
            raise ValueError(f"References: frames, embeddings, groups, thumbnails differ in length: {sizes}")


class FittedCopyTest:
    """`CopyTest` with its references and thresholds. Methods may be called from several threads.

    Attributes:
        source: the settings.
        references: the real training images.
        thresholds: correlation per region from which an image is a copy.
        null: sorted correlations of unrelated real images per region, where calibrated.
    """

    def __init__(
        self,
        *,
        source: CopyTest,
        references: References,
        thresholds: Mapping[Region, float],
        null: Mapping[Region, np.ndarray],
    ) -> None:
        self.source, self.references = source, references
        self.thresholds, self.null = thresholds, null
        self._target = functools.lru_cache(maxsize=_CACHED)(self._make_target)

    def match(
        self,
        frame: Frame,
        embedding: np.ndarray,
        group: str | None = None,
        regions: Sequence[Region] = REGIONS,
    ) -> CopyMatch:
        """The most telling match of an image; `reference` is -1 where there is nothing to compare with.

        Args:
            frame: the image.
            embedding: (D,) float32, unit norm.
            group: references of this group are left out; None: all are compared.
            regions: crops to compare; only the lesion where the background is a real image.
        """
        usable = [region for region in regions if region in self.thresholds]
        found = self.matches(frame, embedding, group, usable)
        nothing = CopyMatch(
            reference=-1, correlation=0.0, region="frame", scale=1.0, mirrored=False, excess=0.0
        )
        return max(found, key=lambda match: match.excess, default=nothing)

    def matches(
        self,
        frame: Frame,
        embedding: np.ndarray,
        group: str | None = None,
        regions: Sequence[Region] = REGIONS,
    ) -> list[CopyMatch]:
        """The best match of each region that the image has."""
        candidates = self.candidates(frame, embedding, group)
        full = self.source.side

        @functools.cache
        def scaled(scale: float, side: int) -> np.ndarray:
            return banded(frame.grey, scale * side / full, side)

        there = [r for r in regions if r == "frame" or frame.lesion is not None]
        return [m for region in there if (m := self._best(frame, scaled, region, candidates)) is not None]

    def candidates(self, frame: Frame, embedding: np.ndarray, group: str | None = None) -> list[int]:
        """Positions of the references to compare with: nearest by embedding, then by thumbnail."""
        references = self.references
        count = self.source.candidates
        queries = [(embedding, references.embeddings, count)]
        thumbnail = thumbnail_of(frame.grey)
        mirrored = thumbnail_of(frame.grey[:, ::-1])
        queries += [(each, references.thumbnails, max(1, count // 3)) for each in (thumbnail, mirrored)]
        other = None if group is None else np.asarray(references.groups) != group
        found: list[int] = []
        for query, vectors, number in queries:
            similarity = vectors @ np.asarray(query, np.float32)
            if other is not None:
                similarity = np.where(other, similarity, -np.inf)
            nearest = np.argsort(-similarity, kind="stable")[:number]
            found += [int(k) for k in nearest if np.isfinite(similarity[k])]
        return list(dict.fromkeys(found))

    def _best(
        self,
        frame: Frame,
        scaled: Callable[[float, int], np.ndarray],
        region: Region,
        candidates: Sequence[int],
    ) -> CopyMatch | None:
        """Coarse search over all candidates, fine search over the best two."""
        coarse: dict[int, tuple[float, float, bool]] = {}
        full = self.source.side
        side = min(_COARSE, full)
        targets = [self._target(k, side) for k in candidates]
        for scale in _SCALES:
            for mirrored in (False, True):
                template = crop_template(scaled(scale, side), frame, region, mirrored)
                for k, score in zip(candidates, correlations(template, targets)):
                    if k not in coarse or score > coarse[k][0]:
                        coarse[k] = (score, scale, mirrored)
        best: CopyMatch | None = None
        for k in sorted(coarse, key=lambda k: -coarse[k][0])[:2]:
            _, scale, mirrored = coarse[k]
            target = [self._target(k, full)]
            for step in _FINE_STEPS:
                template = crop_template(scaled(scale * step, full), frame, region, mirrored)
                score = correlations(template, target)[0]
                if best is None or score > best.correlation:
                    best = CopyMatch(
                        reference=k,
                        correlation=score,
                        region=region,
                        scale=scale * step,
                        mirrored=mirrored,
                        excess=score / self.thresholds.get(region, np.inf),
                    )
        return best

    def _make_target(self, reference: int, side: int) -> Target:
        return make_target(
            banded(self.references.frames[reference].grey, side / self.source.side, side), side
        )
