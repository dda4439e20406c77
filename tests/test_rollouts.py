"""HFRollout samples the policy that is trained, says with what probability, leaves no trace.

What `generation.generate` promises by itself is tested there.
"""

import copy
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD

from gift_lightning import generation
from gift_lightning.experience import Experience, flat
from gift_lightning.grpo import GRPO
from gift_lightning.models import Lora, causal_lm, load_tokenizer, tiny_llama
from gift_lightning.modes import adapter_off, scoring
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy
from gift_lightning.problems import CountdownProblems, prompt_tokens
from gift_lightning.prompts import PromptData
from gift_lightning.rollouts import HFRollout, Sampling
from test_generation import EOS, tiny

# What transformers and peft say about models of this size.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SAMPLING = Sampling(max_completion_length=12, end_ids=(EOS,))
PROMPTS = {
    "equal": [[5, 6, 7], [9, 2, 4], [4, 4, 8]],  # nothing is padded
    "unequal": [[5, 6, 7], [9], [4, 4, 4, 4, 8], [2, 3, 4, 5, 6, 7, 8, 9]],  # padded on the left
}


def policy(name):
    """In train mode, with dropout where the family has it."""
    if name == "base":
        torch.manual_seed(0)
        return causal_lm("gift:countdown")
    made = tiny("gpt2" if name == "gpt2" else "llama")
    return Lora(r=4).wrap(made).train() if name == "lora" else made


def adapted(name="default"):
    """A policy whose adapters change what it says; a second, frozen adapter is beside them."""
    model = policy("lora")
    model.add_adapter("ref", model.peft_config["default"])
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05 if ".default." in key else 0.07)
    model.set_adapter(name)
    return model


def rollout(model, prompts, n=4, sampling=SAMPLING, batch_size=256, seed=3, keys=None):
    engine = HFRollout(batch_size)
    engine.sync(model)
    keys = range(len(prompts)) if keys is None else keys
    return engine.generate(prompts, n, sampling, seed=seed, keys=keys)


def problems(name, kind):
    """Prompts of a kind, in the base's own language for the base."""
    if name != "base":
        return PROMPTS[kind]
    tokenizer = load_tokenizer("gift:countdown")
    made = CountdownProblems("train", "any", 24).load()
    ids = sorted((prompt_tokens(tokenizer, p) for p in made), key=len, reverse=True)
    begun = prompt_tokens(tokenizer, replace(made[0], prompt=f"{made[0].prompt}answer: "))
    return ids[:2] if kind == "equal" else [ids[0], begun, ids[-1]]


def tokens(groups):
    return [[completion.tokens for completion in group] for group in groups]


def experience(prompts, groups):
    """What the trainer makes of a rollout."""
    completions = [x for group in groups for x in group]
    of, count = [ids for ids, x in zip(prompts, groups, strict=True) for _ in x], len(completions)
    return Experience(
        0,
        *flat(of, torch.int64),
        *flat([x.tokens for x in completions], torch.int64),
        flat([x.logprobs for x in completions], torch.float32)[0],
        torch.tensor([x.finished for x in completions]),
        rewards=torch.zeros(count),
        advantages=torch.ones(count),
        counted=torch.ones(count, dtype=torch.bool),
        trained=torch.ones(count, dtype=torch.bool),
        problems=torch.arange(count),
    )


