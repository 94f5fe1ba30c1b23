"""Transformers checkpoints of a few thousand random weights in the real formats: LLaVA, and a Llama."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT: "
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocab = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def text_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _speak_letters(head: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Only lower-case letters have a chance to be the next token."""
    letters = tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase))
    with torch.no_grad():
        head.weight.zero_()
        head.weight[letters] = torch.randn(len(letters), head.weight.shape[1])


def write_vlm(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(tokenizer), image_token_id=image,
        image_token_index=image, vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name and "norm" not in name:
                parameter.mul_(8.0)  # so that what is seen reaches what is said
    _speak_letters(model.lm_head, tokenizer)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def write_language_model(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(text_config(tokenizer))
    _speak_letters(model.lm_head, tokenizer)
    model.save_pretrained(folder, safe_serialization=True)
    return folder
