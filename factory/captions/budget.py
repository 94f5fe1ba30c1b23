"""How long a prompt may be: counted by the text encoder's own tokenizer, never by words."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path


class TokenBudget:
    """Whether a prompt fits into the text encoder of a base in diffusers format.

    Args:
        base: folder with `tokenizer/` and `text_encoder/config.json`.
        added: placeholder tokens that the generator adds, one token each.

    Raises:
        FileNotFoundError: the folder has no tokenizer or no text encoder.
    """

    def __init__(self, base: Path, added: Sequence[str] = ()) -> None:
        from transformers import CLIPTokenizer

        config = base / "text_encoder" / "config.json"
        if not config.is_file() or not (base / "tokenizer").is_dir():
            raise FileNotFoundError(
                f"{base}: no tokenizer/ and text_encoder/config.json; give a base in diffusers format"
            )
        self._tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True)
        if added:
            self._tokenizer.add_tokens(list(added))
        positions = int(json.loads(config.read_text())["max_position_embeddings"])
        self.limit = min(int(self._tokenizer.model_max_length), positions)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt with begin and end, not truncated."""
        return len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def fits(self, compose: Callable[[str], str]) -> Callable[[str], bool]:
        """Whether the prompt that `compose` makes of a caption is within the limit."""
        return lambda caption: self.count(compose(caption)) <= self.limit
