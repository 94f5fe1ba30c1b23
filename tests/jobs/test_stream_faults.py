"""What befalls the stream itself, with stages that compute nothing: a straggler, broken storage, a full object store."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from factory.storage import Committer, FragmentRecord, IndexSet, create_table, open_table
from jobs.cli import describe, is_operator_error
from jobs.cluster import configure_data
from jobs.stream_faults import storage_faults_of_tasks
from jobs.synthesis_stream import StreamSettings, stream
from schemas.sample import synthetic_schema
from tests.jobs import idle_stages
from tests.jobs.idle_stages import DIM, LABELS, PLAN, IdleFinish, IdleRequests, IdleSynthesizer

cloudpickle.register_pickle_by_value(
    idle_stages
)  # the workers of a shared Ray may have started without tests/

pytestmark = [pytest.mark.slow]


def run_stream(
    uri: str,
    num_requests: int,
    *,
    run_id: str,
    until: str = "",
    image_bytes: int = 8,
    batch_size: int = 2,
    rows_per_fragment: int = 2,
    watch: Callable[[dict[str, Any], int], None] = lambda row, made: None,
) -> int:
    """Make what is missing of a plan through the real stream and commit it; rows adopted from an earlier run."""
    create_table(uri, synthetic_schema(DIM), metadata={"class_names": json.dumps(LABELS)})
    half = num_requests // 2
    wanted = IndexSet.of(PLAN.index_blocks({"benign": half, "malignant": num_requests - half}))
    settings = StreamSettings(
        num_synthesizers=2, cpus_per_synthesizer=0.3, cpus_per_embedder=0.3, batch_size=batch_size,
        rows_per_fragment=rows_per_fragment,
    )  # fmt: skip
    configure_data()
    made = 0
    with Committer(uri, plan_id=PLAN.plan_id, run_id=run_id, rows_per_commit=4) as committer:
        adopted = committer.adopt()
        rows: Generator[dict[str, Any], None, None] = stream(
            committer.missing(wanted), IdleRequests(plan=PLAN), IdleSynthesizer(until=until),  # type: ignore[arg-type]
            IdleFinish(plan=PLAN, image_bytes=image_bytes), settings, uri=uri, run_id=run_id, storage_options={},  # type: ignore[arg-type]
        )  # fmt: skip
        with storage_faults_of_tasks(), contextlib.closing(rows):
            for row in rows:
                committer.add(FragmentRecord.from_json(row["record"]))
                made += row["made"]
                watch(row, made)
        committer.commit()
        assert committer.audit(wanted).complete
    return adopted


def indices_in(uri: str) -> list[int]:
    return sorted(open_table(uri).read(["request_index"])["request_index"].to_pylist())


def test_a_straggler_does_not_stop_the_others(ray_local: None, tmp_path: Path) -> None:
    """One batch of 30 takes until most of the others are done; where it stopped them, that would never be."""
    uri, until = str(tmp_path / "out.lance"), tmp_path / "until"
    order: list[bool] = []

    def watch(row: dict[str, Any], made: int) -> None:
        order.append(0 in json.loads(row["record"])["request_indices"])
        if made >= 40:
            until.touch()

    run_stream(uri, 60, run_id="run", until=str(until), watch=watch)
    assert indices_in(uri) == sorted(set(indices_in(uri))) and len(indices_in(uri)) == 60
    assert order.index(True) >= 20, "others came while it was under way"


@pytest.mark.soak
def test_broken_storage_ends_the_stream_and_it_goes_on_when_mended(ray_local: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "out.lance")
    data, away = Path(uri) / "data", tmp_path / "away"

    def breaks(row: dict[str, Any], made: int) -> None:
        if made >= 8 and not away.exists():
            data.rename(away)
            while not data.is_file():
                shutil.rmtree(data, ignore_errors=True)  # a writer was faster and made it anew
                with contextlib.suppress(IsADirectoryError):
                    data.write_text("")

    with pytest.raises(OSError, match="run the same command again") as stopped:
        run_stream(uri, 200, run_id="first", watch=breaks)
    assert is_operator_error(stopped.value) and uri in describe(stopped.value)
    assert "\n" not in describe(stopped.value)
    data.unlink()
    away.rename(data)
    kept = indices_in(uri)
    assert 0 < len(kept) < 200
    run_stream(uri, 200, run_id="again")
    assert len(indices_in(uri)) == len(set(indices_in(uri))) == 200 and set(kept) <= set(indices_in(uri))


SMALL_STORE = """
import sys
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from tests.jobs.test_stream_faults import indices_in, run_stream

folder = sys.argv[1]
ray.init(address="local", num_cpus=2, object_store_memory=80_000_000, object_spilling_directory=folder + "/spilled",
         include_dashboard=False, log_to_driver=False, logging_level="ERROR")
run_stream(folder + "/out.lance", 120, run_id="run", image_bytes=1_000_000, batch_size=8, rows_per_fragment=120)
stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
print("spilled", stats.spilled_bytes_total, "restored", stats.restored_bytes_total, "store", stats.object_store_bytes_avail)
ray.shutdown()
"""


@pytest.mark.soak
def test_an_object_store_that_is_too_small_spills_and_loses_nothing(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """A fragment of 120 MB passes a store of 80 MB; Ray Data lets one batch pass every ten seconds then."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STORE, str(tmp_path)], cwd=pytestconfig.rootpath, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    spilled, available = int(words[words.index("spilled") + 1]), int(words[words.index("store") + 1])
    assert available <= 80_000_000 and spilled > 40_000_000, done.stdout
    assert indices_in(str(tmp_path / "out.lance")) == sorted(
        index for block in PLAN.index_blocks({"benign": 60, "malignant": 60}) for index in block.tolist()
    )
