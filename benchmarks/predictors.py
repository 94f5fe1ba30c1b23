"""Training a segmenter: our loop against the stock one, and what each architecture costs.

    python benchmarks/predictors.py                     # CPU, one or two minutes
    python benchmarks/predictors.py --device cuda --size 256 --batch-size 32
    python benchmarks/predictors.py --architectures     # parameters of every architecture and seconds per step as well

The peer is the loop of MONAI's two-dimensional segmentation tutorials: a DataLoader over dictionary transforms with the
same kinds of augmentation, its BasicUNet, DiceCELoss, AdamW. Both train the same network on the same rows for the same
steps, in turn, in one process; both must end with the lesions found (Dice on held-out phantoms is in the result).
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import interleaved, median, save, seconds_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=16, help="channels of the U-Net's first level")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--steps", type=int, default=10, help="of each timed run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-steps", type=int, default=100, help="of the runs that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--architectures", action="store_true")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    train, test = phantoms(args.rows, args.size, 0), phantoms(40, args.size, 10_000)
    ours, peer = our_run(args, train), peer_run(args, train)
    times = interleaved(
        {"ours": lambda: ours(args.steps), "monai": lambda: peer(args.steps)}, args.rounds, args.device
    )
    seconds = {name: median(values) / args.steps for name, values in times.items()}
    results: dict[str, Any] = {
        "seconds_per_step": seconds,
        "monai_over_ours": seconds["monai"] / seconds["ours"],
        "dice": {
            "ours": dice(test, ours(args.learning_steps)(test)),
            "monai": dice(test, peer(args.learning_steps)(test)),
        },
    }
    print(f"{results['monai_over_ours']:.2f} × as fast as the stock loop; Dice {results['dice']}", flush=True)
    if args.architectures:
        results["architectures"] = architectures(args)
    settings = vars(args) | {"width": f"unet{args.width}-{args.size}"}
    print(save("predictors", settings, results, args.device))


def phantoms(count: int, size: int, first: int) -> Any:
    """`count` phantoms from number `first` on."""
    from factory.datasets.phantom import PhantomConfig, phantom_sample
    from factory.predictors.examples import Examples

    config = PhantomConfig(size=size)
    samples = [phantom_sample(config, 0, first + index) for index in range(count)]
    names = tuple(f"phantom {first + index}" for index in range(count))
    return Examples(
        images=np.stack([sample.image for sample in samples])[..., None],
        labels=np.array([config.class_names.index(sample.label_name) for sample in samples]),
        class_names=config.class_names,
        ids=names,
        groups=names,
        is_real=np.ones(count, np.bool_),
        masks=np.stack([sample.mask for sample in samples]),
    )


def our_run(args: argparse.Namespace, train: Any) -> Callable[[int], Callable[[Any], np.ndarray]]:
    """run(steps) → predict(examples), by `fit`."""
    from factory.predictors.batches import UnionBatches
    from factory.predictors.fitting import FitSettings, fit
    from factory.predictors.segmenters import Segmenter

    batches = UnionBatches(train.labels, train.num_classes, args.batch_size, 0)

    def run(steps: int) -> Callable[[Any], np.ndarray]:
        settings = FitSettings(num_steps=steps, batch_size=args.batch_size)
        fitted = fit(Segmenter(width=args.width), settings, train, batches, seed=0, device=args.device)
        return lambda examples: fitted.predict(examples, device=args.device)

    return run


def peer_run(args: argparse.Namespace, train: Any) -> Callable[[int], Callable[[Any], np.ndarray]]:
    """run(steps) → predict(examples), as MONAI's tutorials do it."""
    import torch
    from monai.data import DataLoader, Dataset
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet
    from monai.transforms import Compose, RandAffined, RandFlipd, RandScaleIntensityd, RandShiftIntensityd

    width, keys = args.width, ["image", "mask"]
    shift = 0.05 * args.size
    transform = Compose([
        RandFlipd(keys, prob=0.5, spatial_axis=1),
        RandAffined(
            keys, prob=1.0, rotate_range=np.deg2rad(10), scale_range=0.1, translate_range=shift,
            mode=("bilinear", "nearest"), padding_mode="zeros",
        ),
        RandScaleIntensityd(["image"], factors=0.1, prob=1.0),
        RandShiftIntensityd(["image"], offsets=0.1, prob=1.0),
    ])  # fmt: skip
    rows = [
        {"image": image.transpose(2, 0, 1).astype(np.float32) / 255, "mask": mask[None].astype(np.float32)}
        for image, mask in zip(train.images, train.masks)
    ]
    loader = DataLoader(Dataset(rows, transform), batch_size=args.batch_size, shuffle=True, drop_last=True)
    features = (width, width, 2 * width, 4 * width, 8 * width, width)

    def run(steps: int) -> Callable[[Any], np.ndarray]:
        torch.manual_seed(0)
        network = BasicUNet(
            spatial_dims=2, in_channels=1, out_channels=1, features=features, norm=("batch", {"affine": True})
        ).to(args.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        loss_of = DiceCELoss(sigmoid=True)
        step = 0
        while step < steps:
            for batch in loader:
                optimizer.zero_grad()
                loss = loss_of(network(batch["image"].to(args.device)), batch["mask"].to(args.device))
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                if step == steps:
                    break
        network.eval()

        def predict(examples: Any) -> np.ndarray:
            with torch.inference_mode():
                images = torch.from_numpy(examples.images).permute(0, 3, 1, 2).float() / 255
                return network(images.to(args.device))[:, 0].sigmoid().cpu().numpy()

        return predict

    return run


def dice(examples: Any, probabilities: np.ndarray) -> float:
    """Mean Dice over images."""
    from factory.evaluation.task_metrics import dice as image_dice

    pairs = zip(examples.masks, probabilities > 0.5)
    return float(np.mean([image_dice(mask, found.astype(np.uint8)) for mask, found in pairs]))


def architectures(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Parameters, and seconds of one forward and backward pass of four RGB images of 64 px."""
    import torch

    from factory.predictors.classifiers import CLASSIFIERS, Classifier
    from factory.predictors.networks import count_parameters
    from factory.predictors.segmenters import BY_ENCODER, BY_WIDTH, Segmenter

    swin = "swin_tiny_patch4_window7_224"
    named: dict[str, Any] = {name: Classifier(architecture=name) for name in CLASSIFIERS}
    named |= {f"{name} (width 16)": Segmenter(architecture=name) for name in BY_WIDTH}
    pairs = [*((name, "resnet18") for name in BY_ENCODER), ("unet", swin), ("upernet", swin)]
    named |= {
        f"{name} on {encoder}": Segmenter(architecture=name, encoder=encoder) for name, encoder in pairs
    }
    table = {}
    pixels = torch.rand((4, 3, 64, 64), device=args.device)
    for name, predictor in named.items():
        network = predictor.build(2, 3, 64).to(args.device).train()

        def step(network: Any = network) -> None:
            network(pixels).square().mean().backward()

        step()
        table[name] = {"parameters": count_parameters(network), "seconds": seconds_of(step, args.device)}
        print(
            f"{name:45} {table[name]['parameters']:>12,} {1000 * table[name]['seconds']:8.0f} ms", flush=True
        )
    return table


if __name__ == "__main__":
    main()
