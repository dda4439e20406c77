import io
import json
import logging
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from gift_lightning.data import SFTData
from gift_lightning.examples import Ledger
from gift_lightning.records import Record, Rejected, Source
from test_render import CHATML, byte_tokenizer

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class Letters(SFTData):
    """`n` records in memory: sample i learns i % 5 + 2 tokens."""

    def __init__(self, n=13, val=None, **options):
        super().__init__([], **options)
        self.n, self.val = n, val or {}

    def train_records(self):
        return (Record(f"r:{i}", "x" * (i % 5 + 1), chr(97 + i)) for i in range(self.n))

    def val_records(self):
        return {
            name: [Record(f"v:{i}", "yy", "v") for i in range(n)] for name, n in self.val.items()
        }


def prepared(data, **options):
    data.prepare(byte_tokenizer(), 258 + 2, **options)
    return data


# --- preparation ----------------------------------------------------------------------------


def test_in_memory_records():
    data = prepared(Letters(3, val={"a": 2, "b": 5}, batch_size=2))
    input_ids, labels = data.train_examples[1]
    assert byte_tokenizer().decode(input_ids) == "<s>bxx</s>"
    assert labels.tolist() == [-100, -100, *input_ids[2:].tolist()]
    assert data.train_examples.lengths.tolist() == [4, 5, 6]
    assert data.train_examples.num_targets.tolist() == [2, 3, 4]
    with pytest.raises(IndexError):
        data.train_examples[3]
    assert data.val_names == ["a", "b"]
    sizes = [[b["sample_ids"].tolist() for b in loader] for loader in data.val_dataloader()]
    assert sizes == [[[0, 1]], [[0, 1], [2, 3], [4]]]
    assert len(data.sets["b"]) == 5
    batch = next(iter(data.val_dataloader()[1]))
    assert (batch["step_tokens"], batch["step_sequences"]) == (15, 5)


def test_batches_of_an_epoch():
    data = prepared(Letters(13, batch_size=2), accumulate=3)
    loader = data.train_dataloader()
    assert len(loader) == 7
    seen = Counter()
    for i, batch in enumerate(loader):
        assert batch["step_sequences"] == (6 if i < 6 else 1)
        learned = sum(int(data.train_examples.num_targets[s]) for s in batch["sample_ids"].tolist())
        assert int((batch["labels"] != -100).sum()) == learned
        for s, sample in enumerate(batch["sample_ids"].tolist()):
            ids = batch["input_ids"][batch["sequence_ids"] == s]
            assert ids.tolist() == data.train_examples[sample][0].tolist()
            seen[sample] += 1
    assert seen == Counter(range(13))


def test_ranks_share_an_epoch():
    parts = [prepared(Letters(13, batch_size=2), world=2, rank=r, accumulate=2) for r in (0, 1)]
    one = prepared(Letters(13, batch_size=4), accumulate=2)
    assert len({str(part.identity) for part in [*parts, one]}) == 1
    batches = [list(part.train_dataloader()) for part in parts]
    assert len(batches[0]) == len(batches[1]) == len(one.train_dataloader()) == 4
    for a, b, c in zip(*batches, one.train_dataloader(), strict=True):
        assert a["step_tokens"] == b["step_tokens"] == c["step_tokens"]
    seen = Counter(i for part in batches for b in part for i in b["sample_ids"].tolist())
    assert seen == Counter(range(13))
    assert batches[1][-1]["input_ids"].shape == (1, 1)  # 13 = 8 + 5: rank 1 has 2 in the last step


def test_weights():
    class Mixed(SFTData):
        def train_records(self):
            for source, weight in (("a", 2.0), ("b", 0.5), ("c", 1.25)):
                for i in range(8):
                    yield Record(f"{source}:{i}", "x", "p", source=source, weight=weight)

    data = prepared(Mixed([], seed=1))
    uses = Counter(i for b in data.train_dataloader() for i in b["sample_ids"].tolist())
    assert [uses[i] for i in range(8)] == [2] * 8
    assert sorted(uses[i] for i in range(8, 16)) == [0] * 4 + [1] * 4
    assert sorted(uses[i] for i in range(16, 24)) == [1] * 6 + [2] * 2
    ledger = data.ledger["train"]
    assert (ledger.read, ledger.used, len(ledger.left_out)) == (24, 20, 4)
    assert ledger.counts == {"read": 24, "used": 20, "left out by weight": 4}
    again = prepared(Mixed([], seed=1))
    assert again.identity == data.identity
    assert prepared(Mixed([], seed=2)).ledger["train"].left_out != ledger.left_out


