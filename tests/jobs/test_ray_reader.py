"""The Ray reader: the draws of the PyTorch sampler, and the same pixels."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

from export_tables import LABELS, write_real, write_synthetic

from factory.export.torch_dataset import LanceImages, Source, WeightedRows
from jobs.ray_reader import read_mix


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Synthetic and real."""
    folder = tmp_path_factory.mktemp("mix")
    return write_synthetic(folder), write_real(folder)


@pytest.mark.usefixtures("ray_local")
def test_an_epoch_of_draws_equals_the_samplers(tables: tuple[str, str]) -> None:
    sources: dict[Source, float] = {"real": 1.0, "synthetic": 2.0}
    classes = {LABELS[0]: 3.0}
    found = read_mix(
        tables[0], real=tables[1], size=16, source_weights=sources, class_weights=classes, num_samples=30, seed=5, epoch=2,
        block_size=8, channels="grey", cpus_per_task=0.1,
    )  # fmt: skip
    rows = sorted(found.take_all(), key=lambda row: row["draw"])
    dataset = LanceImages.open(tables[0], real=tables[1], size=16, channels="grey")
    sampler = WeightedRows(dataset, source_weights=sources, class_weights=classes, num_samples=30, seed=5)
    sampler.set_epoch(2)
    expected = dataset.__getitems__(list(sampler))
    assert [row["draw"] for row in rows] == list(range(30))
    assert {bool(row["is_real"]) for row in rows} == {True, False}
    for row, item in zip(rows, expected, strict=True):
        assert (row["id"], row["label"], bool(row["is_real"])) == (item["id"], item["label"], item["is_real"])
        assert row["image"].dtype == np.float32 and row["image"].shape == (1, 16, 16)
        assert np.array_equal(row["image"], item["image"].numpy()) and np.array_equal(
            row["mask"], item["mask"].numpy()
        )


def test_bad_weights_are_refused_before_ray_starts(tables: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="source_weights: 'fake' is none of"):
        read_mix(tables[0], size=16, source_weights={"fake": 1.0})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="block_size 0"):
        read_mix(tables[0], size=16, block_size=0)
