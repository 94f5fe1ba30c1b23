"""How much does a leaking split flatter? One dataset, one classifier, split by image and split by group.

    python benchmarks/leak_demo.py real.lance --weights mobilenetv2_100_imagenet.safetensors --out runs/leak_demo
    python benchmarks/leak_demo.py real.lance --weights mobilenetv2_100_imagenet.safetensors --out runs/leak_demo \\
        --part network

Every image is predicted out of fold, once with folds dealt by image (twins of a test image may train) and once with
folds dealt by near-duplicate group, everything else equal. `--part probe`: frozen features under a logistic head and under
the nearest neighbour. `--part network`: the whole network fine-tuned. Reported: pooled AUC of both
schemes, of images that have a twin and of those that have none, and a paired test by group.

Finished folds lie in --out; running the command again trains only what is missing. All splits of the table are read,
test rows included, and the table records it: no choice is made from them here.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import save

from factory.evaluation import statistics
from factory.evaluation.data import read_real
from factory.evaluation.task_metrics import binary_auc
from factory.predictors.batches import UnionBatches
from factory.predictors.classifiers import Classifier
from factory.predictors.examples import Examples
from factory.predictors.fitting import FitSettings, fit
from factory.storage import TestAccess
from schemas.sample import SPLITS

SCHEMES = ("by_image", "by_group")
ARCHITECTURE = "mobilenetv2_100?pad_type=same&mean=0.5&std=0.5"
"""What the weights were trained with."""


def access_of(program: str) -> TestAccess:
    """Leave to read every split of the table."""
    return TestAccess(opened_by=program, reason="cross-validation over the whole table; nothing is selected")


def read_two_classes(uri: str, *, size: int, channels: int, names: tuple[str, str], program: str) -> Examples:
    """All rows of two classes, whatever their split; labels 0 and 1 in the order of `names`."""
    rows = read_real(uri, SPLITS, size=size, channels=channels, access=access_of(program))
    places = [rows.class_names.index(name) for name in names]
    kept = rows.take(np.flatnonzero(np.isin(rows.labels, places)))
    return Examples(
        images=kept.images,
        labels=(kept.labels == places[1]).astype(np.int64),
        class_names=names,
        ids=kept.ids,
        groups=kept.groups,
        is_real=kept.is_real,
        masks=kept.masks,
        has_mask=kept.has_mask,
    )


def folds_of(scheme: str, rows: Examples, num_folds: int, seed: int) -> list[np.ndarray]:
    """Test rows of each fold, stratified by class; by group, or by image alone."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedGroupKFold if scheme == "by_group" else StratifiedKFold
    splitter = kind(n_splits=num_folds, shuffle=True, random_state=seed)
    groups = np.asarray(rows.groups) if scheme == "by_group" else None
    return [test for _, test in splitter.split(rows.labels, rows.labels, groups)]


