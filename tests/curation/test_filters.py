"""Filters: planted outliers get their reason, real rows pass, verdicts need the scores alone."""

import dataclasses
import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from factory import geometry
from factory.curation.filters import (
    BlankImage,
    DegenerateMask,
    FilterBatch,
    FittedFilter,
    SimilarityBand,
    first_reasons,
)
from factory.datasets.phantom import BENIGN, MALIGNANT, NORMAL, PhantomConfig, phantom_sample
from factory.imaging import TrainingRow
from schemas.sample import RejectReason

CONFIG = PhantomConfig(size=96, classes=(BENIGN, MALIGNANT, NORMAL))


def thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """Unit-norm features that see coarse structure: 8 × 8 cell means about the image's own mean."""
    cells = np.array([i.reshape(8, len(i) // 8, 8, -1).mean(axis=(1, 3)).ravel() for i in images], np.float32)
    cells -= cells.mean(axis=1, keepdims=True)
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-6)


def phantom_rows(seed: int, num: int) -> list[TrainingRow]:
    samples = [phantom_sample(CONFIG, seed, index) for index in range(num)]
    return [
        TrainingRow(
            image_id=f"{seed}-{index}",
            label=CONFIG.class_names.index(sample.label_name),
            label_name=sample.label_name,
            group_id=f"{seed}-{index}",
            image=sample.image,
            mask=sample.mask,
            attributes={},
        )
        for index, sample in enumerate(samples)
    ]


@pytest.fixture(scope="module")
def rows() -> list[TrainingRow]:
    return phantom_rows(1, 240)


@pytest.fixture(scope="module")
def others() -> list[TrainingRow]:
    """Rows of the same population that nothing is fitted on."""
    return phantom_rows(2, 200)


def batch_of(rows: Sequence[TrainingRow], embeddings: np.ndarray | None = None) -> FilterBatch:
    images = [row.image for row in rows]
    return FilterBatch(
        images=images,
        requested_masks=[row.mask for row in rows],
        masks=[row.mask for row in rows],
        labels=np.array([row.label for row in rows]),
        embeddings=thumbnails(images) if embeddings is None else embeddings,
    )


def reasons(fitted: FittedFilter, rows: Sequence[TrainingRow]) -> list[RejectReason | None]:
    return fitted.verdict(fitted.score(batch_of(rows)))


def disc(radius: float, x: float = 48, y: float = 48) -> np.ndarray:
    return geometry.ellipse((96, 96), x=x, y=y, a=radius, b=radius)


# ------------------------------------------------------------------------------------------ all filters


@pytest.mark.parametrize(
    ("source", "most"), [(DegenerateMask(), 0.02), (BlankImage(), 0.02), (SimilarityBand(), 0.06)]
)
def test_unseen_rows_of_the_population_pass(
    source, most: float, rows: list[TrainingRow], others: list[TrainingRow]
) -> None:
    fitted = source.fit(rows, thumbnails([row.image for row in rows]))
    found = reasons(fitted, others)
    print(
        type(source).__name__, f"{np.mean([r is not None for r in found]):.3f} of unseen real rows rejected"
    )
    assert np.mean([reason is not None for reason in found]) <= most


@pytest.mark.parametrize("source", [DegenerateMask(), BlankImage(), SimilarityBand()])
def test_scores_are_float32_for_every_row_and_verdict_needs_nothing_else(
    source, rows: list[TrainingRow], others: list[TrainingRow]
) -> None:
    embeddings = thumbnails([row.image for row in rows])
    fitted = source.fit(rows, embeddings)
    scores = fitted.score(batch_of(others))
    for values in scores.values():
        assert values.dtype == np.float32 and values.shape == (len(others),)
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    stored = {name: values.tolist() for name, values in scores.items()}  # as a table gives them back
    assert again.verdict(stored) == fitted.verdict(scores) == reasons(again, others)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = source.fit([rows[k] for k in order], embeddings[order])
    assert shuffled.fitted_on == fitted.fitted_on != source.fit(rows[1:], embeddings[1:]).fitted_on
    for name, values in shuffled.score(batch_of(others)).items():
        np.testing.assert_array_equal(values, scores[name])
    with pytest.raises(ValueError, match="is missing"):
        fitted.verdict({})
    empty = fitted.score(batch_of([], np.empty((0, 64), np.float32)))
    assert fitted.verdict(empty) == [] and set(empty) == set(scores)


def test_one_row_scores_as_in_a_batch(rows: list[TrainingRow], others: list[TrainingRow]) -> None:
    for source in (DegenerateMask(), BlankImage(), SimilarityBand()):
        fitted = source.fit(rows, thumbnails([row.image for row in rows]))
        together = fitted.score(batch_of(others[:16]))
        for k, row in enumerate(others[:16]):
            for name, value in fitted.score(batch_of([row])).items():
                np.testing.assert_allclose(value[0], together[name][k], rtol=1e-4, atol=1e-6)


def test_first_filter_with_a_reason_speaks(rows: list[TrainingRow]) -> None:
    mask, blank = (source.fit(rows, np.empty(0)) for source in (DegenerateMask(), BlankImage()))
    bad = dataclasses.replace(rows[0], label=0, image=np.zeros((96, 96), np.uint8), mask=disc(0.5) * 0)
    batch = batch_of([bad])
    scores = mask.score(batch) | blank.score(batch)
    assert first_reasons([mask, blank], scores, 1) == [RejectReason.EMPTY_MASK]
    assert first_reasons([blank, mask], scores, 1) == [RejectReason.BLANK_IMAGE]
    assert first_reasons([], {}, 2) == [None, None]


def test_batch_refuses_fields_of_different_length(rows: list[TrainingRow]) -> None:
    with pytest.raises(ValueError, match=r"'labels': 3"):
        dataclasses.replace(batch_of(rows[:2]), labels=np.zeros(3))


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (disc(14), None),
        (disc(14) * 0, RejectReason.EMPTY_MASK),
        (disc(2), RejectReason.MASK_TOO_SMALL),
        (disc(45), RejectReason.MASK_TOO_LARGE),
        (np.maximum(disc(14), disc(2, x=85, y=85)), RejectReason.MASK_FRAGMENTED),
        (np.maximum(disc(12, x=25), disc(12, x=65)), RejectReason.MASK_FRAGMENTED),
        (disc(14, x=8), RejectReason.MASK_TOUCHES_BORDER),
    ],
)
def test_degenerate_masks_get_their_reason(
    rows: list[TrainingRow], mask: np.ndarray, reason: RejectReason | None
) -> None:
    fitted = DegenerateMask().fit(rows, np.empty(0))
    assert reasons(fitted, [dataclasses.replace(rows[0], label=0, mask=mask)]) == [reason]


