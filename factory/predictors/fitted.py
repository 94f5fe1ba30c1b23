"""A trained predictor: its tensors, how it got there, its predictions. Saved as safetensors and JSON, no pickle."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.predictors.augmentation import Augmentation, unit_pixels
from factory.predictors.classifiers import Classifier, FeatureProbe
from factory.predictors.examples import Examples
from factory.predictors.segmenters import Segmenter
from factory.predictors.settings import FitSettings
from schemas.identity import fingerprint, hash_parts

if TYPE_CHECKING:
    from torch import Tensor, nn

Predictor = Classifier | Segmenter | FeatureProbe
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Classifier, Segmenter, FeatureProbe)}
_TENSORS, _OPTIMIZER, _RECORD = "tensors.safetensors", "optimizer.safetensors", "fitted.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A predictor after training.

    Attributes:
        predictor, settings: what was trained, how.
        class_names, size, channels: of the examples it takes.
        tensors: parameters and buffers by name, on the CPU.
        optimizer: moments of AdamW by "parameter name/field", on the CPU; None where they were not kept.
        history: one entry per report: step, loss (mean since the last report), learning_rate, and score on the
            validation rows where there are any.
        best_step: updates behind `tensors`.
        best_score: score of `tensors`; None without validation.
        rows_digest: `Examples.digest` of the training rows.
        seconds: wall time of the training, over all resumed parts.
    """

    predictor: Predictor
    settings: FitSettings
    class_names: tuple[str, ...]
    size: int
    channels: int
    tensors: Mapping[str, "Tensor"]
    rows_digest: str
    optimizer: Mapping[str, "Tensor"] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_score: float | None = None
    seconds: float = 0.0

    @property
    def task(self) -> str:
        """ "classification" or "segmentation"."""
        return self.predictor.task

    def network(self, device: str = "cpu") -> "nn.Module":
        """The trained network in evaluation mode."""
        import torch

        network = self.predictor.skeleton(len(self.class_names), self.channels, self.size)
        network.load_state_dict(dict(self.tensors))
        return network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def predict(self, examples: Examples, batch_size: int = 64, device: str = "cpu") -> np.ndarray:
        """Probabilities, float32: (N, C) of the classes, or (N, S, S) of lesion at each pixel.

        Raises:
            ValueError: the examples have another size, other channels or classes than the training rows.
        """
        self.check_input(examples)
        if isinstance(self.predictor, FeatureProbe):
            from factory.predictors.probe import probe_probabilities

            return probe_probabilities(self, examples, device)
        return predict_network(self.network(device), examples, self.task, batch_size, device)

    def check_input(self, examples: Examples) -> None:
        """Refuse examples that are not of the kind trained on.

        Raises:
            ValueError: naming the field.
        """
        for name in ("size", "channels", "class_names"):
            if getattr(examples, name) != getattr(self, name):
                raise ValueError(
                    f"{name}: the predictor was trained on {getattr(self, name)}, the examples have "
                    f"{getattr(examples, name)}"
                )

    def digest(self) -> str:
        """Hash of the trained tensors' bytes."""
        parts: list[str | bytes] = []
        for name in sorted(self.tensors):
            parts += [name, self.tensors[name].contiguous().numpy().tobytes()]
        return hash_parts(*parts)

    def save(self, folder: Path) -> Path:
        """Write tensors.safetensors, optimizer.safetensors where kept, and fitted.json, the last one last."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.tensors.items()}, folder / _TENSORS)
        if self.optimizer is not None:
            save_file({n: t.contiguous() for n, t in self.optimizer.items()}, folder / _OPTIMIZER)
        else:
            (folder / _OPTIMIZER).unlink(missing_ok=True)
        record = {
            "predictor": _to_json(self.predictor),
            "settings": _settings_to_json(self.settings),
            "fingerprint": fingerprint((self.predictor, self.settings)),
            "class_names": list(self.class_names),
            "size": self.size,
            "channels": self.channels,
            "rows_digest": self.rows_digest,
            "history": self.history,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "seconds": self.seconds,
            "has_optimizer": self.optimizer is not None,
        }
        partial = folder / f"{_RECORD}.partial"
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(folder / _RECORD)
        return folder


def load_fitted(folder: Path) -> Fitted:
    """What `Fitted.save` wrote. The predictor's own starting weights are not needed.

    Raises:
        ValueError: the folder is incomplete or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        record = json.loads((folder / _RECORD).read_text())
        tensors = load_file(folder / _TENSORS)
        optimizer = load_file(folder / _OPTIMIZER) if record["has_optimizer"] else None
        return Fitted(
            predictor=_KINDS[record["predictor"].pop("type")](**record["predictor"]),
            settings=_settings_from_json(record["settings"]),
            class_names=tuple(record["class_names"]),
            size=record["size"],
            channels=record["channels"],
            tensors=tensors,
            optimizer=optimizer,
            history=record["history"],
            best_step=record["best_step"],
            best_score=record["best_score"],
            rows_digest=record["rows_digest"],
            seconds=record["seconds"],
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a saved predictor ({error!r}); train it again") from error


def predict_network(
    network: "nn.Module", examples: Examples, task: str, batch_size: int, device: str
) -> np.ndarray:
    """Probabilities of a network in evaluation mode, as `Fitted.predict`."""
    import torch

    out: list[np.ndarray] = [np.empty((0, *_empty_shape(examples, task)), np.float32)]
    with torch.inference_mode():
        for first in range(0, len(examples), batch_size):
            images = tensor_of(examples.images[first : first + batch_size])
            logits = network(unit_pixels(images.to(device))).float()
            scores = logits.softmax(dim=1) if task == "classification" else logits[:, 0].sigmoid()
            out.append(scores.cpu().numpy())
    return np.concatenate(out)


def tensor_of(values: np.ndarray) -> "Tensor":
    """The array as a tensor, copied only where it is read-only (as from Ray's object store) or not contiguous."""
    import torch

    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def predict_native(
    fitted: Fitted, examples: Examples, *, threshold: float = 0.5, batch_size: int = 64, device: str = "cpu"
) -> list[np.ndarray]:
    """Predicted masks at native size, uint8 (H, W) of 0 and 1: probabilities scaled back (bilinear), then cut.

    Raises:
        ValueError: the predictor is no segmenter, or the examples have no native sizes.
    """
    from PIL import Image

    if fitted.task != "segmentation" or examples.native is None:
        raise ValueError("predict_native: want a segmenter, and examples with native sizes")
    masks = []
    for probability, truth in zip(fitted.predict(examples, batch_size, device), examples.native):
        box = truth.letterbox
        inner = probability[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width]
        native = Image.fromarray(inner).resize((box.width, box.height), Image.Resampling.BILINEAR)
        masks.append((np.asarray(native) > threshold).astype(np.uint8))
    return masks


def _empty_shape(examples: Examples, task: str) -> tuple[int, ...]:
    return (examples.num_classes,) if task == "classification" else (examples.size, examples.size)


def _to_json(component: Any) -> dict[str, Any]:
    """Fields of a flat component by name, and its type; paths of weights stay behind."""
    values = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    values.pop("weights", None)
    return {"type": type(component).__name__, **values}


def _settings_to_json(settings: FitSettings) -> dict[str, Any]:
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    loss = None if settings.loss is None else _to_json(settings.loss)
    return values | {"loss": loss, "augmentation": settings.augmentation.kind}


def _settings_from_json(values: dict[str, Any]) -> FitSettings:
    from factory.predictors import losses

    loss = values.pop("loss")
    if loss is not None:
        kinds = {kind.__name__: kind for kind in (*losses.TASK_LOSSES, losses.DiceCrossEntropy)}
        loss = kinds[loss.pop("type")](**loss)
    augmentation = Augmentation(kind=values.pop("augmentation"))
    return FitSettings(loss=loss, augmentation=augmentation, **values)
