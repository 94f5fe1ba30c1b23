"""The demo: its folder can be resumed and never mixed up, and its report says what the tables say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import geometry
from factory.curation.planted import Power
from factory.imaging import encode_png
from jobs import demo, demo_report
from jobs.curate import CurationResult, NearestPair
from jobs.curation_closeness import ClosenessFinding
from jobs.synthesize import SynthesisResult
from schemas.sample import (
    RealSample,
    SyntheticSample,
    curation_schema,
    real_schema,
    synthetic_schema,
    table_of,
)

DIM = 8


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no path"):
        demo.Args(data=("phantom", "x"))
    with pytest.raises(ValueError, match="want `phantom`, or a layout and one path"):
        demo.Args(data=("busi",))
    with pytest.raises(ValueError, match="--num-requests 0"):
        demo.Args(num_requests=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        demo.open_folder(demo.Args(data=("busi", str(tmp_path / "nowhere")), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_folder_is_gone_on_with_only_under_the_same_settings(tmp_path: Path) -> None:
    out = str(tmp_path / "demo")
    demo.open_folder(demo.Args(out=out))
    demo.open_folder(demo.Args(out=out, num_requests=999))
    with pytest.raises(ValueError, match=r"holds a demo with seed 0, not 1; use --fresh"):
        demo.open_folder(demo.Args(out=out, seed=1))
    demo.open_folder(demo.Args(out=out, seed=1, fresh=True))
    demo.open_folder(demo.Args(out=out, seed=1))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="something other than a demo"):
            demo.open_folder(demo.Args(out=str(tmp_path), fresh=fresh))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_starting_over_removes_what_a_demo_made_and_nothing_else(tmp_path: Path) -> None:
    out = demo.open_folder(demo.Args(out=str(tmp_path / "demo")))
    for name in ("real.lance", "real.lance.cache", "synthetic.lance.ledger", "generator", "mine"):
        (out / name).mkdir()
        (out / name / "file").write_text("x")
    (out / "report.html").write_text("x")
    demo.open_folder(demo.Args(out=str(out), fresh=True))
    assert {path.name for path in out.iterdir()} == {"mine", demo.STATE_FILE}


def test_fixed_time_never_exceeds_its_stage(capsys: pytest.CaptureFixture[str]) -> None:
    clock = demo.Clock()
    with clock.stage("start") as stage:
        stage.fixed = float("inf")
    assert clock.stages[0].fixed == clock.stages[0].seconds < 1
    assert "── start" in capsys.readouterr().out


def test_balanced_takes_turns_between_values() -> None:
    rows = [{"label_name": "a", "n": n} for n in range(5)] + [{"label_name": "b", "n": 9}]
    chosen = demo_report.balanced(rows, 3)
    assert [(row["label_name"], row["n"]) for row in chosen] == [("a", 0), ("a", 1), ("b", 9)]
    assert demo_report.balanced([], 3) == []


def test_leave_group_out_ignores_the_own_group() -> None:
    embeddings = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1]], np.float32)
    found = demo_report.leave_group_out(embeddings, ["g", "g", "h", "i"])
    assert np.allclose(found, [0.6, 0.6, 0.8, 0.8])
    assert len(demo_report.leave_group_out(embeddings, ["g"] * 4)) == 0


def unit(rng: np.random.Generator) -> tuple[float, ...]:
    vector = rng.normal(size=DIM)
    return tuple((vector / np.linalg.norm(vector)).astype(np.float32).tolist())


def make_tables(folder: Path) -> demo_report.DemoPaths:
    """A real table of 12 rows over three splits and a curated synthetic table of 6 rows."""
    from factory.storage import open_table, write_table

    rng = np.random.default_rng(0)
    mask = encode_png(geometry.ellipse((32, 32), x=15, y=14, a=6, b=4))
    real = [
        RealSample(
            image_id=f"{index:032x}",
            dataset="test",
            source_path=f"{index}.png",
            group_id=str(index),
            split=("train", "val", "test")[0 if index < 8 else index % 2 + 1],
            label=index % 2,
            label_name=("benign", "malignant")[index % 2],
            image=encode_png(rng.integers(0, 255, (32, 32), np.uint8)),
            mask=mask,
            height=32,
            width=32,
            licence="none",
            allowed_use="test",
            embedding=unit(rng),
        )
        for index in range(12)
    ]
    embedder = json.dumps({"name": "tiny", "weights_digest": "d" * 32, "dim": DIM})
    metadata = {"class_names": json.dumps(["benign", "malignant"]), "embedder": embedder}
    paths = demo_report.DemoPaths(out=folder)
    schema = real_schema(DIM)
    write_table(str(paths.real), table_of(real, schema), schema, metadata=metadata)
    verdicts = [None, None, None, "blank_image", None, None]
    synthetic = [
        SyntheticSample(
            request_id=f"{index + 100:032x}",
            plan_id="p" * 32,
            request_index=index,
            attempt=0,
            recipe="tiny",
            fingerprint="f" * 32,
            weights={"base": "w" * 32},
            seed=0,
            label=index % 2,
            label_name=("benign", "malignant")[index % 2],
            prompt="<b>bold</b>",
            requested_mask=mask,
            mask=mask,
            image=encode_png(rng.integers(0, 255, (32, 32), np.uint8)),
            height=32,
            width=32,
            licence="none",
            num_inference_steps=5,
            guidance_scale=2.0,
            batch_size=2,
            embedding=unit(rng),
            stream_reject_reason=verdict,
            code_version="0",
        )
        for index, verdict in enumerate(verdicts)
    ]
    schema = synthetic_schema(DIM)
    write_table(str(paths.synthetic), table_of(synthetic, schema), schema, metadata=metadata)
    reasons = [None, None, "near_copy_of_real", "blank_image", None, None]
    curated = {
        "request_id": [row.request_id for row in synthetic],
        "reject_reason": reasons,
        "accepted": [reason is None for reason in reasons],
        "duplicate_of": [None] * 6,
        "nearest_real": [real[index].image_id for index in range(6)],
        "nearest_real_similarity": [0.5, 0.6, 0.99, 0.1, 0.7, 0.8],
    }
    import pyarrow as pa

    columns = pa.schema([pa.field("request_id", pa.string()), *curation_schema()])
    open_table(str(paths.synthetic)).write_columns(pa.table(curated, columns), "request_id")
    paths.generator.mkdir()
    lines = [json.dumps({"step": 10 * n, "loss": 1 / n, "grad_norm": 1.0}) for n in range(1, 5)]
    (paths.generator / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return paths


def synthesis() -> SynthesisResult:
    return SynthesisResult(
        uri="synthetic.lance",
        plan_id="p" * 32,
        version=1,
        line="requested 6 = …",
        requested=6,
        committed=6,
        accepted=5,
        rejected={"blank_image": 1},
        quarantined={},
        pending=0,
        made=6,
        seconds=30.0,
        startup_seconds=10.0,
        busy_seconds=12.0,
    )


def curation() -> CurationResult:
    pairs = [
        NearestPair(
            request_id=f"{index + 100:032x}", image_id=f"{index:032x}", similarity=value, correlation=value
        )
        for index, value in ((2, 0.99), (5, 0.8), (4, 0.7))
    ]
    return CurationResult(
        uri="synthetic.lance",
        version=2,
        tag="curated-1",
        total=6,
        accepted=4,
        rejected={"near_copy_of_real": 1, "blank_image": 1},
        by_class={},
        pairs=pairs,
        duplicate_similarity=0.97,
        copy_thresholds={"frame": 0.7},
        power=Power(detected={"noise": 1.0, "crop": 0.75}, attributed=1.0, num_images=4),
        false_alarm=None,
        closeness=ClosenessFinding(outcome=None, note="too few groups"),
        seconds=1.0,
    )


def test_the_report_says_what_the_tables_say(tmp_path: Path) -> None:
    from factory.report import Bars, Cards, Gallery, Grid, Pairs, Plot, StageTime, html_report

    paths = make_tables(tmp_path)
    rows = demo_report.read_rows(paths)
    results = demo_report.DemoResults(synthesis=synthesis(), curation=curation())
    stages = [StageTime(name="train", seconds=60.0, fixed=5.0)]
    found = demo_report.sections(paths, rows, stages, results, {"look": "factory query"})
    by_title: Mapping[str, Any] = {section.title: section for section in found}
    cards = by_title["Summary"]
    assert isinstance(cards, Cards)
    values = {card.label: card.value for card in cards.cards}
    assert (
        values["synthetic images"] == "6"
        and values["accepted"] == "4"
        and values["copies of real images"] == "1"
    )
    assert values["per accepted image"] == "3.00 s", "12 busy seconds for 6 made, of which 4 accepted"
    about = {card.label: card.about for card in cards.cards}
    assert about["copies of real images"] == "found and rejected; planted copies found: 75% to 100%"
    funnel, reasons = by_title["Acceptance funnel"], by_title["Reject reasons"]
    assert isinstance(funnel, Bars) and list(funnel.counts.values()) == [6, 6, 5, 4]
    assert reasons.counts == {"near_copy_of_real": 1, "blank_image": 1}
    gallery = by_title["Synthetic images, rejected"]
    assert isinstance(gallery, Gallery)
    assert [caption.splitlines()[0] for caption in gallery.captions] == ["blank_image", "near_copy_of_real"]
    pairs = by_title["Nearest real images"]
    assert isinstance(pairs, Pairs)
    assert [round(pair.similarity, 2) for pair in pairs.pairs] == [0.99, 0.8, 0.7]
    assert pairs.pairs[0].verdict == "crops correlate 0.99 · near_copy_of_real"
    assert pairs.pairs[1].verdict == "crops correlate 0.80 · accepted"
    assert isinstance(by_title["Training loss"], Plot)
    counts = by_title["Counts"]
    assert isinstance(counts, Grid)
    assert counts.rows == [["benign", 4, 2, 0, 3, 2], ["malignant", 4, 0, 2, 3, 2]]
    text = html_report(tmp_path / "report.html", found, title="demo").read_text()
    assert "f" * 32 in text and "w" * 32 in text and "factory query" in text


def test_the_report_never_reads_the_test_split(tmp_path: Path) -> None:
    from factory.storage import open_table

    paths = make_tables(tmp_path)
    held_out = open_table(str(paths.real)).read(columns=["image_id"], filter="split = 'test'")
    shown = {row["image_id"] for row in demo_report.read_rows(paths).real}
    assert len(shown) == 8 and not shown & set(held_out["image_id"].to_pylist())


def test_commands_to_run_next_are_those_of_the_command_line(tmp_path: Path) -> None:
    import shlex

    from jobs.cli import VERBS

    args = demo.Args(out=str(tmp_path / "a b"))
    commands = demo.next_commands(args, demo_report.DemoPaths(out=Path(args.out)), "malignant", "0f3a")
    for command in commands.values():
        words = shlex.split(command.replace("\\\n", " "))
        assert words[0] == "mlflow" or (words[0] == "factory" and words[1] in VERBS)


def test_ray_started_in_the_background_outlives_its_start_and_ends_when_told() -> None:
    # A process of its own: the Ray of the test session must not be shut down.
    import subprocess
    import sys

    script = (
        "import time, ray\nfrom jobs.demo import RayInBackground\nbackground = RayInBackground(1)\n"
        "assert background.wait().num_cpus == 1\ntime.sleep(3)\n"
        "assert ray.get(ray.remote(lambda: 7).remote(), timeout=60) == 7\nbackground.close()\n"
        "assert not ray.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
