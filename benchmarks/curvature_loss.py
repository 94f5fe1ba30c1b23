"""Does the curvature loss of the mask GAN carry the class? With and without it, over seeds, on phantom lesions.

    python benchmarks/curvature_loss.py          # about ten minutes on one core

Each arm trains the same GAN on the masks of phantoms (smooth benign, spiculated malignant lesions) and draws masks for the
same requests. "no_class_term" follows the paper's equations, which give the generator no loss on the class: there the
curvature loss is all that can tell it the classes apart; "default" has the projection discriminator as well.
Reported: mean curvature per class, the gap between the classes, and the AUC of malignant against benign; the same of
held-out phantoms is what a generator should come to, not exceed.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from mask_sources import draw, train_model
from measure import save

from factory import geometry
from factory.datasets.phantom import BENIGN, MALIGNANT, PhantomConfig, phantom_sample
from factory.generators.mask_gan import MaskGAN
from factory.generators.mask_training import MaskModelTraining
from factory.imaging import TrainingRow
from factory.sources.mask_models import CurvatureGAN

ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "default_without": {"curvature_weight": 0.0},
    "no_class_term": {"class_term": "paper"},
    "no_class_term_without": {"class_term": "paper", "curvature_weight": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-masks", type=int, default=240)
    parser.add_argument("--num-drawn", type=int, default=60)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    rows = phantom_rows(args.num_masks + args.num_masks // 4)
    train_rows, held_out = rows[: args.num_masks], rows[args.num_masks :]
    results: dict[str, Any] = {"held_out": summary([(row.label, row.mask) for row in held_out])}
    for arm in args.arms.split(","):
        runs = [run(arm, seed, train_rows, held_out, args) for seed in range(args.seeds)]
        results[arm] = {
            name: {"mean": float(np.mean([r[name] for r in runs])), "by_seed": [r[name] for r in runs]}
            for name in runs[0]
        }
        print(arm, {name: round(value["mean"], 3) for name, value in results[arm].items()}, flush=True)
    print("held out", results["held_out"])
    print(f"wrote {save('curvature_loss', vars(args) | {'width': 'phantom'}, results, 'cpu')}")


def phantom_rows(count: int) -> list[TrainingRow]:
    config = PhantomConfig(size=64, classes=(BENIGN, MALIGNANT))
    rows = []
    for index in range(count):
        sample = phantom_sample(config, 0, index)
        label = config.class_names.index(sample.label_name)
        rows.append(
            TrainingRow(
                image_id=f"{index:06d}",
                label=label,
                label_name=sample.label_name,
                group_id=f"{index}",
                image=sample.image,
                mask=geometry.fill_holes(geometry.largest_component(sample.mask)),
                attributes={},
            )
        )
    return rows


def run(
    arm: str, seed: int, rows: list[TrainingRow], held_out: list[TrainingRow], args: argparse.Namespace
) -> dict[str, float]:
    """One GAN trained and drawn from."""
    training = MaskModelTraining(
        max_steps=args.steps,
        batch_size=16,
        learning_rate=5e-4,
        ema_decay=0.98,
        seed=seed,
        validate_every=0,
        sample_every=0,
        checkpoint_every=args.steps,
    )
    model = MaskGAN(
        resolution=64,
        channels=32,
        noise_dim=32,
        min_channels=16,
        spade_hidden=16,
        discriminator_channels=16,
        training=training,
        **ARMS[arm],
    )
    with tempfile.TemporaryDirectory() as folder:
        train_model(model, rows, held_out, Path(folder), "cpu")
        source = CurvatureGAN(
            model=model, checkpoint=folder, min_box_iou=0.0, area_quantiles=(0.0, 1.0), max_tries=50
        )
        drawn = draw(source, rows, args.num_drawn)
    pairs = [
        (label, item.mask)
        for label, name in enumerate(("benign", "malignant"))
        for item in drawn["draws"][name]
    ]
    return summary(pairs)


def summary(pairs: list[tuple[int, Any]]) -> dict[str, float]:
    """Mean curvature per class, their gap, and the AUC of malignant against benign."""
    from sklearn.metrics import roc_auc_score

    labels = np.array([label for label, _ in pairs])
    values = np.array([geometry.curvature(mask) for _, mask in pairs])
    benign, malignant = float(values[labels == 0].mean()), float(values[labels == 1].mean())
    return {
        "benign": benign,
        "malignant": malignant,
        "gap": malignant - benign,
        "auc": float(roc_auc_score(labels, values)),
    }


if __name__ == "__main__":
    main()
