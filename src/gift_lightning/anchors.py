"""SFT held back by a divergence: from the reference (ASFT, SFT + KL) or from certainty."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gift_lightning.distribution import Scalar, row_dot
from gift_lightning.target import Target, Tokens, require_choice, require_number


@dataclass(frozen=True)
class ASFT(Target):
    """−sg[p_y]·log p_y + λ·KL(r‖π), anchored SFT (arXiv 2509.23753).

    The scale p_y + λ is part of the method. Reported without the constant −λ·H(r). The paper's λ is
    0.05, its code's default 0.1.
    """

    needs_reference: ClassVar[bool] = True
    kl_weight: float = 0.05
    """λ."""

    def __post_init__(self) -> None:
        require_number(self, "kl_weight", 0)

    def scale(self, t: Tokens) -> Scalar:
        return t.p_y + self.kl_weight

    def label_weight(self, t: Tokens) -> Scalar:
        return (t.p_y / (t.p_y + self.kl_weight)).nan_to_num(1.0)  # 0/0: no weight either way

    def residual(self, t: Tokens) -> Tensor | None:
        return t.base.p


@dataclass(frozen=True)
class SFTKL(Target):
    """−log p_y + λ·KL to the reference: forward KL(r‖π), or reverse KL(π‖r).

    The forward form is (1 + λ)·CE of a mixture, reported without the constant −λ·H(r); the reverse
    form is a second term.
    """

    needs_reference: ClassVar[bool] = True
    kl_weight: float
    """λ."""
    direction: Literal["forward", "reverse"] = "forward"
    """Which divergence."""

    def __post_init__(self) -> None:
        require_number(self, "kl_weight", 0)
        require_choice(self, "direction", "forward", "reverse")

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

    def __post_init__(self) -> None:
        require_number(self, "weight")

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
        require_number(self, "beta", 0, above=True)
        require_choice(self, "form", "linear", "logsigmoid")

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
