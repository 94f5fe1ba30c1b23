"""Faults on a several-node Ray on this machine, and what must be true afterwards.

One synthesis job runs on a head and two worker nodes, each a real raylet; once a given number of rows is
committed, something is killed for real. Whatever that was, the table must end with exactly the planned rows,
equal in content to those of a plain loop without Ray. Used by the tests, one case per kind, and by
`benchmarks/fault_campaign.py`, many seeded cases.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import psutil

from factory.imaging import decode_png
from factory.recipes import RECIPES, Recipe
from factory.storage import QuarantineLog, open_table
from factory.synthesis.annotators import BoundRequestedMask, RequestedMask
from tests.cluster.local_head import START_TRIES, LocalHead, LocalNode

if TYPE_CHECKING:
    import torch

    from factory.diffusion.guidance import DenoisingBatch

ROOT = Path(__file__).resolve().parents[2]
ORDERS = "FAULT_ORDERS"
"""Variable that names the file with what `Mortal` is to do."""
NUM_REQUESTS = 16
BATCH_SIZE = 2
NUM_STEPS = 4
CPUS_PER_NODE = 2
JOB_SECONDS = 900.0

Kind = Literal["none", "node", "actor", "every_n_batches", "driver", "head", "memory", "straggler"]
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "none")
_batches = 0


class Orders:
    """What `Mortal` is to do, and what it did, in two files that all nodes of this machine see.

    die_every: the process dies in every such batch of its own; slow_every, seconds: it sleeps in every such batch;
    largest_batch, largest_area: above these it asks for more memory than there is; limit: it waits before it takes up
    more batches than that, those of all processes counted.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._deeds = path, path.with_name("deeds.txt")

    def give(self, orders: Mapping[str, float]) -> None:
        """Replace what was ordered before; begins to count anew."""
        self._deeds.unlink(missing_ok=True)
        self._write(orders)

    def change(self, **orders: float) -> None:
        """Add to what was ordered; the count goes on."""
        self._write({**self.read(), **orders})

    def read(self) -> dict[str, float]:
        """What is ordered now; nothing where there is no file."""
        return dict(json.loads(self._path.read_text())) if self._path.is_file() else {}

    def did(self, deed: str) -> None:
        """Note one deed."""
        with self._deeds.open("a") as stream:
            stream.write(f"{deed}\n")

    def count(self, deed: str) -> int:
        """How often it was done."""
        return self._deeds.read_text().split().count(deed) if self._deeds.is_file() else 0

    def _write(self, orders: Mapping[str, float]) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(orders))
        fresh.replace(self._path)


@dataclass(frozen=True, kw_only=True)
class Mortal(RequestedMask):
    """`RequestedMask` that obeys `Orders`: dies every n batches, asks for too much memory, dawdles, waits.

    No fields, so that the plan and its images are the same whatever the orders.
    """

    def bind(self, batch: "DenoisingBatch") -> BoundRequestedMask:
        assert batch.masks is not None
        if ORDERS in os.environ:
            self._obey(Orders(Path(os.environ[ORDERS])), batch.masks)
        return super().bind(batch)

    def _obey(self, told: Orders, masks: "torch.Tensor") -> None:
        global _batches
        _batches += 1
        told.did("batch")
        while told.count("batch") > told.read().get("limit", float("inf")):
            time.sleep(0.1)
        orders = told.read()
        if orders.get("die_every") and _batches % orders["die_every"] == 0:
            told.did("death")
            os._exit(1)
        if orders.get("slow_every") and _batches % orders["slow_every"] == 0:
            told.did("sleep")
            time.sleep(orders["seconds"])
        areas = masks.flatten(1).count_nonzero(dim=1)
        too_many = len(areas) > orders.get("largest_batch", len(areas))
        if too_many or int(areas.max()) > orders.get("largest_area", areas.max()):
            import torch

            told.did("greed")
            torch.empty(2**50, dtype=torch.uint8)  # a petabyte: torch's own error of its CPU allocator


