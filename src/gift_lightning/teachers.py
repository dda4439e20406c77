"""Targets that follow a teacher, which is the reference: distillation and Target-SFT."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gift_lightning.distribution import Scalar
from gift_lightning.target import Target, Tokens, require_number


def _top(logits: Tensor, k: int | None) -> Tensor:
    """Logits with everything but the k largest of each row absent."""
    if k is None or k >= logits.shape[-1]:
        return logits
    top = logits.topk(k, -1)
    return torch.full_like(logits, -math.inf).scatter_(-1, top.indices, top.values)


@dataclass(frozen=True)
class Distillation(Target):
    """(1 − w)·(−log p_y) + w·T²·CE(softmax(t/T), softmax(z/T)), teacher t = the reference.

    Cross-entropy, not KL: the value differs from Hinton's by the teacher's entropy, the gradient
    does not. `top_k` keeps and renormalises the teacher's k largest.
    """

    needs_reference: ClassVar[bool] = True
    weight: float = 1.0
    """w, the teacher's share; 0.8 is the Distill baseline of arXiv 2606.11189."""
    temperature: float = 1.0
    """T, of teacher and student."""
    top_k: int | None = None
    """How many of the teacher's largest probabilities to keep; null for all."""

    def __post_init__(self) -> None:
        require_number(self, "weight", 0, 1)
        require_number(self, "temperature", 0, above=True)
        if self.top_k is not None:
            require_number(self, "top_k", 1)

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
class TargetSFT(Target):
    """Q = p_y·δ + (1 − p_y)·π̃, π̃ ∝ π^{1−η}·t^{η}, teacher t = the reference (arXiv 2606.11189).

    The form the paper trains with, which is the optimum for r = λ·log(t/π), not for its stated
    r = λ·log t. `top_k` restricts π̃ to the teacher's k largest tokens of each row and renormalises;
    the label is not forced in. The paper caches 64; its tail rule is not published.
    """

    needs_reference: ClassVar[bool] = True
    eta: float = 0.5
    """η, the teacher's share in the residual; 0 is DFT."""
    top_k: int | None = None
    """How many of the teacher's largest tokens to keep; null for all."""

    def __post_init__(self) -> None:
        require_number(self, "eta", 0, 1)
        if self.top_k is not None:
            require_number(self, "top_k", 1)

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
