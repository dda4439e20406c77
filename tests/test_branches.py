"""Gradients of two branches, apart: norms, noise and distance between micro-batches."""

import math

import pytest
import torch
from torch import Tensor, nn

from gift_lightning.branches import BranchGradients, last_block
from gift_lightning.models import Lora, causal_lm, tiny_llama


def alone(x: Tensor, how: str) -> Tensor:
    return x


def losses(w: nn.Parameter, r: Tensor, s: Tensor) -> dict[str, Tensor]:
    return {"rollouts": w @ r, "demonstrations": w @ s}  # their gradients are r and s


def test_the_estimates_are_those_of_their_formulas() -> None:
    torch.manual_seed(0)
    w, r, s = nn.Parameter(torch.randn(7)), torch.randn(4, 7), torch.randn(4, 7)
    gradients = BranchGradients([w])
    for _ in range(2):  # a step leaves nothing for the next
        for j in range(4):
            gradients.add(losses(w, r[j], s[j]))
        norms, stats = gradients.take(alone)
        mean_r, mean_s = r.mean(0), s.mean(0)
        assert norms["rollouts"] == pytest.approx(float(mean_r.norm()), rel=1e-6)
        assert norms["demonstrations"] == pytest.approx(float(mean_s.norm()), rel=1e-6)
        cosine = float(torch.cosine_similarity(mean_r, mean_s, dim=0))
        assert norms["cosine"] == pytest.approx(cosine, rel=1e-5)
        # The variance of a mean of four is a quarter of the unbiased variance of one.
        assert stats.sigma_r2 == pytest.approx(float(r.var(0).sum()) / 4, rel=1e-5)
        assert stats.sigma_s2 == pytest.approx(float(s.var(0).sum()) / 4, rel=1e-5)
        distance = float((mean_r - mean_s).square().sum()) - stats.sigma_r2 - stats.sigma_s2
        assert stats.delta2 == pytest.approx(max(distance, 0.0), rel=1e-5, abs=1e-6)
    assert w.grad is None


def test_noise_and_distance_are_unbiased() -> None:
    torch.manual_seed(0)
    w, found = nn.Parameter(torch.zeros(5)), []
    center = torch.tensor([2.0, 0, 0, 0, 0])
    for _ in range(4000):
        gradients = BranchGradients([w])
        for _ in range(3):
            gradients.add(losses(w, center + torch.randn(5), 0.5 * torch.randn(5)))
        stats = gradients.take(alone)[1]
        found.append((stats.sigma_r2, stats.sigma_s2, stats.delta2))
    mean = torch.tensor(found, dtype=torch.float64).mean(0)
    expected = torch.tensor([5 / 3, 5 / 12, 4.0], dtype=torch.float64)
    torch.testing.assert_close(mean, expected, rtol=0.05, atol=0)


def test_one_micro_batch_or_one_branch_has_no_noise() -> None:
    w = nn.Parameter(torch.ones(2))
    gradients = BranchGradients([w])
    gradients.add(losses(w, torch.ones(2), torch.ones(2)))
    norms, stats = gradients.take(alone)
    assert norms["cosine"] == pytest.approx(1.0)
    assert math.isnan(stats.sigma_r2) and math.isnan(stats.sigma_s2) and math.isnan(stats.delta2)
    gradients.add({"rollouts": w @ torch.ones(2)})
    norms, stats = gradients.take(alone)
    assert norms == {"rollouts": pytest.approx(math.sqrt(2))} and math.isnan(stats.delta2)


def test_a_loss_that_does_not_reach_a_parameter() -> None:
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    gradients = BranchGradients([w, other])
    gradients.add({"rollouts": w.sum()})
    assert gradients.take(alone)[0] == {"rollouts": pytest.approx(math.sqrt(2))}


def test_last_block() -> None:
    model = tiny_llama(hidden_size=16, num_layers=3, num_heads=2)
    assert last_block(model) is model.model.layers[-1]
    lora = causal_lm("gift:countdown", lora=Lora(r=2))
    found = [p for p in last_block(lora).parameters() if p.requires_grad]
    assert found and len(found) * 3 == sum(p.requires_grad for p in lora.parameters())
    alone = nn.Linear(2, 2)
    assert last_block(alone) is alone
