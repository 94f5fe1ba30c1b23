"""The whole main job on a small machine: prepare, train, synthesize, curate, query, and a report.

    factory demo
    factory demo --data busi Dataset_BUSI_with_GT --out runs/busi

On two CPU cores it takes a few minutes; the images are procedural ultrasound unless `--data` names real ones.
Every verb runs as its own command would, in this process, on one Ray. Running it again goes on where it stopped
and repeats nothing that is done; `--fresh` starts over. The last line printed is the path of the report.
"""

import contextlib
import json
import shlex
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.redaction import redact

if TYPE_CHECKING:
    from factory.report import StageTime
    from factory.tracking import Run
    from jobs.cluster import RayHandle
    from jobs.curate import CurationResult
    from jobs.demo_report import DemoPaths, DemoResults
    from jobs.synthesize import SynthesisResult

RECIPE = "tiny"
SHEET_IMAGES = 32
STATE_FILE = "demo.json"
_MADE = ("real.lance", "generator", "synthetic.lance", "report.html", "accepted.png", STATE_FILE)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory demo`."""

    data: tuple[str, ...] = ("phantom",)
    """`phantom`, or a layout and its path: `--data busi Dataset_BUSI_with_GT`."""
    num_images: int = 240
    """Phantom images to make; of no meaning for other data."""
    num_requests: int = 128
    """Synthetic images to ask for; a larger number later only adds."""
    out: str = "runs/demo"
    """Folder of everything the demo writes."""
    max_steps: int = 200
    """Training steps."""
    seed: int = 0
    """Seed of the phantoms, of the splits and of the plan."""
    fresh: bool = False
    """Discard what an earlier demo left in --out."""
    num_cpus: int | None = None
    """CPUs of the demo's Ray; all by default."""

    def __post_init__(self) -> None:
        layout, *path = self.data or ("",)
        if layout == "phantom" and path:
            raise ValueError(f"--data phantom takes no path, got {path[0]!r}")
        if layout != "phantom" and len(path) != 1:
            raise ValueError(f"--data {' '.join(self.data)}: want `phantom`, or a layout and one path")
        for name in ("num_images", "num_requests", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: want at least 1")

    @property
    def fixed(self) -> dict[str, Any]:
        """What an earlier demo in the same folder must have been run with."""
        layout, *path = self.data
        source = (
            {"num_images": self.num_images} if layout == "phantom" else {"path": str(Path(path[0]).resolve())}
        )
        return {"layout": layout, "max_steps": self.max_steps, "seed": self.seed, **source}


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where the report is, and how long each stage took, seconds."""

    report: Path
    stages: "tuple[StageTime, ...]"
    synthesis: "SynthesisResult"


def open_folder(args: Args) -> Path:
    """The demo's folder: new, or that of an earlier demo with the same settings.

    Raises:
        ValueError: the folder holds something else, or a demo with other settings.
        FileNotFoundError: the data's path does not exist.
    """
    out = Path(args.out)
    layout, *path = args.data
    if path and not Path(path[0]).exists():
        raise FileNotFoundError(f"--data {layout}: {path[0]} does not exist")
    state = out / STATE_FILE
    if out.is_dir() and any(out.iterdir()) and not state.is_file():
        raise ValueError(f"--out {out}: holds something other than a demo; choose another folder")
    if args.fresh and state.is_file():
        _discard(out)
    if state.is_file():
        earlier = json.loads(state.read_text())
        different = [name for name, value in args.fixed.items() if earlier.get(name) != value]
        if different:
            name = different[0]
            raise ValueError(
                f"--out {out}: holds a demo with {name} {earlier.get(name)!r}, not {args.fixed[name]!r}; "
                "use --fresh to start over, or another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps(args.fixed, indent=2) + "\n")
    return out


def _discard(out: Path) -> None:
    """Remove what a demo made, with the ledgers and caches beside its tables, and nothing else."""
    for made in list(out.iterdir()):
        if made.name in _MADE or made.name.startswith(tuple(f"{name}." for name in _MADE)):
            shutil.rmtree(made) if made.is_dir() else made.unlink()


@dataclass
class Clock:
    """Time of each stage, printed as it ends."""

    stages: "list[StageTime]" = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str) -> "Iterator[Stage]":
        """Time the block; what it writes to the yielded stage stands beside its time."""
        print(f"\n── {name} " + "─" * max(72 - len(name), 0), flush=True)
        stage, started = Stage(), time.perf_counter()
        yield stage
        self.add(name, time.perf_counter() - started, stage.fixed, stage.about)

    def add(self, name: str, seconds: float, fixed: float, about: str) -> None:
        """A stage that was timed elsewhere."""
        from factory.report import StageTime

        self.stages.append(StageTime(name=name, seconds=seconds, fixed=min(fixed, seconds), about=about))


@dataclass
class Stage:
    """What a stage says of itself: seconds that were fixed overhead, and a word."""

    fixed: float = 0.0
    about: str = ""


class RayInBackground:
    """Ray starting in a thread of its own while the main thread does other work.

    The thread lives until `close`: Ray asks the kernel to kill its processes when their parent dies, and for the
    kernel the parent is the thread that started them.
    """

    def __init__(self, num_cpus: int | None) -> None:
        self._num_cpus = num_cpus
        self._started, self._finished = threading.Event(), threading.Event()
        self._handle: RayHandle | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._hold, name="ray", daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        try:
            from jobs.cluster import start_ray

            with start_ray(num_cpus=self._num_cpus) as self._handle:
                self._started.set()
                self._finished.wait()
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()

    def wait(self) -> "RayHandle":
        """The handle, once Ray runs; raises what the start raised."""
        self._started.wait()
        if self._handle is None:
            raise self._error or RuntimeError("Ray did not start")
        return self._handle

    def close(self) -> None:
        """Shut down what was started."""
        self._finished.set()
        self._thread.join()


def run(args: Args) -> DemoResult:
    """Run every verb and write the report.

    Raises:
        ValueError, FileNotFoundError: bad input, before anything starts; what a verb raises.
    """
    from factory.tracking import track, warm_up

    out = open_folder(args)
    clock = Clock()
    ray = RayInBackground(args.num_cpus)
    try:
        with clock.stage("start") as stage:
            store_seconds = warm_up()
            _import_libraries()
            stage.fixed = float("inf")
            stage.about = "imports and the tracking store, while Ray starts"
            print(f"tracking store ready in {store_seconds:.1f} s", flush=True)
        with track("demo", execution_parameters={**args.fixed, "num_requests": args.num_requests}) as tracked:
            return _run_verbs(args, out, clock, ray, tracked)
    finally:
        ray.close()


def _import_libraries() -> None:
    """What the verbs would import on their own: here, so that it is counted once and beside the start of Ray."""
    import factory.storage
    import factory.training.run  # noqa: F401


def _run_verbs(args: Args, out: Path, clock: Clock, ray: RayInBackground, tracked: "Run") -> DemoResult:
    from jobs.demo_report import DemoPaths, DemoResults

    paths = DemoPaths(out=out)
    with clock.stage("prepare") as stage:
        stage.about = _prepare(args, paths)
        handle = ray.wait()
        print(f"Ray: {handle.num_cpus:g} CPUs, {handle.num_gpus:g} GPUs, started in {handle.seconds:.1f} s")
    with clock.stage("train") as stage:
        stage.about = _train(args, paths)
    with clock.stage("synthesize") as stage:
        synthesis = _synthesize(args, paths)
        stage.fixed = synthesis.startup_seconds
        rate = f"{synthesis.made} images, {synthesis.images_per_second:.1f} images/s"
        stage.about = rate if synthesis.made else "done before"
    with clock.stage("curate"):
        curation = _curate(paths)
    with clock.stage("query"):
        _query(paths)
    with clock.stage("report"):
        path = _write_report(args, paths, clock, DemoResults(synthesis=synthesis, curation=curation))
    tracked.metrics({f"seconds.{stage.name}": stage.seconds for stage in clock.stages})
    tracked.metrics({"seconds.fixed": sum(stage.fixed for stage in clock.stages)})
    tracked.artifact(path)
    return DemoResult(report=path, stages=tuple(clock.stages), synthesis=synthesis)


def _prepare(args: Args, paths: "DemoPaths") -> str:
    """Make the real table, unless it is there; what to say of it."""
    from jobs import prepare

    if paths.real.exists():
        print(f"{paths.real} is there already")
        return "done before"
    layout, *path = args.data
    result = prepare.run(
        prepare.Args(
            layout=layout,
            path=path[0] if path else "",
            num_images=args.num_images if layout == "phantom" else None,
            out=str(paths.real),
            seed=args.seed,
        )
    )
    prepare.print_result(result)
    return f"{result.summary.num_images} images"


def _train(args: Args, paths: "DemoPaths") -> str:
    from jobs import train

    arguments = train.Args(
        recipe=RECIPE,
        real=str(paths.real),
        out=str(paths.generator),
        max_steps=args.max_steps,
        num_workers=0,
    )
    summary = train.run(arguments)
    train.print_summary(arguments, summary)
    num_steps = summary.steps - summary.start_step
    return f"{num_steps} steps, {summary.steps_per_second:.1f} it/s" if num_steps else "done before"


def _synthesize(args: Args, paths: "DemoPaths") -> "SynthesisResult":
    from jobs import synthesize

    arguments = synthesize.Args(
        recipe=RECIPE,
        generator=str(paths.generator),
        real=str(paths.real),
        out=str(paths.synthetic),
        num_requests=args.num_requests,
        seed=args.seed,
    )
    result = synthesize.run(arguments)
    assert result is not None  # it is None with --plan only
    synthesize.print_result(arguments, result)
    return result


def _curate(paths: "DemoPaths") -> "CurationResult":
    from jobs import curate

    result = curate.run(curate.Args(table=str(paths.synthetic), real=str(paths.real)))
    curate.print_result(result)
    return result


def _query(paths: "DemoPaths") -> None:
    """A filter into a contact sheet, and the rows most like one of those that pass."""
    from factory.storage import open_table
    from jobs import query

    synthetic = str(paths.synthetic)
    found = open_table(synthetic).query("accepted", columns=["request_id"], limit=1)["request_id"].to_pylist()
    if not found:
        print("no row is accepted; see the reject reasons in the report")
        return
    print(f'$ factory query {synthetic} "accepted" --limit {SHEET_IMAGES} --contact-sheet {paths.sheet}')
    asked = query.Args(table=synthetic, filter="accepted", limit=SHEET_IMAGES, contact_sheet=str(paths.sheet))
    result = query.run(asked)
    print(f"{result.matching} rows match; wrote {', '.join(result.written)}")
    columns = "request_id,label_name,accepted,nearest_real_similarity"
    print(f"\n$ factory query {synthetic} --like {found[0][:12]} -k 5 --columns {columns}")
    print(query.run(query.Args(table=synthetic, like=found[0], k=5, columns=columns)).text)


def next_commands(args: Args, paths: "DemoPaths", label: str, request_id: str) -> dict[str, str]:
    """What to try after the demo: purpose, command."""
    from factory.tracking import tracking_uri

    real, synthetic, generator = (shlex.quote(str(p)) for p in (paths.real, paths.synthetic, paths.generator))
    again = shlex.join(["factory", "demo", "--data", *args.data, "--out", args.out, "--seed", str(args.seed)])
    return {
        "look at one class": f"factory query {synthetic} \"accepted AND label_name = '{label}'\" "
        "--contact-sheet accepted.png",
        "find the rows that are most like one": f"factory query {synthetic} --like {request_id} -k 8 "
        "--contact-sheet like.png",
        "make a row again from its provenance": f"factory reproduce {synthetic} {request_id} --sheet again.png",
        "make more of one class, in the same table": f"factory synthesize --recipe {RECIPE} --generator {generator} "
        f"--real {real} \\\n    --labels {label}=500 --out {synthetic}",
        "double the demo: only what is missing is made": f"{again} --num-requests {2 * args.num_requests}",
        "see every run": f"mlflow ui --backend-store-uri {redact(tracking_uri())}",
        "begin with your own images": "factory prepare folder MY_FOLDER --out real.lance",
    }


def _write_report(args: Args, paths: "DemoPaths", clock: Clock, results: "DemoResults") -> Path:
    from factory.report import html_report
    from factory.version import code_version
    from jobs.demo_report import read_rows, sections

    layout, *_ = args.data
    what = "procedural ultrasound phantoms" if layout == "phantom" else f"{layout} images"
    rows = read_rows(paths)
    label = min(rows.labels, key=lambda name: sum(row["label_name"] == name for row in rows.real))
    example = (rows.accepted or rows.synthetic)[0]["request_id"][:12]
    return html_report(
        paths.report,
        sections(paths, rows, clock.stages, results, next_commands(args, paths, label, example)),
        title="Synthetic data factory: demo",
        subtitle=f"{results.synthesis.committed} annotated images made from {what} by recipe {RECIPE}.",
        footer=f"factory {code_version()} · {time.strftime('%Y-%m-%d %H:%M')} · Images for trying out the software; "
        "no medical use.",
    )


def print_result(result: DemoResult) -> None:
    """Time per stage, fixed overhead, and the report's path as the last line."""
    from jobs.demo_report import duration

    print("\n── time " + "─" * 68)
    for stage in result.stages:
        fixed = f"  ({stage.fixed:.1f} s fixed)" if stage.fixed else ""
        print(f"{stage.name:<12}{stage.seconds:7.1f} s  {stage.about}{fixed}")
    total, fixed_total = (sum(getattr(s, n) for s in result.stages) for n in ("seconds", "fixed"))
    print(f"{'all':<12}{total:7.1f} s  ({duration(total)}; fixed overhead {fixed_total:.1f} s)")
    print("\nopen the report in a browser:")
    print(result.report)


def command(argv: Sequence[str]) -> int:
    """`factory demo`; exit status 1 where requests are still pending."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="factory demo", description=__doc__)
    result = run(args)
    print_result(result)
    return 0 if result.synthesis.pending == 0 else 1