def test_nothing_is_lost_in_silence(tmp_path):
    """Every kind of bad record among good ones: read = used + reported, good ones exactly once."""
    bad = [
        '{"question": "a", "answer": ',
        "[]",
        "{}",
        '{"question": "a"}',
        '{"question": "a", "answer": null}',
        '{"question": "a", "answer": ""}',
        '{"question": "", "answer": "b"}',
        '{"question": "a", "answer": " \\n"}',
        '{"question": "a", "answer": [1]}',
        '{"question": "a", "answer": "\\ud800"}',
        '{"question": "a", "answer": "\\u0000"}',
        "[" * 20_000,
        '{"question": "a", "answer": "' + "long " * 100 + '"}',
        '{"question": "' + "long " * 100 + '", "answer": "b"}',
        '{"question": "a", "answer": "' + "10MB" * 2_500_000 + '"}',
        '{"question": "a", "answer": "<pad>"}',
        '{"question": {"deep": ' + "[" * 50 + "]" * 50 + '}, "answer": "b"}',
    ]
    rows, good = [], set()
    for i in range(170):
        rows.append(bad[i % len(bad)])
        rows.append({"question": f"q{i}", "answer": f"a{i}"})
        good.add(f"<s>q{i}a{i}</s>")
    path = write(tmp_path / "a.jsonl", rows)
    tokenizer = byte_tokenizer(pad="<pad>")
    data = SFTData(path, max_length=60, max_rejected=0.6)
    data.prepare(tokenizer, tokenizer.convert_tokens_to_ids("<pad>"))
    ledger = data.ledger["train"]
    assert (ledger.read, ledger.used, len(ledger.rejected)) == (340, 170, 170)
    lines = sorted(int(item.origin.rpartition(":")[2]) for item in ledger.rejected)
    assert lines == list(range(1, 341, 2))
    assert all(str(item).startswith(f"{path}:") and item.reason for item in ledger.rejected)
    assert sum(ledger.counts.values()) == 2 * 340
    too_long = [f"{which}longer than max_length 60" for which in ("", "prompt ")]
    assert [ledger.counts[kind] for kind in too_long] == [20, 10]
    assert ledger.counts["token id outside the vocabulary"] == 10
    trained = Counter(
        tokenizer.decode(batch["input_ids"][batch["sequence_ids"] == s])
        for batch in data.train_dataloader()
        for s in range(len(batch["sample_ids"]))
    )
    assert trained == Counter(good)


