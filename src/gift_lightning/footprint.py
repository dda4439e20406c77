"""The memory that one device needs, by running a stage's own step on tensors without data."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.utils import clip_grad_norm_

from gift_lightning.cache import CachedRows, CachedTopK
from gift_lightning.collate import Batch
from gift_lightning.dataless import AsAccelerator, ByteCounter
from gift_lightning.generation import generate
from gift_lightning.hybrid import Hybrid
from gift_lightning.imitation import Imitation
from gift_lightning.matmul import two_chunks
from gift_lightning.models import base_model, without_weights
from gift_lightning.modes import scoring
from gift_lightning.module import PolicyModule
from gift_lightning.onpolicy import OnPolicy
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised_labels
from gift_lightning.references import FrozenCopy, Reference
from gift_lightning.sizes import Setting, demonstrations, rollout, sizes

_NF4 = 4.127 / 8  # bytes of a weight in 4 bits, with its doubly quantised scales


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
        self.setting, self.counter = setting, ByteCounter()
        with self._inside(), self.counter.counting("parameters"):
            self.module, data = build()
        self.sizes = sizes(self.module, data, setting)
        self.packing = bool(getattr(data, "packing", False))
        self.share_prompts = bool(getattr(data, "share_prompts", False))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            # As wide, and there is no 16-mixed on a CPU, whose operations stand for any device's.
            precision="bf16-mixed" if setting.precision == "16-mixed" else setting.precision,
            accumulate_grad_batches=setting.accumulate,
            log_every_n_steps=1,  # a logged step takes most
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.trainer, self.module.trainer = trainer, trainer
        with self._inside():
            with self.counter.counting("parameters"):
                trainer.precision_plugin.convert_module(self.module)
            self._pack_weights()
            with self.counter.counting("reference"):
                self._set_up_references()
        for layer in self.module.modules():  # in RL without dropout
            checkpointed = getattr(layer, "gradient_checkpointing", False)
            layer.training = not isinstance(self.module, OnPolicy) or bool(checkpointed)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        way = AsAccelerator() if self.setting.accelerator else nullcontext()
        with warnings.catch_warnings(), without_weights(), two_chunks(), self.counter, way:
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    def _pack_weights(self) -> None:
        """Counts the linear layers of a base in 4 bits, whose weights are as wide as any here."""
        base = base_model(self.module.model)
        if not getattr(base, "is_quantized", False):
            return
        linear = (layer for layer in base.modules() if isinstance(layer, torch.nn.Linear))
        for layer in linear:
            if not layer.weight.requires_grad and layer is not base.get_output_embeddings():
                self.counter.resize(layer.weight, int(layer.weight.numel() * _NF4))

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
                    self.counter.resize(parameter, 0)
        old_policy = getattr(module, "old_policy", None)
        if old_policy is not None:
            old_policy.setup(module.policy)

    # A step of training.

    def training(self) -> dict[str, int]:
        """Bytes by part at the peak of an optimizer step's last micro-batch, which finds optimizer
        states, and gradients of the micro-batch before."""
        module, counter = self.module, self.counter
        self._feed()
        trained = [p for p in module.parameters() if p.requires_grad]
        with self._inside():
            optimizer: Any = module.optimizer(trained)
            self._optimizer = optimizer  # its states are there in rollouts
            for group in optimizer.param_groups:
                if self.setting.accelerator and group.get("foreach", False) is None:
                    group["foreach"] = not group.get("fused")  # torch's own choice there
            with counter.counting("gradients"):
                for p in trained:
                    p.grad = torch.zeros_like(p)
            self._update(optimizer, trained)
            if self.setting.accumulate == 1:
                optimizer.zero_grad()
            counter.restart()
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: counter.move(p.grad, "gradients"))
            with self.trainer.precision_plugin.train_step_context():
                loss: Any = module.training_step(self._batch, 0)
            loss.backward()
            clip_grad_norm_(trained, 1.0)
            self._update(optimizer, trained)
            optimizer.zero_grad()
        return dict(counter.peak)

    def _update(self, optimizer: Any, trained: list[torch.nn.Parameter]) -> None:
        """A step of the optimizer; those of 8 bits have kernels that need data."""
        with self.counter.counting("optimizer"):
            if "8bit" not in type(optimizer).__name__:
                optimizer.step()
            elif not optimizer.state:
                optimizer.state[trained[0]] = {}
                self.counter.live["optimizer"] += 2 * sum(p.numel() for p in trained)

    def _feed(self) -> None:
        """Gives the module the largest micro-batch of its data."""
        module, sizes = self.module, self.sizes
        self._batch: Any = None
        if sizes.lengths:
            self._batch = demonstrations(sizes.lengths, self.packing)
        if isinstance(module, Imitation) and not module.target.is_resolved:
            module.target = module.target.resolve(torch.linspace(0.1, 9, 99), module.vocab_size)
        if isinstance(module, OnPolicy):
            experience = rollout(sizes)
            part = MicroBatch(tuple(range(len(experience))), sizes.completions, sizes.completions)
            module.experience = experience
            module.batch = experience.batch(part, 0, self.packing, self.share_prompts)
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
        """Bytes by part at the peak of a rollout, or None where there are none; after `training`.

        All rollouts but the first find the optimizer's states; none finds gradients, which are
        freed when a step ends. Where an engine samples, this is what the trainer holds meanwhile.
        """
        if not isinstance(self.module, OnPolicy):
            return None
        self.counter.restart()
        with self._inside():
            if self.sizes.decoded:
                self._sample()
            if self.sizes.scored:
                self._score(self.module)
        return dict(self.counter.peak)

    def _sample(self) -> None:
        """All prompts are read, and the last token of all completions is drawn."""
        sizes = self.sizes
        read, last = -(-sizes.decoded // sizes.group), sizes.prompt + sizes.completion - 2
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

    def _score(self, module: OnPolicy) -> None:
        """The old log-probabilities of a micro-batch."""
        assert module.batch is not None
        precision = self.trainer.precision_plugin
        with precision.forward_context(), scoring(module.model):
            module.policy.token_logp(module.batch, module.sampling.temperature, module.chunk_size)


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
