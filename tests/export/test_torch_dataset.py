"""Rows as tensors, in this process and in spawned workers; draws in the proportions that were asked for."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from export_tables import HOSTILE, LABELS, WITHOUT_MASK, stored_rows
from torch.utils.data import DataLoader

from factory.export.selection import Choice
from factory.export.torch_dataset import LanceImages, WeightedRows
from factory.imaging import decode_png, letterbox


@pytest.fixture(scope="module")
def mixed(synthetic_uri: str, real_uri: str) -> LanceImages:
    return LanceImages.open(synthetic_uri, real=real_uri, size=24)


def test_items_are_the_stored_rows(mixed: LanceImages, synthetic_uri: str, real_uri: str) -> None:
    rows = stored_rows(synthetic_uri, "request_id") | stored_rows(real_uri, "image_id")
    assert len(mixed) == 51 + 18
    items = [mixed[place] for place in range(len(mixed))]
    assert len({item["id"] for item in items}) == len(items)
    for item in items:
        stored = rows[item["id"]]
        grey = letterbox(decode_png(stored["image"]), 24)
        assert item["image"].shape == (3, 24, 24) and item["image"].dtype == torch.float32
        assert torch.equal(
            (item["image"] * 255).round().to(torch.uint8), torch.from_numpy(grey).expand(3, 24, 24)
        )
        assert item["label"] == stored["label"] and item["is_real"] == ("image_id" in stored)
        assert stored["split"] == "train"
        if stored["mask"] is None:
            assert not item["has_mask"] and not item["mask"].any()
        else:
            mask = letterbox(decode_png(stored["mask"]), 24, is_mask=True)
            assert item["has_mask"] and np.array_equal(item["mask"].numpy(), mask)
    assert sum(not item["has_mask"] for item in items) == len(WITHOUT_MASK)


def test_a_batch_keeps_its_order_and_repeats(mixed: LanceImages) -> None:
    places = [60, 3, 3, 0, -1, 17]
    ids = [item["id"] for item in mixed.__getitems__(places)]
    assert ids == [mixed[place]["id"] for place in places] and ids[1] == ids[2]
    with pytest.raises(IndexError):
        mixed[len(mixed)]


def test_the_same_rows_as_an_export_of_the_same_choice(synthetic_uri: str, real_uri: str) -> None:
    from factory.export.rows import Provenance, read_items
    from factory.export.selection import select
    from factory.storage import open_table

    choice = Choice(ratio=0.5, include_val=True)
    selection = select(open_table(synthetic_uri), open_table(real_uri), choice)
    items = list(read_items(selection, Provenance(), channels="as-stored", mask_values="stored"))
    for split in ("train", "val"):
        dataset = LanceImages.open(synthetic_uri, real=real_uri, size=8, choice=choice, split=split)
        ids = {dataset[place]["id"] for place in range(len(dataset))}
        assert ids == {item.row_id for item in items if item.split == split}
    with pytest.raises(ValueError, match="split 'val': no row"):
        LanceImages.open(synthetic_uri, size=8, split="val")


@pytest.mark.slow  # two processes import torch
def test_spawned_workers_give_the_same_batches(mixed: LanceImages) -> None:
    sampler = WeightedRows(mixed, num_samples=24, seed=3)
    here = list(DataLoader(mixed, batch_size=8, sampler=sampler))
    loader = DataLoader(mixed, batch_size=8, sampler=sampler, num_workers=2, multiprocessing_context="spawn")
    there = list(loader)
    assert len(here) == len(there) == 3
    for first, second in zip(here, there):
        assert first["id"] == second["id"]
        for name in ("image", "mask", "label", "is_real"):
            assert torch.equal(first[name], second[name])


def test_it_pickles_without_pixels(mixed: LanceImages) -> None:
    data = pickle.dumps(mixed)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data)[5]["image"], mixed[5]["image"])  # noqa: S301 - made on the line above


def test_grey_and_transform(synthetic_uri: str) -> None:
    dataset = LanceImages.open(
        synthetic_uri, size=8, channels="grey", transform=lambda item: {"mean": item["image"].mean(), **item}
    )
    item = dataset[0]
    assert item["image"].shape == (1, 8, 8) and item["mean"] == item["image"].mean()


def shares(dataset: LanceImages, sampler: WeightedRows) -> tuple[float, dict[str, float]]:
    """Share of real rows, and of each class, among what is drawn."""
    drawn = np.array(list(sampler))
    labels = Counter(dataset.index.label[drawn].tolist())
    return float(dataset.index.is_real[drawn].mean()), {
        name: labels[number] / len(drawn) for number, name in enumerate(LABELS)
    }


def test_draws_follow_the_weights(mixed: LanceImages) -> None:
    tolerance = 4 * np.sqrt(0.25 / 20_000)  # four standard errors
    num = {"num_samples": 20_000, "seed": 1}
    real, _ = shares(mixed, WeightedRows(mixed, **num))
    assert real == pytest.approx(18 / 69, abs=tolerance)
    real, classes = shares(
        mixed,
        WeightedRows(
            mixed,
            source_weights={"real": 3, "synthetic": 1},
            class_weights={"benign": 1, HOSTILE: 4},
            **num,
        ),
    )
    assert real == pytest.approx(0.75, abs=tolerance)
    assert classes[HOSTILE] == pytest.approx(0.8, abs=tolerance)
    real, classes = shares(
        mixed, WeightedRows(mixed, source_weights={"real": 1}, class_weights={HOSTILE: 0}, **num)
    )
    assert (real, classes[HOSTILE]) == (1.0, 0.0)


def test_rows_of_a_cell_are_drawn_evenly(mixed: LanceImages) -> None:
    counts = np.bincount(list(WeightedRows(mixed, num_samples=69 * 400, seed=5)), minlength=69)
    assert (np.abs(counts - 400) < 5 * np.sqrt(400)).all()


def test_draws_depend_on_seed_and_epoch_alone(mixed: LanceImages) -> None:
    def draw(seed: int, epoch: int) -> list[int]:
        sampler = WeightedRows(mixed, num_samples=50, seed=seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 50
        return list(sampler)

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_weights": {"fake": 1}}, "'fake' is none of real, synthetic"),
        ({"class_weights": {"cyst": 1}}, "'cyst' is none of benign"),
        ({"class_weights": {"benign": -1}}, "benign=-1"),
        ({"source_weights": {"real": float("nan")}}, "real=nan"),
        ({"source_weights": {"real": 0}}, "no source and class"),
        ({"class_weights": {"benign": 0, HOSTILE: 0}}, "no source and class"),
        ({"num_samples": 0}, "num_samples 0"),
    ],
)
def test_bad_weights_are_refused(mixed: LanceImages, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedRows(mixed, **settings)


def test_a_weighted_source_without_rows_is_refused(synthetic_uri: str) -> None:
    dataset = LanceImages.open(synthetic_uri, size=8)
    with pytest.raises(ValueError, match="real has weight 1"):
        WeightedRows(dataset, source_weights={"real": 1, "synthetic": 1})
