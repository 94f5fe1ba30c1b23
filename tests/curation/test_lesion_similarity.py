"""SimilarityBand on lesion crops: the lesion is judged, not the background around it."""

import dataclasses
import itertools
import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from factory.curation.filters import DegenerateMask, FilterBatch, FittedSimilarityBand, SimilarityBand
from factory.curation.lesion_crops import MARGIN, embed_crops, lesion_area, lesion_crop
from factory.datasets.phantom import BENIGN, MALIGNANT, PhantomConfig, phantom_sample
from factory.imaging import TrainingRow
from schemas.sample import RejectReason

CONFIG = PhantomConfig(size=96, classes=(BENIGN, MALIGNANT))
BAND = SimilarityBand(region="lesion")


def thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """Unit-norm features of any size of image: means of 8 × 8 cells about their own mean."""
    cells = []
    for image in images:
        edges = [np.linspace(0, side, 9).astype(int)[:-1] for side in image.shape[:2]]
        rows = np.add.reduceat(image.astype(np.float64), edges[0], axis=0)
        sums = np.add.reduceat(rows, edges[1], axis=1)
        counts = np.outer(*(np.diff([*e, side]) for e, side in zip(edges, image.shape)))
        cells.append((sums / counts).ravel())
    out = np.array(cells, np.float32)
    out -= out.mean(axis=1, keepdims=True)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)


def phantom_rows(seed: int, num: int) -> list[TrainingRow]:
    rows = []
    for index in range(num):
        sample = phantom_sample(CONFIG, seed, index)
        rows.append(
            TrainingRow(
                image_id=f"{seed}-{index}",
                label=CONFIG.class_names.index(sample.label_name),
                label_name=sample.label_name,
                group_id=f"{seed}-{index}",
                image=sample.image,
                mask=sample.mask,
                attributes={},
            )
        )
    return rows


@pytest.fixture(scope="module")
def rows() -> list[TrainingRow]:
    return phantom_rows(1, 240)


@pytest.fixture(scope="module")
def others() -> list[TrainingRow]:
    return phantom_rows(2, 160)


def fit(rows: Sequence[TrainingRow], band: SimilarityBand = BAND) -> FittedSimilarityBand:
    return band.fit(rows, thumbnails([row.image for row in rows]), thumbnails)


def batch_of(rows: Sequence[TrainingRow]) -> FilterBatch:
    images, masks = [row.image for row in rows], [row.mask for row in rows]
    return FilterBatch(
        images=images,
        requested_masks=masks,
        masks=masks,
        labels=np.array([row.label for row in rows]),
        embeddings=thumbnails(images),
        crop_embeddings=embed_crops(images, masks, thumbnails, 64),
    )


def reasons(fitted: FittedSimilarityBand, rows: Sequence[TrainingRow]) -> list[RejectReason | None]:
    return fitted.verdict(fitted.score(batch_of(rows)))


def test_the_crop_is_the_lesion_with_its_margin_inside_the_frame() -> None:
    image = np.arange(100 * 100, dtype=np.uint32).reshape(100, 100).astype(np.uint8)
    mask = np.zeros((100, 100), np.uint8)
    mask[40:60, 30:70] = 1
    crop = lesion_crop(image, mask)
    assert crop is not None and crop.shape == (60, 60) and MARGIN == 0.25
    assert np.array_equal(crop, image[20:80, 20:80])
    corner = np.zeros((100, 100), np.uint8)
    corner[:10, 90:] = 2
    assert np.array_equal(lesion_crop(image, corner), image[:15, 85:])  # type: ignore[arg-type]
    assert np.array_equal(lesion_crop(image, np.ones((100, 100), np.uint8)), image)  # type: ignore[arg-type]
    assert lesion_crop(image, None) is None and lesion_crop(image, mask * 0) is None
    assert lesion_area(mask) == pytest.approx(0.08) and np.isnan(lesion_area(None))
    with pytest.raises(ValueError, match="mask"):
        lesion_crop(image, mask[:50])


def test_rows_without_lesion_have_no_crop_embedding(rows: list[TrainingRow]) -> None:
    images = [row.image for row in rows[:3]]
    found = embed_crops(images, [rows[0].mask, None, np.zeros((96, 96), np.uint8)], thumbnails, 64)
    assert np.isfinite(found[0]).all() and np.isnan(found[1:]).all()
    assert embed_crops([], [], thumbnails, 64).shape == (0, 64)


def test_unseen_lesions_of_the_population_pass(rows: list[TrainingRow], others: list[TrainingRow]) -> None:
    rejected = np.mean([reason is not None for reason in reasons(fit(rows), others)])
    print(f"{rejected:.3f} of unseen real lesions rejected")
    assert rejected <= 0.06


