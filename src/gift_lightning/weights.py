"""Targets whose residual is the student: token weights, and nothing else.

With π̃ = p the mass 1 − γ gives no gradient, so ∂loss/∂z = γ·(p − δ): each row is one weight on the
cross-entropy gradient. γ above 1 is legitimate and never clamped. The reported value is the
published one: γ·(−log p_y) for detached weights, the named closed form otherwise.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gift_lightning.distribution import Scalar, row_dot
from gift_lightning.target import (
    LabelView,
    Target,
    Tokens,
    require,
    require_choice,
    require_number,
)


@dataclass(frozen=True)
class DFT(Target):
    """Dynamic fine-tuning: −sg[p_y]·log p_y (arXiv 2508.05629)."""

    def label_weight(self, t: Tokens) -> Scalar:
        return t.p_y


@dataclass(frozen=True)
class BeyondLog(Target):
    """(1 − p_y^α)/α, optionally on some tokens only (arXiv 2510.00526).

    The official thresholded variants also divide by the number of kept tokens; here, as for every
    target, the normaliser is the module's `reduction`.
    """

    alpha: float
    """Exponent; 0 is −log p_y, 1 has DFT's gradient."""
    keep_above: float | None = None
    """Train only tokens with p_y at or above this probability."""
    keep_below: float | None = None
    """Train only tokens with p_y at or below this probability."""

    def __post_init__(self) -> None:
        require_number(self, "alpha")
        for key in "keep_above", "keep_below":
            if getattr(self, key) is not None:
                require_number(self, key, 0, 1)
        if self.keep_above is not None and self.keep_below is not None:
            require_number(self, "keep_above", 0, self.keep_below)

    def _kept(self, t: Tokens) -> Tensor:
        keep = torch.ones_like(t.p_y)
        if self.keep_above is not None:
            keep *= t.p_y >= self.keep_above
        if self.keep_below is not None:
            keep *= t.p_y <= self.keep_below
        return keep

    def label_weight(self, t: Tokens) -> Scalar:
        return self._kept(t) * (self.alpha * t.logp_y).exp() if self.alpha else self._kept(t)

    def published_value(self, t: Tokens) -> Tensor | None:
        if not self.alpha:
            return None
        return self._kept(t) * -torch.expm1(self.alpha * t.logp_y) / self.alpha


@dataclass(frozen=True)
class ProFiT(Target):
    """−1[p_y kept]·log p_y, the threshold on the detached p_y (arXiv 2601.09195)."""

    tau: float | tuple[float, float] = 0.1
    """Probability threshold; two of them, low and high, for direction "middle"."""
    direction: Literal["higher", "lower", "middle"] = "higher"
    """Keep tokens at or above tau, below tau, or from the low threshold up to the high one."""

    def __post_init__(self) -> None:
        require_choice(self, "direction", "higher", "lower", "middle")
        taus = [self.tau] if isinstance(self.tau, int | float) else list(self.tau)
        wanted = 2 if self.direction == "middle" else 1
        require(
            len(taus) == wanted and taus == sorted(taus) and all(0 <= tau <= 1 for tau in taus),
            f"ProFiT: direction {self.direction!r} takes {wanted} ascending probabilities as tau, "
            f"got {self.tau}.",
        )

    def label_weight(self, t: Tokens) -> Scalar:
        if not isinstance(self.tau, int | float):
            keep = (t.p_y >= self.tau[0]) & (t.p_y <= self.tau[1])
        else:
            keep = t.p_y >= self.tau if self.direction == "higher" else t.p_y < self.tau
        return keep.to(t.p_y.dtype)


