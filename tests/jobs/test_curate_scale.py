"""Duplicates by `factory curate` at scale: clustered equals exact, a grown table equals one curated from scratch."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factory.curation.link_store import LinkSettings
from factory.embedding import EmbedderSpec
from factory.imaging import encode_png
from factory.storage import open_table, write_table
from jobs import cli, curation_duplicates
from jobs.curate import Args, CurationResult, print_result, run
from jobs.curation_duplicates import DuplicateFindings, Search, find_duplicates_among
from schemas.request import SynthesisPlan
from schemas.sample import RealSample, SyntheticSample, real_schema, synthetic_schema, table_of

DIM = 6
LABELS = ("benign", "malignant")
PLAN = SynthesisPlan(recipe="tiny", fingerprint="f", weights={}, real_digest="r", labels=LABELS)
SPEC = EmbedderSpec(name="tiny", weights_digest="d" * 32, dim=DIM, size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
METADATA = {"class_names": json.dumps(LABELS), "embedder": SPEC.to_json()}
LINKS = LinkSettings(embedder="tiny", limits={"benign": 0.97})
PNG = encode_png(np.zeros((8, 8), np.uint8))


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def continuous(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(count, DIM)) / np.sqrt(np.arange(1, DIM + 1)) + 0.4)


def search(vectors: np.ndarray, folder: Path, how: Search, **given: Any) -> DuplicateFindings:
    count = len(vectors)
    folder.mkdir(parents=True, exist_ok=True)
    return find_duplicates_among(
        given.get("ids", [f"{k:032x}" for k in range(count)]),
        vectors,
        given.get("members", np.ones(count, bool)),
        given.get("rank", np.arange(count)),
        np.full(count, 0.97, np.float32),
        LINKS,
        how,
        folder,
    )


# ------------------------------------------------------------------------------------------ Ray


def test_ray_tasks_find_what_exact_search_finds(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import dedup_clusters

    monkeypatch.setattr(dedup_clusters, "_ROWS_PER_TASK", 900)
    vectors = continuous(3000)
    members = np.random.default_rng(0).random(3000) < 0.8
    rank = np.random.default_rng(1).permutation(3000)
    exact = search(vectors, tmp_path / "exact", Search(method="exact"), members=members, rank=rank)
    assert exact.recall is None and exact.method == "exact" and exact.num_links > 3000
    for seed in (0, 5):
        how = Search(method="clustered", seed=seed, max_probes=1000, recall_rows=300)
        found = search(vectors, tmp_path / str(seed), how, members=members, rank=rank)
        assert found.method == "clustered" and found.num_links == exact.num_links
        assert (found.kept == exact.kept).all()
        assert found.recall is not None and found.recall.value == 1.0 and found.recall.pairs > 300
        assert found.clusters is not None and found.clusters.num_cells == 110


def test_lost_pairs_are_measured_and_told(ray_local: None, tmp_path: Path) -> None:
    vectors = continuous(3000, seed=2)
    found = search(vectors, tmp_path / "work", Search(method="clustered", max_probes=1, recall_rows=1000))
    exact = search(vectors, tmp_path / "exact", Search(method="exact"))
    assert found.recall is not None and found.recall.value is not None
    assert (
        found.recall.value == pytest.approx(found.num_links / exact.num_links, abs=0.05)
        and found.recall.value < 0.99
    )
    assert any("pairs are missed" in line for line in found.lines())


def test_a_grown_table_is_searched_for_new_pairs_by_cells_too(ray_local: None, tmp_path: Path) -> None:
    vectors = continuous(2000, seed=3)
    old = np.sort(np.random.default_rng(0).permutation(2000)[:1500])
    ids = [f"{k:032x}" for k in range(2000)]
    how = Search(method="clustered", max_probes=1000, links_folder=tmp_path / "links", recall_rows=200)
    first = search(vectors[old], tmp_path / "a", how, ids=[ids[k] for k in old])
    grown = search(vectors, tmp_path / "b", how)
    exact = search(vectors, tmp_path / "c", Search(method="exact"))
    assert first.reused == 0 and grown.reused == 1500
    assert (grown.kept == exact.kept).all() and grown.num_links == exact.num_links
    assert grown.recall is not None and grown.recall.value == 1.0
    asked = search(vectors, tmp_path / "d", dataclasses.replace(how, method="exact"))
    assert asked.reused == 0 and any("found by clustered search" in note for note in asked.notes)


# ------------------------------------------------------------------------------------------ incremental


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_grown_table_equals_one_from_scratch_whatever_the_verdicts(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Rows arrive in three rounds, and verdicts come and go between them."""
    seed = data.draw(st.integers(0, 1 << 20))
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(120, 3)))
    arrival = rng.integers(3, size=120)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # the same example may be tried again
    how = Search(method="exact", links_folder=folder / "links")
    for turn in range(3):
        there = np.flatnonzero(arrival <= turn)
        ids = [f"{k:032x}" for k in there]
        members = rng.random(len(there)) < data.draw(st.sampled_from([0.2, 0.6, 1.0]))
        rank = rng.permutation(len(there))
        given_rows: dict[str, Any] = {"ids": ids, "members": members, "rank": rank}
        grown = search(vectors[there], folder / "work", how, **given_rows)
        scratch = search(
            vectors[there],
            folder / "work",
            dataclasses.replace(how, from_scratch=True, links_folder=None),
            **given_rows,
        )
        assert grown.reused == (arrival < turn).sum()
        assert (grown.kept == scratch.kept).all() and grown.num_links == scratch.num_links