def test_class_without_lesions_wants_an_empty_mask(rows: list[TrainingRow]) -> None:
    fitted = DegenerateMask().fit(rows, np.empty(0))
    normal = next(row for row in rows if row.label == 2)
    assert reasons(fitted, [normal]) == [None]
    assert reasons(fitted, [dataclasses.replace(normal, mask=disc(10))]) == [RejectReason.MASK_TOO_LARGE]


def test_several_lesions_are_fine_where_training_rows_have_them(rows: list[TrainingRow]) -> None:
    two = np.maximum(disc(12, x=25), disc(12, x=65))
    with_two = [*rows, dataclasses.replace(rows[0], image_id="two", label=0, mask=two)]
    fitted = DegenerateMask().fit(with_two, np.empty(0))
    assert reasons(fitted, [dataclasses.replace(rows[0], label=0, mask=two)]) == [None]
    speck = np.maximum(two, disc(1, x=90, y=5))
    assert reasons(fitted, [dataclasses.replace(rows[0], label=0, mask=speck)]) == [
        RejectReason.MASK_FRAGMENTED
    ]


def test_rows_without_mask_and_unknown_classes_have_no_mask_scores(rows: list[TrainingRow]) -> None:
    fitted = DegenerateMask().fit([row for row in rows if row.label == 0], np.empty(0))
    strangers = [dataclasses.replace(rows[0], mask=None), dataclasses.replace(rows[0], label=1)]
    scores = fitted.score(batch_of(strangers))
    assert all(np.isnan(values).all() for values in scores.values())
    assert fitted.verdict(scores) == [None, None]


def test_thresholds_change_on_stored_scores(rows: list[TrainingRow], others: list[TrainingRow]) -> None:
    embeddings = thumbnails([row.image for row in rows])
    mask, band = DegenerateMask().fit(rows, embeddings), SimilarityBand().fit(rows, embeddings)
    scores = mask.score(batch_of(others)) | band.score(batch_of(others))
    strict_mask = dataclasses.replace(mask, source=DegenerateMask(area_margin=1.0))
    strict_band = dataclasses.replace(band, source=SimilarityBand(lower=0.25, upper=0.75))
    assert sum(map(bool, strict_mask.verdict(scores))) > sum(map(bool, mask.verdict(scores)))
    lesions = [k for k, row in enumerate(others) if row.label != 2]
    rejected = [bool(r) for k, r in enumerate(strict_band.verdict(scores)) if k in lesions]
    assert 0.35 < np.mean(rejected) < 0.65


