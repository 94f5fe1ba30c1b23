"""Check this machine and say what to fix.

    factory doctor
    factory doctor --start-ray --json

Every line is ok, warn or fail, with what to do about it; a fail makes the exit status 1. Being offline is
reported, not failed: the demo needs no network.
"""

import dataclasses
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

DISTRIBUTION = "synthetic-data-factory"
SET_UP = "run `make setup` (it installs the pinned versions)"
MIN_DISK_GB, GOOD_DISK_GB = 1.0, 10.0
MIN_MEMORY_GB, GOOD_MEMORY_GB = 4.0, 8.0
MIN_SHARED_MEMORY_GB = 1.0
MIN_OPEN_FILES = 4096


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory doctor`."""

    json: bool = False
    """Print one JSON object instead of lines."""
    start_ray: bool = False
    """Also start a private Ray and run a task on it (about ten seconds)."""
    runs: str = "runs"
    """Folder that jobs write to."""
    timeout: float = 3.0
    """Seconds to wait for the model hub."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding: `fix` says what to do where the status is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """Whether anything stands in the way of running the factory."""
        return any(check.status == "fail" for check in self.checks)


def check_python() -> Iterator[Check]:
    """The interpreter against the distribution's own requirement."""
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    suits = version in SpecifierSet(wanted)
    yield Check(
        name="python",
        status="ok" if suits else "fail",
        detail=f"{version} (wanted {wanted}) at {sys.prefix}",
        fix="" if suits else "make the environment again: make PYTHON=python3.11 setup",
    )


def check_packages() -> Iterator[Check]:
    """Every required package: present, and in the range that the installed distribution asks for."""
    from packaging.requirements import Requirement

    wrong, present = [], 0
    for text in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        present += 1
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    own = metadata.version(DISTRIBUTION)
    if wrong:
        yield Check(name="packages", status="fail", detail="; ".join(wrong), fix=SET_UP)
    else:
        yield Check(name="packages", status="ok", detail=f"{present} in their ranges, {DISTRIBUTION} {own}")


def check_faiss_distribution() -> Iterator[Check]:
    """Exactly one of faiss-cpu and faiss-gpu: they install into the same folder."""
    found = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(found) == 1:
        yield Check(name="faiss package", status="ok", detail=found[0])
    else:
        detail = (
            f"both {' and '.join(found)} are installed in one folder" if found else "neither is installed"
        )
        fix = "remove the environment and run `make setup`, or install one of the extras cpu and gpu"
        yield Check(name="faiss package", status="fail", detail=detail, fix=fix)


def check_torch() -> Iterator[Check]:
    """torch and torchvision of the same build: a `+cpu` torch beside PyPI's torchvision breaks both."""
    import torch

    yield from torch_build(
        torch.__version__, metadata.version("torch"), metadata.requires("torchvision") or ()
    )
    try:
        import torchvision

        torch.ops.torchvision.nms  # noqa: B018 - resolving the operator is the check
    except (ImportError, RuntimeError, AttributeError) as error:
        yield Check(
            name="torchvision",
            status="fail",
            detail=f"does not load beside torch {torch.__version__}: {error}",
            fix=f"torch and torchvision are of different builds; {SET_UP}, ordinary PyPI wheels of both",
        )
    else:
        yield Check(name="torchvision", status="ok", detail=f"{torchvision.__version__}, its operators load")


def torch_build(loaded: str, installed: str, torchvision_requires: Sequence[str]) -> Iterator[Check]:
    """Whether torch is the version that torchvision was built for, and an ordinary build.

    Args:
        loaded: `torch.__version__`, with its build tag.
        installed: version in torch's installed metadata.
        torchvision_requires: requirements in torchvision's installed metadata.
    """
    from packaging.requirements import Requirement
    from packaging.version import Version

    wanted = [r for r in map(Requirement, torchvision_requires) if r.name == "torch"]
    fix = f"{SET_UP}: torch and torchvision must be the matching ordinary PyPI builds"
    wrong = [r for r in wanted if not r.specifier.contains(Version(loaded).public, prereleases=True)]
    if wrong:
        detail = f"torchvision wants {wrong[0]}, but torch is {loaded}"
        yield Check(name="torch", status="fail", detail=detail, fix=fix)
    elif Version(installed).local == "cpu":
        detail = f"{installed} is a CPU-only wheel from another index than torchvision's"
        yield Check(name="torch", status="warn", detail=detail, fix=fix)
    else:
        yield Check(name="torch", status="ok", detail=f"{loaded}, as torchvision wants")


def check_gpus() -> Iterator[Check]:
    """GPUs that torch and faiss see; none is fine for the demo."""
    import faiss
    import torch

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            names.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        detail = f"{', '.join(names)}; {bf16}, CUDA {torch.version.cuda}"
        yield Check(name="GPU in torch", status="ok", detail=detail)
    elif shutil.which("nvidia-smi"):
        detail = "nvidia-smi is here, but torch sees no GPU"
        fix = "check the driver with `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that torch is not a +cpu build"
        yield Check(name="GPU in torch", status="warn", detail=detail, fix=fix)
    else:
        yield Check(name="GPU in torch", status="ok", detail="none; everything runs on the CPU")
    num_faiss = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if torch.cuda.is_available() and not num_faiss:
        yield Check(
            name="GPU in faiss",
            status="warn",
            detail="none, though torch sees one: near-duplicates are searched on the CPU",
            fix="install requirements/gpu.txt into an environment of its own (faiss-gpu in place of faiss-cpu)",
        )
    else:
        yield Check(name="GPU in faiss", status="ok", detail=str(num_faiss) if num_faiss else "none")


