"""Values and gradients against those of the methods' own implementations (../shared/golden)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gift_lightning.controllers import Schedule
from gift_lightning.distribution import Distribution
from gift_lightning.functional import IGNORED, label_mass, pass_at_k, token_loss
from gift_lightning.loss import evaluate
from gift_lightning.target import Tokens
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
    LabelSmoothing,
    LUFFYShaping,
    OneHot,
    ProFiT,
    Target,
    TargetSFT,
)

Hyper = dict[str, Any]


def _beyond_log(h: Hyper) -> Target:
    name, _, number = h["objective_trans"].partition("-")
    alpha = 0.0 if "og" in name else 1.0  # logp, OnlyTopLogP: −log p; p, OnlyTopP: 1 − p
    if name == "GeneralFamily":
        return BeyondLog(float(number))
    if name.startswith("OnlyTop"):
        return BeyondLog(alpha, keep_above=float(number))
    if name.startswith("OnlyBottom"):
        return BeyondLog(alpha, keep_below=float(number))
    return BeyondLog(alpha)


def _eaft(h: Hyper) -> Target:
    if h["variant"] == "ddt_full_vocab":
        return EAFT(k=None)  # this code has no alpha
    return EAFT(divisor=3.0 if h["variant"] == "llamafactory" else 1.0, alpha=h["alpha"])


def _kd(h: Hyper) -> Target | None:
    if h["kind"] in ("reverse_kl", "topk_raw"):  # in tests of their own
        return None
    return Distillation(temperature=h.get("T", 1.0), top_k=h.get("K"))


def _profit(h: Hyper) -> Target:
    tau = h["prob_threshold"]
    return ProFiT(tau[0] if len(tau) == 1 else tuple(tau), h["threshold_direction"])


def _luffy(h: Hyper) -> Target | None:
    name, _, number = h["off_policy_reshape"].rpartition("_")
    return LUFFYShaping(float(number)) if name == "p_div_p" else None


def _target_sft(h: Hyper) -> Target | None:
    # The label is never forced into the support here.
    return None if h["support"] == "topk_label" else TargetSFT(h["eta"], h.get("K"))


BUILD = {
    "gift": lambda h: GIFT(h["beta"], h["smooth_lambda"], h["floor"]),
    "sft_asft": lambda h: ASFT(h["kl_weight"]),
    "sft_beyond_log": _beyond_log,
    "sft_deft": lambda h: DEFT("renyi" if h["objective_trans"] == "DEFT" else "cayley"),
    "sft_dft": lambda h: DFT(),
    "sft_eaft": _eaft,
    "sft_flow": lambda h: FLOW(h["temperature"], h["level"]),
    "sft_focal": lambda h: Focal(h["gamma"], h["detach"]),
    "sft_gem": lambda h: GEM(h["beta"], h["h"]),
    "sft_idft": lambda h: IDFT(h["beta"], h["gamma_min"], h["gamma_max"], h["lambda_t"]),
    "sft_iw_sft": lambda h: IWSFT(h["level"], h.get("temp", 1.0)),
    "sft_kd": _kd,
    "sft_kd_hybrid": lambda h: Distillation(h["lam"], h["T"]),
    "sft_label_smoothing": lambda h: LabelSmoothing(h["lam"]),
    "sft_luffy_shaping": _luffy,
    "sft_profit": _profit,
    "sft_psft": lambda h: PSFT(h["clip_ratio_low"], h["clip_ratio_high"]),
    "sft_sft": lambda h: OneHot(),
    "sft_sft_entropy": lambda h: EntropyBonus(h["lam"]),
    "sft_sft_kl_forward": lambda h: SFTKL(h["kl_weight"]),
    "sft_sft_kl_reverse": lambda h: SFTKL(h["lam"], "reverse"),
    "sft_stm": lambda h: STM(h["threshold"]),
    "sft_talr": lambda h: TALR(h["tau"]),
    "sft_target_sft": _target_sft,
}


class Golden:
    """One case of a golden file as tensors."""

    def __init__(self, data: dict[str, Any], case: dict[str, Any]) -> None:
        given = data["inputs"][case["input"]]
        self.name = f"{case['id']} {case['hparams']}"
        self.hyper: Hyper = case["hparams"]
        self.outputs: dict[str, Any] = case["outputs"]
        self.z = _tensor(given["z"])
        self.mask = torch.tensor(given["mask"]).bool()
        self.raw_labels = torch.tensor(given["labels"])
        self.labels = self.raw_labels.masked_fill(~self.mask, IGNORED)
        reference = given.get("ref_logits", given.get("teacher_logits"))
        self.reference = None if reference is None else _tensor(reference)
        old = given.get("old_logp")
        if self.hyper.get("old") == "current":
            old = self.at_label(self.z.log_softmax(-1)).tolist()
        self.old_logp = None if old is None else _tensor(old)
        self.extras = {"reference_logits": self.reference, "old_logp": self.old_logp}

    def at_label(self, rows: Tensor) -> Tensor:
        return rows.gather(-1, self.raw_labels[:, None])[:, 0]

    def loss_and_gradient(self, target: Target) -> tuple[Tensor, Tensor]:
        z = self.z.clone().requires_grad_()
        loss = token_loss(target, z, self.labels, **self.extras)
        loss.sum().backward()
        return loss.detach(), z.grad

    def constant(self, target: Target) -> Tensor:
        """What the reported value has beyond the published one: cross-entropies, not divergences.

        For linear GEM, CE(δ, softmax(z/β))·β in place of −Σ q·(log p_y − log p), q = softmax(z/β).
        """
        extra = torch.zeros(len(self.z), dtype=torch.float64)
        if isinstance(target, ASFT) or target == SFTKL(self.hyper.get("kl_weight", -0.0)):
            extra = target.kl_weight * _entropy(self.reference)
        elif self.hyper.get("kind") in ("kl", "kl_T2"):
            extra = target.temperature**2 * _entropy(self.reference / target.temperature)
        elif isinstance(target, GEM) and target.form == "linear":
            extra = target.beta * _entropy(self.z / target.beta)
        return extra * self.mask


def _tensor(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def _load(shared: Path, name: str) -> list[Golden]:
    file = shared / "golden" / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"no reference numbers here: {file} is missing")
    data = json.loads(file.read_text())
    return [Golden(data, case) for case in data["cases"]]


def assert_equal(a: Tensor, b: Tensor, c: Golden, atol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=atol, msg=lambda m: f"{c.name}: {m}")


@pytest.mark.parametrize("name", sorted(BUILD))
def test_equals_the_published_implementation(shared: Path, name: str) -> None:
    tried = 0
    for c in _load(shared, name):
        target = BUILD[name](c.hyper)
        if target is None:
            continue
        tried += 1
        value, gradient = c.loss_and_gradient(target)
        expected = _tensor(c.outputs["per_token_loss"]) + c.constant(target)
        # axolotl's entropy has 1e-10 inside its logarithm, ours (LLaMA-Factory's) has not.
        axolotl = c.hyper.get("variant") == "axolotl"
        assert_equal(gradient, _tensor(c.outputs["grad_sum"]), c, 5e-9 if axolotl else 1e-11)
        assert_equal(value, expected, c, 5e-8 if axolotl else 1e-11)
        mass = label_mass(target, c.z, c.labels, **c.extras)
        canonical = c.at_label(c.z.softmax(-1) - _tensor(c.outputs["grad_sum"]))
        assert_equal(mass[c.mask], canonical[c.mask], c, 5e-9 if axolotl else 1e-11)
        assert torch.equal(mass.isnan(), ~c.mask)
        if "q_y" in c.outputs:
            assert_equal(mass[c.mask], _tensor(c.outputs["q_y"])[c.mask], c)
    assert tried >= 3


def test_gift_label_weight_and_divergence(shared: Path) -> None:
    """γ is the published w; KL(q‖π) and the entropy of the target are the published ones."""
    for c in _load(shared, "gift"):
        target = BUILD["gift"](c.hyper)
        reference = Distribution(c.reference, c.raw_labels)
        t = Tokens(c.z, c.raw_labels, reference=reference)
        result = evaluate(target, t, gradient=False, diagnose=True)
        for ours, published in (
            (result.gamma, c.outputs["w"]),
            (result.kl_target, c.outputs["kl_q_p"]),
            (result.value - result.kl_target, c.outputs["entropy_q"]),
        ):
            assert_equal(ours[c.mask], _tensor(published)[c.mask], c)


def test_methods_made_of_two_targets(shared: Path) -> None:
    """Published terms that are no target of their own are differences of two."""
    for c in _load(shared, "sft_kd"):
        if c.hyper["kind"] == "reverse_kl":
            pairs = zip(*map(c.loss_and_gradient, (SFTKL(1.0, "reverse"), OneHot())), strict=True)
            value, gradient = (a - b for a, b in pairs)
        elif c.hyper["kind"] == "topk_raw":
            top = c.reference.softmax(-1).topk(c.hyper["K"], -1).values.sum(-1)
            value, gradient = c.loss_and_gradient(Distillation(top_k=c.hyper["K"]))
            value, gradient = top * value, top[:, None] * gradient
        else:
            continue
        assert_equal(gradient, _tensor(c.outputs["grad_sum"]), c)
        assert_equal(value, _tensor(c.outputs["per_token_loss"]), c)
    for c in _load(shared, "sft_luffy_shaping"):
        if c.hyper["off_policy_reshape"] == "no_reshape":  # −p_y
            value, gradient = c.loss_and_gradient(BeyondLog(1.0))
            assert_equal(gradient, _tensor(c.outputs["grad_sum"]), c)
            assert_equal(value - 1.0 * c.mask, _tensor(c.outputs["per_token_loss"]), c)


def test_chord_phi(shared: Path) -> None:
    data = json.loads((shared / "golden" / "chord.json").read_text())
    logp, mask = (_tensor(data["phi_input"][key]) for key in ("logp", "mask"))
    cases = [c for c in data["phi_cases"] if c["kind"] == "sft_phi" and c["token_level"]]
    assert len(cases) == 2
    for case in cases:
        # A class for the label and one for the rest: dlogp_y/dz_y is then 1 - p_y.
        z = torch.stack([logp, torch.log(-torch.expm1(logp))], -1).flatten(0, 1).requires_grad_()
        labels = torch.zeros(logp.numel(), dtype=torch.int64)
        labels.masked_fill_(mask.flatten() == 0, IGNORED)
        target = CHORDPhi(case["cutoff_prob"])
        loss = token_loss(target, z, labels).sum() / (mask.sum() + 1e-8)
        (gradient,) = torch.autograd.grad(loss, z)
        expected = (_tensor(case["dloss_dlogp"]) * -torch.expm1(logp)).flatten()
        torch.testing.assert_close(loss.detach(), _tensor(case["loss"]), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(gradient[:, 0], expected, rtol=1e-12, atol=1e-15)


def test_chord_as_ms_swift_mixes(shared: Path) -> None:
    data = json.loads((shared / "golden" / "chord.json").read_text())
    given = data["swift_input"]
    z, mask = _tensor(given["z"]), torch.tensor(given["mask"]).bool()
    labels = torch.tensor(given["labels"]).masked_fill(~mask, IGNORED)
    for case in data["swift_cases"]:
        schedule = Schedule(
            *(case[f"mu_{key}"] for key in ("warmup_steps", "decay_steps", "peak", "valley"))
        )
        mu = schedule.update(None, case["global_step"])
        assert mu == pytest.approx(case["mu"], abs=1e-15)
        leaf = z.clone().requires_grad_()
        target = CHORDPhi() if case["enable_phi"] else OneHot()
        imitation = token_loss(target, leaf, labels).sum() / mask.sum()
        loss = (1 - mu) * case["grpo_loss"] + mu * imitation
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(loss.detach(), _tensor(case["loss"]), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(gradient, _tensor(case["dloss_dz"]), rtol=1e-10, atol=1e-14)


def test_target_sft_distribution(shared: Path) -> None:
    for c in _load(shared, "sft_target_sft"):
        target = BUILD["sft_target_sft"](c.hyper)
        if target is not None:
            q = c.z.softmax(-1) - c.loss_and_gradient(target)[1]
            assert_equal(q[c.mask], _tensor(c.outputs["Q"])[c.mask], c)


def test_pass_at_k(shared: Path) -> None:
    file = shared / "golden" / "passk.json"
    if not file.is_file():
        pytest.skip(f"no reference numbers here: {file} is missing")
    data = json.loads(file.read_text())
    for n, c, k, expected in data["table"]:
        assert float(pass_at_k(n, c, k)) == pytest.approx(expected, rel=1e-12, abs=1e-15), (n, c, k)
    for entry in data["datasets"]:
        counts = torch.tensor(entry["correct_counts"])
        for k, expected in entry["pass_at"].items():
            mean = float(pass_at_k(entry["n"], counts, int(k)).mean())
            assert mean == pytest.approx(expected, rel=1e-12)
    for entry in data["avg"]:
        correct = torch.tensor(entry["correct"])
        unbiased = pass_at_k(correct.shape[1], correct.sum(-1), entry["k"]).mean()
        assert float(unbiased) == pytest.approx(entry["pass_at_k_unbiased"], rel=1e-12)
