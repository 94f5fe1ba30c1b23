"""Features of the images of a table, for distances between sets of images.

    table                          the embeddings that the tables hold; no image is opened
    tiny, dinov2:FOLDER, timm:…    any embedder, see `factory.embedding`; unit vectors, as stored in tables
    inception=FILE                 the 2048 pooled features of Inception v3 from a local file of weights, not scaled

Two files of Inception weights are in use. torchvision's (`inception_v3`, 1000 classes) and the one of 2015 that the
FID of papers and torch-fidelity use (1008 classes, other pooling at the borders). Which one it was is recorded, and
their values do not compare. Both sides of a comparison are letterboxed by the same Lanczos filter, grey replicated to
three channels, so a value also differs from that of a tool that squashes frames or resizes bilinearly.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.embedding import BATCH_SIZE, EmbedderSpec, ImageEmbedder, LoadedEmbedder
from factory.imaging import decode_png
from schemas.draws import draw_order
from schemas.identity import digest_file, execution_field, hash_parts

if TYPE_CHECKING:
    from torch import nn

    from factory.storage import Table

STORED = "table"
AT_ONCE = 256
INCEPTION_CLASSES = {1000: "torchvision", 1008: "fid-2015"}


def load_weights(path: str | Path) -> dict[str, Any]:
    """Tensors by name of a .safetensors file, or of a .pth file read with torch's restricted reader.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that holds more than tensors.
    """
    import pickle

    import torch
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: want weights as .safetensors or .pth")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds more than tensors and is not read; save its state_dict") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: want a state_dict, names to tensors")
    return dict(loaded)


@dataclass(frozen=True, kw_only=True)
class InceptionFeatures:
    """Inception v3, not yet loaded.

    Attributes:
        weights: file of torchvision's `inception_v3`, or of torch-fidelity's port of the 2015 network.
    """

    weights: str = execution_field()

    def __post_init__(self) -> None:
        if not Path(self.weights).is_file():
            raise FileNotFoundError(f"--features inception={self.weights}: no such file")

    def load(self, device: str = "cpu", num_threads: int | None = None) -> "LoadedInception":
        """The network in memory.

        Raises:
            ValueError: the file is of another network.
        """
        state = load_weights(self.weights)
        classes = state["fc.weight"].shape[0] if "fc.weight" in state else 0
        if classes not in INCEPTION_CLASSES or "Mixed_7c.branch_pool.conv.weight" not in state:
            raise ValueError(
                f"--features inception={self.weights}: not Inception v3 in torchvision's layout (1000 classes) nor "
                f"in torch-fidelity's (1008); its head has {classes}"
            )
        layout = INCEPTION_CLASSES[classes]
        network = _inception(layout)
        kept = {name: value for name, value in state.items() if not name.startswith(("AuxLogits.", "fc."))}
        missing, unexpected = network.load_state_dict(kept, strict=False)
        if missing or unexpected:
            raise ValueError(f"{self.weights}: lacks {missing[:3]}, has unknown {unexpected[:3]}")
        spec = EmbedderSpec(
            name=f"inception:{layout}",
            weights_digest=digest_file(Path(self.weights)),
            dim=2048,
            size=299,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            weights=self.weights,
        )
        return LoadedInception(spec, network.eval().to(device), device, num_threads)


class LoadedInception(LoadedEmbedder):
    """Pooled features, as they come out of the network."""

    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 images (H, W) or (H, W, 3) of any size → float32 (N, 2048), not scaled to unit length."""
        import torch

        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        out = np.empty((len(images), self.spec.dim), np.float32)
        for first in range(0, len(images), BATCH_SIZE):
            batch = np.stack([self._square(image) for image in images[first : first + BATCH_SIZE]])
            with torch.inference_mode():
                out[first : first + len(batch)] = self._forward(
                    torch.from_numpy(batch).to(self._device)
                ).cpu()
        return out


def _inception(layout: str) -> "nn.Module":
    """Network without its head; with the 2015 network's pooling for "fid-2015" (as in pytorch-fid)."""
    from torch import Tensor, nn
    from torch.nn.functional import avg_pool2d, max_pool2d
    from torchvision.models import inception as published

    def counted(block: Any, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """The pooled branch averages over the pixels that exist, where torchvision counts padding."""
        pooled = avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return [*outputs[:-1], block.branch_pool(pooled)]

    class A(published.InceptionA):
        def _forward(self, x: Tensor) -> list[Tensor]:
            return counted(self, x, super()._forward(x))

    class C(published.InceptionC):
        def _forward(self, x: Tensor) -> list[Tensor]:
            return counted(self, x, super()._forward(x))

    class E(published.InceptionE):
        def _forward(self, x: Tensor) -> list[Tensor]:
            return counted(self, x, super()._forward(x))

    class LastE(published.InceptionE):
        def _forward(self, x: Tensor) -> list[Tensor]:
            return [*super()._forward(x)[:-1], self.branch_pool(max_pool2d(x, 3, stride=1, padding=1))]

    blocks: list[Callable[..., nn.Module]] = [
        published.BasicConv2d,
        published.InceptionA,
        published.InceptionB,
    ]
    blocks += [published.InceptionC, published.InceptionD, published.InceptionE, published.InceptionAux]
    if layout == "fid-2015":
        blocks[1], blocks[3], blocks[5] = A, C, E
    network = published.Inception3(aux_logits=False, inception_blocks=blocks, init_weights=False)
    if layout == "fid-2015":
        network.Mixed_7c = LastE(2048)
    network.fc = nn.Identity()
    return network


def parse_features(text: str, weights: str | None = None) -> ImageEmbedder | InceptionFeatures:
    """The component behind a value of `--features` other than `table`.

    Args:
        weights: file for a timm model.

    Raises:
        FileNotFoundError, ValueError: as the components.
    """
    kind, _, file = text.partition("=")
    if kind == "inception":
        if not file:
            raise ValueError(
                "--features inception: want inception=FILE; the weights are not part of the factory"
            )
        return InceptionFeatures(weights=file)
    return ImageEmbedder(name=text, weights=weights if text.startswith("timm:") else None)


def describe(spec: EmbedderSpec) -> str:
    """Preprocessing in one line."""
    scaled = "as pooled" if spec.name.startswith("inception:") else "unit length"
    mean, std = ("/".join(f"{v:.3g}" for v in values) for values in (spec.mean, spec.std))
    return f"letterbox {spec.size} px, Lanczos, grey as RGB, mean {mean}, std {std}; {spec.dim} features, {scaled}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRows:
    """Which images of a table are compared, in the order of their ids.

    Attributes:
        ids: image_id or request_id.
        row_ids: where they lie in the table.
        labels: class names.
        groups: patient or near-duplicate group; a synthetic row's own id, or the group of the real image it keeps.
    """

    ids: tuple[str, ...]
    row_ids: tuple[int, ...]
    labels: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Iterable[int]) -> "ImageRows":
        """The rows at these positions."""
        chosen = list(rows)
        return ImageRows(
            ids=tuple(self.ids[k] for k in chosen),
            row_ids=tuple(self.row_ids[k] for k in chosen),
            labels=self.labels[chosen],
            groups=self.groups[chosen],
        )


