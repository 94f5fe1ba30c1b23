"""The Synthesizer: prepared requests in, images out, in fixed-shape batches on one device.

A plain class without Ray: an actor holds one, a test or a notebook can too. What an image shows depends on
its request alone: every random draw comes from generators seeded by the request_id, so batch size, order and
neighbours change nothing but the last bits of batched arithmetic.
"""

import os
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from factory.diffusion.conditions import Conditions
from factory.diffusion.denoise import denoise, make_noise_scheduler
from factory.diffusion.guidance import DenoisingBatch, Guidance, GuidanceComponent
from factory.diffusion.sampling import Sampling
from factory.generators.latent_diffusion import LatentDiffusion
from factory.generators.loaded import to_uint8
from factory.imaging import as_rgb
from schemas.identity import torch_seed
from schemas.request import SynthesisRequest
from schemas.sample import QuarantineReason

IMAGE_TOLERANCE = 2
"""Grey levels (of 255) by which a pixel may differ when the same request runs in another batch, in float32.

The noise is bit-equal; kernels for other batch shapes sum in another order. In bfloat16 differences are larger,
which is why a table records its batch size and `reproduce` uses it.
"""
PROMPT_CACHE_SIZE = 1024


class BoundAnnotator(Protocol):
    """An annotator at work on one batch.

    Attributes:
        hooks: take what the annotator wants to see from inside the denoising loop.
    """

    hooks: Sequence[Guidance]

    def annotate(self, position: int, image: np.ndarray) -> np.ndarray | None:
        """Label map uint8 (R, R) of image `position` of the batch, uint8 (R, R[, 3]); None where it cannot be told."""
        ...


class Annotator(Protocol):
    """What a recipe holds; see `factory.synthesis.annotators`."""

    def bind(self, batch: DenoisingBatch) -> BoundAnnotator: ...


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request with its columns filled by the sources.

    Attributes:
        requested_mask: uint8 label map (R, R), or None where the recipe has no source of masks.
        prompt: text condition.
        background: uint8 (R, R[, 3]), the image into which the lesion is put, or None.
        parameters: what the sources drew, for provenance.
    """

    request: SynthesisRequest
    requested_mask: np.ndarray | None
    prompt: str
    background: np.ndarray | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """What became of a request: an image with its label, or why there is none.

    Attributes:
        image: uint8 (R, R), the mean of the VAE's three channels, or (R, R, 3) in colour; None on error.
        mask: uint8 label map (R, R), or None.
        annotation_failed: the recipe has an annotator, and it found no mask.
        channel_spread: mean over pixels of (largest − smallest channel), grey levels; near 0 for a generator of
            grey images.
        seconds: device time of its batch divided by the images in it.
        error, reason: set together when the request could not be made.
    """

    request_id: str
    image: np.ndarray | None
    mask: np.ndarray | None
    annotation_failed: bool = False
    channel_spread: float
    seconds: float
    error: str | None = None
    reason: QuarantineReason | None = None


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A batch on its way: results may still be computing on the device."""

    requests: list[PreparedRequest]
    annotator: BoundAnnotator | None
    images: Tensor
    spread: Tensor
    is_finite: Tensor
    started: float
    events: tuple[Any, Any] | None


