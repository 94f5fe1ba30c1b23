"""How far the stream scales: what a row costs in each kind of process, and the rate this allows on 8 to 512 GPUs.

python benchmarks/scaling.py                        # everything; about twenty minutes on two quiet cores
python benchmarks/scaling.py --parts rows model     # only these; the rest is taken from the results there are

workers  the real stream of `factory synthesize` with 1 and with 2 synthesizers of one thread each (recipe `tiny`):
         the rate of two over twice the rate of one. The peer is what the two cores allow: the stream's other
         processes need them too.
rows     processor seconds and bytes of a row at 512 px (requests, embedding, encoding, writing), in one process.
soaks    runs of benchmarks/soak.py, whose stages compute nothing: what is left are driver, workers and Ray.
model    the ceilings fitted to them, held against the soaks that were not used to fit (among them soak-*.json of
         longer runs, if they are there), evaluated for 8 … 512 GPUs; draws docs/scaling.png.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import RESULTS, save

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = 512
GPUS = (8, 16, 32, 64, 128, 256, 512)
IMAGE_SECONDS = (0.05, 0.2, 1.0, 4.0)
SETTINGS = {"block_rows": 512, "fragment_rows": 1024}
"""Of the table and the plot: rows per block as a plan of 10^7 requests has them, --rows-per-fragment 1024."""
STORE_BYTES_PER_SECOND = 1e9
"""Assumed, not measured: what the object store takes from one job."""
SOAKS = {
    "scaling-64-1024": ("--batch-size", "64"),
    "scaling-256-1024": ("--batch-size", "256"),
    "scaling-64-128": ("--batch-size", "64", "--rows-per-fragment", "128"),
    "scaling-16-actors": ("--batch-size", "64", "--actors", "16", "--seconds-per-batch", "1"),
    "scaling-128-512": ("--batch-size", "128", "--rows-per-fragment", "512"),
    "scaling-64-actors": ("--batch-size", "64", "--actors", "64", "--seconds-per-batch", "1"),
}
FITTED = ("scaling-64-1024", "scaling-256-1024", "scaling-64-128")
FITTED_ACTORS = ("scaling-16-actors", "scaling-64-actors")
SERIAL = ("driver", "synthesizer", "embedder", "raylet", "gcs")
"""Roles of one process each on the machine of the soak; none can use more than a processor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Processor seconds of one role: per block, fragment and row, and per second, of the stream and for each actor."""

    block: float
    fragment: float
    row: float
    second: float = 0.0
    actor_second: float = 0.0

    def per_row(self, block_rows: float, fragment_rows: float) -> float:
        """Seconds of a row in blocks and fragments of so many rows."""
        return self.block / block_rows + self.fragment / fragment_rows + self.row

    def idle(self, actors: float) -> float:
        """Share of a processor that so many waiting actors take; 0 without actors that wait."""
        return self.second + self.actor_second * actors if actors else 0.0


def soak_results() -> dict[str, dict[str, Any]]:
    """Settings and results of every soak that stored processor seconds by role, by name."""
    found = {}
    for path in sorted(RESULTS.glob("soak-*-cpu.json")):
        report = json.loads(path.read_text())
        if "cpu_seconds_per_row" in report["results"]:
            found[report["settings"]["width"]] = {**report["settings"], **report["results"]}
    return found


def run_soaks(minutes: float, again: bool) -> None:
    """Run the soaks of the model that there is no result of."""
    have = {} if again else soak_results()
    for name, options in SOAKS.items():
        if name not in have:
            command = [
                sys.executable,
                str(ROOT / "benchmarks" / "soak.py"),
                "--rows",
                "1000000",
                "--name",
                name,
            ]
            subprocess.run([*command, "--minutes", str(minutes), *options], check=True, cwd=ROOT)


def fit(soaks: Mapping[str, Mapping[str, Any]]) -> dict[str, Costs]:
    """Costs by role from three soaks of one actor and two of many, by non-negative least squares."""
    from scipy.optimize import nnls

    runs = [soaks[name] for name in FITTED]
    terms = np.array([[1 / run["rows_per_block"], 1 / run["rows_per_fragment"], 1.0] for run in runs])
    several = [soaks[name] for name in FITTED_ACTORS]
    actors = np.array([[1.0, run["actors"]] for run in several])
    found = {}
    for role in runs[0]["cpu_seconds_per_row"]:
        seconds = np.array([run["cpu_seconds_per_row"][role] for run in runs])
        # Divided by what is fitted, so that the shares of the error count and the dearest run does not decide.
        block, fragment, row = (
            nnls(terms / seconds[:, None], np.ones(len(runs)))[0] if seconds.all() else np.zeros(3)
        )
        costs = Costs(block=float(block), fragment=float(fragment), row=float(row))
        rest = [
            run["cpus_in_use"][role]
            - run["settled_rows_per_second"] * costs.per_row(run["rows_per_block"], run["rows_per_fragment"])
            for run in several
        ]
        second, actor_second = nnls(actors, np.maximum(rest, 0.0))[0]
        found[role] = dataclasses.replace(costs, second=float(second), actor_second=float(actor_second))
    return found


def predict(costs: Mapping[str, Costs], run: Mapping[str, Any]) -> dict[str, Any]:
    """Rate and processor seconds per row of a soak, from the costs: all roles share the cores that others leave."""
    actors = run["actors"] if run["seconds_per_batch"] else 0
    per_row = {r: c.per_row(run["rows_per_block"], run["rows_per_fragment"]) for r, c in costs.items()}
    idle = {role: cost.idle(actors) for role, cost in costs.items()}
    cores = max((os.cpu_count() or 1) - run["cpus_of_others"], 0.1)
    limits = {role: max(1 - idle[role], 0.0) / per_row[role] for role in SERIAL if per_row[role]}
    limits["cores"] = max(cores - sum(idle.values()), 0.0) / sum(per_row.values())
    if run["seconds_per_batch"]:
        limits["synthesizer"] = run["actors"] * run["batch_size"] / run["seconds_per_batch"]
    limit = min(limits, key=limits.__getitem__)
    measured = sum(run["cpu_seconds_per_row"].values())
    predicted = sum(per_row.values()) + sum(idle.values()) / run["settled_rows_per_second"]
    return {
        "limit": limit,
        "rows_per_second": limits[limit],
        "measured_rows_per_second": run["settled_rows_per_second"],
        "rate_predicted_over_measured": limits[limit] / run["settled_rows_per_second"],
        "cpu_seconds_per_row": predicted,
        "measured_cpu_seconds_per_row": measured,
        "cpu_predicted_over_measured": predicted / measured,
        "cpus_of_others": run["cpus_of_others"],
    }


def ceilings(costs: Mapping[str, Costs], rows: Mapping[str, float], gpus: int) -> dict[str, float]:
    """Rows per second that each thing shared by the whole cluster allows."""
    driver, gcs = costs["driver"], costs["gcs"]
    return {
        "driver": max(1 - driver.idle(gpus), 0.0) / driver.per_row(**SETTINGS),
        "gcs": max(1 - gcs.idle(gpus), 0.0) / max(gcs.per_row(**SETTINGS), 1e-9),
        "object store": STORE_BYTES_PER_SECOND / rows["bytes"],
    }


def evaluate(costs: Mapping[str, Costs], rows: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rate, what limits it, and the cores for everything but synthesis, for each number of GPUs and image time."""
    stages = sum(rows[name] for name in ("request_seconds", "finish_seconds", "write_seconds"))
    overhead = sum(costs[role].per_row(**SETTINGS) for role in ("embedder", "tasks", "raylet"))
    table = []
    for seconds in IMAGE_SECONDS:
        for gpus in GPUS:
            limits = {"GPUs": gpus / seconds, **ceilings(costs, rows, gpus)}
            limit = min(limits, key=limits.__getitem__)
            table.append(
                {
                    "gpus": gpus,
                    "image_seconds": seconds,
                    "rows_per_second": limits[limit],
                    "limit": limit,
                    "share_of_gpus": limits[limit] / limits["GPUs"],
                    "cpu_cores": limits[limit] * (stages + overhead),
                    "embedding_cores": limits[limit] * rows["embed_seconds"],
                }
            )
    return table