@dataclass(frozen=True)
class EAFT(Target):
    """−sg[(H_k / divisor)^α]·log p_y, H_k the entropy of the k largest logits (arXiv 2601.02151).

    Defaults are the official code's, whose divisor 3.0 stands for ln 20. `k=None` takes the entropy
    of the whole vocabulary over log V, with 1e-10 added inside the logarithm as in the code that
    has this variant (zhangmiaosen2000/Towards-On-Policy-SFT, losses.py); divisor is then not used.
    """

    k: int | None = 20
    """How many of the largest logits; null for the whole vocabulary."""
    divisor: float = 3.0
    """What the entropy in nats is divided by."""
    alpha: float = 1.0
    """Exponent of the weight."""

    def __post_init__(self) -> None:
        require(self.k is None or self.k >= 2, f"EAFT: k must be 2 or more, got {self.k}.")
        require_number(self, "divisor", 0, above=True)
        require_number(self, "alpha", 0)

    def label_weight(self, t: Tokens) -> Scalar:
        if self.k is None:
            most = torch.as_tensor(t.num_classes, dtype=t.logits.dtype).log().flatten()
            return (_floored_entropy(t).clamp_min(0) / most) ** self.alpha
        top = t.logits.topk(min(self.k, t.logits.shape[-1]), -1).values.log_softmax(-1)
        entropy = torch.special.entr(top.exp()).sum(-1)
        return (entropy / self.divisor) ** self.alpha


def _floored_entropy(t: Tokens) -> Tensor:
    """−Σ p·log(p + 1e-10), the entropy that IDFT's and the full-vocabulary EAFT's code uses."""
    return -row_dot(t.p, (t.p + 1e-10).log_())


@dataclass(frozen=True)
class IDFT(Target):
    """−sg[p_y^κ]·log p_y, κ = 1 + strength·(clip(exp(−(log p_y + H)/β)) − 1) (arXiv 2602.12222).

    As in the official code, the entropy has 1e-10 inside its logarithm and tokens with p_y below
    1e-10 give no gradient. The paper ramps `strength` from 0 to 1; the released run divides 0 by 0
    there, so it is a constant here.
    """

    beta: float = 1.0
    """Temperature of the exponent."""
    clip_min: float = 0.1
    """Lower bound of κ at full strength."""
    clip_max: float = 2.0
    """Upper bound of κ at full strength."""
    strength: float = 1.0
    """0 is DFT, 1 is the full method."""

    def __post_init__(self) -> None:
        require_number(self, "beta", 0, above=True)
        require_number(self, "clip_max", 0)
        require_number(self, "clip_min", 0, self.clip_max)
        require_number(self, "strength", 0, 1)

    def _clamped_and_kappa(self, t: Tokens) -> tuple[Tensor, Tensor]:
        logp_y = t.logp_y.clamp_min(math.log(1e-10))
        kappa = (-(logp_y + _floored_entropy(t)) / self.beta).exp()
        return logp_y, 1 + self.strength * (kappa.clamp(self.clip_min, self.clip_max) - 1)

    def label_weight(self, t: Tokens) -> Scalar:
        logp_y, kappa = self._clamped_and_kappa(t)
        return (kappa * logp_y).exp() * (t.p_y >= 1e-10)

    def published_value(self, t: Tokens) -> Tensor | None:
        logp_y, kappa = self._clamped_and_kappa(t)
        return (kappa * logp_y).exp() * -logp_y


@dataclass(frozen=True)
class DEFT(Target):
    """−(p_y^α − 1)/α with a detached exponent chosen per token (arXiv 2602.11424).

    "renyi": α = Σ_k p_k². "cayley": α = clip(f + (1 − f)·(1 − d)/(1 + d), 0.001, 1), d = 1 − p_y,
    f half the mean p_y of the micro-batch, as in the official code; its gradient therefore depends
    on how a step is split, and the head is projected once more before the loss.
    """

    form: Literal["renyi", "cayley"] = "renyi"
    """Which exponent."""

    def __post_init__(self) -> None:
        require_choice(self, "form", "renyi", "cayley")

    @property
    def ahead_reads(self) -> frozenset[str]:
        return frozenset({"student"} if self.form == "cayley" else ())

    def look_ahead(self, labels: LabelView) -> Float[Tensor, " n"]:
        assert labels.logp_y is not None
        return labels.logp_y.exp().mean().expand_as(labels.logp_y)

    def _alpha_and_epsilon(self, t: Tokens) -> tuple[Tensor, float]:
        if self.form == "renyi":
            return row_dot(t.p, t.p), 1e-6
        assert t.ahead is not None, "cayley looks ahead"
        f, d = 0.5 * t.ahead, 1 - t.p_y + 1e-8
        return (f + (1 - f) * (1 - d) / (1 + d + 1e-8)).clamp(1e-3, 1.0), 1e-8

    def label_weight(self, t: Tokens) -> Scalar:
        alpha, epsilon = self._alpha_and_epsilon(t)
        return (alpha * t.logp_y).exp() * alpha / (alpha + epsilon)

    def published_value(self, t: Tokens) -> Tensor | None:
        alpha, epsilon = self._alpha_and_epsilon(t)
        return -torch.expm1(alpha * t.logp_y) / (alpha + epsilon)


