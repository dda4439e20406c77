"""The frozen distribution a target is tilted from, anchored to or taught by."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from gift_lightning.collate import Batch
from gift_lightning.distribution import Distribution
from gift_lightning.head import ProjectedRows, ReferenceRows
from gift_lightning.models import DType, causal_lm, load_tokenizer, require_intact_base
from gift_lightning.modes import adapter_off, has_adapters, scoring
from gift_lightning.policy import Policy, supervised_labels
from gift_lightning.quantization import is_quantized
from gift_lightning.skeleton import full, sharded_like


@runtime_checkable
class Samples(Protocol):
    """Tokenised samples, `examples.Examples` or a list: `input_ids` and `labels` [t] of each."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Tensor, Tensor]: ...


class Reference(ABC):
    """A frozen model, seen through the supervised tokens of a micro-batch.

    It is no submodule of the module that uses it: it is in no checkpoint and no optimizer, and is
    made again at every start, before any checkpoint is loaded.
    """

    @abstractmethod
    def setup(self, policy: Policy) -> None:
        """Called once, with the policy as it was loaded.

        Raises:
            ValueError: if this reference cannot serve that policy.
        """

    def distribute(self, shard: Callable[[Policy], None]) -> None:  # noqa: B027
        """Called after `setup` where the policy is sharded: shards a model of its own likewise."""

    def verify(  # noqa: B027 (most have no model of their own)
        self, packing: bool, share_prompts: bool = False
    ) -> None:
        """Called after `setup`: checks a model that the policy does not stand for.

        Raises:
            ValueError: as `Policy.verify`.
        """

    def check_data(  # noqa: B027 (most references read no data)
        self, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Samples]
    ) -> None:
        """Called after `setup` with the tokenised data, for references made for certain data.

        Args:
            tokenizer: the one that made the samples.
            sets: samples by the name of their set.

        Raises:
            ValueError: if this reference cannot serve them.
        """

    @abstractmethod
    def rows(self, policy: Policy, batch: Batch) -> ReferenceRows:
        """The reference's distribution at the supervised tokens of the batch, without gradient."""

    def label_logp(
        self, policy: Policy, batch: Batch, temperature: float = 1.0
    ) -> Float[Tensor, " n"]:
        """Its log-probabilities of the labels, its logits divided by the temperature."""
        rows = self.rows(policy, batch)
        if rows.logp_y is not None and temperature == 1.0:
            return rows.logp_y
        labels = supervised_labels(batch)
        parts = [
            Distribution(rows.logits(slice(i, i + 256)) / temperature, labels[i : i + 256]).logp_y
            for i in range(0, len(labels), 256)
        ]
        return torch.cat(parts) if parts else labels.new_zeros(0, dtype=torch.float32)


