"""A target on n tokens: its value, its closed-form logit gradient, its diagnostics."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gift_lightning.distribution import Distribution, Peaks, Scalar
from gift_lightning.target import Target, Tokens


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
            "training: train with it, or call target.resolve(reference_logp_y, num_classes) first."
        )
    gamma, rest = _label_weight(target, t)
    declared_scale = target.scale(t)
    scale = _per_token(declared_scale, t)
    residual = target.residual(t)
    if isinstance(residual, Tensor):
        residual = residual.expand(len(t.labels), -1)
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
    correct = (t.at_label(t.logits) >= t.top).to(value.dtype)
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
    s: Distribution,
    gamma: Tensor,
    rest: Tensor,
    scale: Tensor | None,
    residual: Tensor | Peaks | None,
) -> Tensor:
    """scale · (p − γ·δ − (1 − γ)·π̃), written over s.p."""
    g = s.p
    label = gamma if scale is None else scale * gamma
    if residual is None:  # π̃ = p: only γ·(p − δ) is left
        g.mul_(label[:, None])
    else:
        if isinstance(residual, Peaks):
            (residual * -rest[:, None]).add_to(g)
        else:
            if residual.is_set_to(g):  # the student itself, given as a residual
                residual = residual.clone()
            g.addcmul_(residual, -rest[:, None])
        if scale is not None:
            g.mul_(scale[:, None])
    return g.scatter_add_(-1, s.labels[:, None], -label[:, None])


def _kl_target(
    s: Distribution,
    gamma: Tensor,
    rest: Tensor,
    residual: Tensor | Peaks | None,
    residual_y: Tensor,
) -> Tensor:
    """KL(Q‖p) of the declared Q; NaN where γ > 1 puts Q off the simplex."""
    if residual is None:  # off the label Q is (1 − γ)·p, so its log-ratio is constant there
        q_y = gamma + rest * s.p_y
        return (
            torch.special.xlogy(q_y, q_y)
            - q_y * s.logp_y
            + torch.special.xlogy(rest * (1 - s.p_y).clamp_min(0), rest)
        )
    if isinstance(residual, Peaks):
        q = (residual * rest[:, None]).dense()
    else:
        q = rest[:, None] * residual.expand_as(s.logits)
    q.scatter_add_(-1, s.labels[:, None], gamma[:, None])
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


def _at_label(rows: Tensor | Peaks, t: Tokens) -> Tensor:
    if isinstance(rows, Peaks):
        return rows.at(t.labels)
    return rows[:, 0].expand(len(t.labels)) if rows.shape[-1] == 1 else t.at_label(rows)
