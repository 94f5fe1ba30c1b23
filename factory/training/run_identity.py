"""What the run in a folder computes: recorded in `OUT/training.json`, so that only the same run is continued."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

IDENTITY_FILE = "training.json"
PARTIAL = ".partial"
"""Suffix of what is being written and will get its name by a rename."""


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, written atomically."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    sync(partial)
    partial.replace(path)


def read_identity(out: Path) -> dict[str, Any] | None:
    """What an earlier run in `out` recorded by `write_identity`, or None."""
    path = out / IDENTITY_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); use --overwrite to start again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: want a JSON object; use --overwrite to start again")
    return record


def write_identity(out: Path, identity: Mapping[str, Any], *, finished_step: int | None) -> None:
    """Record what the run in `out` computes, and up to which step it is finished (None: not yet)."""
    write_json(out / IDENTITY_FILE, {"identity": dict(identity), "finished_step": finished_step})


def check_identity(out: Path, identity: Mapping[str, Any]) -> None:
    """A run is only continued by one that computes the same.

    Raises:
        ValueError: the run recorded in `out` differs; names each field that does, with both values.
    """
    record = read_identity(out)
    if record is None:
        return
    earlier = dict(_flat(record.get("identity", {})))
    wanted = dict(_flat(identity))
    names = sorted(name for name in earlier | wanted if earlier.get(name) != wanted.get(name))
    if names:
        changes = "; ".join(
            f"{name} was {earlier.get(name, 'not set')!r}, now {wanted.get(name, 'not set')!r}"
            for name in names[:8]
        )
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(
            f"--out {out}: holds a run of another identity: {changes}{more}. "
            "Choose another --out, or --overwrite to discard it"
        )


def clear_run(out: Path) -> None:
    """Delete what a training run wrote below `out`, and nothing else."""
    for name in ("checkpoints", "samples", "controlnet", "unet", "unet_lora", ".ray"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in (IDENTITY_FILE, "metrics.jsonl", "generator.json"):
        (out / name).unlink(missing_ok=True)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        for position, item in enumerate(value):
            yield from _flat(item, f"{prefix}.{position}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
