"""Does the evaluation tell a good generator from a bad one? Planted truths on phantoms, and its false positives.

    python benchmarks/evaluator_proof.py --out runs/evaluator_proof
    python benchmarks/evaluator_proof.py --out runs/evaluator_proof --part null

A small U-Net learns to segment lesions from 32 real phantoms. Four "generators" add images at several ratios:

    good          the phantom itself: what a perfect generator would give
    wrong_psf     the same anatomy through a pulse and beam three times too wide
    shuffled      the good images with each other's masks
    copies        the real training images again: the null, which adds steps on nothing new

All arms train the same number of steps at the same batch size. The one-standard-error rule picks a ratio from three
folds of validation phantoms; the test phantoms are opened once per finished training and never choose. `--part null`
repeats the copies arm on new populations and counts how often the rule or the test calls it a gain.

Every training is one small JSON in --out; running the command again trains only what is missing.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from leak_demo import forest_plot
from measure import save
from scipy import stats

from factory.datasets.phantom import SCANNER_A, PhantomConfig, phantom_sample, with_point_spread
from factory.evaluation import selection, statistics
from factory.evaluation.arms import shuffled
from factory.predictors.batches import UnionBatches
from factory.predictors.examples import Examples, concatenate
from factory.predictors.fitting import FitSettings, fit
from factory.predictors.segmenters import Segmenter

GENERATORS = ("good", "wrong_psf", "shuffled", "copies")
NUM_FOLDS = 3
POINT_SPREAD = 3.0


def phantoms(config: PhantomConfig, seed: int, first: int, count: int, *, is_real: bool) -> Examples:
    """Images first … first + count − 1 of the population `seed`, with masks."""
    samples = [phantom_sample(config, seed, index) for index in range(first, first + count)]
    kind = "real" if is_real else "synthetic"
    ids = tuple(f"{kind} {config.scanner.name} {seed} {first + place}" for place in range(count))
    return Examples(
        images=np.stack([sample.image for sample in samples])[..., None],
        labels=np.array([config.class_names.index(sample.label_name) for sample in samples], np.int64),
        class_names=config.class_names,
        ids=ids,
        groups=ids,
        is_real=np.full(count, is_real),
        masks=np.stack([sample.mask for sample in samples]),
    )


def generated(kind: str, real: Examples, count: int, *, size: int, seed: int) -> Examples:
    """`count` images of a planted generator."""
    if kind == "copies":
        rows = np.arange(count) % len(real)
        ids = tuple(f"copy {place} of {real.ids[row]}" for place, row in enumerate(rows))
        return dataclasses.replace(real.take(rows), ids=ids, groups=ids, is_real=np.zeros(count, bool))
    scanner = with_point_spread(SCANNER_A, POINT_SPREAD) if kind == "wrong_psf" else SCANNER_A
    # Populations of real images have seeds below a million.
    made = phantoms(PhantomConfig(size=size, scanner=scanner), 1_000_000 + seed, 0, count, is_real=False)
    return shuffled(made, "masks", seed) if kind == "shuffled" else made


def dices(probabilities: np.ndarray, part: Examples) -> np.ndarray:
    """Dice of each image at threshold .5, float64 (N,); every truth has a lesion."""
    assert part.masks is not None
    predicted, truth = probabilities > 0.5, part.masks > 0
    both = (predicted & truth).sum(axis=(1, 2))
    return 2 * both / (predicted.sum(axis=(1, 2)) + truth.sum(axis=(1, 2)))


def train_and_score(
    args: argparse.Namespace, train: Examples, parts: dict[str, Examples], *, seed: int
) -> dict[str, Any]:
    """Dice of every image of every part after one training."""
    started = time.perf_counter()
    settings = FitSettings(num_steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate)
    batches = UnionBatches(train.labels, train.num_classes, args.batch_size, seed)
    fitted = fit(segmenter(args), settings, train, batches, validation=None, seed=seed)
    scores = {name: dices(fitted.predict(part), part).round(5).tolist() for name, part in parts.items()}
    return {"scores": scores, "seconds": time.perf_counter() - started}


def segmenter(args: argparse.Namespace) -> Segmenter:
    """A small U-Net."""
    return Segmenter(architecture="unet", width=args.channels)


def cached(path: Path, make: Any) -> dict[str, Any]:
    """The JSON at `path`, made and written in one step where it is not there."""
    if not path.exists():
        value = make()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value))
        partial.replace(path)
        print(f"{path.stem}: {value['seconds']:.0f} s", flush=True)
    return json.loads(path.read_text())


@functools.lru_cache(maxsize=1)
def population(
    size: int, num_real: int, num_val: int, num_test: int, seed: int
) -> tuple[Examples, dict[str, Examples]]:
    """Training phantoms, and validation folds and test phantoms of the same population but other patients."""
    config = PhantomConfig(size=size)
    real = phantoms(config, seed, 0, num_real, is_real=True)
    parts = {
        f"val{fold}": phantoms(config, seed, 1000 + fold * num_val, num_val, is_real=True)
        for fold in range(NUM_FOLDS)
    }
    parts["test"] = phantoms(config, seed, 10_000, num_test, is_real=True)
    return real, parts


def scores_of(
    args: argparse.Namespace, kind: str, ratio: float, task_seed: int, *, data_seed: int = 0
) -> dict[str, np.ndarray]:
    """Dice per image and part of one arm and seed."""
    name = f"real-{task_seed}" if ratio == 0 else f"{kind}-{ratio:g}-{task_seed}"

    def make() -> dict[str, Any]:
        real, parts = population(args.size, args.num_real, args.num_val, args.num_test, data_seed)
        train = real
        if ratio:
            # Each seed also draws its own synthetic images: the spread is that of generator and task seeds together.
            extra = generated(
                kind, real, round(ratio * args.num_real), size=args.size, seed=1000 * data_seed + task_seed
            )
            train = concatenate(real, extra)
        return train_and_score(args, train, parts, seed=task_seed)

    # The number of steps and the sizes name the folder: other settings never meet these results.
    key = f"{args.size}px-{args.num_real}real-{args.num_test}test-{args.steps}x{args.batch_size}-c{args.channels}-data{data_seed}"
    folder = Path(args.out) / key
    folder.mkdir(parents=True, exist_ok=True)
    scores = cached(folder / f"{name}.json", make)["scores"]
    return {part: np.array(values) for part, values in scores.items()}


def choose(curve: dict[float, list[dict[str, np.ndarray]]]) -> selection.RatioChoice:
    """The rule on the validation folds: seeds averaged within a fold."""
    ratios = sorted(curve)
    folds = [
        [np.mean([seed[f"val{fold}"].mean() for seed in curve[ratio]]) for fold in range(NUM_FOLDS)]
        for ratio in ratios
    ]
    return selection.one_standard_error(ratios, np.array(folds))


def gain(one: list[dict[str, np.ndarray]], two: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Test Dice of arm two minus arm one, paired by seed, judged in four ways.

    The interval and `p_value` are Student's t over seeds, its variance that of the seeds' means plus that of the test
    images: both what another training and what another test set would change. Beside them, to see what each costs: the
    hierarchical bootstrap over images and seeds, the sign flip over images alone (trained networks taken as given) and
    over seeds alone.
    """
    pairs = np.array([b["test"] - a["test"] for a, b in zip(one, two)])
    num_seeds = len(pairs)
    by_seed = pairs.mean(axis=1)
    difference = float(pairs.mean())
    error = float(np.sqrt(by_seed.var(ddof=1) / num_seeds + pairs.mean(axis=0).var(ddof=1) / pairs.shape[1]))
    law = stats.t(num_seeds - 1)
    crossed = statistics.hierarchical_bootstrap(
        lambda seed, rows: float(pairs[seed, rows].mean()),
        np.arange(pairs.shape[1]),
        num_generator_seeds=num_seeds,
        num_resamples=2000,
    )
    return {
        "real": float(np.mean([seed["test"].mean() for seed in one])),
        "with_synthetic": float(np.mean([seed["test"].mean() for seed in two])),
        "difference": difference,
        "low": difference - float(law.ppf(0.975)) * error,
        "high": difference + float(law.ppf(0.975)) * error,
        "p_value": float(2 * law.sf(abs(difference) / error)),
        "minimum_detectable_effect": selection.minimum_detectable_effect(
            error, degrees_of_freedom=num_seeds - 1
        ),
        "bootstrap_low": crossed.low,
        "bootstrap_high": crossed.high,
        "p_over_images": statistics.sign_flip_test(pairs.mean(axis=0)).p_value,
        "p_over_seeds": statistics.sign_flip_test(by_seed).p_value,
        "by_seed": by_seed.tolist(),
    }


