"""Each target is its publication: value and logit gradient, identities, limits, tables, errors."""

import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from formulas import (
    ALL,
    CASES,
    FORMULAS,
    INF,
    INSTANCES,
    Case,
    Halfway,
    concrete_targets,
    documented_minus_published,
    make_case,
)
from gift_lightning.distribution import Distribution
from gift_lightning.functional import label_mass, token_loss
from gift_lightning.head import fused_token_loss
from gift_lightning.loss import evaluate
from gift_lightning.target import LabelView, Target, Tokens
from gift_lightning.targets import (
    ASFT,
    DEFT,
    DFT,
    EAFT,
    FLOW,
    GEM,
    GIFT,
    IDFT,
    IWSFT,
    PSFT,
    SFTKL,
    STM,
    TALR,
    BeyondLog,
    CHORDPhi,
    Distillation,
    EntropyBonus,
    Focal,
    GIFTExact,
    LabelSmoothing,
    LUFFYShaping,
    OneHot,
    ProFiT,
    TargetSFT,
)

every_target = pytest.mark.parametrize("target", ALL, ids=repr)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def loss_and_gradient(target: Target, c: Case, **changes: Tensor) -> tuple[Tensor, Tensor]:
    """token_loss [n] and ∂Σloss/∂logits [n, v]."""
    c = replace(c, **changes)
    z = c.z.clone().requires_grad_()
    loss = token_loss(target, z, c.labels, **c.extras)
    loss.sum().backward()
    return loss.detach(), z.grad


def tokens(target: Target, c: Case) -> Tokens:
    """What `evaluate` sees, sequence look-ahead included."""
    reference = Distribution(c.reference, c.labels)
    t = Tokens(c.z.clone(), c.labels, reference=reference, old_logp=c.old_logp)
    if target.ahead_reads:
        t.ahead = target.look_ahead(LabelView(t.logp_y, reference.logp_y, c.sequence_ids))
    return t


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The generic tester.


def test_every_target_is_tested() -> None:
    missing = [c.__name__ for c in concrete_targets() if not INSTANCES.get(c)]
    assert not missing, f"list instances of {missing} in tests/formulas.py: INSTANCES"
    missing = [c.__name__ for c in concrete_targets() if c not in FORMULAS]
    assert not missing, f"write the published loss of {missing} in tests/formulas.py: FORMULAS"


def test_a_target_without_instances_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(INSTANCES, DFT)
    with pytest.raises(AssertionError, match=r"list instances of .*DFT"):
        test_every_target_is_tested()


@every_target
@every_case
def test_equals_its_publication(target: Target, case: Case) -> None:
    z = case.z.clone().requires_grad_()
    published = FORMULAS[type(target)](target, case, z)
    (expected,) = torch.autograd.grad(published.sum(), z)
    value, gradient = loss_and_gradient(target, case)
    close(gradient, expected)
    close(value, (published + documented_minus_published(target, case, z)).detach())


@every_target
@every_case
def test_gradient_is_the_declared_target(target: Target, case: Case) -> None:
    """p − ∂L/∂z = Q: what the hooks declare is what trains."""
    t = tokens(target, case)
    gamma = target.label_weight(t)
    gamma, rest = gamma if isinstance(gamma, tuple) else (gamma, 1 - gamma)
    gamma, rest, scale = (
        torch.as_tensor(x, dtype=torch.float64).expand(len(t.labels))[:, None]
        for x in (gamma, rest, target.scale(t))
    )
    tempered = (case.z / target.temperature_of_softmax).softmax(-1)
    residual = target.residual(t)
    delta = torch.nn.functional.one_hot(case.labels, case.z.shape[-1])
    declared = gamma * delta + rest * (tempered if residual is None else residual)
    expected = scale * (tempered - declared)
    if (second := target.second_term(t)) is not None:
        expected = expected + second[1]
    _, gradient = loss_and_gradient(target, case)
    unit = float(gamma.abs().max().clamp_min(1))  # γ of p^−0.5 is 1e7 on the last case
    close(gradient, expected, 1e-12 * unit)
    canonical = case.z.softmax(-1) - gradient
    close(canonical.sum(-1), torch.ones_like(canonical[:, 0]), 1e-12 * unit)
    mass = label_mass(target, case.z, case.labels, **case.extras)
    close(mass, canonical.gather(-1, case.labels[:, None])[:, 0], 1e-12 * unit)


@every_target
def test_gradient_is_that_of_the_frozen_target(target: Target) -> None:
    """The slope of scale·T·CE(Q, softmax(z/T)), every other number held still, along a line."""
    case = CASES[0]
    t = tokens(target, case)
    gamma = target.label_weight(t)
    gamma, rest = gamma if isinstance(gamma, tuple) else (gamma, 1 - gamma)
    residual = t.p if target.residual(t) is None else target.residual(t)
    temperature, scale = target.temperature_of_softmax, target.scale(t)
    second = target.second_term(t)

    def frozen(z: Tensor) -> Tensor:
        logp = (z / temperature).log_softmax(-1)
        ce = -gamma * t.at_label(logp) - rest * (residual * logp).sum(-1)
        return scale * temperature * ce

    _, gradient = loss_and_gradient(target, case)
    if second is not None:
        gradient = gradient - second[1]
    h = 1e-5
    for seed in range(3):
        line = make_case(seed=10 + seed).z
        slope = (frozen(case.z + h * line) - frozen(case.z - h * line)) / (2 * h)
        torch.testing.assert_close(slope, (gradient * line).sum(-1), rtol=1e-6, atol=1e-6)


