"""Exponential moving average of the trainable parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """Averages named parameters: a ← d a + (1 - d) p, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp keeps a short run from being held at its start. Averages stay in the parameters' own dtype (fp32
    master weights) and on their device. `decay` 0 keeps no copy: the average is the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters = dict(parameters)
        self.decay = decay
        self.num_updates = 0
        self._average = {n: p.detach().clone() for n, p in self._parameters.items()} if decay else {}

    def decay_at(self, update: int) -> float:
        """d of update `update`, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters' present values into the average."""
        if self._average:
            averages = list(self._average.values())
            values = [self._parameters[name].detach() for name in self._average]
            torch._foreach_lerp_(averages, values, 1.0 - self.decay_at(self.num_updates))
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averages inside the block, and exactly their own values after it."""
        kept = {name: self._parameters[name].detach().clone() for name in self._average}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self._parameters[name].copy_(value)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrites the parameters by the averages."""
        for name, value in self._average.items():
            self._parameters[name].copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name; empty where decay is 0."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Restores `tensors()` and the number of updates.

        Raises:
            ValueError: the names differ.
        """
        if set(tensors) != set(self._average):
            raise ValueError(f"ema: {len(tensors)} saved averages for {len(self._average)} parameters")
        for name, value in tensors.items():
            self._average[name].copy_(value)
        self.num_updates = num_updates
