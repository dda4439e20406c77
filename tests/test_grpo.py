"""GRPO on Countdown: one step's gradient, inner epochs, resume, learning, refusals."""

import gc
import math
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD, AdamW
from transformers import OPTConfig, OPTForCausalLM

from gift_lightning.grpo import GRPO
from gift_lightning.means import Means
from gift_lightning.models import causal_lm
from gift_lightning.policy_loss import PolicyObjective
from gift_lightning.problems import CountdownProblems, Problem, Problems
from gift_lightning.prompts import PromptData
from gift_lightning.references import FrozenCopy

OURS = {"Even", "Nothing", "Rare", "Sometimes"}


def here(name):
    return f"small_rewards.{name}"


def grpo(reward="Even", lr=1e-2, **options):
    options = {"max_completion_length": 16, "reward_workers": 1, **options}
    return GRPO(
        causal_lm("gift:countdown"),
        [here(reward) if reward in OURS else reward],
        optimizer=partial(SGD, lr=lr),
        **options,
    )


def data(**options):
    defaults = {"prompts_per_rollout": 4, "num_generations": 4, "batch_size": 16}
    return PromptData(CountdownProblems("train", "any", 12), **{**defaults, **options})


class Keep(pl.Callback):
    """What happened: the rollouts, and the gradient of every step."""

    def __init__(self):
        self.experiences, self.gradients, self.metrics = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append([p.grad.clone() for p in module.parameters()])
        if not self.experiences or self.experiences[-1] is not module.experience:
            self.experiences.append(module.experience)

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.metrics.append(dict(module.means._sums) | dict(module.means._largest))


def fit(module, prompts, steps=1, folder=None, callbacks=(), ckpt_path=None, **options):
    pl.seed_everything(0, verbose=False)
    keep = Keep()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1000,
        default_root_dir=folder,
        callbacks=[keep, *callbacks],
        **options,
    )
    trainer.fit(module, prompts, ckpt_path=ckpt_path)
    return keep


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_any_split_of_a_step_gives_the_same_gradient(loss):
    options = {"loss": loss, "clip_high": 0.28, "kl_weight": 0.1, "entropy_weight": 0.01}
    found = []
    for batch_size, accumulate in ((16, 1), (4, 4), (2, 8)):
        module = grpo(reference=FrozenCopy(), **options)
        keep = fit(module, data(batch_size=batch_size), accumulate_grad_batches=accumulate)
        found.append(torch.cat([g.flatten() for g in keep.gradients[0]]))
    assert found[0].abs().max() > 1e-4
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_shared_prompts_change_nothing_but_the_time(loss):
    """Over two rollouts of two steps, with scored old log-probabilities and a reference."""
    found, start = [], weights(grpo())
    for share in (False, True):
        module = grpo(reference=FrozenCopy(), loss=loss, kl_weight=0.1)
        rows = []
        original = module._transferred
        module._transferred = lambda *x, to=original, rows=rows: rows.append(to(*x)) or rows[-1]
        fit(module, data(batch_size=8, num_iterations=2, share_prompts=share), steps=8)
        assert any(x["document_ids"] is not None for x in rows) == share
        found.append(weights(module) - start)
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"loss": "dapo", "kl_weight": 0.1}, {"loss": "gspo", "reward": "Rare"}], ids=str
)
def test_two_processes_train_as_one_does(options, tmp_path):
    """Over two rollouts of two steps and two passes, with Lightning's own DDP; of a rank's share of
    a step nothing may have signal."""
    found, start = [], weights(grpo())
    for batch_size, ranks in ((8, {}), (4, {"strategy": "ddp_fork", "devices": 2})):
        module = grpo(reference=FrozenCopy() if "kl_weight" in options else None, **options)
        prompts = data(batch_size=batch_size, num_iterations=2)
        fit(module, prompts, steps=8, folder=tmp_path, **ranks)
        found.append(weights(module) - start)
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_the_gradient_is_the_one_of_the_formula():
    """Against the dense model in float64 and the objective written out."""
    module = grpo(loss="grpo")
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    keep = fit(module, data())
    x = keep.experiences[0]
    model = causal_lm("gift:countdown").double()
    model.load_state_dict(before)
    total = 0.0
    prompts = x.prompt_ids.split(x.prompt_lengths.tolist())
    for prompt, completion, advantage in zip(prompts, x.completions(), x.advantages, strict=True):
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]
        total = total - ((logp - logp.detach()).exp() * advantage).mean() / len(x)
    names = [name for name, _ in model.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(total, list(model.parameters())), strict=True))
    found = [name.removeprefix("policy.model.") for name, _ in module.named_parameters()]
    for name, gradient in zip(found, keep.gradients[0], strict=True):
        torch.testing.assert_close(gradient.double(), expected[name], rtol=0, atol=2e-6)


