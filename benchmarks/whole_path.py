"""From a folder of images to a verdict on the held-out split, by the factory's own verbs, each timed.

    python benchmarks/whole_path.py Dataset_BUSI_with_GT --weights mobilenetv2_100_imagenet.safetensors --out runs/whole_path

prepare (160 training images, the others are the oracle's reserve), train recipe `tiny` on exactly those, synthesize,
curate, evaluate images, explore ratio (a fine-tuned MobileNetV2), then the test split twice, each declared: the class
with that network, the lesion mask with a small U-Net; at last one report. Where the search chooses real data only, ratio
1 is judged all the same, and the result says so. The test split is opened for the mask with `--again`, which is recorded: it
is another task, and nothing was chosen by the first opening.

Every verb goes on where it stopped when the command is run again; what is done is not done twice. The seconds of finished
steps are kept in --out/seconds.json. The peer of everything is the arm of real images alone, in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import save

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "mobilenetv2_100?pad_type=same&mean=0.5&std=0.5"


class Steps:
    """The steps of one folder: each runs once to its end."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds_file = out / "seconds.json"
        self.seconds: dict[str, float] = (
            json.loads(self.seconds_file.read_text()) if self.seconds_file.exists() else {}
        )

    def run(self, name: str, *argv: str | Path) -> None:
        """One verb; its output goes to NAME.log.

        Raises:
            SystemExit: it failed.
        """
        if name in self.seconds:
            print(f"{name}: done before", flush=True)
            return
        print(f"{name}: factory {' '.join(map(str, argv))}", flush=True)
        started = time.perf_counter()
        with (self.out / f"{name}.log").open("a") as log:
            done = subprocess.run(
                [sys.executable, "-m", "jobs.cli", *map(str, argv)],
                cwd=ROOT,
                env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{self.out}/mlflow.db"},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}: see {log.name}; run the same command to go on")
        self.seconds[name] = time.perf_counter() - started
        self.seconds_file.write_text(json.dumps(self.seconds, indent=1))
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All steps; what the searches and the openings found."""
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = Steps(out)
    real, generator, synthetic = out / "real.lance", out / "generator", out / "synthetic.lance"
    steps.run("prepare", "prepare", args.layout, args.raw, "--num-train", args.num_train, "--out", real)
    steps.run(
        "train", "train", "--recipe", "tiny", "--real", real, "--out", generator,
        "--max-steps", args.generator_steps, "--num-workers", 0,
    )  # fmt: skip
    steps.run(
        "synthesize", "synthesize", "--recipe", "tiny", "--generator", generator, "--real", real,
        "--labels", args.labels, "--out", synthetic,
    )  # fmt: skip
    steps.run("curate", "curate", synthetic, "--real", real)
    steps.run("images", "evaluate", "images", synthetic, "--real", real, "--out", out / "images")
    network = ("--model", NETWORK, "--weights", Path(args.weights).resolve())
    training = (
        "--size", args.size, "--num-steps", args.steps, "--learning-rate", 3e-4, "--validate-every", args.steps // 5,
    )  # fmt: skip
    steps.run(
        "ratio", "explore", "ratio", "--real", real, "--synthetic", synthetic, "--task", "classification", *network,
        *training, "--ratios", args.ratios, "--folds", 3, "--seeds", args.seeds, "--out", out / "ratio",
    )  # fmt: skip
    chosen = json.loads((out / "ratio" / "results.json").read_text())["chosen"]
    primary = ("--search", out / "ratio") if chosen["name"] != "real" else ("--ratio", 1)
    steps.run(
        "classification", "evaluate", "downstream", "--real", real, "--synthetic", synthetic,
        "--task", "classification", *network, *training, *primary, "--seeds", args.seeds,
        "--reason", "primary comparison of the class", "--out", out / "classification",
    )  # fmt: skip
    steps.run(
        "segmentation", "evaluate", "downstream", "--real", real, "--synthetic", synthetic,
        "--task", "segmentation", "--model", "unet?width=8", "--size", 64, "--num-steps", args.mask_steps, "--validate-every", args.mask_steps // 5,
        "--ratio", 1, "--seeds", args.seeds, "--again", "--reason", "another task: the lesion mask",
        "--out", out / "segmentation",
    )  # fmt: skip
    steps.run(
        "report", "evaluate", "report", *(out / name for name in ("images", "ratio", "classification", "segmentation")),
        "--out", out / "report",
    )  # fmt: skip
    found: dict[str, Any] = {
        "minutes": sum(steps.seconds.values()) / 60,
        "seconds": steps.seconds,
        "chosen": chosen,
    }
    for task in ("classification", "segmentation"):
        record = json.loads((out / task / "results.json").read_text())
        judged = {
            part["name"]: {name: part[name] for name in ("comparison", "intervals")}
            for part in record["evaluations"]
        }
        found[task] = {"primary": record["primary"], "judged": judged}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", help="folder of the dataset")
    parser.add_argument("--weights", required=True, help="MobileNetV2's safetensors file")
    parser.add_argument("--out", required=True, help="folder of everything")
    parser.add_argument("--layout", default="busi")
    parser.add_argument("--num-train", type=int, default=160)
    parser.add_argument("--generator-steps", type=int, default=700)
    parser.add_argument("--labels", default="benign=360,malignant=180,normal=120")
    parser.add_argument("--ratios", default="0,0.5,1,2")
    parser.add_argument("--size", type=int, default=96, help="px, of the class")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps for the class")
    parser.add_argument("--mask-steps", type=int, default=300, help="optimizer steps for the mask")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    found = run(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("raw", "weights", "out")}
    print(json.dumps(found, indent=1))
    print("wrote", save("whole_path", {"width": args.layout, **settings}, found, "cpu"))


if __name__ == "__main__":
    main()
