"""The stream that RL trains on: tickets, their completions, and when a rollout is sampled."""

from collections import Counter, defaultdict
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.optim import SGD
from transformers import PreTrainedTokenizerFast

from gift_lightning.collector import Collector
from gift_lightning.experience import Experience
from gift_lightning.generation import Completion
from gift_lightning.grpo import GRPO
from gift_lightning.models import causal_lm, load_tokenizer
from gift_lightning.problems import CountdownProblems, Problem, Problems
from gift_lightning.prompts import PromptData, Ticket, Tickets
from gift_lightning.replicas import Replicas
from gift_lightning.rewards import build_rewards
from gift_lightning.rollouts import HFRollout, RolloutEngine, Sampling


def tickets(**changes):
    sizes = {
        "num_problems": 11,
        "prompts_per_rollout": 4,
        "num_iterations": 3,
        "num_steps": 2,
        "accumulate": 2,
        "samples_per_step": 8,
        "seed": 5,
    }
    return Tickets(**{**sizes, **changes})


class Texts(Problems):
    """Prompts of digits, of the given lengths in tokens."""

    def __init__(self, *lengths, first=0):
        self.lengths, self.first = lengths, first

    def load(self):
        return [
            Problem(str(i % 10) * length, {"place": self.first + i}, f"texts:{i}")
            for i, length in enumerate(self.lengths)
        ]


def data(problems=None, world=1, accumulate=1, tokenizer=None, **options):
    """Set up as a trainer does it."""
    sizes = {"prompts_per_rollout": 4, "num_generations": 4, "batch_size": 16}
    made = PromptData(problems or CountdownProblems("train", "any", 12), **{**sizes, **options})
    made.trainer = SimpleNamespace(
        accumulate_grad_batches=accumulate,
        world_size=world,
        global_rank=0,
        strategy=None,
        is_global_zero=False,
        lightning_module=SimpleNamespace(tokenizer=tokenizer or load_tokenizer("gift:countdown")),
    )
    made.setup("fit")
    return made


def experience(lengths, number=0):
    """Completions of these lengths, behind prompts of two tokens."""
    count, total = len(lengths), sum(lengths)
    return Experience(
        number,
        torch.zeros(2 * count, dtype=torch.int64),
        torch.full((count,), 2),
        torch.zeros(total, dtype=torch.int64),
        torch.tensor(lengths),
        torch.zeros(total),
        torch.ones(count, dtype=torch.bool),
        torch.zeros(count),
        torch.zeros(count),
        torch.ones(count, dtype=torch.bool),
        torch.ones(count, dtype=torch.bool),
        torch.arange(count),
    )


# --- tickets ----------------------------------------------------------------------------------


def test_the_stream_is_sized_and_in_order():
    stream = tickets()
    found = list(stream)
    assert len(stream) == len(found) == 2 * 3 * 2 * 2
    assert [ticket[:1] + ticket[2:] for ticket in found] == [
        (rollout, iteration, step, part)
        for rollout in range(2)
        for iteration in range(3)
        for step in range(2)
        for part in range(2)
    ]
    assert len({(ticket.rollout, ticket.prompts) for ticket in found}) == 2


@pytest.mark.parametrize(("num_problems", "left_out"), [(12, 0), (11, 3)])
def test_every_prompt_once_per_epoch(num_problems, left_out):
    stream, orders, used = tickets(num_problems=num_problems), [], Counter()
    for epoch in range(40):
        stream.set_epoch(epoch)
        rollouts = {ticket.rollout: ticket.prompts for ticket in stream}
        first = epoch * stream.num_rollouts  # numbers go on
        assert sorted(rollouts) == list(range(first, first + stream.num_rollouts))
        prompts = [i for _, some in sorted(rollouts.items()) for i in some]
        assert len(prompts) == len(set(prompts)) == num_problems - left_out
        orders.append(tuple(prompts))
        used.update(prompts)
    assert len(set(orders)) == 40
    assert len(used) == num_problems  # what a short last rollout leaves out is not always the same
    assert list(tickets(seed=6)) != list(tickets())


def test_start_and_skip_name_the_position():
    stream, epochs = tickets(), []
    for epoch in range(3):
        stream.set_epoch(epoch)
        epochs.append(list(stream))
    for epoch in range(2):
        for skip in range(len(stream) + 1):
            resumed = tickets()
            resumed.start(epoch, skip)
            assert len(resumed) == len(stream)
            assert list(resumed) == epochs[epoch][skip:]
            resumed.set_epoch(7)  # whatever the trainer calls it
            assert list(resumed) == epochs[epoch][skip:]
            resumed.set_epoch(8)
            assert list(resumed) == epochs[epoch + 1]


