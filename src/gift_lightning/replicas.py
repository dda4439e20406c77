"""The copies of the policy that are trained side by side, each on samples of its own."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Replicas:
    """How many there are, and which one this process belongs to.

    A replica is one process, or under tensor parallelism several, which then see the same data.
    """

    number: int = 1
    index: int = 0
    size: int = 1
    """Processes of each."""

    @classmethod
    def of(cls, trainer: Any) -> "Replicas":
        """Those of a Lightning Trainer."""
        size = getattr(trainer.strategy, "tensor_parallel_size", 1)
        return cls(trainer.world_size // size, trainer.global_rank // size, size)

    def gathered(self, mine: T) -> list[T]:
        """What each of them brings; all processes call this together."""
        if self.number == 1:
            return [mine]
        everything: list[Any] = [None] * (self.number * self.size)
        torch.distributed.all_gather_object(everything, mine)
        return everything[:: self.size]
