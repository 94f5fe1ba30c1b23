"""The real BUSI images: counts, and no near-duplicate pair across splits by a second, independent detector."""

import csv
from pathlib import Path

import numpy as np
import pytest
from keypoint_detector import Keypoints, keypoints, matching_pairs

from factory.datasets.layout import ListingOptions
from factory.datasets.layouts import LAYOUTS
from factory.datasets.near_duplicates import NearDuplicates
from factory.datasets.preparation import PreparedDataset, prepare_dataset
from factory.datasets.splits import assign_splits
from factory.datasets.verification import VerifiedImage, verify_items
from factory.embedding import ImageEmbedder

pytestmark = pytest.mark.slow
VERIFIED_BY_EYE = Path(__file__).parent / "busi_pairs.csv"
MIN_INLIERS = 8


@pytest.fixture(scope="module")
def images(busi_folder: Path) -> list[VerifiedImage]:
    listing = LAYOUTS["busi"].listing(busi_folder, ListingOptions())
    return verify_items(listing.items, listing.problems)[0]


@pytest.fixture(scope="module")
def prepared(images: list[VerifiedImage]) -> PreparedDataset:
    embeddings = ImageEmbedder().load(num_threads=1).embed([verified.image for verified in images])
    return prepare_dataset(
        images, embeddings, LAYOUTS["busi"], ("benign", "malignant", "normal"),
        search=NearDuplicates(), fractions=(0.7, 0.1, 0.2), seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(images: list[VerifiedImage]) -> list[Keypoints]:
    return [keypoints(verified.image) for verified in images]


def test_counts(prepared: PreparedDataset) -> None:
    totals = {name: sum(splits.values()) for name, splits in prepared.summary.counts.items()}
    assert totals == {"benign": 437, "malignant": 210, "normal": 133}
    assert prepared.summary.num_empty_masks == {"benign": 0, "malignant": 0, "normal": 133}
    assert prepared.summary.num_colour == 16
    for splits in prepared.summary.counts.values():
        total = sum(splits.values())
        for split, fraction in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
            assert splits[split] == pytest.approx(fraction * total, abs=0.02 * total)
    assert len(set(prepared.image_ids)) == 780
    assert prepared.summary.unit == "image-group level, patients unknown"


def test_several_masks_are_merged(images: list[VerifiedImage]) -> None:
    merged = [verified for verified in images if len(verified.item.masks or ()) > 1]
    assert len(merged) == 17


def test_known_conflicts_and_shortcuts_are_reported(prepared: PreparedDataset) -> None:
    pairs = {(conflict.first, conflict.second) for conflict in prepared.summary.conflicts}
    assert ("benign/benign (433).png", "malignant/malignant (145).png") in pairs
    assert 8 <= len(pairs) <= 16
    assert prepared.summary.shortcuts.all == pytest.approx(0.62, abs=0.05)


def test_pairs_verified_by_eye_are_in_one_split(prepared: PreparedDataset) -> None:
    place = {verified.item.source_path: k for k, verified in enumerate(prepared.images)}
    with VERIFIED_BY_EYE.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) > 250
    apart = {"frame": [], "examination": []}  # type: ignore[var-annotated]
    for row in rows:
        first, second = place[row["first"]], place[row["second"]]
        if prepared.groups.group[first] != prepared.groups.group[second]:
            apart[row["kind"]].append((row["first"], row["second"]))
    assert not apart["frame"]
    assert len(apart["examination"]) <= 6, apart


@pytest.mark.soak
def test_an_independent_detector_finds_no_pair_across_splits(
    prepared: PreparedDataset, found: list[Keypoints]
) -> None:
    pairs = matching_pairs(found, prepared.splits, MIN_INLIERS)
    names = [(prepared.images[a].item.source_path, prepared.images[b].item.source_path) for a, b, _ in pairs]
    assert not names


@pytest.mark.soak
def test_the_independent_detector_would_have_found_them(
    prepared: PreparedDataset, found: list[Keypoints]
) -> None:
    """Positive control: the same detector on an ungrouped split of the images that have duplicates."""
    sizes = np.bincount(prepared.groups.group)
    grouped = [k for k in range(780) if sizes[prepared.groups.group[k]] > 1][:150]
    labels = np.array([prepared.class_names.index(prepared.images[k].item.label_name) for k in grouped])
    ungrouped = assign_splits(np.arange(len(grouped)), labels)
    assert len(matching_pairs([found[k] for k in grouped], ungrouped.tolist(), MIN_INLIERS)) > 10