def test_the_loader_hands_on_one_ticket_at_a_time():
    made = data(num_iterations=2)
    loader = made.train_dataloader()
    assert len(loader) == 3 * 2 and loader.num_workers == 0
    assert [Ticket(*ticket) for ticket in loader] == list(made.sampler)


def test_a_position_of_an_earlier_version_is_refused():
    with pytest.raises(
        ValueError, match="earlier version, which did not write how many micro-batc"
    ):
        data().resplit({"PromptData": {"micro_batches_done": 3}})


# --- the completions of a step ----------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2])
def test_any_number_of_devices_trains_the_same_steps(iterations):
    """Four steps of 8 completions, by 1, 2 or 4 devices and in 1, 2 or 4 micro-batches."""
    lengths = np.random.default_rng(0).integers(1, 30, 32).tolist()
    steps = {}
    for world in (1, 2, 4):
        for accumulate in (1, 2, 4):
            if world * accumulate > 8:
                continue
            made = data(
                world=world,
                accumulate=accumulate,
                num_generations=8,
                batch_size=8 // (world * accumulate),
                num_iterations=iterations,
            )
            found = {}
            for ticket in made.sampler:
                rollout = experience(lengths, ticket.rollout)
                places, sizes = made.window(ticket, 32), rollout.lengths().numpy()
                window = set(places.tolist())
                key = ticket.rollout, ticket.iteration, ticket.step
                for rank in range(world):
                    part = made.part(ticket, places, sizes, world, rank)
                    assert len(part) == made.batch_size and set(part) <= window
                    found.setdefault(key, []).extend(part)
                assert sorted(found[key]) == sorted(window) or ticket.part < accumulate - 1
            steps[world, accumulate] = {key: sorted(ids) for key, ids in found.items()}
    expected = steps.pop((1, 1))
    assert len(steps) == 7 and all(other == expected for other in steps.values())
    assert len(expected) == 3 * iterations * 4
    passes = {}
    for (rollout, iteration, _), ids in expected.items():
        passes.setdefault((rollout, iteration), []).append(ids)
    for windows in passes.values():  # every completion once in a pass
        assert sorted(i for ids in windows for i in ids) == list(range(32))
    assert len({str(windows) for windows in passes.values()}) == len(passes)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_completions_that_share_a_prompt_are_trained_side_by_side(world):
    made = data(
        world=world,
        accumulate=4 // world,
        num_generations=8,
        batch_size=8,
        share_prompts=True,
    )
    rollout, groups = experience(list(range(1, 33)), 0), defaultdict(list)
    for ticket in made.sampler:
        places = made.window(ticket, 32)
        for rank in range(world):
            part = made.part(ticket, places, rollout.lengths().numpy(), world, rank)
            first, *others = {i // 8 for i in part}
            assert not others and len(part) == 8  # one group for each micro-batch
            groups[ticket.rollout].append(first)
    assert all(sorted(found) == [0, 1, 2, 3] for found in groups.values())


@pytest.mark.parametrize(("world", "accumulate", "size"), [(1, 1, 16), (2, 1, 8), (2, 4, 2)])
def test_by_default_a_rollout_is_one_step(world, accumulate, size):
    made = data(world=world, accumulate=accumulate, batch_size=None)
    assert made.batch_size == size and made.sampler.num_steps == 1
    assert made.sampler.samples_per_step == 16 and len(made.sampler) == 3 * accumulate


def test_devices_get_their_share_of_long_completions():
    made = data(world=2, batch_size=8)
    lengths = list(range(1, 17))
    (ticket, *_) = made.sampler
    window, sizes = made.window(ticket, 16), experience(lengths).lengths().numpy()
    parts = [made.part(ticket, window, sizes, 2, rank) for rank in range(2)]
    sums = [sum(lengths[i] for i in part) for part in parts]
    assert abs(sums[0] - sums[1]) == 8  # sorted and dealt in turn


# --- replacements -----------------------------------------------------------------------------


def test_replacements_are_other_prompts():
    made = data()
    first, tried = [], {1, 4, 7}
    for rollout in range(4):
        found = made.replacements(rollout, tried, 5)
        assert len(set(found)) == 5 and not set(found) & tried
        assert found == made.replacements(rollout, set(tried), 5)
        first.append(tuple(found))
    assert len(set(first)) == 4
    assert sorted(made.replacements(0, tried, 99)) == sorted(set(range(12)) - tried)
    assert made.replacements(0, set(range(12)), 2) == []
    assert made.replacements(0, tried, 0) == []


class Recorded(RolloutEngine):
    """An engine without a model: every completion is the prompt's first token."""

    def __init__(self):
        self.calls = []

    def sync(self, model):
        self.calls.append([])

    def generate(self, prompts, num_samples, sampling, *, seed, keys):
        self.calls[-1].append([tuple(prompt) for prompt in prompts])
        return [[Completion([prompt[0]], [-1.0], True)] * num_samples for prompt in prompts]


@pytest.mark.parametrize(("rounds", "drawn"), [(0, 4), (1, 8), (2, 12), (3, 12), (5, 12)])
def test_dynamic_sampling_never_repeats_a_prompt(rounds, drawn):
    made, engine = data(), Recorded()
    sampling = Sampling(max_completion_length=4, end_ids=(1,))
    rewards = build_rewards([{"class_path": "Format", "init_args": {"regex": "never"}}])
    collector = Collector(
        engine, sampling, rewards, load_tokenizer("gift:countdown"), max_resamples=rounds,
        num_workers=1,
    )  # fmt: skip
    try:
        for ticket in made.sampler:
            x, _ = collector.collect(None, made, ticket, Replicas())
            prompts = [prompt for call in engine.calls[-1] for prompt in call]
            assert len(prompts) == len(set(prompts)) == drawn
            assert prompts[:4] == [tuple(made.prompt_ids[i]) for i in ticket.prompts]
            assert len(x) == 16 and not x.advantages.any()
    finally:
        collector.close()
    assert len(engine.calls) == 3  # one sync for each rollout


# --- prompts ----------------------------------------------------------------------------------


def test_prompts_are_tokenised_again_for_another_tokenizer():
    made = data(Texts(3, 3, 3, 3), num_generations=2, batch_size=8)
    before = made.prompt_ids
    made.setup("fit")
    assert made.prompt_ids is before
    words = Tokenizer(WordLevel({3 * str(i): 1000 + i for i in range(4)}))
    other = PreTrainedTokenizerFast(tokenizer_object=words)
    made.trainer.lightning_module.tokenizer = other
    made.setup("fit")
    assert made.prompt_ids == [[1000], [1001], [1002], [1003]]
    assert len(made.problems) == 4 and made.ledger["train"].used == 4


def test_an_order_of_the_trainers_is_refused():
    made = data(Texts(3, 3, 3, 3), num_generations=2, batch_size=4)
    made.trainer.world_size = 2
    made.trainer._accelerator_connector = SimpleNamespace(use_distributed_sampler=True)
    with pytest.raises(ValueError, match=r"set trainer\.use_distributed_sampler to false"):
        made.setup("fit")
    made.trainer.overfit_batches = 1
    with pytest.raises(ValueError, match=r"trainer\.overfit_batches replaces the order"):
        made.setup("fit")


def test_chat_prompts_go_through_the_template():
    tokenizer = load_tokenizer("gift:countdown")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} > {% endfor %}"
        "{% if add_generation_prompt %}{{ '7 : ' }}{% endif %}"
    )

    class Chats(Problems):
        def load(self):
            turns = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
            return [Problem("4 5", {}, "chats:1"), Problem(turns, {}, "chats:2")]

    made = data(Chats(), tokenizer=tokenizer, chat=True, prompts_per_rollout=2, batch_size=8)
    assert [tokenizer.decode(ids) for ids in made.prompt_ids] == ["4 5 > 7 : ", "1 2 > 3 > 7 : "]
    mixed = data(Chats(), tokenizer=tokenizer, prompts_per_rollout=2, batch_size=8)
    assert [tokenizer.decode(ids) for ids in mixed.prompt_ids] == ["4 5", "1 2 > 3 > 7 : "]
    with pytest.raises(ValueError, match=r"chats:1: a chat prompt needs a chat template"):
        data(Chats(), chat=True, prompts_per_rollout=2, batch_size=8)


