"""Trained mask models as folders: a manifest and safetensors weights. No torch.

mask_model.json      kind, model, classes with lesions, recipe, steps, training, digest of the real rows
model.safetensors    averaged weights of the network that draws masks
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.identity import digest_file, hash_parts

MASK_MANIFEST = "mask_model.json"
WEIGHTS = "model.safetensors"


def read_mask_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """`mask_model.json` of a folder that `factory train --part KIND` wrote.

    Raises:
        FileNotFoundError: there is none; says which command makes it.
        ValueError: it is damaged, or of another kind of model.
    """
    path = Path(folder) / MASK_MANIFEST
    for file in (path, path.with_name(WEIGHTS)):
        if not file.is_file():
            raise FileNotFoundError(
                f"masks.checkpoint={folder}: no {file.name} there; `factory train --part {kind} --recipe RECIPE --real REAL "
                "--out FOLDER` makes it, then give --masks.checkpoint FOLDER"
            )
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); the folder is damaged") from error
    missing = {"kind", "model", "classes"} - set(manifest)
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; not the manifest of a mask model")
    if manifest["kind"] != kind:
        raise ValueError(f"{path}: a model of kind {manifest['kind']}, wanted {kind}")
    return manifest


def check_mask_model(folder: Path, kind: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a model with exactly these fields (canonical form).

    Raises:
        FileNotFoundError, ValueError: as `read_mask_manifest`, or naming the fields that differ.
    """
    manifest = read_mask_manifest(folder, kind)
    found = manifest["model"]
    differences = [
        f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(set(found) | set(wanted))
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"masks.checkpoint={folder}: another model: {'; '.join(differences)}")
    return manifest


def mask_model_digest(folder: Path, kind: str) -> str:
    """Digest of what the model computes: its weights and the order of its classes.

    Raises:
        FileNotFoundError, ValueError: as `read_mask_manifest`.
    """
    manifest = read_mask_manifest(folder, kind)
    return hash_parts(kind, *manifest["classes"], digest_file(Path(folder) / WEIGHTS))
