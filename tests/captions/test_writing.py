"""Sentences, their length in tokens, and new captions from old."""

from pathlib import Path
from typing import Any

import pytest

from factory.captions.budget import TokenBudget
from factory.captions.expand import recombine
from factory.captions.table import Caption
from factory.captions.writing import IMPORTANCE, shorten, shorten_text, write_caption
from factory.sources.captions import CaptionTable

FULL = {
    "diagnosis": "naevus", "colour": "dark brown", "size": "small", "shape": "oval", "border": "sharp",
    "position": "upper left", "texture": "homogeneous", "skin": "light", "hair": "a few hairs", "mask.x": "0.2",
}  # fmt: skip


def test_the_sentence() -> None:
    assert write_caption(FULL) == (
        "small oval dark brown naevus lesion, sharp border, homogeneous texture, in the upper left, on light skin, "
        "with a few hairs"
    )
    assert write_caption({"diagnosis": "normal", "skin": "tan"}) == "normal, on tan skin"
    assert "naevus" not in write_caption(FULL, name_class=False)
    assert write_caption({"brightness": "similar", "position": "left"}) == (
        "lesion, as bright as its surroundings, on the left"
    )
    assert write_caption({}) == ""


def words_up_to(limit: int) -> Any:
    return lambda text: len(text.split()) <= limit


def test_the_least_important_attribute_goes_first() -> None:
    for limit in range(3, 20):
        text, left_out = shorten(FULL, words_up_to(limit))
        assert words_up_to(limit)(text)
        kept = [name for name in IMPORTANCE if name in FULL][
            : len([n for n in FULL if n in IMPORTANCE]) - left_out
        ]
        assert text == write_caption({name: FULL[name] for name in kept})
    assert shorten(FULL, words_up_to(100))[1] == 0
    with pytest.raises(ValueError, match="no room"):
        shorten(FULL, words_up_to(0))


def test_free_text_is_cut_between_sentences_clauses_words_never_inside_one() -> None:
    text = "A dark lesion with a border. It lies left, near hairs, and is large."
    assert shorten_text(text, words_up_to(50)) == text
    assert shorten_text(text, words_up_to(8)) == "A dark lesion with a border."
    assert shorten_text("one two three, four five", words_up_to(4)) == "one two three"
    assert shorten_text("one two three four", words_up_to(2)) == "one two"
    with pytest.raises(ValueError, match="no room"):
        shorten_text("one", words_up_to(0))


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> TokenBudget:
    import json

    from factory.assets.base_models import save_tokenizer

    base = tmp_path_factory.mktemp("base")
    save_tokenizer(base / "tokenizer", 77)
    (base / "text_encoder").mkdir()
    (base / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    return TokenBudget(base, ("<lesion>", "<skin>"))


def test_placeholders_are_one_token_each_and_68_are_left_behind_the_prefix(budget: TokenBudget) -> None:
    table = CaptionTable(prefix="An image of <lesion> in <skin>.")  # "on" is no word of this vocabulary
    assert budget.limit == 77
    assert budget.count(table.compose("")) == 7 + 2
    fits = budget.fits(table.compose)
    assert fits("lesion " * 68) and not fits("lesion " * 69)


def test_the_prefix_survives_truncation(budget: TokenBudget) -> None:
    table = CaptionTable()
    prompt = table.compose("mass " * 200)
    cut = budget._tokenizer(prompt, truncation=True, max_length=77).input_ids
    whole = budget._tokenizer(table.compose("")).input_ids[:-1]
    assert len(cut) == 77 and cut[: len(whole)] == whole


def observed(number: int, **values: str) -> Caption:
    attributes = {
        "diagnosis": "naevus", "colour": f"colour{number % 3}", "size": f"size{number % 2}", "shape": "oval",
        "border": "sharp", "position": f"place{number}", "mask.x": f"0.{number}",
    } | values  # fmt: skip
    return Caption(
        image_id=str(number),
        label_name="naevus",
        caption=write_caption(attributes),
        attributes=attributes,
        captioner="template",
    )


def test_recombined_captions_are_new_of_the_class_and_between_two_rows() -> None:
    rows = [observed(i) for i in range(6)]
    made = recombine(rows, 12, label="naevus", fits=words_up_to(100), seed=1)
    texts = [caption.caption for caption in made]
    assert len(made) == 12 and len(set(texts)) == 12
    assert not set(texts) & {row.caption for row in rows}
    for caption in made:
        assert caption.kind == "expanded" and caption.label_name == "naevus" and caption.split == "train"
        placed = next(row for row in rows if row.attributes["position"] == caption.attributes["position"])
        assert all(caption.attributes[n] == placed.attributes[n] for n in ("size", "mask.x"))
        pairs = [
            row for row in rows
            if row is not placed and sum(row.attributes[n] == placed.attributes[n] for n in ("colour", "size", "shape", "border", "position")) >= 2
            and caption.attributes["colour"] in (row.attributes["colour"], placed.attributes["colour"])
        ]  # fmt: skip
        assert pairs
    again = recombine(rows, 12, label="naevus", fits=words_up_to(100), seed=1)
    assert [caption.caption for caption in again] == texts
    assert [c.caption for c in recombine(rows, 12, label="naevus", fits=words_up_to(100), seed=2)] != texts


def test_recombination_stops_where_there_are_no_more_combinations() -> None:
    rows = [observed(0), observed(2)]  # they differ in colour and position: two new ones
    assert len(recombine(rows, 50, label="naevus", fits=words_up_to(100))) == 2
    alone = [observed(0), observed(1, size="x", shape="y", border="z", colour="w")]
    assert recombine(alone, 5, label="naevus", fits=words_up_to(100)) == []
    with pytest.raises(ValueError, match="needs two"):
        recombine(rows[:1], 5, label="naevus", fits=words_up_to(100))


def test_a_base_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        TokenBudget(tmp_path)