def mortal() -> Recipe:
    """Recipe `tiny` with `Mortal`."""
    return dataclasses.replace(RECIPES["tiny"](), annotator=Mortal())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job with a fault.

    Attributes:
        rows_at_fault: committed when it struck.
        runs: how often the command was started.
        seconds: from the first start to the last end.
        seconds_after_fault: from the fault to the end.
        quarantined: counts by reason.
    """

    kind: Kind
    rows_at_fault: int
    rows: int
    runs: int
    seconds: float
    seconds_after_fault: float
    quarantined: Mapping[str, int]


def synthesize_args(real: str, generator: str, out: str) -> list[str]:
    """The command whose rows are compared."""
    return [
        "--recipe", "tests.cluster.faults:mortal", "--generator", generator, "--real", real, "--out", out,
        "--num-requests", str(NUM_REQUESTS), "--batch-size", str(BATCH_SIZE), "--rows-per-fragment", str(BATCH_SIZE),
        "--rows-per-commit", str(BATCH_SIZE), "--num-synthesizers", "1", "--max-quarantined", "0.5",
        "--sampling.num-inference-steps", str(NUM_STEPS),
    ]  # fmt: skip


def reference_rows(real: str, generator: str) -> dict[str, dict[str, Any]]:
    """The rows as a plain loop over the stages makes them in this process, by request_id."""
    from factory.synthesis.stages import FinishStage, SynthesisStage
    from jobs.recipe_args import parse_args
    from jobs.synthesis_plan import Args, execution, prepare

    args = parse_args(Args, synthesize_args(real, generator, "none.lance"), "factory synthesize")
    prepared = prepare(args)
    _, synthesizer, finish = execution(args, prepared, 2, 0)
    requests = prepared.request_stage(prepared.indices)
    pixels = SynthesisStage(synthesizer, prepared.plan)(requests)
    return {row["request_id"]: row for row in FinishStage(finish)(pixels).to_pylist()}


def check_equal(uri: str, reference: Mapping[str, Mapping[str, Any]], missing: int = 0) -> None:
    """The table holds exactly the reference's rows, but for `missing` that were quarantined.

    Raises:
        AssertionError: a row is twice, missing, too many or of other content.
    """
    from factory.synthesis.synthesizer import IMAGE_TOLERANCE

    rows = open_table(uri).read().to_pylist()
    ids = [row["request_id"] for row in rows]
    assert len(ids) == len(set(ids)), "a request is in the table twice"
    assert set(ids) <= set(reference) and len(ids) == len(reference) - missing, f"{len(ids)} rows"
    for row in rows:
        wanted = reference[row["request_id"]]
        for name in ("requested_mask", "prompt", "label_name", "request_index", "source_parameters", "mask"):
            assert row[name] == wanted[name], f"{row['request_id']}: {name} differs"
        difference = np.abs(decode_png(row["image"]).astype(int) - decode_png(wanted["image"]).astype(int))
        assert difference.max() <= IMAGE_TOLERANCE, (
            f"{row['request_id']}: image differs by {difference.max()}"
        )
        assert np.allclose(row["embedding"], wanted["embedding"], atol=0.02)


def largest_area(reference: Mapping[str, Mapping[str, Any]]) -> int:
    """Area of the largest requested mask, px² at the generator's resolution."""
    return max(int(np.count_nonzero(decode_png(row["requested_mask"]))) for row in reference.values())


