"""Gibbs targets: the reference tilted towards the demonstration (arXiv 2601.09233)."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from gift_lightning.distribution import Peaks, Scalar
from gift_lightning.target import LabelView, Target, Tokens, require, require_number


def _log_expm1(beta: float) -> float:
    """log(e^β − 1) without overflow; −inf at β = 0."""
    return beta + math.log(-math.expm1(-beta)) if beta else -math.inf


def _require_beta(target: "GIFT | GIFTExact") -> None:
    name, beta = type(target).__name__, target.beta
    require(  # false for NaN too
        beta >= 0, f"{name}: beta is a tilt in nats, 0 or more (inf is standard SFT), got {beta}."
    )


@dataclass(frozen=True)
class GIFT(Target):
    """q ∝ p_ref·e^{β·1[y]}, the finite-temperature Gibbs target (arXiv 2601.09233).

    γ = (e^β − 1)·r_y / (1 + (e^β − 1)·r_y) and π̃ = r, in the log domain. β is a threshold on the
    label's surprise: q_y is above one half while −log r_y + log(1 − r_y) < β. Departure from the
    official code (zzy1127/GIFT, fsdp_gift_trainer.py): no floor inside its logarithm unless asked.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = 20.0
    """Tilt towards the label in nats; .inf is standard SFT, 0 distils the reference."""
    smoothing: float = 0.0
    """Share of the uniform distribution mixed into the reference (0.01 for Llama in the paper)."""
    floor: float = 0.0
    """Added to the reference's probabilities before they are renormalised; 1e-10 officially."""
    trust: float | None = None
    """Choose beta by meaning: the mean label mass on the training data, found before training."""

    def __post_init__(self) -> None:
        _require_beta(self)
        require_number(self, "smoothing", 0, 1)
        require_number(self, "floor", 0)
        if self.trust is not None:
            require(0 < self.trust < 1, f"GIFT: trust is a mean label mass, not {self.trust}.")

    def _prior(self, p: Any, num_classes: Scalar) -> Any:  # a tensor, or Peaks
        """(1 − λ)·p + λ/V + floor, renormalised: the official code's tilt starts from here."""
        if not (self.smoothing or self.floor):
            return p
        added = self.smoothing / num_classes + self.floor
        return ((1 - self.smoothing) * p + added) / (1 + num_classes * self.floor)

    def label_weight(self, t: Tokens) -> tuple[Scalar, Scalar]:
        if self.beta == math.inf:
            return 1.0, 0.0
        if self.smoothing or self.floor:
            logp_y = self._prior(t.base.p_y[:, None], t.num_classes)[:, 0].log()
        else:
            logp_y = t.base.logp_y
        x = logp_y + _log_expm1(self.beta)
        return x.sigmoid(), (-x).sigmoid()

    def residual(self, t: Tokens) -> Tensor | Peaks | None:
        return self._prior(t.base.mass, t.num_classes)

    @property
    def is_resolved(self) -> bool:
        return self.trust is None

    def resolve(self, reference_logp_y: Float[Tensor, " n"], num_classes: int) -> Target:
        """The GIFT whose mean label mass on these tokens is `trust`.

        Args:
            reference_logp_y: [n] the reference's label log-probabilities on the training data.
            num_classes: vocabulary size, used with smoothing or floor.

        Raises:
            ValueError: if no β has this mean label mass.
        """
        if self.trust is None:
            return self
        p = self._prior(reference_logp_y.double().exp(), float(num_classes))
        logit = p.log() - (-p).log1p()  # logit q_y = β + logit p_y, exactly

        def mass(beta: float) -> float:
            return float((logit + beta).sigmoid().mean())

        if not mass(0.0) < self.trust:
            raise ValueError(
                f"GIFT: trust={self.trust} is not above the reference's own mean label "
                f"probability, {mass(0.0):.4f}, so no beta has it: ask for more."
            )
        low, high = 0.0, 1.0
        while mass(high) < self.trust:
            low, high = high, 2 * high
            if high > 1e4:
                raise ValueError(
                    f"GIFT: no beta reaches trust={self.trust}: the reference gives probability 0 "
                    "to too many labels; ask for less, or set floor or smoothing."
                )
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if mass(middle) < self.trust else (low, middle)
        return replace(self, beta=high, trust=None)


@dataclass(frozen=True)
class GIFTExact(Target):
    """The exact conditional of π_base·e^{βR} when only the demonstrated completion is rewarded.

    γ_t = σ(S_t + log(e^β − 1)), S_t = Σ_{s ≥ t} log r(y_s): the soft-Q form that the paper's
    constant β approximates (arXiv 2601.09233, App. B). The label's mass rises along the sequence.
    The reference is projected once more, to know the sequence's surprise before its first token.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = 20.0
    """Reward of the whole completion in nats."""

    def __post_init__(self) -> None:
        _require_beta(self)

    @property
    def ahead_reads(self) -> frozenset[str]:
        return frozenset({"reference"})

    def look_ahead(self, labels: LabelView) -> Float[Tensor, " n"]:
        assert labels.reference_logp_y is not None
        return labels.sequence_suffix_sum(labels.reference_logp_y)

    def label_weight(self, t: Tokens) -> tuple[Scalar, Scalar]:
        if self.beta == math.inf:
            return 1.0, 0.0
        assert t.ahead is not None
        x = t.ahead + _log_expm1(self.beta)
        return x.sigmoid(), (-x).sigmoid()

    def residual(self, t: Tokens) -> Tensor | Peaks | None:
        return t.base.mass
