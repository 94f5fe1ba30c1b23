"""`factory release`: what stands in the way, what is recorded, and what leaves."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
from export_tables import write_real, write_synthetic

from factory.storage import TestAccess, open_table
from jobs.cli import main

HONEST = {"verdict": "not detected", "p_value": 0.4}


def prepared(
    folder: Path, memorisation: dict | None = HONEST, *, copy_test: bool = True
) -> tuple[str, str, list[str]]:
    """A synthetic and a real table, and the command without what it may lack."""
    synthetic, real = write_synthetic(folder), write_real(folder)
    record = {"copy_thresholds": {"frame": 0.6} if copy_test else {}, "power": None, "false_alarm": 0.0}
    metadata = {"curation.curated-1": json.dumps(record)}
    if memorisation is not None:
        metadata["memorisation.curated-1"] = json.dumps(memorisation)
    table = open_table(synthetic)
    table.set_metadata(metadata)
    argv = ["release", synthetic, "--real", real, "--name", "v1", "--out", str(folder / "v1")]
    return synthetic, real, [*argv, "--base-licence", "openrail-m"]


def test_what_stands_in_the_way_is_listed_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic, _, argv = prepared(tmp_path, {"verdict": "memorising", "p_value": 0.001}, copy_test=False)
    assert main(argv[:-2]) == 2
    error = capsys.readouterr().err
    for words in ("memorises", "searched for no copies", "--base-licence", "keep pixels of real images"):
        assert words in error
    assert not (tmp_path / "v1").exists() and "v1" not in open_table(synthetic).tags()


@pytest.mark.parametrize(
    ("memorisation", "words"),
    [(None, "was not tested"), ({"not_done": "too few groups"}, "too few groups")],
)
def test_a_test_that_was_not_done_is_no_pass(
    memorisation: dict | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, argv = prepared(tmp_path, memorisation)
    assert main(argv) == 2
    assert words in capsys.readouterr().err


def test_a_forced_release_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic, _, argv = prepared(tmp_path)
    assert main(argv) == 2, "rows on patients' backgrounds need a reason"
    assert "keep pixels" in capsys.readouterr().err
    assert main([*argv, "--force", "consent covers derived images"]) == 0
    out = capsys.readouterr().out
    assert "forced in spite of" in out and "released v1" in out
    record = json.loads((tmp_path / "v1" / "release.json").read_text())
    assert record["forced"] == "consent covers derived images" and len(record["obstacles"]) == 1
    assert record["base_licence"] == "openrail-m" and record["weights"] == {"unet": "w1"}
    assert record["real_licences"] == {"phantom — CC0-1.0 — research": 18}
    table = open_table(synthetic)
    assert json.loads(table.metadata["release.v1"]) == record
    assert open_table(synthetic, tag="v1").count() == table.count()
    for line in (tmp_path / "v1" / "checksums.sha256").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((tmp_path / "v1" / name).read_bytes()).hexdigest() == digest
    assert (tmp_path / "v1" / "README.md").is_file() and (tmp_path / "v1" / "croissant.json").is_file()
    assert main([*argv[:-4], "--out", str(tmp_path / "v2"), "--force", "again"]) == 2
    assert "choose another" in capsys.readouterr().err


def test_an_unknown_licence_and_an_uncurated_table_are_obstacles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa

    from factory.storage import write_table

    synthetic, real = write_synthetic(tmp_path, curated=False), write_real(tmp_path)
    table = open_table(real, test_access=TestAccess(opened_by="tests", reason="a copy of the table"))
    rows = [row | {"allowed_use": "unknown"} for row in table.read().to_pylist()]
    unknown = str(tmp_path / "unknown.lance")
    write_table(
        unknown, pa.Table.from_pylist(rows, schema=table.schema), table.schema, metadata=table.metadata
    )
    argv = ["release", synthetic, "--real", unknown, "--name", "v1", "--out", str(tmp_path / "v1")]
    assert main([*argv, "--base-licence", "x"]) == 2
    error = capsys.readouterr().err
    assert "was not curated" in error and "18 real training rows of phantom" in error
    assert main([*argv, "--force", " "]) == 2
    assert "want the reason" in capsys.readouterr().err
