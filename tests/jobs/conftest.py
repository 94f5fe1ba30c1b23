"""A small real table of phantoms and a generator folder on the shipped base, made once per session."""

import json
from pathlib import Path

import pytest

from factory.recipes import RECIPES


@pytest.fixture(scope="session")
def real_table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`real.lance` of 60 phantoms in three splits, embedded by the shipped embedder."""
    from jobs.prepare import Args, run

    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        run(Args(layout="phantom", out=str(folder / "real.lance"), num_images=60, seed=3))
    return str(folder / "real.lance")


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory, real_table: str) -> Path:
    """An untrained checkpoint of recipe `tiny`: a fresh ControlNet and adapter on the shipped base."""
    from factory.storage import open_table, real_digest

    folder = tmp_path_factory.mktemp("generator")
    loaded = RECIPES["tiny"]().generator.load()
    loaded.save(folder, {"name": "tiny", "real_digest": real_digest(open_table(real_table))})
    assert json.loads((folder / "generator.json").read_text())["recipe"]["name"] == "tiny"
    return folder
