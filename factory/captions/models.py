"""Captions by models of transformers: a vision-language model that sees the image, a language model that rewrites.

Weights are safetensors from a local folder or a hub id; code that a repository brings along is never run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factory.imaging import as_rgb
from schemas.identity import torch_seed

QUESTION = (
    "Describe this medical image in one sentence of fewer than 50 words: the shape, size, colour and position of the "
    "lesion, the colour of the surrounding skin or tissue, and whether there is hair or any marking."
)
"""After DermPrompt's attributes (Shentu et al. 2025, §2.2); the authors' wording is not published."""
MAX_SHOWN = 8


def check_model(name: str) -> None:
    """Refuse a model that cannot be there: a path without a folder, or no hub id.

    Raises:
        FileNotFoundError: naming it.
    """
    if Path(name).expanduser().is_dir():
        return
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{name}: no such folder; give a local transformers folder or a hub id (owner/name)"
        )


def _where(name: str) -> tuple[str, dict[str, Any]]:
    folder = Path(name).expanduser()
    is_local = folder.is_dir()
    return (str(folder) if is_local else name), {"local_files_only": is_local, "trust_remote_code": False}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote: `text`, or why there is none."""

    text: str = ""
    error: str | None = None


class VisionLanguageCaptioner:
    """An image-text-to-text model that captions images, greedily.

    Args:
        name: hub id or local folder with model and processor.
        question: what the model is asked.
        device, dtype: "cpu" or "cuda"; "float32", "bfloat16" or "float16".
        max_new_tokens: longest answer (200 in the authors' code).
    """

    def __init__(
        self,
        name: str,
        *,
        question: str = QUESTION,
        device: str = "cpu",
        dtype: str = "float32",
        max_new_tokens: int = 200,
        num_threads: int | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if num_threads:
            torch.set_num_threads(num_threads)
        check_model(name)
        where, options = _where(name)
        self._device, self._max_new_tokens = device, max_new_tokens
        self._processor: Any = AutoProcessor.from_pretrained(where, **options)
        self._processor.tokenizer.padding_side = "left"
        if self._processor.tokenizer.pad_token is None:
            self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token
        self._model: Any = AutoModelForImageTextToText.from_pretrained(
            where, dtype=getattr(torch, dtype), use_safetensors=True, **options
        )
        self._model.to(device).eval()
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            self._prompt: str = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            image_token = getattr(self._processor, "image_token", None)
            if image_token is None:
                raise ValueError(f"{name}: its processor has neither a chat template nor an image token")
            self._prompt = f"{image_token}\n{question}"

    def caption(self, images: Sequence[np.ndarray]) -> list[Answer]:
        """One answer per uint8 image (H, W) or (H, W, 3); the echoed question is cut off by token positions."""
        import torch
        from PIL import Image

        pictures = [[Image.fromarray(as_rgb(image))] for image in images]
        inputs = self._processor(
            images=pictures, text=[self._prompt] * len(images), return_tensors="pt", padding=True
        ).to(self._device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with torch.inference_mode():
            written = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self._max_new_tokens,
                pad_token_id=self._processor.tokenizer.pad_token_id,
            )
        answers = written[:, inputs["input_ids"].shape[1] :]
        return [_answer(text) for text in self._processor.batch_decode(answers, skip_special_tokens=True)]


class LanguageModelWriter:
    """A causal language model that writes new captions from old ones.

    Args:
        name: hub id or local folder with model and tokenizer.
        device, dtype: "cpu" or "cuda"; "float32", "bfloat16" or "float16".
        max_new_tokens: longest answer (256 in the authors' script).
    """

    def __init__(
        self, name: str, *, device: str = "cpu", dtype: str = "float32", max_new_tokens: int = 256
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        check_model(name)
        where, options = _where(name)
        self._device, self._max_new_tokens = device, max_new_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, dtype), use_safetensors=True, **options
        )
        self._model.to(device).eval()

    def write(self, label: str, examples: Sequence[str], seed: str) -> Answer:
        """One new caption in the style of `examples`; sampled, a function of `seed`."""
        import torch

        shown = "\n".join(f"- {text}" for text in examples[:MAX_SHOWN])
        question = (
            f"These sentences describe medical images of the class '{label}':\n{shown}\n"
            "Write one new sentence of the same kind for another image of this class. Answer with the sentence only."
        )
        text = question + "\n- "
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        inputs = self._tokenizer(text, return_tensors="pt").to(self._device)
        devices = [torch.cuda.current_device()] if self._device.startswith("cuda") else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(torch_seed(seed, "language model"))
            written = self._model.generate(
                **inputs,
                do_sample=True,
                temperature=0.9,
                top_p=0.95,
                max_new_tokens=self._max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        answer = written[0, inputs["input_ids"].shape[1] :]
        return _answer(self._tokenizer.decode(answer, skip_special_tokens=True))


def _answer(text: str) -> Answer:
    """The first paragraph of what a model wrote, on one line; an error where it has no word."""
    paragraphs = [part for part in text.strip().split("\n") if part.strip()]
    first = " ".join(paragraphs[0].split()).strip("-*• \"'") if paragraphs else ""
    if not re.search(r"\w{2,}", first):
        return Answer(error=f"the model answered {text.strip()[:80]!r}")
    return Answer(text=first)
