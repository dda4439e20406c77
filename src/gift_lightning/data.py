"""The data module: sources in, packed micro-batches out, in an order that survives any restart."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from gift_lightning.collate import Batch, collate
from gift_lightning.order import MicroBatch, MicroBatches, Sequential, keyed_seed
from gift_lightning.records import Record, Rejected, Source, read
from gift_lightning.render import IGNORE, LossOn, Rendering, Truncation, encode_all


@dataclass
class Ledger:
    """What became of every record of a set: read = used + rejected + left out."""

    name: str
    used: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Good records that a source weight below 1 leaves unused."""
    notes: Counter[str] = field(default_factory=Counter)
    """What happened to used records on the way, such as truncation."""

    @property
    def read(self) -> int:
        return self.used + len(self.rejected) + len(self.left_out)

    @property
    def counts(self) -> dict[str, int]:
        """Records by outcome, most frequent reason first."""
        reasons = Counter(item.kind for item in self.rejected)
        counts = {"read": self.read, "used": self.used, **dict(reasons.most_common())}
        if self.left_out:
            counts["left out by weight"] = len(self.left_out)
        return counts

    def check(self, max_rejected: float) -> None:
        """Raise ValueError if nothing is left or too large a share is rejected."""
        share = len(self.rejected) / max(self.read, 1)
        if self.used and share <= max_rejected:
            return
        kinds = Counter(item.kind for item in self.rejected)
        reasons = ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common(3))
        found = f"{len(self.rejected)} of {self.read} {self.name} records cannot be used"
        if self.rejected:
            found += f": {reasons}; the first is {self.rejected[0]}"
        if not self.used:
            raise ValueError(f"No {self.name} record is left to use; {found}.")
        raise ValueError(f"{found}. Repair them, or raise max_rejected above {share:.3f}.")


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Tokenised samples in flat arrays; item i is (`input_ids`, `labels`), Int64 [t] each.

    Attributes:
        lengths: Tokens of each sample, int64 [n].
        num_targets: Learned tokens of each sample, int64 [n].
        digest: sha256 over all ids and labels.
    """

    def __init__(self, samples: Iterable[tuple[list[int], list[int]]]) -> None:
        ids: list[np.ndarray] = []
        learned: list[np.ndarray] = []
        for input_ids, labels in samples:
            ids.append(np.array(input_ids, dtype=np.int32))
            learned.append(np.array(labels, dtype=np.int64) != IGNORE)
        self.lengths = np.array([len(x) for x in ids], dtype=np.int64)
        self.num_targets = np.array([int(x[1:].sum()) for x in learned], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._ids = np.concatenate([*ids, np.zeros(0, dtype=np.int32)])
        self._learned = np.concatenate([*learned, np.zeros(0, dtype=bool)])
        digest = hashlib.sha256(self._offsets.tobytes())
        digest.update(self._ids.tobytes())
        digest.update(self._learned.tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = slice(self._offsets[i], self._offsets[i + 1])
        input_ids = torch.from_numpy(self._ids[part].astype(np.int64))
        learned = torch.from_numpy(self._learned[part].copy())
        return input_ids, torch.where(learned, input_ids, IGNORE)


class _Batches(Dataset[Batch]):
    """Batches by `MicroBatch`: with this, a sampler of micro-batches drives a plain DataLoader."""

    def __init__(self, examples: Examples, pad_id: int, packing: bool) -> None:
        self.examples, self.pad_id, self.packing = examples, pad_id, packing

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        samples = [self.examples[i] for i in micro_batch.sample_ids]
        return collate(samples, micro_batch, self.pad_id, self.packing)


class SFTData(pl.LightningDataModule):
    """Supervised fine-tuning data from files, folders or the hub.

    Every record read is either trained or listed in `ledger` with its reason. The order of the
    samples depends only on the seed and the epoch, so a resumed run sees what an uninterrupted one
    would, also with another number of devices if `batch_size` keeps the samples per step.

    A subclass may override `train_records` and `val_records` to bring its own records.

    Args:
        train: What to train on: a path, a source with options, or a list of them.
        val: Validation data in the same forms, or several named sets.
        batch_size: Samples per micro-batch and device; a step takes
            batch_size x accumulate_grad_batches x devices.
        max_length: Most tokens of one example; null for no limit.
        truncation: What to do with longer examples: drop, keep_start, keep_end or error.
        loss_on: Learn every assistant turn or completion, only the last turn, or all tokens.
        chat: Turn plain prompts and completions into chats with the tokenizer's chat template.
        prompt_format: Text around a plain prompt, for example "Question: {prompt} Answer:".
        packing: Put short samples into one row; exact, and faster than padding.
        max_rejected: Refuse to start if a larger share of a set's records cannot be used.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the data order and of fractional source weights.
    """

    def __init__(
        self,
        train: str | Source | list[str | Source],
        val: str
        | Source
        | list[str | Source]
        | dict[str, str | Source | list[str | Source]]
        | None = None,
        batch_size: int = 8,
        max_length: int | None = 1024,
        truncation: Truncation = "drop",
        loss_on: LossOn = "assistant",
        chat: bool = False,
        prompt_format: str = "{prompt}",
        packing: bool = True,
        max_rejected: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if not 0 <= max_rejected <= 1:
            raise ValueError(f"max_rejected is a share between 0 and 1, not {max_rejected}.")
        self.train_sources = _sources(train)
        named = val if isinstance(val, dict) else {} if val is None else {"val": val}
        if "train" in named:
            raise ValueError("val: a validation set cannot be named 'train'; rename it.")
        for name in named:
            if name in Source.__dataclass_fields__:
                raise ValueError(f"val: {name!r} is a source option, not a name; check the others.")
        self.val_sources = {name: _sources(sources) for name, sources in named.items()}
        self.rendering = Rendering(max_length, truncation, loss_on, chat, prompt_format)
        self.batch_size = batch_size
        self.packing = packing
        self.max_rejected = max_rejected
        self.num_workers = num_workers
        self.seed = seed
        self.ledger: dict[str, Ledger] = {}
        self.val_names: list[str] = []
        self._world, self._rank, self._accumulate = 1, 0, 1
        self._sampler: MicroBatches | None = None

    # --- records ----------------------------------------------------------------------------

    def train_records(self) -> Iterable[Record | Rejected]:
        """The training records; override to bring others (`origin` names them in reports)."""
        for source in self.train_sources:
            yield from read(source)

    def val_records(self) -> dict[str, Iterable[Record | Rejected]]:
        """The records of each named validation set."""
        return {
            name: (record for source in sources for record in read(source))
            for name, sources in self.val_sources.items()
        }

    # --- preparation ------------------------------------------------------------------------

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
    ) -> None:
        """Read and tokenise everything; `setup` does this with the trainer's values.

        Args:
            tokenizer: The model's tokenizer.
            vocab_size: Rows of the model's embedding.
            world: Number of devices.
            rank: This device.
            accumulate: Micro-batches per optimizer step.

        Raises:
            ValueError: A source cannot be read, or too many of its records cannot be used.
        """
        self._world, self._rank, self._accumulate = world, rank, accumulate
        self._tokenizer = tokenizer
        pad = tokenizer.pad_token_id
        self._pad_id = pad if pad is not None and pad < vocab_size else 0
        train = self.train_records()
        self._train, self._epoch_ids = self._encode("train", train, vocab_size)
        named = self.val_records()
        self.val_names = list(named)
        self._val = [self._encode(name, named[name], vocab_size) for name in named]
        self._sampler = self._new_sampler()

    def _encode(
        self, name: str, records: Iterable[Record | Rejected], vocab_size: int
    ) -> tuple[Examples, np.ndarray]:
        """The samples of a set, and the sample numbers of one epoch of it, int64 [n]."""
        ledger = self.ledger[name] = Ledger(name)
        kept: list[Record] = []

        def samples() -> Iterator[tuple[list[int], list[int]]]:
            for record, result in encode_all(records, self._tokenizer, self.rendering, vocab_size):
                if isinstance(result, Rejected):
                    ledger.rejected.append(result)
                    continue
                assert isinstance(record, Record)
                kept.append(record)
                ledger.notes.update(result.notes)
                yield result.input_ids, result.labels

        examples = Examples(samples())
        ids = _draw(kept, self.seed)
        drawn = set(ids.tolist())
        ledger.used = len(drawn)
        ledger.left_out = [r.origin for i, r in enumerate(kept) if i not in drawn]
        ledger.check(self.max_rejected)
        return examples, ids

    def _new_sampler(self) -> MicroBatches:
        return MicroBatches(
            self._epoch_ids,
            self._train.lengths,
            self._train.num_targets,
            self.batch_size,
            self._accumulate,
            self._world,
            self._rank,
            self.seed,
        )

    def setup(self, stage: str) -> None:
        """Prepare for the trainer: tokenizer and vocabulary size come from its module."""
        trainer = self.trainer
        assert trainer is not None
        world, rank = trainer.world_size, trainer.global_rank
        if world > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "This data deals samples to devices itself; set trainer.use_distributed_sampler "
                "to false."
            )
        accumulate = trainer.accumulate_grad_batches
        if self._sampler is None:
            module: Any = trainer.lightning_module
            self.prepare(module.tokenizer, module.vocab_size, world, rank, accumulate)
            if trainer.is_global_zero:
                self.report()
        self._world, self._rank, self._accumulate = world, rank, accumulate
        self._sampler = self._new_sampler()

    def report(self, console: Console | None = None) -> None:
        """Print what became of the records, and one example with its learned part marked."""
        console = console or Console()
        table = Table("set", "records", "count", title="Data")
        for name, ledger in self.ledger.items():
            for outcome, count in [*ledger.counts.items(), *ledger.notes.items()]:
                table.add_row(name, outcome, str(count))
                name = ""
        console.print(table)
        shown = Text("Example (learned tokens are marked):\n", style="bold")
        input_ids, labels = self._train[int(self._epoch_ids[0])]
        learned = (labels != IGNORE).tolist()
        ids, start = input_ids.tolist(), 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or learned[end] != learned[start]:
                part = str(self._tokenizer.decode(ids[start:end]))
                part = part if len(part) <= 1000 else f"{part[:500]} [...] {part[-500:]}"
                shown.append(
                    part, style="not bold black on green" if learned[start] else "not bold"
                )
                start = end
        console.print(shown)

    # --- loaders ----------------------------------------------------------------------------

    @property
    def train_examples(self) -> Examples:
        """The tokenised training samples; `sample_ids` of a batch are its indices."""
        return self._train

    @property
    def sets(self) -> dict[str, Examples]:
        """The tokenised samples of every set, training and validation, by name."""
        return {"train": self._train, **{name: self.val_examples(name) for name in self.val_names}}

    def val_examples(self, name: str) -> Examples:
        """The tokenised samples of a validation set."""
        return self._val[self.val_names.index(name)][0]

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self._sampler is not None
        return self._loader(self._train, self._sampler)

    def one_pass(self) -> DataLoader[Batch]:
        """This rank's share of an epoch's samples in order, apart from the training position."""
        targets = self._train.num_targets
        order = Sequential(self._epoch_ids, targets, self.batch_size, self._world, self._rank)
        return self._loader(self._train, order)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per validation set, in the order of `val_names`."""
        return [
            self._loader(
                examples,
                Sequential(ids, examples.num_targets, self.batch_size, self._world, self._rank),
            )
            for examples, ids in self._val
        ]

    def _loader(self, examples: Examples, sampler: MicroBatches | Sequential) -> DataLoader[Batch]:
        # A private generator: the loader would else draw from the global one at every epoch, which
        # a resumed run does not do as often.
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, "loader"))
        return DataLoader(
            _Batches(examples, self._pad_id, self.packing),
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            generator=generator,
        )

    # --- position ---------------------------------------------------------------------------

    @property
    def _identity(self) -> dict[str, str | int]:
        """What the order of the data depends on."""
        digest = hashlib.sha256(self._train.digest.encode() + self._epoch_ids.tobytes())
        return {
            "samples": digest.hexdigest(),
            "seed": self.seed,
            "samples per step": self.batch_size * self._accumulate * self._world,
            "accumulate_grad_batches": self._accumulate,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 over the samples, their labels, the seed and the samples per step."""
        return hashlib.sha256(repr(sorted(self._identity.items())).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: the epoch and its micro-batches already trained."""
        if self.trainer is None or self._sampler is None:
            return {}
        loop = self.trainer.fit_loop
        epoch: Any = loop.epoch_progress.current
        batch: Any = loop.epoch_loop.batch_progress.current
        # `processed` counts trained batches at every hook; the trainer resumes from it as well.
        done = batch.processed
        if epoch.ready > epoch.started and done:
            raise ValueError(
                "A checkpoint written in on_train_epoch_start cannot be resumed; "
                "write it at the end of a step or of an epoch."
            )
        return {
            "epoch": self._sampler.epoch,
            "micro_batches_done": done,
            "epoch_trained": done > 0 and done >= self.trainer.num_training_batches,
            "batch_closed": batch.completed == done,
            "epoch_closed": epoch.started == epoch.processed,
            "identity": self._identity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            ValueError: The data or its order changed, or the position is inside a step.
        """
        assert self.trainer is not None and self._sampler is not None
        if self.trainer.state.fn != "fit":
            return
        old, new = state_dict["identity"], self._identity
        changed = [
            f"{key} ({old[key]} before, {new[key]} now)" if key != "samples" else "the samples"
            for key in new
            if old[key] != new[key]
        ]
        if changed:
            raise ValueError(
                f"The checkpoint was written with other data: {', '.join(changed)} changed; "
                "restore them, or start a new run from the exported weights."
            )
        epoch, done = state_dict["epoch"], state_dict["micro_batches_done"]
        by_steps = self.trainer.max_steps != -1
        if not state_dict["epoch_trained"]:
            if done % self._accumulate:
                raise ValueError(
                    f"The checkpoint was written inside an optimizer step, after micro-batch {done}"
                    f" of epoch {epoch} with accumulate_grad_batches={self._accumulate}; resume "
                    "from one written at the end of a step."
                )
            if done and state_dict["epoch_closed"] and not by_steps:
                raise ValueError(
                    f"The checkpoint was written after training stopped inside epoch {epoch}; "
                    "resume it with trainer.max_steps, or from one written at the end of a step."
                )
        elif state_dict["batch_closed"] and (by_steps or not state_dict["epoch_closed"]):
            # The trainer enters the finished epoch once more, without training in it.
            done = len(self._sampler)
        else:
            epoch, done = epoch + 1, 0
        self._sampler.start(epoch, done)


def _sources(value: str | Source | list[str | Source]) -> list[Source]:
    values = value if isinstance(value, list) else [value]
    return [Source(item) if isinstance(item, str) else item for item in values]


def _draw(records: list[Record], seed: int) -> np.ndarray:
    """The record numbers of one epoch, int64 [n]: whole weights repeat, fractions choose."""
    groups: dict[tuple[str, float], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault((record.source, record.weight), []).append(i)
    uses = np.zeros(len(records), dtype=np.int64)
    for (source, weight), members in groups.items():
        uses[members] = int(weight)
        some = round((weight - int(weight)) * len(members))
        generator = torch.Generator().manual_seed(keyed_seed(seed, "mixture", source))
        chosen = torch.randperm(len(members), generator=generator)[:some].tolist()
        uses[[members[i] for i in chosen]] += 1
    return np.repeat(np.arange(len(records)), uses)
