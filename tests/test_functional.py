"""`token_loss`, `label_mass` and `pass_at_k` as functions: what may be given, what comes back."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from formulas import ALL, CASES, FORMULAS, Case, make_case
from gift_lightning import functional, head
from gift_lightning.functional import IGNORED, label_mass, pass_at_k, token_loss
from gift_lightning.target import Target
from gift_lightning.targets import (
    DEFT,
    DFT,
    EAFT,
    GIFT,
    SFTKL,
    BeyondLog,
    Distillation,
    GIFTExact,
    LabelSmoothing,
    OneHot,
    TargetSFT,
)

every_target = pytest.mark.parametrize("target", ALL, ids=repr)


def loss_and_gradient(target: Target, c: Case) -> tuple[Tensor, Tensor]:
    z = c.z.clone().requires_grad_()
    loss = token_loss(target, z, c.labels, **c.extras)
    loss.sum().backward()
    return loss.detach(), z.grad


def assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def cast(c: Case, dtype: torch.dtype) -> Case:
    return replace(
        c,
        z=c.z.to(dtype),
        reference=c.reference.to(dtype),
        old_logp=c.old_logp.to(torch.promote_types(dtype, torch.float32)),
    )


# What flows where.


@every_target
def test_nothing_flows_but_into_the_logits(target: Target) -> None:
    c = CASES[0]
    reference, old = c.reference.clone().requires_grad_(), c.old_logp.clone().requires_grad_()
    z = c.z.clone().requires_grad_()
    extras = {"reference_logits": reference, "old_logp": old, "sequence_ids": c.sequence_ids}
    loss = token_loss(target, z, c.labels, **extras)
    loss.sum().backward()
    assert z.grad is not None and reference.grad is None and old.grad is None
    assert not token_loss(target, c.z, c.labels, **extras).requires_grad
    assert not label_mass(target, z, c.labels, **extras).requires_grad


@every_target
def test_inputs_are_left_alone(target: Target) -> None:
    c = CASES[0]
    before = [x.clone() for x in (c.z, c.labels, *c.extras.values())]
    loss_and_gradient(target, c)
    label_mass(target, c.z, c.labels, **c.extras)
    after = (c.z, c.labels, *c.extras.values())
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@every_target
def test_upstream_gradients_weigh_tokens(target: Target) -> None:
    c = CASES[0]
    _, gradient = loss_and_gradient(target, c)
    z = c.z.clone().requires_grad_()
    weights = torch.linspace(-1, 2, len(c.labels), dtype=torch.float64)
    (token_loss(target, z, c.labels, **c.extras) * weights).sum().backward()
    assert_same((z.grad,), (weights[:, None] * gradient,))


def test_the_second_derivative_is_refused() -> None:
    """The closed form is detached, so that a second derivative would be silently wrong."""
    z = CASES[0].z.clone().requires_grad_()
    loss = token_loss(OneHot(), z, CASES[0].labels).sum()
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


# Which tokens count.


@every_target
def test_unsupervised_tokens_are_not_there(target: Target) -> None:
    """As if their rows had been left out, whatever they hold."""
    c = CASES[0]
    ignored = torch.arange(len(c.labels)) % 3 == 1
    z, reference = c.z.clone(), c.reference.clone()
    z[ignored], reference[ignored] = math.nan, math.inf
    masked = replace(c, z=z, reference=reference, labels=c.labels.masked_fill(ignored, IGNORED))
    loss, gradient = loss_and_gradient(target, masked)
    assert bool((loss[ignored] == 0).all()) and bool((gradient[ignored] == 0).all())
    kept = Case(*(x[~ignored] for x in (c.z, c.labels, *c.extras.values())))
    assert_same((loss[~ignored], gradient[~ignored]), loss_and_gradient(target, kept))


@every_target
def test_no_supervised_token_at_all(target: Target) -> None:
    c = replace(CASES[0], labels=torch.full_like(CASES[0].labels, IGNORED))
    loss, gradient = loss_and_gradient(target, c)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert bool(label_mass(target, c.z, c.labels, **c.extras).isnan().all())


@every_target
def test_no_token_at_all(target: Target) -> None:
    c = CASES[0]
    empty = Case(*(x[:0] for x in (c.z, c.labels, *c.extras.values())))
    loss, gradient = loss_and_gradient(target, empty)
    assert loss.shape == (0,) and gradient.shape == (0, 23)


@every_target
def test_chunked_equals_whole(target: Target) -> None:
    """Sequence by sequence, in either order. Cayley DEFT looks at the whole micro-batch."""
    if target == DEFT("cayley"):
        pytest.skip("documented: its exponent has the mean probability of the micro-batch")
    c = CASES[0]
    loss, gradient = loss_and_gradient(target, c)
    for i in c.sequence_ids.unique():
        rows = c.sequence_ids == i
        part = Case(*(x[rows] for x in (c.z, c.labels, *c.extras.values())))
        assert_same(loss_and_gradient(target, part), (loss[rows], gradient[rows]))


@every_target
def test_tokens_of_one_sequence_may_lie_apart(target: Target) -> None:
    """sequence_ids may be any numbers and interleave; order within a sequence is what counts."""
    c = CASES[0]
    order = torch.tensor([4, 0, 8, 5, 1, 2, 6, 3, 7])
    loss, gradient = loss_and_gradient(target, c)
    mixed = Case(*(x[order] for x in (c.z, c.labels, *c.extras.values())))
    mixed = replace(mixed, sequence_ids=7 - 3 * mixed.sequence_ids)
    assert_same(loss_and_gradient(target, mixed), (loss[order], gradient[order]))


# Number formats.


@every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(target: Target, dtype: torch.dtype) -> None:
    """Exactly float32's numbers of the same rounded logits; the gradient comes back rounded."""
    half = cast(CASES[0], dtype)
    loss, gradient = loss_and_gradient(target, half)
    wide, wide_gradient = loss_and_gradient(target, cast(half, torch.float32))
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype))


