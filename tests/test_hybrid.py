"""RL and imitation in one step: exact limits, exact splits, the same μ everywhere, resume."""

import json
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD

from formulas import INSTANCES
from gift_lightning.controllers import GAC, Constant, Controller, KLController, Schedule
from gift_lightning.countdown_data import CountdownData
from gift_lightning.grpo import GRPO
from gift_lightning.hybrid import Hybrid
from gift_lightning.hybrid_data import HybridData
from gift_lightning.models import causal_lm
from gift_lightning.problems import CountdownProblems
from gift_lightning.prompts import PromptData
from gift_lightning.references import FrozenCopy
from gift_lightning.sft import SFT
from gift_lightning.targets import GIFT, PSFT, CHORDPhi, Distillation, OneHot
from test_grpo import Keep, here, weights

RL = {"max_completion_length": 16, "reward_workers": 1}


def model(stage, *args, lr=1e-2, **options):
    return stage(causal_lm("gift:countdown"), *args, optimizer=partial(SGD, lr=lr), **options)


def hybrid(controller, reward="Even", **options):
    return model(Hybrid, [here(reward)], controller, **{**RL, **options})


def prompts(batch_size=16, **options):
    defaults = {"prompts_per_rollout": 4, "num_generations": 4, "batch_size": batch_size}
    return PromptData(CountdownProblems("train", "any", 12), **{**defaults, **options})


def demonstrations(batch_size=12, num=40, **options):
    return CountdownData(num_demonstrations=num, num_eval=2, batch_size=batch_size, **options)


