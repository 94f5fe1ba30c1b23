"""The Ray Data stream of `factory synthesize`: stages of factory.synthesis in tasks and actor pools.

    indices ▶ masks and prompts (tasks) ▶ Synthesizer pool ▶ Embedder pool ▶ fragment writers (tasks) ▶ driver

Each block holds one batch, so a retried task repeats one batch. The writers leave data files and ledger
records; the driver alone commits.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory.synthesis.stages import (
    ACCOUNTS,
    FinishSettings,
    RequestStage,
    SynthesizerSettings,
)
from jobs.observing import Stage

if TYPE_CHECKING:
    from factory.storage import IndexSet

CPUS_PER_TASK = 0.1
"""Mask and prompt tasks are short; the small share keeps them from waiting for the actors' CPUs."""
CPUS_PER_WRITER = 0.001
"""Ray Data reserves CPUs for the first stages first, of what its autoscaler asked for, which is less than there is: on two
CPUs a writer that wanted 0.1 waited until the reading had ended. Not 0: a head without CPUs is to run nothing."""
MAX_BLOCKS = 20_000
"""Blocks of one stream: past this the driver's bookkeeping per block outweighs finer retries."""
MAX_READ_TASKS = 500
"""Read tasks of one stream: the driver stores all of them before the first row."""
SHARE_SCHEMA = pa.schema([("first", pa.int64()), ("dtype", pa.string()), ("steps", pa.binary())])
"""An `IndexShare`: first index, numpy's name of the type of the steps, the steps."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Where the stream runs and how wide: execution only."""

    num_synthesizers: int = 1
    min_synthesizers: int | None = None
    """Actors to begin with where the cluster grows as they are asked for; all of them by default."""
    num_embedders: int = 1
    gpus_per_synthesizer: float = 0.0
    cpus_per_synthesizer: float = 0.9
    gpus_per_embedder: float = 0.0
    cpus_per_embedder: float = 0.3
    batch_size: int
    rows_per_fragment: int = 64
    max_tries: int = 3

    @property
    def cpus(self) -> float:
        """CPUs that the actor pools hold for the whole job."""
        return self.num_synthesizers * self.cpus_per_synthesizer + self.num_embedders * self.cpus_per_embedder

    @property
    def gpus(self) -> float:
        """GPUs that the actor pools hold for the whole job."""
        return self.num_synthesizers * self.gpus_per_synthesizer + self.num_embedders * self.gpus_per_embedder

    def _fits(self, node_cpus: Sequence[float]) -> bool:
        """Whether actors and one task find room, the largest first, each on the node with the most left."""
        left = list(node_cpus)
        shares = [self.cpus_per_synthesizer] * self.num_synthesizers
        shares += [self.cpus_per_embedder] * self.num_embedders + [CPUS_PER_TASK]
        for share in sorted(shares, reverse=True):
            place = max(range(len(left)), key=left.__getitem__)
            left[place] -= share
            if left[place] < -1e-9:
                return False
        return True

    def check(self, cluster_cpus: float, cluster_gpus: float, node_cpus: Sequence[float] = ()) -> None:
        """Refuse what would wait for ever.

        Args:
            cluster_cpus, cluster_gpus: of the whole cluster, at its largest where it grows.
            node_cpus: of each node, where all nodes are there already.

        Raises:
            ValueError: the pools need all CPUs (so that no task could ever run) or more GPUs than there are, or the
                actors fit into the cluster's sum of CPUs and not into its nodes.
        """
        if self.cpus + CPUS_PER_TASK > cluster_cpus:
            raise ValueError(
                f"num_synthesizers={self.num_synthesizers}: the actor pools hold {self.cpus:.1f} CPUs of "
                f"{cluster_cpus:.0f}, and no task could run beside them; use fewer synthesizers or more CPUs"
            )
        if node_cpus and not self._fits(node_cpus):
            raise ValueError(
                f"num_synthesizers={self.num_synthesizers}: {self.cpus_per_synthesizer} CPUs for each synthesizer and "
                f"{self.cpus_per_embedder} for each of {self.num_embedders} embedders do not fit into nodes of "
                f"{', '.join(f'{cpus:g}' for cpus in sorted(node_cpus))} CPUs; use fewer synthesizers or larger nodes"
            )
        if self.gpus > cluster_gpus:
            raise ValueError(
                f"the actor pools need {self.gpus:.1f} GPUs and the cluster has {cluster_gpus:.0f}; "
                "use fewer synthesizers, a smaller --gpus-per-synthesizer, or --device cpu"
            )


