"""What the benchmarks share: interleaved timing, peak memory, and one JSON per claim."""

import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "pylance", "faiss-cpu")


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """Wall seconds of one call, the GPU's queue emptied before and after."""
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each candidate, in turn A B A B …, after one warm-up each, so that drift hits all alike."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(seconds_of(run, device))
    return times


def median(times: list[float]) -> float:
    """The median: shared machines have slow outliers."""
    return statistics.median(times)


def peak_memory_mb(device: str) -> float:
    """Peak of the GPU's allocations, or of this process's resident memory on a CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def save(name: str, settings: Mapping[str, Any], results: Mapping[str, Any], device: str) -> Path:
    """Write benchmarks/results/NAME-DEVICE.json with commit, device and versions."""
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    report = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "device": _device_name(device),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "settings": dict(settings),
        "results": dict(results),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{settings.get('width', 'tiny')}-{device.split(':')[0]}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
