"""The stream at its highest rate for a long time: does memory stay flat, and where does the driver saturate?

    python benchmarks/soak.py --minutes 30                       # synthesis that costs nothing
    python benchmarks/soak.py --minutes 2 --actors 64 --seconds-per-batch 1.0   # 64 GPU nodes, simulated

The real stream of `factory synthesize` (Ray Data, intent log, fragment writers, ledger, committer) with two stages in
the place of synthesizer and embedder that make rows without computing: what is left is the machine's own cost. With
--seconds-per-batch each of --actors waits as long as a GPU would compute, which takes no CPU, so that many nodes can be
simulated on one machine; the rate that was possible (actors × batch / seconds) is the peer. Every ten seconds: rows done,
memory of driver, workers and object store, processor seconds of each kind of process (what benchmarks/scaling.py predicts
larger clusters from). The job is stopped at the time given, committed and audited.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import save

from factory.synthesis.stages import PIXEL_SCHEMA, stream_schema
from schemas.request import SynthesisPlan

DIM = 8
SAMPLE_SECONDS = 10.0
PLAN = SynthesisPlan(
    recipe="tiny", fingerprint="soak", weights={"none": "0"}, real_digest="0", labels=("benign", "malignant")
)


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests without masks and prompts."""

    plan: SynthesisPlan

    def __call__(self, indices: np.ndarray) -> pa.Table:
        ids = [self.plan.request_at(int(index)).request_id for index in indices]
        table = pa.table({"request_index": pa.array(indices, pa.int64()), "request_id": pa.array(ids)})
        return _filled(table, PIXEL_SCHEMA)


