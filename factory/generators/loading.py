"""Bring a latent diffusion generator into memory, and fail on anything that does not fit.

The libraries only warn about weights they miss or do not know, and start them at random; here that is an error.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from factory.generators.checkpoints import (
    CHECKPOINT_PARTS,
    check_built_on,
    check_generator,
    digest_base,
    digest_parts,
    part_files,
    read_manifest,
    weight_variant,
)
from factory.generators.conditioning import TextAndMask
from factory.generators.latent_diffusion import LatentDiffusion
from factory.generators.loaded import LoadedGenerator, controlnet_from_unet, vae_factor
from factory.generators.lora import TRAINED_ADAPTER, add_lora, load_lora, merge_lora
from schemas.identity import canonical

# Buffers that older exports stored and the models compute themselves; everything else must match exactly.
_COMPUTED_KEYS = ("position_ids",)


def load_generator(
    generator: LatentDiffusion,
    *,
    checkpoint: Path | None,
    device: str,
    dtype: str,
    adapters: tuple[Path, ...],
    adapt_from: Path | None,
    seed: int,
) -> LoadedGenerator:
    """See `LatentDiffusion.load`."""
    base = generator.base_folder()
    built_on = {"base": digest_base(base)}
    vae = _load_strict(AutoencoderKL, base, "vae")
    text_encoder = _load_strict(CLIPTextModel, base, "text_encoder")
    unet = _load_strict(UNet2DConditionModel, base, "unet")
    _check_resolution(generator, base, vae, unet)
    controlnet = None
    if adapt_from is not None:
        check_built_on(adapt_from, {"base": built_on["base"]})
        _check_same_inputs(adapt_from, generator)
        unet, controlnet = _apply(adapt_from, unet, controlnet)
        merge_lora(unet)
        built_on |= digest_parts(adapt_from)
    below = dict(built_on)
    if checkpoint is not None:
        check_generator(checkpoint, canonical(generator))
        check_built_on(checkpoint, built_on)
        unet, controlnet = _apply(checkpoint, unet, controlnet)
        below |= digest_parts(checkpoint)
    unet, controlnet = _add_fresh_parts(generator, base, vae, unet, controlnet, checkpoint is None, seed)
    if adapters:
        for number, adapter in enumerate(adapters):
            generator.check_adapter(adapter)
            check_built_on(adapter, below)
            load_lora(unet, Path(adapter) / "unet_lora", f"adapter_{number}")
        unet.set_adapters(list(unet.peft_config))
    loaded = LoadedGenerator(
        generator,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=unet,
        controlnet=controlnet,
        noise_scheduler=DDPMScheduler.from_pretrained(base / "scheduler"),
        built_on=built_on,
    )
    _place(loaded, device, dtype, trainable=not adapters)
    return loaded


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name: float32, bfloat16 or float16."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ValueError(f"dtype={name!r}: want one of {', '.join(kinds)}")
    return kinds[name]


def _load_strict(kind: type, folder: Path, part: str) -> Any:
    """Load one model and fail on any missing, unexpected or mismatched weight (the libraries only warn)."""
    part_files(folder, part)
    # transformers and diffusers disagree on what the argument is called.
    kind_argument = "dtype" if issubclass(kind, CLIPTextModel) else "torch_dtype"
    with _no_progress_bar():
        model, info = kind.from_pretrained(  # type: ignore[attr-defined]
            str(folder / part),
            use_safetensors=True,
            variant=weight_variant(folder, part),
            output_loading_info=True,
            local_files_only=True,
            **{kind_argument: torch.float32},
        )
    problems = []
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = [str(key) for key in info.get(name, ()) if not str(key).endswith(_COMPUTED_KEYS)]
        if keys:
            problems.append(f"{name}: {', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''}")
    if problems:
        raise ValueError(
            f"{folder / part}: the weights do not fit its config ({'; '.join(problems)}); the folder is damaged, "
            "or was saved with an active adapter"
        )
    return model


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading takes moments; a bar per model would bury the job's own progress line."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _check_resolution(
    generator: LatentDiffusion, base: Path, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> None:
    step = vae_factor(vae) * 2 ** (len(unet.config.block_out_channels) - 1)
    if generator.resolution % step:
        raise ValueError(f"resolution={generator.resolution}: the base {base} needs a multiple of {step} px")
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"{base}: the UNet takes {unet.config.in_channels} channels, the VAE makes {vae.config.latent_channels}; "
            "an inpainting base cannot be used with this conditioning"
        )


def _check_same_inputs(folder: Path, generator: LatentDiffusion) -> None:
    found, wanted = read_manifest(folder)["generator"], canonical(generator)
    for name in ("conditioning", "resolution"):
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"{folder}: cannot adapt from this checkpoint: {name} is {found.get(name)} there and {wanted[name]} here"
            )


def _apply(
    folder: Path, unet: UNet2DConditionModel, controlnet: ControlNetModel | None
) -> tuple[UNet2DConditionModel, ControlNetModel | None]:
    """Replace or extend the models by the parts that a checkpoint folder holds."""
    present = [part for part in CHECKPOINT_PARTS if (Path(folder) / part).is_dir()]
    if not present:
        raise ValueError(
            f"{folder}: holds none of {', '.join(CHECKPOINT_PARTS)}; the checkpoint is incomplete"
        )
    if "unet" in present:
        unet = _load_strict(UNet2DConditionModel, Path(folder), "unet")
    if "unet_lora" in present:
        load_lora(unet, Path(folder) / "unet_lora", TRAINED_ADAPTER)
    if "controlnet" in present:
        controlnet = _load_strict(ControlNetModel, Path(folder), "controlnet")
    return unet, controlnet


def _add_fresh_parts(
    generator: LatentDiffusion,
    base: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel | None,
    fresh: bool,
    seed: int,
) -> tuple[UNet2DConditionModel, ControlNetModel | None]:
    conditioning = generator.conditioning
    if isinstance(conditioning, TextAndMask) and controlnet is None:
        if not generator.trains_controlnet:
            raise ValueError(
                "trainable: controlnet=False without a ControlNet to start from: the mask would do nothing; "
                "train the ControlNet, or adapt from a checkpoint that has one"
            )
        if not fresh:
            raise ValueError("controlnet: the checkpoint holds none although its generator trains one")
        controlnet = controlnet_from_unet(
            unet, conditioning_channels=conditioning.num_mask_classes, factor=vae_factor(vae), seed=seed
        )
    if generator.trainable.unet == "lora" and fresh:
        add_lora(unet, generator.trainable.lora_rank, seed)
    return unet, controlnet


def _place(loaded: LoadedGenerator, device: str, dtype: str, *, trainable: bool) -> None:
    kind = torch_dtype(dtype)
    settings = loaded.generator.trainable
    for model in (loaded.vae, loaded.text_encoder, loaded.unet, loaded.controlnet):
        if model is not None:
            # Module.to itself: the libraries' override warns at every change of dtype.
            nn.Module.to(model, device=device, dtype=kind)
            model.eval().requires_grad_(False)
    if not trainable:
        return
    if settings.unet == "full":
        loaded.unet.requires_grad_(True)
    elif settings.unet == "lora":
        for name, parameter in loaded.unet.named_parameters():
            parameter.requires_grad_(f".{TRAINED_ADAPTER}." in name)
    if loaded.generator.trains_controlnet and loaded.controlnet is not None:
        loaded.controlnet.requires_grad_(True)
