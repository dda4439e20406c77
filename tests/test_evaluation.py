"""The callback that samples: what it measures, when, what it leaves behind, what it refuses."""

import csv
import json
import math
from collections import Counter
from typing import ClassVar

import lightning.pytorch as pl
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from gift_lightning import completions, countdown_data, rollouts, sampler
from gift_lightning.countdown import verify
from gift_lightning.evaluation import GenerationEval
from gift_lightning.functional import pass_at_k
from gift_lightning.generation import generate
from gift_lightning.models import causal_lm
from gift_lightning.problems import CountdownProblems, Problem, Problems
from gift_lightning.replicas import Replicas
from gift_lightning.rewards import Reward
from gift_lightning.run import Report
from gift_lightning.sampler import Sampler
from gift_lightning.seeds import keyed_seed


def right(text, share):
    return sum(map(ord, text)) % 4 < share


class Share(Reward):
    """Right with about the share of a problem, in quarters; 9 cannot be judged."""

    reads = ("share",)

    def score(self, completion, **columns):
        assert isinstance(columns["prompt"], str | list) and columns["max_completion_length"] == 6
        share = columns["share"]
        return None if share == 9 else float(right(completion, share))


class Answering(Share):
    """With an answer: the first of three digits."""

    def answer(self, completion, **columns):
        assert "share" in columns
        return next((x for x in completion if x in "012"), None)


class Pool:
    """RewardPool in this process; `log` holds what became of all pools."""

    log: ClassVar[list[str]] = []

    def __init__(self, rewards):
        self.rewards = rewards
        self.log.append("opened")

    def score(self, requests):
        return [[w.reward.score(x.completion, **x.columns) for w in self.rewards] for x in requests]

    def total(self, scored):
        values = [x for x in scored if x is not None]
        return sum(values) if values else math.nan

    def close(self):
        self.log.append("closed")


@pytest.fixture(autouse=True)
def log(monkeypatch):
    monkeypatch.setattr(sampler, "RewardPool", Pool)
    Pool.log.clear()
    return Pool.log


SETS = {
    "mixed": [Problem(f"{i} > {i} : ", {"share": i % 5}, f"mixed {i}") for i in range(5)],
    "never": [Problem("3 : ", {"share": 0}, f"never {i}") for i in range(3)],
}


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.arange(8.0), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader

    def eval_problems(self):
        return SETS


class Listed(Problems):
    def __init__(self, problems):
        self.problems = problems

    def load(self):
        return self.problems


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokenizer = countdown_data.tokenizer()
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        self.model = LlamaForCausalLM(config)
        self.end_ids = [self.tokenizer.eos_token_id]
        self.modes = []

    def training_step(self, batch, _):
        self.modes.append(all(m.training for m in self.model.modules()))
        return sum(p.square().sum() for p in self.model.parameters())

    def validation_step(self, batch, _):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def _trainer(folder, callback, **options):
    settings = {
        "default_root_dir": folder,
        "logger": CSVLogger(folder, name="", version=""),
        "callbacks": [callback],
        "accelerator": "cpu",
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 2,
    }
    return pl.Trainer(**(settings | options))


def _callback(**changes):
    settings = {
        "rewards": ["test_evaluation.Share"],
        "num_samples": 8,
        "ks": (1, 4),
        "max_new_tokens": 6,
    }
    return GenerationEval(**(settings | {"seed": 7} | changes))


def _samples(folder, name="step-00000000"):
    return pyarrow.parquet.read_table(folder / f"completions/{name}.parquet").to_pylist()


def test_pass_at_k_by_hand():
    # n = 4, c = 1: 1 - C(3,2)/C(4,2) = 1/2; n = 4, c = 2: 1 - 1/6; c > n - k: certain
    assert pass_at_k(4, 1, 2).item() == pytest.approx(1 / 2, abs=1e-12)
    assert pass_at_k(4, 2, 2).item() == pytest.approx(5 / 6, abs=1e-12)
    assert pass_at_k(4, 3, 2).item() == 1
    assert pass_at_k(16, 0, 16).item() == 0
    for c in range(17):
        expected = 1 - math.comb(16 - c, 5) / math.comb(16, 5)
        assert pass_at_k(16, c, 5).item() == pytest.approx(expected, abs=1e-12)
        assert pass_at_k(16, c, 1).item() == pytest.approx(c / 16, abs=1e-12)