def _with_second_term() -> list[Target]:
    return [x for x in ALL if x.second_term(tokens(x, CASES[0])) is not None]


def test_second_terms_are_known() -> None:
    kinds = {type(target) for target in _with_second_term()}
    assert kinds == {SFTKL, EntropyBonus, GEM, Distillation}


@pytest.mark.parametrize("target", _with_second_term(), ids=repr)
@every_case
def test_second_term_gradient(target: Target, case: Case) -> None:
    """The closed form is autograd's, of the value with GEM's detached weights held still."""
    value, gradient = target.second_term(tokens(target, case))
    z = case.z.clone().requires_grad_()
    logp = z.log_softmax(-1)
    label = logp.gather(-1, case.labels[:, None])[:, 0]
    if isinstance(target, EntropyBonus):
        term = target.weight * (logp.exp() * logp).sum(-1)
    elif isinstance(target, SFTKL):
        ratio = logp - case.reference.log_softmax(-1)
        term = target.kl_weight * (logp.exp() * ratio).sum(-1)
    else:
        term = FORMULAS[type(target)](target, case, z)
        if isinstance(target, Distillation):
            term = term + (1 - target.weight) * label
    close(value, term.detach())
    close(gradient, torch.autograd.grad(term.sum(), z)[0])


DIFFERENTIATED = [
    OneHot(),
    LabelSmoothing(0.1),
    GIFT(3.0),
    GIFT(8.0, 0.01, 1e-10),
    GIFTExact(3.0),
    BeyondLog(0.5),
    BeyondLog(-0.5),
    SFTKL(0.3),
    SFTKL(0.3, "reverse"),
    EntropyBonus(0.1),
    GEM(),
    PSFT(),
    Distillation(0.5, temperature=2.0),
    Distillation(0.8, top_k=5),
    FLOW(2.0, "sequence"),
    STM(20.0),
    Focal(),
    LUFFYShaping(),
    Halfway(),
]


@pytest.mark.parametrize("target", DIFFERENTIATED, ids=repr)
def test_gradcheck_where_nothing_is_detached(target: Target) -> None:
    c = make_case(n=4, v=7, spread=1.0)
    z = c.z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_loss(target, x, c.labels, **c.extras), (z,))


@every_target
def test_hooks_leave_their_inputs_alone(target: Target) -> None:
    case = CASES[0]
    t = tokens(target, case)
    for made in (t.logits, t.p, t.logp, t.logp_y, t.base.logits, t.base.p, t.base.logp):
        made.mul_(1)  # made now, so that a hook that writes in place writes over it
    names = ("logits", "p", "logp", "logp_y", "p_y")
    before = [getattr(d, name).clone() for d in (t, t.base) for name in names]
    target.label_weight(t)
    target.residual(t)
    target.scale(t)
    target.published_value(t)
    target.second_term(t)
    after = [getattr(d, name) for d in (t, t.base) for name in names]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@every_target
