"""What every stage of post-training shares: policy, optimizer, step guard and checkpoint."""

import os
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from gift_lightning.collate import Batch
from gift_lightning.diagnostics import peak_memory_gib
from gift_lightning.guard import StepGuard, gradient_norm
from gift_lightning.models import base_model, load_tokenizer
from gift_lightning.order import keyed_seed
from gift_lightning.policy import Policy
from gift_lightning.references import Probe, Reference
from gift_lightning.schedule import Schedule


class PolicyModule(pl.LightningModule):
    """A policy under automatic optimization, exact across any split of an optimizer step.

    A stage writes `training_step`, which returns the step's loss summed over the micro-batch and
    divided by a count of the whole step, through `share_of_step`.

    Args:
        model: the policy.
        reference: the frozen distribution that the objective reads or the diagnostics compare with.
        optimizer: over the trainable parameters.
        schedule: of the learning rate.
        tokenizer: folder or hub id, if it is not the model's own.
        max_skipped_steps: non-finite steps in a row that stop the run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: Reference | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=2e-5),
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        tokenizer: str | None = None,
        max_skipped_steps: int = 5,
    ) -> None:
        super().__init__()
        self.policy = Policy(model)
        self.reference = reference
        self.optimizer = optimizer
        self.schedule = schedule
        self.guard = StepGuard(max_skipped_steps)
        trainable = [p.requires_grad for p in self.parameters()]
        self.strict_loading = all(trainable)
        base = base_model(model)
        if tokenizer is None:
            self.tokenizer = load_tokenizer(
                str(base.name_or_path), getattr(base, "gguf_file", None)
            )
        else:
            self.tokenizer = load_tokenizer(tokenizer)
        self._probe: Probe | None = None
        self._step = _Step()
        self._num_tokens = 0
        self._tokens_since_log = 0
        self._last_log = time.perf_counter()

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.model

    @property
    def vocab_size(self) -> int:
        """Rows of the head; token ids must be below."""
        return len(self.policy.head.weight)

    def setup(self, stage: str) -> None:
        """Refuses a model or a reference that would give wrong numbers, before any checkpoint."""
        data = getattr(self.trainer, "datamodule", None)
        self.policy.verify(packing=getattr(data, "packing", False))
        if self.reference is not None:
            self.reference.setup(self.policy)
            if data is not None and hasattr(data, "sets"):
                self.reference.check_data(self.tokenizer, data.sets)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        scheduler = self.schedule.build(optimizer, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # One optimizer step: any split into micro-batches and ranks gives the same gradient.

    def share_of_step(self, total: Tensor) -> Tensor:
        """Undoes what the Trainer and the ranks' averaging will divide by.

        Args:
            total: [] a sum over this micro-batch, already divided by a count of the whole step.
        """
        return total * self.trainer.accumulate_grad_batches * self.trainer.world_size

    @property
    def is_logged_step(self) -> bool:
        """Whether the Trainer will log after the current optimizer step."""
        return (self.global_step + 1) % self._log_every == 0

    @property
    def _log_every(self) -> int:
        return self.trainer.log_every_n_steps  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        # transformers loads models in eval mode and Lightning keeps it: no dropout, no
        # checkpointing. Mind that a Trainer puts a module into eval mode for validation only.
        self.policy.train()
        self._last_log = time.perf_counter()
        used, accumulate = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if used % accumulate and used < len(self.trainer.train_dataloader):  # type: ignore[arg-type]
            raise ValueError(
                f"trainer.limit_train_batches cuts an optimizer step: {used} micro-batches are no "
                f"multiple of trainer.accumulate_grad_batches={accumulate}."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # A stream of random numbers of its own for each micro-batch: nothing needs saving.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        key = (self.global_step, self._step.num_micro_batches, self.global_rank)
        torch.manual_seed(keyed_seed(seed, "dropout", *key))
        if self._probe is None and self.reference is not None:
            self._probe = Probe(self.reference, self.policy, batch)

    def note_micro_batch(self, batch: Batch, loss: Tensor) -> None:
        """Tells the guard and the throughput count about a micro-batch; `loss` is its share."""
        step = self._step
        step.num_micro_batches += 1
        step.loss = step.loss + loss.detach()
        step.num_targets = batch["step_tokens"]
        step.sample_ids += batch["sample_ids"].tolist()
        num_tokens = int((batch["sequence_ids"] >= 0).sum()) * self.trainer.world_size
        self._tokens_since_log += num_tokens
        self._num_tokens += num_tokens

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        step = self._step
        norm = gradient_norm(self.parameters())
        loss = self.trainer.strategy.reduce(step.loss, reduce_op="sum")
        # With 16-mixed a gradient scaler looks for its own overflows and skips those steps.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        checked = torch.zeros(()) if scaled else norm
        reason = self.guard.decide(torch.as_tensor(loss), checked, step.num_targets)
        if reason is not None:
            ids = ", ".join(map(str, step.sample_ids[:8]))
            more = len(step.sample_ids) - 8
            rank_zero_warn(
                f"optimizer step {self.global_step} skipped: {reason} "
                f"(samples {ids}{f' and {more} more' if more > 0 else ''})"
            )
            for parameter in self.parameters():
                parameter.grad = None  # the optimizer then leaves weights, decay and moments alone
        step.norm, step.skipped = norm, reason is not None
        step.learning_rate = optimizer.param_groups[0]["lr"]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self._step.skipped:
            super().lr_scheduler_step(scheduler, metric)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self._step.norm is None:  # in the middle of an optimizer step
            return
        if self.global_step % self._log_every == 0:
            self.log_dict({f"train/{k}": float(v) for k, v in self.step_metrics().items()})
            self._tokens_since_log, self._last_log = 0, time.perf_counter()
        self._step = _Step()
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True  # the last step is validated, wherever it falls

    def step_metrics(self) -> dict[str, Any]:
        """What is logged after an optimizer step; a stage adds its own."""
        step = self._step
        assert step.norm is not None
        seconds = max(time.perf_counter() - self._last_log, 1e-9)
        return {
            "grad_norm": step.norm,
            "learning_rate": step.learning_rate,
            "num_tokens": self._num_tokens,
            "tokens_per_second": self._tokens_since_log / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
            "skipped_steps": sum(self.guard.skipped.values()),
        }

    def on_validation_end(self) -> None:
        self.check_reference()

    def on_train_end(self) -> None:
        self.check_reference()

    def check_reference(self) -> None:
        """Raises RuntimeError if the reference is no longer what it was at the start."""
        if self._probe is not None:
            self._probe.check(self.policy)

    # Checkpoints hold what is trained: no frozen base, no reference, no hyper-parameters.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)
        if self.strict_loading:
            return state
        # A tied head has two names, of which the default list gives one.
        named = self.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in named if not p.requires_grad}
        return {name: value for name, value in state.items() if name not in frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["step_guard"] = self.guard.state_dict()
        checkpoint["num_tokens"] = self._num_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.load_state_dict(checkpoint["step_guard"])
        self._num_tokens = checkpoint["num_tokens"]

    def export(self, folder: str) -> None:
        """Writes a Hugging Face folder: safetensors, tokenizer, generation config."""
        self.tokenizer.save_pretrained(folder)
        self.model.save_pretrained(folder)
        base_model(self.model).generation_config.save_pretrained(folder)


class _Step:
    """What is known of the optimizer step that is being accumulated."""

    def __init__(self) -> None:
        self.num_micro_batches = 0
        self.loss: Tensor = torch.zeros(())
        self.num_targets = 0
        self.sample_ids: list[int] = []
        self.norm: Tensor | None = None
        self.learning_rate = 0.0
        self.skipped = False