@every_target
def test_float32_is_near_float64(target: Target) -> None:
    for case in (CASES[0], CASES[1], CASES[3]):
        single = cast(case, torch.float32)  # the same rounded numbers in both
        expected = loss_and_gradient(target, cast(single, torch.float64))
        found = loss_and_gradient(target, single)
        assert_same(tuple(x.double() for x in found), expected, 2e-5)


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite(target: Target, dtype: torch.dtype) -> None:
    """±1e4, labels of probability 0 and 1: every value and gradient that exists is a number."""
    if isinstance(target, BeyondLog) and target.alpha < 0:
        pytest.skip("p^alpha with alpha < 0 is infinite there by definition")
    c = cast(make_case(n=8, v=23, spread=1.0), dtype)
    z, reference = c.z.clone(), c.reference.clone()
    rows = torch.arange(4)
    z[rows, c.labels[:4]] = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype)
    reference[rows, c.labels[:4]] = torch.tensor([-1e4, 1e4, 1e4, -1e4], dtype=dtype)
    z[4], reference[4] = z[4] + 1e4 * z[4].sign(), reference[4] + 1e4 * reference[4].sign()
    z[5], reference[6] = z[5] + 1e4, reference[6] - 1e4
    old = z.log_softmax(-1).gather(-1, c.labels[:, None])[:, 0]
    c = replace(c, z=z, reference=reference, old_logp=old)
    loss, gradient = loss_and_gradient(target, c)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    assert bool(label_mass(target, c.z, c.labels, **c.extras).isfinite().all())
    if dtype == torch.float64 and not isinstance(target, TargetSFT):  # 0/0 in the plain formula
        z = c.z.clone().requires_grad_()
        published = FORMULAS[type(target)](target, c, z)
        (expected,) = torch.autograd.grad(published.sum(), z)
        where = expected.isfinite()  # autograd's own 0·inf
        torch.testing.assert_close(gradient[where], expected[where], rtol=1e-9, atol=1e-9)


def test_values_do_not_suffer_from_a_common_offset() -> None:
    """Adding a number to all logits of a row changes nothing but the last digits."""
    c = cast(CASES[0], torch.float32)
    moved = replace(c, z=c.z + 64.0, reference=c.reference - 64.0)
    for target in (OneHot(), GIFT(3.0), Distillation(), DFT()):
        assert_same(loss_and_gradient(target, moved), loss_and_gradient(target, c), 1e-4)


# Classes that do not exist.


def without_classes(c: Case, seed: int = 0) -> tuple[Case, Tensor, Case]:
    """The case with some logits at −inf, which classes are left, and the case without the rest."""
    g = torch.Generator().manual_seed(seed)
    left = torch.rand(c.z.shape[-1], generator=g) < 0.7
    left[c.labels] = True
    masked = replace(
        c,
        z=c.z.masked_fill(~left, -math.inf),
        reference=c.reference.masked_fill(~left, -math.inf),
    )
    new_labels = left.cumsum(0)[c.labels] - 1
    small = replace(c, z=c.z[:, left], reference=c.reference[:, left], labels=new_labels)
    return masked, left, small


@every_target
@pytest.mark.parametrize("both", [True, False], ids=["both", "student"])
def test_masked_classes_are_as_if_left_out(target: Target, both: bool) -> None:
    """The same numbers as with a smaller vocabulary; no gradient on what is not there."""
    c = make_case(n=6, v=23)
    masked, left, small = without_classes(c)
    if not both:  # the reference knows more classes: they are taken from it
        masked = replace(masked, reference=c.reference)
    loss, gradient = loss_and_gradient(target, masked)
    assert bool((gradient[:, ~left] == 0).all())
    assert_same((loss, gradient[:, left]), loss_and_gradient(target, small), 1e-11)
    assert_same(
        (label_mass(target, masked.z, masked.labels, **masked.extras),),
        (label_mass(target, small.z, small.labels, **small.extras),),
        1e-11,
    )


