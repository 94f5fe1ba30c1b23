"""A latent diffusion generator in memory: encode, decode, denoise, save.

Shapes: B images, C latent channels, h = w = resolution / vae factor, R resolution in px, L prompt tokens,
D width of the text encoder, K foreground mask classes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from factory.diffusion.conditions import Conditions
from factory.diffusion.latent_masks import latent_masks
from factory.generators.checkpoints import MANIFEST
from factory.generators.conditioning import ClassLabel, TextAndMask
from factory.generators.latent_diffusion import LatentDiffusion
from factory.generators.lora import TRAINED_ADAPTER, has_lora, merge_lora, save_lora
from schemas.identity import canonical


class Denoiser(nn.Module):
    """UNet and, where there is one, ControlNet as one module, so that DDP, compile and EMA wrap one thing."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel | None) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet

    def take_mask_encoder(self) -> nn.Module | None:
        """Take the ControlNet's mask encoder out: `forward` then expects its output as `controlnet_cond`.

        The mask does not change from step to step, so synthesis encodes it once. A denoiser without its mask
        encoder can no longer be saved.
        """
        if self.controlnet is None:
            return None
        encoder = self.controlnet.controlnet_cond_embedding
        self.controlnet.controlnet_cond_embedding = nn.Identity()
        return encoder

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        controlnet_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
        inpaint: Tensor | None = None,
    ) -> Tensor:
        """Model prediction (B, C, h, w) for noisy latents (B, C, h, w) and timesteps (B,) or (); see `Conditions`.

        `controlnet_cond` is needed exactly where there is a ControlNet.
        """
        if (self.controlnet is None) != (controlnet_cond is None):
            raise ValueError(
                "controlnet_cond: a generator with a ControlNet needs a mask, one without takes none "
                f"(ControlNet: {self.controlnet is not None}, mask: {controlnet_cond is not None})"
            )
        down, mid = None, None
        if self.controlnet is not None:
            down, mid = self.controlnet(
                latents, timesteps, prompt_embeds, controlnet_cond=controlnet_cond, return_dict=False
            )
        return self.unet(
            latents if inpaint is None else torch.cat([latents, inpaint.to(latents.dtype)], dim=1),
            timesteps,
            prompt_embeds,
            class_labels=class_labels,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]


