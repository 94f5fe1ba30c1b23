"""Does learning beat random best-of-K at equal compute? The class-adaptive sampler against its ablations.

    python benchmarks/sampler.py --part bandit  --out runs/sampler
    python benchmarks/sampler.py --part planted --out runs/sampler
    python benchmarks/sampler.py --part phantom --out runs/sampler

bandit    A simulated task whose score is linear in the counts, plus noise as of a small validation set: what the
          policies reach in the paper's 30 epochs of 3 episodes, without training anything.
planted   A small classifier on a long tail of phantoms; the synthetic images of one class show the other. Where does
          its count end, and what do test phantoms say of every policy at equal compute: learned (the paper's setting,
          and ones that move), random actions, fixed counts, none?
phantom   The same with good synthetic images.

Every search lies in a folder below --out and is resumed there.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from evaluator_proof import phantoms
from measure import save

from factory.datasets.phantom import BENIGN, NORMAL, PhantomConfig
from factory.evaluation import statistics
from factory.evaluation.task_metrics import classification_report
from factory.predictors.augmentation import Augmentation
from factory.predictors.classifiers import Classifier
from factory.predictors.examples import Examples
from factory.predictors.fitting import FitSettings
from factory.predictors.losses import BalancedSoftmax
from tune.class_adaptive import ClassAdaptiveSampler, SamplerSettings
from tune.policy import CountBounds, Learning
from tune.sampler_search import EpisodeTraining, SamplerSearch, make_search_data, run_searches

WORTH = np.array([0.004, 0.004, -0.01])
"""Gain of the bandit's score per synthetic image of each class."""
TAIL = (
    dataclasses.replace(NORMAL, share=0.8),
    dataclasses.replace(BENIGN, share=0.2, radius=(0.2, 0.28), contrast=(-30.0, -24.0)),
)
"""Healthy tissue and, four times rarer, a large dark lesion: a small network can tell them apart at 32 px."""
ARMS: dict[str, dict[str, Any]] = {
    "learned_paper": {"policy": "learned", "learning": Learning(learning_rate=1e-3, reward="paper")},
    "learned_lr.05": {"policy": "learned", "learning": Learning(learning_rate=0.05)},
    "learned_lr.2": {"policy": "learned", "learning": Learning(learning_rate=0.2)},
    "random": {"policy": "random"},
    "fixed": {"policy": "fixed"},
    "none": {"policy": "none"},
}
"""The paper's rate and reward; two rates that move the policy, with rewards standardised within the epoch; ablations."""

TEST_SCORES = ("auc", "macro_f1", "balanced_accuracy", "brier")


def sampler_settings(args: argparse.Namespace, arm: str, seed: int, **changes: Any) -> SamplerSettings:
    """Settings of an arm of any part."""
    common: dict[str, Any] = {
        "num_epochs": args.epochs,
        "num_episodes": args.episodes,
        "initial_count": args.initial_count,
        "bounds": CountBounds(high=args.max_count),
        "seed": seed,
    }
    return SamplerSettings(**{**common, **ARMS[arm], **changes})


# ------------------------------------------------------------------------------------------ bandit


