"""The test for lying closer to the training images: blind to honest generators, not to overfitted ones."""

import numpy as np
import pytest

from factory.curation.closeness import compare_closeness


def population(count: int, seed: int, width: int = 24) -> np.ndarray:
    """Unit vectors around eight centres that all populations share."""
    centres = np.random.default_rng(123).standard_normal((8, width))
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(8, size=count)] + 0.8 * rng.standard_normal((count, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def names(count: int, prefix: str) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def run(synthetic: np.ndarray, training: np.ndarray, held_out: np.ndarray, **kwargs: object):
    return compare_closeness(
        synthetic,
        training,
        names(len(training), "t"),
        held_out,
        names(len(held_out), "h"),
        num_permutations=199,
        **kwargs,  # type: ignore[arg-type]
    )


def test_a_generator_of_the_distribution_is_flagged_no_more_often_than_the_level_says() -> None:
    p_values = [
        run(population(60, 3 * i), population(80, 3 * i + 1), population(40, 3 * i + 2), seed=i).p_value
        for i in range(60)
    ]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.15
    assert 0.35 < np.mean(p_values) < 0.65


def test_an_overfitted_generator_is_flagged() -> None:
    training, held_out = population(30, 1), population(30, 2)
    rng = np.random.default_rng(0)
    copies = training[rng.integers(30, size=100)] + 0.05 * rng.standard_normal((100, 24))
    copies = (copies / np.linalg.norm(copies, axis=1, keepdims=True)).astype(np.float32)
    found = run(copies, training, held_out)
    assert found.is_detected() and found.difference > 0.1 and found.p_value == pytest.approx(1 / 200)
    honest = run(population(100, 5), training, held_out)
    assert not honest.is_detected() and honest.difference < 0.05


def test_references_are_as_many_on_both_sides_and_one_of_each_group() -> None:
    training, held_out = population(90, 1), population(25, 2)
    groups = [f"patient-{number // 3}" for number in range(90)]
    found = compare_closeness(
        population(20, 3), training, groups, held_out, names(25, "h"), num_permutations=19
    )
    assert found is not None and found.num_references == 25 and found.num_synthetic == 20
    again = compare_closeness(
        population(20, 3), training, groups, held_out, names(25, "h"), num_permutations=19
    )
    assert found.p_value == again.p_value and found.planted == again.planted


def test_planted_copies_show_the_power_and_real_images_the_level() -> None:
    found = run(population(100, 3), population(80, 1), population(40, 2), planted_shares=(0.02, 0.5))
    assert found.planted[0.5] <= 0.01 and found.planted[0.5] <= found.planted[0.02]
    assert 0 < found.control <= 1
    few = run(population(100, 3), population(41, 1), population(40, 2))
    assert np.isnan(few.control)


def test_too_few_groups_give_no_verdict_and_bad_input_is_named() -> None:
    assert run(population(10, 1), population(50, 2), population(9, 3)) is None
    with pytest.raises(ValueError, match="one width"):
        run(population(10, 1, width=8), population(50, 2), population(20, 3))
    with pytest.raises(ValueError, match="some synthetic"):
        run(population(0, 1), population(50, 2), population(20, 3))
