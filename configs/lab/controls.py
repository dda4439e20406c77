"""A control for the lab: GAC whose statistics say nothing about the current step."""

import random
from typing import Any

from gift_lightning.controllers import GAC, MixStats


class ShuffledGAC(GAC):
    """GAC with each statistic drawn at random from all that it has measured so far.

    The values are those of the run, their order is not: what is left of GAC is its prior and the
    level of its statistics.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[list[float]] = []
        self._state += ("seen",)

    def update(self, stats: MixStats | None, step: int) -> float:
        if stats is not None and self.is_due(step):
            self.seen.append([stats.sigma_r2, stats.sigma_s2, stats.delta2])
            draw = random.Random(step)
            chosen = [draw.choice(column) for column in zip(*self.seen, strict=True)]
            stats = MixStats(*chosen, kl=stats.kl, has_signal=stats.has_signal)
        return super().update(stats, step)