def proof(args: argparse.Namespace) -> dict[str, Any]:
    """The rule's choice and the test's answer for each planted generator."""
    seeds = range(args.seeds)
    real = [scores_of(args, "real", 0, seed) for seed in seeds]
    results: dict[str, Any] = {"real_dice": float(np.mean([one["test"].mean() for one in real]))}
    for kind in args.generators:
        curve: dict[float, list[dict[str, np.ndarray]]] = {0.0: real}
        for ratio in args.ratios:
            curve[ratio] = [scores_of(args, kind, ratio, seed) for seed in seeds]
        choice = choose(curve)
        gains = {f"{ratio:g}": gain(real, curve[ratio]) for ratio in args.ratios}
        results[kind] = {
            "chosen_ratio": choice.ratio,
            "best_ratio": choice.best,
            "validation_means": choice.means,
            "validation_standard_errors": choice.standard_errors,
            "test": gains,
        }
        told = "; ".join(
            f"{r}x {g['difference']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}]" for r, g in gains.items()
        )
        print(f"{kind}: the rule picks {choice.ratio:g}; test Dice minus real only: {told}", flush=True)
    return results


def null(args: argparse.Namespace) -> dict[str, Any]:
    """How often copies of the real images are called a change, over new populations: gains and harms counted apart."""
    ratio = args.ratios[0]
    picked: list[bool] = []
    outcomes: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        curve = {
            value: [
                scores_of(args, "copies", value, seed, data_seed=1 + repeat) for seed in range(args.seeds)
            ]
            for value in (0.0, ratio)
        }
        picked.append(choose(curve).ratio > 0)
        outcomes.append(gain(curve[0.0], curve[ratio]))
    significant = {
        "t_over_seeds_and_images": [outcome["p_value"] < 0.05 for outcome in outcomes],
        "bootstrap_over_seeds_and_images": [
            outcome["bootstrap_low"] > 0 or outcome["bootstrap_high"] < 0 for outcome in outcomes
        ],
        "sign_flip_over_images": [outcome["p_over_images"] < 0.05 for outcome in outcomes],
    }
    differences = np.array([outcome["difference"] for outcome in outcomes])
    results: dict[str, Any] = {
        "repeats": args.repeats,
        "difference_mean": float(differences.mean()),
        "difference_std": float(differences.std(ddof=1)),
        "rule_picks_more_than_0": _rate("the rule picks more than 0", picked),
        "outcomes": outcomes,
    }
    for name, hits in significant.items():
        gains = [hit and difference > 0 for hit, difference in zip(hits, differences)]
        results[name] = {"any": _rate(f"{name}: any change", hits), "gain": _rate(f"{name}: gain", gains)}
    return results


