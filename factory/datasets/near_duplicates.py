"""Near-duplicates in a real dataset: the same frame exported twice, and neighbouring frames of one examination.

Candidates come from image embeddings, from locally normalised thumbnails (which see speckle, not brightness),
and from thumbnails of crops against whole images; then registration at full detail decides
(`factory.datasets.registration`), so that crops, rescaled and marked copies are found and look-alikes are not.
Linked images form a group, and a group never spans two splits.

The cost of the candidates is one matrix product of N × N similarities in blocks; registration is linear in N.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from factory.datasets.registration import Match, Placement, Registrar, locally_normalised
from factory.imaging import as_grey

Kind = Literal["frame", "examination", "neighbour"]
_REDUCED = 96
"""px of the square that thumbnails are cut from."""
_STEPS = (0.0, 1 / 3, 2 / 3, 1.0)
_CROPS = (
    *((y * (1 - side), x * (1 - side), side, side)
      for side in (0.55, 0.65, 0.75, 0.85) for y in _STEPS for x in _STEPS),
    (0.0, 0.0, 0.7, 1.0), (0.0, 0.0, 0.85, 1.0), (0.15, 0.0, 0.85, 1.0),
    (0.0, 0.0, 1.0, 0.7), (0.0, 0.3, 1.0, 0.7), (0.0, 0.15, 1.0, 0.7),
)  # fmt: skip
"""Top, left, height and width of crops as fractions of the image: a grid of squares, and cut-off edges."""
_WHOLE = (0.0, 0.0, 1.0, 1.0)
_MIN_CROP_SIMILARITY = 0.45
"""Cosine of thumbnails below which a crop and an image have nothing in common."""
_SPECKLE_SIDE = 96
_BLOCK = 1024
_DOUBTFUL = (0.17, 0.5)
"""Correlations after which the other direction is tried as well."""


@dataclass(frozen=True, kw_only=True)
class DuplicatePair:
    """Two images, by position, that must stay in one split, and why.

    Attributes:
        first, second: positions, first < second.
        kind: "frame": the same frame. "examination": the same place seen a moment or a marker later.
            "neighbour": neighbouring file numbers and alike.
        correlation: of the registered, locally normalised images over their overlap.
        overlap: area shared over the smaller area.
        similarity: cosine of the embeddings.
    """

    first: int
    second: int
    kind: Kind
    correlation: float
    overlap: float
    similarity: float


@dataclass(frozen=True, kw_only=True)
class DuplicateGroups:
    """Result of a search.

    Attributes:
        group: (N,) int64, group number of each image: the position of its first member.
        pairs: the links.
        num_candidates: pairs that were registered.
    """

    group: np.ndarray
    pairs: tuple[DuplicatePair, ...]
    num_candidates: int


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """How near-duplicates are searched and linked. Defaults were set on BUSI and checked by eye.

    Attributes:
        num_neighbours: candidates per image and per kind of similarity.
        frame_threshold: registered correlation of the same frame, at any crop and scale.
        thumbnail_threshold: the same for images below 96 px, which show no speckle: weaker correlations mean
            nothing there, and the two kinds of links below are not looked for by registration.
        examination_threshold: registered correlation of the same place at nearly the same scale.
        neighbour_threshold: the same for file numbers at most `neighbour_distance` apart.
        neighbour_quantile: such neighbours are also linked if their embeddings are more alike than this
            quantile of all pairs; 1 switches that off.
        neighbour_distance: difference of file numbers within one name.
        min_overlap: of a match, over the smaller image.
    """

    num_neighbours: int = 6
    frame_threshold: float = 0.5
    thumbnail_threshold: float = 0.75
    examination_threshold: float = 0.27
    neighbour_threshold: float = 0.2
    neighbour_quantile: float = 0.995
    neighbour_distance: int = 3
    min_overlap: float = 0.5

    def __post_init__(self) -> None:
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours: {self.num_neighbours} must be at least 1")
        for name in (
            "frame_threshold",
            "thumbnail_threshold",
            "examination_threshold",
            "neighbour_threshold",
            "neighbour_quantile",
        ):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is outside (0, 1]")

    def find(
        self,
        images: Sequence[np.ndarray],
        embeddings: np.ndarray,
        *,
        sequences: Sequence[tuple[str, int] | None] = (),
        progress: Callable[[int], None] = lambda count: None,
    ) -> DuplicateGroups:
        """Group `images`.

        Args:
            images: uint8 (H, W) or (H, W, 3), of any sizes.
            embeddings: (N, D) float32, unit norm.
            sequences: name and number of each image where file names are numbered.
            progress: called with the number of images whose candidates were registered.

        Raises:
            ValueError: not one embedding, or not one sequence, per image.
        """
        if embeddings.ndim != 2 or len(embeddings) != len(images):
            raise ValueError(
                f"embeddings: want one row per image ({len(images)}), got shape {embeddings.shape}"
            )
        sequences = sequences or [None] * len(images)
        if len(sequences) != len(images):
            raise ValueError(f"sequences: {len(sequences)} given for {len(images)} images")
        neighbours = _neighbouring(sequences, self.neighbour_distance)
        candidates = candidate_pairs(images, embeddings, self.num_neighbours) | neighbours
        matches = register_pairs(images, candidates, progress=progress)
        level = _quantile(embeddings, self.neighbour_quantile)
        pairs = []
        nothing = Match(
            placement=Placement(scale=(1.0, 1.0), offset=(0.0, 0.0)), correlation=0.0, overlap=0.0
        )
        for first, second in sorted(candidates):
            match = matches.get((first, second), nothing)
            similarity = float(embeddings[first] @ embeddings[second])
            shows_speckle = min(max(images[k].shape[:2]) for k in (first, second)) >= _SPECKLE_SIDE
            kind = self._kind(match, (first, second) in neighbours, similarity > level, shows_speckle)
            if kind is not None:
                pairs.append(DuplicatePair(first=first, second=second, kind=kind, correlation=match.correlation,
                                           overlap=match.overlap, similarity=similarity))  # fmt: skip
        group = connected_groups(len(images), [(pair.first, pair.second) for pair in pairs])
        return DuplicateGroups(group=group, pairs=tuple(pairs), num_candidates=len(candidates))

    def _kind(self, match: Match, is_neighbour: bool, is_alike: bool, shows_speckle: bool) -> Kind | None:
        overlaps = match.overlap >= self.min_overlap
        threshold = self.frame_threshold if shows_speckle else self.thumbnail_threshold
        if overlaps and match.correlation >= threshold:
            return "frame"
        same_place = overlaps and shows_speckle and _keeps_scale(match.placement)
        if same_place and match.correlation >= self.examination_threshold:
            return "examination"
        if is_neighbour and (is_alike or (same_place and match.correlation >= self.neighbour_threshold)):
            return "neighbour"
        return None


def _keeps_scale(placement: Placement) -> bool:
    """Whether both axes keep their scale within a sixth: weak correlations at odd scales mean nothing."""
    low, high = min(placement.scale), max(placement.scale)
    return low > 0.86 and high < 1.16


def _quantile(embeddings: np.ndarray, quantile: float) -> float:
    """Quantile of the cosine of pairs of different images; of a fixed sample of at most 2048 images."""
    if quantile >= 1 or len(embeddings) < 3:
        return float("inf")
    chosen = embeddings[np.linspace(0, len(embeddings) - 1, min(len(embeddings), 2048)).astype(int)]
    similarity = chosen @ chosen.T
    return float(np.quantile(similarity[np.triu_indices(len(chosen), 1)], quantile))


def _neighbouring(sequences: Sequence[tuple[str, int] | None], distance: int) -> set[tuple[int, int]]:
    by_name: dict[str, list[tuple[int, int]]] = {}
    for position, sequence in enumerate(sequences):
        if sequence is not None:
            by_name.setdefault(sequence[0], []).append((sequence[1], position))
    pairs = set()
    for members in by_name.values():
        members.sort()
        for k, (number, position) in enumerate(members):
            for other_number, other in members[k + 1 :]:
                if other_number - number > distance:
                    break
                pairs.add((min(position, other), max(position, other)))
    return pairs


def candidate_pairs(
    images: Sequence[np.ndarray], embeddings: np.ndarray, num_neighbours: int
) -> set[tuple[int, int]]:
    """Pairs worth registering: the nearest of each image by embedding, thumbnail, and thumbnails of crops.

    Of random square crops with 80 % of the side, 99 % are candidates of their image by thumbnails alone, with
    70 % of the side 96 %, with 60 % 70 % (300 planted copies among 300 BUSI images).
    """
    reduced = [
        Image.fromarray(as_grey(image)).resize((_REDUCED, _REDUCED), Image.Resampling.BOX) for image in images
    ]
    whole = _thumbnails(reduced, _WHOLE, 24)
    pairs = _nearest_pairs(embeddings, embeddings, num_neighbours)
    pairs |= _nearest_pairs(whole, whole, num_neighbours)
    coarse = _thumbnails(reduced, _WHOLE, 16)
    for box in _CROPS:
        pairs |= _nearest_pairs(_thumbnails(reduced, box, 16), coarse, 1, _MIN_CROP_SIMILARITY)
    return pairs


def _thumbnails(
    reduced: Sequence[Image.Image], box: tuple[float, float, float, float], side: int
) -> np.ndarray:
    """Unit-norm, locally normalised thumbnails of one crop of every image, (N, side²) float32."""
    top, left, height, width = (_REDUCED * part for part in box)
    place = (left, top, left + width, top + height)
    small = [image.resize((side, side), Image.Resampling.BILINEAR, box=place) for image in reduced]
    flat = locally_normalised(np.stack([np.asarray(image, np.float32) for image in small]), side / 8)
    flat = flat.reshape(len(small), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _nearest_pairs(
    queries: np.ndarray, keys: np.ndarray, count: int, min_similarity: float = -1.0
) -> set[tuple[int, int]]:
    """Each query with its `count` nearest keys of other images, where they are similar enough."""
    pairs: set[tuple[int, int]] = set()
    count = min(count, len(keys) - 1)
    if count < 1:
        return pairs
    for start in range(0, len(queries), _BLOCK):
        similarity = queries[start : start + _BLOCK] @ keys.T
        rows = np.arange(len(similarity))[:, None]
        similarity[rows[:, 0], start + rows[:, 0]] = -np.inf
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        near_enough = similarity[rows, nearest] >= min_similarity
        queries_of = np.broadcast_to(start + rows, nearest.shape)
        for row, other in zip(queries_of[near_enough].tolist(), nearest[near_enough].tolist()):
            pairs.add((min(row, other), max(row, other)))
    return pairs


def register_pairs(
    images: Sequence[np.ndarray],
    pairs: set[tuple[int, int]],
    *,
    min_coarse: float = 0.375,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[tuple[int, int], Match]:
    """The match of each pair, searched in both directions; pairs below `min_coarse` are left out.

    `progress` is called with the number of images whose coarse search is done.
    """
    registrar = Registrar(images)
    partners: dict[int, list[int]] = {}
    for first, second in sorted(pairs):
        partners.setdefault(first, []).append(second)
        partners.setdefault(second, []).append(first)
    found: dict[tuple[int, int], list[tuple[float, int, int, Placement]]] = {}
    for template, targets in sorted(partners.items()):
        for target, (score, placement) in zip(targets, registrar.coarse(template, targets)):
            if score >= min_coarse:
                key = (min(template, target), max(template, target))
                found.setdefault(key, []).append((score, template, target, placement))
        progress(1)
    return {key: _best_match(registrar, starts) for key, starts in sorted(found.items())}


def _best_match(registrar: Registrar, starts: list[tuple[float, int, int, Placement]]) -> Match:
    """The refined match of the better start; of both where the first leaves a doubt."""
    best: Match | None = None
    for _, template, target, placement in sorted(starts, key=lambda start: -start[0]):
        match = registrar.refine(template, target, placement)
        if best is None or match.correlation > best.correlation:
            best = match
        if not _DOUBTFUL[0] <= best.correlation < _DOUBTFUL[1]:
            break
    assert best is not None
    return best


def connected_groups(count: int, links: Sequence[tuple[int, int]]) -> np.ndarray:
    """(count,) int64: the smallest position in the connected component of each position (union-find)."""
    parent = np.arange(count, dtype=np.int64)

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = int(parent[node])
        return node

    for first, second in links:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return np.array([root(node) for node in range(count)], np.int64)
