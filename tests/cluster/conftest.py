"""The several-node cluster of the fault tests, and what they synthesize from."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.jobs.conftest import generator_folder, real_table

if TYPE_CHECKING:
    from tests.cluster.faults import FaultCluster

__all__ = ["generator_folder", "real_table"]


@pytest.fixture(scope="session")
def fault_cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[FaultCluster]":
    """A head and two nodes, started by the first case and healed before each.

    Of five CPUs each: a training worker of three finds room on each beside the stream of a synthesis, and no two on one.
    """
    from tests.cluster.faults import FaultCluster

    with FaultCluster(tmp_path_factory.mktemp("faults"), cpus_per_node=5) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def reference(real_table: str, generator_folder: Path) -> dict[str, dict[str, Any]]:
    """What a run without a fault makes, by request_id."""
    from tests.cluster.faults import reference_rows

    return reference_rows(real_table, str(generator_folder))
