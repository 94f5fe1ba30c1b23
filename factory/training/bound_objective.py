"""Objectives at work: torch modules that look into the denoiser while it runs and give a loss per image."""

import abc
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from factory.training.objectives import PredictionStep


class BoundObjective(nn.Module, abc.ABC):
    """The base of what `Objective.bind` returns; a subclass gives `loss` and, where it needs them, the others.

    Its parameters are trained with the denoiser and kept in the run's checkpoints; they are no part of the
    generator that comes out.
    """

    def capture(self, denoiser: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Entered while the denoiser runs; hooks that take what is wanted from its inside go here."""
        return contextlib.nullcontext()

    def forward(self) -> Any:
        """What becomes of the captured values: a tensor, a mapping of tensors, or None. Called after the denoiser."""
        return None

    @abc.abstractmethod
    def loss(self, step: PredictionStep, output: Any) -> Tensor:
        """Loss of each image, float32 (B,); `output` is what `forward` gave."""

    def metrics(self, step: PredictionStep, output: Any) -> Mapping[str, Tensor]:
        """Further numbers of each image to report, (B,) each; not minimised."""
        return {}


class StepObjective(BoundObjective):
    """An objective that looks at the prediction alone."""

    def __init__(self, loss: Callable[[PredictionStep], Tensor]) -> None:
        super().__init__()
        self._loss = loss

    def loss(self, step: PredictionStep, output: Any) -> Tensor:
        return self._loss(step)


class ObservedDenoiser(nn.Module):
    """The denoiser with the objectives that look into it, as one module for DDP, the optimizer and checkpoints."""

    def __init__(self, denoiser: nn.Module, objectives: Mapping[str, BoundObjective]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.objectives = nn.ModuleDict(objectives)

    def forward(
        self, latents: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The prediction (B, C, h, w), and what each objective made of what it saw."""
        with contextlib.ExitStack() as stack:
            for objective in self.objectives.values():
                stack.enter_context(objective.capture(self.denoiser))  # type: ignore[operator]
            prediction = self.denoiser(latents, timesteps, **conditions)
        return prediction, {name: objective() for name, objective in self.objectives.items()}