class _SynthesisActor:
    """SynthesisStage with the intent log that traces a process death to one request."""

    def __init__(
        self,
        settings: SynthesizerSettings,
        plan: Any,
        uri: str,
        max_tries: int,
        storage_options: Mapping[str, str],
    ) -> None:
        from factory.storage import IntentLog

        intents = IntentLog(uri, plan.plan_id, max_tries=max_tries, storage_options=storage_options)
        self.stage = settings.stage(plan, intents)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.stage(batch)


class _FinishActor:
    def __init__(self, settings: FinishSettings) -> None:
        self.stage = settings.stage()

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.stage(batch)


@dataclass(frozen=True, kw_only=True)
class IndexShare:
    """Increasing request indices of one block, by their steps: a byte or two each, not eight.

    Attributes:
        first: the first index.
        steps: differences of the others, of the smallest unsigned type that holds them.
    """

    first: int
    steps: np.ndarray

    @classmethod
    def of(cls, indices: np.ndarray) -> "IndexShare":
        """`indices` (N,) int64, increasing, at least one."""
        steps = np.diff(indices)
        return cls(first=int(indices[0]), steps=steps.astype(np.min_scalar_type(int(steps.max(initial=0)))))

    def row(self) -> dict[str, Any]:
        """As a row of `SHARE_SCHEMA`."""
        return {"first": self.first, "dtype": self.steps.dtype.str, "steps": self.steps.tobytes()}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "IndexShare":
        """The share of a row of `SHARE_SCHEMA`."""
        return cls(first=row["first"], steps=np.frombuffer(row["steps"], row["dtype"]))

    def indices(self) -> np.ndarray:
        """The indices again, (N,) int64."""
        return self.first + np.concatenate([[0], np.cumsum(self.steps, dtype=np.int64)])