def test_completions_without_advantage_need_no_training():
    """They are left out, and the gradient is what it is with them."""
    found = []
    for only_signal in (True, False):
        module = grpo("Rare", loss="dapo")
        module.collecting["only_signal"] = only_signal
        keep = fit(module, data(prompts_per_rollout=8, batch_size=32))
        x = keep.experiences[0]
        assert bool(x.trained.all()) is not only_signal and x.counted.all()
        found.append(torch.cat([g.flatten() for g in keep.gradients[0]]))
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_importance_ratio_starts_at_one(temperature):
    """With inner epochs, so that the policy that sampled is scored by the trainer."""
    module = grpo(temperature=temperature)
    keep = fit(module, data(num_iterations=2, batch_size=4), steps=8)
    assert len(keep.experiences) == 1 and len(keep.gradients) == 8
    x = keep.experiences[0]
    trained = x.trained.repeat_interleave(x.completion_lengths)
    assert trained.double().mean() > 0.5
    found, expected = x.old_logp[trained], x.sampler_logp[trained]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert abs(keep.metrics[0]["importance_ratio/max"] - 1) < 1e-5
    assert abs(keep.metrics[-1]["importance_ratio/max"] - 1) > 1e-3


def test_several_steps_share_a_rollout_and_every_completion_is_trained_once():
    module, prompts = grpo(), data(batch_size=2, num_iterations=2)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((batch.rollout, module.batch["sample_ids"].tolist()))

    fit(module, prompts, steps=16, callbacks=[Watch()], accumulate_grad_batches=2)
    assert [rollout for rollout, _ in seen] == [0] * 16 + [1] * 16
    for rollout in (0, 1):
        passes = [ids for number, ids in seen if number == rollout]
        for half in (passes[:8], passes[8:]):
            drawn = [i for ids in half for i in ids]
            assert len(drawn) == len(set(drawn)) and len(drawn) > 8
    assert seen[:8] != seen[8:16]


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_run_stopped_inside_a_rollout_goes_on_with_it(tmp_path, stop):
    """Bit-equal weights, the same prompts, completions and rewards."""

    def run(steps, ckpt_path=None, save=False):
        module = grpo(kl_weight=0.05, reference=FrozenCopy())
        callbacks = []
        if save:
            saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)
            callbacks.append(saver)
        prompts = data(num_iterations=2, batch_size=8)
        keep = fit(module, prompts, steps, tmp_path, callbacks, ckpt_path)
        return module, keep

    whole, expected = run(8)
    run(stop, save=True)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    resumed, keep = run(8, ckpt_path=str(checkpoint))
    assert torch.equal(weights(whole), weights(resumed))
    assert len(expected.gradients) == 8 and len(keep.gradients) == 8 - stop
    for a, b in zip(expected.experiences[::-1], keep.experiences[::-1], strict=False):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_truncated_completions_may_be_masked():
    options = {"max_completion_length": 14}
    found = {}
    for mask in (False, True):
        module = grpo(mask_truncated=mask, **options)
        found[mask] = fit(module, data()).experiences[0]
    cut = ~found[True].finished
    assert cut.any() and found[True].finished.any()
    assert torch.equal(found[True].counted, ~cut) and found[False].counted.all()
    assert not found[True].trained[cut].any()


def test_a_rollout_without_signal_changes_nothing():
    module = grpo("Nothing")
    before = weights(module)
    keep = fit(module, data(), steps=3)
    assert torch.equal(weights(module), before)
    assert keep.experiences[0].rewards.isnan().all()
    assert sum(module.guard.skipped.values()) == 3


def test_groups_without_signal_are_replaced():
    def signal(**options):
        module = grpo("Rare", **options)
        keep = fit(module, data(prompts_per_rollout=4))
        (count, _), groups = keep.metrics[0]["num_replaced_groups"], keep.experiences[0].advantages
        return int(groups.view(4, 4).any(1).sum()), count

    without, none = signal()
    more, some = signal(max_resamples=3)
    assert without < more and none == 0 and some > 0


def test_engine_differences_are_corrected():
    module = grpo(correction_cap=1.5)
    ids = torch.tensor([0, 0, 1])
    difference = torch.tensor([0.3, -0.2, 1.0])
    assert module._importance(difference, ids) is None  # the policy itself samples
    module.engine = SimpleNamespace(is_the_policy=False)
    expected = {
        "sequence_mask": [math.exp(0.1), math.exp(0.1), 0.0],
        "sequence_truncate": [math.exp(0.1), math.exp(0.1), 1.5],
        "token_mask": [math.exp(0.3), math.exp(-0.2), 0.0],
        "token_truncate": [math.exp(0.3), math.exp(-0.2), 1.5],
    }
    for how, values in expected.items():
        module.correction = how
        torch.testing.assert_close(module._importance(difference, ids), torch.tensor(values))
    module.correction = "none"
    assert module._importance(difference, ids) is None


