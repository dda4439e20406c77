"""Rules that decide for each prompt of a rollout whether its own demonstration is trained, and how.

A prompt's demonstration is the one with the same prompt tokens; prompts without one are plain RL.
Rules that weigh the two branches as a whole are in `controllers`.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gift_lightning.controller import Controller, MixStats
from gift_lightning.policy_loss import sequence_mean


@dataclass(frozen=True)
class Groups:
    """What a rollout found for its p prompts of g completions each."""

    rewards: Float[Tensor, "p g"]
    """NaN where not scorable."""
    demonstrations: Int[Tensor, " p"]
    """Index of each prompt's demonstration, -1 where there is none."""
    demonstration_rewards: Float[Tensor, " p"]
    """What it would score; NaN where there is none, it is not scorable, or nobody asked."""


@dataclass(frozen=True)
class Decision:
    """What is trained of them."""

    advantages: Float[Tensor, "p g"]
    counted: Bool[Tensor, " p"]
    """Whether a prompt's completions count in what the loss is divided by."""
    demonstrations: Int[Tensor, " d"]
    """Indices; any, in any number."""
    weights: Float[Tensor, " d"]
    """Factors on their losses."""


Advantages = Callable[[Float[Tensor, "p g"]], Float[Tensor, "p g"]]
"""Rewards to advantages, within each prompt's group."""


