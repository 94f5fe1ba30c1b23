"""Real transformers models at tiny width: batching, the echoed question, failures."""

from pathlib import Path

import numpy as np
import pytest
from tiny_transformers import write_language_model, write_vlm

from factory.captions.models import LanguageModelWriter, VisionLanguageCaptioner, _answer, check_model


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageCaptioner:
    folder = write_vlm(tmp_path_factory.mktemp("models") / "vlm")
    return VisionLanguageCaptioner(str(folder), max_new_tokens=10, num_threads=1)


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 255, (40, 50, 3), dtype=np.uint8),
        np.zeros((30, 30), np.uint8),
        np.full((64, 48, 3), (250, 20, 20), np.uint8),
    ]


def test_captions_do_not_depend_on_the_batch_and_do_not_echo_the_question(
    vlm: VisionLanguageCaptioner,
) -> None:
    together = vlm.caption(images())
    assert [answer.error for answer in together] == [None] * 3
    assert [vlm.caption([image])[0] for image in images()] == together
    for answer in together:
        assert 2 <= len(answer.text) <= 10 and answer.text.islower() and answer.text.isalpha()
    assert len({answer.text for answer in together}) > 1  # it looks at the image


def test_new_captions_are_a_function_of_the_seed(tmp_path: Path) -> None:
    writer = LanguageModelWriter(str(write_language_model(tmp_path / "lm")), max_new_tokens=12)
    one, again, other = (writer.write("naevus", ["small lesion"], seed) for seed in ("a", "a", "b"))
    assert one == again and one.error is None and one.text != other.text
    assert "naevus" not in one.text  # the question is cut off


def test_answers_are_one_line_or_an_error() -> None:
    assert _answer('  - "A dark  lesion."\n\nI hope this helps!').text == "A dark lesion."
    for text in ("", " \n ", "...", "!?"):
        assert _answer(text).error is not None


def test_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "none"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            check_model(name)
    check_model(str(tmp_path))
    check_model("owner/name")
