"""Real images, few of them: does anything help a probe trained on 40? Ordinary augmentation, a generator, more images.

    python benchmarks/busi_probe.py real.lance --weights mobilenetv2_100_imagenet.safetensors --out runs/busi_probe
    python benchmarks/busi_probe.py real.lance --weights mobilenetv2_100_imagenet.safetensors --out runs/busi_probe \\
        --generator-cells 5

Frozen ImageNet features at 192 px and a logistic head, benign against malignant. A cell is one repeat and one of five
folds by near-duplicate group: 40 real images (one per group) train, the fold's images judge. Arms:

    real                 the 40
    strong_augmentation  and four strongly augmented versions of each
    copy_paste           and 40 with a lesion of the 40 pasted into another of the 40
    oracle               and 40 more real images of other groups
    synthetic_1x, _2x    and 40 or 80 images of recipe `tiny`, trained on exactly the 40
    shuffled_labels      placebo: the 40 synthetic images with each other's labels

The arms with a generator need one trained per cell; `--generator-cells N` does so for the first N cells (0: none, these
arms are left out), and compares them with the other arms on those cells alone. Finished cells and generators lie in
--out; running the command again makes only what is missing. All splits of the table are read, test rows included, and
the table records it: nothing is selected from them.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from leak_demo import access_of, cached_scores, folds_of, forest_plot, frozen_features, read_two_classes
from measure import save

from factory.evaluation import selection, statistics
from factory.evaluation.arms import first_of_each_class, shuffled
from factory.evaluation.copy_paste import CopyPaste
from factory.evaluation.task_metrics import binary_auc
from factory.predictors.examples import Examples
from schemas.identity import random_generator
from schemas.sample import SPLITS

PROGRAM = "benchmarks/busi_probe.py"
PLAIN_ARMS = ("real", "strong_augmentation", "copy_paste", "oracle")
GENERATED_ARMS = ("synthetic_1x", "synthetic_2x", "shuffled_labels")
AUGMENTED_VERSIONS = 4


class Cell:
    """One repeat and fold: the 40 training rows, 40 more for the oracle, and the rows that judge."""

    def __init__(self, rows: Examples, args: argparse.Namespace, repeat: int, fold: int) -> None:
        self.name, self.repeat, self.fold = f"repeat{repeat}-fold{fold}", repeat, fold
        self.test = folds_of("by_group", rows, args.folds, repeat)[fold]
        rest = np.setdiff1d(np.arange(len(rows)), self.test)
        rng = random_generator(f"busi probe/{repeat}/{fold}", "rows")
        groups = np.asarray(rows.groups)
        # One image per group: 40 images are 40 patients as far as anyone can tell.
        shuffled_rows = rng.permutation(rest)
        _, first = np.unique(groups[shuffled_rows], return_index=True)
        single = shuffled_rows[np.sort(first)]
        shares = np.round(args.num_real * rows.counts() / len(rows)).astype(np.int64)
        shares[0] += args.num_real - shares.sum()
        self.counts = shares
        by_class = [single[rows.labels[single] == label] for label in range(len(shares))]
        self.real = np.concatenate([by_class[label][:count] for label, count in enumerate(shares)])
        self.more = np.concatenate([by_class[label][count : 2 * count] for label, count in enumerate(shares)])
        assert len(self.real) == len(self.more) == args.num_real, self.name


def cells(rows: Examples, args: argparse.Namespace) -> Iterator[Cell]:
    """All cells, repeat by repeat."""
    for repeat in range(args.repeats):
        for fold in range(args.folds):
            yield Cell(rows, args, repeat, fold)


def added_images(
    arm: str, rows: Examples, cell: Cell, synthetic: Examples | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels that an arm adds to the real rows."""
    real = rows.take(cell.real)
    if arm == "strong_augmentation":
        return _augmented(real, cell)
    if arm == "copy_paste":
        made = CopyPaste().make(real, cell.counts, seed=cell.repeat * 100 + cell.fold)
        return made.images, made.labels
    if arm == "oracle":
        return rows.images[cell.more], rows.labels[cell.more]
    assert synthetic is not None
    times = 2 if arm == "synthetic_2x" else 1
    made = first_of_each_class(synthetic, times * cell.counts, arm)
    if arm == "shuffled_labels":
        made = shuffled(made, "labels", cell.repeat * 100 + cell.fold)
    return made.images, made.labels


