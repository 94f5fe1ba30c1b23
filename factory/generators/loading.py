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
    digest_parts,
    part_files,
    read_manifest,
    weight_variant,
)
from factory.generators.conditioning import ClassLabel, TextAndInpaint, TextAndMask
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
    built_on = generator.ground()
    vae = _load_strict(AutoencoderKL, generator.vae_folder(), "vae")
    text_encoder = _load_strict(CLIPTextModel, base, "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    add_placeholders(tokenizer, text_encoder, generator.placeholders)
    unet = _load_strict(UNet2DConditionModel, base, "unet")
    _check_resolution(generator, base, vae, unet)
    controlnet = None
    if adapt_from is not None:
        check_built_on(adapt_from, built_on)
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
        tokenizer=tokenizer,
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
    channels = int(vae.config.latent_channels)
    wanted = {channels, 2 * channels + 1} if generator.conditioning.uses_inpaint else {channels}
    if unet.config.in_channels not in wanted:
        raise ValueError(
            f"{base}: the UNet takes {unet.config.in_channels} channels, the VAE makes {channels}; "
            "an inpainting base goes with conditioning TextAndInpaint and with no other"
        )
    if unet.config.num_class_embeds is not None and not generator.conditioning.uses_class:
        raise ValueError(f"{base}: the UNet wants a class; it goes with conditioning ClassLabel")


def _check_same_inputs(folder: Path, generator: LatentDiffusion) -> None:
    found, wanted = read_manifest(folder)["generator"], canonical(generator)
    for name in ("conditioning", "resolution", "placeholders"):
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
    if isinstance(conditioning, ClassLabel):
        add_class_embedding(unet, conditioning.num_classes)
    if isinstance(conditioning, TextAndInpaint):
        widen_input(unet, 2 * int(vae.config.latent_channels) + 1)
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


def add_class_embedding(unet: UNet2DConditionModel, num_classes: int) -> None:
    """One zero embedding per class, and one for no class, added to the timestep's; nothing where it is there.

    Raises:
        ValueError: the UNet has another number of them.
    """
    wanted = num_classes + 1
    if unet.config.num_class_embeds is None:
        width = unet.time_embedding.linear_2.out_features
        unet.class_embedding = nn.Embedding(wanted, width)
        nn.init.zeros_(unet.class_embedding.weight)
        unet.register_to_config(num_class_embeds=wanted)
    elif unet.config.num_class_embeds != wanted:
        raise ValueError(
            f"conditioning.num_classes={num_classes}: the UNet has {unet.config.num_class_embeds} class embeddings, "
            f"wants {wanted} (one stands for no class); set num_classes={unet.config.num_class_embeds - 1}"
        )


def widen_input(unet: UNet2DConditionModel, in_channels: int) -> None:
    """Input channels added with zero weights: the same output whatever they hold. Nothing where they are there."""
    old = unet.conv_in
    if old.in_channels == in_channels:
        return
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        assert new.bias is not None and old.bias is not None
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=in_channels)


def add_placeholders(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, placeholders: tuple[tuple[str, str], ...]
) -> None:
    """Tokens whose embedding is the mean of their word's pieces (Shentu et al. 2025, §2.1).

    Raises:
        ValueError: a token is known already, or a word has no pieces.
    """
    for token, word in placeholders:
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        if not pieces:
            raise ValueError(f"placeholders: the word {word!r} of {token} has no tokens")
        if not tokenizer.add_tokens(token, special_tokens=True):
            raise ValueError(
                f"placeholders: the base's tokenizer knows {token!r} already; choose another token"
            )
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[tokenizer.convert_tokens_to_ids(token)] = table[pieces].mean(dim=0)


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
