"""The GRPO family against TRL's numbers, independent formulas and hand-computed values."""

import json
import math
from dataclasses import fields

import pytest
import torch

from gift_lightning import functional
from gift_lightning.policy_loss import (
    PolicyObjective,
    estimate_kl,
    group_advantages,
    has_signal,
    policy_loss,
    token_policy_losses,
    token_weights,
)

OTHER = ("luspo", "vespo")  # in the golden file, not offered here


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# --- against TRL 1.16 -----------------------------------------------------------------------


def divisor(config, num_tokens):
    """What TRL divides by beside our reduction: its share of a step in several micro-batches."""
    accumulation = config.get("gradient_accumulation_steps", 1)
    if config.get("mode") == "eval":
        accumulation = 1
    if config["loss_type"] in ("dapo", "cispo"):
        given = config.get("num_items_in_batch", num_tokens)
        per_generation = config.get("steps_per_generation", 1)
        if config.get("mode") != "eval":
            given = given * accumulation / per_generation
        return given / num_tokens
    return accumulation


def test_equals_trl(shared):
    file = json.loads((shared / "golden" / "grpo_losses.json").read_text())
    compared = 0
    for case in file["cases"]:
        config, inputs = case["config"], file["inputs"][case["input"]]
        if config["loss_type"] in OTHER or "sapo_temperature_pos" in config:
            continue
        logp = double(inputs["logp"]).requires_grad_()
        mask = double(inputs["mask"])
        loss = policy_loss(
            logp,
            logp.detach() if config.get("old") == "none" else double(inputs["old_logp"]),
            double(inputs["advantages"][config["scale_rewards"]]),
            mask,
            loss=config["loss_type"],
            level=config["importance_sampling_level"],
            clip_low=config["epsilon"],
            clip_high=config["epsilon_high"],
            delta=config.get("delta"),
            ref_logp=double(inputs["ref_logp"]),
            kl_weight=config["beta"],
            kl_estimator="k3_corrected" if config.get("use_bias_correction_kl") else "k3",
            max_completion_length=config["max_completion_length"],
        ) / divisor(config, mask.sum().item())
        (gradient,) = torch.autograd.grad(loss, logp)
        expected = case["outputs"]
        # TRL adds 1e-8 nowhere else than to bnpo's count: nothing here needs a wider tolerance.
        assert math.isclose(loss.item(), expected["loss"], rel_tol=1e-8, abs_tol=1e-9), case["id"]
        torch.testing.assert_close(gradient, double(expected["dloss_dlogp"]), rtol=0, atol=1e-9)
        compared += 1
    assert compared == 51


def test_advantages_equal_trl(shared):
    file = json.loads((shared / "golden" / "group_advantages.json").read_text())

    def rewards(values):
        return double([math.nan if value is None else value for value in values])

    for group in file["groups"]:
        for scale in ("group", "none"):
            found = group_advantages(rewards(group["rewards"])[None], scale=scale)[0]
            torch.testing.assert_close(found, double(group[f"trl_{scale}"]), rtol=0, atol=1e-9)
    for batch in file["batches"]:
        for scale in ("group", "batch", "none"):
            found = group_advantages(rewards(batch["rewards"]).view(-1, batch["K"]), scale=scale)
            expected = double(batch[f"trl_{scale}"]).view(found.shape)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# --- against formulas written here ----------------------------------------------------------


def inputs(b=5, t=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(b, t, generator=g, dtype=torch.float64)
    old = logp + 0.4 * torch.randn(b, t, generator=g, dtype=torch.float64)
    ref = logp + 0.5 * torch.randn(b, t, generator=g, dtype=torch.float64)
    lengths = torch.tensor([t, 1, 3, t - 1, 2])[:b]
    mask = torch.arange(t) < lengths[:, None]
    return logp, old, ref, double([1.3, -0.7, 0.0, -2.1, 0.4])[:b], mask


def naive(loss, level, low, high, delta, estimator, weight, width):
    """The definitions, row by row and token by token."""
    logp, old, ref, advantages, mask = inputs()
    logp = logp.clone().requires_grad_()
    rows = []
    for i in range(len(logp)):
        n = int(mask[i].sum())
        d = logp[i, :n] - old[i, :n]
        if level == "sequence" or loss == "gspo":
            d = d.mean().expand(n)
        a, losses = advantages[i], []
        for t in range(n):
            r = torch.exp(d[t])
            if loss == "cispo":
                value = -min(r.item(), high) * a * logp[i, t]
            elif loss == "sapo":
                tau = 1.0 if a > 0 else 1.05
                value = -4 / tau / (1 + torch.exp(-tau * (r - 1))) * a
            else:
                one = (r if delta is None else torch.clamp(r, max=delta)) * a
                value = -torch.min(one, torch.clamp(r, 1 - low, 1 + high) * a)
            gap = logp[i, t] - ref[i, t]
            k3 = torch.exp(-gap) - 1 + gap
            kl = {"k1": gap, "k2": gap**2 / 2, "k3": k3, "k3_corrected": r * k3}[estimator]
            losses.append(value + weight * kl)
        rows.append(torch.stack(losses))
    if loss in ("grpo", "gspo", "sapo"):
        total = torch.stack([row.mean() for row in rows]).mean()
    elif loss == "dr_grpo":
        total = sum(row.sum() for row in rows) / (len(rows) * width)
    else:
        total = torch.cat(rows).mean()
    return total, torch.autograd.grad(total, logp)[0]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("high", "delta"), [(0.2, None), (0.28, 1.6)])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_corrected"])
