"""From prompts to experience: completions are sampled, scored and compared within their groups."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_lightning.experience import Experience, flat
from gift_lightning.generation import Completion
from gift_lightning.policy_loss import Scale, group_advantages, has_signal
from gift_lightning.problems import Problem
from gift_lightning.prompts import PromptData, Ticket
from gift_lightning.replicas import Replicas
from gift_lightning.rewards import WeightedReward
from gift_lightning.rollouts import RolloutEngine, Sampling
from gift_lightning.sampler import request
from gift_lightning.seeds import keyed_seed
from gift_lightning.workers import FAULTS, RewardPool, Scored

Noted: TypeAlias = tuple[float, float]
"""A sum, and how many things it is of."""

Group: TypeAlias = tuple[list[Completion], list[Scored]]
"""The completions of one prompt, and their scores."""


class Collector:
    """Makes an `Experience` of each rollout; every rank gets all of it.

    Args:
        engine: what samples.
        sampling: how.
        rewards: what scores.
        tokenizer: the policy's.
        advantage_scale: what advantages are divided by.
        max_resamples: rounds of new prompts for groups without signal.
        mask_truncated: whether completions without an end token count in nothing.
        only_signal: whether completions without advantage need no training, as there is neither a
            KL term nor an entropy bonus.
        timeout: seconds that one reward may take for one completion.
        num_workers: processes that score.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: Sampling,
        rewards: Sequence[WeightedReward],
        tokenizer: PreTrainedTokenizerBase,
        advantage_scale: Scale = "group",
        max_resamples: int = 0,
        mask_truncated: bool = False,
        only_signal: bool = False,
        timeout: float = 5.0,
        num_workers: int | None = None,
    ) -> None:
        self.engine, self.sampling, self.rewards = engine, sampling, rewards
        self.tokenizer, self.advantage_scale = tokenizer, advantage_scale
        self.max_resamples, self.mask_truncated = max_resamples, mask_truncated
        self.only_signal = only_signal
        self.pool = RewardPool(rewards, num_workers, timeout)

    def collect(
        self, model: PreTrainedModel, data: PromptData, ticket: Ticket, replicas: Replicas
    ) -> tuple[Experience, dict[str, Noted]]:
        """Samples and scores the rollout of a ticket.

        Returns:
            The experience, and how it went: sums and counts by name, of the completions as they
            were sampled, before groups were replaced.
        """
        self.engine.sync(model)
        prompts = list(ticket.prompts)
        groups = self._sample(data, ticket.rollout, 0, prompts, replicas)
        metrics = self._metrics(groups)
        tried, num_replaced = set(prompts), 0
        for turn in range(1, self.max_resamples + 1):
            dead = (~has_signal(self._rewards(groups))).nonzero()[:, 0].tolist()
            fresh = data.replacements(ticket.rollout, tried, len(dead))
            if not fresh:
                break
            tried.update(fresh)
            found = self._sample(data, ticket.rollout, turn, fresh, replicas)
            alive = has_signal(self._rewards(found)).nonzero()[:, 0].tolist()
            for place, i in zip(dead, alive, strict=False):
                prompts[place], groups[place] = fresh[i], found[i]
                num_replaced += 1
        self.engine.release()
        metrics["num_replaced_groups"] = (num_replaced, 1)
        rewards = self._rewards(groups)
        completions = [completion for group, _ in groups for completion in group]
        finished = torch.tensor([completion.finished for completion in completions])
        size = data.num_generations
        advantages = group_advantages(rewards, scale=self.advantage_scale).flatten()
        counted = finished if self.mask_truncated else torch.ones_like(finished)
        experience = Experience(
            ticket.rollout,
            *flat([data.prompt_ids[i] for i in prompts for _ in range(size)], torch.int64),
            *flat([completion.tokens for completion in completions], torch.int64),
            flat([completion.logprobs for completion in completions], torch.float32)[0],
            finished,
            rewards.flatten(),
            advantages,
            counted,
            counted & (advantages != 0) if self.only_signal else counted,
            torch.tensor(prompts),
        )
        return experience, metrics

    def _sample(
        self,
        data: PromptData,
        rollout: int,
        turn: int,
        prompts: Sequence[int],
        replicas: Replicas,
    ) -> list[Group]:
        """A group for each prompt; the replicas share the work and exchange what they found."""
        mine = range(replicas.index, len(prompts), replicas.number)
        sampled = self.engine.generate(
            [data.prompt_ids[prompts[place]] for place in mine],
            data.num_generations,
            self.sampling,
            seed=keyed_seed(data.seed, "rollout", rollout, turn),
            keys=mine,
        )
        problems = [data.problems[prompts[place]] for place in mine]
        scored = self.score(problems, sampled)
        shares = replicas.gathered(list(zip(sampled, scored, strict=True)))
        number = replicas.number
        return [shares[place % number][place // number] for place in range(len(prompts))]

    def score(
        self, problems: Sequence[Problem], sampled: Sequence[Sequence[Completion]]
    ) -> list[list[Scored]]:
        """The scores of each problem's completions."""
        limit = self.sampling.max_completion_length
        asked = [
            request(problem, completion, self.tokenizer, limit)
            for problem, group in zip(problems, sampled, strict=True)
            for completion in group
        ]
        found = iter(self.pool.score(asked))
        return [[next(found) for _ in group] for group in sampled]

    def _rewards(self, groups: Sequence[Group]) -> Float[Tensor, "prompts group"]:
        """NaN where not scorable."""
        totals = [[self.pool.total(one) for one in scores] for _, scores in groups]
        return torch.tensor(totals, dtype=torch.float64)

    def _metrics(self, groups: Sequence[Group]) -> dict[str, Noted]:
        rewards = self._rewards(groups)
        scored = rewards[~rewards.isnan()]
        deviations = [group[~group.isnan()] for group in rewards]
        stds = [float(group.std()) for group in deviations if len(group) > 1]
        signal = has_signal(rewards)
        metrics: dict[str, Noted] = {
            "reward": _noted(scored),
            "reward_std": (sum(stds), len(stds)),
            "frac_reward_zero_std": (int((~signal).sum()), len(signal)),
        }
        scores = [one for _, group in groups for one in group]
        for k, reward in enumerate(self.rewards):
            values = torch.tensor([one.values[k] for one in scores], dtype=torch.float64)
            kept = values[~values.isnan()]
            metrics[f"rewards/{reward.name}/mean"] = _noted(kept)
            if len(kept) > 1:
                metrics[f"rewards/{reward.name}/std"] = (float(kept.std()), 1)
            reasons = Counter(one.reasons[k] for one in scores)
            for reason in FAULTS:
                metrics[f"rewards/{reward.name}/{reason}"] = (reasons[reason], len(scores))
        completions = [completion for group, _ in groups for completion in group]
        lengths = torch.tensor([len(x.tokens) for x in completions], dtype=torch.float64)
        finished = torch.tensor([x.finished for x in completions])
        logp = torch.tensor([p for x in completions for p in x.logprobs], dtype=torch.float64)
        for kind, some in {"length": lengths, "terminated_length": lengths[finished]}.items():
            metrics[f"completions/mean_{kind}"] = _noted(some)
            if len(some):
                metrics[f"completions/min_{kind}"] = (float(some.min()), 1)
                metrics[f"completions/max_{kind}"] = (float(some.max()), 1)
        return {
            **metrics,
            "completions/clipped_ratio": _noted(~finished),
            "entropy": _noted(-logp),  # unbiased at top_p = 1
        }

    def close(self) -> None:
        self.pool.close()


def _noted(x: Tensor) -> Noted:
    return float(x.double().sum()), len(x)