def _expected(module, name, problems):
    """The metrics of one set, counted by hand, and the samples."""
    tokenizer = module.tokenizer
    groups = generate(
        module.model,
        [tokenizer(p.prompt)["input_ids"] for p in problems],
        8,
        max_new_tokens=6,
        eos_ids=[1],
        pad_id=0,
        seed=keyed_seed(7, "evaluation", name),
    )
    texts = [
        [
            tokenizer.decode(c.tokens[: -1 if c.finished else None], skip_special_tokens=True)
            for c in group
        ]
        for group in groups
    ]
    good = [
        [
            c.finished and right(text, p.columns["share"])
            for c, text in zip(group, said, strict=True)
        ]
        for p, group, said in zip(problems, groups, texts, strict=True)
    ]
    metrics, solved = {}, {}
    for k in (1, 4, 8):
        solved[k] = [1 - math.comb(8 - sum(r), k) / math.comb(8, k) for r in good]
        metrics[f"pass@{k}"] = sum(solved[k]) / len(solved[k])
    metrics["coverage@8"] = metrics.pop("pass@8")
    metrics["avg@8"] = sum(map(sum, good)) / 8 / len(good)
    cut = [not c.finished for group in groups for c in group]
    metrics["truncated"] = sum(cut) / len(cut)
    different = [
        len({"".join(t.split()) for t, r in zip(said, rs, strict=True) if r})
        for said, rs in zip(texts, good, strict=True)
    ]
    metrics["distinct"] = sum(different) / len(different)
    metrics["not_scorable"] = 0
    flat = [
        (t, r) for said, rs in zip(texts, good, strict=True) for t, r in zip(said, rs, strict=True)
    ]
    return {f"val/{name}/{k}": v for k, v in metrics.items()}, flat, solved


def test_callback_logs_before_and_during_training(tmp_path, log):
    module, callback = Module(), _callback()
    before = {}
    for name, problems in SETS.items():
        before |= _expected(module, name, problems)[0]
    seen = {}

    class Sanity(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer = _trainer(tmp_path, callback, callbacks=[callback, Sanity()])
    trainer.fit(module, datamodule=Data())
    assert {k: v for k, v in seen.items() if not k.endswith("_se")} == pytest.approx(before)
    errors = {k for k in seen if k.endswith("_se")}
    assert errors == {
        f"val/{name}/{metric}_se"
        for name in SETS
        for metric in ("pass@1", "pass@4", "avg@8", "truncated", "distinct")
    }
    assert [row["step"] for row in callback.history] == [0, 4, 8]
    assert callback.history[0] == pytest.approx({"step": 0, **seen})
    assert before["val/mixed/pass@4"] > before["val/mixed/pass@1"] > 0
    assert before["val/mixed/truncated"] > 0
    assert before["val/never/pass@4"] == 0 and seen["val/never/pass@1_se"] == 0
    assert trainer.callback_metrics["val/mixed/pass@4"].item() == pytest.approx(
        callback.history[-1]["val/mixed/pass@4"]
    )
    assert len(callback.completions) == 3
    assert {x["set"] for x in callback.completions} == {"mixed", "never"}
    assert all(module.modes) and module.model.config.use_cache
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/mixed/pass@4")]
    assert [int(row["step"]) for row in rows] == [3, 7]
    assert log == ["opened", "closed"]


def test_errors_are_those_of_a_mean_over_problems(tmp_path):
    problems = [Problem(f"{i % 9} > {i} : ", {"share": i % 5}) for i in range(40)]
    callback, module = _callback(sets={"many": Listed(problems)}), Module()
    _trainer(tmp_path, callback).validate(module, datamodule=Data(), verbose=False)
    solved = torch.tensor(_expected(module, "many", problems)[2][4], dtype=torch.float64)
    expected = (solved.var(correction=0) / 40).sqrt().item()
    assert callback.history[0]["val/many/pass@4_se"] == pytest.approx(expected, rel=0.1)


def test_every_and_validate(tmp_path):
    module, callback = Module(), _callback(every=2)
    _trainer(tmp_path, callback).fit(module, datamodule=Data())
    assert [row["step"] for row in callback.history] == [0, 8]
    callback = _callback(every=2)
    metrics = _trainer(tmp_path, callback).validate(module, datamodule=Data(), verbose=False)[0]
    assert metrics["val/mixed/pass@1"] == pytest.approx(callback.history[-1]["val/mixed/pass@1"])
    tested = _trainer(tmp_path, _callback()).test(module, datamodule=Data(), verbose=False)[0]
    assert tested == pytest.approx(metrics)


def _logged(folder, name):
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [(int(row["step"]), float(row[name])) for row in rows]


def test_a_skipped_validation_has_no_older_numbers(tmp_path):
    """Of three validations the second is due and the third is the last."""
    module, callback, name = Module(), _callback(every=2), "val/mixed/pass@4"
    seen = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics[name]))

    saves = ModelCheckpoint(tmp_path, "{step}", monitor=name, mode="max", save_top_k=1)
    options = {"max_epochs": 3, "enable_checkpointing": True}
    trainer = _trainer(tmp_path, callback, callbacks=[callback, Watch(), saves], **options)
    trainer.fit(module, datamodule=Data())
    assert [row["step"] for row in callback.history] == [0, 8, 12]
    before, second, third = (row[name] for row in callback.history)
    assert seen == pytest.approx([before, math.nan, second, third], nan_ok=True)
    steps, values = zip(*_logged(tmp_path, name), strict=True)
    assert steps == (3, 7, 11)
    assert values == pytest.approx((math.nan, second, third), nan_ok=True)
    assert trainer.callback_metrics[name].item() == pytest.approx(third)
    assert saves.best_model_score.item() == pytest.approx(max(second, third))