def test_a_copied_lesion_is_too_similar_whatever_its_background(rows: list[TrainingRow]) -> None:
    fitted = fit(rows)
    references = {vector.tobytes() for item in fitted.classes.values() for vector in item.references}
    copies = []
    for row, other in itertools.pairwise(rows):
        crop = embed_crops([row.image], [row.mask], thumbnails, 64)[0]
        if crop.tobytes() not in references:
            continue
        assert row.mask is not None
        box = lesion_crop(np.arange(96 * 96).reshape(96, 96).astype(np.int64), row.mask)  # type: ignore[arg-type]
        assert box is not None
        inside = np.isin(np.arange(96 * 96).reshape(96, 96), box)
        copies.append(dataclasses.replace(row, image=np.where(inside, row.image, other.image)))
    assert len(copies) > 200
    assert reasons(fitted, copies[:40]) == [RejectReason.TOO_SIMILAR_TO_REAL] * 40
    frame = SimilarityBand().fit(rows, thumbnails([row.image for row in rows]))
    assert reasons(frame, copies[:40]).count(RejectReason.TOO_SIMILAR_TO_REAL) < 30


def test_noise_in_place_of_the_lesion_is_too_far(rows: list[TrainingRow]) -> None:
    rng = np.random.default_rng(0)
    noisy = [
        dataclasses.replace(row, image=rng.integers(0, 256, row.image.shape, dtype=np.uint8))
        for row in rows[:20]
    ]
    assert reasons(fit(rows), noisy) == [RejectReason.TOO_FAR_FROM_REAL] * 20


def test_the_own_group_is_excluded_from_the_bounds(rows: list[TrainingRow]) -> None:
    """Every patient is there twice: by group the bounds stay those of other patients."""
    rng = np.random.default_rng(0)
    twins = [
        dataclasses.replace(
            row,
            image_id=f"{row.image_id}-twin",
            image=np.clip(row.image + rng.normal(0, 2, row.image.shape), 0, 255).astype(np.uint8),
        )
        for row in rows
    ]
    grouped = fit([*rows, *twins])
    apart = fit([*rows, *(dataclasses.replace(t, group_id=t.image_id) for t in twins)])
    for label in (0, 1):
        assert np.median(grouped.classes[label].nearest) < 0.97 < np.median(apart.classes[label].nearest)


def test_bounds_are_per_third_of_the_lesions_size(rows: list[TrainingRow]) -> None:
    fitted = fit(rows)
    for label, item in fitted.classes.items():
        areas = [lesion_area(row.mask) for row in rows if row.label == label]
        assert len(item.by_size) == 3
        assert item.edges == pytest.approx(np.quantile(areas, [1 / 3, 2 / 3]))
        assert sum(map(len, item.by_size)) == len(item.nearest) == len(areas)
        values = item.position(np.full(3, 0.9), np.array([0.0, item.edges.mean(), 1.0]))
        expected = [np.interp(0.9, n, np.linspace(0, 1, len(n))) for n in item.by_size]
        assert values == pytest.approx(expected, abs=1e-3) or (values > 1).any()


@pytest.mark.parametrize(("count", "bins"), [(30, 1), (45, 2), (60, 3)])
def test_few_lesions_share_a_bin(rows: list[TrainingRow], count: int, bins: int) -> None:
    benign = [row for row in rows if row.label == 0][:count]
    item = fit(benign).classes[0]
    assert len(item.by_size) == bins and not item.off
    few = fit(benign[:15])
    assert "14 references" in few.off[0]


def test_lesions_of_one_size_share_a_bin(rows: list[TrainingRow]) -> None:
    mask = np.zeros((96, 96), np.uint8)
    mask[30:60, 30:60] = 1
    same = [dataclasses.replace(row, mask=mask) for row in rows if row.label == 0]
    assert len(fit(same).classes[0].by_size) == 1


def test_scores_have_names_of_their_own_and_survive_pickling(rows: list[TrainingRow]) -> None:
    fitted = fit(rows)
    batch = batch_of([*rows[:4], dataclasses.replace(rows[4], mask=None)])
    scores = fitted.score(batch)
    assert set(scores) == {"lesion_similarity", "lesion_similarity_position"}
    assert np.isnan(scores["lesion_similarity"]).tolist() == [False] * 4 + [True]
    assert fitted.verdict(scores)[-1] is None
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    assert again.verdict(scores) == fitted.verdict(scores) and again.needs_crops
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = fit([rows[k] for k in order]).score(batch)
    for name, values in scores.items():
        np.testing.assert_array_equal(values, shuffled[name])


def test_what_is_missing_is_named(rows: list[TrainingRow]) -> None:
    with pytest.raises(ValueError, match="embedder"):
        BAND.fit(rows, thumbnails([row.image for row in rows]))
    with pytest.raises(ValueError, match="crop_embeddings"):
        fit(rows).score(dataclasses.replace(batch_of(rows[:2]), crop_embeddings=None))
    with pytest.raises(ValueError, match="differ in length"):
        dataclasses.replace(batch_of(rows[:2]), crop_embeddings=np.zeros((1, 64)))
    with pytest.raises(ValueError, match="region"):
        SimilarityBand(region="rim")  # type: ignore[arg-type]
    without = [dataclasses.replace(row, mask=None) for row in rows]
    assert set(fit(without).off) == {0, 1}


def test_a_row_without_mask_has_no_verdict_by_its_mask(rows: list[TrainingRow]) -> None:
    fitted = DegenerateMask().fit(rows, np.zeros((len(rows), 1)))
    scores = fitted.score(batch_of([dataclasses.replace(rows[0], mask=None)]))
    assert all(np.isnan(values).all() for values in scores.values())
    assert fitted.verdict(scores) == [None]