class FaultCluster:
    """A head without CPUs and two nodes; heals between cases."""

    def __init__(self, folder: Path, cpus_per_node: int = CPUS_PER_NODE) -> None:
        self.folder, self.cpus_per_node = folder, cpus_per_node
        self.orders = Orders(folder / "orders.json")
        self.variables = {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            ORDERS: str(folder / "orders.json"),
        }
        self.head: LocalHead | None = None

    def __enter__(self) -> "FaultCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.head is not None:
            self.head.close()

    def heal(self) -> LocalHead:
        """The head with two running nodes."""
        if self.head is not None and not self.head.is_running:
            self.head.close()
            self.head = None
        if self.head is None:
            self.head = LocalHead(0, variables=self.variables)
        for _ in range(START_TRIES):
            while len(self.head.nodes) < 2:
                self.head.add_node(self.cpus_per_node)
            lost = [node for node in self.head.nodes if not (node.wait_until_started() and node.is_running)]
            if not lost:
                return self.head
            for node in lost:
                self.head.kill_node(node)
        raise TimeoutError(f"no two nodes after {START_TRIES} tries")

    def start_verb(self, verb: str, argv: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A driver process that joins the cluster."""
        head = self.heal()
        with log.open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", verb, *argv, "--address", head.address],
                cwd=ROOT, env=head.environment(), stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def strike(self, kind: Kind, driver: subprocess.Popen[bytes], choose: np.random.Generator) -> None:
        """Kill what `kind` names."""
        assert self.head is not None
        if kind in ("node", "actor"):
            actors = self.actors(driver)
            chosen = actors[choose.integers(len(actors))]
            if kind == "actor":
                chosen[1].kill()
            else:
                self.head.kill_node(chosen[0])
        elif kind == "driver":
            driver.kill()
        elif kind == "head":
            driver.kill()  # it lives on the head
            self.head.close()
            self.head = None

    def actors(self, driver: subprocess.Popen[bytes]) -> list[tuple[LocalNode, psutil.Process]]:
        """The synthesizers and their nodes, once there are any."""
        deadline = time.monotonic() + JOB_SECONDS
        while driver.poll() is None and time.monotonic() < deadline:
            assert self.head is not None
            found = [(node, actor) for node in self.head.nodes for actor in node.actors("Synthesis")]
            if found:
                return found
            time.sleep(0.1)
        raise TimeoutError("no synthesizer was started")


def committed(uri: str) -> int:
    """Rows in a table; 0 where there is none yet."""
    return open_table(uri).count() if (Path(uri) / "_versions").is_dir() else 0


def quarantined_in(uri: str) -> dict[str, int]:
    """Quarantined requests of a table by reason."""
    plans = set(open_table(uri).read(["plan_id"])["plan_id"].to_pylist())
    return dict(Counter(entry.reason for plan_id in plans for entry in QuarantineLog(uri, plan_id).entries()))


def run_with_fault(
    cluster: FaultCluster,
    kind: Kind,
    *,
    after_rows: int,
    seed: int,
    real: str,
    generator: str,
    reference: Mapping[str, Mapping[str, Any]],
) -> Outcome:
    """Run the job, let `kind` strike when `after_rows` are committed, run again where the driver died, check the table.

    Raises:
        AssertionError: the table is not what was planned.
    """
    choose = np.random.default_rng(seed)
    folder = cluster.folder / f"{kind}-{seed}"
    folder.mkdir()
    uri, log = str(folder / "out.lance"), folder / "driver.log"
    argv = synthesize_args(real, generator, uri)
    orders: dict[Kind, dict[str, float]] = {
        "every_n_batches": {"die_every": int(choose.integers(5, 9))},
        "memory": {"largest_batch": 1, "largest_area": largest_area(reference) - 1},
        "straggler": {"slow_every": 4, "seconds": 3.0},
    }
    cluster.orders.give(orders.get(kind, {}))
    begin = time.monotonic()
    driver = cluster.start_verb("synthesize", argv, log)
    try:
        while committed(uri) < after_rows and driver.poll() is None:
            assert time.monotonic() - begin < JOB_SECONDS, f"nothing committed: {log.read_text()[-3000:]}"
            time.sleep(0.1)
        struck, at_fault = time.monotonic(), committed(uri)
        cluster.strike(kind, driver, choose)
        runs = 1
        if kind in ("driver", "head"):
            driver.wait()
            driver = cluster.start_verb("synthesize", argv, log)
            runs = 2
        status = driver.wait(timeout=JOB_SECONDS)
    finally:
        driver.kill()
        driver.wait()
    end = time.monotonic()
    assert status == 0, f"exit status {status}: {log.read_text()[-3000:]}"
    quarantined = quarantined_in(uri)
    check_equal(uri, reference, missing=sum(quarantined.values()))
    assert quarantined == ({"out_of_memory": 1} if kind == "memory" else {}), quarantined
    deed = {"every_n_batches": "death", "memory": "greed", "straggler": "sleep"}.get(kind, "batch")
    assert cluster.orders.count(deed) >= 1, f"no {deed} took place"
    return Outcome(
        kind=kind,
        rows_at_fault=at_fault,
        rows=committed(uri),
        runs=runs,
        seconds=end - begin,
        seconds_after_fault=end - struck,
        quarantined=quarantined,
    )
