"""Train the tiny base checkpoint that ships with the factory, on phantom ultrasound.

    python -m factory.assets.train_base --out factory/assets/base --num-threads 1

About half an hour on one core. Three stages: an AutoencoderKL (128 px to 16 × 16 × 8 latents), the latents of
all images, and a text-conditional UNet with its text encoder. There is no mask control in it: that is what a
fine-tune on a real table adds. The same seed, thread count and library versions give the same weights.
`--vae FOLDER` keeps the autoencoder of an earlier run and trains the rest.
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from factory.assets.base_models import TINY_TEXT, build_models, save_base, save_tokenizer
from factory.datasets.phantom import (
    BENIGN,
    MALIGNANT,
    NORMAL,
    SCANNER_A,
    SCANNER_B,
    PhantomConfig,
    PhantomSample,
    phantom_sample,
)

SIZE = 128
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    # With few steps the first one must start at the noisiest timestep, or brightness is lost.
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """Settings of the run; the defaults made the weights that ship."""

    num_images: int = 4000
    vae_steps: int = 1200
    vae_batch: int = 8
    unet_steps: int = 1500
    unet_batch: int = 32
    seed: int = 20250


def draw_images(settings: BaseTraining) -> tuple[np.ndarray, list[str], list[str]]:
    """Phantoms (N, 128, 128) uint8, four of five from the first scanner, with prompts and label names."""
    classes = (BENIGN, MALIGNANT, NORMAL)
    scanners = [PhantomConfig(size=SIZE, classes=classes, scanner=s) for s in (SCANNER_A, SCANNER_B)]
    images = np.empty((settings.num_images, SIZE, SIZE), np.uint8)
    prompts, labels = [], []
    for index in progress(settings.num_images, "phantoms"):
        sample = phantom_sample(scanners[index % 5 == 4], settings.seed, index)
        images[index] = sample.image
        prompts.append(describe(sample))
        labels.append(sample.label_name)
    return images, prompts, labels


def describe(sample: PhantomSample) -> str:
    """The BI-RADS prompt of a phantom, from its ground truth."""
    if not sample.attributes:
        return f"breast ultrasound image of {sample.label_name} tissue."
    return (
        f"breast ultrasound image of {sample.label_name} tumor with {sample.attributes['echogenicity']} "
        f"echogenicity and {sample.attributes['boundary']} boundary."
    )


def progress(total: int, what: str, values: dict[str, float] | None = None) -> "_Progress":
    """Count to `total`, printing rate and time left every twenty seconds."""
    return _Progress(total, what, values if values is not None else {})


class _Progress:
    def __init__(self, total: int, what: str, values: dict[str, float]) -> None:
        self.total, self.what, self.values = total, what, values

    def __iter__(self) -> "_Progress":
        self.start = self.shown = time.perf_counter()
        self.count = -1
        return self

    def __next__(self) -> int:
        self.count += 1
        now = time.perf_counter()
        if now - self.shown > 20 or self.count == self.total:
            self.shown = now
            rate = max(self.count, 1) / (now - self.start)
            shown = ", ".join(f"{k} {v:.4f}" for k, v in self.values.items())
            left = (self.total - self.count) / rate
            print(
                f"{self.what} {self.count}/{self.total} {rate:.2f}/s, {left:.0f} s left {shown}", flush=True
            )
        if self.count == self.total:
            raise StopIteration
        return self.count


# ---------------------------------------------------------------------------------------------- autoencoder


class PatchDiscriminator(nn.Sequential):
    """Real or reconstructed, for overlapping patches of about 30 px (Isola et al. 2017), one channel in."""

    def __init__(self, width: int = 32) -> None:
        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]

        super().__init__(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            *block(width, 2 * width),
            *block(2 * width, 3 * width),
            nn.Conv2d(3 * width, 1, 3, 1, 1),
        )


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 1, S, S) in [-1, 1]: mirrored, brightness curve changed, some shrunk into a black frame.

    The autoencoder must also carry scans with another gain and letterboxed frames.
    """
    out = []
    for image in images:
        if torch.rand((), generator=rng) < 0.5:
            image = image.flip(-1)
        if torch.rand((), generator=rng) < 0.4:
            gamma = float(torch.empty(()).uniform_(0.6, 1.6, generator=rng))
            image = ((image + 1) / 2).clamp(0, 1) ** gamma * 2 - 1
        if torch.rand((), generator=rng) < 0.2:
            height, width = (int(torch.randint(72, SIZE + 1, (), generator=rng)) for _ in range(2))
            small = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
            top, left = (SIZE - height) // 2, (SIZE - width) // 2
            image = F.pad(small, (left, SIZE - width - left, top, SIZE - height - top), value=-1.0)
        out.append(image)
    return torch.stack(out)