def check_ray(start: bool) -> Iterator[Check]:
    """Ray imports; with `start`, a private Ray starts and runs a task."""
    import ray

    if not start:
        yield Check(name="ray", status="ok", detail=f"{ray.__version__} (--start-ray also starts one)")
        return
    from jobs.cluster import start_ray

    def worker_pid() -> int:
        return os.getpid()

    with start_ray() as handle:
        is_remote = ray.get(ray.remote(worker_pid).remote(), timeout=120) != os.getpid()
        how = "joined" if handle.joined else f"started in {handle.seconds:.1f} s"
        detail = f"{ray.__version__} {how}: {handle.num_cpus:g} CPUs, {handle.num_gpus:g} GPUs, a task ran"
        yield Check(name="ray", status="ok" if is_remote else "fail", detail=detail)


def check_machine() -> Iterator[Check]:
    """Cores, memory, shared memory and open files."""
    cores = len(os.sched_getaffinity(0))
    fix = "" if cores > 1 else "give the container two cores: one runs a model while the other feeds it"
    yield Check(name="cores", status="ok" if cores > 1 else "warn", detail=str(cores), fix=fix)
    memory = memory_gigabytes()
    status: Literal["ok", "warn", "fail"] = "ok" if memory >= GOOD_MEMORY_GB else "warn"
    if memory < MIN_MEMORY_GB:
        status = "fail"
    fix = "" if status == "ok" else f"{GOOD_MEMORY_GB:g} GB are comfortable; `--num-cpus 1` needs less"
    yield Check(name="memory", status=status, detail=f"{memory:.1f} GB", fix=fix)
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free / 1e9
        is_enough = shared >= MIN_SHARED_MEMORY_GB
        fix = "" if is_enough else "Ray keeps its objects there: start the container with --shm-size=2g"
        detail = f"{shared:.1f} GB free in /dev/shm"
        yield Check(name="shared memory", status="ok" if is_enough else "warn", detail=detail, fix=fix)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    fix = "" if is_enough else "Ray on many cores opens many files: `ulimit -n 65536`"
    yield Check(name="open files", status="ok" if is_enough else "warn", detail=str(soft), fix=fix)


