"""GRPO and its family: rollouts, verifiable rewards, group advantages, a clipped policy loss."""

import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from gift_lightning.cache import CachedTopK
from gift_lightning.collate import Batch
from gift_lightning.onpolicy import OnPolicy
from gift_lightning.policy import supervised_sequences
from gift_lightning.policy_loss import (
    KLEstimator,
    Level,
    Loss,
    PolicyObjective,
    Scale,
    TokenLosses,
    sequence_sum,
    token_policy_losses,
    token_weights,
)
from gift_lightning.references import Reference
from gift_lightning.rollouts import RolloutEngine, Sampling
from gift_lightning.schedule import Schedule

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class GRPO(OnPolicy):
    """Group-relative policy optimisation on verifiable rewards (arXiv 2402.03300).

    Needs `PromptData`. A rollout is scored, its advantages are taken within each prompt's group,
    and its completions are trained in optimizer steps whose gradient does not depend on the split
    into micro-batches and devices. Defaults are TRL's where it has the option; docs/grpo.md has its
    names and lists the differences. Dropout is off: a policy that is scored otherwise than it
    sampled has no importance ratio.

    Args:
        model: the policy, by a factory of `gift_lightning.models`.
        rewards: each a class of `gift_lightning.rewards`, or the dotted path of a class or of a
            function with TRL's signature; as a string, or {class_path, init_args, weight}.
        reference: what the KL term compares with; without it, none is computed.
        loss: per-token loss and what its sum is divided by.
        level: importance ratio per token, or per sequence (GSPO).
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: and above 1 + clip_high, by default clip_low; for cispo the ratio's cap.
        delta: cap of the ratio where the advantage is negative.
        advantage_scale: advantages are divided by the group's or the batch's std, or by nothing.
        kl_weight: factor on the KL to the reference.
        kl_estimator: k1, k2, k3, or k3 weighted by the ratio.
        entropy_weight: factor on the entropy bonus.
        mask_truncated: completions without an end token do not count in the loss.
        max_resamples: rounds of new prompts for groups whose rewards are all equal (dynamic
            sampling of DAPO, arXiv 2503.14476).
        max_completion_length: most sampled tokens.
        temperature: of sampling; the policy is scored at the same.
        top_p: mass of the likeliest tokens that are sampled from.
        engine: what samples; by default HFRollout, the policy itself.
        correction: of the difference between engine and trainer, by the ratio of their
            log-probabilities: clamped to the cap, or zeroed above it; only for engines that are
            not the policy itself.
        correction_cap: the largest such ratio.
        reward_timeout: seconds that one reward may take for one completion.
        reward_workers: processes that score; by default one for each core, at most 8.
        optimizer: over the trainable parameters.
        schedule: of the learning rate.
        tokenizer: folder or hub id, if it is not the model's own.
        chunk_size: tokens whose logits exist at a time; by default about 2²⁵ logits, on a CPU 2²⁴.
        max_skipped_steps: non-finite steps in a row that stop the run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rewards: list[str | dict[str, Any]],
        reference: Reference | None = None,
        loss: Loss = "dapo",
        level: Level = "token",
        clip_low: float = 0.2,
        clip_high: float | None = None,
        delta: float | None = None,
        advantage_scale: Scale = "group",
        kl_weight: float = 0.0,
        kl_estimator: KLEstimator = "k3_corrected",
        entropy_weight: float = 0.0,
        mask_truncated: bool = False,
        max_resamples: int = 0,
        max_completion_length: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        engine: RolloutEngine | None = None,
        correction: Correction = "sequence_mask",
        correction_cap: float = 3.0,
        reward_timeout: float = 5.0,
        reward_workers: int | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-6, weight_decay=0.0),
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        tokenizer: str | None = None,
        chunk_size: int | None = None,
        max_skipped_steps: int = 5,
    ) -> None:
        objective = PolicyObjective(
            loss, level, clip_low, clip_high, delta, kl_weight, kl_estimator
        )
        _check(objective, reference, temperature, top_p, max_completion_length)
        if correction not in get_args(Correction):
            known = ", ".join(get_args(Correction))
            raise ValueError(f"model.correction is one of {known}, got {correction!r}.")
        if max_resamples < 0:
            raise ValueError(f"model.max_resamples must be 0 or more, got {max_resamples}.")
        super().__init__(
            model,
            rewards,
            Sampling(max_completion_length, temperature, top_p),
            reference=reference,
            engine=engine,
            collecting={
                "advantage_scale": advantage_scale,
                "max_resamples": max_resamples,
                "mask_truncated": mask_truncated,
                "only_signal": not (kl_weight or entropy_weight),
                "timeout": reward_timeout,
                "num_workers": reward_workers,
            },
            optimizer=optimizer,
            schedule=schedule,
            tokenizer=tokenizer,
            chunk_size=chunk_size,
            max_skipped_steps=max_skipped_steps,
        )
        self.objective, self.entropy_weight = objective, entropy_weight
        self.correction, self.correction_cap = correction, correction_cap

    @property
    def about(self) -> str:
        names = ", ".join(reward.name for reward in self.rewards)
        return f"GRPO ({self.objective.loss}) on {names}"

    # One step.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = self.rollout_share()
        self.note_rollout_batch(share)
        return self.share_of_step(share)

    def rollout_share(self) -> Tensor:
        """The part that `self.batch` has in the step's loss."""
        experience, batch = self.experience, self.batch
        assert experience is not None and batch is not None
        logp, entropy = self.policy.token_logp(batch, self.sampling.temperature, self.chunk_size)
        _, sequences = supervised_sequences(batch).unique_consecutive(return_inverse=True)
        if experience.old_logp is None:
            old_logp = logp.detach()
        else:
            old_logp = experience.token_values(batch, experience.old_logp).to(logp.dtype)
        sampler_logp = experience.token_values(batch, experience.sampler_logp).to(logp.dtype)
        tokens = token_policy_losses(
            self.objective,
            logp,
            old_logp,
            self.token_advantages(batch, entropy, sequences).to(logp.dtype),
            sequences,
            ref_logp=self._reference_logp(batch),
            importance=self._importance(old_logp - sampler_logp, sequences),
        )
        self._note_tokens(tokens, old_logp - sampler_logp)
        weights = self.sequence_weights(sequences).to(logp.dtype)
        return ((tokens.loss - self.entropy_weight * entropy) * weights).sum()

    def sequence_weights(self, sequences: Tensor) -> Tensor:
        """[n] what each token's loss counts in the step's."""
        local = self.objective.loss == "bnpo"  # by definition a mean over the micro-batch
        num_parts = self.trainer.accumulate_grad_batches * self.replicas.number
        weights = token_weights(
            self.objective,
            sequences,
            self.counts[0 if local else 1],
            self.num_sequences,
            self.sampling.max_completion_length,
        )
        return weights / num_parts if local else weights

    def token_advantages(self, batch: Batch, entropy: Tensor, sequences: Tensor) -> Tensor:
        """[n] of the micro-batch's tokens."""
        assert self.experience is not None
        return self.experience.completion_values(batch, self.experience.advantages)

    @property
    def reads_reference(self) -> bool:
        """Whether the current step computes the KL."""
        return bool(self.objective.kl_weight) or self.is_logged_step

    def _reference_logp(self, batch: Batch) -> Tensor | None:
        if self.reference is None or not self.reads_reference:
            return None
        return self.reference.label_logp(self.policy, batch, self.sampling.temperature)

    def _importance(self, difference: Tensor, sequences: Tensor) -> Tensor | None:
        """Trainer over engine: [n] factors on the policy's loss, or None where they agree."""
        if self.engine.is_the_policy or self.correction == "none":
            return None
        level, _, how = self.correction.partition("_")
        if level == "sequence":
            difference = sequence_sum(difference, sequences)
        ratio = difference.exp()
        if how == "truncate":
            return ratio.clamp(max=self.correction_cap)
        return torch.where(ratio <= self.correction_cap, ratio, 0.0)

    def _note_tokens(self, tokens: TokenLosses, difference: Tensor) -> None:
        """Means over the tokens that are trained."""
        low, high = tokens.low_clipped, tokens.high_clipped
        gap = difference.abs()
        values = {
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low | high,
            "importance_ratio/mean": tokens.ratio,
            "sampling/sampling_logp_difference/mean": gap,
        }
        if tokens.kl is not None:
            values["kl"] = tokens.kl
        n, nothing = len(gap), gap.new_full((1,), -math.inf)
        largest = {
            "importance_ratio/max": torch.cat([tokens.ratio, nothing]).max(),
            "sampling/sampling_logp_difference/max": torch.cat([gap, nothing]).max(),
        }
        sums = [value.double().sum() for value in values.values()]
        found = torch.stack([*sums, *(x.double() for x in largest.values())]).tolist()
        for name, total in zip(values, found, strict=False):
            self.means.add(name, total, n)
        for name, value in zip(largest, found[len(values) :], strict=True):
            self.means.raise_to(name, value)


def _check(
    objective: PolicyObjective,
    reference: Reference | None,
    temperature: float,
    top_p: float,
    max_completion_length: int,
) -> None:
    if objective.kl_weight and reference is None:
        raise ValueError(
            f"model.kl_weight={objective.kl_weight} needs a reference and there is none: set "
            "model.reference, for example `--model.reference FrozenCopy`."
        )
    if isinstance(reference, CachedTopK):
        raise ValueError(
            "model.reference CachedTopK knows the completions of a dataset, not those that are "
            "sampled in RL: use FrozenCopy or AdapterOff."
        )
    if objective.loss == "cispo" and objective.clip_high is None:
        raise ValueError("loss cispo needs model.clip_high, the cap of its ratio (ScaleRL: 5.0).")
    if not temperature > 0:
        raise ValueError(f"model.temperature must be above 0 to explore, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"model.top_p must be above 0 and at most 1, got {top_p}.")
    if max_completion_length < 1:
        raise ValueError(
            f"model.max_completion_length must be at least 1, got {max_completion_length}."
        )
