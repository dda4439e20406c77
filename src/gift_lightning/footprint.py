"""The memory that one device needs, by running a stage's own step on tensors without data."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gift_lightning.cache import CachedTopK, CachedRows
from gift_lightning.collate import Batch, collate
from gift_lightning.data import SFTData
from gift_lightning.dataless import AsAccelerator, Ledger
from gift_lightning.experience import Experience
from gift_lightning.functional import IGNORED
from gift_lightning.generation import generate
from gift_lightning.hybrid import Hybrid
from gift_lightning.hybrid_data import HybridData
from gift_lightning.imitation import Imitation
from gift_lightning.models import base_model, without_weights
from gift_lightning.module import PolicyModule
from gift_lightning.onpolicy import OnPolicy
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised_labels
from gift_lightning.problems import ConcatProblems, JSONLProblems, Problems
from gift_lightning.prompts import PromptData
from gift_lightning.references import FrozenCopy, Reference
from gift_lightning.rollouts import HFRollout

_NF4 = 4.127 / 8  # bytes of a weight in 4 bits, with its doubly quantised scales


@dataclass(frozen=True)
class Setting:
    """What of the trainer and of the device decides about memory.

    Attributes:
        accelerator: whether it is not the CPU.
        precision: as the trainer's.
        accumulate: micro-batches of an optimizer step.
        devices: of the whole run.
    """

    accelerator: bool = True
    precision: Any = "32-true"
    accumulate: int = 1
    devices: int = 1


@dataclass(frozen=True)
class Sizes:
    """The largest micro-batch of a run; empty or 0 for what it has not.

    Attributes:
        lengths: tokens of each demonstration.
        completions: of a micro-batch.
        prompt: tokens of the longest prompt.
        completion: tokens of the longest completion.
        decoded: completions that the policy itself samples side by side.
        group: completions of one prompt.
    """

    lengths: tuple[int, ...] = ()
    completions: int = 0
    prompt: int = 0
    completion: int = 0
    decoded: int = 0
    group: int = 1


class Footprint:
    """A run's module on tensors without data, and what its phases take.

    Args:
        build: makes the module, and the data module, which says how large a micro-batch can be and
            from which nothing is read.
        setting: the trainer's part.

    Raises:
        ValueError: the data do not say how long a sequence can be, or are of an unknown kind.
    """

    def __init__(
        self, build: Callable[[], tuple[PolicyModule, pl.LightningDataModule]], setting: Setting
    ) -> None:
        self.setting, self.ledger = setting, Ledger()
        with self._inside(), self.ledger.counting("parameters"):
            self.module, data = build()
        self.sizes = sizes(self.module, data, setting)
        self.packing = bool(getattr(data, "packing", False))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            # As wide, and there is no 16-mixed on a CPU, whose operations stand for any device's.
            precision="bf16-mixed" if setting.precision == "16-mixed" else setting.precision,
            accumulate_grad_batches=min(setting.accumulate, 2),  # a third is like the second
            log_every_n_steps=1,  # a logged step takes most
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.trainer, self.module.trainer = trainer, trainer
        with self._inside():
            trainer.precision_plugin.convert_module(self.module)
            self._pack_weights()
            with self.ledger.counting("reference"):
                self._set_up_references()
        self.module.policy.train()
        self.optimizer: Any = None

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with warnings.catch_warnings(), without_weights(), self.ledger, AsAccelerator():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    def _pack_weights(self) -> None:
        """Counts the linear layers of a base in 4 bits, whose weights are as wide as any here."""
        base = base_model(self.module.model)
        if not getattr(base, "is_quantized", False):
            return
        for layer in base.modules():
            frozen = isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad
            if frozen and layer is not base.get_output_embeddings():
                self.ledger.resize(layer.weight, int(layer.weight.numel() * _NF4))

    def _set_up_references(self) -> None:
        module, reference = self.module, self.module.reference
        if isinstance(reference, CachedTopK):
            module.reference = _Uncached(reference.k)
        elif reference is not None:
            if isinstance(reference, FrozenCopy) and reference.pretrained and not reference.dtype:
                reference.dtype = "bfloat16" if self.setting.accelerator else "float32"
            reference.setup(module.policy)
            if self.setting.accelerator and getattr(reference, "device", "") == "cpu":
                assert isinstance(reference, FrozenCopy) and reference.policy is not None
                for parameter in reference.policy.parameters():
                    self.ledger.resize(parameter, 0)
        old_policy = getattr(module, "old_policy", None)
        if old_policy is not None:
            old_policy.setup(module.policy)

    # A step of training.

    def training(self) -> dict[str, int]:
        """Bytes by part at the peak of an optimizer step that finds its states and the gradients of
        the step before, as all but the first do."""
        module, ledger = self.module, self.ledger
        self._feed()
        trained = [p for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.move(p.grad, "gradients")  # type: ignore[arg-type]
            )
        with self._inside():
            self.optimizer = module.optimizer(trained)
            for group in self.optimizer.param_groups:
                if self.setting.accelerator and group.get("foreach", False) is None:
                    group["foreach"] = not group.get("fused")  # torch's own choice there
            for _ in range(2):
                ledger.restart()
                self._step(trained)
        return dict(ledger.peak)

    def _step(self, trained: list[torch.nn.Parameter]) -> None:
        for part in range(self.trainer.accumulate_grad_batches):
            with self.trainer.precision_plugin.train_step_context():
                loss: Tensor = self.module.training_step(self._batch, part)
            if part == 0:  # as the Trainer does, after the forward pass
                self.optimizer.zero_grad()
            loss.backward()
            del loss
        clip_grad_norm_(trained, 1.0)
        with self.ledger.counting("optimizer"):
            if "8bit" in type(self.optimizer).__name__:  # kernels that need data
                if not self.optimizer.state:
                    self.optimizer.state[trained[0]] = {}
                    self.ledger.live["optimizer"] += 2 * sum(p.numel() for p in trained)
            else:
                self.optimizer.step()

    def _feed(self) -> None:
        """Gives the module the largest micro-batch of its data."""
        module, sizes = self.module, self.sizes
        self._batch: Any = None
        if sizes.lengths:
            self._batch = _batch(sizes.lengths, self.packing)
        if isinstance(module, Imitation) and not module.target.is_resolved:
            module.target = module.target.resolve(torch.linspace(0.1, 9, 99), module.vocab_size)
        if isinstance(module, OnPolicy):
            experience = _experience(sizes)
            part = MicroBatch(tuple(range(len(experience))), sizes.completions, sizes.completions)
            module.experience = experience
            module.batch = experience.batch(part, 0, self.packing)
            tokens = int(experience.completion_lengths.sum())
            module.counts, module.num_sequences = (tokens, tokens), len(experience)
            module.window = torch.arange(len(experience))
        if isinstance(module, Hybrid):
            module.demonstrations = self._batch
            if module.gate is not None:
                module.demonstration_weights = torch.ones(len(sizes.lengths))
            else:
                module.controller.mu = 0.5  # both branches are computed

    # A rollout.

    def rollout(self) -> dict[str, int] | None:
        """Bytes by part at the peak of sampling with the policy itself, or None."""
        sizes, ledger = self.sizes, self.ledger
        if not sizes.decoded:
            return None
        ledger.restart()
        read, last = -(-sizes.decoded // sizes.group), sizes.prompt + sizes.completion - 2
        with self._inside():
            # All prompts are read, and the last token of all completions is drawn.
            for prompts, samples, length, steps in (
                (read, sizes.group, sizes.prompt, 1),
                (1, sizes.decoded, max(last, 1), 2),
            ):
                generate(
                    self.module.model,
                    [[0] * length] * prompts,
                    samples,
                    max_new_tokens=steps,
                    eos_ids=[-1],
                    pad_id=0,
                    seed=0,
                    batch_size=sizes.decoded,
                )
        return dict(ledger.peak)


def sizes(module: PolicyModule, data: pl.LightningDataModule, setting: Setting) -> Sizes:
    """The largest micro-batch that a data module can make for a module: of the longest samples
    where the data are on this machine, else of samples as long as they may be.

    Raises:
        ValueError: there is no limit, or the data module is of an unknown kind.
    """
    if isinstance(data, HybridData):
        parts = (data.demonstrations, data.prompts)
        sft, rl = (sizes(module, part, setting) for part in parts)
        return replace(rl, lengths=sft.lengths)
    if isinstance(data, SFTData):
        return Sizes(_longest_samples(module, data))
    if isinstance(data, PromptData) and isinstance(module, OnPolicy):
        completion, group = module.sampling.max_completion_length, data.num_generations
        rollout = -(-data.prompts_per_rollout // setting.devices) * group
        size = data._batch_size or -(-rollout // setting.accumulate)
        own = module.engine.batch_size if isinstance(module.engine, HFRollout) else 0
        prompt = _longest_prompt(module, data, completion)
        return Sizes((), size, prompt, completion, min(own, rollout), group)
    raise ValueError(
        f"gift plan knows SFTData, PromptData and HybridData with their modules, not "
        f"{type(data).__name__} with {type(module).__name__}."
    )


def _longest_samples(module: PolicyModule, data: SFTData) -> tuple[int, ...]:
    sources = [*data.train_sources, *chain.from_iterable(data.val_sources.values())]
    if all(Path(source.path).exists() for source in sources):
        data.prepare(module.tokenizer, module.vocab_size)
        return tuple(sorted(data.train_examples.lengths.tolist())[-data.batch_size :])
    longest = _limited("data.max_length", data.rendering.max_length, _positions(module))
    return tuple(_ragged(longest, data.batch_size))


def _longest_prompt(module: PolicyModule, data: PromptData, completion: int) -> int:
    if _is_here(data.train_problems):
        data._tokenise(module.tokenizer)
        return max(map(len, data.prompt_ids))
    free = _positions(module) - completion
    return _limited("data.max_prompt_length", data.max_prompt_length, free)


def _is_here(problems: Problems) -> bool:
    if isinstance(problems, ConcatProblems):
        return all(map(_is_here, problems.parts))
    return not isinstance(problems, JSONLProblems) or Path(problems.source.path).exists()


def _positions(module: PolicyModule) -> int:
    config = base_model(module.model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _limited(key: str, value: int | None, positions: int) -> int:
    if value is None:
        raise ValueError(
            f"{key} is null and the data are not on this machine, so that the longest sequence is "
            "not known: set it."
        )
    return min(value, positions)


def _ragged(longest: int, count: int) -> list[int]:
    """Lengths of which only one is the longest, so that the others are padded as most are."""
    return [longest] + [max(longest - 1, 1)] * (count - 1)


def _batch(lengths: Sequence[int], packing: bool) -> Batch:
    """Sequences of which every token but the first is supervised."""
    samples = [(torch.zeros(n, dtype=torch.int64),) * 2 for n in lengths]
    whole = MicroBatch(tuple(range(len(lengths))), sum(lengths), len(lengths))
    return collate(samples, whole, 0, packing)


def _experience(sizes: Sizes) -> Experience:
    count, tokens = sizes.completions, _ragged(sizes.completion, sizes.completions)
    ones, all_tokens = torch.ones(count), torch.zeros(sum(tokens))
    return Experience(
        number=0,
        prompt_ids=torch.zeros(count * sizes.prompt, dtype=torch.int64),
        prompt_lengths=torch.full((count,), sizes.prompt),
        completion_ids=torch.zeros(sum(tokens), dtype=torch.int64),
        completion_lengths=torch.tensor(tokens),
        sampler_logp=all_tokens,
        finished=ones.bool(),
        rewards=ones,
        advantages=ones,
        counted=ones.bool(),
        trained=ones.bool(),
        problems=torch.arange(-(-count // sizes.group)),
    )


class _Uncached(Reference):
    """The rows of a CachedTopK that need not be there yet."""

    def __init__(self, k: int) -> None:
        self.k = k

    def setup(self, policy: Policy) -> None:
        """Nothing is read."""

    def rows(self, policy: Policy, batch: Batch) -> CachedRows:
        labels, size = supervised_labels(batch), len(policy.head.weight)
        n, k = len(labels), min(self.k, size)
        logp, ids = torch.zeros(n), torch.zeros(n, k, dtype=torch.int32)
        return CachedRows(labels, size, logp, ids, torch.zeros(n, k), logp)