def test_it_learns():
    module = GRPO(
        causal_lm("gift:countdown"),
        ["Countdown"],
        optimizer=lambda p: AdamW(p, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0),
        max_completion_length=24,
    )
    prompts = PromptData(
        CountdownProblems("train", "in", 1024),
        prompts_per_rollout=16,
        num_generations=16,
        batch_size=256,
        share_prompts=True,
    )
    rewards = []

    class Rewards(pl.Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            rewards.append(float(module.experience.rewards.mean()))

    fit(module, prompts, steps=32, callbacks=[Rewards()], gradient_clip_val=1.0)
    first, last = sum(rewards[:5]) / 5, sum(rewards[-10:]) / 10
    assert first < 0.2 and last > 0.25, (first, last)


# --- what goes wrong in silence elsewhere -------------------------------------------------------


def test_another_fit_samples_its_own_rollout():
    module = grpo()
    first = fit(module, data()).experiences[0]
    assert module.experience is None and module.batch is None
    second = fit(module, data()).experiences[0]
    assert first.number == second.number == 0
    assert not torch.equal(first.sampler_logp.exp(), second.sampler_logp.exp())


def test_no_engine_outlives_its_module():
    module = grpo()
    fit(module, data())
    model = weakref.ref(module.model)
    del module
    gc.collect()
    assert model() is None


def test_half_precision_scores_as_it_trains():
    module = grpo()
    keep = fit(module, data(num_iterations=2, batch_size=4), precision="bf16-mixed")
    assert keep.metrics[0]["importance_ratio/max"] == 1.0


def test_dropout_under_checkpointing_is_refused():
    before = running_children()
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.5, eos_token_id=1,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    model.gradient_checkpointing_enable()
    module = GRPO(model, [here("Even")], tokenizer="gift:countdown", max_completion_length=4)
    with pytest.raises(ValueError, match="OPTForCausalLM applies dropout under gradient checkp"):
        fit(module, data(packing=False))
    assert running_children() <= before


def running_children():
    """Processes that this one started and that still run."""
    listed = Path("/proc/self/task").glob("*/children")
    return {child for task in listed for child in task.read_text().split()}


def test_rewards_are_averaged_over_completions():
    """Not over rollouts: one that cannot be scored weighs nothing, and its reasons their share."""
    module = grpo("Sometimes")
    keep = fit(module, data(prompts_per_rollout=4, batch_size=16), steps=3)
    scored = torch.cat([x.rewards[~x.rewards.isnan()] for x in keep.experiences])
    sums = keep.metrics[-1]
    total, count = sums["reward"]
    assert count == len(scored) < 48 and math.isclose(total, scored.sum().item())
    missing, of = sums["rewards/Sometimes/not_scorable"]
    assert (missing, of) == (48 - len(scored), 48)


def test_the_log_counts_every_token_that_was_sampled():
    module = grpo("Rare")
    keep = fit(module, data(num_iterations=2, batch_size=8), steps=4)
    (x,) = keep.experiences
    assert not x.trained.all()
    assert module._num_tokens == int(x.lengths().sum())


def test_a_rollout_keeps_its_temperature(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(grpo(), data(num_iterations=2), 1, tmp_path, [saver])
    (checkpoint,) = tmp_path.glob("*.ckpt")
    with pytest.raises(ValueError, match=r"temperature 1\.0, and model.temperature is 0\.5"):
        fit(grpo(temperature=0.5), data(num_iterations=2), 2, ckpt_path=str(checkpoint))


def test_names_that_only_some_ranks_have_are_there_for_all():
    means = Means()
    means.add("loss", 3.0, 2)
    means.raise_to("max", -math.inf)
    assert means.take(lambda x, how: x) == {"loss": 1.5}
    means.raise_to("max", 2.0)
    means.raise_to("max", 1.0)
    assert means.take(lambda x, how: x) == {"max": 2.0}
    assert means.take(lambda x, how: x) == {}


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_weight": 0.1}, "needs a reference"),
        ({"loss": "cispo"}, "needs model.clip_high"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"max_resamples": -1}, "max_resamples must be 0 or more"),
        ({"correction": "all"}, "correction is one of"),
        ({"reward": "Missing"}, "Missing"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        grpo(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 3}, "no multiple of the 3"),
        ({"prompts_per_rollout": 16}, "fewer than data.prompts_per_rollout=16"),
        ({"packing": False, "share_prompts": True}, "puts completions into one row"),
        ({"max_prompt_length": 5}, "prompt longer than max_prompt_length 5"),
    ],
)
def test_impossible_prompts_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        fit(grpo(), data(**options))


def test_a_missing_column_is_refused():
    class Bare(Problems):
        def load(self):
            return [Problem("1 2 3 4 > 5 : ", {}, f"bare:{i}") for i in range(8)]

    prompts = PromptData(Bare(), prompts_per_rollout=4, num_generations=4, batch_size=16)
    with pytest.raises(ValueError, match="bare:0 has no column 'numbers'"):
        fit(grpo("Countdown"), prompts)


def test_completions_beyond_the_models_positions_are_refused():
    with pytest.raises(ValueError, match=r"exceed the model's \d+ positions"):
        fit(grpo(max_completion_length=10_000), data())


def test_objective_defaults_are_trls():
    objective = PolicyObjective()
    assert (objective.loss, objective.clip_low, objective.high) == ("dapo", 0.2, 0.2)
    assert objective.kl_weight == 0 and objective.delta is None
