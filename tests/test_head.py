"""The fused head: the dense form's numbers, at the cost and in the memory that it promises."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from formulas import ALL, Halfway
from gift_lightning import head, matmul
from gift_lightning.functional import IGNORED, token_loss
from gift_lightning.head import Head, ProjectedRows, fused_token_loss, head_loss
from gift_lightning.target import Target
from gift_lightning.targets import (
    DEFT,
    DFT,
    FLOW,
    GEM,
    GIFT,
    IWSFT,
    PSFT,
    SFTKL,
    Distillation,
    EntropyBonus,
    GIFTExact,
    OneHot,
    TargetSFT,
)

every_target = pytest.mark.parametrize("target", ALL, ids=repr)
SOME = [OneHot(), DFT(), GIFT(3.0), TargetSFT(), GEM(), SFTKL(0.3, "reverse"), IWSFT(), Halfway()]
some_targets = pytest.mark.parametrize("target", SOME, ids=repr)


@dataclass(frozen=True)
class Inputs:
    """Everything that a fused loss may be given; a fifth of the tokens is not supervised."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    reference_bias: Tensor
    old_logp: Tensor
    sequence_ids: Tensor

    @property
    def extras(self) -> dict[str, Tensor]:
        names = ("reference_hidden", "reference_weight", "reference_bias", "old_logp")
        return {k: getattr(self, k) for k in (*names, "sequence_ids")}

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias))


def make_inputs(
    dtype: torch.dtype = torch.float64, n: int = 29, d: int = 11, e: int = 7, v: int = 21
) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, v, (n,), generator=g)
    labels[::5] = IGNORED
    return Inputs(
        normal(n, d), normal(v, d), normal(v), labels, normal(n, e), normal(v, e), normal(v),
        normal(n) - 3, torch.arange(n) // 9,
    )  # fmt: skip


def dense(
    target: Target, x: Inputs, leaves: tuple[Tensor, ...], scale: float = 1.0, cap: Any = None
) -> Tensor:
    """token_loss of the logits, made as a model makes them."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = scale * torch.nn.functional.linear(hidden, weight, bias)
        return z if cap is None else cap * torch.tanh(z / cap)

    return token_loss(
        target,
        logits(*leaves),
        x.labels,
        reference_logits=logits(x.reference_hidden, x.reference_weight, x.reference_bias),
        old_logp=x.old_logp,
        sequence_ids=x.sequence_ids,
    )


def fused(
    target: Target, x: Inputs, leaves: tuple[Tensor, ...], scale: float = 1.0, cap: Any = None,
    chunk_size: int | None = 8, **more: Any,
) -> Tensor:  # fmt: skip
    return fused_token_loss(
        leaves[0], leaves[1], x.labels, target, bias=leaves[2], logit_scale=scale, softcap=cap,
        chunk_size=chunk_size, **{**x.extras, **more},
    )  # fmt: skip


def gradients(loss: Tensor, leaves: tuple[Tensor, ...], retain: bool = False) -> Any:
    return torch.autograd.grad(loss, leaves, retain_graph=retain)


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        unit = max(1.0, float(b.detach().abs().max()) if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * unit)


# The same numbers.


@every_target
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, 5.0)], ids=["plain", "capped"])
def test_equals_the_dense_form(
    target: Target, dtype: torch.dtype, tolerance: float, scale: float, cap: float | None
) -> None:
    """Value, dHidden, dWeight, dBias, for a mean and for weights that differ by token."""
    x = make_inputs(dtype)
    plain, leaves = x.leaves(), x.leaves()
    expected = dense(target, x, plain, scale, cap)
    loss = fused(target, x, leaves, scale, cap)
    assert_same([loss], [expected], tolerance)
    weights = torch.linspace(-1, 2, len(loss), dtype=dtype)
    for reduce in (torch.mean, lambda y: (y * weights).sum()):
        found = gradients(reduce(fused(target, x, leaves, scale, cap)), leaves)
        assert_same(found, gradients(reduce(expected), plain, retain=True), tolerance)


@every_target
@pytest.mark.parametrize("chunk_size", [1, 7, 10**6, None])
def test_chunks_change_nothing(target: Target, chunk_size: int | None) -> None:
    x = make_inputs()
    leaves = x.leaves()
    whole = fused(target, x, leaves, chunk_size=24)
    loss = fused(target, x, leaves, chunk_size=chunk_size)
    assert_same([loss], [whole], 1e-12)
    assert_same(gradients(loss.sum(), leaves), gradients(whole.sum(), leaves), 1e-12)


@some_targets
def test_scale_alone_and_no_bias(target: Target) -> None:
    x = make_inputs()
    x = replace(x, bias=torch.zeros_like(x.bias), reference_bias=torch.zeros_like(x.bias))
    hidden, weight, bias = x.leaves()
    expected = dense(target, x, (hidden, weight, bias), 0.5)
    loss = fused(target, x, (hidden, weight, None), 0.5, reference_bias=None)
    assert_same([loss], [expected], 1e-10)
    found = gradients(loss.sum(), (hidden, weight))
    assert_same(found, gradients(expected.sum(), (hidden, weight)), 1e-10)


@some_targets
def test_the_reference_may_share_the_students_head(target: Target) -> None:
    """Without reference_weight: the student's weight and bias, and no gradient through them."""
    x = make_inputs(e=11)
    plain, leaves = x.leaves(), x.leaves()
    x = replace(x, reference_weight=x.weight, reference_bias=x.bias)
    expected = dense(target, x, plain)
    loss = fused(target, x, leaves, reference_weight=None, reference_bias=None)
    assert_same([loss], [expected], 1e-10)
    assert_same(gradients(loss.sum(), leaves), gradients(expected.sum(), plain), 1e-10)


