"""Lines, metrics and gauges of a running stream."""

import io
import json
import time
import urllib.request
from pathlib import Path

import pytest

from jobs.observing import Stage, StageState, StreamObserver, observing

STAGES = (Stage(name="requests", operator="Read"), Stage(name="synthesizer", operator="Slow", num_workers=2))


def test_a_report_gives_rates_of_the_window_and_counts_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    lines = io.StringIO()
    observer = StreamObserver(
        "synthesize", 100, STAGES, log=tmp_path / "log.jsonl", lines=lines, prometheus=False
    )
    clock[0] += 59
    assert not observer.observe({}) and not lines.getvalue()
    observer.add(10, {"too_far_from_real": 2})
    clock[0] += 1
    assert observer.observe({"synthesizer": StageState(rows=10, busy_seconds=60.0, running=2, queued=3)})
    observer.add(30, {"too_far_from_real": 1})
    clock[0] += 60
    assert observer.observe({"synthesizer": StageState(rows=40, busy_seconds=90.0, running=1)})
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in entries] == ["requests", "synthesizer", "all"] * 2
    assert [entries[n]["busy"] for n in (1, 4)] == [0.5, 0.25]
    assert entries[4]["rows_per_second"] == 0.5 and entries[4]["rows"] == 40 and entries[1]["queued"] == 3
    assert entries[5]["eta_seconds"] == 180 and entries[5]["rejected.too_far_from_real"] == 3
    assert "stage=all rows=40 total=100" in lines.getvalue()
    metrics = observer.take_metrics()
    assert (
        metrics["stream.synthesizer.busy"] == 0.25 and metrics["stream.all.rejected.too_far_from_real"] == 3
    )
    assert observer.take_metrics() == {}


def test_a_stream_that_has_made_nothing_has_no_time_left(tmp_path: Path) -> None:
    observer = StreamObserver(
        "x", 5, STAGES, log=tmp_path / "l", lines=None, every_seconds=0, prometheus=False
    )
    assert observer.observe({})
    last = json.loads((tmp_path / "l").read_text().splitlines()[-1])
    assert last["eta_seconds"] is None and last["rows"] == 0


def test_a_real_stream_is_seen_in_the_log_and_by_prometheus(ray_local: None, tmp_path: Path) -> None:
    import ray

    from jobs.cluster import configure_data

    class Slow:  # local, so that it travels by value
        def __call__(self, batch: dict) -> dict:
            time.sleep(0.2)
            return batch

    configure_data()
    stages = (Stage(name="numbers", operator="Read"), Stage(name="slow", operator="Slow", num_workers=1))
    observer = StreamObserver("test", 40, stages, log=tmp_path / "log.jsonl", lines=None, every_seconds=0.3)
    with observing(observer):
        data = ray.data.range(40, override_num_blocks=20).map_batches(
            Slow, batch_size=2, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.1
        )
        for _ in data.iter_rows():
            observer.add(1)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    slow = [entry for entry in entries if entry["stage"] == "slow"]
    assert len(slow) > 3 and [e["rows"] for e in slow] == sorted(e["rows"] for e in slow)
    assert 20 < slow[-1]["rows"] <= 40 and max(e["busy"] for e in slow) > 0.5
    assert max(e["queued"] + e["running"] for e in slow) > 0
    node = ray.nodes()[0]
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    for _ in range(40):
        text = urllib.request.urlopen(address, timeout=5).read().decode()
        found = [line for line in text.splitlines() if line.startswith("ray_factory_stage_rows{")]
        if any('stage="slow"' in line and 'job="test"' in line for line in found):
            return
        time.sleep(0.5)
    pytest.fail(f"no gauge of the stream at {address}: {found}")