def test_too_many_rejected(tmp_path):
    path = write(tmp_path / "a.jsonl", [*[{"text": "ok"}] * 7, {"text": ""}, {"text": 7}, "x"])
    message = (
        r"2 of 10 train records cannot be used: blank completion \(1\), invalid JSON \(1\); the "
        r"first is .*a\.jsonl:8: blank completion\. Repair them, or raise max_rejected above 0\.2"
    )
    with pytest.raises(ValueError, match=message):
        prepared(SFTData(path, max_rejected=0.19))
    assert prepared(SFTData(path, max_rejected=0.2)).ledger["train"].used == 8
    path = write(tmp_path / "b.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="No train record is left to use; 1 of 1 train records"):
        prepared(SFTData(path, max_rejected=1.0))
    with pytest.raises(ValueError, match="No val record is left to use"):
        prepared(SFTData(str(tmp_path / "a.jsonl"), val=path, max_rejected=0.3))


def test_ledger_counts_kinds():
    rejected = [Rejected("bad: 1", "a:1"), Rejected("bad: 2", "a:2"), Rejected("worse", "a:3")]
    ledger = Ledger("train", used=2, rejected=rejected, left_out=["a:4"])
    assert ledger.counts == {
        "read": 6,
        "used": 2,
        "bad": 2,
        "worse": 1,
        "left out by weight": 1,
    }


def test_report_shows_counts_and_an_example(tmp_path):
    rows = [{"question": "[red]2+2?", "answer": " It is 4."}, {"question": "a", "answer": ""}]
    data = prepared(SFTData(write(tmp_path / "a.jsonl", rows), max_rejected=0.5))
    out = io.StringIO()
    data.report(Console(file=out, force_terminal=True, width=100, color_system="standard"))
    text = out.getvalue()
    assert "blank completion" in text and "[red]2+2?" in text
    marked = text[text.index("[red]2+2?") + len("[red]2+2?") :]
    assert marked.index("\x1b[") < marked.index(" It is 4.</s>")


def test_gsm8k():
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not there")
    data = SFTData(Source(str(GSM8K), limit=200), prompt_format="Question: {prompt}\nAnswer: ")
    tokenizer = byte_tokenizer()
    data.prepare(tokenizer, 260)
    ledger = data.ledger["train"]
    assert ledger.read == 200 and ledger.used + len(ledger.rejected) == 200
    for line, i in zip(GSM8K.read_text(encoding="utf-8").splitlines(), range(50), strict=False):
        input_ids, labels = data.train_examples[i]
        row = json.loads(line)
        assert tokenizer.decode(labels[labels != -100]) == row["answer"] + "</s>"
        prompt = f"<s>Question: {row['question']}\nAnswer: "
        assert tokenizer.decode(input_ids[labels == -100]) == prompt


# --- options --------------------------------------------------------------------------------


def test_bad_options():
    for options, message in [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_rejected": 5.0}, "max_rejected is a share between 0 and 1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"prompt_format": "Q:"}, "must contain {prompt}"),
        ({"val": {"train": "a.jsonl"}}, "a validation set cannot be named 'train'"),
        ({"val": {"path": "a.jsonl", "prmpt": "b"}}, "'path' is a source option, not a name"),
    ]:
        with pytest.raises(ValueError, match=message):
            SFTData("a.jsonl", **options)


@pytest.mark.parametrize(
    ("config", "train", "val"),
    [
        ({"train": "a.jsonl"}, [Source("a.jsonl")], {}),
        (
            {"train": {"path": "a.jsonl", "weight": 2.0}, "val": "b.jsonl"},
            [Source("a.jsonl", weight=2.0)],
            {"val": [Source("b.jsonl")]},
        ),
        (
            {
                "train": ["a.jsonl", {"path": "owner/name", "split": "test", "limit": 5}],
                "val": {
                    "math": "m.jsonl",
                    "chat": {"path": "c.jsonl", "format": "messages"},
                    "both": ["m.jsonl", {"path": "c.jsonl"}],
                },
            },
            [Source("a.jsonl"), Source("owner/name", split="test", limit=5)],
            {
                "math": [Source("m.jsonl")],
                "chat": [Source("c.jsonl", format="messages")],
                "both": [Source("m.jsonl"), Source("c.jsonl")],
            },
        ),
        (
            {"train": "a.jsonl", "val": {"path": "b.jsonl", "prompt": "q", "completion": "a"}},
            [Source("a.jsonl")],
            {"val": [Source("b.jsonl", prompt="q", completion="a")]},
        ),
    ],
)
def test_configuration(config, train, val):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTData, "data")
    parsed = parser.parse_object({"data": config})
    data = parser.instantiate(parsed).data
    assert data.train_sources == train
    assert data.val_sources == val
    again = parser.parse_string(parser.dump(parsed))
    assert parser.instantiate(again).data.train_sources == train


def test_help_explains_every_option():
    parser = ArgumentParser()
    parser.add_class_arguments(SFTData, "data")
    out = io.StringIO()
    parser.print_help(out)
    for text in ("What to train on", "Most tokens of one example", "Refuse to start if a larger"):
        assert text in " ".join(out.getvalue().split())