def compare_schemes(rows: Examples, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """AUC of both schemes and their difference, by image minus by group.

    Args:
        scores: (R, N) out-of-fold scores of each repeat under each scheme.
    """
    groups = np.asarray(rows.groups)
    _, of_row, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    has_twin = sizes[of_row] > 1

    def mean_auc(scheme: str, chosen: np.ndarray) -> float:
        return float(np.mean([binary_auc(rows.labels[chosen], repeat[chosen]) for repeat in scores[scheme]]))

    everything = np.arange(len(rows))
    interval = statistics.bootstrap(
        lambda drawn: mean_auc("by_image", drawn) - mean_auc("by_group", drawn),
        groups,
        strata=rows.labels,
        num_resamples=1000,
    )
    ranks = {scheme: np.mean([r.argsort().argsort() for r in scores[scheme]], axis=0) for scheme in SCHEMES}
    test = statistics.paired_permutation_test(
        binary_auc, rows.labels, ranks["by_group"], ranks["by_image"], groups, num_permutations=1999
    )
    return {
        "auc": {scheme: mean_auc(scheme, everything) for scheme in SCHEMES},
        "auc_of_rows_with_twin": {scheme: mean_auc(scheme, np.flatnonzero(has_twin)) for scheme in SCHEMES},
        "auc_of_rows_without": {scheme: mean_auc(scheme, np.flatnonzero(~has_twin)) for scheme in SCHEMES},
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "p_value": test.p_value,
        "num_rows": len(rows),
        "num_groups": len(sizes),
        "rows_with_twin": int(has_twin.sum()),
        "repeats": len(scores["by_image"]),
    }


def cached_scores(path: Path, make: Any) -> np.ndarray:
    """The scores at `path` (.npy), made and written in one step where it is not there."""
    if not path.exists():
        started = time.perf_counter()
        partial = path.with_suffix(".partial.npy")
        np.save(partial, make())
        partial.replace(path)
        print(f"{path.stem}: {time.perf_counter() - started:.0f} s", flush=True)
    return np.load(path, allow_pickle=False)


def probe(args: argparse.Namespace, rows: Examples) -> dict[str, Any]:
    """Frozen features under three heads."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = cached_scores(
        Path(args.out) / f"features-{args.size}px-{rows.digest()}.npy",
        lambda: frozen_features(args.weights, rows.images),
    )
    heads = {
        "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(C=args.c, max_iter=2000)),
        "nearest_neighbour": lambda: make_pipeline(StandardScaler(), KNeighborsClassifier(1)),
    }
    results = {}
    for name, make in heads.items():
        scores = {scheme: np.full((args.repeats, len(rows)), np.nan) for scheme in SCHEMES}
        for scheme in SCHEMES:
            for repeat in range(args.repeats):
                for test in folds_of(scheme, rows, args.folds, repeat):
                    train = np.setdiff1d(np.arange(len(rows)), test)
                    head = make().fit(features[train], rows.labels[train])
                    scores[scheme][repeat, test] = head.predict_proba(features[test])[:, 1]
        results[name] = compare_schemes(rows, scores)
        tell(name, results[name])
    return results


def fine_tuned(
    predictor: Classifier, settings: FitSettings, rows: Examples, test: np.ndarray, seed: int
) -> np.ndarray:
    """Probability of the second class of the test rows by a network trained on all others."""
    train = rows.take(np.setdiff1d(np.arange(len(rows)), test))
    batches = UnionBatches(train.labels, 2, settings.batch_size, seed)
    fitted = fit(predictor, settings, train, batches, validation=None, seed=seed)
    return fitted.predict(rows.take(test))[:, 1]


def network(args: argparse.Namespace, rows: Examples) -> dict[str, Any]:
    """The whole network fine-tuned on each training part."""
    predictor = Classifier(architecture=ARCHITECTURE, weights=args.weights)
    settings = FitSettings(num_steps=args.steps, batch_size=16, learning_rate=args.learning_rate)
    scores = {scheme: np.full((args.repeats, len(rows)), np.nan) for scheme in SCHEMES}
    folder = Path(args.out) / f"network-{args.size}px-{args.steps}steps-{args.learning_rate:g}"
    folder.mkdir(parents=True, exist_ok=True)
    for repeat in range(args.repeats):
        for number in range(args.folds):
            for scheme in SCHEMES:
                test = folds_of(scheme, rows, args.folds, repeat)[number]
                scores[scheme][repeat, test] = cached_scores(
                    folder / f"{scheme}-{repeat}-{number}.npy",
                    functools.partial(fine_tuned, predictor, settings, rows, test, repeat),
                )
    result = compare_schemes(rows, scores)
    tell("fine-tuned network", result)
    return {"fine_tuned": result}


def frozen_features(weights: str, images: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
    """Pooled ImageNet features, float32 (N, 1280), of uint8 images (N, S, S, 3) or float32 ones (N, 3, S, S) in 0 … 1."""
    import torch

    from factory.predictors.backbones import Architecture, classification_network
    from factory.predictors.networks import Normalised

    architecture = Architecture.parse(ARCHITECTURE, "architecture")
    body = classification_network(architecture, weights, num_classes=0, size=images.shape[2], dropout=0.0)
    network = Normalised(body, *architecture.normalisation()).eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(images[start : start + batch_size])
            if pixels.dtype == torch.uint8:
                pixels = pixels.permute(0, 3, 1, 2).float() / 255
            parts.append(network(pixels.contiguous(memory_format=torch.channels_last)).numpy())
    return np.concatenate(parts)


def forest_plot(
    path: str, xlabel: str, lines: list[tuple[str, float, float, float]], zero: bool = True
) -> None:
    """Values with their intervals, one line each, top down; a vertical line at 0 where `zero`.

    Args:
        path: PNG to write.
        lines: (name, value, low, high).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.9 + 0.34 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (_, value, low, high) in enumerate(lines):
        axes.plot([low, high], [place, place], color="#2463c9", linewidth=1.6)
        axes.plot(value, place, "o", color="#2463c9", markersize=5)
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    if zero:
        axes.axvline(0, color="#1b2130", linewidth=0.8)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def tell(name: str, result: dict[str, Any]) -> None:
    one, two = (result["auc"][scheme] for scheme in SCHEMES)
    print(
        f"{name}: AUC {one:.3f} split by image, {two:.3f} by group; difference {result['difference']:+.3f} "
        f"[{result['low']:+.3f}, {result['high']:+.3f}], p {result['p_value']:.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("real", help="real table")
    parser.add_argument("--weights", required=True, help="MobileNetV2's safetensors file")
    parser.add_argument("--out", required=True, help="folder of finished folds")
    parser.add_argument("--part", choices=("probe", "network"), default="probe")
    parser.add_argument("--classes", nargs=2, default=["benign", "malignant"])
    parser.add_argument("--name", default="busi", help="dataset, for the name of the result")
    parser.add_argument("--size", type=int, default=None, help="px; 192, or 96 for --part network")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=None, help="6, or 1 for --part network")
    parser.add_argument("--c", type=float, default=1.0, help="inverse strength of the head's ridge penalty")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--plot", help="PNG of the differences")
    args = parser.parse_args()
    is_network = args.part == "network"
    args.size = args.size or (96 if is_network else 192)
    args.repeats = args.repeats or (1 if is_network else 6)

    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows = read_two_classes(
        args.real, size=args.size, channels=3, names=tuple(args.classes), program="benchmarks/leak_demo.py"
    )
    results = (network if is_network else probe)(args, rows)
    settings = {
        k: v for k, v in vars(args).items() if k not in ("real", "out", "weights", "name", "part", "plot")
    }
    if args.plot:
        lines = [
            (name.replace("_", " "), entry["difference"], entry["low"], entry["high"])
            for name, entry in results.items()
        ]
        forest_plot(args.plot, "AUC split by image minus by group", lines)
    path = save("leak_demo", {"width": f"{args.name}-{args.part}", **settings}, results, "cpu")
    print(json.dumps(results, indent=2))
    print(f"wrote {path} ({time.perf_counter() - started:.0f} s in this run)")


if __name__ == "__main__":
    main()
