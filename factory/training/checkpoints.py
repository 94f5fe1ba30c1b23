"""Checkpoints of a training run, for exact resume: written whole or not at all, the last few kept.

    OUT/checkpoints/step-00000200/
        trainable.safetensors            trained parameters
        ema.safetensors                  their moving averages
        state.pt                         optimizer, position; tensors and plain values only

A checkpoint is a folder that appears by one rename after its files reached the disk, so a process killed at
any moment leaves the previous ones whole. Random numbers need no saving: they are functions of (seed, step).
"""

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from factory.training.run_identity import PARTIAL, sync

_PREFIX = "step-"


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return out / "checkpoints" / f"{_PREFIX}{step:08d}"


def checkpoint_steps(out: Path) -> list[int]:
    """Steps of the complete checkpoints below `out`, ascending."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())


def write_checkpoint(
    out: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint atomically and delete all but the latest `keep`.

    Args:
        out: the run's folder.
        step: updates done.
        tensors: one safetensors file per entry, by file stem.
        state: tensors and plain values, for `state.pt`.
        keep: at least 1.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = checkpoint_folder(out, step)
    partial = final.with_name(final.name + PARTIAL)
    _remove_partial(out)
    partial.mkdir(parents=True)
    for stem, named in tensors.items():
        contiguous = {name: tensor.detach().contiguous() for name, tensor in named.items()}
        save_file(contiguous, partial / f"{stem}.safetensors")
    torch.save(dict(state), partial / "state.pt")
    for path in partial.iterdir():
        sync(path)
    sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)
    for old in checkpoint_steps(out)[:-keep]:
        shutil.rmtree(checkpoint_folder(out, old))
    return final


def read_checkpoint(
    out: Path, step: int, stems: tuple[str, ...] = ("trainable", "ema")
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and state of `write_checkpoint`, on the CPU.

    Raises:
        ValueError: a file is missing or damaged; names the folder and what to do.
    """
    folder = checkpoint_folder(out, step)
    try:
        tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in stems}
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder}: cannot be read ({error}); delete this folder to resume from the checkpoint before it"
        ) from error
    return tensors, state


def _remove_partial(out: Path) -> None:
    for path in (out / "checkpoints").glob(f"{_PREFIX}*{PARTIAL}"):
        shutil.rmtree(path)
