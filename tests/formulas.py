"""Every target's published per-token loss, written again in plain autograd.

Nothing here uses the package's equation: each formula is the publication's (or its official code's)
as it stands, with `.detach()` exactly where the publication stops the gradient. `INSTANCES` says
which settings the generic tests run; a target that is not listed fails them.
"""

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

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
    Target,
    TargetSFT,
)

INF = math.inf


@dataclass(frozen=True)
class Halfway(Target):
    """A user's own target: some trust in the label, the rest on the reference."""

    trust: float = 0.5
    needs_reference = True

    def label_weight(self, t):
        return self.trust

    def residual(self, t):
        return t.base.p


INSTANCES: dict[type[Target], list[Target]] = {
    OneHot: [OneHot()],
    GIFT: [
        GIFT(),
        GIFT(3.0),
        GIFT(8.0, smoothing=0.01, floor=1e-10),
        GIFT(5.0, smoothing=0.3),
        GIFT(20.0, floor=1e-10),
        GIFT(INF),
        GIFT(0.0),
    ],
    GIFTExact: [GIFTExact(3.0), GIFTExact(), GIFTExact(INF), GIFTExact(0.0)],
    LabelSmoothing: [LabelSmoothing(0.1), LabelSmoothing(0.0), LabelSmoothing(1.0)],
    DFT: [DFT()],
    BeyondLog: [
        BeyondLog(0.0),
        BeyondLog(0.5),
        BeyondLog(10.0),
        BeyondLog(-0.5),
        BeyondLog(1.0, keep_above=0.01),
        BeyondLog(0.0, keep_below=0.2),
        BeyondLog(2.0, keep_above=0.001, keep_below=0.5),
    ],
    ProFiT: [ProFiT(0.02), ProFiT(0.05, "lower"), ProFiT((0.01, 0.5), "middle")],
    EAFT: [EAFT(), EAFT(5, alpha=0.5), EAFT(20, divisor=1.0), EAFT(None), EAFT(None, alpha=0.5)],
    IWSFT: [IWSFT(), IWSFT(temperature=2.0, clip_max=1.5), IWSFT("token")],
    ASFT: [ASFT(), ASFT(1.0), ASFT(0.0)],
    SFTKL: [SFTKL(0.3), SFTKL(0.3, "reverse")],
    EntropyBonus: [EntropyBonus(0.1)],
    GEM: [GEM(), GEM(1.5), GEM(form="logsigmoid")],
    PSFT: [PSFT(), PSFT(0.1, 0.1)],
    Distillation: [
        Distillation(),
        Distillation(0.8),
        Distillation(0.5, temperature=2.0),
        Distillation(temperature=2.0),
        Distillation(0.5, top_k=5),
        Distillation(0.7, temperature=3.0, top_k=4),
        Distillation(0.0),
    ],
    TargetSFT: [TargetSFT(), TargetSFT(0.0), TargetSFT(1.0), TargetSFT(0.2, 6), TargetSFT(0.0, 6)],
    IDFT: [IDFT(), IDFT(2.0, 0.2, 1.5), IDFT(strength=0.5), IDFT(strength=0.0)],
    DEFT: [DEFT(), DEFT("cayley")],
    TALR: [TALR(2.0)],
    FLOW: [FLOW(2.0), FLOW(2.0, "sequence")],
    STM: [STM(), STM(20.0)],
    Focal: [Focal(), Focal(0.5), Focal(detach=True), Focal(0.0)],
    LUFFYShaping: [LUFFYShaping(), LUFFYShaping(0.3)],
    CHORDPhi: [CHORDPhi(), CHORDPhi(0.4)],
    Halfway: [Halfway()],
}

ALL = [target for several in INSTANCES.values() for target in several]


def concrete_targets() -> set[type[Target]]:
    """All concrete targets of the package and of the tests that can be imported by name."""
    found, todo = set(), [Target]
    while todo:
        todo += (new := [c for c in todo.pop().__subclasses__() if c not in found])
        found |= set(new)
    return {c for c in found if not inspect.isabstract(c) and _is_ours(c)}


def _is_ours(c: type) -> bool:
    """Not a class inside a function, nor one that a test wrote to a temporary folder."""
    file = getattr(sys.modules.get(c.__module__), "__file__", None) or ""
    ours = c.__module__.startswith("gift_lightning.") or Path(__file__).parent in Path(file).parents
    return ours and "<locals>" not in c.__qualname__


@dataclass(frozen=True)
class Case:
    """Inputs of a per-token loss in float64; every optional one is given."""

    z: Tensor
    labels: Tensor
    reference: Tensor
    old_logp: Tensor
    sequence_ids: Tensor
    name: str = field(default="", compare=False)

    @property
    def extras(self) -> dict[str, Tensor]:
        return {
            "reference_logits": self.reference,
            "old_logp": self.old_logp,
            "sequence_ids": self.sequence_ids,
        }


