"""Generator checkpoints as folders: what they hold, their digests, and whether they belong together.

A checkpoint is a folder in plain diffusers and peft format with only the parts that were trained:

    generator.json    recipe, generator, labels, steps, and the digests of the weights it was trained upon
    controlnet/       diffusers ControlNetModel
    unet/             diffusers UNet2DConditionModel, where the whole UNet was trained
    unet_lora/        peft LoRA adapter, where only an adapter was trained

Digests are of file bytes (weights, configs, vocabulary); nothing here imports torch.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.identity import digest_file, hash_parts

MANIFEST = "generator.json"
BASE_PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
CHECKPOINT_PARTS = ("unet", "unet_lora", "controlnet")
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_WEIGHT_STEMS = {
    "text_encoder": "model",
    "unet_lora": "adapter_model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model",
}


def weight_variant(folder: Path, part: str) -> str | None:
    """Which file of weights a part has: None for the plain one, "fp16" for the half-precision one.

    Raises:
        FileNotFoundError: there are no safetensors weights (pickles are never read).
    """
    stem = _WEIGHT_STEMS[part]
    for variant in (None, "fp16"):
        name = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
        index = f"{name}.index.json"
        if (folder / part / name).is_file() or (folder / part / index).is_file():
            return variant
    raise FileNotFoundError(
        f"{folder / part}: no {stem}.safetensors; only safetensors weights are read, never pickles. "
        "Convert the model with diffusers' save_pretrained(safe_serialization=True)"
    )


def part_files(folder: Path, part: str) -> list[Path]:
    """The files of a part that decide what it computes.

    Raises:
        FileNotFoundError: the part, its config or its weights are missing.
    """
    root = folder / part
    if part == "scheduler":
        return _existing(root, ["scheduler_config.json"])
    if part == "tokenizer":
        names = [name for name in _TOKENIZER_FILES if (root / name).is_file()]
        if not {"vocab.json", "tokenizer.json"} & set(names):
            raise FileNotFoundError(
                f"{root}: no vocab.json or tokenizer.json; is {folder} a diffusers folder?"
            )
        return [root / name for name in names]
    config = "adapter_config.json" if part == "unet_lora" else "config.json"
    variant = weight_variant(folder, part)
    stem = _WEIGHT_STEMS[part] + (f".{variant}" if variant else "")
    shards = sorted(root.glob(f"{stem}-*-of-*.safetensors")) + sorted(
        root.glob(f"{stem}.safetensors.index.json")
    )
    return _existing(root, [config]) + (shards or [root / f"{stem}.safetensors"])


def digest_part(folder: Path, part: str) -> str:
    """Digest of a part's files: names and bytes. Cached in this process by (path, size, modification time)."""
    pieces: list[str] = []
    for path in sorted(part_files(Path(folder), part)):
        stat = path.stat()
        pieces += [path.name, _digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)]
    return hash_parts(*pieces)


def digest_base(folder: Path) -> str:
    """One digest over all parts of a base checkpoint."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; give a local diffusers folder or a hub id as base"
        )
    pieces: list[str] = []
    for part in BASE_PARTS:
        pieces += [part, digest_part(folder, part)]
    return hash_parts(*pieces)


def digest_parts(folder: Path) -> dict[str, str]:
    """Digest of each part that a checkpoint folder holds."""
    return {part: digest_part(folder, part) for part in CHECKPOINT_PARTS if (Path(folder) / part).is_dir()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """`generator.json` of a checkpoint.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
        ValueError: the file is not the manifest of a generator.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `factory train` writes generator checkpoints")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); the checkpoint is damaged") from error
    missing = {"generator", "built_on", "recipe"} - set(manifest)
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; not the manifest of a generator")
    return manifest


def check_recipe(folder: Path, name: str) -> None:
    """Refuse a checkpoint trained by another recipe.

    Raises:
        ValueError: naming both recipes.
    """
    found = read_manifest(folder)["recipe"].get("name")
    if found != name:
        raise ValueError(
            f"{folder}: trained with recipe {found!r}, asked for with recipe {name!r}; "
            f"use --recipe {found}, or train again with --recipe {name}"
        )


def check_generator(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose generator differs from `wanted` (canonical form) in any field.

    Raises:
        ValueError: naming every field that differs, with both values.
    """
    found = read_manifest(folder)["generator"]
    differences = [
        f"{key} is {_short(found.get(key))} in the checkpoint and {_short(wanted.get(key))} here"
        for key in sorted(set(found) | set(wanted))
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        raise ValueError(f"{folder}: checkpoint of another generator: {'; '.join(differences)}")


def check_built_on(folder: Path, below: Mapping[str, str]) -> None:
    """Refuse a checkpoint that was trained upon other weights than `below` (digest by part).

    Raises:
        ValueError: naming the part with both digests.
    """
    built_on = read_manifest(folder)["built_on"]
    for part in sorted(set(built_on) | set(below)):
        was, now = built_on.get(part), below.get(part)
        if was != now:
            raise ValueError(
                f"{folder}: trained upon {part} {was or 'as in the base'}, but would be used upon {part} "
                f"{now or 'as in the base'}; give the base checkpoint (and the checkpoint it was adapted from, "
                "with this one as its adapter) that it was trained upon"
            )


def _existing(root: Path, names: list[str]) -> list[Path]:
    for name in names:
        if not (root / name).is_file():
            raise FileNotFoundError(
                f"{root / name}: no such file; is {root.parent} a complete diffusers folder?"
            )
    return [root / name for name in names]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "type" in value:
        fields = ", ".join(f"{k}={v}" for k, v in value.items() if k != "type")
        return f"{value['type']}({fields})"
    return repr(value)


@functools.lru_cache(maxsize=256)
def _digest(path: str, size: int, modified_ns: int) -> str:
    return digest_file(Path(path))