class LoadedGenerator:
    """The models of a `LatentDiffusion`; made by its `load`.

    Attributes:
        generator: the component it was loaded from.
        vae, text_encoder, tokenizer, unet, controlnet: diffusers and transformers models; controlnet may be None.
        noise_scheduler: the base's training schedule (DDPM); inference schedules are made from its config.
        resolution: side of the images, px.
        latent_shape: (C, h, w).
        built_on: digests of the weights below the trained parts; written into the manifest.
    """

    def __init__(
        self,
        generator: LatentDiffusion,
        *,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | None,
        noise_scheduler: DDPMScheduler,
        built_on: Mapping[str, str],
    ) -> None:
        self.generator = generator
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.controlnet = unet, controlnet
        self.noise_scheduler = noise_scheduler
        self.built_on = dict(built_on)
        self.resolution = generator.resolution
        side = self.resolution // vae_factor(vae)
        self.latent_shape = (int(vae.config.latent_channels), side, side)
        self._denoiser = Denoiser(unet, controlnet)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def denoiser(self) -> Denoiser:
        """The one module over UNet and ControlNet; the same object at every call."""
        return self._denoiser

    @property
    def num_prompt_tokens(self) -> int:
        """L: tokens of the text encoder, with begin, end and padding."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def tokenize(self, prompts: Sequence[str]) -> Any:
        """`input_ids` and `attention_mask` (B, L), padded and cut to the text encoder's length."""
        length = self.num_prompt_tokens
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) last hidden states of the text encoder, padded to its full length."""
        return self.text_encoder(self.tokenize(prompts).input_ids.to(self.device)).last_hidden_state

    def token_positions(self, prompts: Sequence[str], word: str) -> list[list[int]]:
        """Where the tokens of `word` first stand in each prompt's row of L tokens; an empty list where it is absent."""
        pieces = self.tokenizer(word, add_special_tokens=False).input_ids
        found = []
        for row in self.tokenize(prompts).input_ids.tolist():
            starts = (i for i in range(len(row)) if row[i : i + len(pieces)] == pieces)
            start = next(starts, None)
            found.append([] if start is None or not pieces else list(range(start, start + len(pieces))))
        return found

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with begin and end, without padding, at most L."""
        return self.tokenize(prompts).attention_mask.sum(dim=1).tolist()

    def null_prompt(self) -> Tensor:
        """(1, L, D) of the empty prompt: the unconditional side of classifier-free guidance."""
        return self.encode_prompts([""])

    def conditions(
        self,
        prompt_embeds: Tensor,
        *,
        masks: Tensor | None = None,
        labels: Tensor | None = None,
        masked_latents: Tensor | None = None,
        check: bool = True,
    ) -> Conditions:
        """What this generator's conditioning takes of what there is; the rest is left out.

        Args:
            prompt_embeds: (B, L, D).
            masks: label maps, uint8 (B, R, R).
            labels: class numbers, int64 (B,); −1 is no class.
            masked_latents: of the images without what lies under their mask, (B, C, h, w).
            check: as in `condition`.

        Raises:
            ValueError: something that the conditioning needs is None.
        """
        conditioning = self.generator.conditioning
        needed = {
            "masks": (masks, conditioning.uses_mask or conditioning.uses_inpaint),
            "labels": (labels, conditioning.uses_class),
            "masked_latents": (masked_latents, conditioning.uses_inpaint),
        }
        for name, (value, wanted) in needed.items():
            if wanted and value is None:
                raise ValueError(f"{name}: {type(conditioning).__name__} needs them")
        controlnet_cond = class_labels = inpaint = None
        if conditioning.uses_mask and masks is not None:
            controlnet_cond = self.condition(masks, check=check)
        if isinstance(conditioning, ClassLabel) and labels is not None:
            class_labels = torch.where(labels < 0, conditioning.num_classes, labels).to(self.device)
        if conditioning.uses_inpaint and masks is not None and masked_latents is not None:
            inpaint = torch.cat(
                [latent_masks(masks.to(self.device), self.latent_shape[1]), masked_latents.to(self.device)],
                dim=1,
            )
        return Conditions(
            prompt_embeds=prompt_embeds,
            controlnet_cond=controlnet_cond,
            class_labels=class_labels,
            inpaint=inpaint,
        )

    def unconditional(self, conditions: Conditions, null_prompt: Tensor) -> Conditions:
        """The other side of classifier-free guidance: null prompt (1, L, D), no class, the same mask and image."""
        labels = conditions.class_labels
        if labels is not None:
            assert isinstance(self.generator.conditioning, ClassLabel)
            labels = torch.full_like(labels, self.generator.conditioning.num_classes)
        return replace(
            conditions,
            prompt_embeds=null_prompt.expand_as(conditions.prompt_embeds),
            class_labels=labels,
        )

    @torch.no_grad()
    def encode_images(
        self, images: Tensor | np.ndarray, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of the scaled latents of uint8 images (B, R, R) or (B, R, R, 3).

        Grey images are replicated to RGB. A latent is mean + exp(logvar / 2) · noise. Pixels where `hidden`, label
        maps uint8 (B, R, R), is not 0 are blanked to mid-grey first, as for inpainting.
        """
        pixels = torch.as_tensor(images)
        if (
            pixels.dtype != torch.uint8
            or pixels.ndim not in (3, 4)
            or pixels.shape[1:3] != (self.resolution,) * 2
        ):
            raise ValueError(
                f"images: want uint8 (B, {self.resolution}, {self.resolution}[, 3]), got {pixels.dtype} "
                f"{tuple(pixels.shape)}"
            )
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(-1).expand(-1, -1, -1, 3)
        inputs = pixels.to(self.device).permute(0, 3, 1, 2).contiguous().to(self.vae.dtype) / 127.5 - 1.0
        if hidden is not None:
            inputs = inputs * (hidden.to(self.device)[:, None] == 0)
        posterior = self.vae.encode(inputs).latent_dist
        scale = self.vae.config.scaling_factor
        shift = self.vae.config.shift_factor or 0.0
        return (posterior.mean - shift) * scale, posterior.logvar + 2.0 * math.log(scale)

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """(B, 3, R, R) float32 in about [-1, 1] of scaled latents (B, C, h, w); not clipped, may be non-finite."""
        shift = self.vae.config.shift_factor or 0.0
        scaled = latents.to(self.device) / self.vae.config.scaling_factor + shift
        return self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, R, R, 3) uint8 on the CPU of scaled latents (B, C, h, w); converted on the device."""
        pixels = self.decode_pixels(latents)
        return to_uint8(pixels).permute(0, 2, 3, 1).cpu()

    def condition(self, masks: Tensor | np.ndarray, *, check: bool = True) -> Tensor | None:
        """(B, K, R, R) one-hot planes of uint8 label maps (B, R, R); None where no mask goes in.

        Looking for class numbers above K waits for the device; `check=False` leaves that to a caller who has
        looked already.

        Raises:
            ValueError: another dtype or size, or a class number above K.
        """
        conditioning = self.generator.conditioning
        if not isinstance(conditioning, TextAndMask):
            return None
        labels = torch.as_tensor(masks)
        if labels.dtype != torch.uint8 or labels.shape[1:] != (self.resolution, self.resolution):
            raise ValueError(
                f"masks: want uint8 (B, {self.resolution}, {self.resolution}), got {labels.dtype} {tuple(labels.shape)}"
            )
        if check and labels.numel():
            self.check_mask_classes(int(labels.max()))
        classes = conditioning.num_mask_classes
        planes = torch.arange(1, classes + 1, dtype=torch.uint8, device=self.device)
        return (labels.to(self.device)[:, None] == planes[:, None, None]).to(self.dtype)

    def check_mask_classes(self, largest: int) -> None:
        """Refuse a label map whose largest class the generator does not know.

        Raises:
            ValueError: naming both.
        """
        conditioning = self.generator.conditioning
        if isinstance(conditioning, TextAndMask) and largest > conditioning.num_mask_classes:
            raise ValueError(
                f"mask: class {largest} in a label map, but the generator knows 1 … {conditioning.num_mask_classes}"
            )

    def named_trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their name in `denoiser()`."""
        return {name: p for name, p in self._denoiser.named_parameters() if p.requires_grad}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that training changes, in a fixed order."""
        return list(self.named_trainable_parameters().values())

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Parameters of "unet" (without adapters), "unet_lora", "controlnet", "vae" or "text_encoder"."""
        if part in ("unet", "unet_lora"):
            wants_lora = part == "unet_lora"
            return [p for name, p in self.unet.named_parameters() if ("lora_" in name) == wants_lora]
        module = {"controlnet": self.controlnet, "vae": self.vae, "text_encoder": self.text_encoder}.get(part)
        if module is None:
            raise ValueError(f"part={part!r}: this generator has no such part")
        return list(module.parameters())

    def merge_adapters(self) -> None:
        """Fold LoRA adapters into the UNet's weights: same output up to rounding, no extra work per step.

        The merged generator can no longer be saved as an adapter.
        """
        merge_lora(self.unet)

    def save(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Write the trained parts and the manifest; loadable by `LatentDiffusion.load`, diffusers and peft.

        Args:
            folder: created where absent; parts already there are replaced.
            recipe: what the manifest records under "recipe": at least "name"; also real digest, steps, labels.

        Raises:
            ValueError: the recipe has no name, or the adapters were merged.
        """
        if not recipe.get("name"):
            raise ValueError("recipe: the manifest needs at least the recipe's name")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trainable = self.generator.trainable
        if trainable.unet == "full":
            # With an active adapter, diffusers would write renamed keys that reload as fresh random weights.
            if has_lora(self.unet):
                raise ValueError(
                    "unet: a full UNet cannot be saved while a LoRA adapter is active; merge it first"
                )
            _save_model(self.unet, folder / "unet")
        if trainable.unet == "lora":
            if TRAINED_ADAPTER not in (getattr(self.unet, "peft_config", None) or {}):
                raise ValueError(
                    "unet_lora: the adapter was merged into the UNet and can no longer be saved alone"
                )
            save_lora(self.unet, folder / "unet_lora")
        if self.generator.trains_controlnet and self.controlnet is not None:
            _save_model(self.controlnet, folder / "controlnet")
        manifest = {
            "recipe": dict(recipe),
            "generator": canonical(self.generator),
            "base": self.generator.base,
            "built_on": self.built_on,
        }
        path = folder / MANIFEST
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        temporary.replace(path)


def vae_factor(vae: AutoencoderKL) -> int:
    """How many pixels make one latent cell, per side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def controlnet_from_unet(
    unet: UNet2DConditionModel, *, conditioning_channels: int, factor: int, seed: int
) -> ControlNetModel:
    """A ControlNet that copies the UNet's encoder and adds nothing at first (zero-initialised outputs).

    The mask is brought to latent size by log2(factor) stride-2 convolutions; their widths are those of
    Stable Diffusion's ControlNet (16, 32, 96, 256) for a UNet of its width and are narrower for narrower ones.
    """
    levels = int(math.log2(factor)) + 1
    widths = [16, 32, 96, 256][:levels] + [256] * max(0, levels - 4)
    width = unet.config.block_out_channels[0]
    if width < 256:
        widths = [max(8, min(w, width) // 2) for w in widths]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(
            unet,
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=tuple(widths),
        )


def to_uint8(pixels: Tensor) -> Tensor:
    """uint8 of pixels in [-1, 1], any shape, rounded to nearest; non-finite values become 0."""
    return (
        ((pixels.float().nan_to_num(-1.0, -1.0, -1.0).clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    )


def _save_model(model: UNet2DConditionModel | ControlNetModel, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=True)
    # diffusers notes where a model was loaded from; that is no part of what it is.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