def make_case(
    n: int = 9, v: int = 23, spread: float = 2.0, shift: float = 0.0, seed: int = 0
) -> Case:
    """Random logits: `spread` is their standard deviation, `shift` is added to the label's."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    z, r = spread * normal(n, v), spread * normal(n, v)
    labels = torch.randint(0, v, (n,), generator=g)
    z[torch.arange(n), labels] += shift
    old = z.log_softmax(-1)[torch.arange(n), labels] + 0.4 * normal(n)
    return Case(z, labels, r, old, torch.arange(n) // 4, f"spread {spread} shift {shift}")


CASES = [
    make_case(),
    make_case(spread=0.3, seed=1),
    make_case(spread=8.0, seed=2),
    make_case(spread=1.0, shift=14.0, seed=3),
    make_case(spread=1.0, shift=-30.0, seed=4),
]


def _at(rows: Tensor, labels: Tensor) -> Tensor:
    return rows[torch.arange(len(labels)), labels]


def _logs(c: Case, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p [n, v] and log p_y [n]."""
    logp = torch.log_softmax(z, -1)
    return logp, _at(logp, c.labels)


def _onehot(c: Case) -> Tensor:
    return torch.nn.functional.one_hot(c.labels, c.z.shape[-1]).to(c.z.dtype)


