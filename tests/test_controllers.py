"""μ from step to step: the published traces, the limits, the bounds, the state."""

import inspect
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gift_lightning import controllers
from gift_lightning.controllers import (
    CHORD,
    GAC,
    Constant,
    Controller,
    KLController,
    MixStats,
    Schedule,
)

NAN = math.nan
ROOT = Path(__file__).parents[1]
ShuffledGAC: Any = runpy.run_path(str(ROOT / "configs/lab/controls.py"))["ShuffledGAC"]


def test_the_published_defaults() -> None:
    """deepnovacore/GAC, by position and by name; then what is ours."""
    given = inspect.signature(GAC).parameters
    published = {
        "alpha": 0.5,
        "ema_beta": 0.99,
        "mu_min": 0.05,
        "mu_max": 0.9,
        "mu_init": 0.5,
        "change_cap": 0.01,
        "blend": 0.5,
        "update_every": 10,
        "trim": 0.1,
        "delta_cap_ratio": 0.0,
        "use_phi": True,
    }
    assert list(given) == [*published, "prior", "compat", "estimator", "kl_target"]
    assert {name: given[name].default for name in published} == published
    gac = GAC()
    assert gac.compat == "corrected" and gac.prior is not None
    prior = gac.prior
    assert (prior.warmup, prior.decay, prior.peak, prior.valley) == (200, 800, 0.85, 0.15)


def test_every_rule_has_one_address() -> None:
    for name in ("Constant", "Schedule", "CHORD", "GAC", "KLController", "HPTGate", "LUFFY"):
        assert issubclass(getattr(controllers, name), controllers.Controller)


def golden(shared: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((shared / "golden" / "gac_controller.json").read_text())
    assert len(data["cases"]) == 8
    return data


def batches(data: dict[str, Any], case: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    found = []
    for b in data["inputs"][case["input"]]["batches"]:
        logp = torch.tensor(b["logprob"], dtype=torch.float64)
        mask = (torch.arange(logp.shape[1]) < torch.tensor(b["lengths"])[:, None]).double()
        advantages = torch.tensor(b["advantages"], dtype=torch.float64)
        if advantages.ndim == 1:
            advantages = advantages[:, None].expand_as(logp)
        found.append((logp, mask, advantages, torch.tensor(b["expert"]).bool()))
    return found


def from_golden(case: dict[str, Any], compat: Any) -> GAC:
    k = case["config"]
    names = ("warmup_steps", "decay_steps", "mu_peak", "mu_valley")
    assert (k["prior"] is None) == (k["prior_params"] is None)
    return GAC(
        alpha=k["alpha_static"],
        ema_beta=k["ema_beta"],
        mu_min=k["mu_min"],
        mu_max=k["mu_max"],
        mu_init=k["init_mu"],
        change_cap=k["mu_change_cap"],
        blend=k["blend_weight"],
        update_every=k["mu_update_freq"],
        trim=k["trim_ratio_sft"],
        delta_cap_ratio=k["delta_g2_cap_ratio"],
        use_phi=k["use_phi_in_sft"],
        prior=Schedule(*(k["prior_params"][n] for n in names)) if k["prior_params"] else None,
        compat=compat,
    )


@pytest.mark.parametrize("compat", ["released", "corrected"])
def test_the_published_traces(shared: Path, compat: str) -> None:
    data = golden(shared)
    for case in data["cases"]:
        gac, alpha = from_golden(case, compat), case["config"]["alpha"]
        expected = case["official" if compat == "released" else "corrected_separate_ema"]
        for t, batch in enumerate(batches(data, case)):
            if alpha:
                gac.alpha = alpha[t]
            assert gac.update(gac.statistics(*batch), t) == gac.mu
            found = {"mu": gac.mu, "mu_raw": gac.mu_raw, "m": gac.average, **gac.smoothed}
            found["delta_g2"] = found.pop("delta2")
            for name in found.keys() & expected.keys():
                where = f"{case['name']}, step {t}: {name}"
                assert found[name] == pytest.approx(expected[name][t], rel=0, abs=1e-9), where


def test_statistics_are_those_of_their_definition() -> None:
    """Row by row in Python floats."""
    torch.manual_seed(0)
    logp = -torch.rand(9, 5, dtype=torch.float64) * 3
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5, 2, 1, 3])[:, None]).double()
    advantages = torch.randn(9, 5, dtype=torch.float64)
    expert = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0]).bool()
    for use_phi, trim in ((True, 0.0), (False, 0.25)):
        nll, gaps, means = [], [], []
        for i in range(9):
            length = int(mask[i].sum())
            tokens = [(float(logp[i, t]), float(advantages[i, t])) for t in range(length)]
            p = [math.exp(x) for x, _ in tokens]
            imitation = [-(q * (1 - q)) if use_phi else -1.0 for q in p]
            policy = [0.0 if expert[i] else -a for _, a in tokens]
            gaps.append(sum((s - r) ** 2 for s, r in zip(imitation, policy, strict=True)) / length)
            if expert[i]:
                nll.append(sum(-x for x, _ in tokens) / length)
            else:
                means.append(sum(a for _, a in tokens) / length)
        kept = sorted(nll)[1:-1] if trim else nll  # a quarter of five at either end
        found = GAC(use_phi=use_phi, trim=trim).statistics(logp, mask, advantages, expert)
        assert found.sigma_r2 == pytest.approx(_variance(means), rel=1e-6)
        assert found.sigma_s2 == pytest.approx(_variance(kept), rel=1e-6)
        assert found.delta2 == pytest.approx(sum(gaps) / 9, rel=1e-6)