def both(parts=1, **options):
    """16 completions and 12 demonstrations in each step, whatever its micro-batches."""
    return HybridData(prompts(16 // parts, **options), demonstrations(12 // parts))


def trainer(steps, callbacks=(), **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(max_steps=steps, callbacks=list(callbacks), **{**defaults, **options})


def fit(module, data, steps=1, callbacks=(), ckpt_path=None, **options):
    pl.seed_everything(0, verbose=False)
    keep = Keep()
    trainer(steps, [keep, *callbacks], **options).fit(
        module, data, ckpt_path=ckpt_path, weights_only=False
    )
    return keep


class Gradients(pl.Callback):
    """Of every step; and how many completions each micro-batch trained."""

    def __init__(self):
        self.all, self.num_trained = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if isinstance(module, GRPO):
            self.num_trained.append(len(module.batch["sample_ids"]))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.all.append(torch.cat([p.grad.flatten() for p in module.parameters()]))


def gradients(module, data, **options):
    return watched(module, data, **options).all


def watched(module, data, steps=1, **options):
    keep = Gradients()
    pl.seed_everything(0, verbose=False)
    trainer(steps, [keep], **options).fit(module, data)
    assert keep.all[0].abs().max() > 1e-5
    return keep


# The reference is the policy, which distillation from it alone leaves as it is.
TARGETS = [x[1] if isinstance(x[0], Distillation) else x[0] for x in INSTANCES.values()]
TARGETS.append(GIFT(trust=0.9))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
def test_all_imitation_is_exactly_sft(target):
    options = {"target": target, "reference": FrozenCopy()}
    (expected,) = gradients(model(SFT, **options), demonstrations())
    data = HybridData(prompts(4, prompts_per_rollout=2, num_generations=2), demonstrations())
    found = gradients(hybrid(Constant(1.0), **{**options, "max_completion_length": 2}), data)
    assert torch.equal(found[0], expected)


LOSSES = ["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo"]


@pytest.mark.parametrize(
    ("loss", "target"),
    [(loss, OneHot()) for loss in LOSSES] + [("dapo", x) for x in (GIFT(trust=0.9), PSFT())],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_no_imitation_is_exactly_grpo(loss, target):
    options = {"loss": loss, "clip_high": 0.28, "kl_weight": 0.1, "reference": FrozenCopy(), **RL}
    options["max_completion_length"] = 8
    expected = gradients(model(GRPO, [here("Even")], **options), prompts(4), steps=2)
    data = HybridData(prompts(4), demonstrations(3))
    found = gradients(hybrid(Constant(0.0), target=target, **options), data, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_mixture_is_the_mixture_of_the_gradients():
    def gradient(mu):
        return gradients(hybrid(Constant(mu), target=GIFT(3.0), reference=FrozenCopy()), both())[0]

    expected = 0.7 * gradient(0.0) + 0.3 * gradient(1.0)
    torch.testing.assert_close(gradient(0.3), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_any_split_of_a_step_gives_the_same_gradient_and_mu(reduction):
    """Also where a micro-batch holds no rollout with an advantage."""
    found = []
    for parts in (1, 4):
        gac = GAC(update_every=1, ema_beta=0.5, change_cap=1.0, prior=None)
        module = hybrid(gac, "Rare", reduction=reduction, target=CHORDPhi())
        keep = watched(module, both(parts), steps=4, accumulate_grad_batches=parts)
        found.append((torch.stack(keep.all), gac))
    assert 0 in keep.num_trained and max(keep.num_trained) > 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    states = [gac.state_dict() for _, gac in found]
    assert states[0]["smoothed"] == pytest.approx(states[1]["smoothed"], rel=1e-5)
    assert states[0]["mu"] == pytest.approx(states[1]["mu"], abs=1e-6)
    assert abs(states[0]["mu"] - 0.5) > 0.01


class Record(pl.Callback):
    """Which μ a rank used, step by step."""

    def __init__(self, folder):
        self.folder, self.mus, self.num_trained = folder, [], []
        self._in_step = 0

    def on_after_backward(self, trainer, module):
        self._in_step += len(module.batch["sample_ids"])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.mus.append([module.controller.mu, module.controller.mu_raw])
        self.num_trained.append(self._in_step)  # in all micro-batches of the step
        self._in_step = 0

    def on_train_end(self, trainer, module):
        (self.folder / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(
            json.dumps([self.mus, self.num_trained])
        )


@pytest.mark.parametrize(("estimator", "reward"), [("proxy", "Rare"), ("gradient", "Even")])
def test_two_processes_train_as_one_does(estimator, reward, tmp_path):
    """μ is the same on both, bit for bit, though each sees other demonstrations, and of a rank's
    completions none may have an advantage."""
    kl_target = 0.02 if estimator == "gradient" else None  # for which all completions are trained
    found = []
    options = {"max_completion_length": 8, "reference": FrozenCopy()}
    for parts, ranks in ((4, {}), (2, {"strategy": "ddp_fork", "devices": 2})):
        gac = GAC(
            update_every=1, ema_beta=0.5, change_cap=0.05, estimator=estimator, kl_target=kl_target
        )
        module = hybrid(gac, reward, **options)
        start = weights(module)
        data = both(4)
        trainer(6, [Record(tmp_path)], accumulate_grad_batches=parts, **ranks).fit(module, data)
        found.append(weights(module) - start)
    (one, _), (first, trained), (second, also_trained) = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert (0 in trained + also_trained) is (reward == "Rare")  # none in a whole step of a rank
    assert first == second and len({mu for mu, _ in first}) > 3
    if estimator == "proxy":  # the other one depends on what lies in a micro-batch
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(first), torch.tensor(one), rtol=0, atol=1e-6)


def test_statistics_are_those_of_the_padded_batch():
    """What the module measures, from flat tokens and over micro-batches, by `statistics`."""
    gac = GAC(update_every=1)
    module = hybrid(gac)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((module.experience, module._stats))

    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    fit(module, both(), callbacks=[Look()])
    experience, stats = seen[0]
    fresh = causal_lm("gift:countdown")
    fresh.load_state_dict(before)
    rows = [(p, True) for p in demonstration_logp(fresh, module)]
    rows += [
        (p, False) for p in experience.sampler_logp.split(experience.completion_lengths.tolist())
    ]
    longest = max(len(p) for p, _ in rows)
    logp, mask = torch.zeros(len(rows), longest), torch.zeros(len(rows), longest)
    advantages = torch.zeros(len(rows), longest)
    for i, (p, is_demonstration) in enumerate(rows):
        logp[i, : len(p)], mask[i, : len(p)] = p, 1.0
        if not is_demonstration:
            advantages[i] = experience.advantages[i - (len(rows) - len(experience))]
    expected = gac.statistics(logp, mask, advantages, torch.tensor([d for _, d in rows]))
    assert stats.sigma_r2 == pytest.approx(expected.sigma_r2, rel=1e-6)
    assert stats.sigma_s2 == pytest.approx(expected.sigma_s2, rel=1e-4)
    assert stats.delta2 == pytest.approx(expected.delta2, rel=1e-4)


def demonstration_logp(fresh, module):
    """Of the demonstrations that the module saw last, one by one."""
    batch = module.demonstrations
    examples = module.trainer.datamodule.train_examples
    for i in batch["sample_ids"].tolist():
        ids, labels = examples[i]
        with torch.no_grad():
            logits = fresh(input_ids=ids[None]).logits[0]
        logp = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        yield logp[labels[1:] >= 0]


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("compat", ["corrected", "released"])
def test_a_resumed_run_is_the_uninterrupted_one(stop, compat, tmp_path):
    """Inside a rollout of two steps and across epochs of three, with demonstrations that go round
    on their own; the controller's state bit for bit."""

    def make():
        gac = GAC(update_every=2, kl_target=0.02, compat=compat)
        return hybrid(gac, reference=FrozenCopy(), target=GIFT(3.0)), both(2, prompts_per_rollout=4)

    whole = make()
    fit(*whole, steps=9)
    first = make()
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)
    fit(*first, steps=stop, callbacks=[checkpoint])
    assert not torch.equal(weights(first[0]), weights(whole[0]))
    again = make()
    fit(*again, steps=9, ckpt_path=next(tmp_path.glob("*.ckpt")))
    assert torch.equal(weights(again[0]), weights(whole[0]))
    assert again[0].controller.state_dict() == whole[0].controller.state_dict()


def test_demonstrations_go_round_in_whole_steps():
    """Three windows of twelve from forty: every round has its own order, no window is short."""
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(module.demonstrations["sample_ids"].tolist())

    fit(hybrid(Constant(0.5)), both(), steps=7, callbacks=[Look()])
    assert [len(ids) for ids in seen] == [12] * 7
    rounds = [[i for ids in seen[start : start + 3] for i in ids] for start in (0, 3)]
    assert all(len(set(ids)) == 36 for ids in rounds) and rounds[0] != rounds[1]


def test_a_branch_without_weight_is_not_computed(monkeypatch):
    calls = []
    for name in ("rollout_share", "imitation_share"):
        real = getattr(Hybrid, name)
        monkeypatch.setattr(Hybrid, name, lambda *a, n=name, r=real: calls.append(n) or r(*a))
    fit(hybrid(Constant(0.0)), both())
    fit(hybrid(Constant(1.0)), both())
    assert calls == ["rollout_share", "imitation_share"]
    fit(hybrid(Schedule(1, 1, 0.5, 0.5)), both(), steps=2)
    assert calls[2:] == ["rollout_share", "rollout_share", "imitation_share"]


def test_the_log_tells_what_mu_was_made_of(tmp_path):
    module = hybrid(GAC(update_every=1), reference=FrozenCopy())
    logged = []

    class Log(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append(metrics)

    keep = Keep()
    pl.seed_everything(0, verbose=False)
    trainer(2, [keep], logger=Log(tmp_path)).fit(module, both())
    rows = [m for m in logged if "train/mix/mu" in m]
    assert len(rows) == 2
    mix = {"mu", "mu_raw", "sigma_r2", "sigma_s2", "delta2", "alpha", "prior", "capped"}
    mix |= {"large_changes"}
    assert {k.removeprefix("train/mix/") for k in rows[1] if "/mix/" in k} == mix
    loss = rows[0]["train/loss"]
    parts = 0.5 * (rows[0]["train/loss/rollouts"] + rows[0]["train/loss/demonstrations"])
    assert loss == pytest.approx(parts, rel=1e-5)
    for branch in ("rollouts", "demonstrations"):
        assert rows[0][f"train/grad_norm/{branch}"] > 0
    assert -1 <= rows[0]["train/grad_norm/cosine"] <= 1
    assert rows[0]["train/demonstrations/nll"] > 0 and rows[0]["train/kl"] < 1e-5


def refusals():
    return [
        (lambda: hybrid(KLController()), None, "follows the KL to the reference"),
        (lambda: hybrid(GAC(kl_target=0.1)), None, "follows the KL to the reference"),
        (lambda: hybrid(Constant(0.5), target=GIFT(3.0)), None, "reference"),
        (lambda: hybrid(GAC(estimator="gradient")), both, "accumulate_grad_batches to 2"),
        (lambda: hybrid(Constant(0.5)), prompts, "--data HybridData"),
        (lambda: hybrid(Constant(0.5)), demonstrations, "--data HybridData"),
        (
            lambda: hybrid(Constant(0.5)),
            lambda: HybridData(prompts(), demonstrations(50)),
            "takes 50 demonstrations .* and there are 40",
        ),
        (
            lambda: hybrid(Constant(0.5)),
            lambda: HybridData(prompts(), demonstrations(num=0)),
            "No train record is left to use: the data has none",
        ),
        (
            lambda: hybrid(Constant(0.5)),
            lambda: HybridData(prompts(52, prompts_per_rollout=13), demonstrations()),
            "12 problems, fewer than data.prompts_per_rollout=13",
        ),
        (lambda: model(SFT), both, "HybridData"),
        (lambda: model(GRPO, [here("Even")], **RL), both, "data is HybridData"),
    ]


@pytest.mark.parametrize("case", range(len(refusals())))
def test_what_cannot_work_is_refused(case):
    make, data, said = refusals()[case]
    with pytest.raises(ValueError, match=said):
        module = make()
        fit(module, data())


def test_another_controller_does_not_resume(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path)
    fit(hybrid(Constant(0.5)), both(), callbacks=[checkpoint])
    with pytest.raises(ValueError, match="with controller Constant"):
        path = next(tmp_path.glob("*.ckpt"))
        fit(hybrid(GAC()), both(), steps=2, ckpt_path=path)


def test_a_target_of_the_data_and_validation_sets(tmp_path):
    module = hybrid(Constant(0.5), target=GIFT(trust=0.9), reference=FrozenCopy())
    run = trainer(1, limit_val_batches=1.0)
    run.fit(module, both())
    assert module.target.is_resolved
    assert {"val/in/nll", "val/out/nll"} <= set(run.callback_metrics)
    run = trainer(1, limit_val_batches=1.0)
    silent = HybridData(prompts(), demonstrations())
    silent.demonstrations.val_records = dict
    run.fit(hybrid(Constant(0.5)), silent)
    assert not any(name.startswith("val/") for name in run.callback_metrics)


class Both(Controller):
    """A user's own rule, which does not say what it reads."""

    def __init__(self, mu=0.5, measures=()):
        self.mu, self._measures = mu, frozenset(measures)

    @property
    def measures(self):
        return self._measures

    def update(self, stats, step):
        return self.mu


def test_a_rule_of_ones_own_stays_within_its_bounds():
    with pytest.raises(ValueError, match="Both set μ to 1"):
        fit(hybrid(Both(1.5)), both())
    with pytest.raises(ValueError, match="Both reads proxies, and only a GAC"):
        hybrid(Both(measures={"proxy"}))


class Stats(pl.Callback):
    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.all.append(module._stats)


@pytest.mark.parametrize("use_phi", [True, False])
@pytest.mark.parametrize("target", [CHORDPhi(), OneHot()])
def test_proxies_of_another_loss_are_said(use_phi, target):
    module = hybrid(GAC(use_phi=use_phi), target=target)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module, both())
    told = [x for x in said if "model.controller.use_phi" in str(x.message)]
    assert len(told) == (use_phi is not isinstance(target, CHORDPhi))


def test_a_step_without_any_advantage_says_so():
    """No reward tells anything; or what does is truncated, and masked."""
    for reward, options in (
        ("Nothing", {}),
        ("Even", {"mask_truncated": True, "max_completion_length": 2}),
    ):
        seen, gac = Stats(), GAC(update_every=1, prior=None)
        fit(hybrid(gac, reward, **options), both(), steps=3, callbacks=[seen])
        assert [x.has_signal for x in seen.all] == [False] * 3
        assert gac.mu == pytest.approx(0.52) and not gac.smoothed  # two updates towards mu_max


def test_the_kl_is_that_of_all_completions():
    """Also where no completion is trained, and the same whatever the objective does with it."""
    found = []
    for kl_weight in (0.0, 1e-9):
        seen = Stats()
        module = hybrid(KLController(), "Rare", reference=FrozenCopy(), kl_weight=kl_weight, lr=1.0)
        fit(module, both(), steps=4, callbacks=[seen])
        found.append([x.kl for x in seen.all])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0][-1] > 1e-3


def test_options_are_the_configs_also_in_a_resumed_run(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path)
    for first, second, said in (
        (Constant(0.1), Constant(0.9), {"mu": 0.9}),
        (GAC(alpha=0.5), GAC(alpha=0.9), {"alpha": 0.9}),
    ):
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / type(first).__name__)
        fit(hybrid(first), both(), callbacks=[checkpoint])
        path = next((tmp_path / type(first).__name__).glob("*.ckpt"))
        fit(hybrid(second), both(), steps=2, ckpt_path=path)
        assert {name: getattr(second, name) for name in said} == said


def test_another_fit_starts_with_a_fresh_controller():
    gac = GAC(update_every=5)
    module = hybrid(gac)
    fit(module, both(), steps=4)
    used = gac.state_dict()
    fit(module, both(), steps=1)
    assert gac.mu == 0.5 and gac.last_update is None and used["last_update"] == 1


def test_a_checkpoint_of_grpo_is_refused(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path)
    fit(model(GRPO, [here("Even")], **RL), prompts(), callbacks=[checkpoint])
    with pytest.raises(ValueError, match="with controller None"):
        fit(hybrid(GAC()), both(), steps=2, ckpt_path=next(tmp_path.glob("*.ckpt")))


def test_a_limit_that_cuts_a_step_is_refused():
    with pytest.raises(ValueError, match="limit_train_batches cuts an optimizer step"):
        fit(hybrid(GAC()), both(2), accumulate_grad_batches=2, limit_train_batches=3)