def _rate(name: str, hits: list[bool]) -> dict[str, Any]:
    count = int(np.sum(hits))
    interval = statistics.wilson_interval(count, len(hits))
    print(f"{name}: {count} of {len(hits)} (95 % {interval.low:.2f} … {interval.high:.2f})", flush=True)
    return {"count": count, "rate": interval.value, "low": interval.low, "high": interval.high}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of finished trainings")
    parser.add_argument("--part", choices=("proof", "null"), default="proof")
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS))
    parser.add_argument("--ratios", nargs="+", type=float, default=None, help="4 and 1; 1 for --part null")
    parser.add_argument("--size", type=int, default=None, help="px; 48, or 32 for --part null")
    parser.add_argument("--num-real", type=int, default=32)
    parser.add_argument("--num-val", type=int, default=24, help="validation phantoms of each of three folds")
    parser.add_argument("--num-test", type=int, default=500)
    parser.add_argument("--steps", type=int, default=None, help="600, or 200 for --part null")
    parser.add_argument(
        "--channels",
        type=int,
        default=None,
        help="of the U-Net's first level; 14 is 0.4 M parameters; 6 for null",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=None, help="5, or 3 for --part null")
    parser.add_argument("--repeats", type=int, default=20, help="populations of --part null")
    parser.add_argument("--plot", help="PNG of the differences of --part proof")
    args = parser.parse_args()
    is_null = args.part == "null"
    for name, value in (
        ("ratios", [1.0] if is_null else [1.0, 4.0]),
        ("size", 32 if is_null else 48),
        ("channels", 6 if is_null else 14),
        ("steps", 200 if is_null else 600),
        ("seeds", 3 if is_null else 5),
    ):
        if getattr(args, name) is None:
            setattr(args, name, value)

    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    results = null(args) if is_null else proof(args)
    if args.plot and not is_null:
        forest_plot(
            args.plot,
            "test Dice minus that of the real images alone",
            [
                (
                    f"{kind} {ratio}x (rule: {results[kind]['chosen_ratio']:g})",
                    g["difference"],
                    g["low"],
                    g["high"],
                )
                for kind in args.generators
                for ratio, g in results[kind]["test"].items()
            ],
        )
    results["num_parameters"] = num_parameters(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "part", "plot")}
    path = save("evaluator_proof", {"width": f"phantom-{args.part}", **settings}, results, "cpu")
    print(f"wrote {path} ({time.perf_counter() - started:.0f} s in this run)")


def num_parameters(args: argparse.Namespace) -> int:
    return sum(p.numel() for p in segmenter(args).build(1, 1, args.size).parameters())


if __name__ == "__main__":
    main()