@dataclass(frozen=True)
class TALR(Target):
    """−sg[p_y^(1/τ)]·log p_y (arXiv 2509.20758; our reading, the exact form is not confirmed)."""

    tau: float
    """Temperature; 1 is DFT. The paper is reported to use the median of the mean token losses."""

    def __post_init__(self) -> None:
        require_number(self, "tau", 0, above=True)

    def label_weight(self, t: Tokens) -> Scalar:
        return (t.logp_y / self.tau).exp()


@dataclass(frozen=True)
class Focal(Target):
    """−(1 − p_y)^γ·log p_y, the factor differentiated unless `detach` (arXiv 1708.02002)."""

    gamma: float = 2.0
    """Exponent of the factor; 0 is standard SFT."""
    detach: bool = False
    """Whether the factor is a constant in the gradient."""

    def __post_init__(self) -> None:
        require_number(self, "gamma", 0)

    def label_weight(self, t: Tokens) -> Scalar:
        miss = -torch.expm1(t.logp_y)  # 1 − p_y
        factor = miss**self.gamma
        if self.detach or not self.gamma:
            return factor
        # c·p·(1 − p)^(c−1)·log p tends to 0 as p → 1, where (1 − p)^(c−1) may be infinite.
        slope = self.gamma * t.p_y * t.logp_y * miss ** (self.gamma - 1)
        slope = slope.masked_fill((miss == 0) | (t.p_y == 0), 0.0)
        return factor - slope

    def published_value(self, t: Tokens) -> Tensor | None:
        return (-torch.expm1(t.logp_y)) ** self.gamma * -t.logp_y


@dataclass(frozen=True)
class LUFFYShaping(Target):
    """−p_y/(p_y + γ), LUFFY's off-policy token loss at advantage 1 (arXiv 2504.14945)."""

    gamma: float = 0.1
    """The shaping constant."""

    def __post_init__(self) -> None:
        require_number(self, "gamma", 0, above=True)

    def label_weight(self, t: Tokens) -> Scalar:
        return self.gamma * t.p_y / (t.p_y + self.gamma) ** 2

    def published_value(self, t: Tokens) -> Tensor | None:
        return -t.p_y / (t.p_y + self.gamma)


@dataclass(frozen=True)
class CHORDPhi(Target):
    """−sg[p_y·(1 − p_y)]·log p_y, CHORD-φ (arXiv 2508.11408).

    Official: modelscope/Trinity-RFT, `chord_policy_loss.py`, `SFTPhiLossFn`. A weight is at most
    1/4, so a μ with it is not comparable with a μ without.
    """

    cutoff: float = 1.0
    """Tokens whose probability is above give no gradient; 1 trains all."""

    def __post_init__(self) -> None:
        require_number(self, "cutoff", 0, 1, above=True)

    def label_weight(self, t: Tokens) -> Scalar:
        phi = -t.p_y * torch.expm1(t.logp_y)
        return phi * (t.logp_y <= math.log(self.cutoff))

    def published_value(self, t: Tokens) -> Tensor | None:
        return -(-t.p_y * torch.expm1(t.logp_y)) * t.logp_y.clamp_max(math.log(self.cutoff))