def memory_gigabytes() -> float:
    """Memory of the machine or of the container's limit, whichever is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total / 1e9


def check_runs(folder: str) -> Iterator[Check]:
    """The folder that jobs write to: writable, on a disk with room."""
    path = Path(folder).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as stream:
            stream.write(b"x")
    except OSError as error:
        fix = "run from a folder you may write to, or give `--runs FOLDER`"
        yield Check(name="runs folder", status="fail", detail=f"{path}: {error.strerror or error}", fix=fix)
        return
    yield Check(name="runs folder", status="ok", detail=f"{path} is writable")
    free = shutil.disk_usage(path).free / 1e9
    status: Literal["ok", "warn", "fail"] = "ok" if free >= GOOD_DISK_GB else "warn"
    if free < MIN_DISK_GB:
        status = "fail"
    fix = "" if status == "ok" else "free some space: a full disk stops a job (what is committed stays)"
    yield Check(name="disk", status=status, detail=f"{free:.1f} GB free", fix=fix)


def check_tracking() -> Iterator[Check]:
    """The MLflow store is opened as a job would open it; a new sqlite store is made on the way."""
    from factory import tracking

    uri = tracking.check_store()
    seconds = tracking.warm_up()
    yield Check(name="mlflow store", status="ok", detail=f"{uri} (opened in {seconds:.1f} s)")


def check_hub(timeout: float) -> Iterator[Check]:
    """Whether hub models could be fetched. Offline is a fact, not a fault."""
    needs = "recipes on hub models need local folders (`--generator.base FOLDER`); `tiny` brings its own"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Check(name="model hub", status="ok", detail=f"off by HF_HUB_OFFLINE: {needs}")
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = urllib.parse.urlsplit(endpoint).hostname
    request = urllib.request.Request(endpoint, method="HEAD")
    started = time.perf_counter()
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError as error:
        yield Check(name="model hub", status="ok", detail=f"{host} answers ({error.code})")
    except (OSError, ValueError) as error:
        yield Check(name="model hub", status="warn", detail=f"{host} is not reachable: {error}", fix=needs)
    else:
        yield Check(
            name="model hub", status="ok", detail=f"{host} answers in {time.perf_counter() - started:.1f} s"
        )


def check_assets() -> Iterator[Check]:
    """The base and the embedder that ship: all files there, weights whole, and their digests."""
    from factory.generators.latent_diffusion import TINY_BASE

    yield from shipped_weights("tiny base", TINY_BASE)
    yield from shipped_weights("tiny embedder", TINY_BASE.parent / "embedder")


def shipped_weights(name: str, folder: Path) -> Iterator[Check]:
    """Whether every weights file of a folder is whole; its digest where it is."""
    from safetensors import SafetensorError, safe_open

    from schemas.identity import digest_files

    weights = sorted(folder.rglob("*.safetensors"))
    fix = "the checkout or the installation is incomplete: get it again"
    if not weights:
        yield Check(name=name, status="fail", detail=f"{folder}: no weights there", fix=fix)
        return
    for path in weights:
        try:
            with safe_open(path, framework="np") as tensors:
                len(tensors.keys())
        except (SafetensorError, OSError) as error:
            is_pointer = path.read_bytes()[:40].startswith(b"version https://git-lfs")
            reason = "is a Git LFS pointer: run `git lfs pull`" if is_pointer else str(error)
            yield Check(name=name, status="fail", detail=f"{path}: {reason}", fix=fix)
            return
    digest = digest_files(folder, [str(path.relative_to(folder)) for path in weights])
    size = sum(path.stat().st_size for path in weights) / 1e6
    yield Check(
        name=name, status="ok", detail=f"{len(weights)} weight file(s), {size:.1f} MB, digest {digest}"
    )


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The findings of one check; a check that breaks is itself a finding."""
    try:
        yield from check()
    except Exception as error:
        yield Check(name=name, status="fail", detail=f"{type(error).__name__}: {error}", fix=SET_UP)


def run(args: Args, report: Callable[[Check], None] = lambda check: None) -> Diagnosis:
    """Make every check; `report` is called with each finding as it comes."""
    importlib.invalidate_caches()
    plan: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("faiss package", check_faiss_distribution),
        ("machine", check_machine),
        ("runs folder", lambda: check_runs(args.runs)),
        ("shipped weights", check_assets),
        ("model hub", lambda: check_hub(args.timeout)),
        ("torch", check_torch),
        ("GPUs", check_gpus),
        ("ray", lambda: check_ray(args.start_ray)),
        ("mlflow store", check_tracking),
    ]
    checks = []
    for name, check in plan:
        for finding in _guarded(name, check):
            report(finding)
            checks.append(finding)
    return Diagnosis(checks=tuple(checks))


def print_check(check: Check) -> None:
    """One line per finding, a second one with what to do."""
    colours = {"ok": "32", "warn": "33", "fail": "31"}
    word = f"{check.status:<4}"
    if sys.stdout.isatty():
        word = f"\033[{colours[check.status]}m{word}\033[0m"
    print(f"{word}  {check.name:<14}  {check.detail}", flush=True)
    if check.fix:
        print(f"      {'':<14}  → {check.fix}", flush=True)


def command(argv: Sequence[str]) -> int:
    """`factory doctor`; exit status 1 where something fails."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="factory doctor", description=__doc__)
    diagnosis = run(args, report=(lambda check: None) if args.json else print_check)
    counts = {s: sum(c.status == s for c in diagnosis.checks) for s in ("ok", "warn", "fail")}
    if args.json:
        findings = [dataclasses.asdict(check) for check in diagnosis.checks]
        print(json.dumps({"ok": not diagnosis.failed, "counts": counts, "checks": findings}, indent=2))
    else:
        print(f"{counts['ok']} ok, {counts['warn']} to know, {counts['fail']} to fix; next: ", end="")
        print("fix what failed and run `factory doctor` again" if diagnosis.failed else "factory demo")
    return 1 if diagnosis.failed else 0
