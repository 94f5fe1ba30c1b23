"""FID and KID against torchmetrics on the same features: values, and how long they take.

    python benchmarks/metrics_reference.py

torchmetrics is handed the features through an identity network. Its KID is a mean over random subsets; with one subset
of all rows it is the estimate over all pairs that the factory gives. The factory's FID takes the singular values of a
product of factors where torchmetrics takes the eigenvalues of the product of covariances, so it stays exact also where
there are fewer rows than features; torchmetrics' value there is reported beside the closed form for equal covariances.
"""

import argparse
import warnings
from functools import partial
from typing import Any

import numpy as np
from measure import interleaved, median, save
from threadpoolctl import threadpool_limits


def torchmetrics_fid(real: np.ndarray, synthetic: np.ndarray) -> float:
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=identity(real.shape[1]), input_img_size=(real.shape[1], 1, 1))
    metric.set_dtype(torch.float64)
    for values, is_real in ((real, True), (synthetic, False)):
        metric.update(torch.from_numpy(values)[:, :, None, None], real=is_real)
    return float(metric.compute())


def torchmetrics_kid(real: np.ndarray, synthetic: np.ndarray) -> float:
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=identity(real.shape[1]), subsets=1, subset_size=len(real))
    for values, is_real in ((real, True), (synthetic, False)):
        metric.update(torch.from_numpy(values)[:, :, None, None], real=is_real)
    return float(metric.compute()[0])


def identity(width: int) -> Any:
    """A network that hands on its input, of the form that torchmetrics asks for."""
    from torch import nn

    class Given(nn.Flatten):
        num_features = width

    return Given()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torchmetrics")
    import torch

    torch.set_num_threads(1)
    from factory.evaluation.image_metrics import frechet_distance, kernel_distance

    rng = np.random.default_rng(0)
    results = {}
    for name, rows in (("many rows", args.rows), ("fewer rows than features", args.width // 4)):
        real = rng.normal(0, 1, (rows, args.width))
        synthetic = rng.normal(0.1, 1.2, (rows, args.width))
        pairs = {
            "fid": (frechet_distance, torchmetrics_fid),
            "kid": (kernel_distance, torchmetrics_kid),
        }
        for metric, (ours, theirs) in pairs.items():
            seconds = interleaved(
                {
                    "factory": partial(ours, real, synthetic),
                    "torchmetrics": partial(theirs, real, synthetic),
                },
                args.rounds,
            )
            values = ours(real, synthetic), theirs(real, synthetic)
            results[f"{metric}, {name}"] = {
                "rows": rows,
                "factory": values[0],
                "torchmetrics": values[1],
                "relative_difference": abs(values[0] - values[1]) / abs(values[1]),
                "seconds": {k: median(v) for k, v in seconds.items()},
                "times_as_fast": median(seconds["torchmetrics"]) / median(seconds["factory"]),
            }
            print(metric, name, results[f"{metric}, {name}"])
    # A shift of one set: the Fréchet distance is the squared length of the shift, whatever the rank.
    few = rng.normal(0, 1, (args.width // 4, args.width))
    shift = np.full(args.width, 0.25)
    results["fid of a shift, fewer rows than features"] = {
        "closed_form": float(shift @ shift),
        "factory": frechet_distance(few, few + shift),
        "torchmetrics": torchmetrics_fid(few, few + shift),
    }
    print(results["fid of a shift, fewer rows than features"])
    print("wrote", save("metrics_reference", {**vars(args), "width": f"{args.width}d"}, results, "cpu"))


if __name__ == "__main__":
    with threadpool_limits(1):  # both sides get one thread
        main()
