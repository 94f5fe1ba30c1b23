"""The pages of `factory browse`: what they show, and what a bad filter or a missing package is answered with."""

import importlib.util
import json

import pytest

from factory.storage import open_table
from jobs.browse import Args, build, page


def test_a_page_shows_pictures_captions_and_rows(real_table: str) -> None:
    first = page(real_table, "label_name = 'malignant'", 0, 3)
    assert len(first) == 3
    picture, caption, text = first[0]
    assert picture.ndim == 3 and picture.std() > 0
    assert caption == "malignant"
    row = json.loads(text)
    assert row["label_name"] == "malignant" and "image" not in row and "embedding" not in row


def test_pages_follow_each_other(real_table: str) -> None:
    count = open_table(real_table).count("split <> 'test'")
    assert 25 < count < open_table(real_table).count()
    pages = [page(real_table, "", offset, 25) for offset in range(0, count, 25)]
    ids = [json.loads(text)["image_id"] for cells in pages for *_, text in cells]
    assert len(ids) == len(set(ids)) == count


def test_a_bad_filter_is_named(real_table: str) -> None:
    with pytest.raises(ValueError, match="colour"):
        page(real_table, "colour = 'red'", 0, 3)


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_it_says_what_to_install(real_table: str) -> None:
    with pytest.raises(ValueError, match=r"requirements/browse\.txt"):
        build(Args(table=real_table))
