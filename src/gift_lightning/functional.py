"""The training losses and metrics as plain functions, for any loop."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gift_lightning.distribution import Distribution
from gift_lightning.loss import Evaluation, evaluate
from gift_lightning.matmul import math_dtype
from gift_lightning.policy_loss import group_advantages as group_advantages
from gift_lightning.policy_loss import policy_loss as policy_loss
from gift_lightning.target import LabelView, Target, Tokens

IGNORED = -100
"""The label of a token that is not supervised, as in Hugging Face."""


def token_loss(
    target: Target,
    logits: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    *,
    reference_logits: Float[Tensor, "n v"] | None = None,
    old_logp: Float[Tensor, " n"] | None = None,
    sequence_ids: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """Per-token loss of a target, differentiable once in `logits` alone.

    The dense form: it keeps one [n, v] gradient. Training uses `head.head_loss`.

    Args:
        target: the method.
        logits: row i predicts labels[i]; any float dtype, computed in float32 or better. A logit of
            -inf means that the class does not exist, for the reference neither.
        labels: -100 where a token is not supervised.
        reference_logits: of the frozen reference, where the target reads one.
        old_logp: the old policy's label log-probabilities (PSFT).
        sequence_ids: which sequence each token belongs to, for targets with sequence weights; one
            sequence if not given.

    Returns:
        The loss of each token in nats, float32 or better, 0 where not supervised.

    Raises:
        ValueError: if the target reads something that was not given, or shapes do not fit.
    """
    extras = (reference_logits, old_logp, sequence_ids)
    loss: Tensor = _DenseLoss.apply(logits, target, labels, extras)
    return loss


def label_mass(
    target: Target,
    logits: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    *,
    reference_logits: Float[Tensor, "n v"] | None = None,
    old_logp: Float[Tensor, " n"] | None = None,
    sequence_ids: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """Q_y, the target's probability of the label: the number that compares methods.

    Q = p − ∂loss/∂z, so it does not depend on how a method is split into γ, π̃ and a scale
    (arXiv 2606.11189, Eq. 6). Arguments and errors as `token_loss`; NaN where not supervised.
    """
    kept = labels != IGNORED
    out = logits.new_full(labels.shape, math.nan, dtype=math_dtype(logits))
    extras = (reference_logits, old_logp, sequence_ids)
    out[kept] = _evaluate_dense(target, logits, labels, extras, gradient=False).label_mass
    return out


def _evaluate_dense(
    target: Target,
    logits: Tensor,
    labels: Tensor,
    extras: tuple[Tensor | None, Tensor | None, Tensor | None],
    gradient: bool,
) -> Evaluation:
    reference_logits, old_logp, sequence_ids = extras
    if reference_logits is not None and reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits {tuple(reference_logits.shape)} do not fit logits "
            f"{tuple(logits.shape)}: student and reference need the same vocabulary."
        )
    check_lengths(len(logits), labels=labels, old_logp=old_logp, sequence_ids=sequence_ids)
    target.check(reference=reference_logits is not None, old_policy=old_logp is not None)
    kept = labels != IGNORED
    dtype = math_dtype(logits)

    def rows(x: Tensor) -> Tensor:
        return x.detach()[kept].to(dtype)

    z, y = rows(logits), labels[kept]
    reference = None
    if reference_logits is not None:
        base = rows(reference_logits).masked_fill_(z.isneginf(), -math.inf)
        reference = Distribution(base, y)
    old = None if old_logp is None else rows(old_logp)
    t = Tokens(z, y, reference=reference, old_logp=old)
    if reads := target.ahead_reads:
        ids = torch.zeros_like(y) if sequence_ids is None else sequence_ids[kept]
        base_y = t.base.logp_y if "reference" in reads else None
        t.ahead = target.look_ahead(LabelView(t.logp_y, base_y, ids)).to(dtype)
    return evaluate(target, t, gradient=gradient)


def check_lengths(n: int, **given: Tensor | None) -> None:
    """Raises ValueError unless every tensor that is given has one entry for each of n tokens."""
    for name, x in given.items():
        if x is not None and len(x) != n:
            raise ValueError(f"{name} has {len(x)} entries for {n} tokens: one for each is needed.")


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Target, labels: Tensor, extras: Any) -> Tensor:
        kept = labels != IGNORED
        result = _evaluate_dense(target, logits, labels, extras, ctx.needs_input_grad[0])
        if result.gradient is not None:
            ctx.save_for_backward(result.gradient, kept)
            ctx.shape, ctx.dtype = logits.shape, logits.dtype
        loss = logits.new_zeros(labels.shape, dtype=result.value.dtype)
        loss[kept] = result.value
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, kept = ctx.saved_tensors
        out = gradient.new_zeros(ctx.shape)
        out[kept] = upstream[kept][:, None] * gradient
        return out.to(ctx.dtype), None, None, None


def pass_at_k(
    num_samples: int | Tensor, num_correct: int | Tensor, k: int
) -> Float[Tensor, "*problems"]:
    """Unbiased probability that at least one of k samples is correct (arXiv 2107.03374).

    1 − C(n − c, k)/C(n, k) = 1 − Π_{i=n−c+1}^{n} (1 − k/i), in float64.

    Args:
        num_samples: n, samples drawn for each problem (one number, or one for each problem).
        num_correct: c, how many of them are correct.
        k: the budget.

    Raises:
        ValueError: if k is below 1 or above n, or c is not between 0 and n.
    """
    n, c = torch.broadcast_tensors(torch.as_tensor(num_samples), torch.as_tensor(num_correct))
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1, got {k}.")
    if bool((n < k).any()):
        raise ValueError(f"pass@{k} needs {k} samples or more of each problem: {int(n.min())}.")
    if bool(((c < 0) | (c > n)).any()):
        raise ValueError("pass@k: num_correct must be between 0 and num_samples.")
    i = torch.arange(1, int(n.max() if n.numel() else 0) + 1, dtype=torch.float64)
    used = (i > (n - c)[..., None]) & (i <= n[..., None])
    factors = torch.where(used, (1 - k / i).clamp_min(0.0), 1.0)
    return 1 - factors.prod(-1)