def test_yaml_round_trip(target: Target) -> None:
    """Class path to object, to YAML, to the same object; by short name where it has one."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--target", type=Target)
    arguments = {f.name: getattr(target, f.name) for f in fields(target)}
    name = type(target).__name__
    paths = [f"{type(target).__module__}.{name}"]
    if type(target) is not Halfway:
        paths += [name, f"gift_lightning.targets.{name}"]
    for path in paths:
        text = yaml.safe_dump({"target": {"class_path": path, "init_args": _plain(arguments)}})
        config = parser.parse_string(text)
        again = parser.parse_string(parser.dump(config, skip_unset=False))  # as Lightning does
        for parsed in (config, again):
            made = parser.instantiate(parsed).target
            assert made == target and type(made) is type(target)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}


def test_swapping_a_target_is_one_flag() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--target", type=Target, default=OneHot())
    for flags, expected in (
        (["--target", "DFT"], DFT()),
        (["--target", "GIFT", "--target.beta", "8"], GIFT(8.0)),
        (["--target", "GIFT", "--target.beta", ".inf"], GIFT(INF)),
        (["--target=ProFiT", "--target.tau=[0.1,0.5]", "--target.direction=middle"],
         ProFiT((0.1, 0.5), "middle")),
        (["--target=formulas.Halfway", "--target.trust=0.3"], Halfway(0.3)),
    ):  # fmt: skip
        assert parser.instantiate(parser.parse_args(flags)).target == expected


@every_target
def test_targets_are_values(target: Target) -> None:
    assert target == replace(target) and hash(target) == hash(replace(target))
    for f in fields(target):
        with pytest.raises(AttributeError):
            setattr(target, f.name, 0)


@pytest.mark.parametrize("target", [x for x in ALL if x.needs_reference], ids=repr)
def test_a_missing_reference_is_refused(target: Target) -> None:
    c = CASES[0]
    for call in (token_loss, label_mass):
        with pytest.raises(ValueError, match=rf"{type(target).__name__} needs a reference.*set "):
            call(target, c.z, c.labels, old_logp=c.old_logp)


def test_a_missing_old_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PSFT needs the old policy.*pass old_logp"):
        token_loss(PSFT(), CASES[0].z, CASES[0].labels)


def test_who_needs_what() -> None:
    reads = {type(x).__name__ for x in ALL if x.needs_reference}
    assert reads == {
        "ASFT", "Distillation", "FLOW", "GIFT", "GIFTExact", "Halfway", "IWSFT", "SFTKL", "STM",
        "TargetSFT",
    }  # fmt: skip
    assert {type(x) for x in ALL if x.needs_old_policy} == {PSFT}
    ahead = {repr(x): set(x.ahead_reads) for x in ALL if x.ahead_reads}
    assert ahead[repr(DEFT("cayley"))] == {"student"}
    assert ahead[repr(IWSFT())] == {"student", "reference"}
    assert ahead[repr(GIFTExact())] == ahead[repr(FLOW(2.0, "sequence"))] == {"reference"}
    assert not ahead.keys() & {repr(IWSFT("token")), repr(FLOW(2.0)), repr(DEFT())}


def test_a_weight_of_the_wrong_shape_is_refused() -> None:
    class Column(OneHot):
        def label_weight(self, t: Tokens) -> Tensor:
            return t.p_y[:, None]

    with pytest.raises(ValueError, match=r"one value per token, \(9,\), but gave \(9, 1\)"):
        token_loss(Column(), CASES[0].z, CASES[0].labels)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("columns", [1, 23])
def test_a_residual_may_be_the_same_for_all_tokens_or_classes(rows: int, columns: int) -> None:
    """A unigram prior is [1, v]: the same numbers everywhere as of its copies, one for a token."""
    case = CASES[0]
    prior = case.reference[:rows].softmax(-1) if columns > 1 else torch.full((rows, 1), 1 / 23)

    class Prior(Target):
        whole = False

        def label_weight(self, t: Tokens) -> Tensor:
            return t.p_y

        def residual(self, t: Tokens) -> Tensor:
            shape = t.logits.shape if self.whole else prior[: len(t.labels)].shape
            return prior[: len(t.labels)].double().expand(shape)

    class Whole(Prior):
        whole = True

    assert case.z.shape == (9, 23)
    for x, y in zip(
        loss_and_gradient(Prior(), case), loss_and_gradient(Whole(), case), strict=True
    ):
        close(x, y, 1e-14)
    close(*(label_mass(target, case.z, case.labels) for target in (Prior(), Whole())), 1e-14)
    found, expected = (
        evaluate(target, tokens(target, case), diagnose=True) for target in (Prior(), Whole())
    )
    for name, value in vars(expected).items():
        close(getattr(found, name), value, 1e-14)
    hidden = case.z.clone().requires_grad_()
    fused = fused_token_loss(hidden, torch.eye(23).double(), case.labels, Prior())
    fused.sum().backward()
    value, gradient = loss_and_gradient(Prior(), case)
    close(fused.detach(), value)
    close(hidden.grad, gradient)


# Diagnostics.


@every_target
@every_case
def test_diagnostics(target: Target, case: Case) -> None:
    """Entropy and divergences against their definitions; KL is NaN where Q is no distribution."""
    result = evaluate(target, tokens(target, case), gradient=False, diagnose=True)
    t = tokens(target, case)
    p = torch.distributions.Categorical(logits=case.z)
    r = torch.distributions.Categorical(logits=case.reference)
    close(result.entropy, p.entropy())
    close(result.kl_reference, torch.distributions.kl_divergence(p, r))
    close(result.nll, -p.log_prob(case.labels))
    assert torch.equal(result.correct, (case.z.argmax(-1) == case.labels).double())
    gamma = target.label_weight(t)
    gamma = torch.as_tensor(gamma[0] if isinstance(gamma, tuple) else gamma, dtype=torch.float64)
    close(result.gamma, gamma.expand(len(case.labels)))
    s = (case.z / target.temperature_of_softmax).log_softmax(-1)
    residual = target.residual(t)
    q = (1 - result.gamma)[:, None] * (s.exp() if residual is None else residual.expand_as(s))
    q = q.scatter_add(-1, case.labels[:, None], result.gamma[:, None])
    direct = (torch.special.xlogy(q, q) - q * s).sum(-1)
    expected = torch.where(result.gamma > 1, math.nan, direct)
    torch.testing.assert_close(result.kl_target, expected, rtol=1e-8, atol=1e-8, equal_nan=True)


def test_gift_value_is_entropy_of_the_target_plus_kl() -> None:
    """H(q) of methods.md 1.3 in terms of the reference alone: losses of two betas differ by it."""
    for case, beta in itertools.product(CASES[:3], (0.5, 3.0, 8.0)):
        t = tokens(GIFT(beta), case)
        result = evaluate(GIFT(beta), t, gradient=False, diagnose=True)
        p_y, q_y = t.base.p_y, result.label_mass
        binary = torch.distributions.Bernoulli(q_y).entropy()
        inside = (t.base.entropy + p_y * p_y.log()) / (1 - p_y) + (1 - p_y).log()
        close(result.value - result.kl_target, binary + (1 - q_y) * inside, 1e-8)


def test_gift_is_the_optimum_of_its_variational_form() -> None:
    """At student = reference, KL(q‖p) = β·q_y − log(1 + (e^β − 1)·p_y)."""
    for beta in (0.5, 3.0, 8.0):
        case = replace(CASES[0], z=CASES[0].reference)
        t = tokens(GIFT(beta), case)
        result = evaluate(GIFT(beta), t, gradient=False, diagnose=True)
        optimum = torch.log1p(math.expm1(beta) * t.p_y)
        close(result.kl_target, beta * result.label_mass - optimum)


# Limits and identities.


def same(a: Target, b: Target, value: bool = True, tolerance: float = 1e-9, **changes: Any) -> None:
    for case in CASES:
        va, ga = loss_and_gradient(a, case, **changes)
        vb, gb = loss_and_gradient(b, case, **changes)
        close(ga, gb, tolerance)
        if value:
            close(va, vb, tolerance)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (GIFT(INF), OneHot()),
        (GIFT(1e4), OneHot()),
        (GIFTExact(INF), OneHot()),
        (GIFT(INF, smoothing=0.1, floor=1e-10), OneHot()),
        (GIFT(0.0), Distillation()),
        (GIFTExact(0.0), Distillation()),
        (GIFT(3.0, smoothing=1.0), GIFT(3.0, floor=1e9)),
        (BeyondLog(0.0), OneHot()),
        (BeyondLog(0.0, keep_above=0.02), ProFiT(0.02)),
        (LabelSmoothing(0.0), OneHot()),
        (Distillation(0.0), OneHot()),
        (Distillation(0.6, top_k=23), Distillation(0.6)),
        (Distillation(0.5), Halfway(0.5)),
        (TargetSFT(0.3, 23), TargetSFT(0.3)),
        (Focal(0.0), OneHot()),
        (Focal(0.0, detach=True), OneHot()),
        (TALR(1.0), DFT()),
        (ASFT(0.0), DFT()),
        (SFTKL(0.0), OneHot()),
        (SFTKL(0.0, "reverse"), OneHot()),
        (EntropyBonus(0.0), OneHot()),
        (STM(1e300), OneHot()),
        (GEM(1.0), OneHot()),
        (IWSFT("token"), IWSFT("token", clip_min=0.2, clip_max=1.8)),
        (IWSFT(), IWSFT(clip_min=0.0, clip_max=16.0)),
    ],
    ids=repr,
)
def test_equal_targets(a: Target, b: Target) -> None:
    same(a, b, tolerance=1e-8 if isinstance(b, GIFT) else 1e-9)


@pytest.mark.parametrize(
    ("a", "b"),
    [(TargetSFT(0.0), DFT()), (BeyondLog(1.0), DFT()), (DFT(), TargetSFT(0.0))],
    ids=repr,
)
def test_equal_gradients(a: Target, b: Target) -> None:
    same(a, b, value=False)


def test_beyond_log_tends_to_sft() -> None:
    same(BeyondLog(1e-9), OneHot(), tolerance=1e-5)


def test_linear_gem_is_sft_at_another_temperature() -> None:
    for case, beta in itertools.product(CASES, (0.5, 0.7, 2.0)):
        z = case.z.clone().requires_grad_()
        expected = beta * torch.nn.functional.cross_entropy(z / beta, case.labels, reduction="none")
        value, gradient = loss_and_gradient(GEM(beta), case)
        close(value, expected.detach())
        close(gradient, torch.autograd.grad(expected.sum(), z)[0])


def test_logsigmoid_gem_is_about_half_of_linear_gem() -> None:
    case = CASES[0]
    t = tokens(GEM(form="logsigmoid"), case)
    _, gradient = GEM(form="logsigmoid").second_term(t)
    off_label = torch.ones_like(gradient).scatter_(-1, case.labels[:, None], 0.0)
    weight = (gradient * off_label).sum(-1) / (1 - t.tempered(0.7).p_y)
    assert bool(((weight > 0.45) & (weight < 0.55)).all())


def test_psft_is_sft_right_after_a_refresh() -> None:
    for case in CASES:
        old = case.z.log_softmax(-1).gather(-1, case.labels[:, None])[:, 0]
        value, gradient = loss_and_gradient(PSFT(), case, old_logp=old)
        close(gradient, loss_and_gradient(OneHot(), case)[1])
        close(value, -torch.ones_like(value))


def test_psft_clamps_the_log_ratio_as_its_code_does() -> None:
    """Below e^−20 (and above e^20) the official ratio is a constant: no gradient."""
    case = make_case(spread=1.0, shift=-30.0)
    z = case.z.clone().requires_grad_()
    case = replace(case, old_logp=torch.linspace(-60, 0, len(case.labels)).double())
    published = FORMULAS[PSFT](PSFT(), case, z)
    (expected,) = torch.autograd.grad(published.sum(), z)
    value, gradient = loss_and_gradient(PSFT(), case)
    close(gradient, expected)
    close(value, published.detach())


def test_label_smoothing_is_distillation_of_a_uniform_teacher() -> None:
    same(LabelSmoothing(0.2), Distillation(0.2), reference=torch.zeros_like(CASES[0].z))


def test_idft_at_strength_0_is_dft_above_its_floor() -> None:
    for case in CASES:
        _, gradient = loss_and_gradient(IDFT(strength=0.0), case)
        _, expected = loss_and_gradient(DFT(), case)
        floored = tokens(DFT(), case).p_y < 1e-10
        close(gradient, expected.masked_fill(floored[:, None], 0.0))
    assert bool(floored.any()), "the last case has labels below the floor"


def test_sft_kl_is_sft_to_a_mixture() -> None:
    """−log p_y + λ·KL(r‖p) trains (1 + λ) times the cross-entropy to (δ + λ·r)/(1 + λ)."""
    for case in CASES:
        value, gradient = loss_and_gradient(SFTKL(0.3), case)
        mixed, mixed_gradient = loss_and_gradient(Halfway(1 / 1.3), case)
        close(value, 1.3 * mixed)
        close(gradient, 1.3 * mixed_gradient)


def test_a_mixture_has_the_mixture_of_the_losses() -> None:
    """Proposition 1 of arXiv 2606.11189."""
    for case in CASES:
        parts = [loss_and_gradient(x, case) for x in (OneHot(), Distillation())]
        for mixed, a, b in zip(loss_and_gradient(Halfway(0.3), case), *parts, strict=True):
            close(mixed, 0.3 * a + 0.7 * b)


def test_a_token_weight_has_two_readings() -> None:
    """γ = w with the student as residual is the scale w on a one-hot target."""

    class Scaled(OneHot):
        def scale(self, t: Tokens) -> Tensor:
            return t.p_y

    same(Scaled(), DFT())
    case = CASES[0]
    arguments = (case.z, case.labels)
    close(label_mass(Scaled(), *arguments), label_mass(DFT(), *arguments))


def test_gift_at_its_start_is_sft_times_its_label_weight() -> None:
    for case, beta in itertools.product(CASES, (0.1, 3.0, 20.0)):
        p_y = case.z.softmax(-1).gather(-1, case.labels[:, None])
        w = 1 - 1 / (1 + math.expm1(beta) * p_y)
        _, gradient = loss_and_gradient(GIFT(beta), case, reference=case.z)
        close(gradient, w * loss_and_gradient(OneHot(), case)[1])


def test_gift_near_beta_0_is_dft_around_the_reference() -> None:
    """q = p + β·p_y·(δ − p) + O(β²)."""
    case, beta = CASES[0], 1e-4
    _, gradient = loss_and_gradient(GIFT(beta), case)
    r = case.reference.softmax(-1)
    r_y = r.gather(-1, case.labels[:, None])
    delta = torch.nn.functional.one_hot(case.labels, r.shape[-1])
    close(case.z.softmax(-1) - gradient, r + beta * r_y * (delta - r), beta**2)


def test_distance_of_gift_from_one_hot() -> None:
    """‖q − δ‖₁ = 2·(1 − q_y)."""
    for case in CASES:
        q = case.z.softmax(-1) - loss_and_gradient(GIFT(3.0), case)[1]
        delta = torch.nn.functional.one_hot(case.labels, q.shape[-1])
        mass = label_mass(GIFT(3.0), case.z, case.labels, **case.extras)
        close((q - delta).abs().sum(-1), 2 * (1 - mass))


def test_hinton_distillation_gradient() -> None:
    for case in CASES:
        _, gradient = loss_and_gradient(Distillation(temperature=2.0), case)
        difference = (case.z / 2).softmax(-1) - (case.reference / 2).softmax(-1)
        close(gradient, 2 * difference)


def test_the_detached_target_is_part_of_target_sft() -> None:
    """Without the stop-gradient the gradient is another one, by a lot."""
    case = CASES[0]
    z = case.z.clone().requires_grad_()
    logp = z.log_softmax(-1)
    p_y = logp.exp().gather(-1, case.labels[:, None])
    mix = (0.5 * logp + 0.5 * case.reference.log_softmax(-1)).softmax(-1)
    q = ((1 - p_y) * mix).scatter_add(-1, case.labels[:, None], p_y)
    (attached,) = torch.autograd.grad(-(q * logp).sum(), z)
    _, gradient = loss_and_gradient(TargetSFT(0.5), case)
    assert float((attached - gradient).abs().max()) > 0.1


# Label mass: the number that compares methods.


def test_label_masses_in_closed_form() -> None:
    case = CASES[0]
    p = case.z.softmax(-1).gather(-1, case.labels[:, None])[:, 0]
    r = case.reference.softmax(-1).gather(-1, case.labels[:, None])[:, 0]
    mix = (0.5 * case.z.log_softmax(-1) + 0.5 * case.reference.log_softmax(-1)).softmax(-1)
    mix_y = mix.gather(-1, case.labels[:, None])[:, 0]
    v = case.z.shape[-1]
    for target, expected in (
        (OneHot(), torch.ones_like(p)),
        (DFT(), 1 - (1 - p) ** 2),
        (LabelSmoothing(0.1), torch.full_like(p, 1 - 0.1 + 0.1 / v)),
        (ASFT(0.05), p + 0.05 * r + (1 - p - 0.05) * p),
        (SFTKL(0.3), 1 + 0.3 * (r - p)),
        (GIFT(3.0), math.exp(3) * r / (1 + math.expm1(3) * r)),
        (TargetSFT(0.5), p + (1 - p) * mix_y),
        (TALR(2.0), p + p**0.5 * (1 - p)),
        (ProFiT(1.0), p),  # no token is kept: no update
    ):
        close(label_mass(target, case.z, case.labels, **case.extras), expected)


def test_label_mass_of_tokens_that_are_not_supervised() -> None:
    labels = CASES[0].labels.clone()
    labels[::2] = -100
    mass = label_mass(OneHot(), CASES[0].z, labels)
    assert torch.equal(mass.isnan(), labels == -100)


def printed(text: str) -> tuple[float, float]:
    """A printed number and half a unit of its last digit."""
    digits, _, exponent = text.partition("e")
    decimals = len(digits.partition(".")[2])
    return float(text), 0.5 * 10.0 ** (int(exponent or 0) - decimals)


def assert_prints(value: float, text: str) -> None:
    if text == "1":
        assert 1 - value < 5e-7
    else:
        number, half = printed(text)
        assert abs(value - number) <= half * (1 + 1e-9), (value, text)


# methods.md 1.4: q_y by the reference's probability of the label (rows) and beta (columns).
BETAS = (1, 2, 3, 5, 8, 10, 12, 15, 20, 25)
LABEL_MASS = """
1e-12  2.7e-12 7.4e-12 2.0e-11 1.5e-10 3.0e-9 2.2e-8 1.6e-7 3.3e-6 4.8e-4 .0672
1e-10  2.7e-10 7.4e-10 2.0e-9 1.5e-8 3.0e-7 2.2e-6 1.6e-5 3.3e-4 .0463 .8781
1e-9   2.7e-9 7.4e-9 2.0e-8 1.5e-7 3.0e-6 2.2e-5 1.6e-4 .0033 .3267 .9863
1e-8   2.7e-8 7.4e-8 2.0e-7 1.5e-6 3.0e-5 2.2e-4 .0016 .0317 .8291 .9986
1e-7   2.7e-7 7.4e-7 2.0e-6 1.5e-5 3.0e-4 .0022 .0160 .2464 .9798 .99986
1e-6   2.7e-6 7.4e-6 2.0e-5 1.5e-4 .0030 .0216 .1400 .7658 .9979 .999986
1e-5   2.7e-5 7.4e-5 2.0e-4 .0015 .0289 .1805 .6194 .9703 .99979 .999999
1e-4   2.7e-4 7.4e-4 .0020 .0146 .2297 .6878 .9421 .9970 .99998 1
1e-3   .0027 .0073 .0197 .1293 .7490 .9566 .9939 .99969 .999998 1
1e-2   .0267 .0695 .1687 .5999 .9679 .9955 .99939 .99997 1 1
0.1    .2320 .4509 .6906 .9428 .9970 .99959 .999945 .999997 1 1
0.5    .7311 .8808 .9526 .9933 .99966 .999955 .999994 1 1 1
0.9    .9607 .9852 .9945 .99925 .999963 .999995 .999999 1 1 1
"""
ROWS = [line.split() for line in LABEL_MASS.strip().splitlines()]


def gift_mass(target: GIFT, p_y: float, v: int = 2) -> float:
    """Label mass where the reference gives the label p_y and the rest to v − 1 others alike."""
    row = torch.full((1, v), math.log1p(-p_y) - math.log(v - 1), dtype=torch.float64)
    row[0, 0] = math.log(p_y) if p_y else -INF
    zeros = torch.zeros(1, dtype=torch.long)
    return float(label_mass(target, torch.zeros_like(row), zeros, reference_logits=row))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_label_mass_table(row: list[str]) -> None:
    for beta, text in zip(BETAS, row[1:], strict=True):
        assert_prints(gift_mass(GIFT(float(beta)), float(row[0])), text)


@pytest.mark.parametrize(
    ("beta", "threshold"),
    [(1, ".269"), (2, ".119"), (3, ".0474"), (5, ".00669"), (8, "3.4e-4"), (10, "4.5e-5"),
     (12, "6.1e-6"), (15, "3.1e-7"), (20, "2.06e-9"), (25, "1.4e-11")],
)  # fmt: skip
def test_beta_is_a_threshold_on_surprise(beta: int, threshold: str) -> None:
    p_y = 1 / (1 + math.exp(beta))
    assert_prints(p_y, threshold)
    assert gift_mass(GIFT(float(beta)), p_y) == pytest.approx(0.5, abs=1e-12)


# methods.md 1.5: beta 20 without floor, with the official floor, with smoothing and floor. The
# 4.9e-4 printed there at 1e-12 is a misprint: the value is 4.849e-4, 4.8e-4 in the table of 1.4.
@pytest.mark.parametrize(
    ("p_y", "exact", "floor", "smooth"),
    [
        (1e-6, ".99794", ".99794", ".99807"),
        (1e-7, ".9798", ".9798", ".9885"),
        (1e-8, ".829", ".831", ".977"),
        (2.06e-9, ".500", ".512", ".975"),
        (1e-9, ".327", ".348", ".975"),
        (1e-10, ".0463", ".0884", ".974"),
        (1e-12, "4.8e-4", ".0467", ".974"),
        (0.0, "0", ".0463", ".974"),
    ],
)
def test_floor_and_smoothing_table(p_y: float, exact: str, floor: str, smooth: str) -> None:
    assert_prints(gift_mass(GIFT(), p_y), exact)
    assert_prints(gift_mass(GIFT(floor=1e-10), p_y, 152_064), floor)
    assert_prints(gift_mass(GIFT(smoothing=0.01, floor=1e-10), p_y, 128_256), smooth)


def test_the_floor_keeps_every_label() -> None:
    for beta, least in ((20.0, ".0463"), (25.0, ".878")):
        assert_prints(gift_mass(GIFT(beta, floor=1e-10), 0.0, 10), least)
    assert gift_mass(GIFT(30.0, floor=1e-10), 0.0, 10) > 0.999


# The exact sequence-level conditional.


def toy_base(v: int, length: int, seed: int = 0) -> dict[tuple[int, ...], Tensor]:
    """Next-token logits of a toy model for every prefix shorter than `length`."""
    g = torch.Generator().manual_seed(seed)
    prefixes = [x for n in range(length) for x in itertools.product(range(v), repeat=n)]
    return {x: torch.randn(v, generator=g, dtype=torch.float64) for x in prefixes}


@pytest.mark.parametrize("beta", [0.5, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("expert", [(0, 0, 0, 0), (2, 1, 0, 2)])
def test_gift_exact_is_the_conditional_of_the_tilted_model(
    beta: float, expert: tuple[int, ...]
) -> None:
    """π* ∝ π_base·e^{β·1[y = y*]}, summed over all sequences."""
    v, length = 3, len(expert)
    base = toy_base(v, length)

    def probability(y: tuple[int, ...]) -> float:
        return math.prod(float(base[y[:i]].softmax(-1)[y[i]]) for i in range(length))

    tilted = {
        y: probability(y) * (math.exp(beta) if y == expert else 1.0)
        for y in itertools.product(range(v), repeat=length)
    }

    def mass(prefix: tuple[int, ...]) -> float:
        return sum(x for y, x in tilted.items() if y[: len(prefix)] == prefix)

    conditionals = torch.tensor(
        [[mass((*expert[:t], k)) / mass(expert[:t]) for k in range(v)] for t in range(length)],
        dtype=torch.float64,
    )
    reference = torch.stack([base[expert[:t]] for t in range(length)])
    # Two sequences, the other one interleaved: it must not be seen.
    z = make_case(n=2 * length, v=v).z.requires_grad_()
    labels = torch.tensor([*expert, *expert[::-1]])
    order = torch.arange(2 * length).reshape(2, length).t().flatten()
    rows = torch.cat([reference, torch.randn_like(reference)])[order]
    ids = torch.tensor([7] * length + [3] * length)[order]
    loss = token_loss(GIFTExact(beta), z, labels[order], reference_logits=rows, sequence_ids=ids)
    loss.sum().backward()
    q = (z.detach().softmax(-1) - z.grad)[ids == 7]
    close(q, conditionals, 1e-12)
    posterior = tilted[expert] / sum(tilted.values())
    assert math.prod(float(q[t, k]) for t, k in enumerate(expert)) == pytest.approx(
        posterior, rel=1e-12
    )


def test_gift_exact_of_one_token_is_gift() -> None:
    case = replace(CASES[0], sequence_ids=torch.arange(len(CASES[0].labels)))
    for a, b in zip(
        loss_and_gradient(GIFTExact(3.0), case), loss_and_gradient(GIFT(3.0), case), strict=True
    ):
        close(a, b)


def test_gift_exact_trusts_the_label_more_towards_the_end() -> None:
    case = replace(CASES[0], sequence_ids=torch.zeros_like(CASES[0].labels))
    t = tokens(GIFTExact(8.0), case)
    gamma, rest = GIFTExact(8.0).label_weight(t)
    assert bool((gamma.diff() > 0).all())
    close(gamma + rest, torch.ones_like(gamma))


# beta by meaning.


@pytest.mark.parametrize("trust", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("options", [{}, {"floor": 1e-10}, {"smoothing": 0.01}])
def test_trust_is_the_mean_label_mass(trust: float, options: dict[str, float]) -> None:
    case = make_case(n=64, v=50, spread=3.0)
    target = GIFT(trust=trust, **options)
    logp = case.reference.log_softmax(-1).gather(-1, case.labels[:, None])[:, 0]
    resolved = target.resolve(logp, num_classes=50)
    assert resolved.trust is None and resolved.is_resolved and not target.is_resolved
    mass = label_mass(resolved, case.z, case.labels, reference_logits=case.reference)
    assert float(mass.mean()) == pytest.approx(trust, abs=1e-9)
    assert {k: getattr(resolved, k) for k in options} == options


def test_trust_resolves_as_any_target_does() -> None:
    """The loop calls `resolve` of whatever target it has."""
    logp = torch.tensor([-1.0, -3.0, -8.0])
    assert OneHot().resolve(logp, 50) == OneHot()
    assert GIFT(3.0).resolve(logp, 50) == GIFT(3.0)
    for options in ({}, {"smoothing": 0.01}, {"floor": 1e-10}):
        assert GIFT(trust=0.9, **options).resolve(logp, 50).is_resolved


def test_trust_of_labels_that_are_certain() -> None:
    logp = torch.tensor([0.0, -1e-12, -1e-3, -9.0])
    assert math.isfinite(GIFT(trust=0.9).resolve(logp, 50).beta)


def test_unreachable_trust_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trust=0.2 is not above the reference's own mean"):
        GIFT(trust=0.2).resolve(torch.tensor([-0.1, -0.2]), 50)
    with pytest.raises(ValueError, match=r"no beta reaches trust=0.9.*floor or smoothing"):
        GIFT(trust=0.9).resolve(torch.tensor([-INF, -1.0]), 50)


def test_trust_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GIFT: .*trust"):
        GIFT(trust=0.9).resolve(torch.zeros(0), 50)


def test_an_unresolved_trust_is_refused() -> None:
    c = CASES[0]
    with pytest.raises(ValueError, match=r"GIFT has an option that is found .*resolve"):
        token_loss(GIFT(trust=0.9), c.z, c.labels, reference_logits=c.reference)


# Arguments that make no sense.


NAN = math.nan


@pytest.mark.parametrize(
    ("kind", "arguments", "key"),
    [
        (GIFT, {"beta": -1.0}, "beta"),
        (GIFT, {"beta": NAN}, "beta"),
        (GIFT, {"smoothing": -0.1}, "smoothing"),
        (GIFT, {"smoothing": 1.1}, "smoothing"),
        (GIFT, {"floor": -1.0}, "floor"),
        (GIFT, {"floor": INF}, "floor"),
        (GIFT, {"trust": 0.0}, "trust"),
        (GIFT, {"trust": 1.0}, "trust"),
        (GIFT, {"trust": NAN}, "trust"),
        (GIFTExact, {"beta": -1.0}, "beta"),
        (GIFTExact, {"beta": NAN}, "beta"),
        (LabelSmoothing, {"epsilon": -0.1}, "epsilon"),
        (LabelSmoothing, {"epsilon": 1.1}, "epsilon"),
        (BeyondLog, {"alpha": NAN}, "alpha"),
        (BeyondLog, {"alpha": INF}, "alpha"),
        (BeyondLog, {"alpha": 1.0, "keep_above": NAN}, "keep_above"),
        (BeyondLog, {"alpha": 1.0, "keep_above": 2.0}, "keep_above"),
        (BeyondLog, {"alpha": 1.0, "keep_below": -1.0}, "keep_below"),
        (BeyondLog, {"alpha": 1.0, "keep_above": 0.5, "keep_below": 0.1}, "keep_above"),
        (ProFiT, {"tau": 0.1, "direction": "above"}, "direction"),
        (ProFiT, {"tau": 0.1, "direction": "middle"}, "tau"),
        (ProFiT, {"tau": (0.1, 0.2)}, "tau"),
        (ProFiT, {"tau": (0.5, 0.1), "direction": "middle"}, "tau"),
        (ProFiT, {"tau": (0.1, 0.2, 0.3), "direction": "middle"}, "tau"),
        (ProFiT, {"tau": NAN}, "tau"),
        (EAFT, {"k": 1}, "k"),
        (EAFT, {"divisor": 0.0}, "divisor"),
        (EAFT, {"divisor": NAN}, "divisor"),
        (EAFT, {"alpha": NAN}, "alpha"),
        (EAFT, {"alpha": -1.0}, "alpha"),
        (IWSFT, {"level": "batch"}, "level"),
        (IWSFT, {"temperature": NAN}, "temperature"),
        (IWSFT, {"clip_min": 2.0, "clip_max": 1.0}, "clip_min"),
        (IWSFT, {"clip_max": NAN}, "clip_max"),
        (ASFT, {"kl_weight": -1.0}, "kl_weight"),
        (ASFT, {"kl_weight": INF}, "kl_weight"),
        (SFTKL, {"kl_weight": -1.0}, "kl_weight"),
        (SFTKL, {"kl_weight": INF}, "kl_weight"),
        (SFTKL, {"kl_weight": 0.1, "direction": "both"}, "direction"),
        (EntropyBonus, {"weight": NAN}, "weight"),
        (GEM, {"beta": 0.0}, "beta"),
        (GEM, {"beta": INF}, "beta"),
        (GEM, {"beta": 0.7, "form": "quadratic"}, "form"),
        (PSFT, {"clip_low": -0.1}, "clip_low"),
        (PSFT, {"clip_high": NAN}, "clip_high"),
        (Distillation, {"weight": -0.1}, "weight"),
        (Distillation, {"weight": 1.1}, "weight"),
        (Distillation, {"temperature": 0.0}, "temperature"),
        (Distillation, {"temperature": INF}, "temperature"),
        (Distillation, {"top_k": 0}, "top_k"),
        (TargetSFT, {"eta": 1.1}, "eta"),
        (TargetSFT, {"eta": NAN}, "eta"),
        (TargetSFT, {"top_k": 0}, "top_k"),
        (IDFT, {"beta": 0.0}, "beta"),
        (IDFT, {"clip_min": 2.0, "clip_max": 0.1}, "clip_min"),
        (IDFT, {"strength": NAN}, "strength"),
        (IDFT, {"strength": 2.0}, "strength"),
        (DEFT, {"form": "tsallis"}, "form"),
        (TALR, {"tau": 0.0}, "tau"),
        (FLOW, {"temperature": 0.0}, "temperature"),
        (FLOW, {"temperature": NAN}, "temperature"),
        (FLOW, {"temperature": 1.0, "level": "batch"}, "level"),
        (STM, {"threshold": 0.0}, "threshold"),
        (Focal, {"gamma": -1.0}, "gamma"),
        (Focal, {"gamma": INF}, "gamma"),
        (LUFFYShaping, {"gamma": 0.0}, "gamma"),
        (LUFFYShaping, {"gamma": INF}, "gamma"),
        (CHORDPhi, {"cutoff": 0.0}, "cutoff"),
        (CHORDPhi, {"cutoff": 1.5}, "cutoff"),
    ],
)
def test_bad_arguments_are_refused(kind: type[Target], arguments: dict[str, Any], key: str) -> None:
    """One sentence, a ValueError, that names the target and the argument.

    Past the type checks of the tests, which a user does not have.
    """
    target = object.__new__(kind)
    for f in fields(kind):
        object.__setattr__(target, f.name, arguments.get(f.name, f.default))
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: .*{key}"):
        getattr(target, "__post_init__", lambda: None)()