def test_long_prompts_are_counted_and_never_used():
    made = data(Texts(3, 9, 5, 8, 4, 6), max_prompt_length=5, max_rejected=0.5,
                prompts_per_rollout=3, batch_size=12)  # fmt: skip
    ledger = made.ledger["train"]
    assert (ledger.read, ledger.used, len(ledger.rejected)) == (6, 3, 3)
    assert [(x.origin, x.reason) for x in ledger.rejected] == [
        (f"texts:{i}", f"prompt longer than max_prompt_length 5: {n} tokens")
        for i, n in ((1, 9), (3, 8), (5, 6))
    ]
    assert ledger.reasons == {"prompt longer than max_prompt_length 5": 3}
    assert [problem.columns["place"] for problem in made.problems] == [0, 2, 4]
    assert [len(ids) for ids in made.prompt_ids] == [3, 5, 4]
    assert {i for ticket in made.sampler for i in ticket.prompts} == {0, 1, 2}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.49])
def test_too_many_long_prompts_are_refused(share):
    said = r"3 of 6 train records cannot be used.*texts:1.*raise max_rejected above 0\.500"
    with pytest.raises(ValueError, match=said):
        data(Texts(3, 9, 5, 8, 4, 6), max_prompt_length=5, max_rejected=share)
    with pytest.raises(ValueError, match="No train record is left"):
        data(Texts(9, 9), max_prompt_length=5, max_rejected=1.0)


