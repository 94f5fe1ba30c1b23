"""Does a generator trained on 100 lesions help a segmenter trained on the same 100? One GPU, two calls of ten minutes.

    python benchmarks/gpu_gain.py rows --real real.lance --out runs/gpu_gain        # where the table is; once
    python benchmarks/gpu_gain.py generator --out runs/gpu_gain --device cuda       # again until it says it is done
    python benchmarks/gpu_gain.py judge --out runs/gpu_gain --device cuda --workers 6

`rows` deals the lesion images of a table by near-duplicate group: 100 train (half of each class), 60 stop training
early, 100 more are the oracle's, all others judge, at least 250; plain npz files. Without --real they are phantoms.
`generator` trains a pixel-space grey U-Net (no autoencoder to confound) on the 100, conditioned on mask and class:
v-prediction, min-SNR weights, moving average, bfloat16 on a GPU; then draws 1,000 images by DDIM under deformed
training masks. `judge` trains a U-Net of 3 M parameters for the same number of steps in every arm and seed, scores each
test image at native size, counts near-copies of training images, and writes benchmarks/results.

The last two import neither Ray nor Lance: torch, diffusers, monai, numpy, scipy, scikit-image, pillow and pyarrow are
enough. Each stops by itself after --minutes, says what is missing, and goes on from its files when run again. One
generator seed makes a pilot, and the table says so. The primary comparison is declared by --primary.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_generator import UNFINISHED, make_generator, synthetic_paths

if TYPE_CHECKING:
    from factory.evaluation.downstream import ArmRun
    from factory.predictors.examples import Examples

PARTS = ("real", "validation", "reserve", "test")


# ------------------------------------------------------------------------------------------ rows


def make_rows(args: argparse.Namespace) -> None:
    """The four sets as npz below --out."""
    from factory.predictors.examples import save_npz

    everything = _table_rows(args) if args.real else _phantom_rows(args)
    dealt = deal(everything, args.num_real // 2, args.num_validation // 2, args.seed)
    if len(dealt["test"]) < args.num_test:
        raise SystemExit(
            f"{len(dealt['test'])} images are left to judge, --num-test asks for {args.num_test}"
        )
    for name, rows in dealt.items():
        path = save_npz(rows, Path(args.out) / f"{name}.npz")
        print(
            f"{path}: {dict(zip(rows.class_names, rows.counts().tolist()))}, {len(set(rows.groups))} groups"
        )


def _table_rows(args: argparse.Namespace) -> "Examples":
    """Every image with a lesion, whatever its split: the table records that its test rows were read."""
    from leak_demo import access_of

    from factory.evaluation.data import read_real
    from schemas.sample import SPLITS

    access = access_of("benchmarks/gpu_gain.py")
    rows = read_real(args.real, SPLITS, size=args.size, channels=1, native=True, access=access)
    assert rows.native is not None
    return _with_lesions(rows, [truth.mask is not None and bool(truth.mask.any()) for truth in rows.native])


def _phantom_rows(args: argparse.Namespace) -> "Examples":
    from predictors import phantoms

    from factory.imaging import Letterbox
    from factory.predictors.examples import NativeTruth

    rows = phantoms(4 * (args.num_real + args.num_validation) + 2 * args.num_test, args.size, 0)
    box = Letterbox(height=args.size, width=args.size, size=args.size)
    native = tuple(NativeTruth(letterbox=box, mask=mask) for mask in rows.masks)
    return _with_lesions(dataclasses.replace(rows, native=native), rows.masks.any(axis=(1, 2)))


def _with_lesions(rows: "Examples", has_lesion: Sequence[bool] | np.ndarray) -> "Examples":
    """Rows with a lesion, and a class table of the classes that have one."""
    kept = rows.take(np.asarray(has_lesion, bool))
    there = np.flatnonzero(kept.counts())
    return dataclasses.replace(
        kept,
        labels=np.searchsorted(there, kept.labels).astype(np.int64),
        class_names=tuple(kept.class_names[label] for label in there),
    )


def deal(rows: "Examples", num_real: int, num_validation: int, seed: int) -> "dict[str, Examples]":
    """Whole groups, in an order drawn from `seed`, to the parts in turn until each class has its number.

    Args:
        num_real, num_validation: images of each class; reserve gets as many as real. What a group has too many is left
            out altogether.

    Raises:
        SystemExit: a class has too few images.
    """
    from schemas.identity import random_generator

    groups = np.asarray(rows.groups)
    names = random_generator(f"gpu gain/{seed}", "groups").permutation(np.unique(groups))
    wanted = {"real": num_real, "validation": num_validation, "reserve": num_real}
    have = {name: np.zeros(rows.num_classes, np.int64) for name in wanted}
    chosen: dict[str, list[int]] = {name: [] for name in PARTS}
    for group in names:
        members = np.flatnonzero(groups == group)
        label = int(rows.labels[members[0]])
        part = next((name for name, count in wanted.items() if have[name][label] < count), "test")
        for row in members.tolist():
            if part == "test":
                chosen[part].append(row)
            elif have[part][rows.labels[row]] < wanted[part]:
                have[part][rows.labels[row]] += 1
                chosen[part].append(row)
    short = {name: counts.tolist() for name, counts in have.items() if (counts < wanted[name]).any()}
    if short:
        raise SystemExit(f"{rows.counts().tolist()} images of the classes are too few: {short} of {wanted}")
    return {name: rows.take(found) for name, found in chosen.items()}


def load_rows(args: argparse.Namespace, *names: str) -> "list[Examples]":
    """Sets that `rows` made."""
    from factory.predictors.examples import load_npz

    return [load_npz(Path(args.out) / f"{name}.npz") for name in names]


# ------------------------------------------------------------------------------------------ judge


def make_judgement(args: argparse.Namespace, stop_at: float) -> int:
    """Train what is missing of every arm and seed; once all are there, compare and write the result."""
    from measure import save

    from factory.evaluation.arms import Arm
    from factory.evaluation.comparison import compare
    from factory.evaluation.downstream import plan_runs, run_arms
    from factory.predictors.examples import concatenate, load_npz
    from factory.predictors.segmenters import Segmenter
    from factory.predictors.settings import FitSettings

    real, validation, reserve, test = load_rows(args, *PARTS)
    synthetic = concatenate(*(load_npz(path) for path in synthetic_paths(args)))
    arms = (
        Arm(kind="real"), Arm(kind="strong_augmentation"), Arm(kind="copy_paste"), Arm(kind="synthetic", ratio=1),
        Arm(kind="synthetic", ratio=4), Arm(kind="shuffled_masks"), Arm(kind="oracle"),
    )  # fmt: skip
    settings = FitSettings(
        num_steps=args.judge_steps, batch_size=args.judge_batch, validate_every=max(1, args.judge_steps // 10),
        precision="bfloat16" if args.device.startswith("cuda") else "float32",
    )  # fmt: skip
    planned = plan_runs(arms, [args.seed], range(args.seeds))
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        print(f"judge: {done} of {len(planned)} trainings", flush=True)

    scores = run_arms(
        arms, real, reserve, {args.seed: synthetic}, test, Segmenter(width=args.judge_width), settings,
        range(args.seeds), out=Path(args.out) / "runs", validation=validation, device=args.device,
        executor=executor_until(stop_at, args.workers), progress=progress,
    )  # fmt: skip
    if len(scores.values) < len(planned):
        print("judge: trainings are missing; run this part again")
        return UNFINISHED
    table = compare(scores, primary=args.primary, num_resamples=args.resamples)
    print("\n".join(table.lines()))
    results = {"comparison": table.as_json(), "near_copies": near_copies(args, real, reserve, synthetic)}
    print(f"near-copies of training images: {results['near_copies']}")
    loaded = [name for name in ("ray", "lance") if sys.modules.get(name) is not None]
    assert not loaded, f"a GPU machine has no {loaded}"
    settings_told = {k: v for k, v in vars(args).items() if k not in ("real", "out", "part", "name")}
    path = save("gpu_gain", {"width": args.name, **settings_told}, results, args.device)
    shutil.copy(path, Path(args.out) / "result.json")
    print(f"wrote {path}, and {Path(args.out) / 'result.json'}")
    return 0


def executor_until(
    stop_at: float, workers: int
) -> "Callable[[Callable[[ArmRun], dict[str, Any]], Sequence[ArmRun]], Iterator[dict[str, Any]]]":
    """A map over trainings, in `workers` processes (0: in this one), that starts none it cannot end in time."""

    def run(work: "Callable[[ArmRun], dict[str, Any]]", runs: "Sequence[ArmRun]") -> Iterator[dict[str, Any]]:
        waiting, longest = list(runs), 0.0
        if not workers:
            while waiting and time.perf_counter() + longest < stop_at:
                begin = time.perf_counter()
                yield work(waiting.pop(0))
                longest = max(longest, time.perf_counter() - begin)
            return
        started: dict[Any, float] = {}
        with ProcessPoolExecutor(workers, get_context("spawn"), _keep, (work,)) as pool:
            while waiting or started:
                while waiting and len(started) < workers and time.perf_counter() + longest < stop_at:
                    started[pool.submit(_kept, waiting.pop(0))] = time.perf_counter()
                if not started:
                    return
                for future in wait(started, return_when=FIRST_COMPLETED).done:
                    longest = max(longest, time.perf_counter() - started.pop(future))
                    yield future.result()

    return run


_work: "list[Callable[[ArmRun], dict[str, Any]]]" = []


def _keep(work: "Callable[[ArmRun], dict[str, Any]]") -> None:
    """In a worker: the rows travel once, not with each training."""
    import torch

    torch.set_num_threads(1)
    _work.append(work)


def _kept(run: "ArmRun") -> dict[str, Any]:
    return _work[-1](run)


def near_copies(
    args: argparse.Namespace, real: "Examples", reserve: "Examples", synthetic: "Examples"
) -> dict[str, Any]:
    """Share of images whose registered crop is that of a training image; real images of other groups beside."""
    from factory.curation.crops import thumbnails_of
    from factory.curation.memorisation import CopyTest

    source = CopyTest(side=min(96, args.size))

    def frames_of(rows: "Examples") -> list[Any]:
        assert rows.masks is not None
        return [source.frame(rows.images[k, ..., 0], rows.masks[k]) for k in range(len(rows))]

    frames = frames_of(real)
    # Thumbnails stand for embeddings: they only say which training images are registered.
    fitted = source.fit(frames, thumbnails_of(frames), real.groups, num_threads=args.copy_threads)
    found: dict[str, Any] = {"thresholds": {str(k): float(v) for k, v in fitted.thresholds.items()}}
    for name, rows in (("synthetic", synthetic.take(slice(0, args.copies))), ("other patients", reserve)):
        ready = frames_of(rows)
        matches = [fitted.match(f, t) for f, t in zip(ready, thumbnails_of(ready))]
        found[name] = {"images": len(rows), "copies": sum(match.is_copy for match in matches)}
    return found


# ------------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments; the defaults are the experiment's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("rows", "generator", "judge"))
    parser.add_argument("--out", required=True, help="folder of the rows and of all state")
    parser.add_argument("--real", help="real table, for the part `rows`; phantoms without")
    parser.add_argument("--name", default="busi", help="dataset, for the name of the result")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which a part stops by itself")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the deal, the generator and its images")
    parser.add_argument("--num-real", type=int, default=100)
    parser.add_argument("--num-validation", type=int, default=60)
    parser.add_argument("--num-test", type=int, default=250, help="at least")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256, 256])
    parser.add_argument("--generator-steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--num-synthetic", type=int, default=1000)
    parser.add_argument("--sample-batch", type=int, default=250)
    parser.add_argument("--inference-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.75)
    parser.add_argument("--judge-width", type=int, default=40, help="40 channels are 3 M parameters")
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--judge-batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5, help="task seeds of each arm")
    parser.add_argument(
        "--workers", type=int, default=0, help="trainings at once, each in a process; 0: here"
    )
    parser.add_argument("--primary", default="synthetic 4×", help="arm whose comparison is primary")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--copies", type=int, default=400, help="synthetic images searched for near-copies")
    parser.add_argument("--copy-threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """One part; 0 when it is done, 3 when it wants to be run again."""
    args = parse(argv)
    stop_at = time.perf_counter() + 60 * args.minutes
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.part == "rows":
        make_rows(args)
        return 0
    if args.part == "judge":
        return make_judgement(args, stop_at)
    (real,) = load_rows(args, "real")
    return make_generator(args, real, stop_at)


if __name__ == "__main__":
    sys.exit(main())