def test_a_run_that_stops_in_a_skipped_validation_is_evaluated(tmp_path, capsys):
    module, callback, name = Module(), _callback(every=3), "val/mixed/pass@4"

    class Stop(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.should_stop = not trainer.sanity_checking

    trainer = _trainer(tmp_path, callback, callbacks=[callback, Stop(), Report()])
    trainer.fit(module, datamodule=Data())
    assert trainer.global_step == 4
    assert [row["step"] for row in callback.history] == [0, 4]
    end = callback.history[-1][name]
    assert trainer.callback_metrics[name].item() == pytest.approx(end)
    assert _logged(tmp_path, name)[-1] == (3, pytest.approx(end))
    assert "nan" not in capsys.readouterr().out
    assert (tmp_path / "completions" / "step-00000004.parquet").is_file()
    assert all(module.modes)


def test_early_stopping_needs_a_number_of_every_validation(tmp_path):
    def fit(monitor, every):
        callback = _callback(every=every)
        stopping = EarlyStopping(monitor, mode="max", strict=False)
        trainer = _trainer(tmp_path, callback, callbacks=[callback, stopping], max_epochs=1)
        trainer.fit(Module(), datamodule=Data())

    with pytest.raises(ValueError, match=r"every=2.* val/mixed/pass@1, which EarlyStopping"):
        fit("val/mixed/pass@1", 2)
    fit("val/mixed/pass@1", 1)
    fit("val/mixed/nll", 2)


def test_all_samples_are_written(tmp_path):
    module, callback = Module(), _callback()
    expected = [x for name in SETS for x in _expected(module, name, SETS[name])[1]]
    _trainer(tmp_path, callback).fit(module, datamodule=Data())
    names = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert names == [f"step-{step:08d}.parquet" for step in (0, 4, 8)]
    rows = _samples(tmp_path)
    columns = ["step", "set", "problem", "prompt", "completion", "answer"]
    assert list(rows[0]) == [*columns, "reward", "correct", "truncated"]
    assert [(x["completion"], x["correct"]) for x in rows] == expected
    assert Counter((x["set"], x["problem"]) for x in rows) == Counter(
        {(name, i): 8 for name in SETS for i in range(len(SETS[name]))}
    )
    for row in rows:
        problem = SETS[row["set"]][row["problem"]]
        assert row["step"] == 0 and row["prompt"] == problem.prompt and row["answer"] is None
        assert row["reward"] == right(row["completion"], problem.columns["share"])
        assert row["correct"] == (row["reward"] == 1 and not row["truncated"])
    assert any(x["reward"] == 1 and x["truncated"] for x in rows)
    assert {x["step"] for x in _samples(tmp_path, "step-00000008")} == {8}


def test_validating_never_replaces_what_a_run_wrote(tmp_path):
    module, callback = Module(), _callback()
    trainer = _trainer(tmp_path, callback)
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for _ in range(2):
        _trainer(tmp_path, _callback()).validate(
            Module(), datamodule=Data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
    made = {x.name.removesuffix(".parquet") for x in (tmp_path / "completions").iterdir()}
    assert made == {
        *(f"step-{step:08d}" for step in (0, 4, 8)),
        "validate-00000008",
        "validate-00000008-1",
    }
    assert _samples(tmp_path, "validate-00000008") == _samples(tmp_path, "step-00000008")


def test_majority_where_answers_are_extracted(tmp_path):
    module, callback = Module(), _callback(rewards=["test_evaluation.Answering"])
    _trainer(tmp_path, callback).validate(module, datamodule=Data(), verbose=False)
    rows = [x for x in _samples(tmp_path, "validate-00000000") if x["set"] == "mixed"]
    assert any(x["answer"] for x in rows)
    assert not any(x["answer"] for x in rows if x["truncated"])
    wins = 0
    for i in range(5):
        votes = [(x["answer"], x["correct"]) for x in rows if x["problem"] == i and x["answer"]]
        if votes:
            best = max((a for a, _ in votes), key=[a for a, _ in votes].count)
            wins += next(good for a, good in votes if a == best)
    assert callback.history[0]["val/mixed/maj@8"] == pytest.approx(wins / 5)
    assert 0 < wins < 5


def test_what_no_reward_can_judge_is_wrong_and_counted(tmp_path):
    problems = [Problem("1 : ", {"share": 9}), Problem("2 : ", {"share": 4})]
    callback = _callback(sets={"some": Listed(problems)})
    _trainer(tmp_path, callback).validate(Module(), datamodule=Data(), verbose=False)
    found = callback.history[0]
    assert found["val/some/not_scorable"] == 0.5
    assert found["val/some/avg@8"] == pytest.approx((1 - found["val/some/truncated"]) / 2, abs=0.1)
    rows = _samples(tmp_path, "validate-00000000")
    assert all(math.isnan(x["reward"]) and not x["correct"] for x in rows if x["problem"] == 0)


def test_a_completion_is_right_from_the_threshold_on(tmp_path):
    found = []
    for threshold in (0.0, 1.0, 1.5):
        callback = _callback(threshold=threshold)
        _trainer(tmp_path, callback).validate(Module(), datamodule=Data(), verbose=False)
        found.append(callback.history[0])
    low, usual, high = (x["val/mixed/avg@8"] for x in found)
    assert low == pytest.approx(1 - found[0]["val/mixed/truncated"])
    assert low > usual > high == 0


def test_coverage_kept_of_the_run_s_own_start(tmp_path):
    module, callback = Module(), _callback(group_size=4)
    _trainer(tmp_path, callback).fit(module, datamodule=Data())
    first, *_, last = callback.history
    assert "val/mixed/coverage_kept@4" not in first
    counts = []
    for step in (0, 8):
        rows = [x for x in _samples(tmp_path, f"step-{step:08d}") if x["set"] == "mixed"]
        good = [sum(x["correct"] for x in rows if x["problem"] == i) for i in range(5)]
        counts.append([1 - math.comb(8 - c, 4) / math.comb(8, 4) for c in good])
    base, now = counts
    expected = sum(a * b for a, b in zip(base, now, strict=True)) / sum(base)
    assert last["val/mixed/coverage_kept@4"] == pytest.approx(expected)
    assert last["val/mixed/coverage@4"] == pytest.approx(sum(now) / 5)
    assert "val/never/coverage_kept@4" not in last  # the base covers none


def test_coverage_kept_of_a_base_model(tmp_path):
    base, after = _callback(), _callback(rewards=["test_evaluation.Answering"])
    _trainer(tmp_path, base).validate(Module(), datamodule=Data(), verbose=False)
    after.baseline = str(tmp_path / "completions/validate-00000000.parquet")
    _trainer(tmp_path, after).validate(Module(), datamodule=Data(), verbose=False)
    assert after.history[0]["val/mixed/coverage_kept@8"] == 1  # the same model
    other = Module()
    for parameter in other.parameters():
        parameter.data *= 3
    after = _callback(baseline=after.baseline)
    _trainer(tmp_path, after).validate(other, datamodule=Data(), verbose=False)
    assert 0 <= after.history[0]["val/mixed/coverage_kept@8"] <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "gone.parquet"}, r"gone\.parquet cannot be read"),
        ({"temperature": 0.5}, "written with temperature=1.0, not 0.5"),
        ({"sets": {"new": Listed(SETS["mixed"])}}, "0 samples of mixed 0 in the set 'new'"),
        ({"sets": {"mixed": Listed([Problem("9", {"share": 1}, "x:9")])}}, "0 samples of x:9"),
        ({"num_samples": 16}, "8 samples of mixed 0.*group_size=16"),
    ],
)
def test_a_baseline_of_something_else_is_refused(tmp_path, changes, said):
    _trainer(tmp_path, _callback()).validate(Module(), datamodule=Data(), verbose=False)
    path = str(tmp_path / "completions/validate-00000000.parquet")
    with pytest.raises(ValueError, match=said):
        _trainer(tmp_path, _callback(**({"baseline": path} | changes))).validate(
            Module(), datamodule=Data()
        )


