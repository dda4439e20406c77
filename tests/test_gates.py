"""Rules for each prompt: what they choose, what that does to the gradient, what they refuse."""

import math

import lightning.pytorch as pl
import pytest
import torch

from gift_lightning.countdown_data import CountdownData
from gift_lightning.functional import group_advantages
from gift_lightning.gates import LUFFY, SRFT, Groups, HPTGate, ReLIFT
from gift_lightning.grpo import GRPO
from gift_lightning.hybrid_data import HybridData
from gift_lightning.models import causal_lm
from gift_lightning.problems import CountdownProblems
from gift_lightning.prompts import PromptData
from gift_lightning.targets import DFT, LUFFYShaping, OneHot
from test_grpo import Keep, here, weights
from test_hybrid import RL, demonstrations, fit, gradients, hybrid, model, prompts, trainer

NAN = math.nan
GROUPS = Groups(
    torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],  # unsolved
            [1.0, 0.0, 0.0, 0.0],  # a quarter
            [0.0, 0.5, 0.0, 0.5],  # unsolved, with a signal
            [1.0, 1.0, 1.0, 1.0],
            [0.0, 0.0, NAN, NAN],  # unsolved, without a demonstration
            [NAN, NAN, NAN, NAN],
        ],
        dtype=torch.float64,
    ),
    torch.tensor([7, 3, 9, 2, -1, 4]),
    torch.tensor([1.0, 1.0, 0.5, 1.0, NAN, NAN], dtype=torch.float64),
)


def test_hpt_imitates_what_is_solved_too_rarely():
    for threshold, imitated in ((0.0, [0, 2]), (0.25, [0, 1, 2])):
        gate = HPTGate(threshold, weight=0.3)
        decision = gate.decide(GROUPS, group_advantages)
        assert decision.demonstrations.tolist() == [[7, 3, 9][i] for i in imitated]
        assert decision.weights.tolist() == [1.0] * len(imitated)
        assert (~decision.counted).nonzero()[:, 0].tolist() == imitated
        expected = group_advantages(GROUPS.rewards)
        expected[imitated] = 0.0
        assert torch.equal(decision.advantages, expected)
        assert gate.parts() == {"share": len(imitated) / 6} and gate.weight == 0.3


def test_relift_waits():
    gate = ReLIFT(size=3)
    first = gate.decide(GROUPS, group_advantages)
    assert first.demonstrations.tolist() == [] and gate.waiting == [7, 9]
    again = ReLIFT(size=3)
    again.load_state_dict(gate.state_dict())
    for one in (gate, again):
        second = one.decide(GROUPS, group_advantages)
        assert second.demonstrations.tolist() == [7, 9, 7, 9] and one.waiting == []
        assert torch.equal(second.advantages, group_advantages(GROUPS.rewards))
        assert second.counted.all()
    assert gate.parts() == {"share": 2 / 6, "waiting": 0.0}


@pytest.mark.parametrize("scale", ["group", "none"])
def test_luffy_compares_rollouts_and_demonstration(scale):
    decision = LUFFY().decide(GROUPS, lambda r: group_advantages(r, scale=scale))
    assert decision.demonstrations.tolist() == [7, 3, 9, 2, 4]
    if scale == "none":
        assert decision.advantages[0].tolist() == pytest.approx([-0.2] * 4)
        assert decision.weights.tolist() == pytest.approx([0.8, 0.6, 0.2, 0.0, 0.0])
        assert decision.advantages[1].tolist() == pytest.approx([0.6, -0.4, -0.4, -0.4])
    assert decision.advantages[3].tolist() == [0.0] * 4  # all right, as is the demonstration
    alone = group_advantages(GROUPS.rewards, scale=scale)
    assert torch.equal(decision.advantages[4:], alone[4:])


def test_srft_weighs_by_entropy():
    logp = torch.tensor([-0.1, -2.0, -0.5]).double()
    entropy, sequences = torch.tensor([0.2, 0.4, 1.0]).double(), torch.tensor([0, 0, 1])
    advantages = torch.tensor([0.7, 0.7, -0.2]).double()
    found = SRFT().demonstration_losses(logp, entropy, sequences, advantages)
    for i, h in enumerate((0.3, 0.3, 1.0)):
        a = float(advantages[i])
        expected = -0.5 * math.exp(-h) * float(logp[i]) - a * math.exp(float(logp[i]))
        assert float(found[i]) == pytest.approx(expected)
    scaled = SRFT().rollout_advantages(advantages, entropy, sequences)
    assert scaled.tolist() == pytest.approx([0.07 * math.exp(0.3)] * 2 + [-0.2])


# In the module. The prompts are those of the demonstrations.


