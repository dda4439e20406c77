"""What every stage of post-training shares: policy, optimizer, step guard and checkpoint."""

import copy
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from gift_lightning.collate import Batch
from gift_lightning.diagnostics import peak_memory_gib
from gift_lightning.fsdp1 import FSDP1
from gift_lightning.functional import IGNORED
from gift_lightning.guard import StepGuard, clip_gradients, gradient_norm
from gift_lightning.masks import special_ids
from gift_lightning.models import base_model, for_export, load_tokenizer
from gift_lightning.modes import has_adapters
from gift_lightning.policy import Policy
from gift_lightning.position import PositionedData
from gift_lightning.quantization import is_quantized
from gift_lightning.references import Probe, Reference
from gift_lightning.replicas import Replicas
from gift_lightning.schedule import Schedule
from gift_lightning.seeds import keyed_seed
from gift_lightning.sharding import FSDP2, check_names


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
        self._loss_since_log, self._steps_since_log = 0.0, 0
        self._tokens_since_log = 0
        self._logged: set[str] = set()
        self._paused = 0.0
        self._last_log = time.perf_counter()

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.model

    @property
    def about(self) -> str:
        """What is trained, in a few words."""
        return type(self).__name__

    @property
    def vocab_size(self) -> int:
        """Rows of the head; token ids must be below."""
        return len(self.policy.head.weight)

    def setup(self, stage: str) -> None:
        """Refuses a model or a reference that would give wrong numbers, before any checkpoint."""
        if stage == "fit" and is_quantized(self.model) and not has_adapters(self.model):
            raise ValueError(
                "a quantised model cannot be trained as a whole: set model.model.lora, or leave "
                "load_in_4bit out."
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP1):
            strategy.check(self.policy, self.references)
        elif isinstance(strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy: Lightning's FSDPStrategy would clip by the norm of a device's "
                "own shards: use `--trainer.strategy fsdp2`, or fsdp1."
            )
        data = getattr(self.trainer, "datamodule", None)
        layout = (getattr(data, "packing", False), getattr(data, "share_prompts", False))
        self.policy.whole().verify(*layout)
        if self.reference is not None:
            self.reference.setup(self.policy)
            self.reference.verify(*layout)
            if data is not None and hasattr(data, "sets"):
                self.reference.check_data(self.tokenizer, data.sets)

    def configure_model(self) -> None:
        """Shards the policy and what it is compared with, where the strategy does that."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2):
            strategy.shard(self.policy)
            for reference in self.references:
                reference.distribute(strategy.shard)
        elif isinstance(strategy, FSDP1):
            strategy.shard(self.policy)

    @property
    def references(self) -> list[Reference]:
        """All that the policy is compared with."""
        return [] if self.reference is None else [self.reference]

    @property
    def replicas(self) -> Replicas:
        """Who shares an optimizer step."""
        return Replicas.of(self.trainer)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        self.trainer.fit_loop.setup_data()  # the number of batches, which the steps derive from
        scheduler = self.schedule.build(optimizer, self.trainer.estimated_stepping_batches)
        used, accumulate = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        loaders: Any = self.trainer.train_dataloader
        streams = loaders.values() if isinstance(loaders, dict) else [loaders]
        whole = used >= min(map(len, streams))
        if used % accumulate and not whole and not self._is_dry_run:
            raise ValueError(
                f"trainer.limit_train_batches cuts an optimizer step: {used} micro-batches are no "
                f"multiple of trainer.accumulate_grad_batches={accumulate}."
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # One optimizer step: any split into micro-batches and replicas gives the same gradient.

    def share_of_step(self, total: Tensor) -> Tensor:
        """Undoes what the Trainer and the replicas' averaging will divide by.

        Args:
            total: [] a sum over this micro-batch, already divided by a count of the whole step.
        """
        return total * self.trainer.accumulate_grad_batches * self.replicas.number

    @property
    def is_logged_step(self) -> bool:
        """Whether the Trainer will log after the current optimizer step."""
        return (self.global_step + 1) % self._log_every == 0

    @property
    def _is_dry_run(self) -> bool:
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    @property
    def _log_every(self) -> int:
        return self.trainer.log_every_n_steps  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        # transformers loads models in eval mode and Lightning keeps it: no dropout, no
        # checkpointing. Mind that a Trainer puts a module into eval mode for validation only.
        self.policy.train()
        # What `on_train_batch_end` left there at the end of an earlier `fit` of this trainer.
        vars(self.trainer.fit_loop.epoch_loop).pop("_should_check_val_fx", None)
        self._last_log = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # A stream of random numbers of its own for each micro-batch: nothing needs saving.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        key = (self.global_step, self._step.num_micro_batches, self.replicas.index)
        torch.manual_seed(keyed_seed(seed, "dropout", *key))
        if self._probe is None and self.reference is not None and self._any_supervised(batch):
            self._probe = Probe(self.reference, self.policy, batch)

    def _any_supervised(self, batch: Batch) -> bool:
        """Whether any rank has something to learn from its micro-batch."""
        mine = (batch["labels"] != IGNORED).any().float()
        return bool(self.trainer.strategy.reduce(mine, reduce_op="sum"))

    def note_micro_batch(
        self, batch: Batch, loss: Tensor, num_tokens: int | None = None, stream: str = ""
    ) -> None:
        """Tells the guard and the throughput count about a micro-batch.

        Args:
            batch: the micro-batch.
            loss: its share of the step's.
            num_tokens: counted as processed on all ranks; by default those of the batch, times the
                replicas.
            stream: which stream it comes from, if a stage has several.
        """
        step = self._step
        step.num_micro_batches += 1
        step.loss = step.loss + loss.detach()
        step.dealt[stream] = batch["step_tokens"]
        step.num_seen += int((batch["labels"] != IGNORED).sum())
        step.sample_ids += batch["sample_ids"].tolist()
        if num_tokens is None:
            num_tokens = int((batch["sequence_ids"] >= 0).sum()) * self.replicas.number
        self._tokens_since_log += num_tokens
        self._num_tokens += num_tokens

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        step = self._step
        norm = gradient_norm(self.parameters())
        if isinstance(self.trainer.strategy, FSDP1):
            norm = self.trainer.strategy.whole_norm(norm)
        counted = torch.stack([step.loss.double(), step.loss.new_tensor(step.num_seen).double()])
        loss, seen = torch.as_tensor(self.trainer.strategy.reduce(counted, reduce_op="sum"))
        num_targets = sum(step.dealt.values())
        if int(seen) != num_targets and not self._is_dry_run:
            raise ValueError(
                f"this optimizer step holds {int(seen)} supervised tokens but was dealt "
                f"{num_targets}: trainer.accumulate_grad_batches must not change in a run."
            )
        # With 16-mixed a gradient scaler finds its scale by overflowing: some steps are lost.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        reason = self.guard.decide(loss, norm, num_targets, patience=4 if scaled else 1)
        if reason is not None:
            ids = ", ".join(map(str, step.sample_ids[:8]))
            more = len(step.sample_ids) - 8
            which = f" (samples {ids}{f' and {more} more' if more > 0 else ''})" if ids else ""
            rank_zero_warn(f"optimizer step {self.global_step} skipped: {reason}{which}")
            for parameter in self.parameters():
                parameter.grad = None  # the optimizer then leaves weights, decay and moments alone
        else:
            self._loss_since_log += float(loss)
            self._steps_since_log += 1
        step.norm, step.skipped = norm, reason is not None
        step.learning_rate = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm that the step guard has seen, of all shards."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif not self._step.skipped:
            norm = self._step.norm
            assert norm is not None
            clip_gradients(self.parameters(), gradient_clip_val, norm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self._step.skipped:
            super().lr_scheduler_step(scheduler, metric)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if training_ends(self.trainer):
            # A report and a checkpoint need the numbers of the end, where no schedule needs to
            # fall. The epoch loop asks this once more and then validates as it always does, before
            # monitoring checkpoints and exports; the schedule itself stays the user's.
            loop, wanted = self.trainer.fit_loop.epoch_loop, self.trainer.enable_validation
            loop._should_check_val_fx = lambda data_fetcher: wanted  # type: ignore[method-assign]
        if self._step.norm is None:  # in the middle of an optimizer step
            return
        # The Trainer would free them behind the next forward pass, and raise its peak.
        for parameter in self.parameters():
            parameter.grad = None
        if self.global_step % self._log_every == 0:
            metrics = {f"train/{k}": float(v) for k, v in self.step_metrics().items()}
            # Lightning writes the last value again for a name that this step has none for.
            self._logged |= metrics.keys()
            self.log_dict({**dict.fromkeys(self._logged, math.nan), **metrics})
            self._loss_since_log, self._steps_since_log = 0.0, 0
            self._tokens_since_log, self._last_log = 0, time.perf_counter()
        self._step = _Step()

    def step_metrics(self) -> dict[str, Any]:
        """What is logged after an optimizer step; a stage adds its own."""
        step = self._step
        assert step.norm is not None
        seconds = max(time.perf_counter() - self._last_log, 1e-9)
        return {
            "loss": self._loss_since_log / max(self._steps_since_log, 1),
            "grad_norm": step.norm,
            "learning_rate": step.learning_rate,
            "num_tokens": self._num_tokens,
            "tokens_per_second": self._tokens_since_log / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
            "skipped_steps": sum(self.guard.skipped.values()),
        }

    def on_validation_start(self) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self) -> None:
        self._last_log += time.perf_counter() - self._paused  # validation is not training time
        self.check_reference()

    # `gift test` is validation, of the data module's `test_dataloader`.

    def test_step(self, *args: Any) -> Any:
        return self.validation_step(*args)

    def on_test_start(self) -> None:
        self.on_validation_start()

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def on_test_end(self) -> None:
        self.on_validation_end()

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
        # What belongs to a quantised weight has names below it.
        return {n: x for n, x in state.items() if not {n, _weight_of(n)} & frozen}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Raises ValueError if the checkpoint does not hold exactly what this module trains."""
        check_names(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["step_guard"] = self.guard.state_dict()
        checkpoint["num_tokens"] = self._num_tokens
        checkpoint["end_ids"] = self.end_ids  # for an export without the data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, PositionedData):
            data.resplit(checkpoint)
        self.guard.load_state_dict(checkpoint["step_guard"])
        self._num_tokens = checkpoint["num_tokens"]

    def export(
        self,
        folder: str,
        model: PreTrainedModel | None = None,
        ends: list[int] | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        """Writes a Hugging Face folder: safetensors, tokenizer, generation config.

        Adapters are written as such where their base can be loaded again, merged where it cannot
        (a GGUF file, random weights). Generation ends at the model's own end tokens and at those
        that were trained.

        Args:
            folder: where to.
            model: the policy in another form.
            ends: what ends a completion, if the training data are not at hand.
            max_shard_size: of one file of weights.
        """
        self.tokenizer.save_pretrained(folder)
        model, ends = model or for_export(self.model), ends or self.end_ids
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        generation = copy.deepcopy(base_model(self.model).generation_config)
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
        generation.pad_token_id = self.tokenizer.pad_token_id
        generation.save_pretrained(folder)

    @property
    def end_ids(self) -> list[int]:
        """What ends a completion: the model's own end tokens, the tokenizer's, and those that end
        the training samples, such as the end of a chat turn."""
        own = base_model(self.model).generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or [])
        ends.append(self.tokenizer.eos_token_id)
        data = getattr(self._trainer, "datamodule", None)
        if data is not None and hasattr(data, "train_examples"):
            special = special_ids(self.tokenizer)
            ends += [i for i in data.train_examples.last_learned() if i in special]
        return list(dict.fromkeys(i for i in ends if i is not None))


def training_ends(trainer: pl.Trainer) -> bool:
    """Whether training ends with the current batch, by any of the Trainer's limits."""
    loop = trainer.fit_loop
    if (trainer.should_stop and loop._can_stop_early) or trainer.global_step == trainer.max_steps:
        return True
    num_epochs = loop.epoch_progress.current.processed + 1  # type: ignore[attr-defined]
    return trainer.is_last_batch and num_epochs == trainer.max_epochs


def _weight_of(name: str) -> str:
    """The weight that an entry such as `layer.weight.absmax` of a state dict belongs to."""
    layer, found, _ = name.rpartition(".weight.")
    return f"{layer}.weight" if found else name


class _Step:
    """What is known of the optimizer step that is being accumulated."""

    def __init__(self) -> None:
        self.num_micro_batches = 0
        self.loss: Tensor = torch.zeros(())
        self.dealt: dict[str, int] = {}
        """Supervised tokens of the step, by stream."""
        self.num_seen = 0
        self.sample_ids: list[int] = []
        self.norm: Tensor | None = None
        self.learning_rate = 0.0
        self.skipped = False