def _variance(x: list[float]) -> float:
    mean = sum(x) / len(x)
    return sum((v - mean) ** 2 for v in x) / len(x)


def test_a_mask_of_bools_is_a_mask() -> None:
    torch.manual_seed(0)
    logp, mask = -torch.rand(4, 3), torch.tensor([[1, 1, 0]] * 4)
    rest = torch.randn(4, 3), torch.tensor([0, 1, 0, 1]).bool()
    found = GAC().statistics(logp, mask.bool(), *rest)
    assert found == GAC().statistics(logp, mask.float(), *rest)


def test_the_caller_says_that_there_is_no_signal() -> None:
    """`statistics` takes a batch without any advantage for one of a perfectly sure RL gradient."""
    logp, mask, experts = torch.full((3, 2), -0.5), torch.ones(3, 2), torch.tensor([0, 0, 1]).bool()
    stats = GAC().statistics(logp, mask, torch.zeros(3, 2), experts)
    assert stats.has_signal and stats.sigma_r2 == 1e-8
    sure, told = GAC(prior=None), GAC(prior=None)
    sure.update(replace(stats, sigma_s2=0.1), 0)
    told.update(replace(stats, sigma_s2=0.1, has_signal=False), 0)
    assert sure.mu < 0.5 < told.mu


def test_empty_branches() -> None:
    logp, mask = torch.full((3, 2), -0.5), torch.ones(3, 2)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    for experts, empty in ((torch.zeros(3).bool(), "sigma_s2"), (torch.ones(3).bool(), "sigma_r2")):
        stats = GAC().statistics(logp, mask, advantages, experts)
        assert math.isnan(getattr(stats, empty))
        corrected, released = (
            GAC(prior=None, mu_init=0.3, compat=compat) for compat in ("corrected", "released")
        )
        corrected.update(stats, 0)
        assert not corrected.smoothed and corrected.mu_raw == pytest.approx(0.5)  # 1 / (1 + 1)
        released.update(stats, 0)
        assert released.smoothed[empty] == 0.0


def test_a_statistic_that_is_no_number_is_left_out() -> None:
    for bad in (MixStats(0.3, 0.1, NAN), MixStats(math.inf, 0.1, 0.2), MixStats(0.3, NAN, 0.2)):
        gac = GAC(update_every=1)
        gac.update(MixStats(0.2, 0.2, 0.2), 0)
        before = gac.smoothed.copy()
        gac.update(bad, 1)
        assert gac.smoothed == before and gac.last_update == 0 and 0 <= gac.mu <= 1


