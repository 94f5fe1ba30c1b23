"""Verdicts from stored scores: the stream's own again, and others with other thresholds."""

from typing import Any

import numpy as np
import pytest

from factory.curation.filters import BlankImage, DegenerateMask, FilterBatch, SimilarityBand, first_reasons
from factory.curation.rejudge import Override, judge_again, score_columns, with_thresholds
from factory.datasets.phantom import PhantomConfig, phantom_sample
from factory.imaging import TrainingRow


def training(count: int = 40) -> tuple[list[TrainingRow], np.ndarray]:
    samples = [phantom_sample(PhantomConfig(), 3, index) for index in range(count)]
    rows = [
        TrainingRow(
            image_id=f"{k:032x}",
            label=0,
            label_name="benign",
            group_id=f"g{k}",
            image=s.image,
            mask=s.mask,
            attributes={},
        )
        for k, s in enumerate(samples)
    ]
    vectors = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    return rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def scored() -> tuple[list, dict[str, np.ndarray], list[str | None]]:
    """Fitted filters, scores as they come back from a table, the stream's reasons."""
    rows, vectors = training()
    filters: list[Any] = [
        item.fit(rows, vectors) for item in (DegenerateMask(), BlankImage(), SimilarityBand())
    ]
    rng = np.random.default_rng(1)
    images = [row.image for row in rows[:18]] + [np.full_like(rows[0].image, 90), rows[1].image]
    masks = [row.mask for row in rows[:18]] + [rows[0].mask, np.zeros_like(rows[0].mask)]
    queries = rng.normal(size=(20, 8)).astype(np.float32)
    queries[3] = vectors[3]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    batch = FilterBatch(
        images=images, requested_masks=masks, masks=masks, labels=np.zeros(20, int), embeddings=queries
    )
    scores: dict[str, np.ndarray] = {}
    for item in filters:
        scores |= item.score(batch)
    stream = [None if r is None else str(r) for r in first_reasons(filters, scores, 20)]
    stored = [{name: float(values[k]) for name, values in scores.items()} for k in range(20)]
    return filters, score_columns(stored), stream


def test_without_overrides_the_streams_verdicts_come_out(scored: tuple) -> None:
    filters, scores, stream = scored
    assert {"blank_image", "empty_mask", "too_similar_to_real", None} <= set(stream)
    assert judge_again(with_thresholds(filters, []), scores, stream) == stream


def test_other_thresholds_change_verdicts_both_ways(scored: tuple) -> None:
    filters, scores, stream = scored
    looser = with_thresholds(filters, [Override.parse("SimilarityBand.upper=1000")])
    verdicts = judge_again(looser, scores, stream)
    assert (
        "too_similar_to_real" not in verdicts
        and verdicts[18] == "blank_image"
        and verdicts[19] == "empty_mask"
    )
    tighter = with_thresholds(filters, [Override.parse("SimilarityBand.upper=0.2")])
    assert judge_again(tighter, scores, stream).count("too_similar_to_real") > stream.count(
        "too_similar_to_real"
    )
    assert judge_again(filters, scores, stream) == stream, "the filters handed in are unchanged"


def test_a_failed_annotation_stays(scored: tuple) -> None:
    filters, scores, stream = scored
    failed = ["annotation_failed", *stream[1:]]
    assert judge_again(filters, scores, failed)[0] == "annotation_failed"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("SimilarityBand.uper=1", "is not there; there are lower, upper"),
        ("SimilarityBand.region=1", "entered the scores"),
        ("DegenerateMask.quantile=0.1", "entered the scores"),
        ("BlankImage.quantile=0.1", "comes from the real training rows; give them"),
        ("Sharpness.upper=1", "the recipe's filters are BlankImage, DegenerateMask, SimilarityBand"),
        ("SimilarityBand.lower=5", "lower < upper"),
    ],
)
def test_bad_thresholds_are_named(scored: tuple, text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        with_thresholds(scored[0], [Override.parse(text)])


def test_a_value_in_force_is_no_change_whatever_the_field(scored: tuple) -> None:
    filters, scores, stream = scored
    same = with_thresholds(filters, [Override.parse("DegenerateMask.quantile=0.01")])
    assert same == tuple(filters) and judge_again(same, scores, stream) == stream


def test_a_bound_of_the_training_images_is_fitted_again_and_judges_the_stored_scores(scored: tuple) -> None:
    filters, scores, stream = scored
    rows, vectors = training()

    def refit(source: Any) -> Any:
        return source.fit(rows, vectors)

    changes = [Override.parse("BlankImage.margin=1"), Override.parse("BlankImage.quantile=0.4")]
    tighter = with_thresholds(filters, changes, refit)
    assert tighter[1] == BlankImage(quantile=0.4, margin=1.0).fit(rows, vectors)
    verdicts = judge_again(tighter, scores, stream)
    # The scores are as they would be if these bounds had been there from the start: nothing is made again.
    batch = FilterBatch(
        images=[row.image for row in rows[:18]], requested_masks=[None] * 18, masks=[None] * 18,
        labels=np.zeros(18, int), embeddings=vectors[:18],
    )  # fmt: skip
    afresh = tighter[1].verdict(tighter[1].score(batch))
    assert afresh.count(None) < 18
    assert [v == "blank_image" for v in verdicts[4:18]] == [v is not None for v in afresh[4:]]


def test_the_quantile_of_mask_fidelity_is_a_threshold() -> None:
    from factory.curation.mask_fidelity import FittedMaskFidelity, MaskFidelity

    fitted = FittedMaskFidelity(
        source=MaskFidelity(quantile=0.05), class_names=("a",), bounds={}, references={}, segmenter="s",
        segmenter_digest="d", architecture="unet", fitted_on="f",
    )  # fmt: skip
    scores = {
        "mask_fidelity": np.array([0.02, 0.2, 0.9], np.float32), "mask_dice": np.array([0.1, 0.5, 0.9], np.float32)
    }  # fmt: skip
    assert judge_again([fitted], scores, ["mask_not_obeyed", None, None]) == ["mask_not_obeyed", None, None]
    stricter = with_thresholds([fitted], [Override.parse("MaskFidelity.quantile=0.3")])
    assert judge_again(stricter, scores, [None] * 3) == ["mask_not_obeyed", "mask_not_obeyed", None]
    # A bound that was off can be switched on.
    bounded = with_thresholds([fitted], [Override.parse("MaskFidelity.min_dice=0.95")])
    assert judge_again(bounded, scores, [None] * 3) == ["mask_not_obeyed"] * 3
    with pytest.raises(ValueError, match="entered the scores"):
        with_thresholds([fitted], [Override.parse("MaskFidelity.min_rows=5")])


@pytest.mark.parametrize(
    "text", ["upper=1", "SimilarityBand.upper", "SimilarityBand.upper=high", ".x=1", "a.=1"]
)
def test_what_is_no_threshold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"FILTER\.FIELD=NUMBER"):
        Override.parse(text)
