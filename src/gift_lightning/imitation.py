"""What every stage shares that learns from demonstrations: a target, what it reads, how it did."""

import dataclasses
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from gift_lightning.collate import Batch
from gift_lightning.diagnostics import TokenMeans
from gift_lightning.loss import Evaluation
from gift_lightning.module import PolicyModule
from gift_lightning.policy import supervised_sequences
from gift_lightning.references import OldPolicy, Reference
from gift_lightning.target import Target

Reduction = Literal["token", "sequence", "sequence_sum", "micro_batch"]


class Imitation(PolicyModule):
    """A stage with demonstrations; its constructor calls `imitate` after the other one's.

    Attributes:
        target: the target distribution, with what was found from the data.
        old_policy: what some targets compare the policy with.
    """

    def imitate(
        self,
        target: Target,
        reduction: Reduction,
        chunk_size: int | None,
        old_policy_every: int,
    ) -> None:
        """Sets up the options of the same names of `SFT`.

        Raises:
            ValueError: one of them is impossible, or the target reads a reference and there is
                none.
        """
        target.check(reference=self.reference is not None, old_policy=True)
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction is one of {get_args(Reduction)}, got {reduction!r}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"model.chunk_size must be 1 or more, got {chunk_size}.")
        self.target = self._configured = target
        self.reduction: Reduction = reduction
        self.chunk_size = chunk_size
        self.old_policy = OldPolicy(old_policy_every) if target.needs_old_policy else None
        self._train_means = TokenMeans()
        self._val_means: list[TokenMeans] = []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.old_policy is not None:
            self.old_policy.setup(self.policy)

    @property
    def references(self) -> list[Reference]:
        return [*super().references, *([self.old_policy] if self.old_policy else [])]

    def on_fit_start(self) -> None:
        self._resolve_target()

    def _resolve_target(self) -> None:
        """Fills in what the target takes from the data; a checkpoint brings it along."""
        if self.target.is_resolved:
            return
        assert self.reference is not None, "guarded by Target.check"
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "one_pass"):
            raise ValueError(
                f"target {type(self.target).__name__} has an option that is found from the data, "
                "which no datamodule with one_pass() gives: train on an SFTData, or set the option "
                "by target.resolve(reference_logp_y, num_classes)."
            )
        batches, parts = data.one_pass(), []
        for batch in track(batches, "Reference surprise of the training data", transient=True):
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            parts.append(self.reference.label_logp(self.policy, batch))
        shares = self.replicas.gathered(torch.cat(parts).cpu())
        surprise = torch.cat(shares).to(self.device)
        self.target = self.target.resolve(surprise, self.vocab_size)
        self.print(f"Found before training: {self.target}")
        for logger in self.loggers:
            found = {f"target/{k}": v for k, v in _fields(self.target).items() if v is not None}
            logger.log_metrics(found, 0)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.old_policy is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.old_policy.refresh(self.policy, self.global_step)

    def losses(
        self, batch: Batch, diagnose: bool, weights: Float[Tensor, " s"] | None = None
    ) -> tuple[Float[Tensor, " n"], Evaluation]:
        """Per-token losses of a micro-batch, weighted for the reduction and by sequence."""
        reference = self.reference
        wanted = reference is not None and (diagnose or self.target.needs_reference)
        weight = None
        if self.reduction == "sequence":
            sequences = supervised_sequences(batch)
            weight = 1.0 / sequences.bincount()[sequences]
        if weights is not None:
            own = weights[supervised_sequences(batch)]
            weight = own if weight is None else weight * own
        return self.policy(
            batch,
            self.target,
            reference=reference.rows(self.policy, batch) if reference and wanted else None,
            old_logp=self.old_policy.label_logp(self.policy, batch) if self.old_policy else None,
            token_weight=weight,
            chunk_size=self.chunk_size,
            diagnose=diagnose,
        )

    def imitation_share(
        self, batch: Batch, weights: Float[Tensor, " s"] | None = None
    ) -> tuple[Tensor, Evaluation]:
        """A micro-batch's part of the step's mean loss over demonstrations, and its tokens."""
        losses, stats = self.losses(batch, self.is_logged_step, weights)
        self._train_means.update(stats)
        if self.reduction == "micro_batch":  # undo the Trainer's division over micro-batches alone
            return losses.sum() / (len(losses) + 1e-8) / self.replicas.number, stats
        count = "step_tokens" if self.reduction == "token" else "step_sequences"
        return losses.sum() / max(batch[count], 1), stats  # type: ignore[literal-required]

    def imitation_metrics(self) -> dict[str, Tensor]:
        """Means over the demonstrations' tokens since this was last asked."""
        if not self._train_means.update_called:
            return {}
        means = self._train_means.compute()
        self._train_means.reset()
        return means

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._resolve_target()
        self._val_means = [TokenMeans().to(self.device) for _ in self._val_names()]

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        _, stats = self.losses(batch, diagnose=True)
        self._val_means[dataloader_idx].update(stats)

    def on_validation_epoch_end(self) -> None:
        for name, means in zip(self._val_names(), self._val_means, strict=True):
            prefix = "val" if name == "val" else f"val/{name}"
            self.log_dict({f"{prefix}/{k}": v for k, v in means.compute().items()})

    def _val_names(self) -> list[str]:
        data = getattr(self.trainer, "datamodule", None)
        return list(getattr(data, "val_names", ["val"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.old_policy is not None:
            checkpoint["old_policy"] = self.old_policy.state_dict(self.policy)
        if not self._configured.is_resolved:
            checkpoint["target"] = [_fields(self._configured), _fields(self.target)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.old_policy is not None and "old_policy" in checkpoint:
            self.old_policy.load_state_dict(checkpoint["old_policy"])
        configured, found = checkpoint.get("target", (None, None))
        if not self.target.is_resolved and configured == _fields(self.target):
            self.target = type(self.target)(**found)


def _fields(target: Target) -> dict[str, Any]:
    return dataclasses.asdict(target)  # type: ignore[call-overload]