@dataclass(frozen=True, kw_only=True)
class WaitingSettings:
    """A synthesizer that waits instead of computing."""

    seconds_per_batch: float

    def stage(self, plan: SynthesisPlan, intents: Any = None) -> "WaitingSettings":
        return self

    def __call__(self, requests: pa.Table) -> pa.Table:
        started = time.time()
        if self.seconds_per_batch:
            time.sleep(self.seconds_per_batch)
        count = requests.num_rows
        seconds = pa.array(np.full(count, self.seconds_per_batch / max(count, 1)), pa.float32())
        table = requests.set_column(requests.schema.get_field_index("seconds"), "seconds", seconds)
        place = table.schema.get_field_index("started")
        return table.set_column(place, "started", pa.array(np.full(count, started), pa.float64()))


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Finished rows with a tiny payload."""

    plan: SynthesisPlan

    def stage(self) -> "RowSettings":
        return self

    def __call__(self, pixels: pa.Table) -> pa.Table:
        requests = [self.plan.request_at(index) for index in pixels["request_index"].to_pylist()]
        constants = {
            "plan_id": self.plan.plan_id, "recipe": "tiny", "fingerprint": "soak", "weights": [("none", "0")],
            "seed": 0, "image": b"soak", "height": 1, "width": 1, "split": "train", "num_inference_steps": 1,
            "guidance_scale": 1.0, "embedding": [1.0] + [0.0] * (DIM - 1), "code_version": "soak", "derived": False,
            "licence": "none", "source_parameters": "{}", "batch_size": len(requests), "scores": [], "prompt": "",
        }  # fmt: skip
        rows = [
            constants
            | {
                "request_id": request.request_id, "request_index": request.request_index, "attempt": request.attempt,
                "label": request.label_index, "label_name": request.label, "seconds": seconds, "started": started,
            }
            for request, seconds, started in zip(
                requests, pixels["seconds"].to_pylist(), pixels["started"].to_pylist()
            )
        ]  # fmt: skip
        return pa.Table.from_pylist(rows, schema=stream_schema(DIM))


def _filled(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


class CpuByRole:
    """Processor seconds that this process and its descendants have used since the start, by role.

    A process that ends keeps what was last seen of it, so call it every few seconds.
    """

    ROLES = ("driver", "synthesizer", "embedder", "tasks", "raylet", "gcs", "other")

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}

    def __call__(self) -> dict[str, float]:
        """Seconds by role; tasks draw requests and write fragments, other is Ray's agents and monitors."""
        driver = psutil.Process()
        for process in (driver, *driver.children(recursive=True)):
            try:
                times = process.cpu_times()
                role = "driver" if process == driver else self._role(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            before = self._seen.get(process.pid, (role, 0.0))[0]
            # A worker that waits is titled ray::IDLE: it has the role it was first seen to work in.
            self._seen[process.pid] = (role if before == "tasks" else before, times.user + times.system)
        totals = dict.fromkeys(self.ROLES, 0.0)
        for role, seconds in self._seen.values():
            totals[role] += seconds
        return totals

    def role_of(self, process: psutil.Process) -> str:
        """The role that a process was last seen in."""
        return self._seen.get(process.pid, ("other", 0.0))[0]

    @staticmethod
    def _role(command: list[str]) -> str:
        title = command[0] if command else ""
        for part, role in (("_SynthesisActor", "synthesizer"), ("_FinishActor", "embedder")):
            if title.startswith("ray::") and part in title:
                return role
        if title.startswith("ray::") and "Agent" not in title and "StatsActor" not in title:
            return "tasks"
        name = Path(title).name
        return {"raylet": "raylet", "gcs_server": "gcs"}.get(name, "other")


def memory(cpu: CpuByRole) -> dict[str, float]:
    """Memory of their own of the driver, of Ray's processes by role and in all, and the object store in use; MB.

    Shared pages, such as the object store's, are not counted in each.
    """
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    driver = psutil.Process()
    found = {f"{role}_mb": 0.0 for role in cpu.ROLES}
    for process in (driver, *driver.children(recursive=True)):
        try:
            found[f"{cpu.role_of(process)}_mb"] += process.memory_full_info().uss / 1e6
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return {
        **found,
        "ray_mb": sum(found.values()) - found["driver_mb"],
        "object_store_mb": reply.store_stats.object_store_bytes_used / 1e6,
    }


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One soak into a fresh table."""
    from factory.storage import Committer, FragmentRecord, IndexSet, create_table
    from jobs.cluster import configure_data, start_ray
    from jobs.synthesis_stream import StreamSettings, rows_per_block, stream
    from schemas.sample import synthetic_schema

    uri = str(folder / "soak.lance")
    create_table(uri, synthetic_schema(DIM), metadata={"class_names": '["benign", "malignant"]'})
    wanted = IndexSet.of(
        PLAN.index_blocks({"benign": args.rows // 2, "malignant": args.rows - args.rows // 2})
    )
    settings = StreamSettings(
        num_synthesizers=args.actors,
        cpus_per_synthesizer=0.6 / args.actors,
        cpus_per_embedder=0.3,
        batch_size=args.batch_size,
        rows_per_fragment=args.rows_per_fragment,
    )
    samples: list[dict[str, float]] = []
    done = 0
    cpu = CpuByRole()
    committer = Committer(uri, plan_id=PLAN.plan_id, run_id="soak", rows_per_commit=args.rows_per_commit,
                          seconds_per_commit=60.0)  # fmt: skip
    with start_ray(num_cpus=2), committer:
        configure_data()
        asked = time.perf_counter()
        rows = stream(
            wanted, Requests(plan=PLAN), WaitingSettings(seconds_per_batch=args.seconds_per_batch),  # type: ignore[arg-type]
            RowSettings(plan=PLAN), settings, uri=uri, run_id="soak", storage_options={},  # type: ignore[arg-type]
        )  # fmt: skip
        first = last = None
        for row in rows:
            committer.add(FragmentRecord.from_json(row["record"]))
            done += row["made"]
            now = time.perf_counter()
            first = first or now
            if last is None or now - last >= SAMPLE_SECONDS:
                last = now
                used = {f"cpu_{role}": seconds for role, seconds in cpu().items()}
                machine = psutil.cpu_times()
                used["cpu_machine"] = machine.user + machine.nice + machine.system
                samples.append({"seconds": now - first, "rows": done, **memory(cpu), **used})
                print(" ".join(f"{key}={value:.0f}" for key, value in samples[-1].items()), flush=True)
            if now - first >= 60 * args.minutes:
                break
        rows.close()
        seconds = time.perf_counter() - (first or 0.0)
        committer.commit()
        audit = committer.audit(wanted)
    return {
        **_summary(samples, done, seconds, args),
        "seconds_to_first_row": (first or now) - asked,
        "rows_per_block": rows_per_block(args.rows, args.batch_size),
        "audit": audit.line(),
        "samples": samples,
    }


def _summary(
    samples: list[dict[str, float]], done: int, seconds: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Rate and growth of memory, from the second fifth on: before that caches fill."""
    settled = samples[len(samples) // 5 :]
    time_of = np.array([sample["seconds"] for sample in settled]) / 60
    growth = {
        name: float(np.polyfit(time_of, [sample[name] for sample in settled], 1)[0])
        if len(settled) > 2
        else None
        for name in samples[0]
        if name.endswith("_mb")
    }
    rate = done / seconds
    possible = args.actors * args.batch_size / args.seconds_per_batch if args.seconds_per_batch else None
    return {
        "rows": done,
        "seconds": seconds,
        "rows_per_second": rate,
        **costs(settled),
        "possible_rows_per_second": possible,
        "share_of_possible": None if possible is None else rate / possible,
        "growth_mb_per_minute": growth,
    }


def costs(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Rate, processor seconds per row and processors in use by role, between the first and the last sample.

    The processors that other programs of the machine used meanwhile say how quiet it was.
    """
    if len(samples) < 2:
        return {}
    first, last = samples[0], samples[-1]
    rows, seconds = last["rows"] - first["rows"], last["seconds"] - first["seconds"]
    used = {role: last[f"cpu_{role}"] - first[f"cpu_{role}"] for role in CpuByRole.ROLES}
    return {
        "settled_rows_per_second": rows / seconds,
        "cpu_seconds_per_row": {role: value / max(rows, 1) for role, value in used.items()},
        "cpus_in_use": {role: value / seconds for role, value in used.items()},
        "cpus_of_others": (last["cpu_machine"] - first["cpu_machine"] - sum(used.values())) / seconds,
    }


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--seconds-per-batch", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rows-per-fragment", type=int, default=1024)
    parser.add_argument("--rows-per-commit", type=int, default=50_000)
    parser.add_argument("--name", default="highest-rate")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        results = run(args, Path(folder))
    for name, value in results.items():
        if name != "samples":
            print(f"{name:<26} {value}")
    print("wrote", save("soak", {"width": args.name, **vars(args)}, results, "cpu"))


if __name__ == "__main__":
    main()