def test_equals_the_definition(loss, level, high, delta, estimator):
    delta = None if loss in ("cispo", "sapo") else delta  # refused there
    expected, gradient = naive(loss, level, 0.2, high, delta, estimator, 0.3, 20)
    logp, old, ref, advantages, mask = inputs()
    logp.requires_grad_()
    found = policy_loss(
        logp, old, advantages, mask, loss=loss, level=level, clip_low=0.2, clip_high=high,
        delta=delta, ref_logp=ref, kl_weight=0.3, kl_estimator=estimator,
        max_completion_length=20,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(found, logp)[0], gradient, rtol=0, atol=1e-13)


def test_by_hand():
    # One token, ratio 1.5, advantage 2: clipped at 1.2, loss -2.4 and no gradient.
    logp = double([[math.log(0.6)]]).requires_grad_()
    loss = policy_loss(logp, double([[math.log(0.4)]]), double([2.0]), double([[1]]))
    (gradient,) = torch.autograd.grad(loss, logp)
    assert math.isclose(loss.item(), -2.4, rel_tol=1e-12) and gradient.item() == 0
    # With advantage -2 it is not clipped: loss 3, gradient 3 by the log-ratio.
    logp = double([[math.log(0.6)]]).requires_grad_()
    loss = policy_loss(logp, double([[math.log(0.4)]]), double([-2.0]), double([[1]]))
    (gradient,) = torch.autograd.grad(loss, logp)
    assert math.isclose(loss.item(), 3.0) and math.isclose(gradient.item(), 3.0)
    # ... but for delta = 1.4.
    loss = policy_loss(logp, double([[math.log(0.4)]]), double([-2.0]), double([[1]]), delta=1.4)
    assert math.isclose(loss.item(), 2.8) and torch.autograd.grad(loss, logp)[0].item() == 0


def test_advantages_of_whole_numbers_are_those_of_their_floats():
    rewards = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    found = group_advantages(rewards)
    assert torch.equal(found, group_advantages(rewards.float())) and found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx([-0.8659, 0.8659, 0.8659, -0.8659], abs=1e-4)


def test_the_rounding_of_a_sum_is_no_signal():
    """0.1 + 0.2 is 0.3 and an ulp; a spread that a reward means is one, however small."""
    rewards = double([[0.3, 0.1 + 0.2], [0.3, 0.3 + 1e-9], [1e-9, 2e-9], [-1e3, -1e3]])
    assert has_signal(rewards).tolist() == [False, True, True, False]
    assert group_advantages(rewards)[0].tolist() == [0.0, 0.0]


def test_advantages_by_hand():
    rewards = double([[1, 0, 0, 1], [0.3, 0.3, 0.3, 0.3], [math.nan, 1, 0, math.nan]])
    none = group_advantages(rewards, scale="none")
    assert none[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert none[1].tolist() == [0, 0, 0, 0]
    assert none[2].tolist() == [0, 0.5, -0.5, 0]
    group = group_advantages(rewards)
    std = math.sqrt(1 / 3)  # of 1, 0, 0, 1 with n - 1
    assert math.isclose(group[0, 0].item(), 0.5 / (std + 1e-4), rel_tol=1e-12)
    assert group[1].tolist() == [0, 0, 0, 0]
    scored = double([1, 0, 0, 1, 0.3, 0.3, 0.3, 0.3, 1, 0])
    batch = group_advantages(rewards, scale="batch")
    assert math.isclose(batch[2, 1].item(), 0.5 / (scored.std().item() + 1e-4), rel_tol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(scale, dtype):
    for value in (0.1, 0.3, 1 / 3, -7.7, 1e8):
        rewards = torch.full((3, 8), value, dtype=dtype)
        rewards[1, 3:] = math.nan
        rewards[2] = torch.linspace(0, 1, 8)
        found = group_advantages(rewards, scale=scale)
        assert found.dtype == dtype and not found[:2].any() and found[2].any()
    assert has_signal(rewards).tolist() == [False, False, True]
    alone = torch.full((2, 4), math.nan, dtype=dtype)
    alone[0, 1] = 5.0
    assert not group_advantages(alone, scale=scale).any()


def test_masked_entries_are_never_read():
    logp, old, ref, advantages, mask = inputs()
    expected = policy_loss(logp, old, advantages, mask, ref_logp=ref, kl_weight=0.1)
    for x in (logp, old, ref):
        x[~mask] = math.nan
    logp.requires_grad_()
    found = policy_loss(logp, old, advantages, mask, ref_logp=ref, kl_weight=0.1)
    (gradient,) = torch.autograd.grad(found, logp)
    assert found.item() == expected.item() and not gradient[~mask].any()
    nothing = policy_loss(logp, old, advantages, torch.zeros_like(mask))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, logp)[0].any()


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_any_split_of_the_sequences_adds_up(loss):
    logp, old, _, advantages, mask = inputs()
    objective = PolicyObjective(loss, clip_high=0.3)
    whole = policy_loss(
        logp, old, advantages, mask, loss=loss, clip_high=0.3, max_completion_length=9
    )
    parts = 0.0
    for rows in ([0, 3], [1], [2, 4]):
        part = mask[rows]
        ids = part.nonzero()[:, 0]
        tokens = token_policy_losses(
            objective, logp[rows][part], old[rows][part], advantages[rows][ids], ids
        )
        weights = token_weights(objective, ids, int(mask.sum()), len(mask), 9)
        parts += (tokens.loss * weights).sum()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)