def bands(image: Tensor) -> list[Tensor]:
    """Three octaves of detail (Laplacian pyramid), finest first."""
    out = []
    for _ in range(3):
        low = F.avg_pool2d(image, 2)
        out.append(image - F.interpolate(low, scale_factor=2.0, mode="bilinear"))
        image = low
    return out


def texture_loss(made: Tensor, real: Tensor) -> Tensor:
    """Difference in local detail energy per octave: speckle may differ in its grains, not in its strength."""
    loss = made.new_zeros(())
    for a, b in zip(bands(made), bands(real)):
        energies = [(F.avg_pool2d(x.square(), 8, 4) + 1e-4).log() for x in (a, b)]
        loss = loss + (energies[0] - energies[1]).abs().mean()
    return loss / 3


def train_vae(vae: AutoencoderKL, images: np.ndarray, settings: BaseTraining) -> None:
    """Train in place: L1, local texture energy, a little KL, and for the last 60 % a patch discriminator."""
    rng = torch.Generator().manual_seed(settings.seed + 1)
    critic = PatchDiscriminator()
    steps, gan_from = settings.vae_steps, int(0.4 * settings.vae_steps)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=4e-4, betas=(0.5, 0.9))
    vae.train().to(memory_format=torch.channels_last)
    values: dict[str, float] = {}
    for step in progress(steps, "vae", values):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * _cosine(step / steps))
        chosen = torch.randint(len(images), (settings.vae_batch,), generator=rng)
        grey = torch.from_numpy(images[chosen.numpy()]).float()[:, None] / 127.5 - 1.0
        grey = augment(grey, rng)
        posterior = vae.encode(grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))
        latent = posterior.latent_dist
        noise = torch.randn(latent.mean.shape, generator=rng)
        decoded = vae.decode(latent.mean + latent.std * noise).sample
        made = decoded.mean(dim=1, keepdim=True)
        pixel = (decoded - grey).abs().mean()
        texture = texture_loss(made, grey)
        kl = 0.5 * (latent.mean.square() + latent.var - 1.0 - latent.logvar).mean()
        loss = pixel + 0.05 * texture + 1e-3 * kl
        if step >= gan_from:
            loss = loss - 0.04 * min(1.0, (step - gan_from) / 200) * critic(made).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step >= gan_from - 100:
            critic_loss = F.relu(1 - critic(grey)).mean() + F.relu(1 + critic(made.detach())).mean()
            critic_optimizer.zero_grad(set_to_none=True)
            critic_loss.backward()
            critic_optimizer.step()
            values["critic"] = critic_loss.item()
        values.update(l1=pixel.item(), texture=texture.item(), kl=kl.item())
    vae.eval()
    # Ultrasound is grey: one output kernel for all three channels keeps their mean and removes their spread.
    for parameter in (vae.decoder.conv_out.weight, vae.decoder.conv_out.bias):
        parameter.data.copy_(parameter.data.mean(dim=0, keepdim=True).expand_as(parameter))


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every image's latents, (N, 8, 16, 16), not scaled."""
    means, stds = [], []
    for start in range(0, len(images), 32):
        grey = torch.from_numpy(images[start : start + 32]).float()[:, None] / 127.5 - 1.0
        inputs = grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        latent = vae.encode(inputs).latent_dist
        means.append(latent.mean)
        stds.append(latent.std)
    return torch.cat(means), torch.cat(stds)


# ----------------------------------------------------------------------------------------------------- UNet