def _augmented(real: Examples, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from factory.predictors.augmentation import Augmentation

    strong = Augmentation(kind="strong")
    pixels = [
        strong.apply(torch.from_numpy(real.images), None, f"{cell.name}/version {version}")[0].numpy()
        for version in range(AUGMENTED_VERSIONS)
    ]
    return np.concatenate(pixels), np.tile(real.labels, AUGMENTED_VERSIONS)


def score_cell(
    args: argparse.Namespace,
    rows: Examples,
    features: np.ndarray,
    cell: Cell,
    arm: str,
    synthetic: Examples | None,
) -> np.ndarray:
    """Probability of the second class of each test row."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = features[cell.real], rows.labels[cell.real]
    if arm != "real":
        images, labels = added_images(arm, rows, cell, synthetic)
        x = np.concatenate([x, frozen_features(args.weights, images)])
        y = np.concatenate([y, labels])
    head = make_pipeline(StandardScaler(), LogisticRegression(C=args.c, max_iter=2000)).fit(x, y)
    return head.predict_proba(features[cell.test])[:, 1]


def make_synthetic(args: argparse.Namespace, rows: Examples, cell: Cell, folder: Path) -> Examples:
    """Images of a generator that was trained on exactly the cell's real rows, by the factory's own verbs."""
    from factory.evaluation.data import plan_ids, read_synthetic
    from factory.evaluation.leakage import check_real_budget, generator_records, rows_digest
    from factory.storage import open_table, real_rows, write_table
    from jobs import synthesize, train

    names = tuple(args.classes)
    real_uri, out = str(folder / "real.lance"), str(folder / "synthetic.lance")
    if not Path(real_uri).exists():
        import pyarrow as pa

        everything = real_rows(args.real, splits=SPLITS, access=access_of(PROGRAM))
        chosen = {rows.ids[row] for row in cell.real}
        only = [
            row | {"split": "train", "label": names.index(row["label_name"])}
            for row in everything.to_pylist()
            if row["image_id"] in chosen
        ]
        table = open_table(args.real)
        metadata = {**table.metadata, "class_names": json.dumps(names)}
        write_table(
            real_uri, pa.Table.from_pylist(only, schema=table.schema), table.schema, metadata=metadata
        )
    generator = str(folder / "generator")
    train.run(
        train.Args(recipe="tiny", real=real_uri, out=generator, max_steps=args.generator_steps, num_workers=0)
    )
    wanted = dict(zip(names, (4 * cell.counts).tolist()))  # the gate may take more than half of one class
    synthesize.run(
        synthesize.Args(
            recipe="tiny",
            generator=generator,
            real=real_uri,
            out=out,
            labels=",".join(f"{name}={count}" for name, count in wanted.items()),
        )
    )
    check_real_budget(
        out, generator_records(open_table(out), plan_ids(out)), rows_digest(rows.take(cell.real))
    )
    return read_synthetic(out, size=args.size, channels=3, class_names=names)


def collect(args: argparse.Namespace, rows: Examples) -> dict[str, dict[str, np.ndarray]]:
    """Test scores by cell and arm."""
    out = Path(args.out)
    features = cached_scores(
        out / f"features-{args.size}px-{rows.digest()}.npy",
        lambda: frozen_features(args.weights, rows.images),
    )
    scores: dict[str, dict[str, np.ndarray]] = {}
    key = f"n{args.num_real}-{args.size}px-c{args.c:g}"
    for number, cell in enumerate(cells(rows, args)):
        has_generator = number < args.generator_cells
        arms = PLAIN_ARMS + (GENERATED_ARMS if has_generator else ())
        folder = out / key / cell.name
        made_by = folder / f"tiny-{args.generator_steps}steps"
        made_by.mkdir(parents=True, exist_ok=True)
        paths = {arm: (made_by if arm in GENERATED_ARMS else folder) / f"{arm}.npy" for arm in arms}
        synthetic = None
        if has_generator and not all(path.exists() for path in paths.values()):
            started = time.perf_counter()
            synthetic = make_synthetic(args, rows, cell, made_by)
            print(f"{cell.name}: generator and images {time.perf_counter() - started:.0f} s", flush=True)
        scores[cell.name] = {
            arm: cached_scores(
                path, functools.partial(score_cell, args, rows, features, cell, arm, synthetic)
            )
            for arm, path in paths.items()
        }
    return scores


def compare(
    args: argparse.Namespace, rows: Examples, scores: dict[str, dict[str, np.ndarray]], arms: tuple[str, ...]
) -> dict[str, Any]:
    """Mean AUC over the cells that have all arms, and each arm's difference to `real` with its interval."""
    chosen = [cell for cell in cells(rows, args) if set(arms) <= set(scores[cell.name])]
    groups = np.asarray(rows.groups)
    repeats = sorted({cell.repeat for cell in chosen})

    def auc_of(arm: str, cell: Cell, counts: np.ndarray) -> float:
        drawn = np.repeat(np.arange(len(cell.test)), counts[cell.test])
        return binary_auc(rows.labels[cell.test][drawn], scores[cell.name][arm][drawn])

    def mean_auc(arm: str, repeat: int, drawn: np.ndarray) -> float:
        counts = np.bincount(drawn, minlength=len(rows))
        return float(
            np.mean([auc_of(arm, cell, counts) for cell in chosen if cell.repeat == repeats[repeat]])
        )

    # Rows outside the cells' folds do not judge and would only be drawn in vain.
    tested = np.unique(np.concatenate([cell.test for cell in chosen]))
    ones = np.ones(len(rows), np.int64)
    by_cell = {arm: np.array([auc_of(arm, cell, ones) for cell in chosen]) for arm in arms}
    results: dict[str, Any] = {"cells": len(chosen), "repeats": len(repeats), "arms": {}}
    p_values = []
    for arm in arms:
        entry: dict[str, Any] = {
            "auc_mean": float(by_cell[arm].mean()),
            "auc_std_of_cells": float(by_cell[arm].std(ddof=1)),
        }
        if arm != "real":

            def gain(repeat: int, drawn: np.ndarray, arm: str = arm) -> float:
                return mean_auc(arm, repeat, tested[drawn]) - mean_auc("real", repeat, tested[drawn])

            interval = statistics.hierarchical_bootstrap(
                gain,
                groups[tested],
                num_generator_seeds=len(repeats),
                strata=rows.labels[tested],
                num_resamples=args.resamples,
            )
            differences = by_cell[arm] - by_cell["real"]
            test = statistics.sign_flip_test(differences)
            p_values.append(test.p_value)
            entry |= {
                "difference": float(differences.mean()),
                "low": interval.low,
                "high": interval.high,
                "p_value_over_cells": test.p_value,
                "minimum_detectable_effect": selection.minimum_detectable_effect(interval.standard_error),
                "cells_better": int((differences > 0).sum()),
                "oracle_fraction": selection.oracle_fraction(
                    float(by_cell["real"].mean()), float(by_cell[arm].mean()), float(by_cell["oracle"].mean())
                ),
            }
        results["arms"][arm] = entry
    for arm, adjusted in zip([arm for arm in arms if arm != "real"], selection.holm(p_values)):
        results["arms"][arm]["p_value_holm"] = float(adjusted)
    return results


def tell(title: str, results: dict[str, Any]) -> None:
    print(f"{title}: {results['cells']} cells")
    for arm, entry in results["arms"].items():
        text = f"  {arm:<20} AUC {entry['auc_mean']:.3f} (SD of cells {entry['auc_std_of_cells']:.3f})"
        if "difference" in entry:
            text += (
                f"  {entry['difference']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}], Holm p "
                f"{entry['p_value_holm']:.3f}, detectable {entry['minimum_detectable_effect']:.3f}"
            )
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("real", help="real table")
    parser.add_argument("--weights", required=True, help="MobileNetV2's safetensors file")
    parser.add_argument("--out", required=True, help="folder of finished cells and generators")
    parser.add_argument("--classes", nargs=2, default=["benign", "malignant"])
    parser.add_argument("--name", default="busi", help="dataset, for the name of the result")
    parser.add_argument("--num-real", type=int, default=40)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--c", type=float, default=1.0, help="inverse strength of the head's ridge penalty")
    parser.add_argument("--generator-cells", type=int, default=0, help="cells with a generator of their own")
    parser.add_argument("--generator-steps", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--plot", help="PNG of the differences")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows = read_two_classes(args.real, size=args.size, channels=3, names=tuple(args.classes), program=PROGRAM)
    scores = collect(args, rows)
    results = {"all_cells": compare(args, rows, scores, PLAIN_ARMS)}
    tell("without a generator", results["all_cells"])
    if args.generator_cells:
        results["cells_with_generator"] = compare(args, rows, scores, PLAIN_ARMS + GENERATED_ARMS)
        tell("with a generator of the same 40 images", results["cells_with_generator"])
    if args.plot:
        lines = []
        for title, part in results.items():
            cells_told = f"({part['cells']} cells)"
            lines += [
                (f"{arm.replace('_', ' ')} {cells_told}", entry["difference"], entry["low"], entry["high"])
                for arm, entry in part["arms"].items()
                if "difference" in entry and (title == "all_cells" or arm in (*GENERATED_ARMS, "oracle"))
            ]
        forest_plot(args.plot, f"AUC minus that of {args.num_real} real images alone", lines)
    settings = {k: v for k, v in vars(args).items() if k not in ("real", "out", "weights", "name", "plot")}
    path = save("busi_probe", {"width": args.name, **settings}, results, "cpu")
    print(f"wrote {path} ({time.perf_counter() - started:.0f} s in this run)")


if __name__ == "__main__":
    main()
