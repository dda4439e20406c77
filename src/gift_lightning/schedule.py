"""Learning-rate schedules by name, with warm-up as a fraction or in steps."""

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass(frozen=True)
class Schedule:
    """A schedule over the run's optimizer steps."""

    name: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "constant"
    """Shape after the warm-up; warmup_stable_decay is known as WSD."""
    warmup: float = 0.0
    """Linear warm-up: a fraction of all steps below 1, a number of steps from 1 on."""
    decay: float = 0.1
    """Length of the final decay of warmup_stable_decay, as a fraction or in steps."""
    min_lr_ratio: float = 0.0
    """Last learning rate of warmup_stable_decay, relative to the peak."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"schedule: min_lr_ratio is from 0 to 1, got {self.min_lr_ratio}.")
        if self.warmup < 0 or self.decay < 0:
            raise ValueError(
                f"schedule: warmup and decay must be 0 or more, got {self.warmup} and {self.decay}."
            )

    def build(self, optimizer: Optimizer, num_steps: float) -> LRScheduler:
        """The scheduler of a run of `num_steps` optimizer steps, infinite if only time ends it.

        Raises:
            ValueError: if warm-up and decay do not fit into the run, or are parts of no number.
        """
        if math.isinf(num_steps) and (self.name != "constant" or 0 < self.warmup < 1):
            raise ValueError(
                "schedule: a run that only trainer.max_time ends has no number of steps to take "
                "parts of: set trainer.max_steps, or name: constant with warmup in whole steps."
            )
        warmup, decay = self._lengths(num_steps)
        if warmup + decay > num_steps:
            raise ValueError(
                f"schedule: warm-up of {warmup} and decay of {decay} steps do not fit into a run "
                f"of {num_steps}: shorten model.schedule.warmup or train longer."
            )
        return LambdaLR(optimizer, lambda step: self.factor(step, num_steps))

    def factor(self, step: int, num_steps: float) -> float:
        """What the peak is multiplied by before a step, the first being 0.

        As in transformers 5 (optimization.py), whose module takes seconds to import; behind the
        end it stays, where a cosine there rises again.
        """
        warmup, decay = self._lengths(num_steps)
        left = max(0, num_steps - step)
        if step < warmup:
            part = step / warmup
        elif left > decay or decay == 0:
            part = 1.0
        elif self.name == "linear":
            part = left / decay
        else:
            part = (1 + math.cos(math.pi * (1 - left / decay))) / 2
        floor = self.min_lr_ratio if self.name == "warmup_stable_decay" else 0.0
        return floor + (1 - floor) * part

    def _lengths(self, num_steps: float) -> tuple[int, int]:
        """Steps of warm-up and of decay."""
        warmup = _steps(self.warmup, num_steps)
        if self.name == "constant":
            return warmup, 0
        if self.name == "warmup_stable_decay":
            return warmup, _steps(self.decay, num_steps)
        return warmup, max(0, int(num_steps) - warmup)


def _steps(length: float, num_steps: float) -> int:
    whole = length >= 1 or length == 0
    return int(length) if whole else round(length * num_steps)
