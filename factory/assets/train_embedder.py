"""Train the tiny embedder that ships with the factory: a small Dinov2Model, self-supervised, on phantoms.

    python -m factory.assets.train_embedder --out factory/assets/embedder --num-threads 1

A quarter of an hour on one free core. Two augmented views of one phantom image are pulled together and those of
all other images pushed apart (InfoNCE: van den Oord, Li, Vinyals 2018; for copy detection: Pizzi et al. 2022, "A
self-supervised descriptor for image copy detection"). Deviates: no projection head, the normalised class token is
itself compared, so the cosine that the factory uses is the one that was trained; views get harder during training.
The same seed, thread count and library versions give the same weights.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from factory.datasets.phantom import (
    BENIGN,
    MALIGNANT,
    NORMAL,
    SCANNER_A,
    SCANNER_B,
    PhantomConfig,
    phantom_sample,
)

SOURCE_SIZE = 128
MEAN, STD = 0.25, 0.2
"""Normalisation of pixels in 0 … 1: about that of B-mode images."""


@dataclass(frozen=True, kw_only=True)
class EmbedderTraining:
    """Settings of the run; the defaults made the weights that ship."""

    num_images: int = 2000
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 0.07
    hardening: float = 0.5
    """Share of the steps over which augmentation grows from a tenth to its full strength: at full strength from
    the start, all images fall on one point and stay there for hundreds of steps."""
    image_size: int = 96
    patch_size: int = 16
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 3
    seed: int = 20251


def build_model(settings: EmbedderTraining) -> Dinov2Model:
    """The untrained network; its weights depend on the seed alone."""
    torch.manual_seed(settings.seed)
    config = Dinov2Config(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        layerscale_value=1.0,
        initializer_range=0.05,
    )
    model = Dinov2Model(config)
    with torch.no_grad():
        embeddings = model.embeddings
        side = settings.image_size // settings.patch_size
        embeddings.position_embeddings[0, 1:] = mirror_positions(side, settings.hidden_size)
        filters = smooth_filters(settings.hidden_size, settings.patch_size, settings.seed)
        embeddings.patch_embeddings.projection.weight.copy_(filters[:, None].expand(-1, 3, -1, -1) / 3)
    return model


def smooth_filters(count: int, size: int, seed: int) -> Tensor:
    """(count, size, size) random patch filters of norm .5, too smooth to see a shift of a few px, and mirror-even.

    White filters would make the untrained network a descriptor of speckle, which changes with every shift; from
    there contrast takes an order of magnitude more steps.
    """
    noise = np.random.default_rng(seed).standard_normal((count, size, size)).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, (0, size / 4, size / 4), mode="constant")
    even = torch.from_numpy(smooth + smooth[:, :, ::-1])
    return 0.5 * even / even.pow(2).sum((1, 2), keepdim=True).sqrt()


def mirror_positions(side: int, width: int) -> Tensor:
    """(side², width) waves of the patch's row, and waves of its column that mirroring leaves unchanged."""
    row, column = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    waves = width // 3
    frequency = torch.arange(1, waves + 1) * torch.pi / 8 * side / waves
    row, column = row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency
    out = torch.zeros(side * side, width)
    out[:, : 3 * waves] = torch.cat([torch.sin(row), torch.cos(row), torch.cos(column)], 1)
    return out


def draw_images(count: int, seed: int) -> np.ndarray:
    """(count, S, S) uint8 phantoms of two scanners and three classes."""
    classes = (BENIGN, MALIGNANT, NORMAL)
    configs = [
        PhantomConfig(size=SOURCE_SIZE, classes=classes, scanner=scanner)
        for scanner in (SCANNER_A, SCANNER_B)
    ]
    return np.stack([phantom_sample(configs[k % 2], seed, k).image for k in range(count)])