@some_targets
def test_tied_weights(target: Target) -> None:
    """The head's weight is also the embedding: both gradients arrive, none twice."""
    x = make_inputs()
    ids = torch.arange(len(x.labels)) % len(x.weight)
    results = []
    for loss_of in (dense, fused):
        hidden, weight, bias = x.leaves()
        loss = loss_of(target, x, (torch.tanh(weight[ids]) + hidden, weight, bias))
        (loss.sum() + weight.square().sum()).backward()
        results.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    assert_same(results[1], results[0], 1e-10)


@some_targets
def test_token_weight_is_a_factor(target: Target) -> None:
    x = make_inputs()
    plain, leaves = x.leaves(), x.leaves()
    weights = torch.linspace(-1, 2, len(x.labels), dtype=torch.float64)
    expected = dense(target, x, plain) * weights
    loss = fused(target, x, leaves, token_weight=weights)
    assert_same([loss], [expected], 1e-10)
    found = gradients(loss.mean(), leaves, retain=True)
    assert_same(found, gradients(expected.mean(), plain, retain=True), 1e-10)
    upstream = torch.linspace(3, 1, len(loss), dtype=torch.float64)
    found = gradients((fused(target, x, leaves, token_weight=weights) * upstream).sum(), leaves)
    assert_same(found, gradients((expected * upstream).sum(), plain), 1e-10)


@some_targets
def test_a_second_backward_pass(target: Target) -> None:
    x = make_inputs()
    leaves = x.leaves()
    loss = fused(target, x, leaves).mean()
    first = gradients(loss, leaves, retain=True)
    first = [g.clone() for g in first]
    assert_same(gradients(loss, leaves, retain=True), first, 1e-12)
    assert_same(gradients(2 * loss, leaves), [2 * g for g in first], 1e-12)


def test_two_losses_accumulate() -> None:
    """Two micro-batches are the mean over all their tokens."""
    x = make_inputs()
    whole, parts = x.leaves(), x.leaves()
    n = int((x.labels != IGNORED).sum())
    (fused(GIFT(3.0), x, whole).sum() / n).backward()
    for rows in (slice(0, 10), slice(10, None)):
        y = replace(x, **{k: getattr(x, k)[rows] for k in _by_token(x)})
        (fused(GIFT(3.0), y, (parts[0][rows], *parts[1:])).sum() / n).backward()
    assert_same([p.grad for p in parts], [p.grad for p in whole], 1e-12)


def _by_token(x: Inputs) -> list[str]:
    return [k for k in x.__dataclass_fields__ if len(getattr(x, k)) == len(x.labels)]


@some_targets
def test_no_supervised_token_is_a_connected_zero(target: Target) -> None:
    """Such a micro-batch must not break data-parallel training: every gradient is there, and 0."""
    x = make_inputs()
    x = replace(x, labels=torch.full_like(x.labels, IGNORED))
    leaves = x.leaves()
    loss = fused(target, x, leaves)
    assert torch.equal(loss, torch.zeros_like(loss)) and loss.requires_grad
    loss.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in leaves)