def saturation(costs: Mapping[str, Costs]) -> dict[str, float]:
    """GPUs at which the driver is the ceiling, by seconds per image: n / t = (1 - s - n a) / c."""
    driver = costs["driver"]
    share = 1 - driver.second
    return {str(t): share * t / (driver.per_row(**SETTINGS) + driver.actor_second * t) for t in IMAGE_SECONDS}


def row_costs(num_rows: int) -> dict[str, float]:
    """Processor seconds and bytes of a row at 512 px, by the stages of the stream on phantom images."""
    from factory.datasets.phantom import PhantomConfig, phantom_sample
    from factory.embedding import ImageEmbedder
    from factory.imaging import TrainingRow
    from factory.recipes import RECIPES
    from factory.storage import create_table, write_fragment
    from factory.synthesis.stages import ACCOUNTS, PIXEL_SCHEMA, FinishSettings, FinishStage
    from jobs.assembly import make_request_stage
    from jobs.synthesis_plan import fit_filters
    from schemas.request import SynthesisPlan
    from schemas.sample import synthetic_schema

    recipe, config = RECIPES["clinical_prior"](), PhantomConfig(size=RESOLUTION)
    samples = [phantom_sample(config, 0, index) for index in range(num_rows)]
    labels = config.class_names
    training = [
        TrainingRow(image_id=str(number), label=labels.index(item.label_name), label_name=item.label_name,
                    group_id=str(number), image=item.image, mask=item.mask, attributes=item.attributes)
        for number, item in enumerate(samples)
    ]  # fmt: skip
    plan = SynthesisPlan(recipe="scaling", fingerprint="0", weights={}, real_digest="0", labels=labels)
    requests = make_request_stage(recipe, plan, training)
    embedder = ImageEmbedder()
    embeddings = embedder.load(num_threads=1).embed([item.image for item in samples])
    filters = fit_filters(recipe, training, embeddings, embedder.load().spec)
    finish = FinishStage(
        FinishSettings(plan=plan, embedder=embedder, filters=filters, sampling=recipe.sampling,
                       resolution=RESOLUTION, licence="none", num_threads=1)
    )  # fmt: skip
    seconds: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        start = time.process_time()
        made = call()
        seconds[name] = (time.process_time() - start) / num_rows
        return made

    requested = timed("request_seconds", lambda: requests(range(num_rows)))
    pixels = requested.to_pylist()
    for row, item in zip(pixels, samples, strict=True):
        row |= {"pixels": item.image.tobytes(), "mask_pixels": item.mask.tobytes(), "channel_spread": 0.0,
                "annotation_failed": False, "batch_size": num_rows, "seconds": 0.0, "started": 0.0}  # fmt: skip
    table = type(requested).from_pylist(pixels, schema=PIXEL_SCHEMA)
    made = timed("finish_seconds", lambda: finish(table))
    timed("embed_seconds", lambda: finish.embedder.embed([item.image for item in samples]))
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "rows.lance")
        create_table(uri, synthetic_schema(embedder.load().spec.dim), metadata={})
        rows = made.drop_columns(list(ACCOUNTS))
        timed("write_seconds", lambda: write_fragment(uri, rows, run_id="rows"))
        written = sum(path.stat().st_size for path in Path(folder).rglob("data/*"))
    return {**seconds, "bytes": written / num_rows, "pixel_bytes": table.nbytes / num_rows}


