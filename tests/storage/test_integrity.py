"""Damage is found and named: the fragment, the file, the row."""

from pathlib import Path

import numpy as np
import pytest
from storage_rows import plan_of, synthetic_rows, synthetic_table

from factory.storage import Committer, check_table, open_table, write_fragment

PLAN = plan_of()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """Three fragments of four rows."""
    uri = synthetic_table(tmp_path).uri
    with Committer(uri, plan_id=PLAN.plan_id, run_id="run") as committer:
        for start in (0, 4, 8):
            rows = synthetic_rows(PLAN, np.arange(start, start + 4), image_size=64)
            committer.add(write_fragment(uri, rows, run_id="run"))
    return uri


def data_file(uri: str, fragment: int) -> Path:
    return Path(uri) / "data" / open_table(uri).dataset.get_fragments()[fragment].metadata.files[0].path


def found(uri: str) -> list[tuple[int, str]]:
    return [(damage.fragment, damage.file) for damage in check_table(open_table(uri))]


def test_a_whole_table_has_no_damage(uri: str) -> None:
    assert found(uri) == []
    empty = synthetic_table(Path(uri).parent, "empty.lance").uri
    assert found(empty) == []


def test_missing_and_truncated_files_are_named(uri: str) -> None:
    gone, cut = data_file(uri, 0), data_file(uri, 2)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    damages = list(check_table(open_table(uri)))
    assert [(d.fragment, d.file) for d in damages] == [(0, gone.name), (2, cut.name)]
    assert "missing" in damages[0].fault and "bytes, not" in damages[1].fault


def test_a_flipped_bit_in_an_image_is_named_with_its_row(uri: str) -> None:
    row = open_table(uri).read(["request_id", "image"], "request_index = 5").to_pylist()[0]
    path = data_file(uri, 1)
    content = bytearray(path.read_bytes())
    start = content.find(row["image"])
    assert start >= 0, "images are stored as they are"
    content[start + len(row["image"]) // 2] ^= 1
    path.write_bytes(content)
    damages = list(check_table(open_table(uri)))
    assert [(d.fragment, d.file) for d in damages] == [(1, path.name)]
    assert f"image of request_id {row['request_id']}" in damages[0].fault


def test_a_file_that_cannot_be_read_is_named(uri: str) -> None:
    path = data_file(uri, 1)
    content = path.read_bytes()
    path.write_bytes(b"\xff" * len(content))
    damages = list(check_table(open_table(uri)))
    assert [(d.fragment, d.file) for d in damages] == [(1, path.name)]
    assert "cannot be read" in damages[0].fault
