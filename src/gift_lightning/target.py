"""One equation for supervised fine-tuning: a target distribution Q per token.

    loss_t = scale · T · CE(Q, softmax(z / T)),     Q = γ·δ_y + (1 − γ)·π̃     (all but z detached)

so that ∂loss_t/∂z = scale · (softmax(z / T) − Q). A method is a choice of γ (`label_weight`), π̃
(`residual`) and, rarely, `scale` and T; methods whose logit gradient is not of that form add a
`second_term`. Target-SFT (arXiv 2606.11189, Eq. 6 and Corollaries 1 and 2) is the source of the
form; the scale is kept because dropping it changes ASFT (docs/targets.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scalar = float | Tensor


class Distribution:
    """A categorical distribution over the vocabulary for each of n labelled tokens.

    Everything is computed once, on first use, in the dtype of the logits, without gradient. A logit
    of -inf means that the class does not exist.

    Args:
        logits: [n, v] unnormalised log-probabilities, or a function that makes them when needed.
        labels: [n] the demonstrated token of each row.
        logp_y: [n] log-probability of the label, where it is known without the row.
        buffer: [n, v] memory that the probabilities may be written to.
    """

    def __init__(
        self,
        logits: Float[Tensor, "n v"] | Callable[[], Tensor],
        labels: Int[Tensor, " n"],
        logp_y: Float[Tensor, " n"] | None = None,
        buffer: Float[Tensor, "n v"] | None = None,
    ) -> None:
        self._logits = logits
        self._buffer = buffer
        self.labels = labels
        if logp_y is not None:
            self.__dict__["logp_y"] = logp_y  # a cached_property that is already there

    @cached_property
    def logits(self) -> Float[Tensor, "n v"]:
        return self._logits() if callable(self._logits) else self._logits

    @cached_property
    def absent(self) -> Bool[Tensor, "n v"] | None:
        """Which classes do not exist, or None when all do (the usual case costs one reduction)."""
        z = self.logits
        return z.isneginf() if z.numel() and bool(z.amin().isneginf()) else None

    @cached_property
    def num_classes(self) -> Scalar:
        """Number of classes that exist: V, or [n, 1] where some logits are -inf."""
        absent = self.absent
        return float(self.logits.shape[-1]) if absent is None else (~absent).sum(-1, True)

    @cached_property
    def p(self) -> Float[Tensor, "n v"]:
        if self._buffer is None:
            return self.logits.softmax(-1)
        return torch.softmax(self.logits, -1, out=self._buffer)

    @cached_property
    def lse(self) -> Float[Tensor, " n"]:
        """log Σ_k exp z_k, read off the softmax at its largest entry, where it is exact."""
        return self.logits.amax(-1) - self.p.amax(-1).log()

    @cached_property
    def logp(self) -> Float[Tensor, "n v"]:
        return self.logits - self.lse[:, None]

    @cached_property
    def logp_y(self) -> Float[Tensor, " n"]:
        return self.at_label(self.logits) - self.lse

    @cached_property
    def p_y(self) -> Float[Tensor, " n"]:
        return self.logp_y.exp()

    @cached_property
    def entropy(self) -> Float[Tensor, " n"]:
        """H(p) in nats."""
        return self.cross_entropy(self.p)

    def at_label(self, rows: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        return rows.gather(-1, self.labels[:, None])[:, 0]

    def cross_entropy(self, q: Float[Tensor, "#n #v"]) -> Float[Tensor, " n"]:
        """−Σ_k q_k log p_k in nats, Σ q = 1; a q of one column is the same for all k."""
        z = self.logits if self.absent is None else self.logits.masked_fill(self.absent, 0.0)
        dot = (q[:, 0] * z.sum(-1)) if q.shape[-1] == 1 else row_dot(q, z)
        return self.lse - dot

    def tempered(self, temperature: float) -> "Distribution":
        return Distribution(self.logits / temperature, self.labels)


class Tokens(Distribution):
    """What a target sees of n supervised tokens: the student, and whatever else was asked for.

    Attributes:
        reference: the frozen reference (for distillation: the teacher), or None.
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
    ) -> None:
        super().__init__(logits, labels, buffer=buffer)
        self.old_logp = old_logp
        self.ahead = ahead
        self.reference = reference
        if reference is not None and self.absent is not None:  # a class is absent for both
            known = reference.__dict__.get("logp_y")
            masked = reference.logits.masked_fill(self.absent, float("-inf"))
            self.reference = Distribution(masked, labels, known)

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

    needs_old_policy: ClassVar[bool] = False
    """Whether the target reads `t.old_logp`, the label log-probability of an earlier policy."""

    @property
    def needs_reference(self) -> bool:
        """Whether the target reads `t.reference`."""
        return False

    @property
    def temperature_of_softmax(self) -> float:
        """T in the equation of this module."""
        return 1.0

    @abstractmethod
    def label_weight(self, t: Tokens) -> Scalar | tuple[Scalar, Scalar]:
        """γ, the trust in the demonstrated token; or (γ, 1 − γ) where 1 − γ would cancel."""

    def residual(self, t: Tokens) -> Float[Tensor, "#n #v"] | None:
        """π̃, where the rest of the mass goes. None: the student itself, which gives no gradient."""
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


