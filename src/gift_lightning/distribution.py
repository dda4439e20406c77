"""A categorical distribution over the vocabulary for each of n labelled tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scalar = float | Tensor
_CACHED = 1 << 19  # numbers that a core's cache holds


@dataclass(frozen=True)
class Peaks:
    """[n, v] numbers that are even but for a few: row i is even_i + Σ_j above_ij·δ(ids_ij).

    What a truncated reference is made of. It is scaled and added to as the tensor would be. A loss
    and its gradient pass over the logits once more for it, and three times for the tensor, which
    itself has to be written before.

    Attributes:
        even: [n, 1] what every class has.
        ids: [n, k] classes that have more, or less.
        above: [n, k] how much; the entries of a class that stands twice are added.
        num_classes: v.
    """

    even: Float[Tensor, "n 1"]
    ids: Int[Tensor, "n k"]
    above: Float[Tensor, "n k"]
    num_classes: int

    def __mul__(self, factor: Scalar) -> "Peaks":
        return replace(self, even=self.even * factor, above=self.above * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> "Peaks":
        return replace(self, even=self.even / divisor, above=self.above / divisor)

    def __add__(self, added: Scalar) -> "Peaks":
        return replace(self, even=self.even + added)

    def at(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The entries of one class of each row."""
        return self.even[:, 0] + (self.above * (self.ids == labels[:, None])).sum(-1)

    def dot(self, rows: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        return self.even[:, 0] * rows.sum(-1) + (self.above * rows.gather(-1, self.ids)).sum(-1)

    def add_to(self, rows: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """rows + self, in place."""
        return rows.add_(self.even).scatter_add_(-1, self.ids, self.above)

    def dense(self, out: Float[Tensor, "n v"] | None = None) -> Float[Tensor, "n v"]:
        if out is None:
            out = self.even.new_empty(len(self.even), self.num_classes)
        return self.add_to(out.zero_())


class Distribution:
    """A categorical distribution over the vocabulary for each of n labelled tokens.

    Everything is computed once, on first use, in the dtype of the logits, without gradient. A logit
    of -inf means that the class does not exist.

    Args:
        logits: [n, v] unnormalised log-probabilities, or a function that makes them when needed.
        labels: [n] the demonstrated token of each row.
        logp_y: [n] log-probability of the label, where it is known without the row.
        buffer: [n, v] memory that the probabilities may be written to, or a function that gives it.
        peaks: the probabilities, where they are known by few numbers.
        complete: whether every class is known to exist, which takes a pass to find out.
    """

    def __init__(
        self,
        logits: Float[Tensor, "n v"] | Callable[[], Tensor],
        labels: Int[Tensor, " n"],
        logp_y: Float[Tensor, " n"] | None = None,
        buffer: Float[Tensor, "n v"] | Callable[[], Tensor] | None = None,
        peaks: Peaks | None = None,
        complete: bool = False,
    ) -> None:
        self._logits = logits
        self._buffer = buffer
        self._peaks = peaks
        self.labels = labels
        # A cached_property may be there already.
        if logp_y is not None:
            self.__dict__["logp_y"] = logp_y
        if complete:
            self.__dict__["absent"] = None

    @cached_property
    def logits(self) -> Float[Tensor, "n v"]:
        return self._logits() if callable(self._logits) else self._logits

    @cached_property
    def absent(self) -> Bool[Tensor, "n v"] | None:
        """Which classes do not exist, or None when all do (the usual case costs one reduction)."""
        z = self.logits
        return z.isneginf() if z.numel() and bool(z.amin().isneginf()) else None

    @cached_property
    def num_classes(self) -> Scalar:
        """Number of classes that exist: V, or [n, 1] where some logits are -inf."""
        absent = self.absent
        if absent is None:
            return float(self.logits.shape[-1])
        return (~absent).sum(-1, keepdim=True, dtype=self.logits.dtype)

    @cached_property
    def p(self) -> Float[Tensor, "n v"]:
        buffer = self._buffer() if callable(self._buffer) else self._buffer
        if self._peaks is not None:
            return self._peaks.dense(buffer)
        if buffer is None:
            return self.logits.softmax(-1)
        return torch.softmax(self.logits, -1, out=buffer)

    @property
    def mass(self) -> Float[Tensor, "n v"] | Peaks:
        """p, by few numbers where it is known so."""
        return self.p if self._peaks is None else self._peaks

    @cached_property
    def top(self) -> Float[Tensor, " n"]:
        """The largest logit of each row."""
        return self.logits.amax(-1)

    @cached_property
    def lse(self) -> Float[Tensor, " n"]:
        """log Σ_k exp z_k, read off the softmax at the label, or at its largest entry.

        That one is exact always, but takes two passes to find.
        """
        p_y = self.at_label(self.p)
        if self._peaks is None and bool((p_y > torch.finfo(p_y.dtype).tiny).all()):
            return self.at_label(self.logits) - p_y.log()
        return self.top - self.p.amax(-1).log()

    @cached_property
    def logp(self) -> Float[Tensor, "n v"]:
        return self.logits - self.lse[:, None]

    @cached_property
    def logp_y(self) -> Float[Tensor, " n"]:
        return self.at_label(self.logits) - self.lse

    @cached_property
    def p_y(self) -> Float[Tensor, " n"]:
        return self.logp_y.exp()

    @cached_property
    def entropy(self) -> Float[Tensor, " n"]:
        """H(p) in nats."""
        return self.cross_entropy(self.p)

    def at_label(self, rows: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        return rows.gather(-1, self.labels[:, None])[:, 0]

    def cross_entropy(self, q: Float[Tensor, "#n #v"] | Peaks) -> Float[Tensor, " n"]:
        """−Σ_k q_k log p_k in nats, Σ q = 1; a q of one column is the same for all k."""
        z = self.logits if self.absent is None else self.logits.masked_fill(self.absent, 0.0)
        if isinstance(q, Peaks):
            return self.lse - q.dot(z)
        dot = (q[:, 0] * z.sum(-1)) if q.shape[-1] == 1 else row_dot(q, z)
        return self.lse - dot

    def tempered(self, temperature: float) -> "Distribution":
        return Distribution(self.logits / temperature, self.labels)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product of two [n, v] tensors without a temporary of their size on a CPU.

    Rows are taken by what the cache of a core holds: as fast as a dot product of each for the rows
    of a large vocabulary, and a hundred times faster for those of a small one.
    """
    step = len(a) if a.is_cuda else _CACHED // a.shape[-1]
    pairs = zip(a.split(max(1, step)), b.split(max(1, step)), strict=True)
    return torch.cat([torch.linalg.vecdot(x, y) for x, y in pairs])
