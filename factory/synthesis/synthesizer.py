"""The Synthesizer: prepared requests in, images out, in fixed-shape batches on one device.

A plain class without Ray: an actor holds one, a test or a notebook can too. What an image shows depends on
its request alone: every random draw comes from generators seeded by the request_id, so batch size, order and
neighbours change nothing but the last bits of batched arithmetic.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from factory.diffusion.denoise import denoise, make_noise_scheduler
from factory.diffusion.guidance import Guidance
from factory.diffusion.sampling import Sampling
from factory.generators.latent_diffusion import LatentDiffusion
from factory.generators.loaded import to_uint8
from schemas.identity import torch_seed
from schemas.request import SynthesisRequest
from schemas.sample import QuarantineReason

IMAGE_TOLERANCE = 2
"""Grey levels (of 255) by which a pixel may differ when the same request runs in another batch, in float32.

The noise is bit-equal; kernels for other batch shapes sum in another order. In bfloat16 differences are larger,
which is why a table records its batch size and `reproduce` uses it.
"""
PROMPT_CACHE_SIZE = 1024


class Annotator(Protocol):
    def annotate(self, requested_mask: np.ndarray | None, image: np.ndarray) -> np.ndarray | None: ...


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request with its columns filled by the sources.

    Attributes:
        requested_mask: uint8 label map (R, R), or None where the generator takes none.
        prompt: text condition.
        parameters: what the sources drew, for provenance.
    """

    request: SynthesisRequest
    requested_mask: np.ndarray | None
    prompt: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """What became of a request: an image with its label, or why there is none.

    Attributes:
        image: uint8 (R, R), the mean of the VAE's three channels; None on error.
        mask: uint8 label map (R, R), or None.
        channel_spread: mean over pixels of (largest − smallest channel), grey levels; near 0 for a generator of
            grey images.
        seconds: device time of its batch divided by the images in it.
        error, reason: set together when the request could not be made.
    """

    request_id: str
    image: np.ndarray | None
    mask: np.ndarray | None
    channel_spread: float
    seconds: float
    error: str | None = None
    reason: QuarantineReason | None = None


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A batch on its way: results may still be computing on the device."""

    requests: list[PreparedRequest]
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
        guidances: hooks into the loop.
        annotator: chooses the label mask.
        batch_size: images per batch; halved for good when the device runs out of memory.
        device, dtype, compile, num_threads: execution. With `compile` the last batch is padded to the full
            shape, since every new shape compiles again.
    """

    def __init__(
        self,
        generator: LatentDiffusion,
        checkpoint: Path | None,
        sampling: Sampling,
        guidances: Sequence[Guidance],
        annotator: Annotator,
        *,
        batch_size: int,
        device: str = "cpu",
        dtype: str = "float32",
        compile: bool = False,
        num_threads: int | None = None,
        adapters: tuple[Path, ...] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: want at least 1")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.batch_size = batch_size
        self.sampling, self.guidances, self.annotator = sampling, tuple(guidances), annotator
        self._pads = compile
        self._loaded = generator.load(checkpoint, device=device, dtype=dtype, adapters=adapters)
        self._loaded.merge_adapters()
        self.resolution, self.latent_shape = self._loaded.resolution, self._loaded.latent_shape
        self._device = torch.device(device)
        self._uses_mask = generator.conditioning.uses_mask
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
        if not self._uses_mask:
            return None
        if mask is None:
            return "no requested_mask, but the generator is conditioned on one (an empty label map means no lesion)"
        if mask.dtype != np.uint8 or mask.shape != (self.resolution, self.resolution):
            return f"requested_mask: want uint8 {(self.resolution, self.resolution)}, got {mask.dtype} {mask.shape}"
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
        latents = self._run(
            noise=self._to_device(torch.stack([self.noise(name) for name in ids])),
            prompt_embeds=torch.stack([self._encode(p.prompt) for p in padded]),
            controlnet_cond=self._condition(padded),
            rngs=[torch.Generator().manual_seed(torch_seed(name, "steps")) for name in ids],
        )[: len(requests)]
        pixels = self._loaded.decode_pixels(latents)
        is_finite = pixels.isfinite().flatten(1).all(dim=1)
        pixels = pixels.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
        spread = (pixels.amax(dim=1) - pixels.amin(dim=1)).mean(dim=(1, 2)) * 127.5
        images = to_uint8(pixels.mean(dim=1))
        batch = _Batch(
            requests=requests,
            images=self._to_host(images),
            spread=self._to_host(spread),
            is_finite=self._to_host(is_finite),
            started=started,
            events=events,
        )
        if events is not None:
            events[1].record()
        return batch

    def _run(
        self,
        *,
        noise: Tensor,
        prompt_embeds: Tensor,
        controlnet_cond: Tensor | None,
        rngs: list[torch.Generator],
    ) -> Tensor:
        sampling = self.sampling
        return denoise(
            self._denoiser,
            make_noise_scheduler(sampling, self._loaded.noise_scheduler.config),
            noise.contiguous(memory_format=torch.channels_last),
            prompt_embeds,
            self._encode("")[None] if sampling.guidance_scale != 1.0 else None,
            controlnet_cond,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_start=sampling.guidance_start,
            guidance_stop=sampling.guidance_stop,
            eta=sampling.eta,
            guidances=self.guidances,
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
            results.append(
                GeneratedImage(
                    request_id=prepared.request.request_id,
                    image=image,
                    mask=self.annotator.annotate(prepared.requested_mask, image),
                    channel_spread=float(batch.spread[position]),
                    seconds=each,
                )
            )
        return results

    def _condition(self, requests: list[PreparedRequest]) -> Tensor | None:
        """The mask encoder's output for the requests' masks, computed once per image and not once per step."""
        if self._mask_encoder is None:
            return None
        masks = torch.from_numpy(
            np.stack([p.requested_mask for p in requests if p.requested_mask is not None])
        )
        planes = self._loaded.condition(self._to_device(masks), check=False)
        return self._mask_encoder(planes)

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
