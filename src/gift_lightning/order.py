"""The order of the data: a pure function of (seed, epoch), without state, for any number of ranks.

One optimizer step is one *window* of a permutation of the epoch's samples. A window is known before
its first backward, so every rank knows the number of supervised tokens of the whole step.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler


def keyed_seed(seed: int, purpose: str, *key: int | str) -> int:
    """One random stream per purpose: a 63-bit seed that depends on all arguments.

    The built-in `hash` varies between processes, so the sha256 of the arguments' `repr` is used.
    """
    digest = hashlib.sha256(repr((seed, purpose, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` items in an epoch, int64 [n]."""
    generator = torch.Generator().manual_seed(keyed_seed(seed, "order", epoch))
    return torch.randperm(n, generator=generator).numpy()


def windows(n: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The items of each optimizer step of an epoch; the short last window is kept, never padded."""
    order = permutation(n, seed, epoch)
    return [order[i : i + size] for i in range(0, n, size)]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward; empty on a rank without samples."""

    sample_ids: tuple[int, ...]
    """Dataset index of each sample."""
    step_tokens: int
    """Supervised tokens of the whole optimizer step: all its micro-batches, all ranks."""
    step_sequences: int
    """Samples of the whole optimizer step."""


class MicroBatches(Sampler[MicroBatch]):
    """The micro-batches of one rank, window by window.

    Inside a window the samples are sorted by length (longest first, so that memory peaks at once),
    dealt to the ranks in turn and cut into micro-batches: any such split gives the same gradient,
    and this one wastes little padding. All ranks yield equally many micro-batches per window.

    Args:
        ids: Dataset indices of one epoch [n]; a sample used twice per epoch appears twice.
        lengths: Tokens of each dataset sample, indexed by dataset index.
        targets: Supervised tokens of each dataset sample.
        batch_size: Samples per micro-batch and rank.
        accumulate: Micro-batches per optimizer step.
        world: Number of ranks.
        rank: This rank.
        seed: Seed of the permutations.
    """

    def __init__(
        self,
        ids: Sequence[int] | np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        targets: Sequence[int] | np.ndarray,
        batch_size: int,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        assert 0 <= rank < world and batch_size > 0 and accumulate > 0
        self.ids = np.asarray(ids, dtype=np.int64)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.world = world
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self._start = (0, 0)
        self._shift: int | None = 0

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

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, also after a resume: the trainer restores its counter."""
        full, rest = divmod(len(self.ids), self.accumulate * self.batch_size * self.world)
        return full * self.accumulate + -(-rest // (self.batch_size * self.world))

    def windows(self, epoch: int) -> list[np.ndarray]:
        """The dataset indices of each optimizer step of an epoch, the same on every rank."""
        size = self.accumulate * self.batch_size * self.world
        return [self.ids[window] for window in windows(len(self.ids), size, self.seed, epoch)]

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch = self.epoch
        skip = self._start[1] if epoch == self._start[0] else 0
        for window in self.windows(epoch):
            count = -(-len(window) // (self.batch_size * self.world))
            if skip >= count:
                skip -= count
                continue
            tokens = int(self.targets[window].sum())
            longest_first = window[np.argsort(-self.lengths[window], kind="stable")]
            mine = longest_first[self.rank :: self.world].tolist()
            for i in range(skip, count):
                part = tuple(mine[i * self.batch_size : (i + 1) * self.batch_size])
                yield MicroBatch(part, tokens, len(window))
            skip = 0


class Sequential(Sampler[MicroBatch]):
    """A validation set in its own order, without padding: no sample is repeated on any rank.

    `step_tokens` and `step_sequences` count the whole set, so that summed token losses divided by
    `step_tokens` give its exact mean. Ranks with fewer samples end with empty micro-batches.

    Args:
        ids: Dataset indices to go through [n].
        targets: Supervised tokens of each dataset sample, indexed by dataset index.
        batch_size: Samples per micro-batch and rank.
        world: Number of ranks.
        rank: This rank.
    """

    def __init__(
        self,
        ids: Sequence[int] | np.ndarray,
        targets: Sequence[int] | np.ndarray,
        batch_size: int,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        assert 0 <= rank < world and batch_size > 0
        self.ids = np.asarray(ids, dtype=np.int64)
        self.tokens = int(np.asarray(targets, dtype=np.int64)[self.ids].sum())
        self.batch_size = batch_size
        self.world = world
        self.rank = rank

    def __len__(self) -> int:
        return -(-len(self.ids) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[MicroBatch]:
        mine = self.ids[self.rank :: self.world].tolist()
        for i in range(len(self)):
            part = tuple(mine[i * self.batch_size : (i + 1) * self.batch_size])
            yield MicroBatch(part, self.tokens, len(self.ids))