def paired(parts=1, num=40, **options):
    defaults = {"prompts_per_rollout": 4, "num_generations": 4, "batch_size": 16 // parts}
    source = CountdownProblems("demonstration", "in", num)
    return HybridData(
        PromptData(source, **{**defaults, **options}),
        CountdownData(num_demonstrations=40, num_eval=2, batch_size=4),
    )


GATES = {
    "HPTGate": (lambda: HPTGate(0.3, weight=0.7), {"target": DFT()}),
    "ReLIFT": (lambda: ReLIFT(3), {}),
    "LUFFY": (LUFFY, {"target": LUFFYShaping(), "loss": "dr_grpo", "advantage_scale": "none"}),
    "LUFFY by sequence": (LUFFY, {"loss": "grpo"}),
    "SRFT": (SRFT, {}),
}


@pytest.mark.parametrize("name", GATES)
def test_any_split_of_a_step_gives_the_same_gradient(name):
    make, options = GATES[name]
    found = []
    for parts in (1, 4):
        gate = make()
        module = hybrid(gate, "Rare" if name in ("HPTGate", "ReLIFT") else "Even", **options)
        keep = gradients(module, paired(parts), steps=3, accumulate_grad_batches=parts)
        assert gate.share > 0
        found.append(torch.stack(keep))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_luffys_gradient_is_the_one_of_the_formula():
    """Against the dense model in float64: one group of n + 1, one divisor."""
    options = {"target": LUFFYShaping(0.1), "loss": "dr_grpo", "advantage_scale": "none"}
    module, data = hybrid(LUFFY(), **options), paired()
    dense = causal_lm("gift:countdown").double()
    dense.load_state_dict(module.model.state_dict())
    keep = fit(module, data)
    x, examples = keep.experiences[0], data.train_examples

    def logp(prompt, completion):
        logits = dense(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        found = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return found.gather(1, completion[:, None])[:, 0]

    total, divisor = 0.0, (16 + 4) * 16  # rows times the longest completion
    prompt_ids = x.prompt_ids.split(x.prompt_lengths.tolist())
    completions = list(x.completions())
    for group in range(4):
        rows = range(4 * group, 4 * group + 4)
        ids, labels = examples[int(x.demonstrations[group])]
        learned = labels >= 0
        assert torch.equal(ids[~learned], prompt_ids[rows[0]])  # its own prompt
        text = module.tokenizer.decode(ids[learned][:-1])
        rewards = [float(x.rewards[i]) for i in rows] + [float(sum(map(ord, text)) % 3)]
        mean = sum(rewards) / 5
        for i, reward in zip(rows, rewards[:4], strict=True):
            lp = logp(prompt_ids[i], completions[i])
            total = total - ((lp - lp.detach()).exp() * (reward - mean)).sum() / divisor
        p = logp(ids[~learned], ids[learned]).exp()
        total = total - (rewards[4] - mean) * (p / (p + 0.1)).sum() / divisor
    expected = torch.autograd.grad(total, list(dense.parameters()))
    for found, wanted in zip(keep.gradients[0], expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


def test_a_gate_without_demonstrations_to_train_is_grpo():
    """No prompt of a rollout may be unsolved where the gate asks for that."""
    found = gradients(hybrid(ReLIFT(1000)), paired(), steps=2)
    alone = paired().prompts
    expected = gradients(model(GRPO, [here("Even")], **RL), alone, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["ReLIFT", "LUFFY", "HPTGate"])
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(name, stop, tmp_path):
    """Inside a rollout of two steps, and between two of them."""
    make, options = GATES[name]

    def run(steps, **more):
        module = hybrid(make(), "Rare", **options)
        fit(module, paired(batch_size=8), steps=steps, **more)
        return module

    whole = run(7)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)
    run(stop, callbacks=[checkpoint])
    again = run(7, ckpt_path=next(tmp_path.glob("*.ckpt")))
    assert torch.equal(weights(again), weights(whole))
    assert again.controller.state_dict() == whole.controller.state_dict()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HPTGate(1.0), "threshold is a share"),
        (lambda: HPTGate(weight=0.0), "weight must be above 0"),
        (lambda: ReLIFT(0), "size must be at least 1"),
        (lambda: ReLIFT(weight=-1.0), "weight must be above 0"),
        (lambda: SRFT(imitation=-1.0), "at least 0"),
        (lambda: hybrid(LUFFY(), max_resamples=2), "max_resamples"),
        (lambda: hybrid(SRFT(), target=DFT()), "drop model.target"),
        (lambda: hybrid(LUFFY(), reduction="sequence"), "drop model.reduction"),
        (
            lambda: fit(hybrid(LUFFY()), HybridData(prompts(), demonstrations())),
            "none of the 12 prompts has one",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_prompts_without_a_demonstration_are_plain_rl():
    module, data = hybrid(LUFFY(), target=OneHot()), paired(num=60)
    keep = Keep()
    fit(module, data, callbacks=[keep])
    assert module._pairs.num_paired < 60
    x = keep.experiences[0]
    have = [bool(module._pairs.of[i]) for i in x.problems.tolist()]
    assert len(x.demonstrations) == sum(have)


def test_two_processes_train_as_one_does():
    """They share the scoring of demonstrations, and deal them like completions."""
    make, options = GATES["LUFFY"]
    found = []
    for parts, ranks in ((2, {}), (1, {"strategy": "ddp_fork", "devices": 2})):
        module = hybrid(make(), max_completion_length=8, **options)
        start = weights(module)
        run = trainer(4, accumulate_grad_batches=parts, **ranks)
        run.fit(module, paired(batch_size=4))
        found.append(weights(module) - start)
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ReLIFT", "HPTGate"])
def test_demonstrations_over_the_steps_of_a_rollout(name):
    """Two steps and two passes: ReLIFT's wait for the first step and are trained once, HPT's are
    dealt over the steps and passes as the completions that they replace."""
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            chosen = module.experience.demonstrations.tolist()
            seen.append((chosen, module.demonstrations["sample_ids"].tolist()))

    make, options = GATES[name]
    fit(
        hybrid(make(), "Rare", **options),
        paired(batch_size=8, num_iterations=2),
        steps=8,
        callbacks=[Look()],
    )
    assert any(chosen for chosen, _ in seen)
    for first in (0, 4):
        chosen = sorted(seen[first][0])
        trained = [ids for _, ids in seen[first : first + 4]]
        if name == "ReLIFT":
            assert sorted(trained[0]) == chosen and trained[1:] == [[], [], []]
        else:
            assert sorted(trained[0] + trained[1]) == chosen == sorted(trained[2] + trained[3])


def test_a_gate_needs_no_stream_of_demonstrations():
    """More in a batch than there are, which only a stream would need."""
    data = paired()
    data.demonstrations.batch_size = 1000
    fit(hybrid(LUFFY()), data)
