"""TriggerWord: one prompt for all, of a word that CLIP knows as one token."""

import numpy as np
import pytest

from factory.imaging import TrainingRow
from factory.sources.trigger import TriggerWord
from schemas.request import SynthesisPlan


def test_every_row_and_request_has_the_papers_prompt(
    phantom_rows: list[TrainingRow], plan: SynthesisPlan
) -> None:
    fitted = TriggerWord().fit(phantom_rows)
    assert {fitted.describe(row) for row in phantom_rows} == {"An image of hta"}
    drawn = fitted.draw(plan.request("benign", 0), np.random.default_rng(0), None)
    assert drawn.prompt == "An image of hta" and drawn.parameters == {"prompt_source": "trigger_word"}


def test_the_label_can_be_written_behind_it(phantom_rows: list[TrainingRow], plan: SynthesisPlan) -> None:
    fitted = TriggerWord(append_label=True).fit(phantom_rows)
    drawn = fitted.draw(plan.request("malignant", 0), np.random.default_rng(0), None)
    assert drawn.prompt == "An image of hta, malignant"
    row = next(row for row in phantom_rows if row.label_name == "malignant")
    assert fitted.describe(row) == drawn.prompt


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="trigger word"):
        TriggerWord(prompt="  ")


def test_hta_is_one_token_of_clip() -> None:
    """On the real vocabulary, where it is on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import CLIPTokenizer

    name = "openai/clip-vit-large-patch14"
    try:
        folder = snapshot_download(name, allow_patterns=["vocab.json", "merges.txt"], local_files_only=True)
    except LocalEntryNotFoundError:
        pytest.skip(f"the tokenizer of {name} is not in the hub cache")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == 49408
    assert len(tokenizer("hta", add_special_tokens=False).input_ids) == 1