def run_bandit(settings: SamplerSettings, noise: float) -> dict[str, Any]:
    """One simulated run: the true score of the last epoch, the counts there, and how far the policy moved."""
    sampler = ClassAdaptiveSampler(settings, num_classes=len(WORTH))
    true = 0.0
    while not sampler.is_done:
        rows = []
        for episode in sampler.propose():
            rng = np.random.default_rng(episode.seed)
            rows.append(0.6 + WORTH @ np.array(episode.counts) + noise * rng.normal(size=2))
        record = sampler.observe(rows)
        true = float(0.6 + WORTH @ np.array(record.counts))
    moved = None
    if settings.policy == "learned":
        middle = np.full(len(WORTH), settings.bounds.high // 2)
        moved = float(np.abs(sampler.policy.probabilities(middle) - 1 / 3).max())  # type: ignore[union-attr]
    return {"score": true, "counts": sampler.counts.tolist(), "moved": moved}


def bandit(args: argparse.Namespace) -> dict[str, Any]:
    """Every arm at several levels of noise and numbers of epochs, paired by seed with random actions."""
    results: dict[str, Any] = {}
    for epochs in (30, 100):
        for noise in (0.005, 0.02):
            key = f"{epochs} epochs, noise {noise:g}"
            runs = {
                arm: [
                    run_bandit(
                        dataclasses.replace(sampler_settings(args, arm, seed), num_epochs=epochs), noise
                    )
                    for seed in range(args.bandit_seeds)
                ]
                for arm in ARMS
            }
            results[key] = {arm: _bandit_entry(runs[arm], runs["random"]) for arm in ARMS}
            for arm, entry in results[key].items():
                moved = (
                    "" if entry["moved"] is None else f", probabilities moved by at most {entry['moved']:.2f}"
                )
                print(
                    f"{key}: {arm:<14} score {entry['score']:.4f} (random {entry['difference_to_random']:+.4f}, "
                    f"p {entry['p_value']:.3f}), bad class {entry['bad_count']:.1f}{moved}",
                    flush=True,
                )
    return results


def _bandit_entry(runs: list[dict[str, Any]], random: list[dict[str, Any]]) -> dict[str, Any]:
    differences = np.array([one["score"] - two["score"] for one, two in zip(runs, random)])
    moved = [run["moved"] for run in runs if run["moved"] is not None]
    return {
        "score": float(np.mean([run["score"] for run in runs])),
        "difference_to_random": float(differences.mean()),
        "p_value": statistics.sign_flip_test(differences).p_value if differences.any() else 1.0,
        "good_counts": float(np.mean([run["counts"][:2] for run in runs])),
        "bad_count": float(np.mean([run["counts"][2] for run in runs])),
        "moved": float(np.max(moved)) if moved else None,
    }


# ------------------------------------------------------------------------------------------ phantoms


def tail_config(args: argparse.Namespace, *, balanced: bool) -> PhantomConfig:
    """A head and a tail class, or both equally often."""
    classes = tuple(dataclasses.replace(prior, share=1.0) for prior in TAIL) if balanced else TAIL
    return PhantomConfig(size=args.size, classes=classes)


def with_wrong_labels(synthetic: Examples, label: int) -> Examples:
    """Images of the other classes under the name of one."""
    images = synthetic.images.copy()
    rows, others = np.flatnonzero(synthetic.labels == label), np.flatnonzero(synthetic.labels != label)
    images[rows] = images[np.resize(others, len(rows))]
    return dataclasses.replace(synthetic, images=images)


def training(args: argparse.Namespace) -> EpisodeTraining:
    """A small network from random weights, a few seconds per episode."""
    return EpisodeTraining(
        predictor=Classifier(architecture=f"small_cnn?width={args.width}"),
        fit=FitSettings(
            num_steps=args.steps,
            learning_rate=2e-3,
            warmup_steps=0,
            schedule="constant",
            loss=BalancedSoftmax(),
            augmentation=Augmentation(kind="none"),
        ),
        real_per_batch=args.real_per_batch,
        score=args.score,
    )


def rows_of(args: argparse.Namespace, seed: int) -> tuple[Examples, Examples, Examples]:
    """Real training, synthetic and validation phantoms of one seed."""
    tail, balanced = tail_config(args, balanced=False), tail_config(args, balanced=True)
    real = phantoms(tail, 10 * seed + 1, 0, args.num_real, is_real=True)
    synthetic = phantoms(balanced, 10 * seed + 2, 0, args.num_synthetic, is_real=False)
    # Equal shares: a fold with six images of the tail would pay for noise.
    validation = phantoms(balanced, 10 * seed + 3, 0, args.num_val, is_real=True)
    return real, synthetic, validation


def folder_of(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """A folder that names what distinguishes searches; the search itself refuses any other difference."""
    key = f"{args.part}-{args.size}px-{args.num_real}real-{args.epochs}x{args.episodes}x{args.steps}-{args.score}"
    return Path(args.out) / f"{key}{'-same' if args.same_episode_seed else ''}" / f"{arm}-{seed}"


def trainings(args: argparse.Namespace) -> dict[str, Any]:
    """Every arm on real trainings, paired by seed with random actions: test scores, counts, those of the bad class."""
    is_planted = args.part == "planted"
    tests: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    counts: dict[str, list[list[int]]] = {arm: [] for arm in ARMS}
    last: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        real, synthetic, validation = rows_of(args, seed)
        if is_planted:
            synthetic = with_wrong_labels(synthetic, seed % 2)
        test = phantoms(tail_config(args, balanced=False), 10 * seed + 4, 0, args.num_test, is_real=True)
        data = make_search_data(real, synthetic, validation, seed=seed)
        for arm in ARMS:
            same = args.same_episode_seed and ARMS[arm]["policy"] in ("learned", "random")
            settings = sampler_settings(args, arm, seed, same_episode_seed=same)
            search = SamplerSearch(settings, training(args), data, folder_of(args, arm, seed))
            for _ in run_searches({arm: search}):
                pass
            probabilities = search.best().predict(test)
            report = classification_report(test.labels, probabilities, train_counts=real.counts())
            tests[arm].append({name: report[name] for name in TEST_SCORES})
            counts[arm].append(list(search.result()["best_counts"]))
            quarter = search.epochs[-max(1, args.epochs // 4) :]
            last[arm].append(np.mean([epoch.record.counts for epoch in quarter], axis=0).tolist())
            print(
                f"{args.part}: seed {seed} {arm:<14} test AUC {report['auc']:.3f}, Brier {report['brier']:.4f}; "
                f"counts of the kept epoch {counts[arm][-1]}, of the last quarter {np.round(last[arm][-1], 1)}",
                flush=True,
            )
    results: dict[str, Any] = {}
    for arm in ARMS:
        results[arm] = {
            "test": {name: [one[name] for one in tests[arm]] for name in TEST_SCORES},
            "best_counts": counts[arm],
            "last_quarter_counts": last[arm],
            "to_random": {name: _paired(tests, arm, name) for name in TEST_SCORES},
        }
        if is_planted:
            bad = [mean[seed % 2] for seed, mean in enumerate(last[arm])]
            results[arm] |= {"bad_class_count": bad, "seeds_at_floor": sum(count <= 1 for count in bad)}
    return results


def _paired(scores: dict[str, list[dict[str, float]]], arm: str, name: str) -> dict[str, float] | None:
    if arm == "random" or len(scores[arm]) < 2:
        return None
    differences = np.array([one[name] - two[name] for one, two in zip(scores[arm], scores["random"])])
    test = statistics.sign_flip_test(differences)
    return {
        "difference": test.difference,
        "standard_error": float(differences.std(ddof=1) / np.sqrt(len(differences))),
        "p_value": test.p_value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of the searches")
    parser.add_argument("--part", choices=("bandit", "planted", "phantom"), default="bandit")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--bandit-seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30, help="the paper's; of planted and phantom alike")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of an episode")
    parser.add_argument("--initial-count", type=int, default=4)
    parser.add_argument("--max-count", type=int, default=8)
    parser.add_argument("--real-per-batch", type=int, default=12)
    parser.add_argument("--size", type=int, default=32, help="px")
    parser.add_argument("--width", type=int, default=8, help="of the network")
    parser.add_argument("--num-real", type=int, default=40)
    parser.add_argument("--num-synthetic", type=int, default=300)
    parser.add_argument("--num-val", type=int, default=240)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument(
        "--score",
        choices=("auc", "macro_f1", "balanced_accuracy", "log_likelihood"),
        default="log_likelihood",
        help="of validation: pays, chooses, stops",
    )
    parser.add_argument(
        "--same-episode-seed", action="store_true", help="episodes differ by their actions alone"
    )
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    results = (bandit if args.part == "bandit" else trainings)(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "part", "width")}
    path = save("sampler", {"width": args.part, "network_width": args.width, **settings}, results, "cpu")
    print(json.dumps(results, indent=1))
    print(f"wrote {path} ({time.perf_counter() - started:.0f} s in this run)")


if __name__ == "__main__":
    main()