def _entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def _floored_entropy(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return -(p * torch.log(p + 1e-10)).sum(-1)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax(a) ‖ softmax(b))."""
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def _per_sequence_mean(x: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([x[ids == i].mean() for i in ids])


def _top(logits: Tensor, k: int | None) -> Tensor:
    if k is None:
        return logits
    lowest_kept = logits.sort(-1, descending=True).values[:, k - 1 : k]
    return torch.where(logits >= lowest_kept, logits, -INF)


def one_hot(t: OneHot, c: Case, z: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(z, c.labels, reduction="none")


def gift(t: GIFT, c: Case, z: Tensor) -> Tensor:
    """q ∝ p̂_ref·e^{β·1[y]} by the definition; the point mass at β = ∞."""
    v = z.shape[-1]
    prior = (1 - t.smoothing) * c.reference.softmax(-1) + t.smoothing / v + t.floor
    q = _onehot(c) if t.beta == INF else (prior.log() + t.beta * _onehot(c)).softmax(-1)
    return -(q.detach() * z.log_softmax(-1)).sum(-1)


def gift_exact(t: GIFTExact, c: Case, z: Tensor) -> Tensor:
    """The boost b_t = softplus(S_{t+1} + log(e^β − 1)) at the label (methods.md 1.7)."""
    logr = c.reference.log_softmax(-1)
    q = _onehot(c).clone()
    if t.beta < INF:
        for i in range(len(z)):
            later = [j for j in range(i + 1, len(z)) if c.sequence_ids[j] == c.sequence_ids[i]]
            rest = sum((float(logr[j, c.labels[j]]) for j in later), 0.0)
            boost = math.log1p(math.expm1(t.beta) * math.exp(rest))
            q[i] = (logr[i] + boost * _onehot(c)[i]).softmax(-1)
    return -(q.detach() * z.log_softmax(-1)).sum(-1)


def label_smoothing(t: LabelSmoothing, c: Case, z: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        z, c.labels, reduction="none", label_smoothing=t.epsilon
    )


def dft(t: DFT, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    return -lp.exp().detach() * lp


def beyond_log(t: BeyondLog, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    p = lp.exp()
    keep = torch.ones_like(p)
    if t.keep_above is not None:
        keep = keep * (p.detach() >= t.keep_above)
    if t.keep_below is not None:
        keep = keep * (p.detach() <= t.keep_below)
    return keep * (-lp if t.alpha == 0 else (1 - p**t.alpha) / t.alpha)


def profit(t: ProFiT, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    p = lp.exp().detach()
    if t.direction == "middle":
        keep = (p >= t.tau[0]) & (p <= t.tau[1])
    else:
        keep = p >= t.tau if t.direction == "higher" else p < t.tau
    return -keep.to(z.dtype) * lp


def eaft(t: EAFT, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    if t.k is None:
        weight = (_floored_entropy(z) / math.log(z.shape[-1])) ** t.alpha
    else:
        weight = (_entropy(z.topk(min(t.k, z.shape[-1]), -1).values) / t.divisor) ** t.alpha
    return -weight.detach() * lp


def iwsft(t: IWSFT, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    ratio = lp - _at(c.reference.log_softmax(-1), c.labels)
    low, high = (0.0, 16.0) if t.level == "sequence" else (0.2, 1.8)
    if t.level == "sequence":
        ratio = _per_sequence_mean(ratio, c.sequence_ids)
    low = low if t.clip_min is None else t.clip_min
    high = high if t.clip_max is None else t.clip_max
    return -(t.temperature * ratio).exp().clamp(low, high).detach() * lp


def asft(t: ASFT, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    return -lp.exp().detach() * lp + t.kl_weight * _kl(c.reference, z)


def sftkl(t: SFTKL, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    kl = _kl(c.reference, z) if t.direction == "forward" else _kl(z, c.reference)
    return -lp + t.kl_weight * kl


def entropy_bonus(t: EntropyBonus, c: Case, z: Tensor) -> Tensor:
    logp, lp = _logs(c, z)
    return -lp + t.weight * (logp.exp() * logp).sum(-1)


def gem(t: GEM, c: Case, z: Tensor) -> Tensor:
    logp, lp = _logs(c, z)
    q = (z / t.beta).softmax(-1).detach()
    if t.form == "logsigmoid":
        q = q * torch.sigmoid(0.01 * (z - _at(z, c.labels)[:, None])).detach()
    return -(q * (lp[:, None] - logp)).sum(-1)


def psft(t: PSFT, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    ratio = (lp - c.old_logp).clamp(-20, 20).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - t.clip_low, 1 + t.clip_high))


def distillation(t: Distillation, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    teacher = (_top(c.reference, t.top_k) / t.temperature).softmax(-1)
    ce = -(teacher * (z / t.temperature).log_softmax(-1)).sum(-1)
    return (1 - t.weight) * -lp + t.weight * t.temperature**2 * ce


def target_sft(t: TargetSFT, c: Case, z: Tensor) -> Tensor:
    logp = z.log_softmax(-1)
    p, teacher = logp.exp().detach(), c.reference.softmax(-1)
    mix = p ** (1 - t.eta) * teacher**t.eta
    if t.top_k is not None:
        mix = mix * (_top(c.reference, t.top_k) > -INF)
    q = _at(p, c.labels)[:, None] * _onehot(c)
    q = q + (1 - _at(p, c.labels))[:, None] * mix / mix.sum(-1, keepdim=True)
    return -(q.detach() * logp).sum(-1)


def idft(t: IDFT, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    lp = lp.exp().clamp(1e-10, 1.0).log()
    kappa = torch.exp(-(lp + _floored_entropy(z)) / t.beta).clamp(t.clip_min, t.clip_max)
    kappa = 1 + t.strength * (kappa - 1)
    return -(lp.exp() ** kappa).detach() * lp


def deft(t: DEFT, c: Case, z: Tensor) -> Tensor:
    logp, lp = _logs(c, z)
    p = lp.exp().detach()
    if t.form == "renyi":
        alpha, epsilon = (logp.exp() ** 2).sum(-1).detach(), 1e-6
    else:
        f, d, epsilon = 0.5 * p.mean(), 1 - p + 1e-8, 1e-8
        alpha = (f + (1 - f) * (1 - d) / (1 + d + 1e-8)).clamp(1e-3, 1.0)
    return -((alpha * lp).exp() - 1) / (alpha + epsilon)


def talr(t: TALR, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    return -(lp.exp() ** (1 / t.tau)).detach() * lp


def flow(t: FLOW, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    loss = -_at(c.reference.log_softmax(-1), c.labels)
    if t.level == "sequence":
        loss = _per_sequence_mean(loss, c.sequence_ids)
    return -(-loss / t.temperature).exp() * lp


def stm(t: STM, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    perplexity = (-_at(c.reference.log_softmax(-1), c.labels)).exp()
    return -(perplexity <= t.threshold).to(z.dtype) * lp


def focal(t: Focal, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    factor = (1 - lp.exp()) ** t.gamma
    return -(factor.detach() if t.detach else factor) * lp


def luffy(t: LUFFYShaping, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    return -lp.exp() / (lp.exp() + t.gamma)


def chord_phi(t: CHORDPhi, c: Case, z: Tensor) -> Tensor:
    _, lp = _logs(c, z)
    phi = (lp.exp() * (1 - lp.exp())).detach()
    return -phi * lp.clamp(max=math.log(t.cutoff))


def halfway(t: Halfway, c: Case, z: Tensor) -> Tensor:
    logp, lp = _logs(c, z)
    return -t.trust * lp - (1 - t.trust) * (c.reference.softmax(-1) * logp).sum(-1)


FORMULAS: dict[type[Target], Callable[..., Tensor]] = {
    OneHot: one_hot,
    GIFT: gift,
    GIFTExact: gift_exact,
    LabelSmoothing: label_smoothing,
    DFT: dft,
    BeyondLog: beyond_log,
    ProFiT: profit,
    EAFT: eaft,
    IWSFT: iwsft,
    ASFT: asft,
    SFTKL: sftkl,
    EntropyBonus: entropy_bonus,
    GEM: gem,
    PSFT: psft,
    Distillation: distillation,
    TargetSFT: target_sft,
    IDFT: idft,
    DEFT: deft,
    TALR: talr,
    FLOW: flow,
    STM: stm,
    Focal: focal,
    LUFFYShaping: luffy,
    CHORDPhi: chord_phi,
    Halfway: halfway,
}


def documented_minus_published(t: Target, c: Case, z: Tensor) -> Tensor:
    """What a row reports beyond its published loss: constants, and GEM's β·CE form."""
    if isinstance(t, ASFT) or (isinstance(t, SFTKL) and t.direction == "forward"):
        return t.kl_weight * _entropy(c.reference)
    if isinstance(t, GEM) and t.form == "linear":
        ce = torch.nn.functional.cross_entropy(z / t.beta, c.labels, reduction="none")
        return t.beta * ce - gem(t, c, z)
    return torch.zeros(len(z), dtype=z.dtype)
