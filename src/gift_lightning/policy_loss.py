"""The GRPO family: losses of sampled tokens, as functions of their log-probabilities.

Every function works on flat tokens ([n], whole sequences side by side, told apart by an index), so
that packed and padded batches, one micro-batch and many, give the same numbers. The formulas are
those of TRL 1.16 (`trainer/grpo_trainer.py`, `_compute_loss`); docs/grpo.md has them in a table
with the places where defaults differ.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

Loss = Literal["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo"]
Level = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3", "k3_corrected"]
Scale = Literal["group", "batch", "none"]

_SAPO_TEMPERATURES = (1.0, 1.05)  # for positive and for other advantages


@dataclass(frozen=True)
class PolicyObjective:
    """Which loss of the family, and its constants.

    Attributes:
        loss: what the tokens' losses are, and what their sum is divided by.
        level: one importance ratio per token, or their geometric mean over the sequence (GSPO,
            arXiv 2507.18071); the loss `gspo` is `grpo` at that level.
        clip_low: the ratio's trust region reaches down to 1 - clip_low.
        clip_high: and up to 1 + clip_high; by default clip_low. For `cispo` the ratio's cap itself,
            without the 1 (as in TRL; 5.0 in ScaleRL, arXiv 2510.13786).
        delta: cap of the ratio where the advantage is negative and nothing else bounds it
            (INTELLECT-2, arXiv 2505.07291); above 1 + clip_high.
        kl_weight: factor on the estimated KL to the reference.
        kl_estimator: `k1` d, `k2` d²/2, `k3` exp(-d) - 1 + d with d = log π - log π_ref, or `k3`
            times the differentiable ratio, whose gradient is the reverse KL's.
    """

    loss: Loss = "dapo"
    level: Level = "token"
    clip_low: float = 0.2
    clip_high: float | None = None
    delta: float | None = None
    kl_weight: float = 0.0
    kl_estimator: KLEstimator = "k3_corrected"

    def __post_init__(self) -> None:
        for name, kind in (("loss", Loss), ("level", Level), ("kl_estimator", KLEstimator)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} is one of {known}, got {getattr(self, name)!r}.")
        for name in ("clip_low", "clip_high", "delta", "kl_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number from 0, got {value}.")
        if self.delta is not None and self.delta <= 1 + self.high:
            raise ValueError(
                f"delta={self.delta} is not above 1 + clip_high = {1 + self.high}: it would cut "
                "into the trust region."
            )
        if self.delta is not None and self.loss in ("cispo", "sapo"):
            raise ValueError(
                f"delta has no place in {self.loss}, which does not clip: leave it out."
            )

    @property
    def high(self) -> float:
        return self.clip_low if self.clip_high is None else self.clip_high

    @property
    def by_sequence(self) -> bool:
        return self.level == "sequence" or self.loss == "gspo"


@dataclass(frozen=True)
class TokenLosses:
    """What `token_policy_losses` gives for n tokens.

    Attributes:
        loss: [n] with the KL term; differentiable.
        ratio: [n] π/π_old, of the token or its sequence; detached.
        low_clipped, high_clipped: [n] where the trust region cut the gradient off.
        kl: [n] the estimate of KL(π‖π_ref), or None without a reference; detached.
    """

    loss: Float[Tensor, " n"]
    ratio: Float[Tensor, " n"]
    low_clipped: Bool[Tensor, " n"]
    high_clipped: Bool[Tensor, " n"]
    kl: Float[Tensor, " n"] | None


def token_policy_losses(
    objective: PolicyObjective,
    logp: Float[Tensor, " n"],
    old_logp: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    sequence_ids: Int[Tensor, " n"],
    *,
    ref_logp: Float[Tensor, " n"] | None = None,
    importance: Float[Tensor, " n"] | None = None,
) -> TokenLosses:
    """Per-token loss, before anything is averaged; differentiable in `logp` alone.

    Args:
        objective: the method.
        logp: log-probabilities of the sampled tokens under the policy.
        old_logp: under the policy that sampled them.
        advantages: of each token's sequence.
        sequence_ids: the sequence of each token, 0, 1, ..., whole.
        ref_logp: under the reference, for the KL term.
        importance: factor on the policy's loss, not on the KL term: π_old in the trainer over π_old
            in the rollout engine.
    """
    log_ratio = logp - old_logp.detach()
    if objective.by_sequence:
        log_ratio = sequence_mean(log_ratio, sequence_ids)
    ratio = log_ratio.exp()
    a, high = advantages.detach(), objective.high
    low_clipped = (ratio < 1 - objective.clip_low) & (a < 0)
    high_clipped = (ratio > 1 + high) & (a > 0)
    if objective.loss == "cispo":
        loss = -ratio.detach().clamp(max=high) * a * logp
        low_clipped, high_clipped = torch.zeros_like(low_clipped), (ratio > high) & (a > 0)
    elif objective.loss == "sapo":
        positive, other = _SAPO_TEMPERATURES
        tau = torch.where(a > 0, a.new_tensor(positive), a.new_tensor(other))
        loss = -(torch.sigmoid(tau * (ratio - 1)) * 4 / tau) * a
        low_clipped = high_clipped = torch.zeros_like(low_clipped)
    else:
        bounded = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
        loss = -torch.minimum(bounded * a, ratio.clamp(1 - objective.clip_low, 1 + high) * a)
    if importance is not None:
        loss = loss * importance.detach()
    kl = None
    if ref_logp is not None:
        kl = estimate_kl(objective.kl_estimator, logp, ref_logp, ratio)
        if objective.kl_weight:
            loss = loss + objective.kl_weight * kl
        kl = kl.detach()
    return TokenLosses(loss, ratio.detach(), low_clipped, high_clipped, kl)


def estimate_kl(
    estimator: KLEstimator,
    logp: Float[Tensor, " n"],
    ref_logp: Float[Tensor, " n"],
    ratio: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Estimates of KL(π‖π_ref) from samples, per token; see http://joschu.net/blog/kl-approx.html.

    Differentiated as they stand: k2 gives the reverse KL's gradient on-policy, k1 a zero-mean one,
    k3 that of the forward KL; `k3_corrected`, weighted by the ratio, the reverse KL's at any ratio.
    """
    d = logp - ref_logp.detach()
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    k3 = torch.expm1(-d) + d
    return ratio * k3 if estimator == "k3_corrected" else k3


