"""Ray Data reads the tables themselves: weighted draws of real and synthetic rows, no export in between.

    dataset = read_mix("synthetic.lance", real="real.lance", size=224, source_weights={"real": 1, "synthetic": 1})
    for batch in dataset.iter_torch_batches(batch_size=32): ...

The draws are those of `factory.export.torch_dataset.WeightedRows` with the same seed and epoch. Column `draw` is the
place in the epoch: Ray hands blocks on as they are ready, so sort by it where the order matters.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from factory.export.selection import Choice
from factory.export.torch_dataset import LanceImages, Source, WeightedRows

if TYPE_CHECKING:
    import ray.data


def read_mix(
    synthetic: str,
    *,
    real: str | None = None,
    size: int,
    source_weights: Mapping[Source, float] | None = None,
    class_weights: Mapping[str, float] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    tag: str | None = None,
    choice: Choice | None = None,
    split: Literal["train", "val"] = "train",
    channels: Literal["grey", "rgb"] = "rgb",
    block_size: int = 64,
    cpus_per_task: float = 1.0,
) -> "ray.data.Dataset":
    """One epoch of weighted draws as a Ray dataset; nothing is read before it is consumed.

    Args:
        synthetic, real, tag, choice, split: which rows, as `LanceImages.open`.
        size: side of the letterboxed images, px.
        source_weights, class_weights, num_samples, seed: as `WeightedRows`.
        epoch: which epoch is drawn.
        channels: 1 grey or 3 RGB channels.
        block_size: rows that one task reads and hands on together.
        cpus_per_task: CPUs of each of these tasks.

    Returns:
        Rows of draw int64, image float32 (C, size, size) in 0 … 1, mask int64 (size, size), has_mask, is_real bool, label
        int64, id str.

    Raises:
        FileNotFoundError, ValueError: as `LanceImages.open` and `WeightedRows`.
    """
    import ray.data

    if block_size < 1:
        raise ValueError(f"block_size {block_size} must be at least 1 row")
    images = LanceImages.open(
        synthetic, real=real, size=size, tag=tag, choice=choice, split=split, channels=channels
    )
    draws = WeightedRows(
        images,
        source_weights=source_weights,
        class_weights=class_weights,
        num_samples=num_samples,
        seed=seed,
    )
    draws.set_epoch(epoch)
    rows = np.fromiter(draws, np.int64, len(draws))
    blocks = [
        pa.table({"draw": np.arange(start, start + len(part)), "row": part})
        for start in range(0, len(rows), block_size)
        if len(part := rows[start : start + block_size])
    ]
    reference = ray.put(images)
    return ray.data.from_arrow(blocks).map_batches(
        _read,
        fn_kwargs={"images": reference},
        batch_size=block_size,
        batch_format="numpy",
        num_cpus=cpus_per_task,
    )


def _read(batch: dict[str, np.ndarray], *, images: Any) -> dict[str, np.ndarray]:
    """The drawn rows as arrays."""
    import ray

    dataset: LanceImages = ray.get(images)
    items = dataset.__getitems__(batch["row"].tolist())
    return {
        "draw": batch["draw"],
        "image": np.stack([item["image"].numpy() for item in items]),
        "mask": np.stack([item["mask"].numpy() for item in items]),
        **{name: np.array([item[name] for item in items]) for name in ("has_mask", "is_real", "label", "id")},
    }
