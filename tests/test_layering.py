"""The import rule: arrows point one way, heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rank of each part; an import may only go to a lower rank or stay inside its own part.
RANK = {
    "schemas": 0,
    "factory.geometry": 1,
    "factory.imaging": 1,
    "factory.redaction": 1,
    "factory.version": 1,
    "factory.datasets": 3,
    "factory.storage": 2,
    "factory.sketches": 2,
    "factory.tracking": 2,
    "factory.embedding": 2,
    "factory.diffusion": 2,
    "factory.predictors": 2,
    "factory.generators": 3,
    "factory.sources": 4,
    "factory.captions": 4,
    "factory.training": 4,
    "factory.curation": 4,
    "factory.synthesis": 5,
    "factory.evaluation": 5,
    "factory.export": 5,
    "factory.report": 5,
    "factory.recipes": 6,
    "factory.assets": 7,
    "jobs": 8,
    "tune": 9,
}
ONLY_IN = {
    "ray": ("jobs", "tune"),
    "lance_ray": ("jobs", "tune"),
    "lance": ("factory.storage",),
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(module: str) -> str | None:
    candidates = [part for part in RANK if module == part or module.startswith(part + ".")]
    return max(candidates, key=len) if candidates else None


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


SOURCES = [
    path for folder in ("schemas", "factory", "jobs", "tune") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_point_left(path: Path) -> None:
    module = _module(path)
    own = _part(module)
    for name in _imports(path):
        top = name.split(".")[0]
        allowed = ONLY_IN.get(top)
        assert allowed is None or module.startswith(allowed), f"{module} imports {name}"
        other = _part(name)
        if other is None or own is None or other == own:
            continue
        if own == "tune" and other == "jobs":
            assert name.startswith("jobs.cluster"), f"{module} imports {name}: tune may use jobs.cluster only"
        elif own == "jobs" and other == "tune":
            assert module == "jobs.cli", f"{module} imports {name}: only jobs.cli may import tune"
        else:
            assert RANK[other] < RANK[own], f"{module} imports {name}: arrows point left only"


def test_every_part_has_a_rank() -> None:
    unknown = [_module(p) for p in SOURCES if _part(_module(p)) is None and _module(p) != "factory"]
    assert not unknown


def test_recipes_import_without_heavy_libraries() -> None:
    code = (
        "import sys, factory.recipes; "
        "heavy = {'torch', 'diffusers', 'transformers', 'ray', 'lance', 'mlflow', 'timm', 'faiss'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_model_code_imports_without_ray_and_lance() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['lance'] = None; "
        "import factory.recipes, factory.synthesis.synthesizer, factory.training.loop, factory.training.learners, "
        "factory.generators.latent_diffusion, factory.diffusion.denoise, factory.embedding"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