def test_which_tokens_are_clipped():
    ratio = double([0.5, 1.0, 1.5, 0.5, 1.5])
    advantages = double([-1, -1, 1, 1, -1])
    zeros, ids = torch.zeros(5, dtype=torch.float64), torch.arange(5)
    found = token_policy_losses(PolicyObjective(), ratio.log(), zeros, advantages, ids)
    assert found.low_clipped.tolist() == [True, False, False, False, False]
    assert found.high_clipped.tolist() == [False, False, True, False, False]
    torch.testing.assert_close(found.ratio, ratio)
    capped = PolicyObjective("cispo", clip_high=1.2)
    assert token_policy_losses(
        capped, ratio.log(), zeros, advantages, ids
    ).high_clipped.tolist() == [False, False, True, False, False]


def test_kl_estimators_have_the_gradients_they_claim():
    """On-policy in expectation: k2 and k3_corrected the reverse KL's, k3 the forward KL's."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(6, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(-1)
    logp = z.log_softmax(-1)
    p = logp.exp().detach()
    (reverse,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), z, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), z, retain_graph=True)
    ratio = (logp - logp.detach()).exp()
    for estimator, expected in {
        "k1": torch.zeros_like(z), "k2": reverse, "k3": forward, "k3_corrected": reverse,
    }.items():  # fmt: skip
        value = (p * estimate_kl(estimator, logp, ref, ratio)).sum()
        (found,) = torch.autograd.grad(value, z, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    off = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(-1)
    value = (off.exp() * estimate_kl("k3_corrected", logp, ref, (logp - off).exp())).sum()
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], reverse, rtol=0, atol=1e-13)


def test_importance_weighs_the_policy_and_not_the_kl():
    logp, old, ref, advantages, mask = inputs()
    rows = mask.nonzero()[:, 0]
    factor = torch.linspace(0, 2, len(rows), dtype=torch.float64)
    common = (logp[mask], old[mask], advantages[rows], rows)
    plain = token_policy_losses(PolicyObjective(), *common)
    objective = PolicyObjective(kl_weight=0.5)
    both = token_policy_losses(objective, *common, ref_logp=ref[mask], importance=factor)
    torch.testing.assert_close(both.loss, plain.loss * factor + 0.5 * both.kl, rtol=0, atol=1e-14)


def unchecked_objective(**options):
    """As a user makes it, without the type checks of the tests."""
    made = object.__new__(PolicyObjective)
    for field in fields(PolicyObjective):
        object.__setattr__(made, field.name, options.get(field.name, field.default))
    made.__post_init__()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "ppo"}, "loss is one of grpo, dr_grpo"),
        ({"level": "word"}, "level is one of token, sequence"),
        ({"clip_low": -0.1}, "clip_low must be a finite number"),
        ({"clip_high": math.nan}, "clip_high must be a finite number"),
        ({"kl_weight": math.inf}, "kl_weight must be a finite number"),
        ({"delta": 1.1}, "not above 1 \\+ clip_high"),
        ({"loss": "sapo", "delta": 7.0}, "delta has no place in sapo"),
        ({"loss": "cispo", "clip_high": 5.0, "delta": 7.0}, "delta has no place in cispo"),
        ({"kl_estimator": "k4"}, "kl_estimator is one of"),
    ],
)
def test_impossible_objectives_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        unchecked_objective(**options)


def test_what_is_missing_is_named():
    logp, old, _, advantages, mask = inputs()
    with pytest.raises(ValueError, match=r"kl_weight needs .* give ref_logp"):
        policy_loss(logp, old, advantages, mask, kl_weight=0.1)
    with pytest.raises(ValueError, match="advantage_scale is one of"):
        group_advantages.__wrapped__(torch.zeros(1, 2), scale="std")
    with pytest.raises(ValueError, match="give it"):
        token_weights(PolicyObjective("dr_grpo"), torch.zeros(1).long(), 1, 1, None)


def test_the_functional_module_offers_them():
    assert functional.policy_loss is policy_loss
    assert functional.group_advantages is group_advantages