def worker_rates(num_requests: int) -> dict[str, Any]:
    """Rows per second of the real stream with one and with two synthesizers of one thread, recipe `tiny`."""
    from factory.recipes import RECIPES
    from factory.storage import open_table, real_digest
    from jobs import prepare as prepare_job
    from jobs import synthesize
    from jobs.cluster import start_ray

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        real = str(Path(folder) / "real.lance")
        prepare_job.run(prepare_job.Args(layout="phantom", out=real, num_images=80))
        generator = Path(folder) / "generator"
        RECIPES["tiny"]().generator.load().save(
            generator, {"name": "tiny", "real_digest": real_digest(open_table(real))}
        )
        found = {}
        # Logical CPUs: tasks wait for the processors, not for Ray to grant them.
        with start_ray(num_cpus=4):
            for number in (1, 2):
                args = synthesize.Args(recipe="tiny", generator=str(generator), real=real, batch_size=8,
                                       out=str(Path(folder) / f"{number}.lance"), num_requests=num_requests * number,
                                       rows_per_fragment=8, num_synthesizers=number)  # fmt: skip
                found[number] = _stream_rate(args, number)
    one, two = found[1], found[2]
    # Two synthesizers make twice the rows, with what the other processes need, on all cores.
    cores = (os.cpu_count() or 1) - two["cpus_of_others"]
    possible = min(2 * one["rows_per_second"], cores / one["cpu_seconds_per_row"])
    return {
        "one": one,
        "two": two,
        "efficiency": two["rows_per_second"] / (2 * one["rows_per_second"]),
        "possible_rows_per_second": possible,
        "share_of_possible": two["rows_per_second"] / possible,
    }