def test_problems_of_one_prompt_count_as_one():
    rows = [{"set": "a", "prompt": x, "correct": y} for x, y in (("1", True), ("1", False))]
    assert completions.solved([*rows, {"set": "b", "prompt": "1", "correct": True}]) == {
        "a": {"1": [2, 1]},
        "b": {"1": [1, 1]},
    }


def test_ranks_share_the_problems(monkeypatch):
    """Two ranks, simulated: each draws its share, and all get what one alone gets."""
    module = Module()
    drawing = Sampler(_callback().settings, ["test_evaluation.Share"], SETS, module)

    def rank(rank, world_size):
        fixed = {"global_rank": rank, "world_size": world_size, "strategy": None}
        fixed["__init__"] = lambda self: None
        trainer = type("Rank", (pl.Trainer,), fixed)()
        return drawing.sample("mixed", module.model, module, trainer)

    whole = rank(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Replicas, "gathered", lambda self, rows: [rows])
        parts = [rank(r, 2) for r in range(2)]
    assert [len(part) for part in parts] == [3 * 8, 2 * 8]

    def gather(into, rows):
        into[:] = parts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert rank(1, 2) == whole


class InSpawned(GenerationEval):
    """A spawned process has no fixtures."""

    def setup(self, trainer, pl_module, stage):
        sampler.RewardPool = Pool
        super().setup(trainer, pl_module, stage)