class Gate(Controller):
    """A rule for each prompt. There is no μ: the rollouts' loss counts once.

    Attributes:
        weight: factor on the demonstrations' mean loss.
        share: of the rollout's prompts whose demonstration was chosen.
    """

    scores: ClassVar[bool] = False
    """Whether `decide` reads the demonstrations' rewards."""
    joint: ClassVar[bool] = False
    """Whether rollouts and demonstrations are averaged over together, by RL's rule; otherwise each
    over its own."""
    at_once: ClassVar[bool] = False
    """Whether the demonstrations are trained in the rollout's first step, all of them, instead of
    being dealt over its steps and passes as the completions are."""
    own_loss: ClassVar[bool] = False
    """Whether `demonstration_losses` stands for the target."""
    mu = 0.0
    weight: float = 1.0
    share: float = 0.0
    _state: tuple[str, ...] = ("share",)  # it is logged until the next rollout

    @abstractmethod
    def decide(self, groups: Groups, advantages: Advantages) -> Decision:
        """Called once for each rollout, with the same on every rank."""

    def update(self, stats: MixStats | None, step: int) -> float:
        return self.mu

    def _chosen(self, groups: Groups, which: Bool[Tensor, " p"]) -> Int[Tensor, " d"]:
        self.share = float(which.double().mean())
        return groups.demonstrations[which]

    def parts(self) -> dict[str, float]:
        return {"share": self.share}

    def demonstration_losses(
        self,
        logp: Float[Tensor, " n"],
        entropy: Float[Tensor, " n"],
        sequences: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """Per token, from its label's log-probability, the entropy there and the demonstration's
        weight; for `own_loss`."""
        raise NotImplementedError

    def rollout_advantages(
        self,
        advantages: Float[Tensor, " n"],
        entropy: Float[Tensor, " n"],
        sequences: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """What the rollouts' tokens are trained with."""
        return advantages


class HPTGate(Gate):
    """HPT (arXiv 2509.04419): a prompt that is solved too rarely is imitated instead of rolled out.

    Official code (TsinghuaC3I/Unify-Post-Training): of a prompt whose share of solved completions
    is at most the gate, all completions are dropped and one demonstration is added; the loss is the
    policy loss plus a coefficient times the mean NLL, 0.3 in one of its scripts. Its advantages
    without std are `advantage_scale: none`; its scripts also have an entropy bonus of 0.001 and
    clip the gradient at 80. Prompts without a demonstration are left alone here.

    Args:
        threshold: largest share of solved completions that is imitated: 0 for Qwen, 0.25 for Llama
            in the official scripts.
        weight: factor on the demonstrations' loss.
        solved_at: reward from which on a completion is solved.
    """

    def __init__(self, threshold: float = 0.0, weight: float = 1.0, solved_at: float = 1.0) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"HPTGate: threshold is a share from 0 to below 1, got {threshold}.")
        _require_weight(self, weight)
        self.threshold, self.weight, self.solved_at = threshold, weight, solved_at

    def decide(self, groups: Groups, advantages: Advantages) -> Decision:
        imitated = (_solved(groups, self.solved_at) <= self.threshold) & (
            groups.demonstrations >= 0
        )
        kept = advantages(groups.rewards).masked_fill(imitated[:, None], 0.0)
        chosen = self._chosen(groups, imitated)
        return Decision(kept, ~imitated, chosen, torch.ones(len(chosen)))


class ReLIFT(Gate):
    """ReLIFT (arXiv 2506.07527): demonstrations of unsolved prompts are kept for an SFT step.

    RL goes on at every step; once `size` demonstrations are waiting, their mean loss is added to
    the first step of a rollout, in its accumulate_grad_batches x devices micro-batches. The authors
    take that step with an optimizer of its own and an entropy bonus of 0.001, and clip the two
    gradients apart (0.7 and 1.0); here it shares the step, optimizer and clipping.

    Args:
        size: demonstrations that an SFT step waits for; the paper's scripts take 128.
        weight: factor on their loss.
        solved_at: reward from which on a completion is solved.
    """

    _state = ("share", "waiting")
    at_once = True

    def __init__(self, size: int = 128, weight: float = 1.0, solved_at: float = 1.0) -> None:
        if size < 1:
            raise ValueError(f"ReLIFT: size must be at least 1, got {size}.")
        _require_weight(self, weight)
        self.size, self.weight, self.solved_at = size, weight, solved_at
        self.waiting: list[int] = []

    def decide(self, groups: Groups, advantages: Advantages) -> Decision:
        unsolved = (_solved(groups, self.solved_at) == 0) & (groups.demonstrations >= 0)
        self.waiting = [*self.waiting, *self._chosen(groups, unsolved).tolist()]
        trained: list[int] = []
        if len(self.waiting) >= self.size:
            trained, self.waiting = self.waiting, []
        every = torch.ones(len(groups.rewards), dtype=torch.bool)
        ids = torch.tensor(trained, dtype=torch.int64)
        return Decision(advantages(groups.rewards), every, ids, torch.ones(len(ids)))

    def parts(self) -> dict[str, float]:
        return {**super().parts(), "waiting": float(len(self.waiting))}


class LUFFY(Gate):
    """LUFFY (arXiv 2504.14945): a prompt's demonstration is one more member of its group.

    Advantages are relative to rollouts and demonstration together. Official code
    (ElliottYan/LUFFY, `mix_core_alg.py`): a demonstration's token loss is −Â·p/(p + 0.1), which is
    the target LUFFYShaping; with another target it is Â times that target's loss. Its scripts take
    advantages without std and the maximal length as divisor: `advantage_scale: none`, `loss:
    dr_grpo`. They do not clip the policy's ratio either, which matters with several steps for a
    rollout only: a large `clip_low` and `clip_high` are next to that.
    """

    scores = True
    joint = True

    def decide(self, groups: Groups, advantages: Advantages) -> Decision:
        mixed = torch.cat([groups.rewards, groups.demonstration_rewards[:, None]], 1)
        found = advantages(mixed)
        there = groups.demonstrations >= 0
        every = torch.ones(len(mixed), dtype=torch.bool)
        ids = self._chosen(groups, there)
        return Decision(found[:, :-1].contiguous(), every, ids, found[there, -1].float())


class SRFT(LUFFY):
    """SRFT (arXiv 2506.19767): SFT and RL on the demonstration and RL on the rollouts, weighed by
    the policy's entropy H, a mean over each sequence. Partly reconstructed.

    The demonstration's loss is imitation·e^{−H}·(−log p) − Â·p, the rollouts' advantages are scaled
    by positive·e^{H} where they are above 0. From the paper's formulas and a re-implementation (in
    HPT's code); not established: the authors' own code is said to use e^{+H} for the first, and the
    ratio of the demonstration's RL term is read here as p, with a behaviour probability of 1 and no
    clipping, and the demonstration is in its prompt's group, all as in LUFFY. It has a loss of its
    own for demonstrations: the target is not used.

    Args:
        imitation: factor on the SFT term.
        positive: factor on advantages above 0.
    """

    own_loss = True

    def __init__(self, imitation: float = 0.5, positive: float = 0.1) -> None:
        if imitation < 0 or positive < 0:
            raise ValueError(
                f"SRFT: imitation and positive must be at least 0, got {imitation}, {positive}."
            )
        self.imitation, self.positive = imitation, positive

    def demonstration_losses(
        self,
        logp: Float[Tensor, " n"],
        entropy: Float[Tensor, " n"],
        sequences: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        trust = self.imitation * (-sequence_mean(entropy, sequences)).exp().detach()
        return -trust * logp - weights * logp.exp()

    def rollout_advantages(
        self,
        advantages: Float[Tensor, " n"],
        entropy: Float[Tensor, " n"],
        sequences: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        scale = self.positive * sequence_mean(entropy, sequences).exp().detach()
        return torch.where(advantages > 0, scale * advantages, advantages)


def _require_weight(gate: Gate, weight: float) -> None:
    if not weight > 0:
        raise ValueError(f"{type(gate).__name__}: weight must be above 0, got {weight}.")


def _solved(groups: Groups, at: float) -> Float[Tensor, " p"]:
    """Share of the scorable completions that are solved; NaN where none is scorable."""
    scorable = ~groups.rewards.isnan()
    # Weights such as 0.7, 0.2 and 0.1 sum up to a little less than 1.
    right = (groups.rewards >= at - 1e-9).sum(1).double()
    return right / scorable.sum(1)
