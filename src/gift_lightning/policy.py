"""The policy: a causal language model whose head is fused with the loss, in one forward call."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from gift_lightning.collate import Batch, collate, reads
from gift_lightning.functional import IGNORED
from gift_lightning.head import Head, ProjectedRows, ReferenceRows, head_loss
from gift_lightning.logprobs import token_logp
from gift_lightning.loss import Evaluation
from gift_lightning.models import base_model
from gift_lightning.modes import scoring
from gift_lightning.order import MicroBatch
from gift_lightning.skeleton import Skeleton
from gift_lightning.target import Target


def supervised(batch: Batch) -> Bool[Tensor, "r _"]:
    """Where the token after a position is supervised: the one place that shifts labels."""
    return batch["labels"][:, 1:] != IGNORED


def supervised_labels(batch: Batch) -> Int[Tensor, " n"]:
    return batch["labels"][:, 1:][supervised(batch)]


def supervised_sequences(batch: Batch) -> Int[Tensor, " n"]:
    """The sequence of each supervised token."""
    return batch["sequence_ids"][:, 1:][supervised(batch)]


class Policy(nn.Module):
    """A causal language model as backbone and fused head.

    Where the weights are sharded, they are there inside of `forward`, `token_logp` and `projected`
    alone, which all ranks call equally often.

    Attributes:
        skeleton: what is left on every device where the weights are sharded.
        gathered: in which they are there all at once, if they cannot be gathered one by one.

    Args:
        model: a transformers model, with or without peft adapters.

    Raises:
        ValueError: if the head carries adapters, which a fused head would bypass, or is quantised.
    """

    skeleton: Skeleton | None = None
    gathered: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        head = self.base.get_output_embeddings()
        if not isinstance(head, nn.Linear | nn.Embedding) or hasattr(head, "base_layer"):
            raise ValueError(
                "the language-model head carries adapters or is no linear layer, which the fused "
                "head would bypass: leave lm_head out of lora.target_modules and modules_to_save."
            )
        if not head.weight.is_floating_point():
            raise ValueError(
                "the language-model head is quantised, which the fused head cannot read: give a "
                "model.pretrained whose lm_head is not, or model.load_in_4bit with the original."
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
            input_ids=batch["input_ids"],
            attention_mask=self._mask(batch),
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        return states[:, :-1][supervised(batch)]

    def _mask(self, batch: Batch) -> Float[Tensor, "r 1 t t"] | None:
        """What is added to attention's scores where samples share a prompt."""
        read, kind = reads(batch), self.head.weight.device.type
        if read is None:
            return None
        # As the queries are: each layer would convert truth values, and keep them for its gradient.
        dtype = self.base.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        hidden = torch.zeros(read.shape, dtype=dtype, device=read.device)
        return hidden.masked_fill_(~read, -torch.inf)[:, None]

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

    def token_logp(
        self, batch: Batch, temperature: float = 1.0, chunk_size: int | None = None
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Log-probability of each supervised token, and the entropy there; differentiable."""
        return token_logp(
            self.hidden(batch),
            self.head,
            supervised_labels(batch),
            temperature=temperature,
            chunk_size=chunk_size,
        )

    def projected(self, batch: Batch) -> ProjectedRows:
        """The policy as a reference: its distribution at the supervised tokens, on demand."""
        return ProjectedRows(self.hidden(batch), self.head.detached())

    @torch.no_grad()
    def whole(self, device: torch.device | None = None, keep: bool = True) -> "Policy":
        """The policy with all its weights: itself or, where they are sharded, a frozen copy of its
        own, which all ranks gather together and which lasts as long as it is kept.

        Args:
            device: of the copy; by default the policy's.
            keep: whether this rank wants the copy's weights.
        """
        if self.skeleton is None:
            return self
        if isinstance(self, FSDPModule):
            self.reshard()
        place = device or self.head.weight.device
        with self.gathered():
            return Policy(cast(PreTrainedModel, self.skeleton.filled(self.model, place, keep)))

    @torch.no_grad()
    def verify(self, packing: bool, share_prompts: bool = False) -> None:
        """Checks on two short documents that the fused head computes what the model computes.

        Raises:
            ValueError: if head, packing or shared prompts differ from the model's own logits.
        """
        device = self.head.weight.device
        documents = torch.arange(14, device=device).remainder(len(self.head.weight)).view(2, 7)
        beside_another = torch.stack([documents[0].flip(0), documents[1]])
        positions = torch.arange(7, device=device).expand(2, 7)

        def logits(ids: Tensor, shape: tuple[int, int]) -> Tensor:
            states = self.base.base_model(
                input_ids=ids.view(shape), position_ids=positions.reshape(shape), use_cache=False
            ).last_hidden_state
            return self.head.project(states.reshape(14, -1)).view(2, 7, -1)

        with scoring(self.model):
            expected = self.model(
                input_ids=documents, position_ids=positions, use_cache=False
            ).logits
            found = logits(documents, (2, 7))
            packed, changed = logits(documents, (1, 14)), logits(beside_another, (1, 14))
        # A half-precision model may widen its logits at the very end.
        half = {expected.dtype, self.head.weight.dtype} & {torch.float16, torch.bfloat16}
        exact = not half and torch.get_float32_matmul_precision() == "highest"

        def differ(a: Tensor, b: Tensor, rounding: float) -> float:
            """The difference relative to the largest logit, if it is more than rounding."""
            error = float((a - b).abs().max() / expected.abs().max().clamp_min(1e-6))
            return 0.0 if error <= (1e-4 if exact else rounding) else error

        name = type(self.base).__name__
        if error := differ(found, expected, 0.02):
            raise ValueError(
                f"{name} computes its logits in a way that the fused head does not know: they "
                f"differ by {error:.2g} relative to the largest."
            )
        # Half precision rounds differently in rows of another length, but what one document does to
        # the next shows at once: a row of the same length must not change at all.
        error = differ(packed[1], changed[1], 0.01) or differ(packed, found, 0.3)
        if packing and error:
            raise ValueError(
                f"{name} does not keep packed documents apart: its logits change by {error:.2g} "
                "relative to the largest; set data.packing: false."
            )
        if share_prompts:
            self._check_attention()
            prompt, ends = documents[0, :4].cpu(), documents[1].cpu()
            three = [torch.cat([prompt, x]) for x in (ends[:3], ends[2:6], ends[4:])]
            other = [torch.cat([prompt, ends[4:]]), *three[1:]]

            def supervised_logits(samples: list[Tensor], prompts: list[int] | None) -> Tensor:
                labels = [x.index_fill(0, torch.arange(4), IGNORED) for x in samples]
                whole = MicroBatch((0, 1, 2), 10, 3)
                pairs = list(zip(samples, labels, strict=True))
                batch = collate(pairs, whole, 0, prompts is not None, prompts)
                states = self.hidden(move_data_to_device(batch, device))
                return self.head.project(states)

            with scoring(self.model):
                alone = supervised_logits(three, None)
                together = supervised_logits(three, [4] * 3)
                changed = supervised_logits(other, [4] * 3)
            error = differ(together[3:], changed[3:], 0.01) or differ(together, alone, 0.3)
            if error:
                raise ValueError(
                    f"{name} does not keep completions apart that share a prompt: its logits "
                    f"change by {error:.2g} relative to the largest; set data.share_prompts: false."
                )

    def _check_attention(self) -> None:
        """Only scaled dot-product attention over all tokens takes the mask of shared prompts."""
        config = self.base.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        kinds |= {x for x in ("sliding_window", "alibi") if getattr(config, x, None)}
        how = config._attn_implementation
        if how != "sdpa" or kinds != {"full_attention"}:
            raise ValueError(
                f"data.share_prompts needs full attention by sdpa in every layer, and "
                f"{type(self.base).__name__} has {', '.join(sorted(kinds))} by {how}: set "
                "data.share_prompts: false."
            )