def test_two_processes_measure_what_one_does(tmp_path):
    """Five and three problems on two ranks, with Lightning's own DDP."""
    found = []
    for folder, options in (
        ("one", {}),
        ("two", {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}),
    ):
        callback = InSpawned(
            num_samples=4, ks=(1, 4), max_new_tokens=6, rewards=["test_evaluation.Share"]
        )
        trainer = _trainer(tmp_path / folder, callback, logger=False, **options)
        metrics = trainer.validate(Module(), datamodule=Data(), verbose=False)[0]
        found.append((metrics, _samples(tmp_path / folder, "validate-00000000")))
    assert found[0] == found[1]
    assert found[0][0]["val/mixed/pass@4"] > 0


def test_history_survives_a_checkpoint(tmp_path):
    callback = _callback()
    trainer = _trainer(tmp_path, callback)
    trainer.fit(Module(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = _callback()
    trainer = _trainer(tmp_path / "again", again, max_epochs=3)
    trainer.fit(Module(), datamodule=Data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.history[:3] == callback.history and again.history[-1]["step"] == 12
    # measured against the start of the first run
    assert again.history[3]["step"] == 8
    assert again.history[3] == pytest.approx({**callback.history[-1]})


def test_chat_prompts(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        rollouts,
        "generate",
        lambda model, prompts, *a, **b: seen.append(prompts) or generate(model, prompts, *a, **b),
    )
    module = Module()
    module.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    turns = [Problem([{"role": "user", "content": "3 : "}], {"share": 0})]
    for chat, problems in ((True, SETS["never"][:1]), (False, turns)):
        callback = _callback(chat=chat, sets={"never": Listed(problems)})
        _trainer(tmp_path, callback).validate(module, datamodule=Data(), verbose=False)
    assert [[module.tokenizer.decode(ids) for ids in prompts] for prompts in seen] == [
        ["<3 : >"]
    ] * 2
    rows = _samples(tmp_path, "validate-00000000-1")
    assert json.loads(rows[0]["prompt"]) == turns[0].prompt


def test_a_logger_with_tables_gets_samples(tmp_path):
    class Tables(CSVLogger):
        shown = ()

        def log_table(self, key, columns, data):
            self.shown = (key, columns, data)

    logger, callback = Tables(tmp_path, name="", version=""), _callback(num_logged=2)
    _trainer(tmp_path, callback, logger=logger).fit(Module(), datamodule=Data())
    key, columns, data = logger.shown
    assert key == "completions" and data == [list(x.values()) for x in callback.completions]
    assert len(data) == 2 and "completion" in columns


@pytest.mark.parametrize("fit", [True, False], ids=["fit", "validate"])
def test_the_report_shows_the_table_and_samples(tmp_path, capsys, monkeypatch, fit):
    monkeypatch.setenv("COLUMNS", "120")
    callback = _callback()
    trainer = _trainer(tmp_path, callback, callbacks=[callback, Report()])
    if fit:
        trainer.fit(Module(), datamodule=Data())
    else:
        trainer.validate(Module(), datamodule=Data(), verbose=False)
    printed = capsys.readouterr().out
    assert ("Before and after training" in printed) == fit
    for word in ("pass@1", "pass@4", "distinct", "completions", "mixed", "reward"):
        assert word in printed
    assert ("kept@8" in printed) == fit
    assert sum(printed.count(mark) for mark in ("right", "wrong")) == 3


def test_an_interrupted_run_closes_the_workers(tmp_path, log):
    class Broken(Module):
        def training_step(self, batch, _):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        _trainer(tmp_path, _callback()).fit(Broken(), datamodule=Data())
    assert log == ["opened", "closed"]


def test_a_dry_run_writes_nothing(tmp_path):
    _trainer(tmp_path, _callback(), fast_dev_run=True).fit(Module(), datamodule=Data())
    assert not (tmp_path / "completions").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"ks": (1, 9)},
        {"ks": (0,)},
        {"ks": ()},
        {"group_size": 9},
        {"group_size": 0},
        {"num_samples": 0},
        {"every": 0},
        {"num_logged": -1},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"threshold": math.inf},
    ],
)
def test_bad_settings(changes):
    with pytest.raises(ValueError, match="GenerationEval"):
        _callback(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": ["Nope"]}, "Nope. names no reward"),
        ({"sets": {}}, "no problems"),
        ({"sets": {"empty": Listed([])}}, "no problems"),
        (
            {"sets": {"countdown": CountdownProblems(size=2)}},
            "countdown train any 0 has no column 'share', which the reward Share reads",
        ),
        ({"max_new_tokens": 60}, "8 prompt tokens of mixed 0 and completions of up to 60 .* 64"),
        ({"chat": True}, "mixed 0: a chat prompt needs a chat template"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(tmp_path, changes, said):
    module = Module()
    with pytest.raises(ValueError, match=said):
        _trainer(tmp_path, _callback(**changes)).fit(module, datamodule=Data())
    assert not module.modes


def test_a_datamodule_without_problems(tmp_path):
    with pytest.raises(ValueError, match="eval_problems"):
        _trainer(tmp_path, _callback()).fit(Module(), DataLoader(torch.arange(4.0)))


def test_a_run_without_validation(tmp_path):
    class Unvalidated(Data):
        def val_dataloader(self):
            return []

    for data, options in ((Unvalidated(), {}), (Data(), {"limit_val_batches": 0})):
        module = Module()
        with pytest.raises(ValueError, match="this run has none"):
            _trainer(tmp_path, _callback(), **options).fit(module, datamodule=data)
        assert not module.modes


def test_which_rewards_extract_an_answer():
    sets = {"a": [Problem("1", {"answer": "1", "numbers": [1], "target": 1})]}
    for rewards, extracts in ((["Countdown"], False), (["Countdown", "MathAnswer"], True)):
        drawing = Sampler(_callback().settings, rewards, sets, Module())
        assert (drawing.answer is not None) == extracts


def test_countdown_in_real_workers(tmp_path, monkeypatch):
    monkeypatch.undo()
    sets = {"countdown": CountdownProblems("test", "in", 12)}
    callback = GenerationEval(sets, num_samples=4, ks=(1, 4), max_new_tokens=24)
    module = Module()
    module.model = causal_lm("gift:countdown")
    _trainer(tmp_path, callback).validate(module, datamodule=Data(), verbose=False)
    problems, rows = sets["countdown"].load(), _samples(tmp_path, "validate-00000000")
    for row in rows:
        solves = verify(row["completion"], **problems[row["problem"]].columns)
        assert row["correct"] == (solves and not row["truncated"]) and row["reward"] == solves
    solved = sum(row["correct"] for row in rows)
    assert callback.history[0]["val/countdown/pass@1"] == solved / len(rows) > 0
