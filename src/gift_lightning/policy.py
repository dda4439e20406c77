"""The policy: a causal language model whose head is fused with the loss, in one forward call."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from gift_lightning.collate import Batch
from gift_lightning.functional import IGNORED
from gift_lightning.head import Head, ReferenceRows, head_loss
from gift_lightning.models import base_model
from gift_lightning.modes import scoring
from gift_lightning.target import Evaluation, Target


def supervised(batch: Batch) -> Bool[Tensor, "r t-1"]:
    """Where the token after a position is supervised: the one place that shifts labels."""
    return batch["labels"][:, 1:] != IGNORED


def supervised_labels(batch: Batch) -> Int[Tensor, " n"]:
    return batch["labels"][:, 1:][supervised(batch)]


def supervised_sequences(batch: Batch) -> Int[Tensor, " n"]:
    """The sequence of each supervised token."""
    return batch["sequence_ids"][:, 1:][supervised(batch)]


class Policy(nn.Module):
    """A causal language model as backbone and fused head.

    Args:
        model: a transformers model, with or without peft adapters.

    Raises:
        ValueError: if the head carries adapters, which a fused head would bypass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        head = self.base.get_output_embeddings()
        if not isinstance(head, nn.Linear | nn.Embedding) or hasattr(head, "base_layer"):
            raise ValueError(
                "the language-model head carries adapters or is no linear layer, which the fused "
                "head would bypass: leave lm_head out of lora.target_modules."
            )

    @property
    def base(self) -> PreTrainedModel:
        return base_model(self.model)

    @property
    def head(self) -> Head:
        layer = self.base.get_output_embeddings()
        config = self.base.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        if getattr(config, "logits_scaling", None):  # Granite
            scale /= config.logits_scaling
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)

    def hidden(self, batch: Batch) -> Float[Tensor, "n d"]:
        """Final hidden states at the positions that predict a supervised token."""
        states = self.base.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        return states[:, :-1][supervised(batch)]

    def forward(
        self,
        batch: Batch,
        target: Target,
        *,
        reference: ReferenceRows | None = None,
        old_logp: Float[Tensor, " n"] | None = None,
        token_weight: Float[Tensor, " n"] | None = None,
        chunk_size: int | None = None,
        diagnose: bool = False,
    ) -> tuple[Float[Tensor, " n"], Evaluation]:
        """Per-token loss of the supervised tokens, in row-major order; see `head.head_loss`."""
        return head_loss(
            self.hidden(batch),
            self.head,
            supervised_labels(batch),
            target,
            reference=reference,
            old_logp=old_logp,
            sequence_ids=supervised_sequences(batch),
            token_weight=token_weight,
            chunk_size=chunk_size,
            diagnose=diagnose,
        )

    @torch.no_grad()
    def verify(self, packing: bool) -> None:
        """Checks on two short documents that the fused head computes what the model computes.

        Raises:
            ValueError: if head or packing differ from the model's own logits.
        """
        device = self.head.weight.device
        documents = torch.arange(14, device=device).remainder(self.head.weight.shape[0]).view(2, 7)
        positions = torch.arange(7, device=device).expand(2, 7)
        with scoring(self.model):
            expected = self.model(input_ids=documents, position_ids=positions, use_cache=False)
            packed = self.base.base_model(
                input_ids=documents.view(1, 14) if packing else documents,
                position_ids=positions.reshape(1, 14) if packing else positions,
                use_cache=False,
            ).last_hidden_state
            found = self.head.project(packed.reshape(14, -1)).view(2, 7, -1)
        # Half-precision models round their own logits; a wrong head is off by far more.
        error = (found - expected.logits).abs().max() / expected.logits.abs().max().clamp_min(1e-6)
        if not error < (1e-3 if expected.logits.dtype == torch.float32 else 0.05):
            hint = " (or set data.packing: false)" if packing else ""
            raise ValueError(
                f"{type(self.base).__name__} computes its logits in a way that the fused head does "
                f"not know: they differ by {float(error):.2g} relative to the largest{hint}."
            )
