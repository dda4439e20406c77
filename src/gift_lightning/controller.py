"""What a rule is that sets μ, the weight of the demonstrations, and what it may know."""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

Measure = Literal["proxy", "gradient", "kl"]


@dataclass(frozen=True)
class MixStats:
    """What an optimizer step says about its two gradients, of all its micro-batches and ranks."""

    sigma_r2: float
    """Noise of the RL gradient; NaN without a rollout."""
    sigma_s2: float
    """Noise of the imitation gradient; NaN without a demonstration."""
    delta2: float
    """Squared distance of the two."""
    kl: float = math.nan
    """KL of the policy to the reference, over sampled tokens; NaN if nobody asked."""
    has_signal: bool = True
    """Whether any rollout has an advantage; there is no RL gradient otherwise. `Hybrid` sets it."""


class Controller(ABC):
    """A rule for μ.

    Attributes:
        mu: what applies now.
    """

    mu: float
    _state: tuple[str, ...] = ()
    """Attributes that change in a run; options are the config's, also when it is resumed."""

    @property
    def measures(self) -> frozenset[Measure]:
        """What `update` reads of the step before."""
        return frozenset()

    @abstractmethod
    def update(self, stats: MixStats | None, step: int) -> float:
        """μ of optimizer step `step`, counted from 0; once per step, before its first micro-batch.

        Args:
            stats: of the step before, None where there is none.
            step: which it is.
        """

    def is_due(self, step: int) -> bool:
        """Whether `update` at that step will read proxies or gradients; a KL is always there."""
        return bool(self.measures)

    def parts(self) -> dict[str, float]:
        """What μ was made of, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({name: getattr(self, name) for name in self._state})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(copy.deepcopy(state))
