from pathlib import Path

import pytest
import torch

from factory.training.checkpoints import (
    checkpoint_folder,
    checkpoint_steps,
    read_checkpoint,
    write_checkpoint,
)
from factory.training.run_identity import check_identity, clear_run, read_identity, write_identity


def _write(out: Path, step: int, keep: int = 2) -> None:
    tensors = {"trainable": {"w": torch.full((3, 2), float(step)).t()}, "ema": {}}
    write_checkpoint(out, step, tensors, {"step": step, "lists": [1, 2.5, "x"]}, keep=keep)


def test_round_trip_keeps_the_last(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        _write(tmp_path, step)
    assert checkpoint_steps(tmp_path) == [10, 15]
    tensors, state = read_checkpoint(tmp_path, 15)
    assert torch.equal(tensors["trainable"]["w"], torch.full((2, 3), 15.0)) and tensors["ema"] == {}
    assert state == {"step": 15, "lists": [1, 2.5, "x"]}


def test_a_half_written_checkpoint_does_not_count_and_is_removed(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    partial = checkpoint_folder(tmp_path, 10).with_name("step-00000010.partial")
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"torn")
    assert checkpoint_steps(tmp_path) == [5]
    _write(tmp_path, 10)
    assert not partial.exists() and checkpoint_steps(tmp_path) == [5, 10]


@pytest.mark.parametrize("name", ["state.pt", "trainable.safetensors", "ema.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    _write(tmp_path, 5)
    path = checkpoint_folder(tmp_path, 5) / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"step-00000005: cannot be read .* delete this folder"):
        read_checkpoint(tmp_path, 5)


def test_state_with_code_is_not_unpickled(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    torch.save({"step": Path("evil")}, checkpoint_folder(tmp_path, 5) / "state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path, 5)


def test_identity_names_what_differs(tmp_path: Path) -> None:
    identity = {
        "recipe": "tiny",
        "training": {"learning_rate": 1e-4, "seed": 0},
        "objectives": [{"weight": 1.0}],
    }
    check_identity(tmp_path, identity)  # nothing recorded yet
    write_identity(tmp_path, identity, finished_step=None)
    check_identity(tmp_path, identity)
    other = {**identity, "training": {"learning_rate": 1e-3, "seed": 0}, "objectives": [{"weight": 2.0}]}
    with pytest.raises(ValueError, match=r"objectives.0.weight was 1.0, now 2.0; training.learning_rate was 0.0001, now 0.001\. .*--overwrite"):  # fmt: skip
        check_identity(tmp_path, other)


def test_clear_run_leaves_other_files(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    write_identity(tmp_path, {"recipe": "tiny"}, finished_step=5)
    (tmp_path / "notes.txt").write_text("mine")
    clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert read_identity(tmp_path) is None
