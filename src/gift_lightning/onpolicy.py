"""What every stage shares that trains a policy on what it samples."""

import time
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from gift_lightning.collate import Batch, collate
from gift_lightning.collector import Collector
from gift_lightning.experience import Experience
from gift_lightning.means import Means
from gift_lightning.models import base_model
from gift_lightning.modes import scoring
from gift_lightning.module import PolicyModule
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy
from gift_lightning.problems import check_columns
from gift_lightning.prompts import PromptData, Ticket
from gift_lightning.references import Reference
from gift_lightning.rewards import build_rewards, needs
from gift_lightning.rollouts import HFRollout, RolloutEngine, Sampling
from gift_lightning.sampler import check_positions
from gift_lightning.schedule import Schedule


class OnPolicy(PolicyModule):
    """A policy that trains on its own completions; needs `PromptData`.

    A stage writes `training_step`, for the micro-batch `self.batch` of `self.experience`: the batch
    that it is handed is only the ticket that these were made for.

    Attributes:
        experience: the current rollout.
        batch: completions of it that have something to teach, all sampled tokens supervised.
        counts: sampled tokens of the micro-batch and of the whole optimizer step, of all
            completions that count.
        num_sequences: completions of the step.
        window: the completions of the optimizer step, on all ranks.

    Args:
        model: the policy.
        rewards: as in `rewards.build_rewards`.
        sampling: how completions are drawn; their end tokens are the policy's.
        reference: the frozen distribution that the objective reads or the log compares with.
        engine: what samples; by default HFRollout.
        collecting: further options of `Collector`.
        optimizer: over the trainable parameters.
        schedule: of the learning rate.
        tokenizer: folder or hub id, if it is not the model's own.
        chunk_size: tokens whose logits exist at a time.
        max_skipped_steps: non-finite steps in a row that stop the run.
    """

    experience: Experience | None = None
    batch: Batch | None = None
    counts: tuple[int, int] = (0, 0)
    num_sequences: int = 0
    window: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        rewards: list[str | dict[str, Any]],
        sampling: Sampling,
        *,
        reference: Reference | None,
        engine: RolloutEngine | None,
        collecting: dict[str, Any],
        optimizer: OptimizerCallable,
        schedule: Schedule,
        tokenizer: str | None,
        chunk_size: int | None,
        max_skipped_steps: int,
    ) -> None:
        self.rewards = build_rewards(rewards)
        super().__init__(model, reference, optimizer, schedule, tokenizer, max_skipped_steps)
        self.engine, self.chunk_size = engine or HFRollout(), chunk_size
        self.sampling, self.collecting = sampling, collecting
        self._collector: Collector | None = None
        self._fresh_tokens = 0  # of a rollout that is not counted yet
        self.means = Means()

    @property
    def data(self) -> PromptData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptData):
            raise ValueError(
                f"{type(self).__name__} trains on prompts, and data is {type(data).__name__}: "
                "set `--data PromptData`."
            )
        return data

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data, limit = self.data, self.sampling.max_completion_length
        for reward in self.rewards:
            reward.reward.check(limit)
            check_columns(reward.name, data.problems, needs(reward.reward))
        check_positions(base_model(self.model), data.problems, data.prompt_ids, limit)
        if stage == "fit":
            sampling = replace(self.sampling, end_ids=tuple(self.end_ids))
            longest = max(map(len, data.prompt_ids))
            self.engine.start(self.model, self.tokenizer, sampling, longest)
            self._collector = Collector(
                self.engine, sampling, self.rewards, self.tokenizer, **self.collecting
            )

    def on_train_start(self) -> None:
        super().on_train_start()
        whole = self.policy.whole()
        for policy in (self.policy, whole):
            for module in policy.modules():  # without dropout; checkpointing needs train mode
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        self._refuse_dropout(whole)

    @torch.no_grad()
    def _refuse_dropout(self, policy: Policy) -> None:
        """Some layers apply dropout themselves, and checkpointing keeps them in train mode."""
        ids = torch.arange(8).remainder(self.vocab_size)
        batch = self.transfer_batch_to_device(
            collate([(ids, ids)], MicroBatch((0,), 7, 1), 0), self.device, 0
        )
        found = []
        with torch.random.fork_rng():
            for seed in (0, 1):
                torch.manual_seed(seed)
                found.append(policy.projected(batch).hidden)
        if not torch.equal(*found):
            raise ValueError(
                f"{type(policy.base).__name__} applies dropout under gradient checkpointing, "
                "which importance ratios do not bear: set gradient_checkpointing to false, or its "
                "dropout to 0."
            )

    # One rollout.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The stream gives a ticket; the batch that it stands for is made here.
        ticket, data = Ticket(*batch), self.data
        if self.experience is None or self.experience.number != ticket.rollout:
            self.experience = self._collected(ticket)
        experience = self.experience
        window, lengths = data.window(ticket, len(experience)), experience.lengths().numpy()
        self.window = torch.from_numpy(window)
        world, rank = self.replicas.number, self.replicas.index
        part = torch.tensor(data.part(ticket, window, lengths, world, rank), dtype=torch.int64)
        counted = experience.num_tokens(experience.counted)
        self.counts = int(counted[part].sum()), int(counted[window].sum())
        self.num_sequences = len(window)
        trained = experience.num_tokens(experience.trained)[window]
        ids = part[experience.trained[part]].tolist()
        micro_batch = MicroBatch(tuple(ids), int(trained.sum()), len(window))
        self.batch = self._transferred(experience, micro_batch)
        super().on_train_batch_start(self.batch, batch_idx)

    def _collected(self, ticket: Ticket) -> Experience:
        assert self._collector is not None, "setup comes first"
        start, policy, replicas = time.perf_counter(), self.policy.whole(), self.replicas
        experience, metrics = self._collector.collect(policy.model, self.data, ticket, replicas)
        self.revise(experience)
        metrics["rollout_time"] = (time.perf_counter() - start, 1)
        self._fresh_tokens = int(experience.lengths().sum())
        for name, (total, count) in metrics.items():
            self.means.add(name, total, count)
        sampler = self.data.sampler
        assert sampler is not None
        if sampler.num_steps * self.data.num_iterations > 1:
            experience.old_logp = self._scored(policy, experience)
        return experience

    def revise(self, experience: Experience) -> None:
        """A stage may change here what a rollout teaches, the same on every rank."""

    def _transferred(self, experience: Experience, part: MicroBatch) -> Batch:
        data = self.data
        batch = experience.batch(part, self.end_ids[0], data.packing, data.share_prompts)
        moved: Batch = self.transfer_batch_to_device(batch, self.device, 0)
        return moved

    @torch.no_grad()
    def _scored(self, policy: Policy, experience: Experience) -> Tensor:
        """Log-probabilities of all trained tokens under the policy as it is now; the replicas share
        the work."""
        out = torch.zeros_like(experience.sampler_logp, device=self.device)
        places = torch.arange(len(out))
        world, rank = self.replicas.number, self.replicas.index
        if self.data.share_prompts:
            trained = experience.trained.nonzero()[:, 0]
            mine = trained.tensor_split(world)[rank].tolist()
        else:
            by_length = experience.lengths().argsort(descending=True)
            mine = by_length[experience.trained[by_length]].tolist()[rank::world]
        # In the trainer's precision, as the training step.
        with self.trainer.precision_plugin.forward_context(), scoring(policy.model):
            for start in range(0, len(mine), self.data.batch_size):
                ids = tuple(mine[start : start + self.data.batch_size])
                batch = self._transferred(experience, MicroBatch(ids, 0, 0))
                logp, _ = policy.token_logp(batch, self.sampling.temperature, self.chunk_size)
                out[experience.token_values(batch, places)] = logp.to(out.dtype)
        summed = self.trainer.strategy.reduce(out, reduce_op="sum")
        return torch.as_tensor(summed).cpu()

    def note_rollout_batch(self, loss: Tensor) -> None:
        """`note_micro_batch` for `self.batch`; the tokens of a rollout are counted once."""
        assert self.batch is not None
        self.note_micro_batch(self.batch, loss, self._fresh_tokens)
        self._fresh_tokens = 0

    def reduced(self, x: Tensor, how: str) -> Tensor:
        """The "sum" or "max" over the ranks, on the CPU."""
        reduced = self.trainer.strategy.reduce(x.to(self.device), reduce_op=how)
        return torch.as_tensor(reduced).cpu()

    def step_metrics(self) -> dict[str, Any]:
        return {**self.means.take(self.reduced), **super().step_metrics()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: callbacks such as GenerationEval say what validation is."""

    # A run that is stopped inside a rollout goes on with the same completions.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        loop: Any = self.trainer.fit_loop.epoch_loop
        inside = loop.batch_progress.current.processed % self.data.parts_per_rollout
        if self.experience is not None and inside:
            checkpoint["experience"] = vars(self.experience).copy()
            checkpoint["sampled_at"] = self.sampling.temperature

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "experience" in checkpoint:
            if checkpoint["sampled_at"] != self.sampling.temperature:
                raise ValueError(
                    "the checkpoint was written inside a rollout that was sampled at temperature "
                    f"{checkpoint['sampled_at']}, and model.temperature is "
                    f"{self.sampling.temperature}: keep it, or resume from another checkpoint."
                )
            self.experience = Experience(**checkpoint["experience"])

    def configure_callbacks(self) -> list[Callback]:
        return [_Closing()]

    def teardown(self, stage: str) -> None:
        """Ends the reward workers and what the engine started, and forgets the rollout: another fit
        samples its own."""
        self.experience = self.batch = None
        self.engine.close()
        if self._collector is not None:
            self._collector.close()
            self._collector = None


class _Closing(Callback):
    """Nothing that a fit started survives it when it fails."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        pl_module.teardown("")