def _stream_rate(args: Any, number: int) -> dict[str, Any]:
    """Rate and processor seconds between the first and the last record; models are loaded before the first."""
    import psutil
    from soak import CpuByRole

    from factory.storage import create_table
    from jobs.cluster import configure_data
    from jobs.synthesis_plan import execution, prepare, table_metadata
    from jobs.synthesis_stream import stream
    from schemas.sample import synthetic_schema

    prepared = prepare(args)
    settings, synthesizer, finish = execution(args, prepared, number, 0)  # so many threads in all
    create_table(args.out, synthetic_schema(prepared.embedder_spec.dim), metadata=table_metadata(prepared))
    configure_data()
    rows = stream(prepared.requested, prepared.request_stage, synthesizer, finish, settings, uri=args.out,
                  run_id="scaling", storage_options={})  # fmt: skip
    cpu, marks = CpuByRole(), []
    for row in rows:
        machine = psutil.cpu_times()
        busy = machine.user + machine.nice + machine.system
        marks.append((row["started"], row["made"], time.time(), cpu(), busy))
    # The first batch of each synthesizer is left out: some may still load their models meanwhile. Records come in bursts,
    # so a batch counts from when its synthesizer began it.
    start = sorted(mark[0] for mark in marks)[number]
    after = sum(made for started, made, *_ in marks if started >= start)
    (_, before, first, used, busy), (_, _, end, used_then, busy_then) = marks[0], marks[-1]
    done = sum(made for _, made, *_ in marks)
    roles = {role: used_then[role] - used[role] for role in used}
    return {
        "rows": done,
        "rows_per_second": after / (end - start),
        "cpu_seconds_per_row": sum(roles.values()) / (done - before),
        "cpu_seconds_per_row_by_role": {role: value / (done - before) for role, value in roles.items()},
        "cpus_of_others": (busy_then - busy - sum(roles.values())) / (end - first),
    }