def train_unet(
    denoiser: nn.Module,
    text_encoder: nn.Module,
    token_ids: Tensor,
    prompt_of: Tensor,
    latents: tuple[Tensor, Tensor],
    settings: BaseTraining,
) -> None:
    """Train UNet and text encoder in place (v-prediction, prompt dropout); they end as their moving average.

    `token_ids` holds every distinct prompt, the empty one first; `prompt_of` (N, 2) gives the full and the
    short prompt of each image.
    """
    rng = torch.Generator().manual_seed(settings.seed + 2)
    schedule = DDPMScheduler(**SCHEDULE)
    both = nn.ModuleList([denoiser, text_encoder])
    ema = copy.deepcopy(both).requires_grad_(False)
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    both.train()
    denoiser.to(memory_format=torch.channels_last)
    mean, std = latents
    values: dict[str, float] = {}
    steps, batch = settings.unet_steps, settings.unet_batch
    for step in progress(steps, "unet", values):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 200) * (0.05 + 0.95 * _cosine(step / steps))
        chosen = torch.randint(len(mean), (batch,), generator=rng)
        clean = mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        # Stratified timesteps: less variance between steps than independent draws.
        spread = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        timesteps = (spread * 1000).long().clamp(max=999)[torch.randperm(batch, generator=rng)]
        kind = torch.rand(batch, generator=rng)
        prompts = torch.where(kind < 0.2, prompt_of[chosen, 1], prompt_of[chosen, 0])
        prompts = torch.where(kind > 0.88, torch.zeros_like(prompts), prompts)
        embeds = text_encoder(token_ids).last_hidden_state[prompts]
        noisy = schedule.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = denoiser(noisy, timesteps, embeds).sample
        loss = F.mse_loss(prediction, schedule.get_velocity(clean, noise, timesteps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9985, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), both.parameters()):
                average.lerp_(parameter, 1 - decay)
        values["loss"] = 0.98 * values.get("loss", loss.item()) + 0.02 * loss.item()
    both.load_state_dict(ema.state_dict())
    both.eval()


def _cosine(fraction: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * fraction))


def index_prompts(prompts: list[str], labels: list[str]) -> tuple[list[str], Tensor]:
    """Distinct texts, the empty one first, and per image the indices (N, 2) of its full and its short prompt."""
    short = [
        p if "tumor" not in p else f"breast ultrasound image of {n} tumor." for p, n in zip(prompts, labels)
    ]
    texts = ["", *sorted(set(prompts) | set(short))]
    number = {text: i for i, text in enumerate(texts)}
    return texts, torch.tensor([[number[a], number[b]] for a, b in zip(prompts, short)])


def train_base(out: Path, settings: BaseTraining, vae_folder: Path | None = None) -> None:
    """All stages; writes the base below `out` in float16 safetensors."""
    torch.manual_seed(settings.seed)
    tokenizer = save_tokenizer(out / "tokenizer", TINY_TEXT["max_position_embeddings"])
    vae, unet, text_encoder = build_models("tiny", tokenizer)
    images, prompts, labels = draw_images(settings)
    if vae_folder is None:
        train_vae(vae, images, settings)
    else:
        vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32)
    # What ships is float16: latents are those of the weights that users will load.
    vae.to(torch.float16).to(torch.float32)
    # Mirrored copies double the data: a mirrored scan is a scan.
    images = np.concatenate([images, images[:, :, ::-1]])
    prompts, labels = prompts * 2, labels * 2
    mean, std = encode_all(vae, images)
    scale = 1.0 / float((mean.var() + std.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(out / "vae")
    print(f"latent scale {scale:.4f}, posterior std {float(std.mean()) * scale:.4f}", flush=True)
    texts, prompt_of = index_prompts(prompts, labels)
    token_ids = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    train_unet(unet, text_encoder, token_ids, prompt_of, (mean * scale, std * scale), settings)
    save_base(out, vae, unet, text_encoder, DDPMScheduler(**SCHEDULE), torch.float16)


def main() -> None:
    defaults = BaseTraining()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, default=None, help="folder of a trained VAE to keep")
    parser.add_argument("--num-threads", type=int, default=1)
    for name in ("num_images", "vae_steps", "vae_batch", "unet_steps", "unet_batch", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    names = BaseTraining.__dataclass_fields__
    start = time.perf_counter()
    train_base(args.out, BaseTraining(**{n: getattr(args, n) for n in names}), args.vae)
    print(f"wrote {args.out} after {(time.perf_counter() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