def constant(stats: MixStats, steps: int, **options: Any) -> GAC:
    gac = GAC(**{"prior": None, "ema_beta": 0.5, "change_cap": 1.0, **options})
    for step in range(steps):
        gac.update(stats, step)
    return gac


def test_limits() -> None:
    """Without disagreement the inverse variances decide, with all of it α does."""
    wide = {"mu_min": 0.0, "mu_max": 1.0}
    near = constant(MixStats(0.3, 0.1, 0.0), 100, **wide)
    assert near.mu == pytest.approx(0.3 / 0.4, abs=1e-6)
    far = constant(MixStats(0.3, 0.1, 1e9), 100, alpha=0.2, **wide)
    assert far.mu == pytest.approx(0.2, abs=1e-6)
    capped = constant(MixStats(0.3, 0.1, 1e9), 100, delta_cap_ratio=2.0, **wide)
    assert capped.mu == pytest.approx((0.5 * 0.8 + 0.3) / 1.2, abs=1e-6)


def test_the_minimum_of_the_expected_error() -> None:
    """μ_raw against a search over (μ − α)²Δ² + μ²σ_s² + (1 − μ)²σ_r²."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for _ in range(20):
        r, s, d, alpha = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
        error = (grid - alpha) ** 2 * d + grid**2 * s + (1 - grid) ** 2 * r
        gac = constant(MixStats(r, s, d), 1, alpha=alpha)
        assert gac.mu_raw == pytest.approx(float(grid[error.argmin()]), abs=2e-5)


def test_ten_thousand_histories_stay_within_bounds_and_cap() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[float]:
        return torch.rand(n, dtype=torch.float64, generator=generator).tolist()

    for _ in range(10_000):
        low, first, high = sorted(draw(3))
        alpha, beta, cap, blend, trim, prior, kind = draw(7)
        gac = GAC(
            alpha,
            beta,
            low,
            high,
            first,
            cap / 10,
            blend,
            1 + int(kind * 3),
            trim / 2.1,
            delta_cap_ratio=max(0.0, kind - 0.5),
            prior=Schedule(2, 3, *draw(2)) if prior < 0.5 else None,
            compat="released" if kind < 0.5 else "corrected",
        )
        for step in range(5):
            before = gac.mu
            r, s, d, what = draw(4)
            stats = MixStats(
                NAN if what < 0.1 else 10 ** (6 * r - 3),
                NAN if 0.1 < what < 0.2 else 10 ** (6 * s - 3),
                10 ** (6 * d - 3),
                has_signal=what < 0.8,
            )
            gac.update(stats, step)
            assert low <= gac.mu <= high
            assert abs(gac.mu - before) <= cap / 10 + 1e-12
            assert 0 <= gac.mu_raw <= 1


def test_without_any_advantage_it_imitates() -> None:
    """Released, an all-failed rollout makes RL look certain; corrected, it is no gradient."""
    dead = MixStats(1e-8, 0.01, 0.05, has_signal=False)
    corrected = constant(dead, 200, change_cap=0.01)
    assert corrected.mu == corrected.mu_max and not corrected.smoothed
    released = constant(dead, 200, change_cap=0.01, compat="released")
    assert released.mu < 0.5


def test_a_prior_leaves_the_released_estimate_one_percent() -> None:
    """methods.md 3.6: the fixed point is .990·prior + .0099·μ_raw."""
    flat = Schedule(0, 0, 0.4, 0.4)
    stats = MixStats(0.9, 1e-8, 0.0)  # μ_raw = 1
    released = GAC(prior=flat, compat="released")
    corrected = GAC(prior=flat)
    for step in range(5000):
        released.update(stats, step)
        corrected.update(stats, step)
    assert released.mu == pytest.approx((0.5 * 0.4 + 0.5 * 0.01 * 1.0) / (1 - 0.5 * 0.99), abs=1e-6)
    assert corrected.mu == pytest.approx(0.5 * 0.4 + 0.5 * 0.9, abs=1e-6)  # of mu_max


def test_schedule(shared: Path) -> None:
    for case in json.loads((shared / "golden" / "chord.json").read_text())["schedule"]:
        names = ("warmup_steps", "decay_steps", "mu_peak", "mu_valley")
        schedule = Schedule(*(case[name] for name in names))
        found = [schedule.update(None, step) for step in case["steps"]]
        assert found == pytest.approx(case["mu"], rel=0, abs=1e-15)
    assert CHORD().update(None, 0) == 0.9 and CHORD().update(None, 1000) == 0.05


def test_kl_rules() -> None:
    rule = KLController(target=0.02, gain=0.1, mu_init=0.5)
    assert rule.update(None, 0) == 0.5
    assert rule.update(MixStats(1, 1, 1, kl=0.021), 1) == pytest.approx(0.5 * (1 + 0.1 * 0.05))
    assert rule.update(MixStats(1, 1, 1, kl=NAN), 2) == rule.mu
    for step in range(100):
        rule.update(MixStats(1, 1, 1, kl=5.0), step)
    assert rule.mu == 0.9
    for step in range(500):
        rule.update(MixStats(1, 1, 1, kl=0.0), step)
    assert rule.mu == 0.05
    gac = GAC(kl_target=0.02)
    assert gac.measures == {"proxy", "kl"}
    gac.update(MixStats(0.1, 0.1, 0.1, kl=1.0), 0)
    assert gac.alpha == pytest.approx(0.5 * 1.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(0.3),
        CHORD,
        KLController,
        GAC,
        lambda: GAC(compat="released", kl_target=0.1),
        lambda: ShuffledGAC(prior=None),
    ],
)
def test_a_restored_controller_goes_on_bit_for_bit(make: Any) -> None:
    generator = torch.Generator().manual_seed(1)

    def stats() -> MixStats:
        values = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
        return MixStats(*values, has_signal=values[0] > 0.2)

    rule: Controller = make()
    for step in range(37):
        rule.update(stats(), step)
    saved = json.loads(json.dumps(rule.state_dict()))  # plain numbers
    again: Controller = make()
    again.load_state_dict(saved)
    assert again.mu == rule.mu
    for step in range(37, 60):
        one = stats()
        assert again.update(one, step) == rule.update(one, step)
    assert again.state_dict() == rule.state_dict()


def test_the_labs_control_draws_from_what_was_measured() -> None:
    """Each statistic apart; it smooths what it drew."""
    gac = ShuffledGAC(update_every=1, ema_beta=0.0, prior=None)
    drawn = []
    for step in range(50):
        gac.update(MixStats(1.0 + step, 101.0 + step, 201.0 + step), step)
        drawn.append([gac.smoothed[name] for name in ("sigma_r2", "sigma_s2", "delta2")])
    for step, values in enumerate(drawn):
        for value, first in zip(values, (1.0, 101.0, 201.0), strict=True):
            assert first <= value <= first + step
    assert sum(a + 100 != b for a, b, _ in drawn) > 30
    assert sum(a != 1.0 + step for step, (a, _, _) in enumerate(drawn)) > 30


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Constant(1.1), "mu must be from 0 to 1"),
        (lambda: Schedule(-1, 0, 0.5, 0.1), "warmup and decay"),
        (lambda: CHORD(peak=2.0), "CHORD: peak"),
        (lambda: GAC(mu_min=0.6, mu_max=0.4), "mu_min=0.6, mu_init=0.5 and mu_max=0.4"),
        (lambda: GAC(mu_max=1.5), "mu_max=1.5"),
        (lambda: GAC(trim=0.5), "trim"),
        (lambda: GAC(update_every=0), "update_every"),
        (lambda: GAC(kl_target=0.0), "kl_target"),
        (lambda: KLController(target=0.0), "target"),
        (lambda: KLController(mu_init=0.01), "mu_init=0.01"),
    ],
)
def test_impossible_options_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"compat": "official"}, "compat is corrected or released, got 'official'"),
        ({"estimator": "exact"}, "estimator is proxy or gradient, got 'exact'"),
    ],
)
def test_unknown_choices_are_refused(option: dict[str, Any], said: str) -> None:
    """Past the type checks of the tests, which a user does not have."""
    with pytest.raises(ValueError, match=said):
        inspect.unwrap(GAC.__init__)(object.__new__(GAC), **option)