def list_rows(table: "Table", filter: str, *, most: int | None = None) -> ImageRows:
    """The rows that pass `filter`; at most `most` of them, drawn by a hash of their ids.

    Nothing depends on the order in which the table was written.

    Raises:
        ValueError: fewer than two rows.
    """
    key = "request_id" if "request_id" in table.schema.names else "image_id"
    wanted = [key, "label_name", "group_id", "_rowid", *(["derived"] if key == "request_id" else [])]
    found: list[tuple[str, int, str, str]] = []
    for batch in table.query_batches(filter, columns=wanted, batch_size=1 << 16):
        for row in batch.to_pylist():
            own = key == "request_id" and not (row["derived"] and row["group_id"])
            found.append((row[key], row["_rowid"], row["label_name"], row[key] if own else row["group_id"]))
    if len(found) < 2:
        raise ValueError(f"{table.uri}: {len(found)} image(s) where {filter}; want at least two to compare")
    if most is not None and len(found) > most:
        found = sorted(found, key=lambda row: draw_order(row[0]))[:most]
    found.sort()
    ids, row_ids, labels, groups = zip(*found, strict=True)
    return ImageRows(ids=ids, row_ids=row_ids, labels=np.array(labels), groups=np.array(groups))


def stored_features(table: "Table", rows: ImageRows) -> np.ndarray:
    """The embeddings of the rows, float32 (N, D)."""
    return np.concatenate(
        [
            np.stack(found["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
            for found in _chunks(table, rows, "embedding")
        ]
    )


def read_images(table: "Table", rows: ImageRows) -> list[np.ndarray]:
    """Decoded images, uint8 (H, W) or (H, W, 3).

    Raises:
        ValueError: an image that cannot be decoded; names the row.
    """
    key = "request_id" if "request_id" in table.schema.names else "image_id"
    images = []
    for found in _chunks(table, rows, "image"):
        for row_id, data in zip(found[key].to_pylist(), found["image"].to_pylist(), strict=True):
            try:
                images.append(decode_png(data))
            except (OSError, SyntaxError) as fault:  # what Pillow raises for bytes that are no PNG
                raise ValueError(
                    f"{table.uri}: row {row_id}: its image cannot be decoded ({fault})"
                ) from fault
    return images


def _chunks(table: "Table", rows: ImageRows, column: str) -> Iterable[Any]:
    key = "request_id" if "request_id" in table.schema.names else "image_id"
    for start in range(0, len(rows), AT_ONCE):
        listed = rows.row_ids[start : start + AT_ONCE]
        splits = "" if key == "request_id" else " AND split != 'test'"
        found = table.read([key, column, "_rowid"], f"_rowid IN ({', '.join(map(str, listed))}){splits}")
        place = {row: number for number, row in enumerate(listed)}
        assert found.num_rows == len(listed), f"{table.uri}: test rows are never compared"
        yield found.take(np.argsort([place[row] for row in found["_rowid"].to_pylist()], kind="stable"))


def computed_features(
    table: "Table",
    rows: ImageRows,
    embedder: LoadedEmbedder,
    *,
    cache: Path,
    change: Callable[[list[np.ndarray]], list[np.ndarray]] | None = None,
    change_identity: str = "",
    progress: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Features of the rows, float32 (N, D), in streamed batches of 256 images.

    Args:
        cache: folder with one file per batch, named by the ids, the embedder and the change; what is there is not
            computed again, so that an interrupted job goes on where it was.
        change: of the images before they are embedded, such as an autoencoder.
        change_identity: what distinguishes the change, in the name of the cache file.
        progress: called with the number of images done.
    """
    cache.mkdir(parents=True, exist_ok=True)
    spec = embedder.spec
    parts = []
    for start in range(0, len(rows), AT_ONCE):
        chunk = rows.take(range(start, min(start + AT_ONCE, len(rows))))
        identity = (spec.name, spec.weights_digest, str(spec.size), change_identity)
        path = cache / f"{hash_parts(*identity, *chunk.ids)}.npy"
        if path.is_file():
            parts.append(np.load(path, allow_pickle=False))
        else:
            images = read_images(table, chunk)
            parts.append(embedder.embed(images if change is None else change(images)))
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as stream:
                np.save(stream, parts[-1])
            partial.replace(path)
        progress(len(chunk))
    return np.concatenate(parts)