# ------------------------------------------------------------------------------------------ pixels


def planted_blanks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    faint = np.clip(100 + rng.normal(0, 2, (96, 96)), 0, 255).astype(np.uint8)
    half = np.zeros((96, 96), np.uint8)
    half[:48] = 255
    return {
        "black": np.zeros((96, 96), np.uint8),
        "white": np.full((96, 96), 255, np.uint8),
        "grey": np.full((96, 96), 117, np.uint8),
        "faint": faint,
        "saturated halves": half,
        "uniform noise": rng.integers(0, 256, (96, 96), np.uint8),
        "normal noise": np.clip(rng.normal(110, 45, (96, 96)), 0, 255).astype(np.uint8),
        "colour noise": rng.integers(0, 256, (96, 96, 3), np.uint8),
        "colour constant": np.full((96, 96, 3), (200, 10, 10), np.uint8),
    }


@pytest.mark.parametrize("name", sorted(planted_blanks()))
def test_images_without_a_picture_are_rejected(rows: list[TrainingRow], name: str) -> None:
    fitted = BlankImage().fit(rows, np.empty(0))
    row = dataclasses.replace(rows[0], image=planted_blanks()[name])
    scores = fitted.score(batch_of([row], np.ones((1, 1), np.float32)))
    assert fitted.verdict(scores) == [RejectReason.BLANK_IMAGE]
    assert all(np.isfinite(values).all() for values in scores.values())


def test_roughness_is_zero_to_one(rows: list[TrainingRow]) -> None:
    fitted = BlankImage().fit(rows, np.empty(0))
    blanks = planted_blanks()
    batch = [dataclasses.replace(rows[0], image=blanks[name]) for name in ("uniform noise", "grey")]
    noise, flat = fitted.score(batch_of(batch))["image_roughness"]
    assert noise == pytest.approx(1, abs=0.05)
    assert flat == 0
    assert fitted.roughness < 0.7


def test_letterboxed_images_pass_when_training_images_are_letterboxed(rows: list[TrainingRow]) -> None:
    def padded(row: TrainingRow) -> TrainingRow:
        image = np.zeros_like(row.image)
        image[20:76] = row.image[20:76]
        return dataclasses.replace(row, image=image)

    fitted = BlankImage().fit([padded(row) for row in rows[:100]], np.empty(0))
    assert not any(reasons(fitted, [padded(row) for row in rows[100:200]]))


def test_blank_image_needs_rows() -> None:
    with pytest.raises(ValueError, match="no training rows"):
        BlankImage().fit([], np.empty((0, 3)))


# ------------------------------------------------------------------------------------------ embeddings


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def bare_rows(labels: Sequence[int], groups: Sequence[object]) -> list[TrainingRow]:
    image = np.zeros((8, 8), np.uint8)
    return [
        TrainingRow(
            image_id=f"r{k}", label=label, label_name=f"class {label}", group_id=str(group), image=image,
            mask=None, attributes={},
        )
        for k, (label, group) in enumerate(zip(labels, groups))
    ]  # fmt: skip


def test_exact_copy_and_white_noise_leave_the_band(rows: list[TrainingRow]) -> None:
    fitted = SimilarityBand().fit(rows, thumbnails([row.image for row in rows]))
    noise = np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)
    references = {vector.tobytes() for item in fitted.classes.values() for vector in item.references}
    copies = [row for row in rows if thumbnails([row.image])[0].tobytes() in references][:20]
    assert len(copies) == 20
    assert reasons(fitted, copies) == [RejectReason.TOO_SIMILAR_TO_REAL] * 20
    assert reasons(fitted, [dataclasses.replace(rows[0], image=noise)]) == [RejectReason.TOO_FAR_FROM_REAL]


def test_own_group_is_excluded_from_the_bounds() -> None:
    """Twins of one patient are nearly identical; they must not raise the upper bound."""
    rng = np.random.default_rng(0)
    patients = rng.standard_normal((60, 32)) + 1.5
    twins = unit(np.repeat(patients, 2, axis=0) + 0.01 * rng.standard_normal((120, 32)))
    grouped = SimilarityBand().fit(bare_rows([0] * 120, np.repeat(range(60), 2)), twins)
    ungrouped = SimilarityBand().fit(bare_rows([0] * 120, range(120)), twins)
    assert grouped.classes[0].nearest.max() < 0.95 < 0.99 < np.median(ungrouped.classes[0].nearest)
    batch = FilterBatch(
        images=[None] * 60, requested_masks=[None] * 60, masks=[None] * 60, labels=np.zeros(60),  # type: ignore[list-item]
        embeddings=unit(patients + 0.01 * rng.standard_normal(patients.shape)),
    )  # fmt: skip
    caught = [grouped.verdict(grouped.score(batch)), ungrouped.verdict(ungrouped.score(batch))]
    assert caught[0].count(RejectReason.TOO_SIMILAR_TO_REAL) > 55
    assert caught[1].count(RejectReason.TOO_SIMILAR_TO_REAL) < 10


