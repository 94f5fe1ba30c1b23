"""What the mask sources draw, against real lesions: curvature, boxes, ripples, and distributions of shape.

    python benchmarks/mask_sources.py Dataset_BUSI_with_GT --gan-steps 2000 --ddpm-steps 3000 --device cuda

Curvature of the real masks by both operators: AUC of malignant against benign, correlation with log(area). Then a
mask GAN is trained with and without its curvature loss, and a mask DDPM; each source draws masks for held-out
requests through the same code as synthesis. Reported per class: mean curvature, IoU of the bounding box with the
rectangle asked for, ripple |κ(soft) - κ(thresholded)| of the GAN, and the Kolmogorov-Smirnov distance of area,
aspect and solidity from the training masks; the distance of the held-out real masks is the floor.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from measure import save

from factory import geometry
from factory.datasets.layout import ListingOptions
from factory.datasets.layouts.busi import BUSI
from factory.generators.mask_diffusion import MaskDDPM
from factory.generators.mask_gan import MaskGAN
from factory.generators.mask_training import MaskModelTraining
from factory.imaging import TrainingRow, decode_png, letterbox
from factory.sources.mask_models import CurvatureGAN, MaskDiffusion
from factory.sources.masks import DeformedEllipse, MaskDraw
from schemas.identity import random_generator
from schemas.request import SynthesisPlan

HELD_OUT_EVERY = 5
MODELS = ["curvature_gan", "gan_without_curvature_loss", "mask_diffusion"]


def read_rows(folder: Path, side: int) -> list[TrainingRow]:
    """Largest lesion of each image, letterboxed to (side, side); the image itself is not needed."""
    rows = []
    for item in BUSI.listing(folder, ListingOptions()).items:
        if not item.has_lesion:
            continue
        merged = np.maximum.reduce([_mask(path) for path in item.masks])
        mask = geometry.fill_holes(geometry.largest_component(letterbox(merged, side, is_mask=True)))
        rows.append(
            TrainingRow(
                image_id=item.source_path,
                label=("benign", "malignant").index(item.label_name),
                label_name=item.label_name,
                group_id=item.source_path,
                image=np.zeros((side, side), np.uint8),
                mask=mask,
                attributes={},
            )
        )
    return sorted(rows, key=lambda row: row.image_id)


def _mask(path: Path) -> np.ndarray:
    pixels = decode_png(path.read_bytes())
    return ((pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=2)) > 0).astype(np.uint8)


def separation(rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """AUC malignant against benign, correlation with log(area) and class means, by operator; AUC of area alone."""
    from sklearn.metrics import roc_auc_score

    labels = np.array([row.label for row in rows])
    masks = [row.mask for row in rows if row.mask is not None]
    log_area = np.log([geometry.area(mask) for mask in masks])
    out: dict[str, Any] = {"num_masks": len(masks), "auc_of_area": float(roc_auc_score(labels, log_area))}
    for operator in ("scale_normalised", "sobel"):
        values = np.array([geometry.curvature(mask, operator=operator) for mask in masks])
        out[operator] = {
            "auc": float(roc_auc_score(labels, values)),
            "correlation_with_log_area": float(np.corrcoef(values, log_area)[0, 1]),
            "benign": [float(values[labels == 0].mean()), float(values[labels == 0].std())],
            "malignant": [float(values[labels == 1].mean()), float(values[labels == 1].std())],
        }
    return out


def train_model(
    model: Any, rows: Sequence[TrainingRow], held_out: Sequence[TrainingRow], out: Path, device: str
) -> dict[str, float]:
    """Train a mask model on rows at its resolution and leave it in `out`; its last metrics and seconds."""
    import torch

    from factory.training.loop import train
    from factory.training.mask_batches import lesions_of
    from factory.training.mask_learners import MaskDDPMLearner, MaskGANLearner
    from factory.training.mixture import BatchSampler
    from factory.training.parts import as_settings, save_mask_model
    from factory.training.world import World

    classes = ("benign", "malignant")
    settings, world = as_settings(model.training), World(device=device)
    lesions, others = lesions_of(rows, classes), lesions_of(held_out, classes)
    torch.manual_seed(0)
    learner: Any
    if isinstance(model, MaskGAN):
        learner = MaskGANLearner(
            model=model,
            lesions=lesions,
            held_out=others,
            settings=settings,
            world=world,
            networks=model.networks(2),
        )
    else:
        learner = MaskDDPMLearner(
            denoiser=model.network(2), lesions=lesions, held_out=others, settings=settings, world=world
        )
    sampler = BatchSampler(num_rows=len(lesions.masks), batch_size=settings.batch_size)
    start = time.perf_counter()
    result = train(learner, sampler, settings, out, world=world)
    learner.finish()
    save_mask_model(out, model, learner.network, classes, {})
    return {**result.metrics, "seconds": time.perf_counter() - start}


def draw(source: Any, rows: Sequence[TrainingRow], count: int) -> dict[str, Any]:
    """Masks of `count` requests per class by the fitted source, those that failed, and seconds per mask."""
    fitted = source.fit(rows)
    plan = SynthesisPlan(
        recipe="benchmark", fingerprint="0", weights={}, real_digest="0", labels=("benign", "malignant")
    )
    draws: dict[str, list[MaskDraw]] = {"benign": [], "malignant": []}
    failed = 0
    start = time.perf_counter()
    for label, made in draws.items():
        for ordinal in range(count):
            request = plan.request(label, ordinal)
            try:
                made.append(fitted.draw(request, random_generator(request.request_id, "mask")))
            except ValueError:
                failed += 1
    seconds = (time.perf_counter() - start) / (2 * count)
    return {"draws": draws, "failed": failed, "seconds_per_mask": seconds}


def measures(masks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Area as a share of the frame, width over height, solidity and curvature of each mask."""
    return {
        "area": np.array([mask.mean() for mask in masks]),
        "aspect": np.array([geometry.box_aspect(mask) for mask in masks]),
        "solidity": np.array([geometry.solidity(mask) for mask in masks]),
        "curvature": np.array([geometry.curvature(mask) for mask in masks]),
    }


