"""What all learners share: a moving average of what is saved, optimizers, and a state that resumes exactly."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from factory.training.ema import MovingAverage
from factory.training.settings import TrainingSettings

Part = TypeVar("Part")


class AveragedLearner:
    """A learner's network, parameters, moving average and optimizers; `loop.Learner` but for draw, step, validate.

    Args:
        network: what is saved, with the averaged weights.
        parameters: all that is trained, by name.
        averaged: those of them that the average follows; all by default.
        optimizers: by name; "main" follows the settings' learning rate.
        settings: optimisation.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        optimizers: Mapping[str, torch.optim.Optimizer],
        settings: TrainingSettings,
        averaged: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.network, self.settings = network, settings
        self.parameters, self.optimizers = dict(parameters), dict(optimizers)
        self.ema = MovingAverage(self.parameters if averaged is None else averaged, settings.ema_decay)

    def set_learning_rate(self, step: int) -> None:
        """The main optimizer's rate of that step."""
        for group in self.optimizers["main"].param_groups:
            group["lr"] = self.settings.learning_rate_at(step)

    def descend(
        self, model: nn.Module, parts: Sequence[Part], losses: Callable[[Part], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """One update of the main optimizer from micro-batches; their mean losses and the norm of the gradient.

        Args:
            model: as wrapped for several processes; only the last micro-batch averages gradients over these.
            parts: micro-batches of equal size.
            losses: of one; "loss" is what is descended, per image or a mean.
        """
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            with _gradients_stay_local(model, number < len(parts) - 1):
                terms = losses(part)
                (terms["loss"].mean() / len(parts)).backward()
            for name, value in terms.items():
                mean = value.detach().mean() / len(parts)
                totals[name] = totals[name] + mean if name in totals else mean
        totals["grad_norm"] = nn.utils.clip_grad_norm_(
            list(self.parameters.values()), self.settings.max_grad_norm
        )
        self.optimizers["main"].step()
        self.optimizers["main"].zero_grad(set_to_none=True)
        self.ema.update()
        return totals

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network holds the averaged weights inside the block, in evaluation mode."""
        self.network.eval()
        with self.ema.applied():
            yield

    def finish(self) -> None:
        """Leaves the averaged weights in the network, for saving."""
        self.ema.copy_to_parameters()
        self.network.eval()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Trained parameters and their averages, by name."""
        return {"trainable": dict(self.parameters), "ema": self.ema.tensors()}

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' states and the average's counter: tensors and plain values."""
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"optimizers": states, "ema_updates": self.ema.num_updates}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Restores `tensors()` and `state_dict()` exactly.

        Raises:
            ValueError: the parameters are not the same ones.
        """
        saved = tensors["trainable"]
        different = sorted(set(saved) ^ set(self.parameters))
        if different:
            raise ValueError(
                f"checkpoint: {len(different)} trained parameters differ from this run's, first {different[0]}"
            )
        with torch.no_grad():
            for name, value in saved.items():
                self.parameters[name].copy_(value)
        self.ema.load(tensors["ema"], int(state["ema_updates"]))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def _gradients_stay_local(model: nn.Module, local: bool) -> contextlib.AbstractContextManager[Any]:
    if local and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