def test_bounds_are_computed_at_the_reference_size_of_scoring() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((100, 16)) + 1)
    groups = [0] * 30 + list(range(1, 71))
    fitted = SimilarityBand().fit(bare_rows([0] * 100, groups), vectors)
    item = fitted.classes[0]
    assert item.references.shape == (70, 16)  # 100 less the largest group
    assert item.nearest.shape == (100,)
    unseen = unit(rng.standard_normal((4000, 16)) + 1)
    nearest = (unseen @ item.references.T).max(axis=1)
    assert np.median(nearest) == pytest.approx(np.median(item.nearest), abs=0.015)


def test_small_classes_are_off_and_say_why() -> None:
    rng = np.random.default_rng(0)
    labels, groups = [0] * 40 + [1] * 12 + [2] * 30, [*range(52), *([99] * 30)]
    fitted = SimilarityBand().fit(bare_rows(labels, groups), unit(rng.standard_normal((82, 8)) + 2))
    assert set(fitted.off) == {1, 2}
    assert "'class 1' has 11 references" in fitted.off[1] and "20 are needed" in fitted.off[1]
    assert "'class 2' has 0 references" in fitted.off[2]
    batch = FilterBatch(
        images=[None] * 4, requested_masks=[None] * 4, masks=[None] * 4, labels=np.array([0, 1, 2, 3]),  # type: ignore[list-item]
        embeddings=unit(-np.ones((4, 8))),
    )  # fmt: skip
    scores = fitted.score(batch)
    np.testing.assert_array_equal(np.isnan(scores["similarity"]), [False, False, False, True])
    np.testing.assert_array_equal(np.isnan(scores["similarity_position"]), [False, True, True, True])
    assert fitted.verdict(scores) == [RejectReason.TOO_FAR_FROM_REAL, None, None, None]


def test_band_is_per_class() -> None:
    rng = np.random.default_rng(0)
    tight, wide = rng.standard_normal((60, 16)) * 0.2 + 1, rng.standard_normal((60, 16)) - 1
    fitted = SimilarityBand().fit(
        bare_rows([0] * 60 + [1] * 60, range(120)), unit(np.concatenate([tight, wide]))
    )
    vector = unit(np.ones(16) + rng.standard_normal(16))
    batch = FilterBatch(
        images=[None] * 2, requested_masks=[None] * 2, masks=[None] * 2, labels=np.array([0, 1]),  # type: ignore[list-item]
        embeddings=np.stack([vector, -vector]),
    )  # fmt: skip
    assert fitted.verdict(fitted.score(batch)) == [RejectReason.TOO_FAR_FROM_REAL, None]


def test_position_is_a_quantile_inside_and_grows_beyond_the_ends() -> None:
    rng = np.random.default_rng(0)
    item = SimilarityBand().fit(bare_rows([0] * 80, range(80)), unit(rng.standard_normal((80, 8)))).classes[0]
    low, high = item.nearest[0], item.nearest[-1]
    positions = item.position(
        np.array([low - 0.2, low - 0.1, low, np.median(item.nearest), high, high + 0.05])
    )
    assert (np.diff(positions) > 0).all()
    assert positions[2:5] == pytest.approx([0, 0.5, 1], abs=0.02)
    spread = np.subtract(*np.quantile(item.nearest, [0.75, 0.25]))
    assert positions[0] == pytest.approx(-0.2 / spread, rel=1e-3)


def test_embeddings_are_checked() -> None:
    rows = bare_rows([0] * 3, range(3))
    with pytest.raises(ValueError, match=r"want \(3, D\)"):
        SimilarityBand().fit(rows, np.ones((2, 4), np.float32))
    with pytest.raises(ValueError, match="unit norm"):
        SimilarityBand().fit(rows, np.ones((3, 4), np.float32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimilarityBand(lower=0.9, upper=0.1),
        lambda: SimilarityBand(min_references=1),
        lambda: BlankImage(margin=0.5),
        lambda: BlankImage(roughness_margin=2),
        lambda: DegenerateMask(quantile=0.7),
        lambda: DegenerateMask(max_fragments=-1),
    ],
)
def test_bad_settings_are_refused(make) -> None:
    with pytest.raises(ValueError, match="want"):
        make()