@dataclass
class Evaluation:
    """Per-token results of `evaluate`; the gradient may share memory with what it came from.

    Attributes:
        value: [n] the reported loss in nats.
        gradient: [n, v] ∂value/∂logits, or None if not asked for.
        gamma: [n] γ.
        label_mass: [n] Q_y of the canonical target Q = p − ∂loss/∂z, free of any convention.
        nll: [n] −log p_y, the loss every method shares.
        correct: [n] 1 where the label is the student's most likely token, else 0.
        entropy, kl_target, kl_reference: [n] H(p), KL(Q‖softmax(z/T)), KL(p‖reference), or None.
    """

    value: Float[Tensor, " n"]
    gradient: Float[Tensor, "n v"] | None
    gamma: Float[Tensor, " n"]
    label_mass: Float[Tensor, " n"]
    nll: Float[Tensor, " n"]
    correct: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"] | None = None
    kl_target: Float[Tensor, " n"] | None = None
    kl_reference: Float[Tensor, " n"] | None = None


@torch.no_grad()
def evaluate(
    target: Target, t: Tokens, *, gradient: bool = True, diagnose: bool = False
) -> Evaluation:
    """Value and closed-form logit gradient of a target on n tokens.

    Args:
        target: the method.
        t: the tokens. With `gradient`, its probabilities are overwritten: use it once.
        gradient: whether ∂value/∂logits is wanted.
        diagnose: whether entropy and divergences are wanted (one more pass over [n, v] each).
    """
    if not target.is_resolved:
        raise ValueError(
            f"target {type(target).__name__} has an option that is found from the data before "
            "training: train with it, or call target.resolve(reference_logp_y) first."
        )
    gamma, rest = _label_weight(target, t)
    declared_scale = target.scale(t)
    scale = _per_token(declared_scale, t)
    residual = target.residual(t)
    second = target.second_term(t)
    temperature = target.temperature_of_softmax
    s = t if temperature == 1.0 else t.tempered(temperature)

    # A label of probability 0 is no loss where the target gives it no weight (0 · inf).
    ce = torch.where(gamma == 0, 0.0, -gamma * s.logp_y)
    if residual is not None:
        ce = ce + rest * s.cross_entropy(residual)
    residual_y = s.p_y if residual is None else _at_label(residual, t)
    value = target.published_value(t)
    value = scale * temperature * ce if value is None else value
    q_y = gamma + rest * residual_y
    label_mass = torch.where(scale == 1.0, q_y + (t.p_y - s.p_y), t.p_y - scale * (s.p_y - q_y))
    if second is not None:
        value = value + second[0]
        label_mass = label_mass - t.at_label(second[1])
    correct = (t.at_label(t.logits) >= t.logits.amax(-1)).to(value.dtype)
    out = Evaluation(value, None, gamma, label_mass, -t.logp_y, correct)
    if diagnose:
        out.entropy = t.entropy
        out.kl_target = _kl_target(s, gamma, rest, residual, residual_y)
        if t.reference is not None:
            out.kl_reference = t.reference.cross_entropy(t.p) - t.entropy
    if gradient:
        factor = None if isinstance(declared_scale, float) and declared_scale == 1.0 else scale
        out.gradient = _gradient(s, gamma, rest, factor, residual)
        if second is not None:
            out.gradient += second[1]
        if t.absent is not None:
            out.gradient.masked_fill_(t.absent, 0.0)
    return out


def _gradient(
    s: Distribution, gamma: Tensor, rest: Tensor, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    """scale · (p − γ·δ − (1 − γ)·π̃), written over s.p."""
    g = s.p
    label = gamma if scale is None else scale * gamma
    if residual is None:  # π̃ = p: only γ·(p − δ) is left
        g.mul_(label[:, None])
    else:
        if residual.data_ptr() == g.data_ptr():  # the student itself, given as a residual
            residual = residual.clone()
        g.addcmul_(residual, -rest[:, None])
        if scale is not None:
            g.mul_(scale[:, None])
    return g.scatter_add_(-1, s.labels[:, None], -label[:, None])


def _kl_target(
    s: Distribution, gamma: Tensor, rest: Tensor, residual: Tensor | None, residual_y: Tensor
) -> Tensor:
    """KL(Q‖p) of the declared Q; NaN where γ > 1 puts Q off the simplex."""
    if residual is None:  # off the label Q is (1 − γ)·p, so its log-ratio is constant there
        q_y = gamma + rest * s.p_y
        return (
            torch.special.xlogy(q_y, q_y)
            - q_y * s.logp_y
            + torch.special.xlogy(rest * (1 - s.p_y).clamp_min(0), rest)
        )
    q = rest[:, None] * residual.expand_as(s.logits)
    q = q.scatter_add(-1, s.labels[:, None], gamma[:, None])
    if s.absent is not None:
        q = q.masked_fill(s.absent, 0.0)
    return s.cross_entropy(q) + torch.special.xlogy(q, q).sum(-1)


def _label_weight(target: Target, t: Tokens) -> tuple[Tensor, Tensor]:
    gamma = target.label_weight(t)
    if isinstance(gamma, tuple):
        return _per_token(gamma[0], t), _per_token(gamma[1], t)
    gamma = _per_token(gamma, t)
    return gamma, 1 - gamma


def _per_token(x: Scalar, t: Tokens) -> Tensor:
    if not isinstance(x, Tensor):
        return t.logits.new_full((len(t.labels),), x)
    if x.shape != t.labels.shape:
        raise ValueError(
            f"a target's hook must give one value per token, {tuple(t.labels.shape)}, "
            f"but gave {tuple(x.shape)}."
        )
    return x.to(t.logits.dtype)


def _at_label(rows: Tensor, t: Tokens) -> Tensor:
    return rows[:, 0].expand(len(t.labels)) if rows.shape[-1] == 1 else t.at_label(rows)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product of two [n, v] tensors without a temporary of their size."""
    if a.is_cuda:
        return torch.linalg.vecdot(a, b)
    # Three times faster than vecdot on a CPU, for the rows of a vocabulary.
    rows = [torch.dot(x, y) for x, y in zip(a, b, strict=True)]
    return torch.stack(rows) if rows else b.sum(-1)