class FrozenCopy(Reference):
    """A second model that is never trained: the policy as it was loaded, or a teacher.

    Args:
        pretrained: a teacher's folder or hub id with the student's vocabulary; by default a copy of
            the policy before training.
        dtype: of its weights; by default a copy keeps the policy's, a teacher is loaded in
            bfloat16 on an accelerator and float32 elsewhere.
        device: "policy" follows the policy's device, and is sharded where the policy is; "cpu"
            stays on the CPU to save device memory, whole in every process.
        gguf_file: as in `models.causal_lm`.
        revision: of a hub id.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        dtype: DType | None = None,
        device: Literal["policy", "cpu"] = "policy",
        gguf_file: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.pretrained = pretrained
        self.dtype = dtype
        self.device = device
        self.gguf_file = gguf_file
        self.revision = revision
        self.policy: Policy | None = None

    def setup(self, policy: Policy) -> None:
        if self.policy is not None:
            return
        if self.pretrained is None:
            if is_quantized(policy.base) and self.dtype not in (None, "auto"):
                raise ValueError(
                    f"reference.dtype={self.dtype} is no dtype of 4-bit weights: leave it out."
                )
            model = copy.deepcopy(policy.model)
            if self.dtype not in (None, "auto"):
                model = model.to(getattr(torch, str(self.dtype)))
        else:
            default: DType = "bfloat16" if torch.cuda.is_available() else "float32"
            model = causal_lm(
                self.pretrained, self.dtype or default, self.gguf_file, revision=self.revision
            )
        self.policy = Policy(model.eval().requires_grad_(False))
        mine, theirs = len(self.policy.head.weight), len(policy.head.weight)
        if mine != theirs:
            raise ValueError(
                f"reference.pretrained={self.pretrained!r} has a vocabulary of {mine} entries, the "
                f"policy of {theirs}: a reference must share the policy's vocabulary."
            )

    def verify(self, packing: bool, share_prompts: bool = False) -> None:
        if self.pretrained is not None and self.policy is not None:
            self.policy.whole().verify(packing, share_prompts)

    def distribute(self, shard: Callable[[Policy], None]) -> None:
        if self.device == "policy" and self.policy is not None:
            shard(self.policy)

    def check_data(self, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Samples]) -> None:
        """Refuses a teacher whose tokenizer gives the same words other ids."""
        if self.pretrained is None:
            return
        mine = tokenizer.get_vocab()
        theirs = load_tokenizer(self.pretrained, self.gguf_file).get_vocab()
        both = mine.keys() & theirs.keys()
        if len(both) < 0.9 * len(mine) or any(mine[word] != theirs[word] for word in both):
            raise ValueError(
                f"reference.pretrained={self.pretrained!r} has another tokenizer than the policy: "
                "a teacher must give every token the same id."
            )

    @torch.no_grad()
    def rows(self, policy: Policy, batch: Batch) -> ReferenceRows:
        assert self.policy is not None, "setup comes first"
        here = batch["input_ids"].device
        place = here if self.device == "policy" else torch.device("cpu")
        if self.policy.head.weight.device != place:
            self.policy.to(place)
        if place == here:
            return self.policy.projected(batch)
        moved = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in batch.items()}
        rows = self.policy.projected(moved)  # type: ignore[arg-type]
        return _MovedRows(rows, here)


class _MovedRows:
    """Rows computed on one device and needed on another, moved chunk by chunk."""

    def __init__(self, rows: ProjectedRows, device: torch.device) -> None:
        self.inner = rows
        self.device = device
        self.logp_y = None

    def logits(self, rows: slice, out: Tensor | None = None) -> Float[Tensor, "c v"]:
        moved = self.inner.logits(rows).to(self.device)
        return moved if out is None else out.copy_(moved)


class OldPolicy(FrozenCopy):
    """The policy as it was some optimizer steps ago, for targets with a ratio to it (PSFT).

    Args:
        every: optimizer steps between refreshes.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"old_policy_every must be 1 or more, got {every}.")
        self.every = every
        self.known = False

    def refresh(self, policy: Policy, step: int) -> None:
        """Takes over the policy's weights if `step` is due, or none were restored to start from."""
        if step % self.every == 0 or not self.known:
            self.load_state_dict(_trainable(policy))

    def state_dict(self, policy: Policy) -> dict[str, Tensor]:
        """The weights that differ from the base: what `policy` trains; all ranks gather them."""
        assert self.policy is not None, "setup comes first"
        names = _trainable(policy)
        return {n: full(p.detach()) for n, p in _weights(self.policy).items() if n in names}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert self.policy is not None, "setup comes first"
        own = _weights(self.policy)
        for name, value in state.items():
            own[name].copy_(sharded_like(own[name], value))
        self.known = True


def _weights(policy: Policy) -> dict[str, Tensor]:
    if isinstance(policy, FSDPModule):
        policy.reshard()  # a validation leaves the weights of its last unit gathered
    return dict(policy.named_parameters())


def _trainable(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in _weights(policy).items() if p.requires_grad}


class AdapterOff(Reference):
    """The base under the adapters that are being trained: no second copy of the model."""

    def setup(self, policy: Policy) -> None:
        if not has_adapters(policy.model):
            raise ValueError(
                "reference AdapterOff needs adapters to turn off: set model.model.lora, or use "
                "reference FrozenCopy."
            )
        require_intact_base(policy.model, "reference FrozenCopy")
        configs = policy.model.peft_config.items()
        biased = [name for name, c in configs if getattr(c, "bias", "") != "none"]
        if biased:
            raise ValueError(
                f"reference AdapterOff would drift: adapter {biased[0]!r} trains biases of the "
                "base; set lora bias to none, or use reference FrozenCopy."
            )

    @torch.no_grad()
    def rows(self, policy: Policy, batch: Batch) -> ReferenceRows:
        with scoring(policy.model), adapter_off(policy.model):
            return policy.projected(batch)


class Probe:
    """One batch whose reference log-probabilities must never change.

    Args:
        reference: the reference.
        policy: the policy it belongs to.
        batch: any batch of the run.
    """

    def __init__(self, reference: Reference, policy: Policy, batch: Batch) -> None:
        self.reference = reference
        self.batch = batch
        self.expected = reference.label_logp(policy, batch)

    def check(self, policy: Policy) -> None:
        """Raises RuntimeError if the reference has changed since the probe was made."""
        found = self.reference.label_logp(policy, self.batch)
        drift = float((found - self.expected).abs().max()) if len(found) else 0.0
        # An accelerator may choose another kernel for the same numbers; a drift that matters is
        # larger by far.
        if not drift <= (1e-3 if found.is_cuda else 0.0):
            raise RuntimeError(
                f"the reference changed during the run: log-probabilities of the probe batch moved "
                f"by up to {drift:.3g} nats; this is a defect, the run's targets are wrong."
            )
