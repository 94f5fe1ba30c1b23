"""A small real table of ellipses in speckle, and a tiny base with random weights: for tests of whole runs."""

from pathlib import Path
from typing import Any

import numpy as np

from factory.diffusion.sampling import Sampling
from factory.generators.conditioning import TextAndMask
from factory.generators.latent_diffusion import LatentDiffusion, Trainable
from factory.imaging import encode_png
from factory.sources.prompts import LabelPrompt
from factory.training.objectives import NoisePrediction
from factory.training.settings import TrainingSettings
from factory.training.task import TrainingTask
from schemas.sample import RealSample, real_schema, table_of

LABELS = ("benign", "malignant")
RESOLUTION = 64
TOKENS = 16


def make_rows(
    num_train: int = 10, num_val: int = 4, *, with_masks: bool = True, seed: int = 0
) -> list[RealSample]:
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:48, :64]
    rows = []
    for number in range(num_train + num_val):
        label = number % 2
        cy, cx, ry, rx = rng.uniform((18, 22, 6, 8 + 8 * label), (30, 42, 10, 12 + 8 * label))
        mask = (((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 < 1).astype(np.uint8)
        pixels = np.where(mask, 40, 150) * rng.uniform(0.6, 1.2, mask.shape)
        rows.append(
            RealSample(
                image_id=f"{seed:016x}{number:016x}",
                dataset="ellipses",
                source_path=f"{number}.png",
                group_id=f"group-{number}",
                split="train" if number < num_train else "val",
                label=label,
                label_name=LABELS[label],
                image=encode_png(pixels.clip(0, 255).astype(np.uint8)),
                mask=encode_png(mask) if with_masks else None,
                height=48,
                width=64,
                licence="none",
                allowed_use="tests",
                embedding=(1.0, 0.0),
            )
        )
    return rows


def write_real(
    uri: Path, rows: list[RealSample], labels: tuple[str, ...] = LABELS, overwrite: bool = False
) -> str:
    import json

    from factory.storage import write_table

    schema = real_schema(2)
    write_table(
        str(uri),
        table_of(rows, schema),
        schema,
        metadata={"class_names": json.dumps(labels)},
        overwrite=overwrite,
    )
    return str(uri)


def write_base(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A base of the tiny shape in diffusers layout, random weights."""
    import torch
    from diffusers import DDPMScheduler

    from factory.assets.base_models import build_models, save_base, save_tokenizer

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer", 32)
    vae, unet, text_encoder = build_models("tiny", tokenizer)
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    save_base(folder, vae, unet, text_encoder, scheduler, torch.float32)
    return folder


def make_task(
    base: Path, real: str, out: Path, *, trainable: Trainable | None = None, **changes: Any
) -> TrainingTask:
    from factory.storage import open_table

    settings: dict[str, Any] = {
        "max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "ema_decay": 0.9,
        "checkpoint_every": 2, "log_every": 1, "validate_every": 2, "sample_every": 4,
    }  # fmt: skip
    return TrainingTask(
        recipe="tiny",
        generator=LatentDiffusion(
            base=str(base),
            conditioning=TextAndMask(),
            trainable=trainable or Trainable(unet="lora", controlnet=True, lora_rank=2),
            resolution=RESOLUTION,
        ),
        objectives=(NoisePrediction(),),
        settings=TrainingSettings(**{**settings, **changes}),
        prompts=LabelPrompt(),
        sampling=Sampling(num_inference_steps=2, guidance_scale=2.0),
        real=real,
        real_version=open_table(real).version,
        out=out,
    )
