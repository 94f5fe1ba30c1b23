"""Fingerprints: stable, sensitive to what is computed, blind to where it runs."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.identity import (
    canonical,
    digest_files,
    execution_field,
    fingerprint,
    hash_parts,
    random_generator,
    torch_seed,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Component:
    name: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()
    path: str = execution_field("/here")


def test_execution_fields_do_not_enter() -> None:
    assert fingerprint(Component()) == fingerprint(Component(path="/there"))


@pytest.mark.parametrize(
    "change", [{"name": "b"}, {"sizes": (1, 2, 3)}, {"inner": Inner(scale=2.0)}], ids=lambda c: next(iter(c))
)
def test_identity_fields_enter(change: dict) -> None:
    assert fingerprint(Component()) != fingerprint(replace(Component(), **change))


def test_the_class_enters() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other:
        scale: float = 1.0

    assert fingerprint(Inner()) != fingerprint(Other())


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from schemas.identity import fingerprint; print(fingerprint({'b': (1, 2.5), 'a': None}))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == fingerprint({"a": None, "b": [1, 2.5]})


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("x"), {1, 2}, np.zeros(2), len])
def test_values_without_stable_form_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical(value)


@given(st.lists(st.text(), min_size=2, max_size=4))
def test_hash_parts_is_length_prefixed(parts: list[str]) -> None:
    joined = [parts[0] + parts[1], *parts[2:]]
    assert hash_parts(*parts) != hash_parts(*joined)


def test_streams_are_independent() -> None:
    first = random_generator("id", "mask")
    first.random(1000)
    assert random_generator("id", "prompt").random() == random_generator("id", "prompt").random()
    assert random_generator("id", "mask").random() != random_generator("id", "prompt").random()
    assert torch_seed("id", "noise") != torch_seed("other", "noise") < 1 << 63


def test_digest_files_sees_bytes_and_names_but_not_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    before = digest_files(tmp_path, ["a", "b"])
    assert before == digest_files(tmp_path, ["b", "a"])
    (tmp_path / "b").write_text("3")
    assert before != digest_files(tmp_path, ["a", "b"])
