"""Jobs on a cluster that grows: planned for its largest size, begun with what is there. No Ray is started."""

import dataclasses

import pytest

from jobs.cluster import GROWTH_VARIABLES, RayHandle, _autoscaler_limits
from jobs.synthesis_stream import StreamSettings
from jobs.synthesize import fit_to

EMPTY = RayHandle(
    num_cpus=0.0, num_gpus=0.0, max_cpus=96.0, max_gpus=8.0, seconds=1.0, joined=True, is_cluster=True
)
"""cluster.yaml before the first worker has come."""
POOL = StreamSettings(
    batch_size=8,
    num_synthesizers=8,
    gpus_per_synthesizer=1.0,
    cpus_per_synthesizer=0.5,
    cpus_per_embedder=0.3,
)


def test_an_empty_cluster_that_grows_gets_a_pool_of_one_that_may_become_eight() -> None:
    fitted = fit_to(EMPTY, POOL)
    assert (fitted.min_synthesizers, fitted.num_synthesizers) == (1, 8)
    assert dataclasses.replace(fitted, min_synthesizers=None) == POOL, "nothing else changes"


def test_a_whole_cluster_gets_the_whole_pool_at_once() -> None:
    whole = dataclasses.replace(EMPTY, num_cpus=96.0, num_gpus=8.0, node_cpus=(8.0,) * 12)
    assert not whole.grows and fit_to(whole, POOL).min_synthesizers is None
    assert dataclasses.replace(whole, num_gpus=4.0).grows and dataclasses.replace(whole, num_cpus=8.0).grows


def test_what_the_largest_size_cannot_hold_is_refused_and_nothing_less() -> None:
    with pytest.raises(ValueError, match=r"need 9.0 GPUs and the cluster has 8"):
        fit_to(EMPTY, dataclasses.replace(POOL, num_synthesizers=9))
    with pytest.raises(ValueError, match="hold 4.3 CPUs of 0"):
        fit_to(dataclasses.replace(EMPTY, max_cpus=0.0), POOL)


def test_the_largest_size_comes_from_the_variables_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GROWTH_VARIABLES["CPU"], "96")
    monkeypatch.delenv(GROWTH_VARIABLES["GPU"], raising=False)
    assert _autoscaler_limits() == {"CPU": 96.0}
    monkeypatch.setenv(GROWTH_VARIABLES["GPU"], "8")
    assert _autoscaler_limits() == {"CPU": 96.0, "GPU": 8.0}
    monkeypatch.setenv(GROWTH_VARIABLES["GPU"], "some")
    with pytest.raises(ValueError, match="FACTORY_MAX_GPUS=some: want the number of GPUs"):
        _autoscaler_limits()
