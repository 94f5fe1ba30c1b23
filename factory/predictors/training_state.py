"""The state of one training run: network, optimizer, best weights, and the file it can be resumed from."""

import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.predictors.examples import Examples
from factory.predictors.fitted import Fitted, Predictor, tensor_of
from factory.predictors.losses import DiceCrossEntropy
from factory.predictors.settings import FitSettings
from schemas.identity import fingerprint, torch_seed

if TYPE_CHECKING:
    from torch import Tensor, nn

RESIDENT_BYTES = 4 << 30
"""Images up to this many bytes are kept on the GPU."""


@dataclass
class Snapshot:
    """Weights and moments on the CPU after `step` updates."""

    step: int
    score: float | None
    tensors: dict[str, "Tensor"]
    moments: dict[str, "Tensor"]


class DeviceRows:
    """Training rows as tensors: on the GPU where they fit, else on the CPU."""

    def __init__(self, task: str, examples: Examples, device: str) -> None:
        resident = examples.images.nbytes <= RESIDENT_BYTES
        home = device if resident else "cpu"
        self.images = tensor_of(examples.images).to(home)
        self.labels = tensor_of(examples.labels).to(home)
        self.masks: Tensor | None = None
        if task == "segmentation":
            assert examples.masks is not None
            self.masks = tensor_of(examples.masks).to(home)

    def take(self, rows: np.ndarray, device: str) -> "tuple[Tensor, Tensor, Tensor | None]":
        """Images uint8 (b, S, S, K), labels int64 (b,), masks uint8 (b, S, S) or None, on `device`."""
        index = tensor_of(rows).to(self.images.device)
        masks = None if self.masks is None else self.masks[index].to(device)
        return self.images[index].to(device), self.labels[index].to(device), masks


@dataclass
class TrainingState:
    """Everything that changes during training."""

    predictor: Predictor
    settings: FitSettings
    examples: Examples = field(repr=False)
    device: str
    step: int = 0
    stale: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        shape = (self.examples.num_classes, self.examples.channels, self.examples.size)
        network = self.predictor.build(*shape)
        self.network: nn.Module = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        named = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        decayed = [p for _, p in named if p.ndim > 1]
        others = [p for _, p in named if p.ndim <= 1]
        self._parameters = decayed + others
        by_identity = {id(p): name for name, p in named}
        self._names = [by_identity[id(p)] for p in self._parameters]
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.learning_rate, fused=True)
        self.loss = self.settings.loss_of(self.predictor.task)
        self.best = Snapshot(step=0, score=None, tensors={}, moments={})
        self._reset_window()

    def _reset_window(self) -> None:
        import torch

        self._loss_sum = torch.zeros((), device=self.device)
        self._norm_sum = torch.zeros((), device=self.device)
        self._window = 0

    @property
    def is_done(self) -> bool:
        """All steps taken, or no improvement for `patience` reports."""
        patience = self.settings.patience
        return self.step >= self.settings.num_steps or (patience is not None and self.stale >= patience)

    def update(self, rows: DeviceRows, numbers: np.ndarray, counts: np.ndarray | None, seed: int) -> None:
        """One optimizer step on the rows of these numbers."""
        import torch

        identity = f"fit/{seed}/step {self.step}"
        images, labels, masks = rows.take(numbers, self.device)
        pixels, target = self.settings.augmentation.apply(images, masks, identity)
        torch.manual_seed(torch_seed(identity, "network"))
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
        narrow = self.settings.precision == "bfloat16"
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=narrow):
            logits = self.network(pixels)
        if isinstance(self.loss, DiceCrossEntropy):
            assert target is not None
            loss = self.loss.loss(logits, target).mean()
        else:
            assert counts is not None
            loss = self.loss.loss(logits, labels, counts).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.max_gradient_norm)
        self.optimizer.step()
        self._loss_sum += loss.detach()
        self._norm_sum += norm.detach()
        self._window += 1
        self.step += 1

    def report(self) -> dict[str, float]:
        """Step, mean loss since the last report, learning rate of the last step.

        Raises:
            ValueError: the loss or the gradient is not finite.
        """
        loss, norm = float(self._loss_sum) / self._window, float(self._norm_sum) / self._window
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                f"training diverged by step {self.step}: mean loss {loss}, mean gradient norm {norm}; lower "
                f"FitSettings.learning_rate (now {self.settings.learning_rate})"
            )
        self._reset_window()
        rate = self.settings.learning_rate_at(self.step - 1)
        return {"step": self.step, "loss": loss, "learning_rate": rate}

    def keep(self, score: float | None) -> None:
        """Remember the weights if they are the best so far, or if nothing scores them."""
        if score is not None and self.best.score is not None and score <= self.best.score:
            self.stale += 1
            return
        self.stale = 0
        last = self.step >= self.settings.num_steps
        if score is not None or last:
            self.best = Snapshot(
                step=self.step, score=score, tensors=self._tensors(), moments=self._moments()
            )

    def _tensors(self) -> dict[str, "Tensor"]:
        return {
            name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in self.network.state_dict().items()
        }

    def _moments(self) -> dict[str, "Tensor"]:
        state = self.optimizer.state_dict()["state"]
        return {
            f"{self._names[index]}/{key}": value.detach().cpu().clone().contiguous()
            for index, values in state.items()
            for key, value in values.items()
        }

    def _set_moments(self, moments: Mapping[str, "Tensor"]) -> None:
        import torch

        state: dict[int, dict[str, Any]] = {}
        numbers = {name: index for index, name in enumerate(self._names)}
        for name, value in moments.items():
            parameter, _, key = name.rpartition("/")
            if parameter not in numbers:
                raise ValueError(f"optimizer: moments of {parameter}, which does not learn here")
            # The fused kernel walks memory: moments must lie as their parameter does (channels last).
            like = self._parameters[numbers[parameter]]
            held = torch.empty_like(like) if value.shape == like.shape else torch.empty_like(value)
            state.setdefault(numbers[parameter], {})[key] = held.copy_(value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def go_on_from(self, start: Fitted) -> None:
        """Take over weights and moments.

        Raises:
            ValueError: `start` is another predictor, or one of other examples.
        """
        start.check_input(self.examples)
        if fingerprint(start.predictor) != fingerprint(self.predictor):
            raise ValueError(f"start: is {start.predictor}, want {self.predictor}")
        self.network.load_state_dict(dict(start.tensors))
        if start.optimizer is not None:
            self._set_moments(start.optimizer)

    def save(self, path: Path, identity: str) -> None:
        """Write the whole state, whole or not at all."""
        import torch

        state = {
            "identity": identity,
            "step": self.step,
            "stale": self.stale,
            "seconds": self.seconds,
            "history": self.history,
            "tensors": self._tensors(),
            "moments": self._moments(),
            "best": vars(self.best),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)

    def load(self, path: Path, identity: str) -> None:
        """Restore what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        import torch

        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint {path}: cannot be read ({error}); delete it to start again"
            ) from error
        if state["identity"] != identity:
            raise ValueError(
                f"checkpoint {path}: is of a run with another predictor, settings, rows or seed; delete it, or name "
                "another file"
            )
        self.step, self.stale, self.seconds = state["step"], state["stale"], state["seconds"]
        self.history = state["history"]
        self.network.load_state_dict(state["tensors"])
        self._set_moments(state["moments"])
        self.best = Snapshot(**state["best"])
