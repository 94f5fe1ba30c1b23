"""Kept links: exact for any set of rows, used only where they fit, never half-written."""

from pathlib import Path

import numpy as np
import pytest

from factory.curation.dedup import linked_pairs
from factory.curation.link_store import LinkSettings, load_links, row_checksums, save_links

SETTINGS = LinkSettings(embedder="tiny", limits={"benign": 0.9, "malignant": 0.95})


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rows(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = sorted({f"{number:032x}" for number in rng.integers(1 << 60, size=count)})
    return ids, unit(rng.normal(size=(len(ids), 3)))


def exact(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = list(linked_pairs(vectors, 0.9, 1))
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


def named(ids: list[str], first: np.ndarray, second: np.ndarray) -> set[tuple[str, str]]:
    return {(ids[a], ids[b]) for a, b in zip(first.tolist(), second.tolist())}


def save(folder: Path, ids: list[str], vectors: np.ndarray, settings: LinkSettings = SETTINGS) -> Path:
    return save_links(folder, settings, ids, row_checksums(vectors), *exact(vectors), exact=True)


def test_links_come_back_in_the_numbers_of_a_grown_table(tmp_path: Path) -> None:
    ids, vectors = rows(300)
    old = np.sort(np.random.default_rng(1).permutation(300)[:200])
    old_ids = [ids[k] for k in old]
    save(tmp_path, old_ids, vectors[old])
    found = load_links(tmp_path, SETTINGS, ids, row_checksums(vectors))
    assert found.note == "" and found.exact
    assert np.flatnonzero(found.known).tolist() == old.tolist()
    assert named(ids, found.first, found.second) == named(old_ids, *exact(vectors[old]))
    assert (found.first < found.second).all() and len(found.first) > 100


def test_rows_that_are_gone_or_changed_are_not_known(tmp_path: Path) -> None:
    ids, vectors = rows(300)
    save(tmp_path, ids, vectors)
    changed = vectors.copy()
    changed[7] = np.nextafter(changed[7], 2)  # the last bit
    left = np.delete(np.arange(300), [3, 100])
    left_ids = [ids[k] for k in left]
    found = load_links(tmp_path, SETTINGS, left_ids, row_checksums(changed[left]))
    assert [left_ids[k] for k in np.flatnonzero(~found.known)] == [ids[7]]
    wanted = {p for p in named(ids, *exact(vectors)) if not {ids[3], ids[7], ids[100]} & set(p)}
    assert named(left_ids, found.first, found.second) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        LinkSettings(embedder="tiny", limits={"benign": 0.9, "malignant": 0.96}),
        LinkSettings(embedder="other", limits=SETTINGS.limits),
    ],
)
def test_links_of_other_settings_are_not_used_and_that_is_told(
    tmp_path: Path, settings: LinkSettings
) -> None:
    ids, vectors = rows(50)
    save(tmp_path, ids, vectors)
    found = load_links(tmp_path, settings, ids, row_checksums(vectors))
    assert not found.known.any() and "other thresholds or another embedder" in found.note
    assert load_links(tmp_path / "none", settings, ids, row_checksums(vectors)).note == ""


def test_a_damaged_file_is_not_used(tmp_path: Path) -> None:
    ids, vectors = rows(50)
    path = save(tmp_path, ids, vectors)
    other_ids, other = rows(50, seed=9)
    moved = save(tmp_path / "other", other_ids, other)
    whole = path.read_bytes()
    path.write_bytes(moved.read_bytes())  # readable, but not what its name says
    assert "damaged" in load_links(tmp_path, SETTINGS, ids, row_checksums(vectors)).note
    path.write_bytes(whole[:-100])
    found = load_links(tmp_path, SETTINGS, ids, row_checksums(vectors))
    assert "cannot be read" in found.note and not found.known.any()
    path.write_bytes(whole)
    assert load_links(tmp_path, SETTINGS, ids, row_checksums(vectors)).known.all()


def test_old_files_are_removed(tmp_path: Path) -> None:
    ids, vectors = rows(40)
    first = save(tmp_path, ids[:30], vectors[:30])
    second = save(tmp_path, ids, vectors)
    assert second.exists() and not first.exists()
    for value in (0.91, 0.92, 0.93, 0.94):
        save(tmp_path, ids, vectors, LinkSettings(embedder="tiny", limits={"benign": value}))
    assert len(list(tmp_path.iterdir())) == 3


def test_checksums_see_every_bit() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, 6)))
    sums = row_checksums(vectors, block_rows=7)
    assert len(set(sums.tolist())) == 40 and (row_checksums(vectors) == sums).all()
    for column in range(6):
        changed = vectors.copy()
        changed[5, column] = np.nextafter(changed[5, column], np.float32(2))
        assert (row_checksums(changed) != sums).nonzero()[0].tolist() == [5]