def test_only_new_rows_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = continuous(400)
    how = Search(method="exact", links_folder=tmp_path / "links")
    search(vectors[:390], tmp_path / "w", how)
    asked: list[int] = []
    real = curation_duplicates.linked_pairs

    def watched(*args, fresh: np.ndarray, **more):  # type: ignore[no-untyped-def]
        asked.append(int(fresh.sum()))
        return real(*args, fresh=fresh, **more)

    monkeypatch.setattr(curation_duplicates, "linked_pairs", watched)
    search(vectors, tmp_path / "w", how)
    search(vectors, tmp_path / "w", how)
    search(vectors, tmp_path / "w", dataclasses.replace(how, from_scratch=True))
    assert asked == [10, 0, 400]


def test_more_links_than_are_kept_start_from_scratch_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation_duplicates, "MAX_LINKS", 100)
    vectors = np.repeat(continuous(5), 40, axis=0)
    how = Search(method="exact", links_folder=tmp_path / "links")
    found = search(vectors, tmp_path / "w", how)
    assert len(set(found.kept.tolist())) <= 5 and found.num_links >= 5 * 40 * 39 // 2
    assert "starts from scratch" in found.notes[0] and search(vectors, tmp_path / "w", how).reused == 0


def test_the_method_follows_the_number_of_new_pairs() -> None:
    choose = curation_duplicates._method
    assert choose(Search(), 50_000, 50_000) == "exact"
    assert choose(Search(), 10**6, 10**6) == "clustered"
    assert choose(Search(), 1000, 10**6) == "exact", "few new rows"
    assert choose(Search(method="clustered"), 5, 5) == "clustered"
    assert Search(memory_bytes=4 << 20).keeps_in_memory(600, 384)
    assert not Search(memory_bytes=4 << 20).keeps_in_memory(1000, 384)
    for bad in ({"memory_bytes": 10}, {"max_probes": 0}, {"recall_rows": 0}):
        with pytest.raises(ValueError, match="--"):
            Search(**bad)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ the verb


def write_real(uri: Path, vectors: np.ndarray, labels: Sequence[int]) -> str:
    samples = [
        RealSample(
            image_id=f"{k:032x}", dataset="phantom", source_path=f"{k}.png", group_id=f"g{k}", split="train",
            label=label, label_name=LABELS[label], image=PNG, mask=None, height=8, width=8, licence="CC0",
            allowed_use="tests", embedding=tuple(vector.tolist()),
        )
        for k, (vector, label) in enumerate(zip(vectors, labels))
    ]  # fmt: skip
    write_table(str(uri), table_of(samples, real_schema(DIM)), real_schema(DIM), metadata=METADATA)
    return str(uri)