def test_the_limit_may_be_left_out():
    made = data(Texts(*[300] * 3, 600), max_prompt_length=None, packing=False)
    assert sorted(map(len, made.prompt_ids)) == [300, 300, 300, 600]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"num_iterations": 2}, "num_iterations"),
        ({"prompts_per_rollout": 8}, "prompts_per_rollout"),
        ({"num_generations": 8}, "num_generations"),
        ({"batch_size": 8}, "samples per step"),
        ({"problems": CountdownProblems("train", "any", 12, seed=1)}, "samples"),
        ({"problems": CountdownProblems("train", "any", 13)}, "samples"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_what_the_order_depends_on_is_its_identity(changes, named):
    before, after = data().identity, data(**changes).identity
    assert {key for key in before if before[key] != after[key]} == {named}


def test_what_rewards_read_is_part_of_the_identity():
    a, b = data(Texts(*[3] * 4)).identity, data(Texts(*[3] * 4, first=1)).identity
    assert {key for key in a if a[key] != b[key]} == {"samples"}


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 8, "world": 2},
        {"batch_size": 8, "accumulate": 2},
        {"packing": False},
    ],
    ids=str,
)
def test_devices_and_packing_change_nothing(changes):
    assert data(**changes).identity == data().identity


# --- nothing is stale -------------------------------------------------------------------------


class Spied(HFRollout):
    """Keeps the weights that each rollout is sampled from."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def generate(self, *args, **kwargs):
        self.weights.append(weights(self._model))
        return super().generate(*args, **kwargs)


class Watch(pl.Callback):
    """Keeps the weights behind each step, and how many tickets were drawn before it."""

    def __init__(self):
        self.weights, self.drawn = [], []

    def on_train_start(self, trainer, module):
        self.weights.append(weights(module.model))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.drawn.append(trainer.datamodule.sampler.drawn)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.weights) == module.global_step:
            self.weights.append(weights(module.model))


class Counted(Tickets):
    drawn = 0

    def __iter__(self):
        for ticket in super().__iter__():
            self.drawn += 1
            yield ticket


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize(("iterations", "accumulate"), [(1, 1), (1, 2), (2, 1)])
def test_a_rollout_is_sampled_from_the_weights_behind_the_step_before(
    iterations, accumulate, monkeypatch
):
    monkeypatch.setattr("gift_lightning.prompts.Tickets", Counted)
    engine = Spied()
    module = GRPO(
        causal_lm("gift:countdown"),
        [{"class_path": "Format", "init_args": {"regex": ".*[0-4]"}}],
        engine=engine,
        optimizer=lambda p: SGD(p, lr=0.1),
        max_completion_length=12,
        reward_workers=1,
    )
    prompts = PromptData(
        CountdownProblems("train", "any", 12),
        prompts_per_rollout=4,
        num_generations=4,
        batch_size=16 // accumulate,
        num_iterations=iterations,
    )
    watch, steps = Watch(), 3 * iterations
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[watch],
    )
    trainer.fit(module, prompts)
    assert len(engine.weights) == 3 and len(watch.weights) == steps + 1
    for k, sampled in enumerate(engine.weights):
        assert torch.equal(sampled, watch.weights[k * iterations])
    for before, after in zip(watch.weights, watch.weights[1:], strict=False):
        assert not torch.equal(before, after)
    assert watch.drawn == list(range(1, steps * accumulate + 1))
