"""Matrix products of a language-model head in float32 or better, however narrow the inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Parameter

_VOCABULARY_BLOCK = 8192  # rows of a half-precision head that are widened at a time
_MANY = 2**14  # classes from which on oneDNN makes logits faster than MKL
_all_chunks = ContextVar("all_chunks", default=True)


def math_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for anything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def default_chunk(weight: Tensor) -> int:
    """Rows for a head [v, d] of about 2²⁵ logits in all, of 2²⁴ on a CPU; a multiple of 64."""
    # Smaller costs a CPU no time; an accelerator would wait for the head's gradient.
    logits = 2**24 if weight.device.type == "cpu" else 2**25
    return max(64, -(-(logits // len(weight)) // 64) * 64)


@contextmanager
def two_chunks() -> Iterator[None]:
    """In here two chunks of tokens stand for all: the memory is theirs, the results are not."""
    token = _all_chunks.set(False)
    try:
        yield
    finally:
        _all_chunks.reset(token)


def chunks(n: int, size: int) -> Iterator[slice]:
    """Of n tokens, `size` at a time."""
    starts = range(0, n, size)
    return _slices(starts if _all_chunks.get() else starts[:2], size, n)


def _slices(starts: range, size: int, end: int) -> Iterator[slice]:
    return (slice(i, min(i + size, end)) for i in starts)


def _fused_half(a: Tensor, b: Tensor) -> bool:
    """Whether the device multiplies half-precision matrices into float32 by itself."""
    return a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def _blocks(weight: Tensor) -> Iterator[slice]:
    return _slices(range(0, len(weight), _VOCABULARY_BLOCK), _VOCABULARY_BLOCK, len(weight))


def _by_onednn(hidden: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN makes the logits. A CPU's float32 products are MKL's otherwise, which is the
    slower for those of a large head (BENCHMARKS.md), and the faster for those of a small one."""
    library, is_cpu = torch.backends.mkldnn, hidden.device.type == "cpu"
    return (
        is_cpu
        and len(weight) >= _MANY
        and len(hidden) > 0
        and hidden.dtype == weight.dtype == torch.float32
        and {type(hidden), type(weight)} <= {Tensor, Parameter}  # and none without data
        and not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))
        and library.is_available()
        and bool(library.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def matmul_nt(hidden: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """hidden @ weight.T in float32 or better, however narrow the inputs; `out` may hold it."""
    wide = math_dtype(hidden)
    if _fused_half(hidden, weight):
        return torch.mm(hidden, weight.t(), out_dtype=wide)
    hidden = hidden.to(wide)
    if out is not None and out.dtype != wide:  # a float32 reference of a float64 student
        return out.copy_(matmul_nt(hidden, weight, None))
    if _by_onednn(hidden, weight):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
        return product
    if weight.dtype == wide:
        return torch.mm(hidden, weight.t(), out=out)
    if out is None:
        out = hidden.new_empty(len(hidden), len(weight))
    for block in _blocks(weight):
        out[:, block] = hidden @ weight[block].to(wide).t()
    return out


def matmul_nn(g: Tensor, weight: Tensor, hidden_dtype: torch.dtype) -> Tensor:
    """g @ weight in g's dtype."""
    if g.is_cuda and weight.dtype == hidden_dtype != g.dtype:
        return torch.mm(g.to(weight.dtype), weight, out_dtype=g.dtype)
    if weight.dtype == g.dtype:
        return g @ weight
    out = g.new_zeros(len(g), weight.shape[1])
    for block in _blocks(weight):
        out.addmm_(g[:, block], weight[block].to(g.dtype))
    return out


def add_matmul_tn(total: Tensor, g: Tensor, hidden: Tensor) -> None:
    """total += g.T @ hidden, accumulated in float32 or better."""
    if g.is_cuda and hidden.dtype != g.dtype:
        torch.addmm(total, g.to(hidden.dtype).t(), hidden, out_dtype=g.dtype, out=total)
    else:
        total.addmm_(g.t(), hidden.to(g.dtype))
