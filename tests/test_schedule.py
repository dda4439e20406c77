"""Schedules by hand-computed learning rates, and the guard's arithmetic."""

from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from gift_lightning.guard import Diverged, StepGuard, gradient_norm
from gift_lightning.schedule import Schedule


def rates(schedule: Schedule, steps: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = schedule.build(optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_constant_and_warmup_by_steps_and_by_fraction():
    assert rates(Schedule(), 4) == [1, 1, 1, 1]
    assert rates(Schedule(warmup=2), 4) == [0, 0.5, 1, 1]
    assert rates(Schedule(warmup=0.5), 4) == [0, 0.5, 1, 1]


def test_linear_and_cosine_fall_to_zero():
    assert rates(Schedule("linear", warmup=1), 5) == [0, 1, 0.75, 0.5, 0.25]
    assert rates(Schedule("cosine"), 4) == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_warmup_stable_decay_has_three_parts():
    seen = rates(Schedule("warmup_stable_decay", warmup=2, decay=0.4), 10)
    assert seen[:7] == [0, 0.5, 1, 1, 1, 1, 1]
    assert all(a > b for a, b in pairwise(seen[6:]))
    floor = rates(Schedule("warmup_stable_decay", decay=4, min_lr_ratio=0.5), 12)
    assert min(floor) >= 0.5


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_the_shapes_are_those_of_transformers(name, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    wsd = name == "warmup_stable_decay"
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=17,
        scheduler_specific_kwargs={"num_decay_steps": 5, "min_lr_ratio": 0.2} if wsd else None,
    )
    schedule = Schedule(name, warmup=warmup, decay=5, min_lr_ratio=0.2)
    for step in range(18):
        assert schedule.factor(step, 17) == pytest.approx(theirs.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        theirs.step()
    assert schedule.factor(25, 17) == schedule.factor(17, 17)


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit into a run of 4"):
        rates(Schedule(warmup=5), 4)
    with pytest.raises(ValueError, match="0 or more"):
        Schedule(warmup=-1)


def test_stable_without_decay_and_a_wrong_floor():
    assert rates(Schedule("warmup_stable_decay", decay=0), 3) == [1, 1, 1]
    with pytest.raises(ValueError, match="min_lr_ratio"):
        Schedule(min_lr_ratio=2)


def test_the_guard_counts_by_reason_and_stops():
    guard, ok, bad = StepGuard(2), torch.tensor(1.0), torch.tensor(float("inf"))
    assert guard.decide(ok, ok, 5) is None
    assert guard.decide(ok, ok, 0) == "no token has anything to teach"
    assert guard.decide(bad, ok, 5) == "loss is inf"
    assert guard.decide(ok, ok, 5) is None
    guard.decide(ok, bad, 5)
    with pytest.raises(Diverged, match="2 optimizer steps in a row"):
        guard.decide(ok, bad, 5)
    again = StepGuard(2)
    again.load_state_dict(guard.state_dict())
    assert again.skipped == guard.skipped and again.in_a_row == 2


def test_gradient_norm_is_that_of_all_gradients():
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(gradient_norm([a, b, c])) == 5