def dense(model, x, temperature):
    """Log-probabilities of all sampled tokens, one whole sequence at a time."""
    model, found = copy.deepcopy(model).eval(), []
    for prompt, completion in zip(
        x.prompt_ids.split(x.prompt_lengths.tolist()), x.completions(), strict=True
    ):
        with torch.no_grad():
            ids = torch.cat([prompt, completion])[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        scores = torch.log_softmax(logits / temperature, -1)
        found.append(scores.gather(1, completion[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "base", "lora"])
def test_logprobs_are_the_trainers(name, kind, temperature):
    model = adapted() if name == "lora" else policy(name)
    prompts = problems(name, kind)
    assert (len(set(map(len, prompts))) == 1) is (kind == "equal")
    groups = []
    for longest in (24, 1):  # with short ones, which share rows when packed
        sampling = replace(SAMPLING, temperature=temperature, max_completion_length=longest)
        groups += rollout(model, prompts, sampling=sampling)
    assert all(len(set(map(tuple, group))) > 1 for group in tokens(groups[: len(prompts)]))
    x = experience(prompts * 2, groups)
    expected = x.sampler_logp
    torch.testing.assert_close(dense(model, x, temperature), expected, rtol=0, atol=1e-5)
    part = MicroBatch(tuple(range(len(x)))[::-1], len(expected), len(x))
    for packing in (True, False):  # side by side in rows; padded on the right
        batch = x.batch(part, EOS, packing)
        assert (len(batch["input_ids"]) < len(x)) is packing
        with scoring(model):
            found, _ = Policy(model).token_logp(batch, temperature)
        wanted = x.token_values(batch, expected)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_top_p_restricts_what_is_drawn_and_not_its_probability(name):
    model = policy(name)
    groups = rollout(model, PROMPTS["unequal"], sampling=replace(SAMPLING, top_p=0.5))
    x = experience(PROMPTS["unequal"], groups)
    torch.testing.assert_close(dense(model, x, 1.0), x.sampler_logp, rtol=0, atol=1e-5)
    assert x.sampler_logp.min() < 0 and tokens(groups) != tokens(rollout(model, PROMPTS["unequal"]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "base", "lora"])
def test_a_completion_depends_on_seed_key_and_number_alone(name):
    model, prompts = adapted() if name == "lora" else policy(name), PROMPTS["unequal"]
    keys = [70, 3, 12, 8]
    whole = rollout(model, prompts, keys=keys)
    for batch_size in (1, 3, 7):
        assert tokens(rollout(model, prompts, keys=keys, batch_size=batch_size)) == tokens(whole)
    for i in range(4):  # alone, and beside others than before
        assert tokens(rollout(model, prompts[i : i + 1], keys=keys[i : i + 1])) == [
            tokens(whole)[i]
        ]
    shuffled = rollout(model, prompts[::-1], keys=keys[::-1], n=2)
    assert tokens(shuffled) == [group[:2] for group in tokens(whole)[::-1]]
    same = rollout(model, [prompts[0]] * 2, keys=[70, 71])
    assert tokens(same)[0] == tokens(whole)[0] != tokens(same)[1]
    assert tokens(rollout(model, prompts, keys=keys, seed=4)) != tokens(whole)


def test_the_sampling_that_is_asked_for():
    model, prompts = policy("llama"), PROMPTS["unequal"]
    greedy = tokens(rollout(model, prompts, sampling=replace(SAMPLING, temperature=0.0)))
    assert all(group == [group[0]] * 4 for group in greedy)
    nucleus = replace(SAMPLING, top_p=1e-6)
    assert tokens(rollout(model, prompts, sampling=nucleus)) == greedy
    short = rollout(model, prompts, sampling=replace(SAMPLING, max_completion_length=3))
    assert max(len(x.tokens) for group in short for x in group) == 3
    ends = rollout(model, prompts, sampling=replace(SAMPLING, end_ids=(EOS, 5, 6)))
    for x in (x for group in ends for x in group):
        assert x.finished == (x.tokens[-1] in (EOS, 5, 6))
    endless = rollout(model, prompts, sampling=replace(SAMPLING, end_ids=()))
    assert not any(x.finished for group in endless for x in group)


def test_the_batch_size_must_be_possible():
    with pytest.raises(ValueError, match=r"HFRollout\.batch_size must be at least 1, got 0"):
        HFRollout(0)


# --- adapters and modes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "ref"])
def test_adapters_take_part_in_sampling(name):
    model, prompts = adapted(name), PROMPTS["unequal"]
    found = tokens(rollout(model, prompts))
    merged = copy.deepcopy(model).merge_and_unload()
    assert found == tokens(rollout(merged, prompts))
    with adapter_off(model):
        assert found != tokens(rollout(model, prompts))
    assert found != tokens(rollout(adapted({"default": "ref", "ref": "default"}[name]), prompts))


def state(model):
    modules = [
        (
            name,
            module.training,
            *(
                str(vars(module).get(flag, "absent"))
                for flag in (
                    "gradient_checkpointing",
                    "_active_adapter",
                    "_disable_adapters",
                    "_adapters_disabled",
                )
            ),
        )
        for name, module in model.named_modules()
    ]
    gradients = [(name, p.requires_grad) for name, p in model.named_parameters()]
    caches = model.config.use_cache, model.generation_config.use_cache
    return modules, gradients, caches, torch.is_grad_enabled()


@pytest.mark.parametrize("call", [1, 3, None])
@pytest.mark.parametrize("name", ["gpt2", "llama", "lora", "lora ref"])
def test_every_mode_is_restored(name, call, monkeypatch):
    """After a rollout that raises at its first or third token, or at none."""
    if name.startswith("lora"):
        model = adapted("ref" if "ref" in name else "default")
        model.enable_input_require_grads()
    else:
        model = policy(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    part = next(model.children())
    part.training = False  # a module that somebody froze stays as it is
    before, calls, seen = state(model), 0, []

    def failing(*args):
        nonlocal calls
        calls += 1
        seen.append((model.training, model.config.use_cache, torch.is_grad_enabled()))
        if calls == call:
            model.train()
            if name.startswith("lora"):
                model.set_adapter("default" if "ref" in name else "ref")
            raise RuntimeError("injected")
        return generation_draw(*args)

    generation_draw = generation.draw
    monkeypatch.setattr(generation, "draw", failing)
    if call is None:
        rollout(model, PROMPTS["unequal"])
    else:
        with pytest.raises(RuntimeError, match="injected"):
            rollout(model, PROMPTS["unequal"])
        assert calls == call
    assert set(seen) == {(False, True, False)}
    assert state(model) == before
    if name == "lora":  # and it trains as before
        model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        trained = {key for key, p in model.named_parameters() if p.grad is not None}
        assert trained and all(".default." in key for key in trained)


def test_a_sampled_policy_has_its_new_weights():
    model, prompts = policy("llama"), PROMPTS["unequal"]
    engine = HFRollout()
    engine.sync(model)
    first = tokens(engine.generate(prompts, 2, SAMPLING, seed=0, keys=range(4)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5
    engine.sync(model)
    assert tokens(engine.generate(prompts, 2, SAMPLING, seed=0, keys=range(4))) != first


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(r=4, dropout=0.3)], ids=["full", "lora"])
def test_dropout_and_checkpointing_leave_the_ratio_at_one(lora, checkpointing):
    """In a real step: a policy that is scored otherwise than it sampled has no ratio."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.3}
    module = GRPO(
        tiny_llama(**sizes, lora=lora, gradient_checkpointing=checkpointing),
        [{"class_path": "Format", "init_args": {"regex": ".*[0-9]"}}],
        optimizer=lambda p: SGD(p, lr=0.1),
        max_completion_length=8,
        reward_workers=1,
    )
    sizes = {"prompts_per_rollout": 4, "num_generations": 4, "batch_size": 16}
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, PromptData(CountdownProblems("train", "any", 8), **sizes))
    found = trainer.callback_metrics
    assert found["train/grad_norm"] > 0 and found["train/skipped_steps"] == 0
    assert found["train/sampling/sampling_logp_difference/max"] < 1e-5
