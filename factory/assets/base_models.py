"""Architectures of base checkpoints: the tiny one that ships, a smaller one for tests, Stable Diffusion 1.5's.

All have random weights here. `train_base.py` trains the tiny one; tests and benchmarks use the others as they are.
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TINY_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 24, 48, 96],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 128,
    "mid_block_add_attention": False,
}
TINY_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [48, 96],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
}
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
# Stable Diffusion 1.5: UNet 859,520,964 parameters.
SD15_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD15_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
# The same classes, as narrow as their norms allow: what tests run.
MICRO_VAE: dict[str, Any] = TINY_VAE | {
    "block_out_channels": [8, 8, 8, 16],
    "latent_channels": 4,
    "norm_num_groups": 4,
}
MICRO_UNET: dict[str, Any] = TINY_UNET | {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
MICRO_TEXT: dict[str, Any] = TINY_TEXT | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}
SHAPES = {
    "micro": (MICRO_VAE, MICRO_UNET, MICRO_TEXT),
    "tiny": (TINY_VAE, TINY_UNET, TINY_TEXT),
    "sd15": (SD15_VAE, SD15_UNET, SD15_TEXT),
}
WORDS = (
    "a", "an", "and", "benign", "boundary", "breast", "carcinoma", "clear", "cyst", "dermoscopy", "echogenicity",
    "enhancement", "heterogeneous", "homogeneous", "image", "in", "irregular", "lesion", "malignant", "mass",
    "nodule", "normal", "of", "oval", "phantom", "posterior", "round", "shadow", "shape", "skin", "the", "tissue",
    "tumor", "ultrasound", "unclear", "with", "without",
)  # fmt: skip
"""Words that are one token each; any other text falls back to single characters."""


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in byte order (as GPT-2 and CLIP define them)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(b for b in range(256) if b not in stand_in):
        stand_in[byte] = chr(256 + number)
    return [stand_in[byte] for byte in range(256)]


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that make each of `words` one token (Sennrich et al. 2016).

    The most frequent adjacent pair is merged first, ties by text, until every word is whole.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((left, right))
        for word in pieces:
            position = 0
            while position < len(word) - 1:
                if (word[position], word[position + 1]) == (left, right):
                    word[position : position + 2] = [left + right]
                position += 1
    return merges


def save_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """Write a CLIP tokenizer (byte-level BPE) that knows `WORDS`, and return it.

    Every byte is a token of its own, inside a word and at its end, so no text can fail.
    """
    alphabet = byte_alphabet()
    merges = learn_merges(WORDS)
    tokens = alphabet + [f"{symbol}</w>" for symbol in alphabet]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    end = "<|endoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "unk_token": end,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "pad_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def build_models(
    shape: str, tokenizer: CLIPTokenizer
) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    """Random VAE, UNet and text encoder of a shape; seed torch first."""
    vae_config, unet_config, text_config = SHAPES[shape]
    text = {"vocab_size": len(tokenizer), **text_config}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(**text, **special))
    return AutoencoderKL(**vae_config), UNet2DConditionModel(**unet_config), text_encoder


def save_base(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    noise_scheduler: DDPMScheduler,
    dtype: torch.dtype,
) -> None:
    """Write the models in diffusers layout as safetensors of `dtype`; the tokenizer is written before."""
    for name, model in {"vae": vae, "unet": unet, "text_encoder": text_encoder}.items():
        nn.Module.to(model, dtype=dtype)
        model.save_pretrained(folder / name, safe_serialization=True)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    noise_scheduler.save_pretrained(folder / "scheduler")


def write_random_base(
    out: Path, shape: str = "tiny", *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Write a base of random weights below `out`, which must be empty or absent, and return it.

    Raises:
        ValueError: unknown shape, or something lies in `out` already.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: want one of {', '.join(SHAPES)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out}: not empty; choose another folder or delete it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = save_tokenizer(out / "tokenizer", SHAPES[shape][2]["max_position_embeddings"])
        vae, unet, text_encoder = build_models(shape, tokenizer)
    noise_scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    save_base(out, vae, unet, text_encoder, noise_scheduler, dtype)
    return out
