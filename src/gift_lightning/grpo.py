"""GRPO and its family: rollouts, verifiable rewards, group advantages, a clipped policy loss."""

import time
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from gift_lightning.cache import CachedTopK
from gift_lightning.collate import Batch
from gift_lightning.collector import Collector
from gift_lightning.experience import Experience
from gift_lightning.means import Means
from gift_lightning.modes import scoring
from gift_lightning.module import PolicyModule
from gift_lightning.order import MicroBatch
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
from gift_lightning.problems import check_columns
from gift_lightning.prompts import PromptData, Ticket
from gift_lightning.references import Reference
from gift_lightning.rewards import build_rewards
from gift_lightning.rollouts import HFRollout, RolloutEngine, Sampling
from gift_lightning.schedule import Schedule

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class GRPO(PolicyModule):
    """Group-relative policy optimisation on verifiable rewards (arXiv 2402.03300).

    Needs `PromptData`. A rollout is scored, its advantages are taken within each prompt's group,
    and its completions are trained in optimizer steps whose gradient does not depend on the split
    into micro-batches and devices. Names and defaults are TRL's where it has the option;
    docs/grpo.md lists the differences. Dropout is off: a policy that is scored otherwise than it
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
        engine: what samples.
        correction: of the difference between engine and trainer, by the ratio of their
            log-probabilities: clamped to the cap, or zeroed above it; only for engines that are
            not the policy itself.
        correction_cap: the largest such ratio.
        reward_timeout: seconds that one reward may take for one completion.
        reward_workers: processes that score; by default one for each core.
        optimizer: over the trainable parameters.
        schedule: of the learning rate.
        tokenizer: folder or hub id, if it is not the model's own.
        chunk_size: tokens whose logits exist at a time; by default about 2²⁵ logits.
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
        engine: RolloutEngine = HFRollout(),  # noqa: B008 (holds no state of a run)
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
        self.rewards = build_rewards(rewards)
        super().__init__(model, reference, optimizer, schedule, tokenizer, max_skipped_steps)
        self.objective, self.entropy_weight = objective, entropy_weight
        self._sampling = Sampling(max_completion_length, temperature, top_p)
        self.correction, self.correction_cap = correction, correction_cap
        self.engine, self.chunk_size = engine, chunk_size
        self._collector_options: dict[str, Any] = {
            "advantage_scale": advantage_scale,
            "max_resamples": max_resamples,
            "mask_truncated": mask_truncated,
            "only_signal": not (kl_weight or entropy_weight),
            "timeout": reward_timeout,
            "num_workers": reward_workers,
        }
        self._collector: Collector | None = None
        self._experience: Experience | None = None
        self._batch: Batch | None = None
        self._count = 0  # sampled tokens that the loss is divided by
        self._means = Means()

    @property
    def sampling(self) -> Sampling:
        return replace(self._sampling, end_ids=tuple(self.end_ids))

    @property
    def data(self) -> PromptData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptData):
            raise ValueError(
                f"GRPO trains on prompts, and data is {type(data).__name__}: "
                "set `--data PromptData`."
            )
        return data

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for reward in self.rewards:
            check_columns(reward.name, self.data.problems, reward.reward.reads)

    def on_train_start(self) -> None:
        super().on_train_start()
        for module in self.policy.modules():  # without dropout; checkpointing needs train mode
            module.training = bool(getattr(module, "gradient_checkpointing", False))

    @property
    def about(self) -> str:
        names = ", ".join(reward.name for reward in self.rewards)
        return f"GRPO ({self.objective.loss}) on {names}"

    # One rollout.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        ticket, data = Ticket(*batch), self.data
        world, rank = self.trainer.world_size, self.global_rank
        if self._experience is None or self._experience.number != ticket.rollout:
            self._experience = self._collected(ticket)
        experience = self._experience
        window = torch.from_numpy(data.window(ticket, len(experience)))
        part = torch.tensor(data.part(ticket, experience, world, rank), dtype=torch.int64)
        counted = experience.num_tokens(experience.counted)
        # bnpo is by definition a mean over the micro-batch.
        self._count = int(counted[part if self.objective.loss == "bnpo" else window].sum())
        trained = experience.num_tokens(experience.trained)[window]
        ids = part[experience.trained[part]].tolist()
        micro_batch = MicroBatch(tuple(ids), int(trained.sum()), len(window))
        self._batch = self._transferred(experience, micro_batch)
        super().on_train_batch_start(self._batch, batch_idx)

    def _collected(self, ticket: Ticket) -> Experience:
        if self._collector is None:
            self._collector = Collector(
                self.engine, self.sampling, self.rewards, self.tokenizer, **self._collector_options
            )
        world, rank = self.trainer.world_size, self.global_rank
        start = time.perf_counter()
        experience, metrics = self._collector.collect(self.model, self.data, ticket, world, rank)
        metrics["rollout_time"] = time.perf_counter() - start
        for name, value in metrics.items():
            self._means.add(name, value)
        sampler = self.data.sampler
        assert sampler is not None
        if sampler.num_steps * self.data.num_iterations > 1:
            experience.old_logp = self._scored(experience)
        return experience

    def _transferred(self, experience: Experience, part: MicroBatch) -> Batch:
        batch = experience.batch(part, self.end_ids[0], self.data.packing)
        moved: Batch = self.transfer_batch_to_device(batch, self.device, 0)
        return moved

    @torch.no_grad()
    def _scored(self, experience: Experience) -> Tensor:
        """Log-probabilities of all trained tokens under the policy as it is now; the ranks share
        the work."""
        out = torch.zeros_like(experience.sampler_logp, device=self.device)
        places = torch.arange(len(out))
        by_length = experience.lengths().argsort(descending=True)
        trained = by_length[experience.trained[by_length]].tolist()
        mine = trained[self.global_rank :: self.trainer.world_size]
        with scoring(self.model):
            for start in range(0, len(mine), self.data.batch_size):
                ids = tuple(mine[start : start + self.data.batch_size])
                batch = self._transferred(experience, MicroBatch(ids, 0, 0))
                logp, _ = self.policy.token_logp(batch, self._sampling.temperature, self.chunk_size)
                out[experience.token_values(batch, places)] = logp.to(out.dtype)
        summed = self.trainer.strategy.reduce(out, reduce_op="sum")
        return torch.as_tensor(summed).cpu()

    # One step.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        experience, batch = self._experience, self._batch
        assert experience is not None and batch is not None
        logp, entropy = self.policy.token_logp(batch, self._sampling.temperature, self.chunk_size)
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
            experience.completion_values(batch, experience.advantages).to(logp.dtype),
            sequences,
            ref_logp=self._reference_logp(batch),
            importance=self._importance(old_logp - sampler_logp, sequences),
        )
        local = self.objective.loss == "bnpo"
        weights = token_weights(
            self.objective,
            sequences,
            self._count,
            batch["step_sequences"],
            self._sampling.max_completion_length,
        ).to(logp.dtype)
        total = ((tokens.loss - self.entropy_weight * entropy) * weights).sum()
        share = total / (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        self.note_micro_batch(batch, share if local else total)
        self._note_tokens(tokens, old_logp - sampler_logp)
        return total if local else self.share_of_step(total)

    def _reference_logp(self, batch: Batch) -> Tensor | None:
        if self.reference is None or not (self.objective.kl_weight or self.is_logged_step):
            return None
        return self.reference.label_logp(self.policy, batch, self._sampling.temperature)

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
        clipped = tokens.low_clipped | tokens.high_clipped
        values = {
            "policy_loss": tokens.loss.detach(),
            "clip_ratio/low_mean": tokens.low_clipped,
            "clip_ratio/high_mean": tokens.high_clipped,
            "clip_ratio/region_mean": clipped,
            "importance_ratio/mean": tokens.ratio,
            "sampling/sampling_logp_difference/mean": difference.abs(),
        }
        if tokens.kl is not None:
            values["kl"] = tokens.kl
        for name, value in values.items():
            self._means.add(name, float(value.double().sum()), len(value))
        if len(difference):
            self._means.raise_to("importance_ratio/max", float(tokens.ratio.max()))
            self._means.raise_to(
                "sampling/sampling_logp_difference/max", float(difference.abs().max())
            )

    def step_metrics(self) -> dict[str, Any]:
        def reduce(x: Tensor, how: str) -> Tensor:
            reduced = self.trainer.strategy.reduce(x.to(self.device), reduce_op=how)
            return torch.as_tensor(reduced).cpu()

        return {**self._means.take(reduce), **super().step_metrics()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: callbacks such as GenerationEval say what validation is."""

    # A run that is stopped inside a rollout goes on with the same completions.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._experience is not None:
            checkpoint["experience"] = vars(self._experience).copy()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "experience" in checkpoint:
            self._experience = Experience(**checkpoint["experience"])

    def teardown(self, stage: str) -> None:
        if self._collector is not None:
            self._collector.close()
            self._collector = None


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