def rows_per_block(num_requests: int, batch_size: int) -> int:
    """Requests of one block: one batch, or where that made too many blocks, the least number of whole batches."""
    num_batches = -(-num_requests // batch_size)
    batches_per_block = -(-num_batches // MAX_BLOCKS)
    return (
        batches_per_block * batch_size if batches_per_block > 1 else -(-num_requests // max(num_batches, 1))
    )


def request_source(missing: "IndexSet", block_rows: int) -> Any:
    """The Ray Data source of the stream: the indices of `missing` as one row of `SHARE_SCHEMA` for each block.

    A read task holds many rows, of which Ray makes a block each (its `override_num_blocks` being the number of
    rows): the driver stores every read task before the first may run, at a millisecond or more each.

    Args:
        missing: requests to make; never an array of all of them.
        block_rows: requests of one block.
    """
    import ray
    from ray.data.block import BlockMetadata

    rows = [IndexShare.of(block).row() for block in missing.blocks(block_rows)]
    per_task = -(-len(rows) // min(len(rows), MAX_READ_TASKS))
    tables = [
        pa.Table.from_pylist(rows[start : start + per_task], schema=SHARE_SCHEMA)
        for start in range(0, len(rows), per_task)
    ]

    def read_task(table: pa.Table) -> ray.data.ReadTask:
        metadata = BlockMetadata(
            num_rows=table.num_rows, size_bytes=table.nbytes, input_files=None, exec_stats=None
        )
        return ray.data.ReadTask(lambda: [table], metadata, schema=SHARE_SCHEMA)

    tasks = [read_task(table) for table in tables]

    class Requests(ray.data.Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ray.data.ReadTask]:
            return tasks

    return Requests()


def make_requests(shares: pa.Table, *, stage: Any) -> pa.Table:
    """Masks and prompts of the requests of `shares`; `stage`: reference to the RequestStage in the object store."""
    import ray

    make = ray.get(stage)
    return pa.concat_tables([make(IndexShare.of_row(row).indices()) for row in shares.to_pylist()])


def write_rows(
    batch: pa.Table, *, uri: str, plan_id: str, run_id: str, storage_options: Mapping[str, str]
) -> pa.Table:
    """Write finished rows as fragments with their ledger record; errors go to quarantine.

    Returns one row: the record as JSON (empty where every request failed) and the accounts of the batch.
    """
    from factory.storage import QuarantineLog, write_fragment

    failed = batch.filter(pc.is_valid(batch["error"]))
    made = batch.filter(pc.is_null(batch["error"]))
    for row in failed.select(["request_id", "request_index", "error", "error_reason"]).to_pylist():
        QuarantineLog(uri, plan_id, storage_options).add(
            row["request_id"], row["request_index"], row["error_reason"], row["error"], tries=1
        )
    record = None
    if made.num_rows:
        rows = made.drop_columns(list(ACCOUNTS))
        record = write_fragment(uri, rows, run_id=run_id, storage_options=storage_options)
    return pa.Table.from_pylist(
        [
            {
                "record": "" if record is None else record.to_json(),
                "made": made.num_rows,
                "quarantined": failed.num_rows,
                "started": pc.min(made["started"]).as_py(),
                "busy_seconds": float(pc.sum(made["seconds"]).as_py() or 0.0),
                "rejected": json.dumps(_rejected(made)),
                "last_error": failed["error"][0].as_py() if failed.num_rows else "",
            }
        ]
    )


def _rejected(rows: pa.Table) -> dict[str, int]:
    counts = pc.value_counts(rows["stream_reject_reason"].drop_null())
    return {item["values"]: item["counts"] for item in counts.to_pylist()}


def stages(settings: StreamSettings) -> tuple[Stage, ...]:
    """The stages of the stream, for its observer."""
    return (
        Stage(name="requests", operator="make_requests"),
        Stage(name="synthesizer", operator="_SynthesisActor", num_workers=settings.num_synthesizers),
        Stage(name="embedder", operator="_FinishActor", num_workers=settings.num_embedders),
        Stage(name="writer", operator="write_rows"),
    )


def stream(
    missing: "IndexSet",
    request_stage: RequestStage,
    synthesizer: SynthesizerSettings,
    finish: FinishSettings,
    settings: StreamSettings,
    *,
    uri: str,
    run_id: str,
    storage_options: Mapping[str, str],
) -> Generator[dict[str, Any], None, None]:
    """Run the stream over the missing requests; yields what `write_rows` returns, as it comes."""
    import ray

    plan = request_stage.plan
    block_rows = rows_per_block(len(missing), settings.batch_size)
    rows_per_fragment = min(settings.rows_per_fragment, max(settings.batch_size, len(missing)))
    # A read task asks for a whole CPU by default, which the actor pools may leave nobody.
    source = ray.data.read_datasource(
        request_source(missing, block_rows),
        override_num_blocks=-(-len(missing) // block_rows),
        num_cpus=CPUS_PER_TASK,
    )
    dataset = (
        source.map_batches(
            make_requests,
            fn_kwargs={"stage": ray.put(request_stage)},
            batch_size=1,  # rows of the source, each of which becomes a block
            batch_format="pyarrow",
            num_cpus=CPUS_PER_TASK,
        )
        .map_batches(
            _SynthesisActor,
            fn_constructor_args=(synthesizer, plan, uri, settings.max_tries, storage_options),
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=settings.min_synthesizers or settings.num_synthesizers,
                max_size=settings.num_synthesizers,
            ),
            num_cpus=settings.cpus_per_synthesizer,
            num_gpus=settings.gpus_per_synthesizer or None,
        )
        .map_batches(
            _FinishActor,
            fn_constructor_args=(finish,),
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=settings.num_embedders),
            num_cpus=settings.cpus_per_embedder,
            num_gpus=settings.gpus_per_embedder or None,
        )
        .map_batches(
            write_rows,
            fn_kwargs={
                "uri": uri,
                "plan_id": plan.plan_id,
                "run_id": run_id,
                "storage_options": storage_options,
            },
            batch_size=rows_per_fragment,
            batch_format="pyarrow",
            # A writer is quicker than a synthesizer, so one for each is enough.
            num_cpus=CPUS_PER_WRITER,
            compute=ray.data.TaskPoolStrategy(size=max(2, settings.num_synthesizers)),
        )
    )
    yield from dataset.iter_rows()
