"""Supervised fine-tuning towards any target distribution."""

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from gift_lightning.collate import Batch
from gift_lightning.hybrid_data import HybridData
from gift_lightning.imitation import Imitation, Reduction
from gift_lightning.prompts import PromptData
from gift_lightning.references import Reference
from gift_lightning.schedule import Schedule
from gift_lightning.target import Target
from gift_lightning.targets import GIFT, OneHot
from gift_lightning.targets import TargetSFT as TargetSFTTarget


class SFT(Imitation):
    """One module for every SFT objective: the target says which.

    Args:
        model: the policy, by a factory of `gift_lightning.models`.
        target: the target distribution; OneHot is standard SFT.
        reference: what the target is tilted from or taught by. If the target reads none, it is
            only compared with, in validation and on logged steps.
        optimizer: over the trainable parameters.
        schedule: of the learning rate.
        reduction: what an optimizer step averages over, across micro-batches and devices:
            all its supervised tokens (token); its sequences, each the mean or the sum of its
            tokens (sequence, sequence_sum: Algorithm 1 of the GIFT paper); or, as the official
            GIFT code does, a sum over micro-batches of each one's token mean (micro_batch).
        tokenizer: folder or hub id, if it is not the model's own.
        chunk_size: tokens whose logits exist at a time; by default about 2²⁵ logits, on a CPU 2²⁴.
        max_skipped_steps: non-finite steps in a row that stop the run.
        old_policy_every: optimizer steps between refreshes of the old policy, for targets with a
            ratio to it (PSFT's code takes 8 updates for each).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        target: Target = OneHot(),  # noqa: B008 (frozen)
        reference: Reference | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=2e-5),
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        reduction: Reduction = "token",
        tokenizer: str | None = None,
        chunk_size: int | None = None,
        max_skipped_steps: int = 5,
        old_policy_every: int = 8,
    ) -> None:
        super().__init__(model, reference, optimizer, schedule, tokenizer, max_skipped_steps)
        self.imitate(target, reduction, chunk_size, old_policy_every)

    @property
    def about(self) -> str:
        return f"{type(self).__name__} towards {self.target}"

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for kind, stage_of in ((PromptData, "GRPO"), (HybridData, "Hybrid")):
            if isinstance(data, kind):
                raise ValueError(
                    f"{type(self).__name__} trains on demonstrations, and data is "
                    f"{kind.__name__}: set `--data SFTData`, or train with `--model {stage_of}`."
                )
        super().setup(stage)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        share, _ = self.imitation_share(batch)
        self.note_micro_batch(batch, share)
        return self.share_of_step(share)

    def step_metrics(self) -> dict[str, Any]:
        return {**self.imitation_metrics(), **super().step_metrics()}


class StandardSFT(SFT):
    """Standard SFT: the target is one-hot."""

    def __init__(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(model, OneHot(), **kwargs)


class GIFTSFT(SFT):
    """GIFT: the Gibbs target at inverse temperature `beta` (arXiv 2601.09233).

    Args:
        model: the policy.
        beta: tilt towards the label in nats.
        smoothing: share of the uniform distribution mixed into the reference.
    """

    def __init__(
        self, model: PreTrainedModel, beta: float = 20.0, smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(model, GIFT(beta, smoothing), **kwargs)


class TargetSFT(SFT):
    """Target-SFT: the reference is the teacher (arXiv 2606.11189).

    Args:
        model: the policy.
        eta: the teacher's share in the residual.
        top_k: how many of the teacher's largest tokens to keep.
    """

    def __init__(
        self, model: PreTrainedModel, eta: float = 0.5, top_k: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, TargetSFTTarget(eta, top_k), **kwargs)
