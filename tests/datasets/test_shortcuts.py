import numpy as np

from factory.datasets.shortcuts import shortcut_check


def _images(sizes: list[tuple[int, int]], levels: list[float], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        np.clip(rng.normal(level, 30, size), 0, 255).astype(np.uint8) for size, level in zip(sizes, levels)
    ]


def test_images_without_a_shortcut_score_one_half() -> None:
    labels = np.arange(120) % 2
    levels = list(np.random.default_rng(1).normal(100, 15, 120))
    check = shortcut_check(_images([(40, 48)] * 120, levels), [False] * 120, labels, np.arange(120))
    assert check.all is not None and 0.3 < check.all < 0.65
    assert check.frame_size == check.colour == check.marks == 0.5


def test_each_planted_shortcut_is_found_by_its_own_figure() -> None:
    labels = np.arange(100) % 2
    plain = [(40, 48)] * 100
    by_size = shortcut_check(
        _images([(40, 48 + 10 * int(k)) for k in labels], [90.0] * 100), [False] * 100, labels, np.arange(100)
    )
    assert by_size.frame_size == 1.0 and by_size.all == 1.0
    by_level = shortcut_check(
        _images(plain, [90.0 + 40 * k for k in labels]), [False] * 100, labels, np.arange(100)
    )
    assert by_level.intensity == 1.0 and by_level.frame_size == 0.5
    by_marks = shortcut_check(_images(plain, [90.0] * 100), [bool(k) for k in labels], labels, np.arange(100))
    assert by_marks.marks == 1.0
    coloured = [
        np.repeat(image[:, :, None], 3, axis=2) if k else image
        for image, k in zip(_images(plain, [90.0] * 100), labels)
    ]
    assert shortcut_check(coloured, [False] * 100, labels, np.arange(100)).colour == 1.0


def test_groups_stay_together_so_that_copies_do_not_count() -> None:
    """Twenty distinct pictures, ten copies each: remembering a copy must not look like a shortcut."""
    rng = np.random.default_rng(3)
    levels = np.repeat(rng.normal(100, 20, 20), 10)
    labels = np.repeat(rng.permutation(np.arange(20) % 2), 10)
    images = _images([(40, 48)] * 200, list(levels))
    check = shortcut_check(images, [False] * 200, labels, np.repeat(np.arange(20), 10))
    assert check.all is not None and check.all < 0.8


def test_too_few_groups_say_so() -> None:
    check = shortcut_check(_images([(40, 48)] * 6, [90.0] * 6), [False] * 6, np.arange(6) % 2, np.arange(6))
    assert check.all is None and "at least 5 groups" in check.reason