@some_targets
def test_no_token_at_all(target: Target) -> None:
    x = make_inputs()
    x = replace(x, **{k: getattr(x, k)[:0] for k in _by_token(x)})
    leaves = x.leaves()
    loss = fused(target, x, leaves)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in leaves)


def test_unsupervised_tokens_may_hold_anything() -> None:
    x = make_inputs()
    hidden, reference_hidden = x.hidden.clone(), x.reference_hidden.clone()
    hidden[::5], reference_hidden[::5] = math.nan, math.inf
    dirty = replace(x, hidden=hidden, reference_hidden=reference_hidden)
    leaves = dirty.leaves()
    loss = fused(GIFT(3.0), dirty, leaves)
    loss.sum().backward()
    assert_same([loss], [fused(GIFT(3.0), x, x.leaves())], 1e-12)
    assert all(bool(p.grad.isfinite().all()) for p in leaves)
    assert bool((leaves[0].grad[::5] == 0).all())


@every_target
@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
def test_a_bias_may_mask_classes(target: Target, cap: float | None) -> None:
    """Padding of the vocabulary: a bias of −inf, of the student or both; a cap undoes it."""
    x = make_inputs()
    masked = [k for k in range(21) if k not in x.labels.tolist()]
    assert masked
    for reference_too in (True, False):
        bias, reference_bias = x.bias.clone(), x.reference_bias.clone()
        bias[masked] = -math.inf
        if reference_too:
            reference_bias[masked] = -math.inf
        y = replace(x, bias=bias, reference_bias=reference_bias)
        plain, leaves = y.leaves(), y.leaves()
        expected, loss = dense(target, y, plain, 1.0, cap), fused(target, y, leaves, 1.0, cap)
        assert_same([loss], [expected], 1e-10)
        found = gradients(loss.sum(), leaves)
        assert_same(found, gradients(expected.sum(), plain), 1e-10)
        assert bool((found[2][masked] == 0).all())


# Number formats.


@every_target
def test_bfloat16_is_computed_in_float32(target: Target) -> None:
    """The numbers of float32 for the same rounded inputs; gradients come back rounded."""
    x = make_inputs(torch.bfloat16)
    x = replace(x, old_logp=x.old_logp.float())
    wide = Inputs(*(y if y.dtype == torch.long else y.float() for y in vars(x).values()))
    plain, leaves = wide.leaves(), x.leaves()
    expected, loss = fused(target, wide, plain), fused(target, x, leaves)
    assert loss.dtype == torch.float32
    assert_same([loss], [expected], 1e-6)
    found = gradients(loss.mean(), leaves)
    for a, b in zip(found, gradients(expected.mean(), plain), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.bfloat16().float(), rtol=2**-7, atol=1e-6)


