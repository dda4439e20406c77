"""The fused head: any target's loss from hidden states, without keeping a [tokens, vocab] tensor.

For each chunk of supervised tokens the head projects the student's hidden states (and the
reference's), evaluates the target in closed form and turns the logit gradient at once into
gradients of the hidden states and of the head, accumulated in float32. One step therefore costs
three head matmuls, one more where the target reads a reference, and recomputes nothing; targets
that look ahead over whole sequences (`Target.ahead_reads`) pay one more projection for each
distribution they read ahead.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gift_lightning.distribution import Distribution, Peaks
from gift_lightning.functional import IGNORED, check_lengths
from gift_lightning.loss import Evaluation, evaluate
from gift_lightning.matmul import (
    add_matmul_tn,
    chunks,
    default_chunk,
    math_dtype,
    matmul_nn,
    matmul_nt,
)
from gift_lightning.target import LabelView, Target, Tokens


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · (hidden @ weight.T + bias) / cap), or without the cap."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def absent(self) -> Bool[Tensor, " v"] | None:
        """Which classes do not exist, or None: a bias of -inf, which a cap would make finite."""
        return None if self.bias is None or self.softcap is not None else self.bias.isneginf()

    def detached(self) -> "Head":
        """The same head, through which no gradient flows."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def project(self, hidden: Float[Tensor, "n d"], out: Tensor | None = None) -> Tensor:
        """[n, v] logits in float32 or better, which may be written to `out`."""
        logits = matmul_nt(hidden, self.weight, out)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backproject(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Turns ∂/∂logits into ∂/∂(hidden @ weight.T), in place; destroys `logits`."""
        if self.softcap is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@runtime_checkable
class ReferenceRows(Protocol):
    """The reference's distribution for the supervised tokens of one micro-batch, made on demand."""

    @property
    def logp_y(self) -> Float[Tensor, " n"] | None:
        """Label log-probabilities, where they are known without the rows."""

    def logits(self, rows: slice, out: Tensor | None = None) -> Float[Tensor, "c v"]:
        """Unnormalised log-probabilities of some tokens; may be written to `out`."""


@runtime_checkable
class KnownRows(ReferenceRows, Protocol):
    """Rows whose probabilities are known by few numbers, which need not be spread over [n, v]."""

    def peaks(self, rows: slice, dtype: torch.dtype) -> Peaks:
        """The probabilities of some tokens."""


@dataclass(frozen=True)
class ProjectedRows:
    """A reference given by its hidden states [n, d'] at the supervised tokens, and its head."""

    hidden: Float[Tensor, "n d"]
    head: Head
    logp_y: Float[Tensor, " n"] | None = None

    def logits(self, rows: slice, out: Tensor | None = None) -> Float[Tensor, "c v"]:
        return self.head.project(self.hidden[rows], out)


def fused_token_loss(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " n"],
    target: Target,
    *,
    reference_hidden: Float[Tensor, "n e"] | None = None,
    reference_weight: Float[Tensor, "v e"] | None = None,
    bias: Float[Tensor, " v"] | None = None,
    reference_bias: Float[Tensor, " v"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    old_logp: Float[Tensor, " n"] | None = None,
    sequence_ids: Int[Tensor, " n"] | None = None,
    token_weight: Float[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, " n"]:
    """Per-token loss of a target from hidden states, differentiable in hidden, weight and bias.

    Equal to `functional.token_loss` of the logits, in value and gradient. The gradient is made in
    the forward pass for a loss that weighs all tokens alike (a sum or a mean of the result); any
    other upstream gradient is right too, but recomputes the logits: give such weights as
    `token_weight`.

    Args:
        hidden: final hidden states; row i predicts labels[i]. Shifting is the caller's.
        weight: of the language-model head, tied or not; no gradient is made if it is frozen.
        labels: -100 where a token is not supervised; such tokens are never projected.
        target: the method.
        reference_hidden: the reference's final hidden states, where the target reads one.
        reference_weight: the reference's head; by default the student's.
        bias: of the head, likewise `reference_bias`.
        logit_scale: factor on the logits of student and reference.
        softcap: cap·tanh(logits/cap), of student and reference.
        old_logp: the old policy's label log-probabilities (PSFT).
        sequence_ids: which sequence each token belongs to; one sequence if not given.
        token_weight: factor on each token's finished loss, unlike `Target.label_weight`, a share of
            Q within the token.
        chunk_size: tokens projected at a time; by default about 2²⁵ logits, on a CPU 2²⁴.

    Raises:
        ValueError: if the target reads something that was not given, or shapes do not fit.
    """
    check_lengths(
        len(hidden),
        labels=labels,
        reference_hidden=reference_hidden,
        old_logp=old_logp,
        sequence_ids=sequence_ids,
        token_weight=token_weight,
    )
    kept = (labels != IGNORED).nonzero()[:, 0]
    head = Head(weight, bias, logit_scale, softcap)
    reference = None
    if reference_hidden is not None:
        if reference_weight is None:
            reference_weight, reference_bias = weight, bias
        if reference_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"the reference's vocabulary has {reference_weight.shape[0]} entries, the "
                f"student's {weight.shape[0]}: they need the same tokenizer and head size."
            )
        reference_head = replace(head, weight=reference_weight, bias=reference_bias).detached()
        reference = ProjectedRows(reference_hidden.detach()[kept], reference_head)

    def at_kept(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[kept]

    loss, _ = head_loss(
        hidden[kept],
        head,
        labels[kept],
        target,
        reference=reference,
        old_logp=at_kept(old_logp),
        sequence_ids=at_kept(sequence_ids),
        token_weight=at_kept(token_weight),
        chunk_size=chunk_size,
    )
    return loss.new_zeros(labels.shape).index_put((kept,), loss)


def head_loss(
    hidden: Float[Tensor, "n d"],
    head: Head,
    labels: Int[Tensor, " n"],
    target: Target,
    *,
    reference: ReferenceRows | None = None,
    old_logp: Float[Tensor, " n"] | None = None,
    sequence_ids: Int[Tensor, " n"] | None = None,
    token_weight: Float[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    diagnose: bool = False,
) -> tuple[Float[Tensor, " n"], Evaluation]:
    """`fused_token_loss` for tokens that are all supervised, with the diagnostics of `evaluate`.

    Args:
        hidden: [n, d]; n may be 0, which gives an empty loss connected to the graph.
        head: the student's.
        labels: [n], every one a vocabulary entry.
        target: the method.
        reference: of the same n tokens.
        old_logp, sequence_ids, token_weight, chunk_size: as in `fused_token_loss`.
        diagnose: whether entropy and divergences are wanted.
    """
    target.check(reference=reference is not None, old_policy=old_logp is not None)
    if sequence_ids is None:
        sequence_ids = torch.zeros_like(labels)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}.")
    if chunk_size is None:
        chunk_size = default_chunk(head.weight)
    job = _Job(
        head, labels, target, reference, old_logp, sequence_ids, token_weight, chunk_size, diagnose
    )
    bias = head.bias if head.bias is not None else hidden.new_zeros(0)
    loss, *stats = _FusedLoss.apply(hidden, head.weight, bias, job, torch.is_grad_enabled())
    return loss, Evaluation(gradient=None, **dict(zip(job.stats, stats, strict=True)))


@dataclass
class _Job:
    """What a pass over the chunks needs besides the differentiable tensors."""

    head: Head
    labels: Tensor
    target: Target
    reference: ReferenceRows | None
    old_logp: Tensor | None
    sequence_ids: Tensor
    token_weight: Tensor | None
    chunk_size: int
    diagnose: bool

    @property
    def stats(self) -> list[str]:
        """Which fields of `Evaluation` are wanted."""
        unwanted = {"gradient"}
        if not self.diagnose:
            unwanted |= {"entropy", "kl_target", "kl_reference"}
        elif self.reference is None:
            unwanted |= {"kl_reference"}
        return [f.name for f in fields(Evaluation) if f.name not in unwanted]


@dataclass
class _Pass:
    """Results of one pass over all chunks."""

    stats: dict[str, Tensor]
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None

    @property
    def wants_gradient(self) -> bool:
        return any(x is not None for x in (self.d_hidden, self.d_weight, self.d_bias))


class _Buffers:
    """Memory for the logits and probabilities of one chunk, used again by the next."""

    def __init__(self, hidden: Tensor, num_classes: int, chunk: int) -> None:
        self.dtype = dtype = math_dtype(hidden)
        # Not self.dtype: in a cycle with itself the memory would wait for the garbage collector.
        self._new = lambda: hidden.new_empty((chunk, num_classes), dtype=dtype)
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str, num_rows: int) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._new()
        return self._tensors[name][:num_rows]


def _run(hidden: Tensor, job: _Job, needs: tuple[bool, bool, bool]) -> _Pass:
    """Evaluates all chunks; `needs` says for which of hidden, weight, bias gradients are wanted."""
    head, n = job.head, len(job.labels)
    wide = math_dtype(hidden)
    buffers = _Buffers(hidden, head.weight.shape[0], min(n, job.chunk_size))
    known = None if job.reference is None else job.reference.logp_y
    ahead = _look_ahead(hidden, job, buffers)
    out = _Pass({k: torch.zeros(n, dtype=wide, device=hidden.device) for k in job.stats})
    if needs[0]:
        out.d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    if needs[1]:
        out.d_weight = torch.zeros(head.weight.shape, dtype=wide, device=hidden.device)
    if needs[2]:
        out.d_bias = torch.zeros(head.weight.shape[0], dtype=wide, device=hidden.device)
    for rows in chunks(n, job.chunk_size):
        _add(out, rows, hidden[rows], job, known, None if ahead is None else ahead[rows], buffers)
    return out


def _add(
    out: _Pass,
    rows: slice,
    h: Tensor,
    job: _Job,
    known: Tensor | None,
    ahead: Tensor | None,
    buffers: _Buffers,
) -> None:
    """One chunk's part of the results. Its logits are gone before the next chunk's are made, which
    may be in new memory (the buffer is then never touched)."""
    head, y, wide = job.head, job.labels[rows], buffers.dtype
    logits = head.project(h, buffers.get("logits", len(y)))
    t = Tokens(
        logits,
        y,
        reference=_reference(job, rows, known, buffers),
        old_logp=None if job.old_logp is None else job.old_logp[rows].to(wide),
        ahead=ahead,
        buffer=buffers.get("p", len(y)),
        complete=head.absent is None,
    )
    result = evaluate(job.target, t, gradient=out.wants_gradient, diagnose=job.diagnose)
    for name, kept in out.stats.items():
        kept[rows] = getattr(result, name)
    if result.gradient is not None:
        g = head.backproject(logits, result.gradient)
        if job.token_weight is not None:
            g.mul_(job.token_weight[rows].to(wide)[:, None])
        if out.d_hidden is not None:
            out.d_hidden[rows] = matmul_nn(g, head.weight, h.dtype)
        if out.d_weight is not None:
            add_matmul_tn(out.d_weight, g, h)
        if out.d_bias is not None:
            out.d_bias += g.sum(0)


def _reference(
    job: _Job, rows: slice, known: Tensor | None, buffers: _Buffers
) -> Distribution | None:
    reference = job.reference
    if reference is None:
        return None
    count, absent = rows.stop - rows.start, job.head.absent

    def logits() -> Tensor:
        z = reference.logits(rows, buffers.get("reference_logits", count))
        return z if absent is None else z.masked_fill_(absent, -math.inf)

    return Distribution(
        logits,
        job.labels[rows],
        None if known is None else known[rows],
        lambda: buffers.get("reference_p", count),
        reference.peaks(rows, buffers.dtype)
        if isinstance(reference, KnownRows) and absent is None
        else None,
    )


def _look_ahead(hidden: Tensor, job: _Job, buffers: _Buffers) -> Tensor | None:
    reads = job.target.ahead_reads
    if not reads:
        return None
    student = reference = None
    if "student" in reads:
        student = torch.zeros(len(job.labels), dtype=math_dtype(hidden), device=hidden.device)
    if "reference" in reads:
        assert job.reference is not None, "guarded by Target.check"
        known = job.reference.logp_y
        reference = torch.zeros_like(job.labels, dtype=math_dtype(hidden))
    for rows in chunks(len(job.labels), job.chunk_size):
        y = job.labels[rows]
        if student is not None:
            z = job.head.project(hidden[rows], buffers.get("logits", len(y)))
            student[rows] = Distribution(z, y, buffer=buffers.get("p", len(y))).logp_y
            del z  # before the next chunk's
        if reference is not None:
            base = _reference(job, rows, known, buffers)
            assert base is not None
            reference[rows] = base.logp_y
    return job.target.look_ahead(LabelView(student, reference, job.sequence_ids))


_kept_graph = False  # of the process: an accelerator's backward pass has threads of its own


@contextmanager
def kept_graph() -> Iterator[None]:
    """A backward pass in here leaves for the next one what that would otherwise compute again."""
    global _kept_graph
    _kept_graph = True
    try:
        yield
    finally:
        _kept_graph = False


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, job: _Job, with_grad: bool
    ) -> tuple[Tensor, ...]:
        needs = tuple(with_grad and need for need in ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            result = _run(hidden, job, needs)  # type: ignore[arg-type]
        value, weight_of = result.stats["value"], job.token_weight
        loss = value.clone() if weight_of is None else value * weight_of
        ctx.save_for_backward(hidden, weight, bias)
        ctx.job, ctx.needs, ctx.made = job, needs, result
        ctx.mark_non_differentiable(*result.stats.values())
        return (loss, *result.stats.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        made, kept = ctx.made, _kept_graph
        if not kept:
            ctx.made = None
        if made is None or not _is_uniform(upstream):
            # Weights that the forward pass did not know, or a second backward pass: once more.
            job = ctx.job
            known = upstream if job.token_weight is None else upstream * job.token_weight
            again = replace(job, token_weight=known, diagnose=False)
            with torch.autocast(hidden.device.type, enabled=False):
                made = _run(hidden, again, ctx.needs)
            factor = None
        else:
            factor = upstream[0] if len(upstream) else upstream.new_zeros(())

        def scaled(gradient: Tensor | None, like: Tensor) -> Tensor | None:
            if gradient is None:
                return None
            if factor is not None:
                gradient = gradient * factor if kept else gradient.mul_(factor)
            return gradient.to(like.dtype)

        return (
            scaled(made.d_hidden, hidden),
            scaled(made.d_weight, weight),
            scaled(made.d_bias, bias),
            None,
            None,
        )


def _is_uniform(upstream: Tensor) -> bool:
    if len(upstream) < 2 or upstream.stride(0) == 0:  # what sum() and mean() send
        return True
    return bool((upstream == upstream[0]).all())