# --- the trainer ----------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Learns nothing of value, and writes down the samples it sees."""

    def __init__(self, early=False):
        super().__init__()
        self.tokenizer, self.vocab_size = byte_tokenizer(CHATML), 300
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.early, self.seen, self.validated = early, [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(batch["sample_ids"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((dataloader_idx, len(batch["sample_ids"])))

    def configure_optimizers(self):
        if self.early:  # makes the trainer load the data before it restores its loops
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(pl.Callback):
    """Saves at the end of every step, validation and epoch."""

    def __init__(self, folder=None):
        self.folder, self.saved = folder, []

    def save(self, trainer, where):
        if self.folder is None or trainer.sanity_checking:
            return
        path = str(self.folder / f"{len(self.saved)}.ckpt")
        trainer.save_checkpoint(path)
        self.saved.append((where, len(trainer.lightning_module.seen), path))

    def on_train_batch_end(self, trainer, module, *_):
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done % 2 == 0 or done == trainer.num_training_batches:
            self.save(trainer, "step")

    def on_validation_end(self, trainer, module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "epoch")

    def on_train_end(self, trainer, module):
        self.save(trainer, "end")


def fit(data, callback=None, path=None, early=False, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Recorder(early)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if callback else [],
        **{"accumulate_grad_batches": 2, **options},
    )
    trainer.fit(module, data, ckpt_path=path, weights_only=True if path else None)
    return module


RUNS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_epochs": -1, "max_steps": 11},
    "epochs, no validation": {"max_epochs": 3, "limit_val_batches": 0},
    "steps, no validation": {"max_epochs": -1, "max_steps": 11, "limit_val_batches": 0},
    "validation in mid-epoch": {"max_epochs": 3, "val_check_interval": 2},
    "short epochs": {"max_epochs": 3, "limit_train_batches": 5},
}


def letters(**options):
    return Letters(13, val={"v": 3}, batch_size=2, seed=4, **options)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", list(RUNS))
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(tmp_path, name, early):
    """13 samples, 7 micro-batches and 4 steps per epoch, saved at every step and epoch end."""
    saver = Saver(tmp_path)
    whole = fit(letters(), saver, early=early, **RUNS[name]).seen
    assert len(saver.saved) > 12 and len(whole) > 14
    if "limit_train_batches" not in RUNS[name]:
        assert Counter(i for batch in whole[:7] for i in batch) == Counter(range(13))
    assert whole[:5] != whole[7:12]
    for where, done, path in saver.saved:
        if where != "end":
            resumed = fit(letters(), path=path, early=early, **RUNS[name]).seen
            assert resumed == whole[done:], (where, done)


def test_resume_with_workers(tmp_path):
    saver = Saver(tmp_path)
    whole = fit(letters(num_workers=1), saver, max_epochs=3).seen
    assert whole == fit(letters(), max_epochs=3).seen
    ends = [item for item in saver.saved if item[0] != "end" and item[1] in (4, 7)]
    assert [where for where, _, _ in ends] == ["step", "step", "validation", "epoch"]
    for where, done, path in ends:
        resumed = fit(letters(num_workers=1), path=path, max_epochs=3).seen
        assert resumed == whole[done:], (where, done)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_more_steps_after_the_planned_end(tmp_path, stop, limit_val_batches):
    options = {"max_epochs": -1, "limit_val_batches": limit_val_batches}
    whole = fit(letters(), max_steps=11, **options).seen
    saver = Saver(tmp_path)
    fit(letters(), saver, max_steps=stop, **options)
    again = Saver(tmp_path / "again")
    for where, done, path in saver.saved[-3:]:
        resumed = fit(letters(), again, path, max_steps=11, **options).seen
        assert resumed == whole[done:], (where, done)
    # The numbers of the epochs have shifted in such a run; a second resume still fits.
    for where, seen, path in again.saved[:: len(again.saved) // 8]:
        if where != "end" and seen < 20 - done and path.startswith(str(tmp_path)):
            tail = fit(letters(), path=path, max_steps=11, **options).seen
            assert whole[len(whole) - len(tail) :] == tail, (where, seen)


def test_setup_through_the_trainer(capsys):
    data = Letters(5, val={"a": 3, "b": 2}, batch_size=2)
    module = fit(data, max_epochs=1, num_sanity_val_steps=0)
    assert Counter(i for batch in module.seen for i in batch) == Counter(range(5))
    assert module.validated == [(0, 2), (0, 1), (1, 2)]
    assert data.ledger["train"].used == 5
    assert "Example" in capsys.readouterr().out


def test_a_second_fit_starts_anew(tmp_path):
    saver = Saver(tmp_path)
    data = letters()
    whole = fit(data, saver, max_epochs=2).seen
    assert fit(data, path=saver.saved[1][2], max_epochs=2).seen == whole[4:]
    assert fit(data, max_epochs=2).seen == whole


def test_checkpoints_that_cannot_be_resumed(tmp_path):
    saver = Saver(tmp_path)
    fit(letters(), saver, max_epochs=1)
    path = saver.saved[0][2]
    for data, options, message in [
        (
            letters(),
            {"accumulate_grad_batches": 1},
            r"samples per step \(4 before, 2 now\) changed",
        ),
        (Letters(13, batch_size=2, seed=5), {}, r"seed \(4 before, 5 now\) changed"),
        (Letters(12, batch_size=2, seed=4), {}, "other data: the samples changed; restore"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(data, path=path, max_epochs=1, **options)

    class Inside(Saver):
        def on_train_batch_end(self, trainer, module, *_):
            if len(module.seen) == 3:
                self.save(trainer, "inside")

    (tmp_path / "inside").mkdir()
    inside = Inside(tmp_path / "inside")
    fit(letters(), inside, max_epochs=1)
    with pytest.raises(ValueError, match="inside an optimizer step, after micro-batch 3 of epoch"):
        fit(letters(), path=inside.saved[0][2], max_epochs=1)

    class Stop(Saver):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.should_stop = len(module.seen) == 4

    (tmp_path / "stop").mkdir()
    stop = Stop(tmp_path / "stop")
    fit(letters(), stop, max_epochs=3)
    assert stop.saved[-1][1] == 4
    with pytest.raises(ValueError, match="after training stopped inside epoch 0"):
        fit(letters(), path=stop.saved[-1][2], max_epochs=3)

    class AtStart(Saver):
        def on_train_epoch_start(self, trainer, module):
            self.save(trainer, "start")

    with pytest.raises(ValueError, match="on_train_epoch_start cannot be resumed"):
        fit(letters(), AtStart(tmp_path), max_epochs=2)


def test_state_is_plain_data(tmp_path):
    saver = Saver(tmp_path)
    data = letters()
    fit(data, saver, max_epochs=1)
    state = torch.load(saver.saved[0][2], weights_only=True)["Letters"]
    assert (state["epoch"], state["micro_batches_done"]) == (0, 2)
    assert json.loads(json.dumps(state)) == state


def test_other_distributed_samplers_are_refused():
    data = Letters(4)
    data.trainer = type(
        "Trainer",
        (),
        {
            "world_size": 2,
            "global_rank": 0,
            "strategy": None,
            "_accelerator_connector": type("C", (), {"use_distributed_sampler": True}),
        },
    )()
    with pytest.raises(ValueError, match=r"set trainer\.use_distributed_sampler to false"):
        data.setup("fit")


def test_the_identity_sees_every_change():
    def identity(**options):
        return prepared(Letters(6, **options)).identity

    base = str(identity())
    assert identity() == identity(packing=False, num_workers=1)
    changes = [{"seed": 1}, {"batch_size": 4}, {"loss_on": "all"}, {"prompt_format": "{prompt}:"}]
    assert len({base, *(str(identity(**change)) for change in changes)}) == 5


def test_another_tokenizer_prepares_the_data_again():
    module = type("Module", (), {"tokenizer": byte_tokenizer(), "vocab_size": 300})()
    data = Letters(4)
    fields = {"world_size": 1, "global_rank": 0, "accumulate_grad_batches": 1, "strategy": None}
    fields |= {"is_global_zero": False, "lightning_module": module}
    data.trainer = type("Trainer", (), fields)()
    data.setup("fit")
    examples = data.train_examples
    data.setup("fit")
    assert data.train_examples is examples
    module.tokenizer = byte_tokenizer()
    data.setup("fit")
    assert data.train_examples is not examples
