"""Tokenised samples, batches of them, and an account of every record that was read."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from rich.text import Text
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gift_lightning.collate import Batch, collate
from gift_lightning.functional import IGNORED
from gift_lightning.order import MicroBatch
from gift_lightning.records import Rejected


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
    file: Path | None = None
    """Where the tokens were read from, if they were kept by an earlier start."""

    @property
    def read(self) -> int:
        return self.used + len(self.rejected) + len(self.left_out)

    @property
    def reasons(self) -> dict[str, int]:
        """Rejected records by reason, the most frequent first."""
        return dict(Counter(item.kind for item in self.rejected).most_common())

    @property
    def counts(self) -> dict[str, int]:
        """Records by outcome."""
        left_out = {"left out by weight": len(self.left_out)} if self.left_out else {}
        return {"read": self.read, "used": self.used, **self.reasons, **left_out}

    def check(self, max_rejected: float) -> None:
        """Raise ValueError if nothing is left or too large a share is rejected."""
        if not self.read:
            raise ValueError(f"No {self.name} record is left to use: the data has none, give some.")
        share = len(self.rejected) / self.read
        if self.used and share <= max_rejected:
            return
        found = f"{len(self.rejected)} of {self.read} {self.name} records cannot be used"
        if self.rejected:
            reasons = ", ".join(f"{kind} ({n})" for kind, n in [*self.reasons.items()][:3])
            found += f": {reasons}; the first is {self.rejected[0]}"
        if not self.used:
            raise ValueError(f"No {self.name} record is left to use; {found}.")
        raise ValueError(f"{found}. Repair them, or raise max_rejected above {share:.3f}.")


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Tokenised samples in flat arrays; item i is (`input_ids`, `labels`), Int64 [t] each.

    Args:
        lengths: Tokens of each sample, int64 [n]; none is empty.
        ids: All tokens, one sample after another, int32 [sum of lengths].
        learned: Whether each of them is learned, bool [sum of lengths].

    Attributes:
        lengths: As given.
        num_targets: Learned tokens of each sample, int64 [n]; no token predicts the first.
        digest: sha256 over all ids and labels.
    """

    def __init__(self, lengths: np.ndarray, ids: np.ndarray, learned: np.ndarray) -> None:
        self.lengths, self._ids, self._learned = lengths, ids, learned
        self._offsets = np.append(0, lengths.cumsum())
        predicted = learned.copy()
        predicted[self._offsets[:-1]] = False
        self.num_targets = np.diff(np.append(0, predicted.cumsum())[self._offsets])
        digest = hashlib.sha256(self._offsets.tobytes())
        digest.update(self._ids.tobytes())
        digest.update(self._learned.tobytes())
        self.digest = digest.hexdigest()

    @classmethod
    def of(cls, samples: Iterable[tuple[list[int], list[int]]]) -> "Examples":
        """From the `input_ids` and `labels` of each sample."""
        ids, learned = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=bool)]
        for input_ids, labels in samples:
            ids.append(np.array(input_ids, dtype=np.int32))
            learned.append(np.array(labels, dtype=np.int64) != IGNORED)
        lengths = np.array([len(x) for x in ids[1:]], dtype=np.int64)
        return cls(lengths, np.concatenate(ids), np.concatenate(learned))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What they are made from again."""
        return {"lengths": self.lengths, "ids": self._ids, "learned": self._learned}

    def __len__(self) -> int:
        return len(self.lengths)

    def last_learned(self) -> list[int]:
        """The tokens that samples end on, as far as they are learned; each once."""
        at = np.where(self._learned, np.arange(len(self._learned)), -1)
        last = np.maximum.reduceat(at, self._offsets[:-1]) if len(self) else at[:0]
        return np.unique(self._ids[last[last >= 0]]).tolist()

    def __getitem__(self, i: int) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = slice(self._offsets[i], self._offsets[i + 1])
        input_ids = torch.from_numpy(self._ids[part].astype(np.int64))
        learned = torch.from_numpy(self._learned[part].copy())
        return input_ids, torch.where(learned, input_ids, IGNORED)

    def marked(self, i: int, tokenizer: PreTrainedTokenizerBase) -> Text:
        """Sample i as text, with its learned part marked."""
        text = Text()
        pairs = zip(*(x.tolist() for x in self[i]), strict=True)
        for learned, part in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            shown = str(tokenizer.decode([token for token, _ in part]))
            shown = shown if len(shown) <= 1000 else f"{shown[:500]} [...] {shown[-500:]}"
            text.append(shown, style="black on green" if learned else "")
        return text


class Batches(Dataset[Batch]):
    """Batches by `MicroBatch`: with this, a sampler of micro-batches drives a plain DataLoader."""

    def __init__(self, examples: Examples, pad_id: int, packing: bool) -> None:
        self.examples, self.pad_id, self.packing = examples, pad_id, packing

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        samples = [self.examples[i] for i in micro_batch.sample_ids]
        return collate(samples, micro_batch, self.pad_id, self.packing)
