"""One equation for supervised fine-tuning: a target distribution Q per token.

    loss_t = scale · T · CE(Q, softmax(z / T)),     Q = γ·δ_y + (1 − γ)·π̃     (all but z detached)

so that ∂loss_t/∂z = scale · (softmax(z / T) − Q). A method is a choice of γ (`label_weight`), π̃
(`residual`) and, rarely, `scale` and T; methods whose logit gradient is not of that form add a
`second_term`. Target-SFT (arXiv 2606.11189, Eq. 6 and Corollaries 1 and 2) is the source of the
form; the scale is kept because dropping it changes ASFT (docs/targets.md).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gift_lightning.distribution import Distribution, Peaks, Scalar


class Tokens(Distribution):
    """What a target sees of n supervised tokens: the student, and whatever else was asked for.

    Attributes:
        reference: the frozen reference (for distillation: the teacher), or None; it knows no class
            that the student lacks, which is for the caller to see to.
        old_logp: [n] label log-probability under the old policy, or None.
        ahead: [n] what `Target.look_ahead` found, or None.
    """

    def __init__(
        self,
        logits: Float[Tensor, "n v"],
        labels: Int[Tensor, " n"],
        *,
        reference: Distribution | None = None,
        old_logp: Float[Tensor, " n"] | None = None,
        ahead: Float[Tensor, " n"] | None = None,
        buffer: Float[Tensor, "n v"] | None = None,
        complete: bool = False,
    ) -> None:
        super().__init__(logits, labels, buffer=buffer, complete=complete)
        self.old_logp = old_logp
        self.ahead = ahead
        self.reference = reference

    @property
    def base(self) -> Distribution:
        """The reference of a target that declares `needs_reference`."""
        assert self.reference is not None, "guarded by Target.check"
        return self.reference


@dataclass(frozen=True)
class LabelView:
    """Label log-probabilities of whole sequences: what `look_ahead` may use.

    Attributes:
        logp_y: [n] the student's, if the target's `ahead_reads` names it.
        reference_logp_y: [n] the reference's, likewise.
        sequence_ids: [n] the sequence that each token belongs to; its tokens are in order.
    """

    logp_y: Float[Tensor, " n"] | None
    reference_logp_y: Float[Tensor, " n"] | None
    sequence_ids: Int[Tensor, " n"]

    def sequence_mean(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Mean of x over each token's sequence, given back to each of its tokens."""
        _, where = self.sequence_ids.unique(return_inverse=True)
        total = x.new_zeros(int(where.max()) + 1 if len(x) else 0).index_add(0, where, x)
        count = torch.zeros_like(total).index_add(0, where, torch.ones_like(x))
        return (total / count)[where]

    def sequence_suffix_sum(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Σ_{s ≥ t} x_s within each token's sequence."""
        out = torch.empty_like(x)
        for i in self.sequence_ids.unique():
            rows = self.sequence_ids == i
            out[rows] = x[rows].flip(0).cumsum(0).flip(0)
        return out


class Target(ABC):
    """A choice of target distribution. Subclass it as a frozen dataclass and write `label_weight`.

    The hooks return one value per token ([n] tensors, or plain floats) and see only detached
    numbers, so no stop-gradient can be forgotten. They must not modify what they are given.
    """

    needs_reference: ClassVar[bool] = False
    """Whether the target reads `t.reference`."""
    needs_old_policy: ClassVar[bool] = False
    """Whether the target reads `t.old_logp`, the label log-probability of an earlier policy."""

    @property
    def temperature_of_softmax(self) -> float:
        """T in the equation of this module."""
        return 1.0

    @abstractmethod
    def label_weight(self, t: Tokens) -> Scalar | tuple[Scalar, Scalar]:
        """γ, the trust in the demonstrated token; or (γ, 1 − γ) where 1 − γ would cancel.

        A share of Q within the token, unlike `token_weight`, a factor on its finished loss.
        """

    def residual(self, t: Tokens) -> Float[Tensor, "#n #v"] | Peaks | None:
        """π̃, where the rest of the mass goes. None: the student itself, which gives no gradient.

        One row is the same for all tokens, one column the same for all classes. What is linear in
        the reference takes `t.base.mass`, so that a truncated one is never spread over the classes.
        """
        return None

    def scale(self, t: Tokens) -> Scalar:
        """A factor on the whole token, for methods whose Q needs one (ASFT, SFT + KL)."""
        return 1.0

    def published_value(self, t: Tokens) -> Float[Tensor, " n"] | None:
        """The published loss where it is not scale · T · CE(Q, π) but has the same gradient."""
        return None

    def second_term(self, t: Tokens) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"]] | None:
        """An added loss whose logit gradient is not p − Q: its value, and its closed-form gradient.

        The gradient is a new tensor; entries of classes that do not exist are ignored.
        """
        return None

    @property
    def ahead_reads(self) -> frozenset[str]:
        """Which of {"student", "reference"} `look_ahead` reads; each costs one head projection."""
        return frozenset()

    def look_ahead(self, labels: LabelView) -> Float[Tensor, " n"]:
        """What must be known of whole sequences before their first token; arrives as `t.ahead`."""
        raise NotImplementedError

    def resolve(self, reference_logp_y: Float[Tensor, " n"], num_classes: int) -> "Target":
        """The target with what depends on the data filled in (GIFT's β from its `trust`).

        Args:
            reference_logp_y: [n] the reference's label log-probabilities on the training data.
            num_classes: vocabulary size.
        """
        return self

    @property
    def is_resolved(self) -> bool:
        return True

    def check(self, *, reference: bool, old_policy: bool) -> None:
        """Refuse to start without what the target reads.

        Raises:
            ValueError: naming what is missing and how to give it.
        """
        name = type(self).__name__
        if self.needs_reference and not reference:
            raise ValueError(
                f"target {name} needs a reference and has none: set model.reference, for example "
                "`--model.reference FrozenCopy` (or pass reference_logits)."
            )
        if self.needs_old_policy and not old_policy:
            raise ValueError(
                f"target {name} needs the old policy's label log-probabilities: pass old_logp."
            )


def require(ok: bool, message: str) -> None:
    """Raises ValueError with this message unless `ok`."""
    if not ok:
        raise ValueError(message)


def require_number(
    target: Target, key: str, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> None:
    """Raises ValueError unless the field is finite, from `low` (or above it) to `high`."""
    value = getattr(target, key)
    ok = math.isfinite(value) and (low < value if above else low <= value) and value <= high
    bounds = f" {'above' if above else 'from'} {low:g}" if low > -math.inf else ""
    bounds += f" to {high:g}" if high < math.inf else ""
    require(ok, f"{type(target).__name__}: {key} must be a finite number{bounds}, got {value}.")


def require_choice(target: Target, key: str, *choices: str) -> None:
    """Raises ValueError unless the field is one of the choices."""
    value = getattr(target, key)
    known = " or ".join(choices)
    require(value in choices, f"{type(target).__name__}: {key} is {known}, got {value!r}.")
