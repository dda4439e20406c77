"""The data module: sources in, packed micro-batches out, in an order that survives any restart."""

import hashlib
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from gift_lightning.collate import Batch
from gift_lightning.examples import Batches, Examples, Ledger
from gift_lightning.masks import LossOn
from gift_lightning.order import MicroBatch, MicroBatches, Sequential, mixture
from gift_lightning.position import PositionedData
from gift_lightning.records import Record, Rejected, Source, read
from gift_lightning.render import Rendering, Truncation
from gift_lightning.replicas import Replicas
from gift_lightning.seeds import keyed_seed
from gift_lightning.tokenised import tokenise

Sources: TypeAlias = str | Source | list[str | Source]


class SFTData(PositionedData):
    """Supervised fine-tuning data from files, folders or the hub.

    Every record read is either trained or listed in `ledger` with its reason. The order of the
    samples depends only on the seed and the epoch, so a resumed run sees what an uninterrupted one
    would, also with another number of devices if `batch_size` keeps the samples per step. A
    subclass may override `train_records` and `val_records` to bring its own records.

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

    sampler: MicroBatches | None = None

    def __init__(
        self,
        train: Sources,
        val: Sources | dict[str, Sources] | None = None,
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
        for name in named.keys() & Source.__dataclass_fields__.keys():
            raise ValueError(f"val: {name!r} is a source option, not a name; check the others.")
        self.val_sources = {name: _sources(sources) for name, sources in named.items()}
        self.rendering = Rendering(max_length, truncation, loss_on, chat, prompt_format)
        self.batch_size, self.packing = batch_size, packing
        self.max_rejected, self.num_workers, self.seed = max_rejected, num_workers, seed
        self.ledger: dict[str, Ledger] = {}
        self._sets: dict[str, tuple[Examples, np.ndarray]] = {}
        self._prepared_for: tuple[PreTrainedTokenizerBase, int] | None = None

    def train_records(self) -> Iterable[Record | Rejected]:
        """The training records; override to bring others (`origin` names them in reports)."""
        return chain.from_iterable(map(read, self.train_sources))

    def val_records(self) -> dict[str, Iterable[Record | Rejected]]:
        """The records of each named validation set."""
        return {k: chain.from_iterable(map(read, x)) for k, x in self.val_sources.items()}

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
    ) -> None:
        """Read and tokenise everything; `setup` does this with the trainer's values.

        `vocab_size` counts the rows of the model's embedding, `world` the devices of which this is
        number `rank`, `accumulate` the micro-batches per optimizer step.

        Raises:
            ValueError: A source cannot be read, or too many of its records cannot be used.
        """
        self._prepared_for = (tokenizer, vocab_size)
        self._tokenizer, pad = tokenizer, tokenizer.pad_token_id
        self._pad_id = pad if pad is not None and pad < vocab_size else 0
        named = {"train": self.train_records(), **self.val_records()}
        self._sets = {name: self._encode(name, named[name], vocab_size) for name in named}
        self._deal(world, rank, accumulate)

    def _encode(
        self, name: str, records: Iterable[Record | Rejected], vocab_size: int
    ) -> tuple[Examples, np.ndarray]:
        """The samples of a set, and their numbers in one epoch of it, int64 [n]."""
        read_now = list(records)
        made = tokenise(read_now, self._tokenizer, self.rendering, vocab_size)
        ledger = self.ledger[name] = Ledger(name, notes=made.notes, file=made.file)
        ledger.rejected = [Rejected(why, read_now[i].origin) for i, why in made.rejected.items()]
        kept = [x for i, x in enumerate(read_now) if i not in made.rejected]
        ids = mixture([(x.source, x.weight) for x in kept if isinstance(x, Record)], self.seed)
        drawn = set(ids.tolist())
        ledger.used = len(drawn)
        ledger.left_out = [record.origin for i, record in enumerate(kept) if i not in drawn]
        ledger.check(self.max_rejected)
        return made.examples, ids

    def _deal(self, world: int, rank: int, accumulate: int) -> None:
        examples, ids = self._sets["train"]
        sizes = (examples.lengths, examples.num_targets, self.batch_size)
        self.sampler = MicroBatches(ids, *sizes, accumulate, world, rank, self.seed)

    def setup(self, stage: str) -> None:
        """Prepare for the trainer: tokenizer and vocabulary size come from its module."""
        trainer = self.trainer
        assert trainer is not None
        replicas = Replicas.of(trainer)
        world, rank = replicas.number, replicas.index
        self.check_order()
        accumulate = trainer.accumulate_grad_batches
        module: Any = trainer.lightning_module
        if self._prepared_for != (module.tokenizer, module.vocab_size):
            self.prepare(module.tokenizer, module.vocab_size, world, rank, accumulate)
            if trainer.is_global_zero:
                self.report()
        self._deal(world, rank, accumulate)

    def report(self, console: Console | None = None) -> None:
        """Print what became of the records, and one example with its learned part marked."""
        console = console or Console()
        table = Table("set", "records", "count", title="Data")
        for name, ledger in self.ledger.items():
            for outcome, count in [*ledger.counts.items(), *ledger.notes.items()]:
                table.add_row(name, outcome, str(count))
                name = ""
        console.print(table)
        for ledger in self.ledger.values():
            if ledger.file is not None:
                said = f"Tokens of {ledger.name}: read from {ledger.file} (`GIFT_CACHE=` for none)"
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            for item in ledger.rejected[:5]:
                console.print(f"Not used: {item}", highlight=False, markup=False)
        examples, ids = self._sets["train"]
        title = ("Example (learned tokens are marked):\n", "bold")
        console.print(Text.assemble(title, examples.marked(int(ids[0]), self._tokenizer)))

    @property
    def sets(self) -> dict[str, Examples]:
        """The tokenised samples of every set, training and validation, by name."""
        return {name: examples for name, (examples, _) in self._sets.items()}

    @property
    def train_examples(self) -> Examples:
        """The tokenised training samples; `sample_ids` of a batch are its indices."""
        return self.sets["train"]

    @property
    def val_names(self) -> list[str]:
        """The validation sets, in the order of their loaders."""
        return [name for name in self._sets if name != "train"]

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.sampler is not None
        return self.loader(self.sampler)

    def loader(self, order: Sampler[MicroBatch]) -> DataLoader[Batch]:
        """The training samples in some order."""
        return self._loader(self.train_examples, order)

    def one_pass(self) -> DataLoader[Batch]:
        """This rank's share of an epoch's samples in order, apart from the training position."""
        return self._in_order("train")

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per validation set, in the order of `val_names`."""
        return [self._in_order(name) for name in self.val_names]

    def _in_order(self, name: str) -> DataLoader[Batch]:
        assert self.sampler is not None
        (examples, ids), world, rank = self._sets[name], self.sampler.world, self.sampler.rank
        order = Sequential(ids, examples.num_targets, self.batch_size, world, rank)
        return self._loader(examples, order)

    def _loader(self, examples: Examples, sampler: Sampler[MicroBatch]) -> DataLoader[Batch]:
        # Else a loader draws from the global generator at every epoch: less often after a resume.
        own = torch.Generator().manual_seed(keyed_seed(self.seed, "loader"))
        batches, workers = Batches(examples, self._pad_id, self.packing), self.num_workers
        return DataLoader(batches, None, sampler=sampler, num_workers=workers, generator=own)

    @property
    def identity(self) -> dict[str, str | int]:
        assert self.sampler is not None
        examples, ids = self._sets["train"]
        return {
            "samples": hashlib.sha256(examples.digest.encode() + ids.tobytes()).hexdigest(),
            "seed": self.seed,
            "samples per step": self.sampler.samples_per_step,
        }


def _sources(value: Sources) -> list[Source]:
    values = value if isinstance(value, list) else [value]
    return [Source(item) if isinstance(item, str) else item for item in values]