def draw(costs: Mapping[str, Costs], rows: Mapping[str, float], path: Path) -> None:
    """Rate over GPUs for each image time, both axes logarithmic, with the ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = np.unique(np.geomspace(1, 1024, 200).astype(int))
    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for seconds in IMAGE_SECONDS:
        rate = [min(count / seconds, *ceilings(costs, rows, int(count)).values()) for count in gpus]
        axes.plot(gpus, rate, label=f"{seconds:g} s per image")
    for name, style in (("driver", "--"), ("object store", ":"), ("gcs", "-.")):
        allowed = [ceilings(costs, rows, int(count))[name] for count in gpus]
        label = "object store at 1 GB/s (assumed)" if name == "object store" else f"{name}, one process"
        axes.plot(gpus, allowed, style, color="0.4", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="GPUs",
        ylabel="images per second (512 px)",
        xlim=(1, 1024),
        ylim=(0.1, None),
    )
    axes.set_xticks([1, 8, 64, 256, 512], labels=["1", "8", "64", "256", "512"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def model(results: dict[str, Any], plot: Path) -> None:
    """Fit, check, evaluate and draw; into `results`."""
    soaks = soak_results()
    lacking = [name for name in (*FITTED, *FITTED_ACTORS) if name not in soaks]
    if lacking or "rows" not in results:
        raise SystemExit(f"the model needs the parts rows and soaks first; soaks without a result: {lacking}")
    costs = fit(soaks)
    results["costs"] = {role: dataclasses.asdict(cost) for role, cost in costs.items()}
    results["fitted_to"] = [*FITTED, *FITTED_ACTORS]
    results["checks"] = {
        name: predict(costs, run) for name, run in soaks.items() if name not in (*FITTED, *FITTED_ACTORS)
    }
    results["table"] = evaluate(costs, results["rows"])
    results["gpus_at_driver_saturation"] = saturation(costs)
    draw(costs, results["rows"], plot)


def show(results: Mapping[str, Any]) -> None:
    """The results in lines, the table as docs/scaling.md has it."""
    if workers := results.get("workers"):
        print(
            f"two synthesizers: efficiency {workers['efficiency']:.2f}, {workers['share_of_possible']:.2f} of possible"
        )
    print("rows at 512 px:", {name: float(f"{value:.3g}") for name, value in results.get("rows", {}).items()})
    for role, cost in results.get("costs", {}).items():
        print(f"{role:<12}", " ".join(f"{name} {1e3 * value:.3g} ms" for name, value in cost.items()))
    for name, check in results.get("checks", {}).items():
        print(f"{name}: rate {check['rows_per_second']:.0f} by {check['limit']}, "
              f"{check['rate_predicted_over_measured']:.2f} of measured; "
              f"CPU {check['cpu_predicted_over_measured']:.2f} of measured")  # fmt: skip
    if table := {(row["gpus"], row["image_seconds"]): row for row in results.get("table", [])}:
        print(
            "| GPUs |"
            + "".join(f" {seconds:g} s per image |" for seconds in IMAGE_SECONDS)
            + " cores, at most |"
        )
        print("|---|" + "---|" * (1 + len(IMAGE_SECONDS)))
        for gpus in GPUS:
            found = [table[gpus, seconds] for seconds in IMAGE_SECONDS]
            cells = [f" {row['rows_per_second']:.0f} ({row['limit']}) |" for row in found]
            print(f"| {gpus} |" + "".join(cells) + f" {max(row['cpu_cores'] for row in found):.0f} |")
    print("GPUs at which the driver saturates:", results.get("gpus_at_driver_saturation"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts asked for, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("workers", "rows", "soaks", "model")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--num-requests", type=int, default=96, help="of each synthesizer, for workers")
    parser.add_argument("--num-rows", type=int, default=64, help="for rows")
    parser.add_argument("--minutes", type=float, default=1.5, help="of each soak")
    parser.add_argument("--again", action="store_true", help="run soaks that have a result too")
    args = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path = RESULTS / f"scaling-{RESOLUTION}px-cpu.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    settings = {"width": f"{RESOLUTION}px", **SETTINGS, **vars(args), "image_seconds": IMAGE_SECONDS}
    if "workers" in args.parts:
        results["workers"] = worker_rates(args.num_requests)
        save("scaling", settings, results, "cpu")
    if "rows" in args.parts:
        results["rows"] = row_costs(args.num_rows)
        save("scaling", settings, results, "cpu")
    if "soaks" in args.parts:
        run_soaks(args.minutes, args.again)
    if "model" in args.parts:
        model(results, ROOT / "docs" / "scaling.png")
    show(results)
    print("wrote", save("scaling", settings, results, "cpu"))


if __name__ == "__main__":
    main()
