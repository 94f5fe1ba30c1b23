"""The generator of `gpu_gain.py`: a pixel-space grey U-Net on mask and class, trained and sampled from resumable state.

Imports neither Ray nor Lance. Every draw follows from (seed, step) in training and from the request in sampling, so a
run that was killed ends with the same bits as one that was not (on a CPU; on a GPU up to rounding).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from factory.imaging import TrainingRow
    from factory.predictors.examples import Examples
    from schemas.request import SynthesisRequest

NUM_TRAIN_TIMESTEPS = 1000
UNFINISHED = 3
"""Exit status of a part whose time ran out: run it again."""


def build_denoiser(args: argparse.Namespace, num_classes: int) -> Any:
    """U-Net of (noisy grey image, mask) and class → v; class `num_classes` with mask 0 is no condition."""
    from diffusers import UNet2DModel

    channels, plain = tuple(args.channels), len(args.channels) - 2
    return UNet2DModel(
        sample_size=args.size,
        in_channels=2,
        out_channels=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * plain,
        norm_num_groups=min(32, channels[0]),
        attention_head_dim=min(64, channels[-2]),
        num_class_embeds=num_classes + 1,
    )


def predict(denoiser: Any, noisy: "Tensor", masks: "Tensor", timesteps: "Tensor", classes: "Tensor") -> Any:
    """v of noisy images (B, 1, S, S), under bfloat16 on a GPU; float32."""
    import torch

    on_gpu = noisy.device.type == "cuda"
    with torch.autocast(noisy.device.type, dtype=torch.bfloat16, enabled=on_gpu):
        found = denoiser(torch.cat([noisy, masks], 1), timesteps, class_labels=classes).sample
    return found.float()


def generator_step(
    args: argparse.Namespace, step: int, pixels: "Tensor", masks: "Tensor", labels: "Tensor", tools: Any
) -> "Tensor":
    """Loss of one batch; rows, flips, timesteps and noise follow from (seed, step) alone."""
    import torch

    from factory.training.objectives import min_snr_weights
    from schemas.identity import torch_seed

    denoiser, noise_scheduler, alphas_cumprod, num_classes = tools
    device, size = pixels.device, args.batch_size
    draw = torch.Generator(device).manual_seed(torch_seed(f"gpu gain/{args.seed}", f"step {step}"))
    rows = torch.randint(len(pixels), (size,), generator=draw, device=device)
    flipped, dropped = torch.rand((2, size), generator=draw, device=device).unbind()
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (size,), generator=draw, device=device)
    flip = (flipped < 0.5)[:, None, None, None]
    clean, mask = (torch.where(flip, part[rows].flip(-1), part[rows]) for part in (pixels, masks))
    noise = torch.randn(clean.shape, generator=draw, device=device)
    free = dropped < 0.1  # no condition, for classifier-free guidance
    mask = torch.where(free[:, None, None, None], torch.zeros_like(mask), mask)
    classes = torch.where(free, torch.full_like(labels[rows], num_classes), labels[rows])
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    target = noise_scheduler.get_velocity(clean, noise, timesteps)
    error = (predict(denoiser, noisy, mask, timesteps, classes) - target).square().mean((1, 2, 3))
    return (error * min_snr_weights(alphas_cumprod, timesteps, 5.0, "v_prediction")).mean()


def schedulers() -> tuple[Any, Any]:
    """Forward process and DDIM sampler over one cosine schedule, predicting v."""
    from diffusers import DDIMScheduler, DDPMScheduler

    same: dict[str, Any] = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
    }
    return DDPMScheduler(**same), DDIMScheduler(**same, timestep_spacing="trailing", clip_sample=True)


def tensors_of(args: argparse.Namespace, rows: "Examples") -> "tuple[Tensor, Tensor, Tensor]":
    """Pixels and masks in -1 … 1, (N, 1, S, S), and labels, on the device."""
    import torch

    assert rows.masks is not None
    pixels = torch.from_numpy(rows.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = (torch.from_numpy(rows.masks)[:, None] > 0).float() * 2 - 1
    return pixels.to(args.device), masks.to(args.device), torch.from_numpy(rows.labels).to(args.device)


def train_generator(args: argparse.Namespace, real: "Examples", stop_at: float) -> Any:
    """The averaged denoiser, or None where the time ran out first; the state is kept either way."""
    import torch

    from factory.training.ema import MovingAverage
    from schemas.identity import hash_parts, torch_seed

    torch.manual_seed(torch_seed(f"gpu gain/{args.seed}", "weights"))
    denoiser = build_denoiser(args, real.num_classes).to(args.device)
    parameters = dict(denoiser.named_parameters())
    average = MovingAverage(parameters, args.ema)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, weight_decay=0.01)
    names = ("channels", "batch_size", "learning_rate", "ema", "generator_steps", "seed")
    identity = hash_parts(real.content_digest(), *(f"{name}={getattr(args, name)}" for name in names))
    path, step, spent, loss = Path(args.out) / "generator.pt", 0, 0.0, float("nan")
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        if state["identity"] != identity:
            raise SystemExit(f"{path}: is of other rows or settings; remove it, or name another --out")
        denoiser.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"], state["step"])
        step, spent, loss = state["step"], state["seconds"], state["loss"]
    forward, _ = schedulers()
    tools = (denoiser, forward, forward.alphas_cumprod.to(args.device), real.num_classes)
    begin, rows = time.perf_counter(), tensors_of(args, real)
    saved = begin

    def save_state() -> None:
        partial = path.with_suffix(".partial")
        torch.save(
            {"identity": identity, "step": step, "seconds": spent + time.perf_counter() - begin, "loss": loss,
             "weights": denoiser.state_dict(), "average": average.tensors(), "optimizer": optimizer.state_dict()},
            partial,
        )  # fmt: skip
        partial.replace(path)

    while step < args.generator_steps and time.perf_counter() < stop_at:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 100)
        found = generator_step(args, step, *rows, tools)
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        average.update()
        step += 1
        if step % 10 == 0 or step == args.generator_steps:
            loss = float(found.detach())  # waits for the GPU, so that the clock is right
        if step % 200 == 0:
            print(f"step {step}: loss {loss:.4f}, {(time.perf_counter() - begin):.0f} s", flush=True)
        if time.perf_counter() - saved > args.save_seconds:
            save_state()
            saved = time.perf_counter()
    save_state()
    if step < args.generator_steps:
        print(f"generator: {step} of {args.generator_steps} steps; run this part again")
        return None
    average.copy_to_parameters()
    return denoiser.eval()


def draw_requests(args: argparse.Namespace, real: "Examples") -> "list[tuple[SynthesisRequest, np.ndarray]]":
    """Requests of the classes in turn, each with a deformed training mask of its class."""
    from factory.sources.masks import RealMasks
    from schemas.identity import random_generator
    from schemas.request import SynthesisPlan

    source = RealMasks(rotation=10.0, scale=0.15, shift=0.05).fit(training_rows(real))
    plan = SynthesisPlan(
        recipe="gpu_gain", fingerprint=f"{args.generator_steps} steps", weights={}, seed=args.seed,
        real_digest=real.content_digest(), labels=real.class_names,
    )  # fmt: skip
    requests = [plan.request_at(index) for index in range(args.num_synthetic)]
    return [(r, source.draw(r, random_generator(r.request_id, "mask")).mask) for r in requests]


def training_rows(rows: "Examples") -> "list[TrainingRow]":
    """The rows as mask sources take them."""
    from factory.imaging import TrainingRow

    assert rows.masks is not None
    return [
        TrainingRow(
            image_id=rows.ids[k], label=int(rows.labels[k]), label_name=rows.class_names[int(rows.labels[k])],
            group_id=rows.groups[k], image=rows.images[k, ..., 0], mask=rows.masks[k], attributes={},
        )
        for k in range(len(rows))
    ]  # fmt: skip


def sample(
    args: argparse.Namespace, denoiser: Any, chosen: Sequence[Any], class_names: tuple[str, ...]
) -> "Examples":
    """Images of some requests by guided DDIM; noise follows from each request alone."""
    import torch

    from schemas.identity import torch_seed

    requests, masks = zip(*chosen)
    shape, device = (1, args.size, args.size), args.device
    noise = torch.stack([
        torch.randn(shape, generator=torch.Generator().manual_seed(torch_seed(r.request_id, "noise")))
        for r in requests
    ]).to(device)  # fmt: skip
    mask = (torch.from_numpy(np.stack(masks))[:, None] > 0).float().to(device) * 2 - 1
    labels = torch.tensor([request.label_index for request in requests], device=device)
    both_masks = torch.cat([mask, torch.zeros_like(mask)])
    both_labels = torch.cat([labels, torch.full_like(labels, len(class_names))])
    _, ddim = schedulers()
    ddim.set_timesteps(args.inference_steps)
    with torch.inference_mode():
        for timestep in ddim.timesteps:
            timesteps = timestep.expand(2 * len(noise)).to(device)
            found = predict(denoiser, torch.cat([noise, noise]), both_masks, timesteps, both_labels)
            conditioned, free = found.chunk(2)
            noise = ddim.step(
                free + args.guidance * (conditioned - free), timestep, noise, eta=0.0
            ).prev_sample
    pixels = ((noise.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return synthetic_examples(pixels, class_names, requests, masks)


def synthetic_examples(
    pixels: np.ndarray, class_names: tuple[str, ...], requests: Sequence[Any], masks: Sequence[np.ndarray]
) -> "Examples":
    """Rows of a generator."""
    from factory.predictors.examples import Examples

    ids = tuple(request.request_id for request in requests)
    return Examples(
        images=pixels,
        labels=np.array([request.label_index for request in requests], np.int64),
        class_names=class_names,
        ids=ids,
        groups=ids,
        is_real=np.zeros(len(ids), bool),
        masks=(np.stack(masks) > 0).astype(np.uint8),
    )


def make_generator(args: argparse.Namespace, real: "Examples", stop_at: float) -> int:
    """Train on `real`, then draw what is missing; 0 when all is there, `UNFINISHED` when the time is over.

    Raises:
        SystemExit: --out holds a generator of other rows or settings.
    """
    from factory.predictors.examples import save_npz

    paths = synthetic_paths(args)
    if all(path.exists() for path in paths):
        print(f"generator: done, {args.num_synthetic} images in {len(paths)} files")
        return 0
    denoiser = train_generator(args, real, stop_at)
    if denoiser is None:
        return UNFINISHED
    chosen = draw_requests(args, real)
    for number, path in enumerate(paths):
        if time.perf_counter() > stop_at:
            print("generator: trained, images are missing; run this part again")
            return UNFINISHED
        if not path.exists():
            batch = chosen[number * args.sample_batch : (number + 1) * args.sample_batch]
            print(save_npz(sample(args, denoiser, batch, real.class_names), path), flush=True)
    print(
        f"generator: done, {args.num_synthetic} images, {sum(p.numel() for p in denoiser.parameters())} parameters"
    )
    return 0


def synthetic_paths(args: argparse.Namespace) -> list[Path]:
    """Files of the images, so many in each."""
    count = -(-args.num_synthetic // args.sample_batch)
    return [Path(args.out) / f"synthetic-{number:02d}.npz" for number in range(count)]