@every_target
def test_rows_may_mask_different_classes(target: Target) -> None:
    c = make_case(n=6, v=23)
    whole = loss_and_gradient(target, replace(c, sequence_ids=torch.arange(6)))
    z, reference = c.z.clone(), c.reference.clone()
    absent = (c.labels[0] + 1) % 23
    z[0, absent] = reference[0, absent] = -math.inf
    c = replace(c, z=z, reference=reference, sequence_ids=torch.arange(6))
    loss, gradient = loss_and_gradient(target, c)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    assert gradient[0, absent] == 0
    if target != DEFT("cayley"):
        assert_same((loss[1:], gradient[1:]), (whole[0][1:], whole[1][1:]))


@every_target
def test_classes_that_only_the_reference_lacks(target: Target) -> None:
    """Probability 0 in the reference: a distribution like any other for all but KL(π‖r)."""
    c = make_case(n=6, v=23)
    _, left, _ = without_classes(c)
    low = replace(c, reference=c.reference.masked_fill(~left, -2000.0))
    c = replace(c, reference=c.reference.masked_fill(~left, -math.inf))
    loss, gradient = loss_and_gradient(target, c)
    if target == SFTKL(0.3, "reverse"):
        assert bool((loss == math.inf).all()), "KL(π‖r) is infinite there"
        return
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6).double(), rtol=0, atol=1e-12)
    assert_same((loss, gradient), loss_and_gradient(target, low), 1e-11)


@pytest.mark.parametrize(
    "target", [GIFT(8.0), GIFT(8.0, floor=1e-10), GIFTExact(8.0), Distillation()], ids=repr
)
def test_a_label_that_the_reference_rules_out(target: Target) -> None:
    """Without a floor the target is the reference; with one the label still has some mass."""
    c = make_case(n=6, v=23)
    reference = c.reference.scatter(-1, c.labels[:, None], -math.inf)
    c = replace(c, reference=reference, sequence_ids=torch.arange(6))
    loss, gradient = loss_and_gradient(target, c)
    assert bool(loss.isfinite().all())
    q = c.z.softmax(-1) - gradient
    if not getattr(target, "floor", 0.0):
        assert_same((q,), (reference.softmax(-1),))
    else:
        assert bool((q.gather(-1, c.labels[:, None]) > 1e-7).all())


# What is refused.


def test_shapes_are_checked() -> None:
    """The annotations are enforced in these tests."""
    c = CASES[0]
    with pytest.raises(TypeCheckError, match="labels"):
        token_loss(OneHot(), c.z, c.labels[:-1])
    with pytest.raises(TypeCheckError, match="old_logp"):
        token_loss(OneHot(), c.z, c.labels, old_logp=c.old_logp[:-1])
    with pytest.raises(TypeCheckError, match="labels"):
        token_loss(OneHot(), c.z, c.labels.double())
    with pytest.raises(TypeCheckError, match="weight"):
        head.fused_token_loss(c.z, torch.randn(5, 22).double(), c.labels, OneHot())


def unchecked(function: Any) -> Any:
    """The function as a user has it, without the type checks of the tests."""
    return getattr(function, "__wrapped__", function)


def test_another_vocabulary_is_refused() -> None:
    c = CASES[0]
    with pytest.raises(ValueError, match=r"\(9, 22\) do not fit logits \(9, 23\).*vocabulary"):
        unchecked(functional.token_loss)(
            GIFT(), c.z, c.labels, reference_logits=c.reference[:, :-1]
        )
    with pytest.raises(ValueError, match="vocabulary"):
        unchecked(functional.label_mass)(
            GIFT(), c.z, c.labels, reference_logits=c.reference[:, :-1]
        )


# pass@k.


def test_pass_at_k_is_the_binomial_formula() -> None:
    for n in (1, 2, 5, 16):
        for k in range(1, n + 1):
            for c in range(n + 1):
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert float(pass_at_k(n, c, k)) == pytest.approx(float(exact), abs=1e-15)


def test_pass_at_k_of_many_samples() -> None:
    """Factorials would overflow; 1 − (1 − 1/n)^k-like values stay exact."""
    assert float(pass_at_k(4096, 1, 1024)) == pytest.approx(0.25, rel=1e-12)
    assert float(pass_at_k(100_000, 1, 1)) == pytest.approx(1e-5, rel=1e-9)


def test_pass_at_k_of_many_problems() -> None:
    n, c = torch.tensor([4, 8, 16]), torch.tensor([1, 0, 16])
    found = pass_at_k(n, c, 4)
    assert found.dtype == torch.float64 and found.tolist() == [1.0, 0.0, 1.0]
    assert pass_at_k(8, torch.zeros(2, 3, dtype=torch.long), 2).shape == (2, 3)
    assert pass_at_k(8, torch.zeros(0, dtype=torch.long), 2).shape == (0,)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [(4, 1, 0, "k of at least 1"), (4, 1, 5, "5 samples or more"), (4, 5, 1, "between 0 and"),
     (4, -1, 1, "between 0 and")],
)  # fmt: skip
def test_pass_at_k_refuses_nonsense(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_a_vocabulary_of_one() -> None:
    z = torch.zeros(2, 1, requires_grad=True)
    for target in (OneHot(), DFT(), LabelSmoothing(0.1), EAFT()):
        loss = token_loss(target, z, torch.zeros(2, dtype=torch.long))
        assert loss.tolist() == [0.0, 0.0]
