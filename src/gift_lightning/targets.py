"""The target distributions that a config names; each class is one row of docs/targets.md.

Defaults are the publication's. Token weights (DFT, EAFT, ...) live in `weights` and are re-exported
here; this file has the rows that put mass elsewhere than on the label and the student.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gift_lightning.target import LabelView, Scalar, Target, Tokens, row_dot
from gift_lightning.weights import (
    DEFT,
    DFT,
    EAFT,
    FLOW,
    IDFT,
    IWSFT,
    PSFT,
    STM,
    TALR,
    BeyondLog,
    Focal,
    LUFFYShaping,
    ProFiT,
    _require,
)

__all__ = [
    "ASFT",
    "DEFT",
    "DFT",
    "EAFT",
    "FLOW",
    "GEM",
    "GIFT",
    "IDFT",
    "IWSFT",
    "PSFT",
    "SFTKL",
    "STM",
    "TALR",
    "BeyondLog",
    "Distillation",
    "EntropyBonus",
    "Focal",
    "GIFTExact",
    "LUFFYShaping",
    "LabelSmoothing",
    "OneHot",
    "ProFiT",
    "Target",
    "TargetSFT",
]


@dataclass(frozen=True)
class OneHot(Target):
    """Standard SFT: −log p_y."""

    def label_weight(self, t: Tokens) -> Scalar:
        return 1.0


@dataclass(frozen=True)
class LabelSmoothing(Target):
    """(1 − ε)·δ + ε·uniform over the whole vocabulary, label included (torch's convention)."""

    epsilon: float
    """Mass spread over the vocabulary, 0.1 by convention."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.epsilon <= 1,
            f"LabelSmoothing: epsilon must be between 0 and 1, got {self.epsilon}.",
        )

    def label_weight(self, t: Tokens) -> Scalar:
        return 1 - self.epsilon

    def residual(self, t: Tokens) -> Tensor | None:
        return torch.ones_like(t.logits[:, :1]) / t.num_classes


class _FromReference(Target):
    """A target that reads the reference's distribution."""

    @property
    def needs_reference(self) -> bool:
        return True


def _log_expm1(beta: float) -> float:
    """log(e^β − 1) without overflow; −inf at β = 0."""
    return beta + math.log(-math.expm1(-beta)) if beta else -math.inf


def _require_beta(name: str, beta: float) -> None:
    _require(
        beta >= 0,  # false for NaN too
        f"{name}: beta is a tilt in nats, 0 or more (inf is standard SFT), got {beta}.",
    )


@dataclass(frozen=True)
class GIFT(_FromReference):
    """q ∝ p_ref·e^{β·1[y]}, the finite-temperature Gibbs target (arXiv 2601.09233).

    γ = (e^β − 1)·r_y / (1 + (e^β − 1)·r_y) and π̃ = r, in the log domain. β is a threshold on the
    label's surprise: q_y is above one half while −log r_y + log(1 − r_y) < β. Departure from the
    official code (zzy1127/GIFT, fsdp_gift_trainer.py): no floor inside its logarithm unless asked.
    """

    beta: float = 20.0
    """Tilt towards the label in nats; inf is standard SFT, 0 distils the reference."""
    smoothing: float = 0.0
    """Share of the uniform distribution mixed into the reference (0.01 for Llama in the paper)."""
    floor: float = 0.0
    """Added to the reference's probabilities before they are renormalised; 1e-10 officially."""
    trust: float | None = None
    """Choose beta by meaning: the mean label mass on the training data, found before training."""

    def __post_init__(self) -> None:
        _require_beta("GIFT", self.beta)
        _require(
            0 <= self.smoothing <= 1,
            f"GIFT: smoothing must be between 0 and 1, got {self.smoothing}.",
        )
        _require(
            0 <= self.floor < math.inf, f"GIFT: floor must be finite and 0 or more: {self.floor}."
        )
        _require(
            self.trust is None or 0 < self.trust < 1,
            f"GIFT: trust is a mean label mass between 0 and 1, got {self.trust}.",
        )

    def _prior(self, p: Tensor, num_classes: Scalar) -> Tensor:
        """(1 − λ)·p + λ/V + floor, renormalised: the official code's tilt starts from here."""
        if not (self.smoothing or self.floor):
            return p
        added = self.smoothing / num_classes + self.floor
        return ((1 - self.smoothing) * p + added) / (1 + num_classes * self.floor)

    def label_weight(self, t: Tokens) -> tuple[Scalar, Scalar]:
        if self.beta == math.inf:
            return 1.0, 0.0
        if self.smoothing or self.floor:
            logp_y = self._prior(t.base.p_y[:, None], t.base.num_classes)[:, 0].log()
        else:
            logp_y = t.base.logp_y
        x = logp_y + _log_expm1(self.beta)
        return x.sigmoid(), (-x).sigmoid()

    def residual(self, t: Tokens) -> Tensor | None:
        return self._prior(t.base.p, t.base.num_classes)

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
class GIFTExact(_FromReference):
    """The exact conditional of π_base·e^{βR} when only the demonstrated completion is rewarded.

    γ_t = σ(S_t + log(e^β − 1)), S_t = Σ_{s ≥ t} log r(y_s): the soft-Q form that the paper's
    constant β approximates (arXiv 2601.09233, App. B). The label's mass rises along the sequence.
    The reference is projected once more, to know the sequence's surprise before its first token.
    """

    beta: float = 20.0
    """Reward of the whole completion in nats."""

    def __post_init__(self) -> None:
        _require_beta("GIFTExact", self.beta)

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

    def residual(self, t: Tokens) -> Tensor | None:
        return t.base.p


@dataclass(frozen=True)
class ASFT(_FromReference):
    """−sg[p_y]·log p_y + λ·KL(r‖π), anchored SFT (arXiv 2509.23753).

    The scale p_y + λ is part of the method. Reported without the constant −λ·H(r). The paper's λ is
    0.05, its code's default 0.1.
    """

    kl_weight: float = 0.05
    """λ."""

    def __post_init__(self) -> None:
        _require(self.kl_weight >= 0, f"ASFT: kl_weight must be 0 or more, got {self.kl_weight}.")

    def scale(self, t: Tokens) -> Scalar:
        return t.p_y + self.kl_weight

    def label_weight(self, t: Tokens) -> Scalar:
        return (t.p_y / (t.p_y + self.kl_weight)).nan_to_num(1.0)  # 0/0: no weight either way

    def residual(self, t: Tokens) -> Tensor | None:
        return t.base.p


@dataclass(frozen=True)
class SFTKL(_FromReference):
    """−log p_y + λ·KL to the reference: forward KL(r‖π), or reverse KL(π‖r).

    The forward form is (1 + λ)·CE of a mixture, reported without the constant −λ·H(r); the reverse
    form is a second term.
    """

    kl_weight: float
    """λ."""
    direction: Literal["forward", "reverse"] = "forward"
    """Which divergence."""

    def __post_init__(self) -> None:
        _require(self.kl_weight >= 0, f"SFTKL: kl_weight must be 0 or more, got {self.kl_weight}.")
        _require(
            self.direction in ("forward", "reverse"),
            f"SFTKL: direction is forward or reverse, got {self.direction!r}.",
        )

    def scale(self, t: Tokens) -> Scalar:
        return 1 + self.kl_weight if self.direction == "forward" else 1.0

    def label_weight(self, t: Tokens) -> Scalar:
        return 1 / (1 + self.kl_weight) if self.direction == "forward" else 1.0

    def residual(self, t: Tokens) -> Tensor | None:
        return t.base.p if self.direction == "forward" else None

    def second_term(self, t: Tokens) -> tuple[Tensor, Tensor] | None:
        if self.direction == "forward":
            return None
        ratio = t.logp - t.base.logp
        ratio.masked_fill_(t.p == 0, 0.0)  # 0 · log 0
        kl = row_dot(t.p, ratio)
        gradient = ratio.sub_(kl[:, None]).mul_(t.p).mul_(self.kl_weight)
        return self.kl_weight * kl, gradient


@dataclass(frozen=True)
class EntropyBonus(Target):
    """−log p_y − λ·H(π), not detached: the SFT + Entropy baseline of arXiv 2601.09233."""

    weight: float
    """λ; the paper's value is not known."""

    def label_weight(self, t: Tokens) -> Scalar:
        return 1.0

    def second_term(self, t: Tokens) -> tuple[Tensor, Tensor] | None:
        gradient = (t.logp + t.entropy[:, None]).mul_(t.p).mul_(self.weight)
        return -self.weight * t.entropy, gradient


@dataclass(frozen=True)
class GEM(Target):
    """−Σ_k q_k·ω_k·(log p_y − log p_k), q = sg softmax(z/β) (arXiv 2408.16673).

    "linear" (ω = 1) has the gradient of β·CE(δ, softmax(z/β)), which is what is reported;
    "logsigmoid" has ω_k = sg σ(0.01·(z_k − z_y)). Official code liziniu/GEM, sft_trainer.py.
    """

    beta: float = 0.7
    """Temperature of q, between 0 and 1 for a q sharper than the student."""
    form: Literal["linear", "logsigmoid"] = "linear"
    """The official function defaults to logsigmoid, its training arguments to linear."""

    def __post_init__(self) -> None:
        _require(self.beta > 0, f"GEM: beta must be positive, got {self.beta}.")
        _require(
            self.form in ("linear", "logsigmoid"),
            f"GEM: form is linear or logsigmoid, got {self.form!r}.",
        )

    @property
    def temperature_of_softmax(self) -> float:
        return self.beta if self.form == "linear" else 1.0

    def label_weight(self, t: Tokens) -> Scalar:
        return 1.0 if self.form == "linear" else 0.0

    def second_term(self, t: Tokens) -> tuple[Tensor, Tensor] | None:
        if self.form == "linear":
            return None
        difference = t.logits - t.at_label(t.logits)[:, None]
        weighted = (0.01 * difference).sigmoid_().mul_((t.logits / self.beta).softmax(-1))
        if t.absent is not None:
            difference.masked_fill_(t.absent, 0.0)
        value = row_dot(weighted, difference)
        total = weighted.sum(-1, keepdim=True)
        return value, weighted.scatter_add_(-1, t.labels[:, None], -total)


def _top(logits: Tensor, k: int | None) -> Tensor:
    """Logits with everything but the k largest of each row absent."""
    if k is None or k >= logits.shape[-1]:
        return logits
    top = logits.topk(k, -1)
    return torch.full_like(logits, -math.inf).scatter_(-1, top.indices, top.values)


@dataclass(frozen=True)
class Distillation(_FromReference):
    """(1 − w)·(−log p_y) + w·T²·CE(softmax(t/T), softmax(z/T)), teacher t = the reference.

    Cross-entropy, not KL: the value differs from Hinton's by the teacher's entropy, the gradient
    does not. `top_k` keeps and renormalises the teacher's k largest.
    """

    weight: float = 1.0
    """w, the teacher's share; 0.8 is the Distill baseline of arXiv 2606.11189."""
    temperature: float = 1.0
    """T, of teacher and student."""
    top_k: int | None = None
    """How many of the teacher's largest probabilities to keep; null for all."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.weight <= 1, f"Distillation: weight must be between 0 and 1: {self.weight}."
        )
        _require(
            self.temperature > 0, f"Distillation: temperature must be positive: {self.temperature}."
        )
        _require(
            self.top_k is None or self.top_k >= 1,
            f"Distillation: top_k is 1 or more: {self.top_k}.",
        )

    def scale(self, t: Tokens) -> Scalar:
        return 1.0 if self.temperature == 1 else 1 - self.weight

    def label_weight(self, t: Tokens) -> Scalar:
        return 1 - self.weight if self.temperature == 1 else 1.0

    def residual(self, t: Tokens) -> Tensor | None:
        if self.temperature != 1:
            return None
        return t.base.p if self.top_k is None else _top(t.base.logits, self.top_k).softmax(-1)

    def second_term(self, t: Tokens) -> tuple[Tensor, Tensor] | None:
        """The teacher's part where it lives at another temperature than the label's."""
        if self.temperature == 1:
            return None
        teacher = (_top(t.base.logits, self.top_k) / self.temperature).softmax(-1)
        student = t.tempered(self.temperature)
        value = self.weight * self.temperature**2 * student.cross_entropy(teacher)
        return value, (student.p - teacher).mul_(self.weight * self.temperature)


@dataclass(frozen=True)
class TargetSFT(_FromReference):
    """Q = p_y·δ + (1 − p_y)·π̃, π̃ ∝ π^{1−η}·t^{η}, teacher t = the reference (arXiv 2606.11189).

    The form the paper trains with, which is the optimum for r = λ·log(t/π), not for its stated
    r = λ·log t. `top_k` restricts π̃ to the teacher's k largest tokens of each row and renormalises;
    the label is not forced in. The paper caches 64; its tail rule is not published.
    """

    eta: float = 0.5
    """η, the teacher's share in the residual; 0 is DFT."""
    top_k: int | None = None
    """How many of the teacher's largest tokens to keep; null for all."""

    def __post_init__(self) -> None:
        _require(0 <= self.eta <= 1, f"TargetSFT: eta must be between 0 and 1, got {self.eta}.")
        _require(
            self.top_k is None or self.top_k >= 1, f"TargetSFT: top_k is 1 or more: {self.top_k}."
        )

    def label_weight(self, t: Tokens) -> tuple[Scalar, Scalar]:
        return t.p_y, -torch.expm1(t.logp_y)

    def residual(self, t: Tokens) -> Tensor | None:
        if self.eta == 0 and self.top_k is None:
            return t.p
        if self.eta == 0:  # no 0 · (−inf) where the teacher has no such class
            mix = t.logp
        elif self.eta == 1:
            mix = t.base.logp
        else:
            mix = (1 - self.eta) * t.logp + self.eta * t.base.logp
        if self.top_k is not None:
            mix = mix.masked_fill(_top(t.base.logits, self.top_k).isneginf(), -math.inf)
        return mix.softmax(-1)
