"""Image embedders: DINOv2 by transformers, any timm model, or the tiny DINOv2 that ships.

    ImageEmbedder(name="tiny")                                shipped with the factory, trained on phantoms
    ImageEmbedder(name="dinov2:facebook/dinov2-small")        hub id or local folder
    ImageEmbedder(name="timm:mobilenetv2_100?pad_type=same&mean=0.5&std=0.5", weights="file.safetensors")

An embedder that cannot be had is an error that says which one ships; random weights and silent fallbacks
never happen. Name, digest of the weights and preprocessing travel with every table as an `EmbedderSpec`.
Importing this file imports neither torch nor transformers.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from factory.imaging import as_rgb, letterbox
from schemas.identity import digest_file, digest_files, execution_field, hash_parts

SHIPPED = Path(__file__).parent / "assets" / "embedder"
BATCH_SIZE = 32
_KINDS = ("tiny", "dinov2", "timm")
_DINOV2_TYPES = ("dinov2", "dinov2_with_registers")


@dataclass(frozen=True, kw_only=True)
class EmbedderSpec:
    """What makes two embeddings comparable, and where the weights were found.

    Attributes:
        name: as in `ImageEmbedder`.
        weights_digest: hash of the weights' bytes.
        dim: length of an embedding.
        size: side of the square that images are letterboxed to, px.
        mean, std: per-channel normalisation of pixels scaled to [0, 1].
        weights: path given for the weights, if any; says where, not what.
    """

    name: str
    weights_digest: str
    dim: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str | None = execution_field(None)

    def to_json(self) -> str:
        """One string, stored as a table's metadata under "embedder"."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "EmbedderSpec":
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def embedder(self) -> "ImageEmbedder":
        """The component that this spec was made by."""
        return ImageEmbedder(name=self.name, weights=self.weights)

    def check_same(self, other: "EmbedderSpec", where: str) -> None:
        """Refuse to compare embeddings of two embedders.

        Raises:
            ValueError: naming both.
        """
        if dataclasses.replace(self, weights=None) != dataclasses.replace(other, weights=None):
            raise ValueError(
                f"{where}: embedder {other.name} ({other.weights_digest[:8]}, {other.size} px) does not compare with "
                f"{self.name} ({self.weights_digest[:8]}, {self.size} px); prepare both tables with one embedder"
            )


@dataclass(frozen=True, kw_only=True)
class ImageEmbedder:
    """Which embedder, not yet loaded.

    Attributes:
        name: "tiny", "dinov2:<hub id or folder>", or "timm:<model>[?option=value&…]". Options of timm: `mean`
            and `std` of the normalisation, `size` in px; any other is passed to `timm.create_model`.
        weights: local safetensors file for a timm model; the hub's pretrained weights without it.
    """

    name: str = "tiny"
    weights: str | None = execution_field(None)

    def __post_init__(self) -> None:
        kind, _, rest = self.name.partition(":")
        if kind not in _KINDS or (kind != "tiny" and not rest) or (kind == "tiny" and rest):
            raise ValueError(f"embedder {self.name!r}: want tiny, dinov2:<hub id or folder> or timm:<model>")
        if self.weights is not None and kind != "timm":
            raise ValueError(
                f"embedder {self.name!r}: a weights file is for timm models only, got {self.weights}"
            )
        if self.weights is not None and not self.weights.endswith(".safetensors"):
            raise ValueError(
                f"embedder weights {self.weights}: only .safetensors files are read, never pickles"
            )

    def load(self, device: str = "cpu", num_threads: int | None = None) -> "LoadedEmbedder":
        """The model in memory.

        Raises:
            FileNotFoundError: weights are not on this machine and the hub does not serve them.
        """
        kind, _, rest = self.name.partition(":")
        if kind == "timm":
            return _load_timm(self, rest, device, num_threads)
        folder = SHIPPED if kind == "tiny" else _dinov2_folder(rest)
        return _load_dinov2(self, folder, device, num_threads)


