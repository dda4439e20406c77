import csv
import math
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from gift_lightning import countdown_data
from gift_lightning.evaluation import PassAtK
from gift_lightning.functional import pass_at_k
from gift_lightning.generation import generate
from gift_lightning.seeds import keyed_seed


@dataclass(frozen=True)
class Problem:
    prompt: str
    share: int

    def verify(self, text):
        return sum(map(ord, text)) % 4 < self.share


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.arange(8.0), batch_size=2)

    val_dataloader = train_dataloader

    def eval_problems(self):
        return {
            "mixed": [Problem(f"{i} > {i} : ", i % 5) for i in range(6)],
            "never": [Problem("3 : ", 0)] * 3,
        }


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
        )
        self.model = LlamaForCausalLM(config)
        self.modes = []

    def training_step(self, batch, _):
        self.modes.append(all(m.training for m in self.model.modules()))
        return sum(p.square().sum() for p in self.model.parameters())

    def validation_step(self, batch, _):
        pass

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
    settings = {"num_problems": 5, "num_samples": 8, "ks": (1, 4), "max_new_tokens": 6, "seed": 7}
    return PassAtK(**(settings | changes))


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


def _expected(module, name, problems, callback):
    """The metrics of one set, counted by hand."""
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
    right = [
        [c.finished and p.verify(tokenizer.decode(c.tokens[:-1])) for c in group]
        for p, group in zip(problems, groups, strict=True)
    ]
    metrics = {}
    for k in (1, 4):
        solved = [1 - math.comb(8 - sum(r), k) / math.comb(8, k) for r in right]
        mean = sum(solved) / len(solved)
        variance = sum((s - mean) ** 2 for s in solved) / (len(solved) - 1)
        metrics[f"val/{name}/pass@{k}"] = mean
        metrics[f"val/{name}/pass@{k}_se"] = (variance / len(solved)) ** 0.5
    cut = [not c.finished for group in groups for c in group]
    return metrics | {f"val/{name}/truncated": sum(cut) / len(cut)}


def test_callback_logs_before_and_during_training(tmp_path):
    module, callback = Module(), _callback()
    before = {}
    for name, problems in Data().eval_problems().items():
        before |= _expected(module, name, problems[:5], callback)
    seen = {}

    class Sanity(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.update(trainer.callback_metrics)

    trainer = _trainer(tmp_path, callback, callbacks=[callback, Sanity()])
    trainer.fit(module, datamodule=Data())
    assert {k: float(v) for k, v in seen.items()} == pytest.approx(before)
    assert [row["step"] for row in callback.history] == [0, 4, 8]
    assert callback.history[0] == pytest.approx({"step": 0, **before})
    assert before["val/mixed/pass@4"] > before["val/mixed/pass@1"] > 0
    assert before["val/never/pass@4"] == 0 and before["val/never/pass@1_se"] == 0
    assert trainer.callback_metrics["val/mixed/pass@4"].item() == pytest.approx(
        callback.history[-1]["val/mixed/pass@4"]
    )
    assert len(callback.completions) == 3
    for shown in callback.completions:
        assert set(shown) == {"set", "prompt", "completion", "correct"}
    assert all(module.modes) and module.model.config.use_cache
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/mixed/pass@4")]
    assert [int(row["step"]) for row in rows] == [3, 7]


def test_every_and_validate(tmp_path):
    module, callback = Module(), _callback(every=2)
    _trainer(tmp_path, callback).fit(module, datamodule=Data())
    assert [row["step"] for row in callback.history] == [0, 8]
    callback = _callback()
    metrics = _trainer(tmp_path, callback).validate(module, datamodule=Data(), verbose=False)[0]
    assert metrics["val/mixed/pass@1"] == pytest.approx(callback.history[-1]["val/mixed/pass@1"])


def test_ranks_share_the_problems():
    """Two ranks, simulated: their counts add up to those of one."""

    class Strategy:
        def reduce(self, counts, reduce_op):
            assert reduce_op == "sum"
            return counts

    def rank(rank, world_size):
        fixed = {"global_rank": rank, "world_size": world_size, "strategy": Strategy()}
        return type("Rank", (pl.Trainer,), {"__init__": lambda self: None, **fixed})()

    module, callback = Module(), _callback()
    problems = Data().eval_problems()["mixed"]
    parts = [callback._sampled(rank(r, 2), module, "mixed", problems) for r in range(2)]
    whole = callback._sampled(rank(0, 1), module, "mixed", problems)
    assert torch.equal(parts[0] + parts[1], whole)
    assert all(part.sum() < whole.sum() for part in parts)


def test_history_survives_a_checkpoint(tmp_path):
    callback = _callback()
    trainer = _trainer(tmp_path, callback)
    trainer.fit(Module(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = _callback()
    trainer = _trainer(tmp_path, again, max_epochs=3)
    trainer.fit(Module(), datamodule=Data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.history[:3] == callback.history and again.history[-1]["step"] == 12


@pytest.mark.parametrize(
    "changes", [{"ks": (1, 9)}, {"ks": (0,)}, {"ks": ()}, {"num_samples": 0}, {"every": 0}]
)
def test_bad_settings(changes):
    with pytest.raises(ValueError, match="PassAtK"):
        _callback(**changes)


def test_a_datamodule_without_problems(tmp_path):
    with pytest.raises(ValueError, match="eval_problems"):
        _trainer(tmp_path, _callback()).fit(Module(), DataLoader(torch.arange(4.0)))
