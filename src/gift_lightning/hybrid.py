"""Imitation and RL in one step: (1 − μ)·L_RL + μ·L_SFT."""

import math
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gift_lightning.branches import DEMONSTRATIONS, ROLLOUTS, BranchGradients, last_block
from gift_lightning.collate import Batch
from gift_lightning.controllers import GAC, Controller, MixStats
from gift_lightning.experience import Experience
from gift_lightning.functional import IGNORED
from gift_lightning.gates import SRFT, Gate
from gift_lightning.grpo import GRPO
from gift_lightning.hybrid_data import HybridData
from gift_lightning.imitation import Imitation, Reduction
from gift_lightning.loss import Evaluation
from gift_lightning.pairs import Pairs
from gift_lightning.policy import supervised_sequences
from gift_lightning.policy_loss import TokenLosses, group_advantages
from gift_lightning.prompts import PromptData, Ticket
from gift_lightning.target import Target
from gift_lightning.targets import OneHot


class Hybrid(Imitation, GRPO):
    """RL on rollouts and imitation of demonstrations in every step; needs `HybridData`.

    The loss is (1 − μ)·L_RL + μ·L_SFT: L_RL is GRPO's with all its options, L_SFT is SFT's towards
    any target, each averaged over its own tokens, over all micro-batches and devices. μ comes from
    the controller and stays for a whole optimizer step. A branch whose weight is 0 is not computed.
    With a gate as controller, what is imitated are the demonstrations of the rollout's own prompts,
    as the gate decides.

    Args:
        model: the policy, by a factory of `gift_lightning.models`.
        rewards: as GRPO's.
        controller: what sets μ.
        target: the target distribution of the demonstrations.
        reduction: what the demonstrations' loss averages over, as SFT's.
        old_policy_every: as SFT's.
        kwargs: GRPO's other options. The reference is both what the target reads and what the KL
            term compares with.
    """

    demonstrations: Batch
    weights: Tensor | None = None  # of the demonstrations, by a gate

    def __init__(
        self,
        model: PreTrainedModel,
        rewards: list[str | dict[str, Any]],
        controller: Controller,
        target: Target = OneHot(),  # noqa: B008 (frozen)
        reduction: Reduction = "token",
        old_policy_every: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, rewards, **kwargs)
        self.imitate(target, reduction, self.chunk_size, old_policy_every)
        self.controller = controller
        if "kl" in controller.measures and self.reference is None:
            raise ValueError(
                f"controller {type(controller).__name__} follows the KL to the reference and there "
                "is none: set model.reference, for example `--model.reference FrozenCopy`."
            )
        self._stats: MixStats | None = None  # of the step before
        self._rows: list[Tensor] = []  # of the step's demonstrations on this rank
        self._kl = [0.0, 0.0]  # sum and count
        self._gradients = BranchGradients(last_block(self.policy.base))
        self._pairs: Pairs | None = None
        if isinstance(controller, Gate) and self.collecting["max_resamples"]:
            raise ValueError(
                f"controller {type(controller).__name__} decides about groups without signal, "
                "which model.max_resamples would replace: set it to 0."
            )
        if isinstance(controller, SRFT) and target != OneHot():
            raise ValueError("controller SRFT has a loss of its own: drop model.target.")

    @property
    def about(self) -> str:
        rule = type(self.controller).__name__
        return f"{super().about}, with demonstrations towards {self.target} by {rule}"

    @property
    def data(self) -> PromptData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, HybridData):
            raise ValueError(
                f"{type(self).__name__} trains on prompts and demonstrations, and data is "
                f"{type(data).__name__}: set `--data HybridData`."
            )
        return data.prompts

    def setup(self, stage: str) -> None:
        super().setup(stage)
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if "gradient" in self.controller.measures and parts < 2:
            raise ValueError(
                f"controller {type(self.controller).__name__} estimates noise between the "
                "micro-batches of a step, and there is one: set trainer.accumulate_grad_batches to "
                "2 or more."
            )

        if isinstance(self.controller, Gate) and stage == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self._pairs = Pairs(self.controller, data)
            found, of = self._pairs.num_paired, len(self.data.problems)
            rank_zero_info(f"{found} of {of} prompts have a demonstration")

    # One step.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.demonstrations = batch[DEMONSTRATIONS]
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.controller.update(self._stats, self.global_step)
            self._stats = None
        super().on_train_batch_start(batch["prompts"], batch_idx)
        if self._pairs is not None:
            self._take_pairs(Ticket(*batch["prompts"]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights, shares = self._branch_weights(), {}
        if self._is_read(weights[ROLLOUTS]):
            shares[ROLLOUTS] = self.rollout_share()
            self.note_rollout_batch(weights[ROLLOUTS] * shares[ROLLOUTS])
        if self._is_read(weights[DEMONSTRATIONS]):
            shares[DEMONSTRATIONS] = self._demonstration_share()
            loss = weights[DEMONSTRATIONS] * shares[DEMONSTRATIONS]
            self.note_micro_batch(self.demonstrations, loss, stream=DEMONSTRATIONS)
        losses = {branch: self.share_of_step(share) for branch, share in shares.items()}
        if self.is_logged_step or "gradient" in self.controller.measures:
            self._gradients.add(losses)
        num_parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        for branch, share in shares.items():
            self.means.add(f"loss/{branch}", float(share.detach()), 1 / num_parts)
        return torch.stack([weights[b] * x for b, x in losses.items() if weights[b]]).sum()

    def _branch_weights(self) -> dict[str, float]:
        controller = self.controller
        if not isinstance(controller, Gate):
            return {ROLLOUTS: 1 - controller.mu, DEMONSTRATIONS: controller.mu}
        some = self.demonstrations["step_sequences"] > 0
        return {ROLLOUTS: 1.0, DEMONSTRATIONS: controller.weight if some else 0.0}

    def _demonstration_share(self) -> Tensor:
        batch, controller = self.demonstrations, self.controller
        if not isinstance(controller, Gate) or not controller.joint:
            share, stats = self.imitation_share(batch, self.weights)
            self._note_rows(stats)
            return share
        assert self.weights is not None
        _, sequences = supervised_sequences(batch).unique_consecutive(return_inverse=True)
        if isinstance(controller, SRFT):
            temperature = self.sampling.temperature
            logp, entropy = self.policy.token_logp(batch, temperature, self.chunk_size)
            own = self.weights[sequences].to(logp.dtype)
            losses = controller.demonstration_losses(logp, entropy, sequences, own)
        else:
            losses, stats = self.losses(batch, self.is_logged_step, self.weights)
            self._train_means.update(stats)
        return (losses * self.sequence_weights(sequences).to(losses.dtype)).sum()

    # A gate's demonstrations.

    def revise(self, experience: Experience) -> None:
        if self._pairs is not None:
            assert self._collector is not None
            scale = self._collector.advantage_scale
            advantages = partial(group_advantages, scale=scale)
            self._pairs.decide(experience, self._collector, advantages, self.end_ids)

    def _take_pairs(self, ticket: Ticket) -> None:
        assert self._pairs is not None and self.experience is not None
        world, rank, pad = self.trainer.world_size, self.global_rank, self.end_ids[0]
        batch, weights = self._pairs.batch(self.experience, ticket, pad, world, rank)
        self.demonstrations = self.transfer_batch_to_device(batch, self.device, 0)
        self.weights = weights.to(self.device)
        if isinstance(self.controller, Gate) and self.controller.joint:
            mine = int((batch["labels"] != IGNORED).sum())
            self.counts = self.counts[0] + mine, self.counts[1] + batch["step_tokens"]
            self.num_sequences += batch["step_sequences"]

    def token_advantages(self, batch: Batch, entropy: Tensor, sequences: Tensor) -> Tensor:
        advantages = super().token_advantages(batch, entropy, sequences)
        if isinstance(self.controller, SRFT):
            return self.controller.rollout_advantages(advantages, entropy, sequences)
        return advantages

    def _is_read(self, weight: float) -> bool:
        return bool(weight or self.controller.measures)

    def _note_rows(self, stats: Evaluation) -> None:
        if not isinstance(self.controller, GAC):
            return
        found, row = supervised_sequences(self.demonstrations).unique_consecutive(
            return_inverse=True
        )
        logp = -stats.nll.detach()
        every = torch.ones(len(found), dtype=torch.bool, device=logp.device)
        self._rows.append(self.controller.rows(logp, torch.zeros_like(logp), row, every))

    def _note_tokens(self, tokens: TokenLosses, difference: Tensor) -> None:
        super()._note_tokens(tokens, difference)
        if tokens.kl is not None:
            self._kl[0] += float(tokens.kl.detach().double().sum())
            self._kl[1] += len(tokens.kl)

    @property
    def reads_reference(self) -> bool:
        return super().reads_reference or "kl" in self.controller.measures

    # What the next step's μ depends on.

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)

        def reduce(x: Tensor, how: str) -> Tensor:
            reduced = self.trainer.strategy.reduce(x.to(self.device), reduce_op=how)
            return torch.as_tensor(reduced).cpu()

        measures, stats = self.controller.measures, MixStats(math.nan, math.nan, math.nan)
        if self.is_logged_step or "gradient" in measures:
            norms, stats = self._gradients.take(reduce)
            for name, value in norms.items():
                self.means.add(
                    f"grad_norm/{name}",
                    value / self.trainer.world_size,
                    1 / self.trainer.world_size,
                )
        if "proxy" in measures:
            stats = self._proxies()
        if "kl" in measures:
            total, count = reduce(torch.tensor(self._kl, dtype=torch.float64), "sum").tolist()
            stats = replace(stats, kl=total / count if count else math.nan)
        assert self.experience is not None
        signal = bool((self.experience.advantages[self.window] != 0).any())
        self._stats = replace(stats, has_signal=signal)
        self._rows, self._kl = [], [0.0, 0.0]

    def _proxies(self) -> MixStats:
        """The same on every rank: all of them have all rollouts, and exchange demonstrations."""
        controller, experience = self.controller, self.experience
        assert isinstance(controller, GAC) and experience is not None
        ids = self.window[experience.counted[self.window]]
        logp, row = experience.sampled(ids)
        none = torch.zeros(len(ids), dtype=torch.bool)
        rollouts = controller.rows(logp, experience.advantages[ids][row], row, none)
        mine = torch.cat([rollouts[:0], *(rows.cpu() for rows in self._rows)])
        shares = [mine]
        if self.trainer.world_size > 1:
            shares = [mine] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, mine)
        rows = torch.cat([rollouts, *shares])
        return controller.summary(rows, torch.arange(len(rows)) >= len(rollouts))

    def step_metrics(self) -> dict[str, Any]:
        mix = {"mu": self.controller.mu, **self.controller.parts()}
        return {
            **{f"{DEMONSTRATIONS}/{k}": v for k, v in self.imitation_metrics().items()},
            **{f"mix/{name}": value for name, value in mix.items()},
            **super().step_metrics(),
        }

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The demonstrations' validation sets, if there are any."""
        if self._val_means:
            super().validation_step(batch, batch_idx, dataloader_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["controller"] = {
            "rule": type(self.controller).__name__,
            "state": self.controller.state_dict(),
            "stats": None if self._stats is None else astuple(self._stats),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved, rule = checkpoint["controller"], type(self.controller).__name__
        if saved["rule"] != rule:
            raise ValueError(
                f"the checkpoint was written with controller {saved['rule']}, and model.controller "
                f"is {rule}: keep it, or start a new run from the exported weights."
            )
        self.controller.load_state_dict(saved["state"])
        self._stats = None if saved["stats"] is None else MixStats(*saved["stats"])
