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
    stream = [None if r is None else str(r) for r in first_reasons(filters, scores)]
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
        ("SimilarityBand.region=1", "enters the scores"),
        ("DegenerateMask.quantile=0.1", "enters the scores"),
        ("Sharpness.upper=1", "the recipe's filters are BlankImage, DegenerateMask, SimilarityBand"),
        ("SimilarityBand.lower=5", "lower < upper"),
    ],
)
def test_bad_thresholds_are_named(scored: tuple, text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        with_thresholds(scored[0], [Override.parse(text)])


@pytest.mark.parametrize(
    "text", ["upper=1", "SimilarityBand.upper", "SimilarityBand.upper=high", ".x=1", "a.=1"]
)
def test_what_is_no_threshold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"FILTER\.FIELD=NUMBER"):
        Override.parse(text)