def token_weights(
    objective: PolicyObjective,
    sequence_ids: Int[Tensor, " n"],
    num_tokens: int,
    num_sequences: int,
    max_completion_length: int | None,
) -> Float[Tensor, " n"]:
    """What each token's loss counts, so that the weighted sum over a step is the step's loss; in
    float64.

    Args:
        sequence_ids: of this micro-batch, whose sequences are whole.
        num_tokens, num_sequences: of everything that is averaged over.
        max_completion_length: the constant of Dr.GRPO.
    """
    device = sequence_ids.device
    if objective.loss == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss dr_grpo divides by max_completion_length: give it.")
        weight = 1.0 / max(num_sequences * max_completion_length, 1)
        return torch.full(sequence_ids.shape, weight, dtype=torch.float64, device=device)
    if objective.loss in ("grpo", "gspo", "sapo"):
        return 1.0 / (sequence_ids.bincount()[sequence_ids].double() * num_sequences)
    weight = 1.0 / max(num_tokens, 1)
    return torch.full(sequence_ids.shape, weight, dtype=torch.float64, device=device)


def sequence_sum(x: Float[Tensor, " n"], sequence_ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sum of x over each token's sequence, at each of its tokens; differentiable."""
    total = x.new_zeros(int(sequence_ids.max()) + 1 if len(x) else 0)
    return total.index_add(0, sequence_ids, x)[sequence_ids]


def sequence_mean(x: Float[Tensor, " n"], sequence_ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Mean of x over each token's sequence, at each of its tokens; differentiable."""
    return sequence_sum(x, sequence_ids) / sequence_ids.bincount()[sequence_ids].to(x.dtype)


def policy_loss(
    logp: Float[Tensor, "b t"],
    old_logp: Float[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    mask: Float[Tensor, "b t"] | Bool[Tensor, "b t"] | Int[Tensor, "b t"],
    *,
    loss: Loss = "dapo",
    level: Level = "token",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
    ref_logp: Float[Tensor, "b t"] | None = None,
    kl_weight: float = 0.0,
    kl_estimator: KLEstimator = "k3_corrected",
    max_completion_length: int | None = None,
) -> Float[Tensor, ""]:
    """The loss of a padded batch of completions, differentiable in `logp`.

    Args:
        logp: log-probabilities of the sampled tokens under the policy.
        old_logp: under the policy that sampled them.
        advantages: of each completion.
        mask: 1 where a token counts; what stands elsewhere is never read.
        ref_logp: under the reference; needed where kl_weight is not 0.
        max_completion_length: the constant of Dr.GRPO; by default the batch's width.

    The other arguments are those of `PolicyObjective`.

    Raises:
        ValueError: for an impossible objective, or a KL term without `ref_logp`.
    """
    objective = PolicyObjective(loss, level, clip_low, clip_high, delta, kl_weight, kl_estimator)
    if kl_weight and ref_logp is None:
        raise ValueError("kl_weight needs the reference's log-probabilities: give ref_logp.")
    kept = mask.bool()
    rows = kept.nonzero()[:, 0]
    _, sequence_ids = rows.unique_consecutive(return_inverse=True)
    tokens = token_policy_losses(
        objective,
        logp[kept],
        old_logp[kept],
        advantages[rows].to(logp.dtype),
        sequence_ids,
        ref_logp=None if ref_logp is None or not kl_weight else ref_logp[kept],
    )
    width = logp.shape[1] if max_completion_length is None else max_completion_length
    weights = token_weights(objective, sequence_ids, len(rows), len(logp), width)
    return (tokens.loss * weights.to(logp.dtype)).sum()


def group_advantages(
    rewards: Real[Tensor, "prompts group"], *, scale: Scale = "group", eps: float = 1e-4
) -> Float[Tensor, "prompts group"]:
    """Rewards relative to their group: (R - mean)/(std + eps), with the sample's std, in the
    rewards' dtype, or for whole numbers in the default one.

    As in TRL 1.16, except that equal rewards give exactly 0: there, rounding of the mean leaves up
    to 6e-4 in float32. NaN marks what is not scorable: it is left out of mean and std, and its
    advantage is 0. A group with one scored completion has advantage 0.

    Args:
        rewards: of each prompt's completions.
        scale: the std of the group, of the whole batch, or none (Dr.GRPO, arXiv 2503.20783).
        eps: added to the std.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"advantage_scale is one of {', '.join(get_args(Scale))}, got {scale!r}.")
    r = rewards.double()
    scored = ~r.isnan()
    count = scored.sum(1, keepdim=True)
    centred = torch.where(scored, r - r.nanmean(1, keepdim=True), 0.0)
    if scale == "group":
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
        centred = centred / (std + eps)
    elif scale == "batch" and int(scored.sum()) > 1:
        centred = centred / (r[scored].std() + eps)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return torch.where(has_signal(rewards)[:, None], centred, 0.0).to(dtype)


def has_signal(rewards: Real[Tensor, "prompts group"]) -> Bool[Tensor, " prompts"]:
    """Whether a group's scored rewards differ; only then is there anything to learn.

    By more than the rounding of a sum: 0.3 and 0.1 + 0.2 do not.
    """
    r = rewards.double()
    low = r.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amin(1)
    high = r.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1)
    return high - low > 1e-14 * torch.maximum(low.abs(), high.abs())
