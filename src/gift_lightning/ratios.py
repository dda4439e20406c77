"""Token weights from another model: the reference (iw-SFT, FLOW, STM) or the old policy (PSFT)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gift_lightning.distribution import Scalar
from gift_lightning.target import LabelView, Target, Tokens, require_choice, require_number


@dataclass(frozen=True)
class IWSFT(Target):
    """−sg[w]·log p_y with an importance weight against the reference (arXiv 2507.12856).

    Official code emmyqin/iw_sft, bounding_trainers.py. At sequence level w is the exponential of
    the sequence's mean log-ratio, so the head is projected once more before the loss.
    """

    needs_reference: ClassVar[bool] = True
    level: Literal["sequence", "token"] = "sequence"
    """One weight for each sequence, or for each token."""
    temperature: float = 1.0
    """Factor on the log-ratio; the class of the official code says 2, its call passes 1."""
    clip_min: float | None = None
    """Lower bound of w; by default 0 for sequences, 0.2 for tokens."""
    clip_max: float | None = None
    """Upper bound of w; by default 16 for sequences, 1.8 for tokens."""

    def __post_init__(self) -> None:
        require_choice(self, "level", "sequence", "token")
        low, high = (0.0, 16.0) if self.level == "sequence" else (0.2, 1.8)
        if self.clip_min is None:
            object.__setattr__(self, "clip_min", low)
        if self.clip_max is None:
            object.__setattr__(self, "clip_max", high)
        require_number(self, "temperature")
        require_number(self, "clip_max", 0)
        require_number(self, "clip_min", 0, self.clip_max or 0)

    @property
    def ahead_reads(self) -> frozenset[str]:
        return frozenset({"student", "reference"} if self.level == "sequence" else ())

    def look_ahead(self, labels: LabelView) -> Float[Tensor, " n"]:
        assert labels.logp_y is not None and labels.reference_logp_y is not None
        return labels.sequence_mean(labels.logp_y - labels.reference_logp_y)

    def label_weight(self, t: Tokens) -> Scalar:
        ratio = t.ahead if t.ahead is not None else t.logp_y - t.base.logp_y
        return (self.temperature * ratio).exp().clamp(self.clip_min, self.clip_max)


@dataclass(frozen=True)
class PSFT(Target):
    """−min(ρ, clip(ρ, 1 − low, 1 + high)), ρ = p_y / o_y against the old policy (arXiv 2508.17784).

    The lower clip never binds (the advantage is 1); tokens above 1 + high give no gradient.
    """

    needs_old_policy: ClassVar[bool] = True
    clip_low: float = 0.2
    """Distance of the lower bound of ρ from 1."""
    clip_high: float = 0.28
    """Distance of the upper bound of ρ from 1."""

    def __post_init__(self) -> None:
        require_number(self, "clip_low", 0, 1)
        require_number(self, "clip_high", 0)

    def _ratio(self, t: Tokens) -> Tensor:
        assert t.old_logp is not None, "guarded by Target.check"
        return (t.logp_y - t.old_logp).clamp(-20, 20).exp()  # the official clamp of the log-ratio

    def label_weight(self, t: Tokens) -> Scalar:
        ratio = self._ratio(t)
        clamped = ratio <= math.exp(-20)  # where the official clamp has no gradient
        return ratio * (ratio <= 1 + self.clip_high) * ~clamped

    def published_value(self, t: Tokens) -> Tensor | None:
        ratio = self._ratio(t)
        return -torch.minimum(ratio, ratio.clamp(1 - self.clip_low, 1 + self.clip_high))


@dataclass(frozen=True)
class FLOW(Target):
    """−w·log p_y, w = exp(−loss of the reference / τ) per token or sequence (arXiv 2502.02797)."""

    needs_reference: ClassVar[bool] = True
    temperature: float
    """τ in nats; the paper takes the median loss of the reference."""
    level: Literal["token", "sequence"] = "token"
    """Whether the loss is the token's or its sequence's mean."""

    def __post_init__(self) -> None:
        require_number(self, "temperature", 0, above=True)
        require_choice(self, "level", "token", "sequence")

    @property
    def ahead_reads(self) -> frozenset[str]:
        return frozenset({"reference"} if self.level == "sequence" else ())

    def look_ahead(self, labels: LabelView) -> Float[Tensor, " n"]:
        assert labels.reference_logp_y is not None
        return labels.sequence_mean(labels.reference_logp_y)

    def label_weight(self, t: Tokens) -> Scalar:
        logp = t.ahead if t.ahead is not None else t.base.logp_y
        return (logp / self.temperature).exp()


@dataclass(frozen=True)
class STM(Target):
    """−1[perplexity of the label under the reference ≤ threshold]·log p_y (arXiv 2501.14315)."""

    needs_reference: ClassVar[bool] = True
    threshold: float = 2.5
    """Largest perplexity exp(−log r_y) that is trained."""

    def __post_init__(self) -> None:
        require_number(self, "threshold", 0, above=True)

    def label_weight(self, t: Tokens) -> Scalar:
        return (-t.base.logp_y <= math.log(self.threshold)).to(t.logits.dtype)