class Synthesizer:
    """Holds the models and turns prepared requests into images.

    Args:
        generator: the component; `checkpoint` and `adapters` its trained weights.
        sampling: the denoising loop's settings.
        guidances: steer the loop by more than the prompt.
        annotator: says which mask labels an image; None where images have none.
        colour: images keep three channels instead of becoming their mean.
        feather: width of the seam where a background meets what was made in the mask, as a fraction of R.
        batch_size: images per batch; halved for good when the device runs out of memory.
        device, dtype, compile, num_threads: execution. With `compile` the last batch is padded to the full
            shape, since every new shape compiles again.
    """

    def __init__(
        self,
        generator: LatentDiffusion,
        checkpoint: Path | None,
        sampling: Sampling,
        guidances: Sequence[GuidanceComponent],
        annotator: Annotator | None,
        *,
        batch_size: int,
        colour: bool = False,
        feather: float = 0.0,
        device: str = "cpu",
        dtype: str = "float32",
        compile: bool = False,
        num_threads: int | None = None,
        adapters: tuple[Path, ...] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: want at least 1")
        readers = [type(item).__name__ for item in (*guidances, annotator) if hasattr(item, "words")]
        if compile and readers:
            raise ValueError(
                f"compile: {', '.join(readers)} look into attention layers, which a compiled denoiser hides; "
                "leave --compile out"
            )
        if num_threads is not None:
            # The share of a cluster's CPUs may be more than this machine has.
            torch.set_num_threads(min(num_threads, os.cpu_count() or num_threads))
        self.batch_size = batch_size
        self.sampling, self.guidances, self.annotator = sampling, tuple(guidances), annotator
        self.colour, self.feather = colour, feather
        self._pads = compile
        self._loaded = generator.load(checkpoint, device=device, dtype=dtype, adapters=adapters)
        self._loaded.merge_adapters()
        self._loaded.denoiser().requires_grad_(False)  # guidances take gradients of latents alone
        self.resolution, self.latent_shape = self._loaded.resolution, self._loaded.latent_shape
        self._device = torch.device(device)
        self._conditioning = generator.conditioning
        self._denoiser: Any = self._loaded.denoiser().to(memory_format=torch.channels_last)
        self._mask_encoder = self._loaded.denoiser().take_mask_encoder()
        self._loaded.vae.to(memory_format=torch.channels_last)
        if compile:
            self._denoiser = torch.compile(self._denoiser, dynamic=False)
            self._loaded.vae.decoder = torch.compile(self._loaded.vae.decoder, dynamic=False)
        self._prompts: OrderedDict[str, Tensor] = OrderedDict()
        self.num_encoded_prompts = 0

    def noise(self, request_id: str) -> Tensor:
        """(C, h, w) float32 standard normal noise of a request, on the CPU: bit-equal whatever its batch."""
        rng = torch.Generator().manual_seed(torch_seed(request_id, "noise"))
        return torch.randn(self.latent_shape, generator=rng)

    def synthesize(self, requests: Sequence[PreparedRequest]) -> list[GeneratedImage]:
        """One result per request, in their order.

        A request with a mask that cannot be used, an image that is not finite, and a single image that does
        not fit into memory each give a result with `error` and `reason`; the others are not affected.
        """
        results: dict[int, GeneratedImage] = {}
        waiting: deque[int] = deque()
        for position, prepared in enumerate(requests):
            problem = self._problem(prepared)
            if problem is None:
                waiting.append(position)
            else:
                results[position] = _failed(prepared, QuarantineReason.GENERATION_FAILED, problem)
        running: tuple[list[int], _Batch] | None = None
        while waiting or running:
            following = None
            if waiting:
                chunk = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                batch = self._try_launch([requests[i] for i in chunk])
                if batch is not None:
                    following = (chunk, batch)
                elif len(chunk) > 1 or (self._pads and self.batch_size > 1):
                    # Memory of a batch still in flight comes back first, then half as many are tried.
                    self.batch_size = max(1, (self.batch_size if self._pads else len(chunk)) // 2)
                    waiting.extendleft(reversed(chunk))
                else:
                    message = "out of memory for a single image; lower the resolution or use another device"
                    results[chunk[0]] = _failed(requests[chunk[0]], QuarantineReason.OUT_OF_MEMORY, message)
            if running:
                results.update(zip(running[0], self._collect(running[1])))
            running = following
        return [results[position] for position in range(len(requests))]

    def _problem(self, prepared: PreparedRequest) -> str | None:
        """Why a request cannot be run, or None."""
        mask = prepared.requested_mask
        if mask is None:
            if self._conditioning.uses_mask or self._conditioning.uses_inpaint:
                return "no requested_mask, but the generator is conditioned on one (an empty label map: no lesion)"
            return None
        if mask.dtype != np.uint8 or mask.shape != (self.resolution, self.resolution):
            return f"requested_mask: want uint8 {(self.resolution, self.resolution)}, got {mask.dtype} {mask.shape}"
        background = prepared.background
        if background is None and self._conditioning.uses_inpaint:
            return "no background, but the generator paints a lesion into one"
        if background is not None and background.shape[:2] != mask.shape:
            return f"background: want uint8 {mask.shape}, got {background.shape}"
        try:
            self._loaded.check_mask_classes(int(mask.max()))
        except ValueError as error:
            return str(error)
        return None

    def _try_launch(self, requests: list[PreparedRequest]) -> _Batch | None:
        """Start a batch; None when the device has too little memory for it."""
        try:
            return self._launch(requests)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.no_grad()
    def _launch(self, requests: list[PreparedRequest]) -> _Batch:
        started, events = time.perf_counter(), None
        if self._device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        padded = requests + [requests[-1]] * (self.batch_size - len(requests) if self._pads else 0)
        ids = [p.request.request_id for p in padded]
        batch, conditions = self._bind(padded)
        annotator = None if self.annotator is None else self.annotator.bind(batch)
        guidances = [component.bind(batch) for component in self.guidances]
        latents = self._run(
            noise=self._to_device(torch.stack([self.noise(name) for name in ids])),
            conditions=conditions,
            guidances=[*guidances, *(() if annotator is None else annotator.hooks)],
            rngs=[torch.Generator().manual_seed(torch_seed(name, "steps")) for name in ids],
        )[: len(requests)]
        pixels = self._loaded.decode_pixels(latents)
        is_finite = pixels.isfinite().flatten(1).all(dim=1)
        pixels = pixels.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
        spread = (pixels.amax(dim=1) - pixels.amin(dim=1)).mean(dim=(1, 2)) * 127.5
        images = to_uint8(pixels.permute(0, 2, 3, 1) if self.colour else pixels.mean(dim=1))
        running = _Batch(
            requests=requests,
            annotator=annotator,
            images=self._to_host(images),
            spread=self._to_host(spread),
            is_finite=self._to_host(is_finite),
            started=started,
            events=events,
        )
        if events is not None:
            events[1].record()
        return running

    def _bind(self, requests: list[PreparedRequest]) -> tuple[DenoisingBatch, Conditions]:
        """What guidances and annotators look at, and what goes into the denoiser of this Synthesizer."""
        found = [p.requested_mask for p in requests if p.requested_mask is not None]
        masks = self._to_device(torch.from_numpy(np.stack(found))) if len(found) == len(requests) else None
        images = [as_rgb(p.background) for p in requests if p.background is not None]
        backgrounds = hidden = None
        if len(images) == len(requests):
            pixels = np.stack(images)
            backgrounds = self._loaded.encode_images(pixels)[0].float()
            if self._conditioning.uses_inpaint:
                hidden = self._loaded.encode_images(pixels, masks)[0].float()
        conditions = self._loaded.conditions(
            torch.stack([self._encode(p.prompt) for p in requests]),
            masks=masks,
            labels=torch.tensor([p.request.label_index for p in requests]),
            masked_latents=hidden,
            check=False,
        )
        if self._mask_encoder is not None:  # once per image, not once per step
            encoded = self._mask_encoder(conditions.controlnet_cond)
            conditions = replace(conditions, controlnet_cond=encoded)
        prompts = [p.prompt for p in requests]
        batch = DenoisingBatch(
            denoiser=self._loaded.denoiser(),
            conditions=conditions,
            prompts=prompts,
            token_positions=lambda word: self._loaded.token_positions(prompts, word),
            num_tokens=self._loaded.num_tokens(prompts),
            masks=masks,
            backgrounds=backgrounds,
            resolution=self.resolution,
        )
        return batch, conditions

    def _run(
        self,
        *,
        noise: Tensor,
        conditions: Conditions,
        guidances: Sequence[Guidance],
        rngs: list[torch.Generator],
    ) -> Tensor:
        sampling = self.sampling
        null = None
        if sampling.guidance_scale != 1.0:
            null = self._loaded.unconditional(conditions, self._encode("")[None])
        return denoise(
            self._denoiser,
            make_noise_scheduler(sampling, self._loaded.noise_scheduler.config),
            noise.contiguous(memory_format=torch.channels_last),
            conditions,
            null,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_start=sampling.guidance_start,
            guidance_stop=sampling.guidance_stop,
            eta=sampling.eta,
            guidances=guidances,
            rngs=rngs,
        )

    def _collect(self, batch: _Batch) -> list[GeneratedImage]:
        """Wait for a batch and turn it into results."""
        if batch.events is None:
            seconds = time.perf_counter() - batch.started
        else:
            batch.events[1].synchronize()
            seconds = batch.events[0].elapsed_time(batch.events[1]) / 1000.0
        each = seconds / len(batch.requests)
        results = []
        for position, prepared in enumerate(batch.requests):
            if not bool(batch.is_finite[position]):
                message = "the generator gave values that are not finite"
                results.append(_failed(prepared, QuarantineReason.NOT_FINITE, message, each))
                continue
            image = batch.images[position].numpy().copy()
            background, mask = prepared.background, prepared.requested_mask
            if background is not None and mask is not None:
                from factory.synthesis.compositing import composite

                image = composite(image, background, mask, self.feather * self.resolution)
            label = None if batch.annotator is None else batch.annotator.annotate(position, image)
            results.append(
                GeneratedImage(
                    request_id=prepared.request.request_id,
                    image=image,
                    mask=label,
                    annotation_failed=batch.annotator is not None and label is None,
                    channel_spread=float(batch.spread[position]),
                    seconds=each,
                )
            )
        return results

    def _encode(self, prompt: str) -> Tensor:
        """(L, D); each distinct prompt passes the text encoder once, alone, so its batch cannot matter."""
        if prompt not in self._prompts:
            self._prompts[prompt] = self._loaded.encode_prompts([prompt])[0]
            self.num_encoded_prompts += 1
            if len(self._prompts) > PROMPT_CACHE_SIZE:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(prompt)
        return self._prompts[prompt]

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        """Copy to pinned memory without waiting; the batch's event says when it has arrived."""
        if self._device.type != "cuda":
            return tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "defaultcpuallocator" in text and ("not enough memory" in text or "can't allocate memory" in text)


def _failed(
    prepared: PreparedRequest, reason: QuarantineReason, message: str, seconds: float = 0.0
) -> GeneratedImage:
    return GeneratedImage(
        request_id=prepared.request.request_id,
        image=None,
        mask=None,
        channel_spread=0.0,
        seconds=seconds,
        error=message,
        reason=reason,
    )
