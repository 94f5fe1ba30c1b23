"""A second, independent detector of near-duplicates, to check the first one with.

It shares nothing with `factory.datasets.registration`: no embeddings, no candidates, no correlation. SIFT
keypoints (Lowe 2004) of every image are matched against those of every image of the other splits, and a
similarity without rotation is fitted by RANSAC; many consistent keypoints mean the same frame.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from skimage.feature import SIFT

from factory.imaging import as_grey

SIDE = 192
MAX_KEYPOINTS = 110
MIN_MATCHES = 7
TOLERANCE = 3.0


def keypoints(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) complex positions x + iy in px of the scaled image, (K, 128) unit-norm descriptors; coarsest first."""
    grey = Image.fromarray(as_grey(image))
    scale = SIDE / max(grey.size)
    pixels = np.asarray(
        grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.LANCZOS)
    )
    detector = SIFT(upsampling=1, c_dog=0.004)
    try:
        detector.detect_and_extract(pixels / 255.0)
    except RuntimeError:  # no keypoint in a blank image
        return np.zeros(0, complex), np.zeros((0, 128), np.float32)
    order = np.argsort(-detector.sigmas)[:MAX_KEYPOINTS]
    places = detector.positions[order]
    descriptors = detector.descriptors[order].astype(np.float32)
    return places[:, 1] + 1j * places[:, 0], descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)


Keypoints = tuple[np.ndarray, np.ndarray]


def matching_pairs(
    found: Sequence[Keypoints], sides: Sequence[str], min_inliers: int
) -> list[tuple[int, int, int]]:
    """(first, second, inliers) of all pairs on different `sides` with at least `min_inliers`; `found` is the
    `keypoints` of each image."""
    starts = np.concatenate([[0], np.cumsum([len(places) for places, _ in found])])
    everything = np.concatenate([descriptors for _, descriptors in found])
    pairs = []
    for first in range(len(found)):
        similarity = found[first][1] @ everything[starts[first + 1] :].T
        for second in range(first + 1, len(found)):
            if sides[first] == sides[second]:
                continue
            low, high = starts[second] - starts[first + 1], starts[second + 1] - starts[first + 1]
            places = _matched(similarity[:, low:high], found[first][0], found[second][0])
            if places is not None:
                inliers = count_inliers(*places)
                if inliers >= min_inliers:
                    pairs.append((first, second, inliers))
    return pairs


def _matched(
    similarity: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Places of mutual best matches that pass Lowe's ratio test, if there are enough."""
    if min(similarity.shape) < MIN_MATCHES:
        return None
    best = similarity.argmax(axis=1)
    rows = np.arange(len(best))
    mutual = similarity.argmax(axis=0)[best] == rows
    if mutual.sum() < MIN_MATCHES:
        return None
    rows = rows[mutual]
    top_two = np.partition(similarity[rows], -2, axis=1)[:, -2:]
    rows = rows[1 - top_two[:, 1] < 0.64 * (1 - top_two[:, 0])]
    return (first[rows], second[best[rows]]) if len(rows) >= MIN_MATCHES else None


def count_inliers(first: np.ndarray, second: np.ndarray, num_draws: int = 150) -> int:
    """Most places (complex, px) that one similarity with less than 0.12 rad of rotation maps within TOLERANCE."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(len(first), size=(2, num_draws))
    spread = np.abs(first[b] - first[a]) > 12
    a, b = a[spread], b[spread]
    turn = (second[b] - second[a]) / (first[b] - first[a])
    usable = (np.abs(np.angle(turn)) < 0.12) & (np.abs(turn) > 0.4) & (np.abs(turn) < 2.5)
    turn, a = turn[usable], a[usable]
    if not len(turn):
        return 0
    mapped = turn[:, None] * (first[None, :] - first[a][:, None]) + second[a][:, None]
    return int((np.abs(mapped - second[None, :]) < TOLERANCE).sum(axis=1).max())
