"""How much imitation: the rules that set μ, the weight of the demonstrations, from step to step.

A controller is a plain object over scalars. Large μ is imitation, in GAC as in CHORD. Rules that
decide for each prompt are in `gates`, and can be imported from here too.
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from jsonargparse import lazy_instance
from torch import Tensor

from gift_lightning.controller import Controller, Measure, MixStats
from gift_lightning.gates import LUFFY, SRFT, HPTGate, ReLIFT

__all__ = [
    "CHORD",
    "GAC",
    "LUFFY",
    "SRFT",
    "Constant",
    "Controller",
    "HPTGate",
    "KLController",
    "MixStats",
    "ReLIFT",
    "Schedule",
]

Compat = Literal["corrected", "released"]
Estimator = Literal["proxy", "gradient"]

_EPS = 1e-8  # of the released code: in means, in variances, in the denominator of μ


def _require_shares(name: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {key} must be from 0 to 1, got {value}.")


def _require_order(name: str, low: float, first: float, high: float) -> None:
    if not 0 <= low <= first <= high <= 1:
        raise ValueError(
            f"{name}: mu_min={low}, mu_init={first} and mu_max={high} must be in this order, from "
            "0 to 1."
        )


class Constant(Controller):
    """The same μ at every step.

    Args:
        mu: from 0, only RL, to 1, only imitation.
    """

    def __init__(self, mu: float) -> None:
        _require_shares("Constant", mu=mu)
        self.mu = mu

    def update(self, stats: MixStats | None, step: int) -> float:
        return self.mu


class Schedule(Controller):
    """A linear warm-up from 0 to the peak, then a cosine down to the valley.

    As `mu_schedule_function` of modelscope/Trinity-RFT, `chord_policy_loss.py`: without warm-up and
    decay, the valley from the first step on.

    Args:
        warmup: steps up to the peak.
        decay: steps from there down to the valley.
        peak: largest μ.
        valley: last μ.
    """

    _state = ("mu",)

    def __init__(self, warmup: int, decay: int, peak: float, valley: float) -> None:
        name = type(self).__name__
        _require_shares(name, peak=peak, valley=valley)
        if warmup < 0 or decay < 0:
            raise ValueError(
                f"{name}: warmup and decay are numbers of steps, got {warmup} and {decay}."
            )
        self.warmup, self.decay, self.peak, self.valley = warmup, decay, peak, valley
        self.mu = self.at(0)

    def at(self, step: int) -> float:
        if step < self.warmup:
            return step / self.warmup * self.peak
        if step >= self.warmup + self.decay:
            return self.valley
        turn = math.pi * (step - self.warmup) / self.decay
        return self.valley + (self.peak - self.valley) * 0.5 * (1 + math.cos(turn))

    def update(self, stats: MixStats | None, step: int) -> float:
        self.mu = self.at(step)
        return self.mu


class CHORD(Schedule):
    """CHORD-μ (arXiv 2508.11408) with the paper's schedule for mathematics; for CHORD-φ take
    `Constant` with the target `CHORDPhi`.

    Args:
        warmup: steps up to the peak.
        decay: steps from there down to the valley.
        peak: largest μ.
        valley: last μ.
    """

    def __init__(
        self, warmup: int = 0, decay: int = 200, peak: float = 0.9, valley: float = 0.05
    ) -> None:
        super().__init__(warmup, decay, peak, valley)


class KLController(Controller):
    """μ grows while the policy is further from the reference than it should be.

    The best rule-based controller of GAC's tables follows the KL; its law is not published. This is
    a reconstruction: μ ← μ·(1 + gain·clip(KL/target − 1, ±0.2)), within its bounds.

    Args:
        target: KL in nats per sampled token; GAC's outer loop aims at 0.02.
        gain: relative change of μ at a KL 100 % off.
        mu_init: first μ.
        mu_min: smallest μ.
        mu_max: largest μ.
    """

    _state = ("mu",)

    def __init__(
        self,
        target: float = 0.02,
        gain: float = 0.1,
        mu_init: float = 0.5,
        mu_min: float = 0.05,
        mu_max: float = 0.9,
    ) -> None:
        _require_order("KLController", mu_min, mu_init, mu_max)
        if target <= 0 or gain < 0:
            raise ValueError(
                f"KLController: target is above 0 and gain at least 0, got {target} and {gain}."
            )
        self.target, self.gain = target, gain
        self.mu, self.mu_min, self.mu_max = mu_init, mu_min, mu_max

    @property
    def measures(self) -> frozenset[Measure]:
        return frozenset({"kl"})

    def update(self, stats: MixStats | None, step: int) -> float:
        if stats is not None:
            self.mu = _followed(self.mu, stats.kl, self.target, self.gain, self.mu_min, self.mu_max)
        return self.mu


# Lazy, so that a saved config can say what it is.
_PRIOR: Any = lazy_instance(Schedule, warmup=200, decay=800, peak=0.85, valley=0.15)


class GAC(Controller):
    """μ from the noise of the two gradients and their disagreement (arXiv 2605.26184).

    μ_raw = (α·Δ² + σ_r²)/(Δ² + σ_s² + σ_r²) minimises the expected squared error of the mixed
    gradient against α·g_s + (1 − α)·g_r. It is averaged over steps, blended with a schedule, and
    moves by at most `change_cap` a step.

    The released code (deepnovacore/GAC, `gac/controller.py`) averages with the *applied* μ, which
    leaves μ_raw about 1 % of the weight once there is a prior (docs/hybrid.md). `corrected` keeps
    an average of its own, leaves the statistics as they are where a branch is empty, and heads for
    `mu_max` where no rollout has an advantage. `released` is the published recurrence in float64
    (theirs rounds μ to float32), quirks included: an empty branch counts as a variance of 0.

    In training both take the statistics of the whole step before, on all devices, as μ must be
    known before a step's first micro-batch; the released loop takes those of each micro-batch as it
    comes. Until there are any, μ is `mu_init` and the prior is not read. The averages of the
    statistics start at the first ones, without a correction.

    The gradient estimator compares gradients as they are; GAC's paper would scale them as the
    optimizer does.

    Args:
        alpha: share of imitation in what the mixture aims at.
        ema_beta: memory of the statistics and of μ.
        mu_min: smallest μ.
        mu_max: largest μ.
        mu_init: first μ.
        change_cap: largest change of μ in a step.
        blend: weight of the estimate against the prior.
        update_every: steps between updates of the statistics.
        trim: share of demonstrations left out of σ_s² at either end.
        delta_cap_ratio: Δ² is at most this times σ_s² + σ_r²; 0 is no cap.
        use_phi: whether the demonstrations' coefficient in Δ² is p(1 − p), as with the target
            CHORDPhi, or 1.
        prior: a schedule to blend with, or none.
        compat: `corrected` or `released`.
        estimator: the paper's proxies from advantages and probabilities, or variances and distance
            of the gradients themselves, between micro-batches, on the last block's parameters.
        kl_target: let α follow the KL to the reference, as `KLController` has it, between 0.1 and
            0.95. GAC's paper aims at 0.02 by a law that is not published: a reconstruction.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        ema_beta: float = 0.99,
        mu_min: float = 0.05,
        mu_max: float = 0.9,
        mu_init: float = 0.5,
        change_cap: float = 0.01,
        blend: float = 0.5,
        update_every: int = 10,
        trim: float = 0.1,
        delta_cap_ratio: float = 0.0,
        use_phi: bool = True,
        prior: Schedule | None = _PRIOR,
        compat: Compat = "corrected",
        estimator: Estimator = "proxy",
        kl_target: float | None = None,
    ) -> None:
        _require_shares("GAC", alpha=alpha, ema_beta=ema_beta, blend=blend)
        _require_order("GAC", mu_min, mu_init, mu_max)
        if not 0 <= trim < 0.5:
            raise ValueError(f"GAC: trim is a share from 0 to below 0.5, got {trim}.")
        if update_every < 1 or change_cap < 0 or delta_cap_ratio < 0:
            raise ValueError(
                "GAC: update_every must be at least 1, change_cap and delta_cap_ratio at least 0, "
                f"got {update_every}, {change_cap} and {delta_cap_ratio}."
            )
        for name, value, known in (
            ("compat", compat, get_args(Compat)),
            ("estimator", estimator, get_args(Estimator)),
        ):
            if value not in known:
                raise ValueError(f"GAC: {name} is {known[0]} or {known[1]}, got {value!r}.")
        if kl_target is not None and not kl_target > 0:
            raise ValueError(f"GAC: kl_target must be above 0, got {kl_target}.")
        self.alpha, self.ema_beta, self.blend = alpha, ema_beta, blend
        self.mu_min, self.mu_max, self.change_cap = mu_min, mu_max, change_cap
        self.update_every, self.trim = update_every, trim
        self.delta_cap_ratio, self.use_phi = delta_cap_ratio, use_phi
        self.prior, self.compat = prior, compat
        if prior is not None:
            prior.at(0)  # a lazy one has no attributes before a method is called
        self.estimator, self.kl_target = estimator, kl_target
        self.mu = self.mu_raw = mu_init
        self.average = mu_init  # of μ_raw, in `corrected`
        self.capped = False
        self.smoothed: dict[str, float] = {}
        self.last_update: int | None = None
        self._state = ("mu", "mu_raw", "average", "capped", "smoothed", "last_update")
        if kl_target:  # otherwise it is an option
            self._state += ("alpha",)
        self._prior_now = math.nan

    @property
    def measures(self) -> frozenset[Measure]:
        own: frozenset[Measure] = frozenset({self.estimator})
        return own | {"kl"} if self.kl_target else own

    # The paper's proxies.

    def rows(
        self,
        logp: Float[Tensor, " n"],
        advantages: Float[Tensor, " n"],
        row: Int[Tensor, " n"],
        is_demonstration: Bool[Tensor, " b"],
    ) -> Float[Tensor, "b 3"]:
        """Of each row: the means over its tokens of −log p, of the advantage, and of the squared
        difference of the coefficients that the two losses give to ∇log p.

        Args:
            logp: log-probabilities of the tokens of all rows.
            advantages: of rollouts; not read elsewhere.
            row: which row a token belongs to.
            is_demonstration: which rows are demonstrations, the others are rollouts.
        """
        logp, advantages = logp.detach().double(), advantages.double()
        imitation = logp.exp() * torch.expm1(logp) if self.use_phi else -torch.ones_like(logp)
        policy = torch.where(is_demonstration[row], 0.0, -advantages)
        values = torch.stack([-logp, advantages, (imitation - policy).square()], 1)
        sums = values.new_zeros(len(is_demonstration), 3).index_add_(0, row, values)
        return sums / (row.bincount(minlength=len(sums)).double()[:, None] + _EPS)

    def summary(self, rows: Float[Tensor, "b 3"], is_demonstration: Bool[Tensor, " b"]) -> MixStats:
        """The statistics of all rows of a step."""
        nll = rows[is_demonstration, 0].sort().values
        k = int(self.trim * len(nll))
        if len(nll) >= 4:
            nll = nll[k : len(nll) - k]
        gap = float(rows[:, 2].mean()) if len(rows) else 0.0
        return MixStats(_variance(rows[~is_demonstration, 1]), _variance(nll), gap)

    def statistics(
        self,
        logp: Float[Tensor, "b t"],
        mask: Float[Tensor, "b t"] | Bool[Tensor, "b t"],
        advantages: Float[Tensor, "b t"],
        is_demonstration: Bool[Tensor, " b"],
    ) -> MixStats:
        """The statistics of a padded batch; `mask` is 1 where a token counts.

        A batch in which no rollout has an advantage is a batch like any other here, as in the
        released code: who wants `update` to head for `mu_max` then says `has_signal=False`.
        """
        row, place = mask.nonzero(as_tuple=True)
        rows = self.rows(logp[row, place], advantages[row, place], row, is_demonstration)
        return self.summary(rows, is_demonstration)

    # The recurrence.

    def is_due(self, step: int) -> bool:
        return self.last_update is None or step - self.last_update >= self.update_every

    def update(self, stats: MixStats | None, step: int) -> float:
        if stats is None:
            return self.mu
        released = self.compat == "released"
        if self.kl_target:
            self.alpha = _followed(self.alpha, stats.kl, self.kl_target, 0.1, 0.1, 0.95)
        found = (stats.sigma_r2, stats.sigma_s2, stats.delta2)
        whole = stats.has_signal and all(map(math.isfinite, found))
        if self.is_due(step) and (whole or (released and math.isfinite(stats.delta2))):
            self._smooth(stats)
            self.last_update = step
        s = {"sigma_r2": 1.0, "sigma_s2": 1.0, "delta2": 0.0, **self.smoothed}
        noise = s["sigma_s2"] + s["sigma_r2"]
        delta2 = s["delta2"]
        if self.delta_cap_ratio:
            delta2 = min(delta2, self.delta_cap_ratio * (noise + _EPS))
        self.mu_raw = (self.alpha * delta2 + s["sigma_r2"]) / (delta2 + noise + _EPS)
        before = self.mu if released else self.average
        self.average = self.ema_beta * before + (1 - self.ema_beta) * self.mu_raw
        wanted = min(max(self.average, self.mu_min), self.mu_max)
        if self.prior is not None:
            self._prior_now = self.prior.at(step)
            wanted = (1 - self.blend) * self._prior_now + self.blend * wanted
        if not (released or stats.has_signal):
            wanted = self.mu_max
        change = min(max(wanted - self.mu, -self.change_cap), self.change_cap)
        self.capped = change != wanted - self.mu
        self.mu = min(max(self.mu + change, self.mu_min), self.mu_max)
        return self.mu

    def _smooth(self, stats: MixStats) -> None:
        for name in ("sigma_r2", "sigma_s2", "delta2"):
            new = getattr(stats, name)
            new = 0.0 if math.isnan(new) else new  # as the released code has an empty branch
            old = self.smoothed.get(name, new)
            self.smoothed[name] = self.ema_beta * old + (1 - self.ema_beta) * new

    def parts(self) -> dict[str, float]:
        found = {"mu_raw": self.mu_raw, **self.smoothed, "alpha": self.alpha}
        if self.prior is not None:
            found["prior"] = self._prior_now
        return {**found, "capped": float(self.capped)}


def _variance(x: Float[Tensor, " n"]) -> float:
    """Biased, at least 1e-8; NaN of nothing."""
    return max(float(x.square().mean() - x.mean().square()), _EPS) if len(x) else math.nan


def _followed(x: float, kl: float, target: float, gain: float, low: float, high: float) -> float:
    """x, raised while the KL is above its target."""
    if math.isnan(kl):
        return x
    return min(max(x * (1 + gain * min(max(kl / target - 1, -0.2), 0.2)), low), high)