def augment(images: Tensor, size: int, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """One random view of each image.

    At full strength: crop of 80 … 100 % of the width with a frame of its own proportions (letterboxed like any
    picture), small rotation, flip, gain, contrast, gamma, blur, speckle and noise.

    Args:
        images: (B, S, S) float32 in 0 … 1.
        size: side of the views, px.
        rng: draws everything.
        strength: 0 … 1, of everything but the flip.

    Returns:
        (B, 1, size, size) float32 in 0 … 1.
    """
    count = len(images)

    def draw(low: float, high: float, neutral: float) -> Tensor:
        values = low + (high - low) * torch.rand(count, generator=rng)
        return neutral + strength * (values - neutral)

    scale, angle, aspect = draw(0.8, 1.0, 1.0), draw(-0.07, 0.07, 0.0), draw(0.8, 1.0, 1.0)
    flip = torch.where(torch.rand(count, generator=rng) < 0.5, -1.0, 1.0)
    centre_x = (1 - scale) * (2 * torch.rand(count, generator=rng) - 1)
    centre_y = (1 - scale * aspect) * (2 * torch.rand(count, generator=rng) - 1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos * flip, -sin, centre_x], 1), torch.stack([sin * flip, cos, centre_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, size, size], align_corners=False)
    view = F.grid_sample(images[:, None], grid, padding_mode="reflection", align_corners=False)

    def each(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    blurred = F.avg_pool2d(F.avg_pool2d(view, 3, 1, 1), 3, 1, 1)
    view = torch.lerp(view, blurred, each(draw(-0.3, 1.0, 0.0).clamp(0)))
    view = view.clamp(1e-4, 1) ** each(draw(0.75, 1.35, 1.0)) * each(draw(0.75, 1.35, 1.0))
    view = view + each(draw(-0.08, 0.08, 0.0))
    speckle = torch.randn(view.shape, generator=rng) * each(draw(0.0, 0.2, 0.0))
    view = view * (1 + speckle) + torch.randn(view.shape, generator=rng) * each(draw(0.0, 0.03, 0.0))
    inside = torch.linspace(-1, 1, size).abs().view(1, 1, -1, 1) <= each(aspect)
    return torch.where(inside, view.clamp(0, 1), torch.zeros(()))


def network_input(views: Tensor) -> Tensor:
    """(B, 1, S, S) in 0 … 1 → (B, 3, S, S), normalised."""
    return ((views - MEAN) / STD).expand(-1, 3, -1, -1)


def contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE over both views of B images; first and second are (B, D)."""
    vectors = F.normalize(torch.cat([first, second]), dim=1)
    own = torch.eye(len(vectors), dtype=torch.bool)
    targets = torch.arange(len(vectors)).roll(len(first))
    return F.cross_entropy((vectors @ vectors.T / temperature).masked_fill(own, -torch.inf), targets)


def class_tokens(model: Dinov2Model, views: Tensor) -> Tensor:
    """(B, 1, S, S) views → (B, D), not normalised."""
    return model(network_input(views)).last_hidden_state[:, 0]


def train(settings: EmbedderTraining) -> Dinov2Model:
    """The trained network in evaluation mode; prints the loss and the recall of each 25 steps."""
    model = build_model(settings).train()
    images = torch.from_numpy(draw_images(settings.num_images, settings.seed))
    print(f"{len(images)} phantoms, {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    rng = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        # An untrained network puts all images at nearly one point; the differences are what is to be learnt.
        some = augment(images[:256].float() / 255, settings.image_size, rng, 0.1)
        model.layernorm.bias -= class_tokens(model, some).mean(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    start = time.perf_counter()
    for step in range(settings.steps):
        strength = min(1.0, 0.1 + 0.9 * step / (settings.hardening * settings.steps))
        chosen = torch.randperm(len(images), generator=rng)[: settings.batch_size]
        batch = images[chosen].float() / 255
        views = torch.cat([augment(batch, settings.image_size, rng, strength) for _ in range(2)])
        first, second = class_tokens(model, views).chunk(2)
        loss = contrast(first, second, settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        if step % 25 == 0 or step == settings.steps - 1:
            similarity = F.normalize(first.detach(), dim=1) @ F.normalize(second.detach(), dim=1).T
            recall = (similarity.argmax(1) == torch.arange(len(first))).float().mean()
            rate = (step + 1) / (time.perf_counter() - start)
            print(f"{step}: loss {loss:.3f}, recall in batch {recall:.2f}, {rate:.2f} steps/s", flush=True)
    return model.eval()


def save(model: Dinov2Model, settings: EmbedderTraining, out: Path) -> None:
    """Configuration, half-precision safetensors, preprocessing and settings, in transformers' layout."""
    model.half().save_pretrained(out, safe_serialization=True)
    model.float()
    processor = {
        "do_resize": True,
        "size": {"height": settings.image_size, "width": settings.image_size},
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    (out / "model.safetensors").chmod(0o644)
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")


def main() -> None:
    defaults = EmbedderTraining()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--num-images", type=int, default=defaults.num_images)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    settings = EmbedderTraining(steps=args.steps, num_images=args.num_images)
    save(train(settings), settings, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