def write_synthetic(uri: Path, vectors: np.ndarray, stream: Sequence[str | None] | None = None) -> str:
    samples = []
    for k, vector in enumerate(vectors):
        request = PLAN.request_at(k)
        samples.append(
            SyntheticSample(
                request_id=request.request_id, plan_id=PLAN.plan_id, request_index=k, attempt=0, recipe="tiny",
                fingerprint="f", weights={}, seed=0, label=request.label_index, label_name=request.label, prompt="",
                requested_mask=None, mask=None, image=PNG, height=8, width=8, licence="CC0", num_inference_steps=1,
                guidance_scale=1.0, batch_size=1, embedding=tuple(vector.tolist()), code_version="0",
                stream_reject_reason=None if stream is None else stream[k],
            )
        )  # fmt: skip
    schema = synthetic_schema(DIM)
    write_table(str(uri), table_of(samples, schema), schema, metadata=METADATA)
    return str(uri)


def curate(table: str, real: str, **more: object) -> CurationResult:
    return run(Args(table=table, real=real, copy_test=False, num_threads=1, **more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Benign images are far from each other, malignant ones close."""
    vectors = np.concatenate(
        [unit(np.random.default_rng(0).normal(size=(20, DIM))), continuous(60, seed=9) ** 1]
    )
    vectors[20:] = unit(vectors[20:] + 2)
    return write_real(tmp_path_factory.mktemp("scale") / "real.lance", vectors, [0] * 20 + [1] * 60)


@pytest.fixture(autouse=True)
def tracking_of_the_module(
    tracking_in_tmp: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tracking store for all tests here: making one takes seconds."""
    folder = tmp_path_factory.getbasetemp() / "curate_scale_tracking"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


def verdicts(uri: str) -> dict[str, tuple]:
    names = ["request_id", "reject_reason", "accepted", "duplicate_of"]
    return {row["request_id"]: tuple(row.values()) for row in open_table(uri).read(names).to_pylist()}


def test_exact_clustered_and_a_tight_memory_budget_agree(ray_local: None, real: str, tmp_path: Path) -> None:
    vectors = continuous(1500, seed=4)
    found = {}
    choices: dict[str, dict[str, Any]] = {
        "exact": {"method": "exact"},
        "mapped": {"method": "exact", "memory_budget": 0.001},
        "clustered": {"method": "clustered", "max_probes": 1000, "work_dir": str(tmp_path / "work")},
    }
    for name, more in choices.items():
        uri = write_synthetic(tmp_path / f"{name}.lance", vectors)
        result = curate(uri, real, duplicate_similarity=0.98, **more)
        found[name] = verdicts(uri)
        assert result.rejected["duplicate_of_synthetic"] > 300
        record = json.loads(open_table(uri).metadata["curation.curated-1"])["deduplication"]
        assert record["method"] == ("clustered" if name == "clustered" else "exact")
        assert record["recall"] == (1.0 if name == "clustered" else None)
    assert found["exact"] == found["mapped"] == found["clustered"]
    assert list((tmp_path / "work").iterdir()) == [], "work files are removed"
    beside = tmp_path / "mapped.lance.ledger"
    assert (beside / "curation").is_dir() and not list(beside.glob("curation-*")), "only links are kept"


def test_curating_a_table_again_takes_the_links_from_before(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = write_synthetic(tmp_path / "synthetic.lance", continuous(300))
    first = curate(uri, real, duplicate_similarity=0.97)
    before = verdicts(uri)
    print_result(curate(uri, real, duplicate_similarity=0.97))
    assert "links among 300 rows taken from the last curation" in capsys.readouterr().out
    assert verdicts(uri) == before and first.rejected["duplicate_of_synthetic"] > 20
    print_result(curate(uri, real, duplicate_similarity=0.96))
    assert "not used: other thresholds" in capsys.readouterr().out
    assert curate(uri, real, duplicate_similarity=0.97, from_scratch=True).duplicates.reused == 0  # type: ignore[union-attr]


def test_thresholds_per_class(real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows 0 and 2 are benign, 1 and 3 malignant: pairs of cosine 0.95 within each class."""
    angle = float(np.arccos(0.95))
    plane = np.zeros((4, DIM), np.float32)
    plane[0, 0] = plane[1, 2] = 1
    plane[2, :2] = np.cos(angle), np.sin(angle)
    plane[3, 2:4] = np.cos(angle), np.sin(angle)
    uri = write_synthetic(tmp_path / "synthetic.lance", plane)
    assert [PLAN.request_at(k).label_index for k in range(4)] == [0, 1, 0, 1]
    command = ["curate", uri, "--real", real, "--no-copy-test", "--duplicate-similarity"]
    assert cli.main([*command, "benign=0.97,malignant=0.94"]) == 0
    assert "duplicates: cosine ≥ benign 0.9700, malignant 0.9400" in capsys.readouterr().out
    accepted = {
        row["request_index"] for row in open_table(uri).read(["request_index"], "accepted").to_pylist()
    }
    assert accepted == {0, 1, 2}
    record = json.loads(open_table(uri).metadata["curation.curated-1"])
    assert record["duplicate_similarity"] is None
    assert record["duplicate_limits"] == {"benign": 0.97, "malignant": 0.94}
    for bad in ("benig=0.9", "benign=2", "0.9,benign=0.8", "benign=0.9,benign=0.8", "high"):
        assert cli.main([*command, bad]) == 2
        assert "--duplicate-similarity" in capsys.readouterr().err


def test_thresholds_per_class_come_from_the_real_images_of_the_class(real: str, tmp_path: Path) -> None:
    uri = write_synthetic(tmp_path / "synthetic.lance", continuous(40))
    result = curate(uri, real, duplicate_per_class=True, duplicate_quantile=0.5)
    assert result.duplicate_limits["malignant"] > result.duplicate_limits["benign"] + 0.01
    assert result.duplicate_similarity is None
    few = write_real(tmp_path / "few.lance", continuous(30), [0] * 27 + [1] * 3)
    result = curate(uri, few, duplicate_per_class=True, duplicate_quantile=0.5)
    assert any("class malignant: 3 groups" in note for note in result.notes)


def test_the_floor_is_told_and_kept_where_asked(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All malignant rows (odd) are one picture; two of them the stream rejected."""
    vectors = unit(np.random.default_rng(3).normal(size=(20, DIM)))
    vectors[1::2] = vectors[1]
    stream: list[str | None] = [None] * 20
    stream[3] = stream[5] = "blank_image"
    uri = write_synthetic(tmp_path / "synthetic.lance", vectors, stream)
    print_result(curate(uri, real, duplicate_similarity=0.999))
    out = capsys.readouterr().out
    assert "WARNING: class malignant: 1 of 10 rows accepted (10%), less than --min-share 25%" in out
    assert "duplicate_of_synthetic 7, blank_image 2" in out
    floors = json.loads(open_table(uri).metadata["curation.curated-1"])["floors"]
    assert [(f["label"], f["accepted"], f["kept"], f["met"]) for f in floors] == [("malignant", 1, 0, False)]
    result = curate(uri, real, duplicate_similarity=0.999, floor="keep")
    assert result.by_class["malignant"]["accepted"] == 3 and result.floors[0].is_met
    kept = (
        open_table(uri)
        .read(["request_index", "duplicate_of"], "accepted AND label_name = 'malignant'")
        .to_pylist()
    )
    assert [row["request_index"] for row in kept] == [1, 7, 9]
    assert [row["duplicate_of"] for row in kept] == [
        None,
        PLAN.request_at(1).request_id,
        PLAN.request_at(1).request_id,
    ]
    assert json.loads(open_table(uri).metadata["curation.curated-2"])["floors"][0]["kept"] == 2


def test_options_that_do_not_go_together_are_named(real: str, tmp_path: Path) -> None:
    uri = write_synthetic(tmp_path / "synthetic.lance", continuous(4))
    with pytest.raises(ValueError, match="only with --rejudge"):
        curate(uri, real, threshold=("SimilarityBand.upper=1",))
    with pytest.raises(ValueError, match="records no plan"):
        curate(uri, real, rejudge=True)
    with pytest.raises(ValueError, match="--min-share"):
        curate(uri, real, min_share=2.0)