def test_bfloat16_heads_wider_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow head is widened a block of the vocabulary at a time."""
    monkeypatch.setattr(matmul, "_VOCABULARY_BLOCK", 10)
    test_bfloat16_is_computed_in_float32(GIFT(3.0))


def test_float32_hidden_states_with_a_bfloat16_head() -> None:
    x = make_inputs(torch.float32)
    x = replace(x, weight=x.weight.bfloat16(), reference_weight=x.reference_weight.bfloat16())
    wide = replace(x, weight=x.weight.float(), reference_weight=x.reference_weight.float())
    plain, leaves = wide.leaves(), x.leaves()
    expected, loss = fused(GIFT(3.0), wide, plain), fused(GIFT(3.0), x, leaves)
    assert_same([loss], [expected], 1e-6)
    for a, b in zip(gradients(loss.sum(), leaves), gradients(expected.sum(), plain), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=1e-5)


@some_targets
def test_autocast_does_not_round_the_head(target: Target) -> None:
    x = make_inputs(torch.float32)
    plain, leaves = x.leaves(), x.leaves()
    expected = fused(target, x, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused(target, x, leaves)
        mean = loss.mean()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert_same(gradients(mean, leaves), gradients(expected.mean(), plain), 1e-6)


def test_hidden_states_that_autocast_made() -> None:
    """A bfloat16 backbone under autocast, with a float32 head."""
    x = make_inputs(torch.float32)
    leaves = x.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = torch.nn.functional.linear(leaves[0], torch.eye(11))
        assert hidden.dtype == torch.bfloat16
        fused(GIFT(3.0), x, (hidden, *leaves[1:])).mean().backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in leaves)


def test_many_chunks_accumulate_in_float32() -> None:
    """With bfloat16 inputs too: 400 small terms are not lost to rounding."""
    x = make_inputs(torch.bfloat16, n=400)
    leaves = x.leaves()
    fused(OneHot(), x, leaves, chunk_size=1).sum().backward()
    wide = Inputs(*(y if y.dtype == torch.long else y.double() for y in vars(x).values()))
    exact = wide.leaves()
    fused(OneHot(), wide, exact).sum().backward()
    torch.testing.assert_close(leaves[1].grad.double(), exact[1].grad, rtol=2**-7, atol=1e-3)


# Logits of a large head on a CPU, which are oneDNN's.


onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@onednn
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the switch itself
def test_logits_of_a_large_head() -> None:
    hidden, weight = torch.randn(65, 24), torch.randn(matmul._MANY, 24)
    expected = hidden.double() @ weight.double().t()
    assert matmul._by_onednn(hidden, weight)
    for n in (0, 1, 65):
        found = matmul.matmul_nt(hidden[:n], weight, None)
        torch.testing.assert_close(found.double(), expected[:n], rtol=1e-5, atol=1e-5)
    assert matmul.matmul_nt(hidden, weight.requires_grad_(), None).requires_grad
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert not matmul._by_onednn(hidden, weight)
    for other in (weight[1:], weight.double(), weight.bfloat16()):
        assert not matmul._by_onednn(hidden.to(other.dtype), other.detach())


@onednn
@some_targets
def test_a_large_head_gives_the_same(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_MANY", 1)
    test_equals_the_dense_form(target, torch.float32, 1e-5, 0.7, 5.0)


@onednn
@pytest.mark.parametrize("target", [OneHot(), GIFT(3.0), GIFTExact(3.0), IWSFT()], ids=repr)
def test_logits_are_gone_before_the_next(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made anew for each chunk."""
    monkeypatch.setattr(matmul, "_MANY", 1)
    made: dict[int, list[weakref.ref]] = {}
    original = head.matmul_nt

    def call(hidden: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        before = made.setdefault(weight.shape[1], [])
        assert all(x() is None for x in before)
        result = original(hidden, weight, out)
        assert out is None or result.data_ptr() != out.data_ptr()
        before.append(weakref.ref(result))
        return result

    monkeypatch.setattr(head, "matmul_nt", call)
    x = make_inputs(torch.float32)
    fused(target, x, x.leaves())
    assert len(made[11]) >= 3


# Who pays for what.


@pytest.fixture
def matmuls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How often the head multiplies by a weight of how many columns, by kind of product."""
    counts: Counter = Counter()

    def counted(name: str, columns: Any) -> None:
        original = getattr(head, name)

        def call(*args: Any) -> Any:
            counts[name.strip("_"), columns(*args)] += 1
            return original(*args)

        monkeypatch.setattr(head, name, call)

    counted("matmul_nt", lambda h, w, out: w.shape[1])
    counted("matmul_nn", lambda g, w, dtype: w.shape[1])
    counted("add_matmul_tn", lambda total, g, h: h.shape[1])
    yield counts


def expected_matmuls(target: Target, chunks: int) -> dict[tuple[str, int], int]:
    """11 columns are the student's, 7 the reference's."""
    reads = target.needs_reference
    if isinstance(target, FLOW | IWSFT) and target.ahead_reads:
        reads = False  # nothing of the reference but its sequence statistics
    if target == TargetSFT(0.0):
        reads = False  # DFT
    projections = {
        11: 1 + ("student" in target.ahead_reads),
        7: reads + ("reference" in target.ahead_reads),
    }
    count = {("matmul_nt", d): k * chunks for d, k in projections.items() if k}
    return count | {("matmul_nn", 11): chunks, ("add_matmul_tn", 11): chunks}


@every_target
def test_three_products_and_one_for_the_reference(target: Target, matmuls: Counter) -> None:
    """Per chunk: one projection and two gradients, and one projection where a reference is read."""
    x = make_inputs(n=29)  # 23 supervised tokens: 3 chunks of at most 8
    leaves = x.leaves()
    fused(target, x, leaves).mean().backward()
    assert dict(matmuls) == expected_matmuls(target, 3)


def test_weights_that_come_late_cost_another_pass(matmuls: Counter) -> None:
    x = make_inputs()
    leaves = x.leaves()
    weights = torch.linspace(1, 2, len(x.labels), dtype=torch.float64)
    fused(OneHot(), x, leaves, token_weight=weights).sum().backward()
    assert matmuls["matmul_nt", 11] == 3
    (fused(OneHot(), x, leaves) * weights).sum().backward()
    assert matmuls["matmul_nt", 11] == 9


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@some_targets
def test_evaluation_makes_no_gradient(target: Target, context: Any, matmuls: Counter) -> None:
    x = make_inputs()
    with context():
        loss = fused(target, x, x.leaves())
    assert not loss.requires_grad
    assert {kind for kind, _ in matmuls} == {"matmul_nt"}
    assert_same([loss], [dense(target, x, x.leaves())], 1e-10)


@some_targets
def test_a_frozen_head_gets_no_gradient(target: Target, matmuls: Counter) -> None:
    """LoRA: the hidden states' gradient only, and no memory of the weight's size."""
    x = make_inputs()
    plain, (hidden, weight, bias) = x.leaves(), x.leaves()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    with Produced() as produced:
        loss = fused(target, x, (hidden, weight, bias))
        loss.mean().backward()
    assert weight.grad is None and bias.grad is None
    assert ("add_matmul_tn", 11) not in matmuls
    assert weight.shape not in produced.shapes
    assert_same([hidden.grad], gradients(dense(target, x, plain).mean(), plain[:1]), 1e-10)


@some_targets
def test_frozen_hidden_states(target: Target, matmuls: Counter) -> None:
    """A head that is trained alone."""
    x = make_inputs()
    plain, (hidden, weight, bias) = x.leaves(), x.leaves()
    hidden.requires_grad_(False)
    fused(target, x, (hidden, weight, bias)).mean().backward()
    assert ("matmul_nn", 11) not in matmuls
    expected = gradients(dense(target, x, plain).mean(), plain[1:])
    assert_same([weight.grad, bias.grad], expected, 1e-10)


class Produced(TorchDispatchMode):
    """The shapes and storage sizes of all tensors that any operation makes, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter = Counter()
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        seen = {id(x) for x in args}
        for y in result if isinstance(result, list | tuple) else [result]:
            if isinstance(y, Tensor) and id(y) not in seen:
                self.shapes[y.shape] += 1
                self.largest = max(self.largest, y.untyped_storage().nbytes() // y.itemsize)
        return result


@every_target
def test_no_tensor_of_tokens_by_vocabulary(target: Target) -> None:
    """Nothing larger than a chunk's logits or the head itself is ever made."""
    x = make_inputs(torch.float32, n=96, d=5, e=6, v=128)
    leaves = x.leaves()
    with Produced() as produced:
        fused(target, x, leaves, chunk_size=8).mean().backward()
    n = int((x.labels != IGNORED).sum())
    assert not any(128 in shape and n in shape for shape in produced.shapes)
    assert produced.largest <= 8 * 128
    with Produced() as produced:
        dense(target, x, leaves).mean().backward()
    assert produced.largest >= n * 128, "the dense form does make one, and would be seen"


def test_what_is_kept_until_the_backward_pass() -> None:
    """The gradients, and the inputs: no logits."""
    x = make_inputs(torch.float32, n=96, d=5, e=6, v=128)
    kept: list[int] = []

    def pack(y: Tensor) -> Tensor:
        kept.append(y.numel())
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        fused(GIFT(3.0), x, x.leaves(), chunk_size=8)
    assert max(kept) <= 128 * 5


def test_the_default_chunk_is_about_two_to_the_24_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = head.chunks

    def spy(n: int, size: int) -> Iterator[slice]:
        sizes.append(size)
        return original(n, size)

    monkeypatch.setattr(head, "chunks", spy)
    x = make_inputs(torch.float32, d=1, e=1, v=200_000)
    fused(OneHot(), x, (x.hidden, x.weight, x.bias), chunk_size=None)
    assert sizes[-1] == 128
    assert matmul.default_chunk(torch.empty(200_000, 1, device="meta")) == 192, (
        "twice, on an accelerator"
    )


# Diagnostics and errors.


@every_target
def test_statistics_do_not_depend_on_chunks(target: Target) -> None:
    x = make_inputs()
    kept = x.labels != IGNORED
    hidden = x.hidden[kept].requires_grad_()

    def statistics(chunk_size: int) -> Any:
        return head_loss(
            hidden,
            Head(x.weight, x.bias),
            x.labels[kept],
            target,
            reference=ProjectedRows(
                x.reference_hidden[kept], Head(x.reference_weight, x.reference_bias)
            ),
            old_logp=x.old_logp[kept],
            sequence_ids=x.sequence_ids[kept],
            chunk_size=chunk_size,
            diagnose=True,
        )

    (loss, whole), (_, chunked) = statistics(10**6), statistics(4)
    names = [k for k in vars(whole) if k != "gradient"]
    for name in names:
        found, expected = getattr(chunked, name), getattr(whole, name)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert not found.requires_grad
    assert torch.equal(whole.value, loss)
    z = torch.nn.functional.linear(x.hidden[kept], x.weight, x.bias)
    p = torch.distributions.Categorical(logits=z)
    torch.testing.assert_close(whole.nll, -p.log_prob(x.labels[kept]))
    torch.testing.assert_close(whole.entropy, p.entropy())
    r = torch.nn.functional.linear(x.reference_hidden[kept], x.reference_weight, x.reference_bias)
    r = torch.distributions.Categorical(logits=r)
    torch.testing.assert_close(whole.kl_reference, torch.distributions.kl_divergence(p, r))


def test_a_reference_that_is_not_read_is_not_projected(matmuls: Counter) -> None:
    x = make_inputs()
    for target in (OneHot(), DFT(), EntropyBonus(0.1), DEFT("cayley")):
        fused(target, x, x.leaves()).mean().backward()
    assert ("matmul_nt", 7) not in matmuls


@every_target
def test_absent_classes_cost_no_projection_and_no_copy(target: Target, matmuls: Counter) -> None:
    """The reference is masked where it is made, if it is made."""
    x = make_inputs()
    x = replace(x, bias=torch.where(torch.arange(21) == 3, -math.inf, x.bias))
    x = replace(x, labels=torch.where(x.labels == 3, 4, x.labels))
    leaves = x.leaves()
    fused(target, x, leaves).mean().backward()
    assert dict(matmuls) == expected_matmuls(target, 3)
    with Named("masked_fill") as masked:
        fused(GIFT(3.0), x, leaves)
    assert masked.count == 3, "only for the student's cross-entropy, once in a chunk"


class Named(TorchDispatchMode):
    """How often an operation of this name is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function._schema.name == f"aten::{self.name}"
        return function(*args, **(kwargs or {}))


def test_a_target_that_lacks_what_it_reads_is_refused() -> None:
    x = make_inputs()
    for target in (GIFT(), GIFTExact(), Distillation(), FLOW(1.0)):
        with pytest.raises(ValueError, match="needs a reference"):
            fused_token_loss(x.hidden, x.weight, x.labels, target)
    with pytest.raises(ValueError, match="needs the old policy"):
        fused_token_loss(x.hidden, x.weight, x.labels, PSFT())
    with pytest.raises(ValueError, match="found from the data"):
        fused(GIFT(trust=0.9), x, x.leaves())


def unchecked(function: Any) -> Any:
    """The function as a user has it, without the type checks of the tests."""
    return getattr(function, "__wrapped__", function)


def test_another_vocabulary_is_refused() -> None:
    x = make_inputs()
    with pytest.raises(ValueError, match="vocabulary has 20 entries, the student's 21"):
        unchecked(fused_token_loss)(
            x.hidden, x.weight, x.labels, GIFT(), reference_hidden=x.reference_hidden,
            reference_weight=x.reference_weight[:-1],
        )  # fmt: skip


@pytest.mark.parametrize("name", ["labels", "reference_hidden", "old_logp", "sequence_ids"])
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    """Promised by the docstring, also without the type checks of the tests."""
    x = make_inputs()
    short = replace(x, **{name: getattr(x, name)[:-1]})
    extras = short.extras
    with pytest.raises(ValueError):
        unchecked(fused_token_loss)(x.hidden, x.weight, short.labels, PSFT(), **extras)
