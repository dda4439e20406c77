"""Imitation and RL in one step: (1 − μ)·L_RL + μ·L_SFT."""

from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gift_lightning.branches import DEMONSTRATIONS, ROLLOUTS, last_block
from gift_lightning.collate import Batch
from gift_lightning.controller import Controller, MixStats
from gift_lightning.controllers import GAC
from gift_lightning.experience import Experience
from gift_lightning.fsdp1 import FSDP1
from gift_lightning.functional import IGNORED
from gift_lightning.gates import Gate
from gift_lightning.grpo import GRPO
from gift_lightning.hybrid_data import HybridData
from gift_lightning.imitation import Imitation, Reduction
from gift_lightning.measures import StepMeasures
from gift_lightning.pairs import Pairs
from gift_lightning.policy import supervised_sequences
from gift_lightning.policy_loss import TokenLosses, group_advantages
from gift_lightning.prompts import PromptData, Ticket
from gift_lightning.target import Target
from gift_lightning.targets import CHORDPhi, OneHot

_LARGE = 0.05  # change of μ in a step that is counted in the log


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
    demonstration_weights: Tensor | None = None  # by a gate

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
        self.gate = controller if isinstance(controller, Gate) else None
        self._check_controller()
        if "kl" in controller.measures:  # of all completions, also those without advantage
            self.collecting["only_signal"] = False
        self._fresh = controller.state_dict()
        self._pairs: Pairs | None = None
        self._measured = StepMeasures(controller, last_block(self.policy.base))
        self._stats: MixStats | None = None  # of the step before

    def _check_controller(self) -> None:
        controller, name = self.controller, type(self.controller).__name__
        if "kl" in controller.measures and self.reference is None:
            raise ValueError(
                f"controller {name} follows the KL to the reference and there is none: set "
                "model.reference, for example `--model.reference FrozenCopy`."
            )
        if "proxy" in controller.measures and not isinstance(controller, GAC):
            raise ValueError(
                f"controller {name} reads proxies, and only a GAC can say which: derive it from "
                "gift_lightning.controllers.GAC."
            )
        if self.gate is None:
            return
        if self.collecting["max_resamples"]:
            raise ValueError(
                f"controller {name} decides about groups without signal, which "
                "model.max_resamples would replace: set it to 0."
            )
        if self.gate.joint and self.reduction != "token":
            raise ValueError(
                f"controller {name} averages over rollouts and demonstrations together, as "
                "model.loss says: drop model.reduction."
            )
        if self.gate.own_loss and self.target != OneHot():
            raise ValueError(f"controller {name} has a loss of its own: drop model.target.")

    @property
    def about(self) -> str:
        rule = type(self.controller).__name__
        return f"{super().about}, with demonstrations towards {self.target} by {rule}"

    @property
    def is_paired(self) -> bool:
        """Whether demonstrations are those of the rollouts' own prompts, not a stream."""
        return self.gate is not None

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
        if isinstance(self.trainer.strategy, FSDP1):  # a branch's own gradient disturbs its hooks
            raise ValueError(
                f"trainer.strategy fsdp does not train {type(self).__name__}: use "
                "`--trainer.strategy fsdp2`."
            )
        super().setup(stage)
        if stage != "fit":
            return
        self._stats = None  # another fit starts anew
        self._measured.forget()
        self.controller.load_state_dict(self._fresh)
        parts = self.trainer.accumulate_grad_batches * self.replicas.number
        if "gradient" in self.controller.measures and parts < 2:
            raise ValueError(
                f"controller {type(self.controller).__name__} estimates noise between the "
                "micro-batches of a step, and there is one: set trainer.accumulate_grad_batches to "
                "2 or more."
            )
        self._compare_phi()
        if self.gate is not None:
            self._pairs = Pairs(self.gate, self.trainer.datamodule)  # type: ignore[attr-defined]
            found, of = self._pairs.num_paired, len(self.data.problems)
            rank_zero_info(f"{found} of {of} prompts have a demonstration")

    def _compare_phi(self) -> None:
        """A word if the proxies are those of another loss than the demonstrations have."""
        controller = self.controller
        if not isinstance(controller, GAC) or controller.estimator != "proxy":
            return
        if controller.use_phi is not isinstance(self.target, CHORDPhi):
            rank_zero_warn(
                f"GAC measures with use_phi={controller.use_phi} how far the demonstrations' "
                f"gradient is from the rollouts', and model.target is {type(self.target).__name__}:"
                " set model.controller.use_phi to true with CHORDPhi, to false with other targets."
            )

    # One step.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._update()
        super().on_train_batch_start(batch["prompts"], batch_idx)
        if self._pairs is None:
            self.demonstrations = batch[DEMONSTRATIONS]
        else:
            self._take_pairs(Ticket(*batch["prompts"]))

    def _update(self) -> None:
        before, mu = self.controller.mu, self.controller.update(self._stats, self.global_step)
        if not 0 <= mu <= 1:
            raise ValueError(
                f"controller {type(self.controller).__name__} set μ to {mu}: it is a share of the "
                "loss, from 0 to 1."
            )
        if self.gate is None and self.global_step:
            # A change of exactly that much, by a cap, can be more by rounding.
            self.means.add("mix/large_changes", abs(mu - before) > _LARGE + 1e-9, 1.0)
        self._stats = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights, shares = self._branch_weights(), {}
        measured = self.controller.measures
        if weights[ROLLOUTS] or measured:
            shares[ROLLOUTS] = self.rollout_share()
            self.note_rollout_batch(weights[ROLLOUTS] * shares[ROLLOUTS])
        if weights[DEMONSTRATIONS] or measured - {"kl"}:
            shares[DEMONSTRATIONS] = self._demonstration_share()
            loss = weights[DEMONSTRATIONS] * shares[DEMONSTRATIONS]
            self.note_micro_batch(self.demonstrations, loss, stream=DEMONSTRATIONS)
        losses = {branch: self.share_of_step(share) for branch, share in shares.items()}
        if self._measures_gradients:
            self._measured.add_gradients(losses)
        num_parts = self.trainer.accumulate_grad_batches * self.replicas.number
        for branch, share in shares.items():
            self.means.add(f"loss/{branch}", float(share.detach()), 1 / num_parts)
        return torch.stack([weights[b] * x for b, x in losses.items() if weights[b]]).sum()

    def _branch_weights(self) -> dict[str, float]:
        if self.gate is None:
            return {ROLLOUTS: 1 - self.controller.mu, DEMONSTRATIONS: self.controller.mu}
        some = self.demonstrations["step_sequences"] > 0
        return {ROLLOUTS: 1.0, DEMONSTRATIONS: self.gate.weight if some else 0.0}

    def _demonstration_share(self) -> Tensor:
        batch, weights = self.demonstrations, self.demonstration_weights
        if self.gate is None or not self.gate.joint:
            share, stats = self.imitation_share(batch, weights)
            if self._measured.reads("proxy", self.global_step):
                self._measured.add_demonstrations(batch, stats.nll)
            return share
        assert weights is not None
        _, sequences = supervised_sequences(batch).unique_consecutive(return_inverse=True)
        if self.gate.own_loss:
            temperature = self.sampling.temperature
            logp, entropy = self.policy.token_logp(batch, temperature, self.chunk_size)
            own = weights[sequences].to(logp.dtype)
            losses = self.gate.demonstration_losses(logp, entropy, sequences, own)
        else:
            losses, stats = self.losses(batch, self.is_logged_step, weights)
            self._train_means.update(stats)
        return (losses * self.sequence_weights(sequences).to(losses.dtype)).sum()

    # A gate's demonstrations.

    def revise(self, experience: Experience) -> None:
        if self._pairs is not None:
            assert self._collector is not None
            advantages = partial(group_advantages, scale=self._collector.advantage_scale)
            self._pairs.decide(experience, self._collector, advantages, self.end_ids, self.replicas)

    def _take_pairs(self, ticket: Ticket) -> None:
        assert self._pairs is not None and self.experience is not None and self.gate is not None
        pad = self.end_ids[0]
        batch, weights = self._pairs.batch(self.experience, ticket, pad, self.replicas)
        self.demonstrations = self.transfer_batch_to_device(batch, self.device, 0)
        self.demonstration_weights = weights.to(self.device)
        if self.gate.joint:
            mine = int((batch["labels"] != IGNORED).sum())
            self.counts = self.counts[0] + mine, self.counts[1] + batch["step_tokens"]
            self.num_sequences += batch["step_sequences"]

    def token_advantages(self, batch: Batch, entropy: Tensor, sequences: Tensor) -> Tensor:
        advantages = super().token_advantages(batch, entropy, sequences)
        if self.gate is None:
            return advantages
        return self.gate.rollout_advantages(advantages, entropy, sequences)

    # What the next step's μ depends on.

    @property
    def _measures_gradients(self) -> bool:
        return self.is_logged_step or self._measured.reads("gradient", self.global_step)

    @property
    def reads_reference(self) -> bool:
        return super().reads_reference or "kl" in self.controller.measures

    def _note_tokens(self, tokens: TokenLosses, difference: Tensor) -> None:
        super()._note_tokens(tokens, difference)
        if tokens.kl is not None:
            self._measured.add_kl(tokens.kl)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        assert self.experience is not None
        self._stats, norms = self._measured.take(
            self.global_step,
            self.experience,
            self.window,
            self.reduced,
            self.replicas,
            self._measures_gradients,
        )
        share = 1 / self.replicas.number  # all replicas have the same
        for name, value in norms.items():
            self.means.add(f"grad_norm/{name}", value * share, share)

    def step_metrics(self) -> dict[str, Any]:
        own = {"mu": self.controller.mu} if self.gate is None else {}
        return {
            **{f"{DEMONSTRATIONS}/{k}": v for k, v in self.imitation_metrics().items()},
            **{f"mix/{name}": x for name, x in {**own, **self.controller.parts()}.items()},
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
        saved, rule = checkpoint.get("controller", {}), type(self.controller).__name__
        if saved.get("rule") != rule:
            raise ValueError(
                f"the checkpoint was written with controller {saved.get('rule')}, and "
                f"model.controller is {rule}: keep it, or start a new run from the exported "
                "weights."
            )
        self.controller.load_state_dict(saved["state"])
        self._stats = None if saved["stats"] is None else MixStats(*saved["stats"])
