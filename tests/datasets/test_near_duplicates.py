import numpy as np
import pytest
from frame_variants import VARIANTS, resized
from hypothesis import given
from hypothesis import strategies as st

from factory.datasets.near_duplicates import NearDuplicates, candidate_pairs, connected_groups
from factory.datasets.phantom import PhantomConfig, phantom_sample

LARGE = PhantomConfig(size=224)


def _noise_embeddings(count: int, seed: int = 0) -> np.ndarray:
    """Embeddings that know nothing: what is found is found by the images."""
    vectors = np.random.default_rng(seed).standard_normal((count, 64)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def planted() -> tuple[list[np.ndarray], np.ndarray]:
    """Sixteen frames, and the first eight of them once more as a variant; and the true group of each."""
    frames = [phantom_sample(LARGE, 3, index).image for index in range(16)]
    images = [*frames, *(make(frames[k]) for k, make in enumerate(VARIANTS.values()))]
    return images, np.array([*range(16), *range(len(VARIANTS))])


def test_variants_are_grouped_and_look_alikes_are_not(planted: tuple[list[np.ndarray], np.ndarray]) -> None:
    images, truth = planted
    found = NearDuplicates().find(images, _noise_embeddings(len(images)))
    assert np.array_equal(found.group, truth)
    assert {pair.kind for pair in found.pairs} == {"frame"}
    assert all(pair.correlation > 0.6 and pair.overlap > 0.5 for pair in found.pairs)


def test_candidates_hold_the_variants_without_any_help_of_embeddings(
    planted: tuple[list[np.ndarray], np.ndarray],
) -> None:
    images, truth = planted
    candidates = candidate_pairs(images, _noise_embeddings(len(images)), 3)
    expected = {(int(k), 16 + place) for place, k in enumerate(truth[16:])}
    assert expected <= candidates
    assert len(candidates) < 0.9 * len(images) * (len(images) - 1) / 2


def test_the_order_of_images_does_not_matter(planted: tuple[list[np.ndarray], np.ndarray]) -> None:
    images, truth = planted
    order = np.random.default_rng(1).permutation(len(images))
    found = NearDuplicates().find([images[k] for k in order], _noise_embeddings(len(images)))
    same = found.group[:, None] == found.group[None, :]
    assert np.array_equal(same, truth[order][:, None] == truth[order][None, :])


def test_alike_neighbours_are_linked_only_if_their_numbers_are_near() -> None:
    images = [phantom_sample(PhantomConfig(size=96), 9, index).image for index in range(12)]
    embeddings = _noise_embeddings(12)
    embeddings[1], embeddings[8] = embeddings[0], embeddings[4]
    numbers = [("m", k) for k in range(12)]
    search = NearDuplicates(neighbour_quantile=0.97)
    found = search.find(images, embeddings, sequences=numbers)
    assert [(pair.first, pair.second, pair.kind) for pair in found.pairs] == [(0, 1, "neighbour")]
    others = [("m", k) if k else ("n", k) for k in range(12)]
    assert not search.find(images, embeddings, sequences=others).pairs
    assert not search.find(images, embeddings).pairs
    assert not NearDuplicates(neighbour_quantile=1).find(images, embeddings, sequences=numbers).pairs


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(
    st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40))))  # fmt: skip
def test_connected_groups_are_the_components(case: tuple[int, list[tuple[int, int]]]) -> None:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count, links = case
    group = connected_groups(count, links)
    rows, columns = zip(*links) if links else ((), ())
    graph = coo_matrix((np.ones(len(links)), (rows, columns)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    assert np.array_equal(group[:, None] == group[None, :], labels[:, None] == labels[None, :])
    assert all(group[group == k].size and np.flatnonzero(group == k)[0] == k for k in np.unique(group))


def test_bad_arguments_are_named() -> None:
    images = [np.zeros((32, 32), np.uint8)] * 3
    with pytest.raises(ValueError, match="one row per image"):
        NearDuplicates().find(images, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="sequences: 1 given for 3"):
        NearDuplicates().find(images, _noise_embeddings(3), sequences=[None])
    with pytest.raises(ValueError, match="frame_threshold"):
        NearDuplicates(frame_threshold=1.5)


def test_thumbnails_are_linked_only_where_they_are_nearly_equal() -> None:
    """At 28 px there is no speckle: weak correlations mean nothing, equal pictures are still found."""
    frames = [resized(phantom_sample(PhantomConfig(size=112), 5, index).image, 0.25) for index in range(40)]
    copy = np.clip(frames[3] * 0.9 + np.random.default_rng(0).normal(0, 2, (28, 28)), 0, 255).astype(np.uint8)
    found = NearDuplicates().find([*frames, copy], _noise_embeddings(41))
    assert [(pair.first, pair.second, pair.kind) for pair in found.pairs] == [(3, 40, "frame")]
