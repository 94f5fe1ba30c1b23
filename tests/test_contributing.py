"""The examples in CONTRIBUTING.md are true: each is run through the interface it shows."""

import pickle
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from factory import geometry
from factory.imaging import TrainingRow
from schemas.request import SynthesisPlan

GUIDE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
MAX_LINES = 29


def example(heading: str, *modules: str) -> Mapping[str, Any]:
    """Names that the example under `heading` defines, run as if at the end of the module it belongs in."""
    import importlib
    import sys

    found = re.search(rf"^## {heading}$.*?^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"no example under {heading!r}"
    assert len(found.group(1).splitlines()) <= MAX_LINES
    module = types.ModuleType("contributed")
    for name in modules:
        module.__dict__.update(importlib.import_module(name).__dict__)
    module.__name__ = "contributed"
    sys.modules["contributed"] = module
    exec(compile(found.group(1), str(GUIDE), "exec"), module.__dict__)  # noqa: S102 - our own guide
    return module.__dict__


@pytest.fixture
def rows() -> list[TrainingRow]:
    found = []
    for index in range(8):
        mask = geometry.ellipse((32, 32), x=16, y=15, a=4 + index % 4, b=5)
        found.append(
            TrainingRow(
                image_id=f"{index:02d}",
                label=0,
                label_name="benign",
                group_id=str(index),
                image=np.full((32, 32), 100 + index, np.uint8),
                mask=mask,
                attributes={},
            )
        )
    return found


def test_mask_source(rows: list[TrainingRow]) -> None:
    source = example("Add a mask source", "factory.sources.masks")["CentredDisc"]()
    fitted = pickle.loads(pickle.dumps(source.fit(rows)))  # noqa: S301 - just written
    plan = SynthesisPlan(recipe="x", fingerprint="f", weights={}, real_digest="r", labels=("benign",))
    request = plan.request("benign", 0)
    first, again = (fitted.draw(request, np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(first.mask, again.mask)
    assert first.mask.shape == (32, 32) and geometry.area(first.mask) == pytest.approx(
        np.pi * first.parameters["radius"] ** 2, rel=0.1
    )


def test_objective() -> None:
    import torch

    names = example("Add an objective", "factory.training.objectives")
    with pytest.raises(ValueError, match="weight"):
        names["LesionPrediction"](weight=0)
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, :16, :16] = 1
    noise = torch.zeros(2, 4, 4, 4)
    wrong_outside = torch.zeros_like(noise)
    wrong_outside[:, :, 2:, 2:] = 3.0

    def loss(model_pred: torch.Tensor) -> list[float]:
        step = names["PredictionStep"](
            latents=noise,
            noise=noise,
            timesteps=torch.zeros(2, dtype=torch.int64),
            alphas_cumprod=torch.tensor([0.5]),
            prediction_type="epsilon",
            model_pred=model_pred,
            timestep_weights=torch.ones(2),
            masks=masks,
        )
        objective = names["LesionPrediction"]()
        assert objective.needs == ("masks",)
        return objective.bind(None).loss(step, None).tolist()

    assert loss(wrong_outside) == [0.0, 0.0]
    assert loss(torch.full_like(noise, 2.0)) == [4.0, 0.0]


def test_filter(rows: list[TrainingRow]) -> None:
    names = example("Add a filter", "factory.curation.filters")
    fitted = pickle.loads(pickle.dumps(names["TooDark"]().fit(rows, np.zeros((8, 4), np.float32))))  # noqa: S301 - just written
    images = [np.full((32, 32), level, np.uint8) for level in (10, 200)]
    masks = [rows[0].mask] * 2
    batch = names["FilterBatch"](
        images=images,
        requested_masks=masks,
        masks=masks,
        labels=np.zeros(2, np.int64),
        embeddings=np.zeros((2, 4), np.float32),
    )
    assert fitted.verdict(fitted.score(batch)) == ["blank_image", None]


def test_dataset_reader(tmp_path: Path) -> None:
    names = example("Add a dataset reader", "factory.datasets.layouts.stu", "factory.datasets.layout")
    (tmp_path / "benign").mkdir()
    for name in ("a (1).png", "a (1).mask.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / "benign" / name)
    listing = names["BESIDE"].listing(tmp_path, names["ListingOptions"]())
    assert [(item.source_path, len(item.masks)) for item in listing.items] == [
        ("benign/a (1).png", 1),
        ("benign/b.png", 0),
    ]
    with pytest.raises(FileNotFoundError, match="a folder per class"):
        names["BESIDE"].listing(tmp_path / "missing", names["ListingOptions"]())


def test_recipe() -> None:
    names = example("Add a recipe")
    recipe = names["traced_masks"]()
    assert recipe.fingerprint != names["tiny"]().fingerprint
    assert type(recipe.masks).__name__ == "RealMasks"
