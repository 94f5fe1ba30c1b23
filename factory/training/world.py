"""The processes that train together. One by default; several where torch.distributed is set up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from factory.training.mixture import Shard


@dataclass(frozen=True, kw_only=True)
class World:
    """Which of how many processes this is, its device, and how a module is wrapped to average gradients.

    Attributes:
        rank: 0 … size - 1; rank 0 writes files.
        size: number of processes.
        device: torch device of this process.
        wrap: gives the module whose backward pass averages gradients over the processes; None is
            `DistributedDataParallel` where size > 1. Ray Train passes its `prepare_model`.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank: want 0 … {self.size - 1}, got {self.rank}")

    def prepare(self, module: nn.Module) -> nn.Module:
        """`module`, wrapped where gradients must be averaged."""
        if self.size == 1:
            return module
        if self.wrap is not None:
            return self.wrap(module)
        return nn.parallel.DistributedDataParallel(module)

    def shard(self, batch: Shard) -> Shard:
        """This process's part of a global batch."""
        return batch.split(self.size)[self.rank]

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over the processes. Collective: every process must call it with the same names."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if self.size > 1:
            dist.all_reduce(stacked)
            stacked /= self.size
        return dict(zip(values, stacked.tolist()))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()
