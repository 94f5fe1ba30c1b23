"""Identity: what is computed, as opposed to where and how fast.

A component's fingerprint is a hash of its class and of every field that changes what it computes. Fields
that only say where or how fast (paths, batch sizes, devices) are declared with `execution_field` and never
enter it. Weights enter by the digest of their bytes, never by their path.
"""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_EXECUTION = "execution"
DIGEST_LENGTH = 32
"""Hex characters kept of a SHA-256: 128 bits."""


def execution_field(
    default: Any = dataclasses.MISSING, *, default_factory: Callable[[], Any] | None = None
) -> Any:
    """A dataclass field that says where or how fast, and so does not enter the fingerprint."""
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata={_EXECUTION: True})
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={_EXECUTION: True})
    return dataclasses.field(default=default, metadata={_EXECUTION: True})


def canonical(value: Any) -> Any:
    """`value` as plain JSON data that is equal for equal identities.

    Dataclasses become `{"type": qualified name, field: …}` without their execution fields; tuples become
    lists; mappings are sorted by key; enums become their value.

    Raises:
        TypeError: `value` holds something with no stable form (a path, a function, an array, a set).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: canonical(getattr(value, f.name)) for f in identity_fields(value)}
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, enum.Enum):
        return canonical(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise TypeError(f"{value} has no place in an identity; use a finite number or None")
        return value
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): canonical(value[key]) for key in sorted(value, key=str)}
    raise TypeError(
        f"a {type(value).__name__} cannot enter a fingerprint; declare the field with execution_field() "
        "if it only says where or how fast"
    )


def identity_fields(component: Any) -> tuple[dataclasses.Field, ...]:
    """The fields of a dataclass that enter its fingerprint."""
    return tuple(f for f in dataclasses.fields(component) if not f.metadata.get(_EXECUTION))


def fingerprint(value: Any) -> str:
    """Hash of what `value` computes: 32 hex characters, stable over processes and machines."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hash_parts(text)


def hash_parts(*parts: str | bytes | int) -> str:
    """Hash of a sequence of parts, each length-prefixed so that ('ab', 'c') and ('a', 'bc') differ."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()[:DIGEST_LENGTH]


def digest_file(path: Path) -> str:
    """Hash of a file's bytes, read in blocks of one MiB."""
    state = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()[:DIGEST_LENGTH]


def digest_files(root: Path, names: Iterable[str]) -> str:
    """Hash of named files below `root`: names and bytes, independent of the order given."""
    root = Path(root)
    parts: list[str] = []
    for name in sorted(names):
        parts += [name, digest_file(root / name)]
    return hash_parts(*parts)


def random_generator(identity: str, stream: str) -> np.random.Generator:
    """The numpy generator that belongs to one identity (a request_id) and one named stream of draws.

    Streams are independent: drawing more from "mask" never changes what "prompt" draws.
    """
    seed = int.from_bytes(hashlib.sha256(f"{identity}/{stream}".encode()).digest(), "big")
    return np.random.Generator(np.random.PCG64(seed))


def torch_seed(identity: str, stream: str) -> int:
    """A 63-bit seed for a `torch.Generator`, by the same rule as `random_generator`."""
    return int.from_bytes(hashlib.sha256(f"{identity}/{stream}".encode()).digest()[:8], "big") >> 1