def compare(
    masks: dict[str, list[np.ndarray]], real: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Per class: Kolmogorov-Smirnov distances from the training masks, and mean and deviation of the curvature."""
    from scipy.stats import ks_2samp

    out: dict[str, dict[str, Any]] = {}
    for label, members in masks.items():
        if not members:
            out[label] = {"num_masks": 0}
            continue
        found = measures(members)
        names = ("area", "aspect", "solidity", "curvature")
        out[label] = {
            "num_masks": len(members),
            **{f"ks_{name}": float(ks_2samp(found[name], real[label][name]).statistic) for name in names},
            "curvature": [float(found["curvature"].mean()), float(found["curvature"].std())],
        }
    return out


def source_report(
    source: Any, rows: Sequence[TrainingRow], real: dict[str, dict[str, np.ndarray]], count: int
) -> dict[str, Any]:
    """Everything that is reported of one source."""
    made = draw(source, rows, count)
    masks = {label: [item.mask for item in items] for label, items in made["draws"].items()}
    every = [item.parameters for items in made["draws"].values() for item in items]
    report = {
        "failed": made["failed"],
        "tries_per_mask": float(np.mean([item["tries"] for item in every])) if every else None,
        "seconds_per_mask": made["seconds_per_mask"],
        "classes": compare(masks, real),
    }
    if every and "box_iou" in every[0]:
        report["box_iou"] = float(np.mean([item["box_iou"] for item in every]))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Dataset_BUSI_with_GT")
    parser.add_argument("--resolution", type=int, default=128, help="of the requests, px")
    parser.add_argument("--gan-resolution", type=int, default=128)
    parser.add_argument("--gan-channels", type=int, default=256)
    parser.add_argument("--gan-steps", type=int, default=2000)
    parser.add_argument("--gan-batch-size", type=int, default=64)
    parser.add_argument("--discriminator-channels", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the GAN's generator")
    parser.add_argument("--ddpm-resolution", type=int, default=64)
    parser.add_argument("--ddpm-channels", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--ddpm-steps", type=int, default=3000)
    parser.add_argument("--ddpm-batch-size", type=int, default=32)
    parser.add_argument("--ddpm-inference-steps", type=int, default=50)
    parser.add_argument("--max-tries", type=int, default=20, help="draws per mask of the models")
    parser.add_argument("--num-masks", type=int, default=200, help="per class and source")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which ones to train")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.num_threads)
    rows = read_rows(args.folder, args.resolution)
    training = [row for place, row in enumerate(rows) if place % HELD_OUT_EVERY]
    held_out = [row for place, row in enumerate(rows) if place % HELD_OUT_EVERY == 0]
    by_label = {name: [r.mask for r in training if r.label_name == name] for name in ("benign", "malignant")}
    real = {
        label: measures([mask for mask in masks if mask is not None]) for label, masks in by_label.items()
    }
    others = {name: [r.mask for r in held_out if r.label_name == name] for name in ("benign", "malignant")}
    results: dict[str, Any] = {"separation": separation(rows)}
    results["real_held_out"] = {"classes": compare(others, real)}  # type: ignore[arg-type]
    results["deformed_ellipse"] = source_report(DeformedEllipse(), training, real, args.num_masks)
    print(json.dumps(results, indent=2), flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    chosen = list(args.models)
    width = "busi" if chosen == MODELS else "-".join(["busi", *chosen])
    settings |= {"width": width, "folder": args.folder.name}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in _models(args).items():
            if name not in chosen:
                continue
            out = Path(folder) / name
            out.mkdir()
            at_size = read_rows(args.folder, model.resolution)
            parts = [
                [row for row in at_size if row.image_id in {r.image_id for r in chosen}]
                for chosen in (training, held_out)
            ]
            trained = train_model(model, parts[0], parts[1], out, args.device)
            source = (
                CurvatureGAN(model=model, checkpoint=str(out), max_tries=args.max_tries)
                if isinstance(model, MaskGAN)
                else MaskDiffusion(model=model, checkpoint=str(out), max_tries=args.max_tries)
            )
            results[name] = {"training": trained, **source_report(source, training, real, args.num_masks)}
            print(name, json.dumps(results[name], indent=2), flush=True)
            path = save("mask_sources", settings, results, args.device)
    print(f"wrote {path}")


def _models(args: argparse.Namespace) -> dict[str, Any]:
    reporting = {"log_every": 50, "checkpoint_every": 10**6, "validate_every": 0, "sample_every": 0}
    training = MaskModelTraining(
        max_steps=args.gan_steps,
        batch_size=args.gan_batch_size,
        learning_rate=args.learning_rate,
        ema_decay=0.99,
        **{**reporting, "validate_every": args.gan_steps},
    )
    gan = MaskGAN(
        resolution=args.gan_resolution,
        channels=args.gan_channels,
        min_channels=max(8, args.gan_channels // 8),
        spade_hidden=max(8, args.gan_channels // 4),
        discriminator_channels=args.discriminator_channels,
        discriminator_learning_rate=args.learning_rate,
        training=training,
    )
    plain = MaskGAN(**{**_fields(gan), "curvature_weight": 0.0})
    ddpm = MaskDDPM(
        resolution=args.ddpm_resolution,
        channels=tuple(args.ddpm_channels),
        norm_groups=8,
        layers_per_block=1,
        num_inference_steps=args.ddpm_inference_steps,
        training=MaskModelTraining(
            max_steps=args.ddpm_steps,
            batch_size=args.ddpm_batch_size,
            learning_rate=args.learning_rate,
            adam_betas=(0.9, 0.999),
            max_grad_norm=1.0,
            ema_decay=0.995,
            **reporting,
        ),
    )
    return {"curvature_gan": gan, "gan_without_curvature_loss": plain, "mask_diffusion": ddpm}


def _fields(model: MaskGAN) -> dict[str, Any]:
    return {**asdict(model), "training": model.training}


if __name__ == "__main__":
    main()
