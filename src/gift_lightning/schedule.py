"""Learning-rate schedules by name, with warm-up as a fraction or in steps."""

from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


@dataclass(frozen=True)
class Schedule:
    """A schedule of transformers over the run's optimizer steps."""

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

    def build(self, optimizer: Optimizer, num_steps: int) -> LRScheduler:
        """The scheduler of a run of `num_steps` optimizer steps.

        Raises:
            ValueError: if warm-up and decay do not fit into the run.
        """
        warmup = _steps(self.warmup, num_steps)
        decay = _steps(self.decay, num_steps) if self.name == "warmup_stable_decay" else 0
        if warmup + decay > num_steps:
            raise ValueError(
                f"schedule: warm-up of {warmup} and decay of {decay} steps do not fit into a run "
                f"of {num_steps}: shorten model.schedule.warmup or train longer."
            )
        wsd = {"num_decay_steps": decay, "min_lr_ratio": self.min_lr_ratio}
        return get_scheduler(
            "constant_with_warmup" if self.name == "constant" else self.name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=wsd if self.name == "warmup_stable_decay" else None,
        )


def _steps(length: float, num_steps: int) -> int:
    return int(length) if length >= 1 else round(length * num_steps)