class LoadedEmbedder:
    """A model that embeds images; deterministic and, to float tolerance, independent of batching.

    Attributes:
        spec: what to record with the embeddings.
    """

    def __init__(
        self, spec: EmbedderSpec, forward: Callable[[Any], Any], device: str, num_threads: int | None
    ) -> None:
        self.spec = spec
        self._forward = forward
        self._device = device
        self._num_threads = num_threads

    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 images (H, W) or (H, W, 3) of any size → float32 (N, dim), unit norm.

        Raises:
            ValueError: an image is not uint8, or its embedding is not finite.
        """
        import torch

        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        out = np.zeros((len(images), self.spec.dim), np.float32)
        for first in range(0, len(images), BATCH_SIZE):
            batch = np.stack([self._square(image) for image in images[first : first + BATCH_SIZE]])
            with torch.inference_mode():
                vectors = self._forward(torch.from_numpy(batch).to(self._device)).float().cpu().numpy()
            out[first : first + len(batch)] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(out).all():
            bad = int(np.flatnonzero(~np.isfinite(out).all(axis=1))[0])
            raise ValueError(f"image {bad} of {len(images)}: its embedding by {self.spec.name} is not finite")
        return out

    def _square(self, image: np.ndarray) -> np.ndarray:
        """(3, S, S) float32, normalised."""
        if image.dtype != np.uint8:
            raise ValueError(f"image: want uint8, got {image.dtype}")
        pixels = as_rgb(letterbox(image, self.spec.size)).astype(np.float32) / 255
        normal = (pixels - np.array(self.spec.mean, np.float32)) / np.array(self.spec.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))


def _dinov2_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(
            f"embedder dinov2:{name}: no such local folder, and the hub did not serve it ({type(error).__name__}); "
            "give a local folder, or use --embedder tiny, which ships with the factory"
        ) from error


def _load_dinov2(
    embedder: ImageEmbedder, folder: Path, device: str, num_threads: int | None
) -> LoadedEmbedder:
    import torch
    from transformers import AutoModel

    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"embedder {embedder.name}: {weights} is missing; only safetensors are read")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in _DINOV2_TYPES:
        raise ValueError(
            f"embedder {embedder.name}: {folder / 'config.json'} is of a {kind!r} model, want {' or '.join(_DINOV2_TYPES)}"
        )
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    crop = processor.get("crop_size") or processor["size"]
    size = int(crop.get("height") or crop["shortest_edge"])
    # In single precision whatever the file holds: half precision would be slow and inexact on a CPU.
    model, loading = AutoModel.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32
    )
    if loading["missing_keys"]:
        raise ValueError(f"embedder {embedder.name}: {weights} lacks {sorted(loading['missing_keys'])[:3]}")
    model = model.eval().to(device)
    spec = EmbedderSpec(
        name=embedder.name,
        weights_digest=digest_files(folder, ["config.json", "model.safetensors"]),
        dim=model.config.hidden_size,
        size=size,
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
    )
    return LoadedEmbedder(spec, lambda pixels: model(pixels).last_hidden_state[:, 0], device, num_threads)


def _load_timm(embedder: ImageEmbedder, rest: str, device: str, num_threads: int | None) -> LoadedEmbedder:
    import timm

    model_name, _, query = rest.partition("?")
    options: dict[str, Any] = {name: _number(value) for name, value in parse_qsl(query)}
    overlay: dict[str, Any] = {name: (options.pop(name),) * 3 for name in ("mean", "std") if name in options}
    size = options.pop("size", None)
    if embedder.weights is not None:
        if not Path(embedder.weights).is_file():
            raise FileNotFoundError(f"embedder weights {embedder.weights}: no such file")
        overlay["file"] = embedder.weights
    if not timm.is_model(model_name):
        near = timm.list_models(f"*{model_name.split('_')[0]}*")[:3]
        raise ValueError(
            f"embedder {embedder.name!r}: timm has no model {model_name!r}; near: {', '.join(near)}"
        )
    try:
        model = timm.create_model(
            model_name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **options
        )
    except Exception as error:
        if isinstance(error, TypeError) and options:
            raise ValueError(
                f"embedder {embedder.name!r}: {model_name} takes no such option: {error}"
            ) from error
        if embedder.weights is not None:
            raise ValueError(
                f"embedder weights {embedder.weights} do not fit {model_name}: {error}"
            ) from error
        raise FileNotFoundError(
            f"embedder {embedder.name}: the hub did not serve its weights ({type(error).__name__}); give a local "
            "file, or use --embedder tiny, which ships with the factory"
        ) from error
    model = model.eval().to(device)
    config = timm.data.resolve_model_data_config(model)
    digest = digest_file(Path(embedder.weights)) if embedder.weights else _digest_parameters(model)
    spec = EmbedderSpec(
        name=embedder.name,
        weights_digest=digest,
        dim=model.num_features if not hasattr(model, "head_hidden_size") else model.head_hidden_size,
        size=int(size or config["input_size"][1]),
        mean=tuple(float(v) for v in config["mean"]),
        std=tuple(float(v) for v in config["std"]),
        weights=embedder.weights,
    )
    return LoadedEmbedder(spec, model, device, num_threads)


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _digest_parameters(model: Any) -> str:
    """Hash of all tensors, for weights whose file the hub's cache hides."""
    state = model.state_dict()
    parts = [part for name in sorted(state) for part in (name, state[name].cpu().numpy().tobytes())]
    return hash_parts(*parts)
