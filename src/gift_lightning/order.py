"""The order of the data: a pure function of (seed, epoch), without state, for any number of ranks.

One optimizer step is one *window* of a permutation of the epoch's samples. A window is known before
its first backward, so every rank knows the number of supervised tokens of the whole step.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from gift_lightning.seeds import keyed_seed


def permutation(n: int, seed: int, purpose: str, key: int | str) -> np.ndarray:
    """A random order of n items, int64 [n]."""
    generator = torch.Generator().manual_seed(keyed_seed(seed, purpose, key))
    return torch.randperm(n, generator=generator).numpy()


def mixture(weights: Sequence[tuple[str, float]], seed: int) -> np.ndarray:
    """The items of one epoch, int64 [n], from the source and weight of every item.

    Whole weights repeat an item; fractions choose that share of the source's items.
    """
    uses = np.array([int(weight) for _, weight in weights], dtype=np.int64)
    for source, weight in dict.fromkeys(weights):
        members = np.flatnonzero([item == (source, weight) for item in weights])
        some = round(weight % 1 * len(members))
        uses[members[permutation(len(members), seed, "mixture", source)[:some]]] += 1
    return np.repeat(np.arange(len(weights)), uses)


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward; empty on a rank without samples."""

    sample_ids: tuple[int, ...]
    """Dataset index of each sample."""
    step_tokens: int
    step_sequences: int
    """Learned tokens and samples of the whole optimizer step: all its micro-batches, all ranks."""


def deal(ids: np.ndarray, batch_size: int, world: int, rank: int) -> list[tuple[int, ...]]:
    """The micro-batches of one rank, as many as any other rank's; the last may be empty."""
    assert 0 <= rank < world and batch_size > 0
    mine = ids[rank::world].tolist()
    return [tuple(mine[i : i + batch_size]) for i in range(0, -(-len(ids) // world), batch_size)]


class Resumable(Sampler[Any]):
    """A sampler that can begin inside an epoch, and counts its micro-batches in whole steps."""

    accumulate: int
    """Micro-batches of one rank in an optimizer step."""
    epoch = 0
    _start = (0, 0)
    _shift: int | None = 0

    @abstractmethod
    def __len__(self) -> int:
        """Micro-batches of a whole epoch, also after a resume: the trainer restores its counter."""

    def start(self, epoch: int, skip: int) -> None:
        """Begin at micro-batch `skip` of `epoch`; every later epoch is whole.

        The caller's next `set_epoch` is taken to mean `epoch`, whatever its number: a trainer that
        was stopped in mid-epoch counts that epoch as done and calls the rest of it the next one.
        """
        assert 0 <= skip <= len(self)
        self.epoch, self._start, self._shift = epoch, (epoch, skip), None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (the trainer calls this)."""
        if self._shift is None:
            self._shift = self._start[0] - epoch
        self.epoch = epoch + self._shift

    @property
    def skipped(self) -> int:
        """Micro-batches of the current epoch that were trained before a resume."""
        return self._start[1] if self.epoch == self._start[0] else 0


@dataclass(eq=False)
class MicroBatches(Resumable):
    """The micro-batches of one rank, window by window.

    Inside a window the samples are sorted by length (longest first, so that memory peaks at once),
    dealt to the ranks in turn and cut into micro-batches: any such split gives the same gradient,
    and this one wastes little padding. All ranks yield equally many micro-batches per window.
    """

    ids: np.ndarray
    """Dataset indices of one epoch, int64 [n]; a sample used twice per epoch appears twice."""
    lengths: np.ndarray
    """Tokens of each dataset sample, indexed by dataset index."""
    targets: np.ndarray
    """Supervised tokens of each dataset sample."""
    batch_size: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0
    seed: int = 0

    @property
    def samples_per_step(self) -> int:
        return self.accumulate * self.batch_size * self.world

    def __len__(self) -> int:
        full, rest = divmod(len(self.ids), self.samples_per_step)
        return full * self.accumulate + -(-rest // (self.batch_size * self.world))

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Dataset indices of each optimizer step of an epoch, all ranks; the last may be short."""
        order, size = permutation(len(self.ids), self.seed, "order", epoch), self.samples_per_step
        return [self.ids[order[i : i + size]] for i in range(0, len(order), size)]

    def __iter__(self) -> Iterator[MicroBatch]:
        skip = self.skipped
        for window in self.windows(self.epoch):
            parts = self.parts(window)
            yield from parts[skip:]
            skip = max(skip - len(parts), 0)

    def parts(self, window: np.ndarray) -> list[MicroBatch]:
        """The micro-batches of one optimizer step."""
        longest_first = window[np.argsort(-self.lengths[window], kind="stable")]
        tokens = int(self.targets[window].sum())
        dealt = deal(longest_first, self.batch_size, self.world, self.rank)
        return [MicroBatch(ids, tokens, len(window)) for ids in dealt]


@dataclass(eq=False)
class Sequential(Sampler[MicroBatch]):
    """A set in its own order, without padding: no sample is repeated on any rank.

    `step_tokens` and `step_sequences` count the whole set, so that summed token losses divided by
    `step_tokens` give its exact mean. The fields are as in `MicroBatches`.
    """

    ids: np.ndarray
    targets: np.ndarray
    batch_size: int
    world: int = 1
    rank: int = 0

    def __len__(self) -> int:
        return len(deal(self.ids, self.batch_size, self.world, self.rank))

    def __iter__(self) -> Iterator[MicroBatch]:
        tokens = int(self.targets[self.ids].sum())
        for part in deal(self.ids, self.batch_size, self.world, self.rank):
            yield MicroBatch(part, tokens, len(self.ids))
