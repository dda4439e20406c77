"""A categorical distribution over the vocabulary for each of n labelled tokens."""

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scalar = float | Tensor


class Distribution:
    """A categorical distribution over the vocabulary for each of n labelled tokens.

    Everything is computed once, on first use, in the dtype of the logits, without gradient. A logit
    of -inf means that the class does not exist.

    Args:
        logits: [n, v] unnormalised log-probabilities, or a function that makes them when needed.
        labels: [n] the demonstrated token of each row.
        logp_y: [n] log-probability of the label, where it is known without the row.
        buffer: [n, v] memory that the probabilities may be written to.
        p: makes the probabilities, where that takes no softmax.
    """

    def __init__(
        self,
        logits: Float[Tensor, "n v"] | Callable[[], Tensor],
        labels: Int[Tensor, " n"],
        logp_y: Float[Tensor, " n"] | None = None,
        buffer: Float[Tensor, "n v"] | None = None,
        p: Callable[[], Tensor] | None = None,
    ) -> None:
        self._logits = logits
        self._buffer = buffer
        self._p = p
        self.labels = labels
        if logp_y is not None:
            self.__dict__["logp_y"] = logp_y  # a cached_property that is already there

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
        if self._p is not None:
            return self._p()
        if self._buffer is None:
            return self.logits.softmax(-1)
        return torch.softmax(self.logits, -1, out=self._buffer)

    @cached_property
    def top(self) -> Float[Tensor, " n"]:
        """The largest logit of each row."""
        return self.logits.amax(-1)

    @cached_property
    def lse(self) -> Float[Tensor, " n"]:
        """log Σ_k exp z_k, read off the softmax at its largest entry, where it is exact."""
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

    def cross_entropy(self, q: Float[Tensor, "#n #v"]) -> Float[Tensor, " n"]:
        """−Σ_k q_k log p_k in nats, Σ q = 1; a q of one column is the same for all k."""
        z = self.logits if self.absent is None else self.logits.masked_fill(self.absent, 0.0)
        dot = (q[:, 0] * z.sum(-1)) if q.shape[-1] == 1 else row_dot(q, z)
        return self.lse - dot

    def tempered(self, temperature: float) -> "Distribution":
        return Distribution(self.logits / temperature, self.labels)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product of two [n, v] tensors without a temporary of their size."""
    if a.is_cuda:
        return torch.linalg.vecdot(a, b)
    # Three times faster than vecdot on a CPU, for the rows of a vocabulary.
    rows = [torch.dot(x, y) for x, y in zip(a, b, strict=True)]
    return torch.stack(rows) if rows else b.sum(-1)
