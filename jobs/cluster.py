"""Starting Ray, or joining a cluster that runs: the one place that decides how.

Every job takes the same `--address` and `--num-cpus`. Without an address a private Ray starts on this
machine (a stale session left by a killed one is never joined) and ends with the process.
"""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

NO_PROGRESS_TIMEOUT_SECONDS = 6 * 3600
"""Ray Data fails a job that makes no progress for this long. Its default of 30 minutes would fail a job that
waits for GPUs to be granted or that computes one large batch."""
GROWTH_VARIABLES = {"CPU": "FACTORY_MAX_CPUS", "GPU": "FACTORY_MAX_GPUS"}
"""Variables of the head that say how large an autoscaling cluster may become; cluster.yaml sets them."""


@dataclass(frozen=True, kw_only=True)
class RayHandle:
    """A started or joined Ray.

    Attributes:
        num_cpus, num_gpus: what there is now.
        max_cpus, max_gpus: what an autoscaling cluster may grow to; elsewhere what there is.
        seconds: how long the start took.
        joined: it ran before, in this process or elsewhere.
        node_cpus: of each node, where the cluster does not grow.
        is_cluster: it was named by an address, so further nodes may join it.
    """

    num_cpus: float
    num_gpus: float
    max_cpus: float
    max_gpus: float
    seconds: float
    joined: bool
    is_cluster: bool
    node_cpus: tuple[float, ...] = ()

    @property
    def grows(self) -> bool:
        """Whether an autoscaler may still add to it."""
        return self.max_cpus > self.num_cpus or self.max_gpus > self.num_gpus


def is_ray_running() -> bool:
    """Whether this process already holds a Ray connection."""
    import ray

    return ray.is_initialized()


def connect(address: str | None = None, num_cpus: int | None = None, dashboard: bool = False) -> RayHandle:
    """Join the Ray at `address`, or the one this process already holds, or start a private one.

    Args:
        address: "auto", "host:port" or None. `RAY_ADDRESS` is honoured, so a submitted job joins its cluster.
        num_cpus: CPUs of a private Ray; all of the machine's by default. Not for a joined cluster.
        dashboard: whether a private Ray serves its dashboard (on loopback).

    Raises:
        ConnectionError: no cluster answers at `address`.
    """
    import ray

    start = time.perf_counter()
    address = address or os.environ.get("RAY_ADDRESS")
    joined = ray.is_initialized() or bool(address)
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        # So that a recipe given as module:function is found in the workers too.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
        )
        # At its default level every actor pool prints an "error" about constructor arguments (ray#53727).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Lance warns at every fork; Ray's are followed by an exec.
        warnings.filterwarnings("ignore", message="lance is not fork-safe")
        options = {"log_to_driver": False, "logging_level": "ERROR"}
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                **options,
            )
    resources, growth = ray.cluster_resources(), _autoscaler_limits() if address else {}
    num_cpus, num_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    return RayHandle(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_cpus=max(num_cpus, growth.get("CPU", 0.0)),
        max_gpus=max(num_gpus, growth.get("GPU", 0.0)),
        seconds=time.perf_counter() - start,
        joined=joined,
        is_cluster=bool(address),
        node_cpus=() if growth else tuple(_node_cpus()),
    )


def _node_cpus() -> Iterator[float]:
    import ray

    for node in ray.nodes():
        if node["Alive"] and (cpus := node["Resources"].get("CPU", 0.0)):
            yield cpus


def _autoscaler_limits() -> Mapping[str, float]:
    """Resources of the cluster at its largest; empty where nothing says that it grows.

    From `GROWTH_VARIABLES`: Ray keeps a place for what its autoscaler was told, and its own autoscalers leave it empty.

    Raises:
        ValueError: a variable that is no number.
    """
    from ray._private.state import state

    found: dict[str, float] = {}
    for resource, name in GROWTH_VARIABLES.items():
        value = os.environ.get(name, "")
        try:
            found |= {resource: float(value)} if value else {}
        except ValueError as error:
            raise ValueError(
                f"{name}={value}: want the number of {resource}s of the cluster at its largest"
            ) from error
    return found or state.get_max_resources_from_cluster_config() or {}


@contextlib.contextmanager
def start_ray(address: str | None = None, num_cpus: int | None = None) -> Iterator[RayHandle]:
    """`connect`, and shut down at the end if this call started it."""
    import ray

    held_before = ray.is_initialized()
    handle = connect(address, num_cpus)
    try:
        yield handle
    finally:
        if not held_before:
            ray.shutdown()


def configure_data(preserve_order: bool = False) -> None:
    """Ray Data settings every job wants; must run before a Dataset is made."""
    import ray

    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = preserve_order
    context.execution_options.verbose_progress = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_operator_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_SECONDS
