"""The command line as a user meets it: a run, a swapped target, a wrong word."""

import csv
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoModelForCausalLM, AutoTokenizer

from gift_lightning.cli import _ProgressBar, main
from gift_lightning.run import own_folder
from warm import gift

ROOT = Path(__file__).parents[1]
TINY = """
model:
  class_path: SFT
  init_args:
    model:
      class_path: gift_lightning.models.tiny_llama
      init_args: {hidden_size: 16, num_layers: 1, num_heads: 2}
    target: {class_path: GIFT, init_args: {beta: 3}}
    reference: FrozenCopy
data:
  class_path: CountdownData
  init_args: {num_demonstrations: 64, num_eval: 8, batch_size: 16}
trainer:
  max_steps: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  default_root_dir: runs/tiny
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a tiny config, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


def logged(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def fit(*flags: str) -> None:
    main(["fit", "--config", "tiny.yaml", *flags])


def refused(capsys, *flags: str) -> str:
    """The one sentence that a refused run says; nothing is left behind."""
    with pytest.raises(SystemExit) as stopped:
        main(list(flags) if flags[:1] == ("fit",) else ["fit", "--config", "tiny.yaml", *flags])
    assert stopped.value.code not in (0, None)
    assert not Path("runs").exists() or not any(Path("runs").iterdir())
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("gift: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_leaves_config_metrics_checkpoints_and_a_loadable_model(here, capsys):
    fit()
    run = Path("runs/tiny")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["target"]
    rows = logged(run)
    names = {name for row in rows for name, value in row.items() if value}
    assert {"train/loss", "train/nll", "train/label_mass", "train/gamma", "train/entropy"} <= names
    assert {"train/kl_target", "train/kl_reference", "train/grad_norm"} <= names
    assert {"train/tokens_per_second", "train/peak_memory_gib", "train/softened"} <= names
    assert {"val/in/nll", "val/out/nll", "val/in/kl_reference"} <= names
    assert [p.name for p in (run / "checkpoints").glob("*.ckpt")]
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    printed = capsys.readouterr().out
    assert "Before and after training" in printed and str(run) in printed


def test_the_saved_config_trains_the_same_model_again(here):
    fit("--model.target.beta", "5")
    main(["fit", "--config", "runs/tiny/config.yaml"])
    first, again = (
        AutoModelForCausalLM.from_pretrained(f"runs/{name}/hf").state_dict()
        for name in ("tiny", "tiny-1")
    )
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.target", "DFT"], "SFT towards DFT()"),
        (["--model.target", "GIFT", "--model.target.beta", "8"], "GIFT(beta=8.0"),
        (["--model.target", "LabelSmoothing", "--model.target.epsilon", "0.1"], "epsilon=0.1"),
        (["--model", "GIFTSFT", "--model.beta", "8"], "GIFTSFT towards GIFT(beta=8.0"),
        (["--model", "StandardSFT"], "StandardSFT towards OneHot()"),
        (["--model", "TargetSFT", "--model.eta", "0.2"], "TargetSFT(eta=0.2"),
        (["--model.target", "mine.Mine", "--model.target.power", "0.3"], "Mine(power=0.3)"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_swapping_the_method_is_one_flag(here, capsys, flags, said):
    Path("mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from gift_lightning.targets import Target\n\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Target):\n"
        "    power: float = 0.5\n"
        "    def label_weight(self, t):\n"
        "        return t.p_y**self.power\n"
    )
    fit(*flags)
    assert said in capsys.readouterr().out


def test_a_resumed_run_obeys_its_flags_and_writes_to_its_own_folder(here, capsys):
    fit()
    last = next(Path("runs/tiny/checkpoints").glob("*step=2*.ckpt"))
    fit("--ckpt_path", str(last), "--trainer.max_steps", "3", "--model.target.beta", "9")
    assert "GIFT(beta=9.0" in capsys.readouterr().out
    rows = logged(Path("runs/tiny-1"))
    assert [row["step"] for row in rows if row["train/loss"]] == ["2"]


def test_a_resumed_run_with_nothing_to_do_is_no_success(here, capsys):
    fit()
    last = next(Path("runs/tiny/checkpoints").glob("*step=2*.ckpt"))
    with pytest.raises(SystemExit) as stopped:
        fit("--ckpt_path", str(last))
    assert stopped.value.code == 1
    assert "nothing was trained: the run starts at step 2" in capsys.readouterr().err


def test_a_new_folder_for_every_run(tmp_path):
    for name in ("run", "run-1"):
        with own_folder(tmp_path / "run") as made:
            assert made.name == name
            (made / "file").touch()
    with own_folder(tmp_path / "run") as made:
        assert made.name == "run-2" and made.is_dir()
    assert not made.exists()  # nothing was written
    (tmp_path / "mine").mkdir()
    with own_folder(tmp_path / "mine") as made:
        pass
    assert made == tmp_path / "mine" and made.is_dir()


def test_runs_that_start_together_have_a_folder_each(tmp_path, monkeypatch):
    with own_folder(tmp_path / "run") as one, own_folder(tmp_path / "run") as two:
        assert (one.name, two.name) == ("run", "run-1")
    with own_folder(tmp_path / "run") as one:
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        (one / "file").touch()
        with own_folder(tmp_path / "run") as other:  # of a process that the first one started
            assert other == one


class AnyLogger(Logger):
    """A logger that names no folder of its own, as WandbLogger by default."""

    save_dir, name, version = ".", "any", "0"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_the_config_is_in_the_runs_folder_whatever_logs(here):
    for folder in ("runs/tiny", "runs/tiny-1"):
        fit("--trainer.logger", "test_cli.AnyLogger")
        assert Path(folder, "config.yaml").is_file() and Path(folder, "hf").is_dir()
    assert not Path("config.yaml").exists()


def test_time_alone_can_end_a_run(here, capsys):
    timed = ("--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:02")
    fit(*timed)
    assert "as many steps as the time allows" in capsys.readouterr().out
    assert Path("runs/tiny/hf").is_dir()
    for flag, value in (("name", "cosine"), ("warmup", "0.1")):
        with pytest.raises(SystemExit):
            fit(*timed, f"--model.schedule.{flag}", value)
        assert "set trainer.max_steps, or name: constant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model.target", "Nope"], ["model.target", "'Nope' names no class", "GIFT", "OneHot"]),
        (["--model.target.betta", "3"], ["model.target", "'betta' is no option of GIFT"]),
        (["--model.tarrget", "DFT"], ["model", "'tarrget' is no option of SFT"]),
        (["--trainer.max_stepz", "3"], ["--trainer.max_stepz"]),
        (["--model.reference", "null"], ["GIFT needs a reference", "--model.reference FrozenCopy"]),
        (["--model.target.beta", "-1"], ["GIFT: beta", "-1"]),
        (["--model.target.beta", "nan"], ["model.target.beta", "nan"]),
        (["--model.target.trust", "1.5"], ["GIFT: trust", "1.5"]),
        (["--model.schedule.name", "cosinus"], ["model.schedule.name", "cosine"]),
        (["--model.schedule.warmup", "50"], ["do not fit", "model.schedule.warmup"]),
        (["--model.reference", "AdapterOff"], ["adapters to turn off", "lora"]),
        (["--data.batch_size", "0"], ["batch_size must be at least 1"]),
        (["--data", "SFTData", "--data.train", "gone.jsonl"], ["gone.jsonl does not exist"]),
        (["--data", "SFTData", "--data.train", "empty.jsonl"], ["empty.jsonl"]),
        (
            ["--data", "SFTData", "--data.train", "columns.jsonl"],
            ["columns.jsonl", "columns (a, b, c)"],
        ),
        (["--model.chunk_size", "0"], ["model.chunk_size must be 1 or more"]),
        (["--model.max_skipped_steps", "0"], ["model.max_skipped_steps must be 1 or more"]),
        (["--ckpt_path", "gone.ckpt"], ["'gone.ckpt' is no file", "checkpoints/last.ckpt"]),
        (["--ckpt_path", "last"], ["'last' is no file"]),
        (["--trainer.overfit_batches", "2"], ["trainer.overfit_batches", "limit"]),
        (["--model.model.pretrained", "x"], ["'pretrained' is no option of"]),
        (["--model.model", "gift_lightning.models.causal_lm"], ["pretrained"]),
        (
            [
                "--model.model",
                "gift_lightning.models.causal_lm",
                "--model.model.pretrained",
                "no/such/folder",
            ],
            ["model.pretrained='no/such/folder' cannot be loaded"],
        ),
        (["fit", "--config", "gone.yaml"], ["gone.yaml"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and x[0].startswith("-") else "",
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(here, capsys, flags, parts):
    Path("empty.jsonl").touch()
    Path("columns.jsonl").write_text('{"a": "1", "b": "2", "c": "3"}\n')
    said = refused(capsys, *flags)
    for part in parts:
        assert part in said, said


def test_a_prompt_longer_than_the_limit_is_refused_by_line(here, capsys):
    Path("long.jsonl").write_text('{"prompt": "' + "1" * 99 + '", "completion": "2"}\n')
    flags = ["--data", "SFTData", "--data.train", "long.jsonl", "--data.max_length", "16"]
    said = refused(capsys, *flags)
    assert "long.jsonl:1" in said and "16" in said


def test_a_template_that_fails_is_named(here, capsys):
    from gift_lightning.models import load_tokenizer

    tokenizer = load_tokenizer("gift:countdown")
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    tokenizer.save_pretrained("tokenizer")
    Path("chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n'
    )
    flags = ["--data", "SFTData", "--data.train", "chat.jsonl", "--model.tokenizer", "tokenizer"]
    said = refused(capsys, *flags)
    assert "chat.jsonl:1" in said and "no system role here" in said


def test_an_unreadable_file_is_named(here, capsys):
    Path("broken.parquet").write_bytes(b"no parquet at all")
    said = refused(capsys, "--data", "SFTData", "--data.train", "broken.parquet")
    assert "broken.parquet" in said


def test_a_key_that_stands_twice_is_refused(here, capsys):
    Path("twice.yaml").write_text(TINY + "trainer:\n  max_steps: 3\n")
    said = refused(capsys, "fit", "--config", "twice.yaml")
    assert "'trainer' stands here and in line" in said and "twice.yaml:" in said


def test_records_that_are_not_trained_are_listed(here, capsys):
    rows = ['{"prompt": "1", "completion": "2"}'] * 30 + ["no json", '{"prompt": "1"}']
    Path("rows.jsonl").write_text("\n".join(rows))
    fit("--data", "SFTData", "--data.train", "rows.jsonl", "--data.max_rejected", "0.1")
    with Path("runs/tiny/rejected.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [row["record"] for row in listed] == ["rows.jsonl:31", "rows.jsonl:32"]
    assert all(row["reason"] for row in listed)
    assert "rows.jsonl:31" in capsys.readouterr().out


def test_validate_measures_a_checkpoint(here, capsys):
    fit("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5")
    after = [row for row in logged(Path("runs/tiny")) if row["val/in/nll"]][-1]["val/in/nll"]
    last = "runs/tiny/checkpoints/last.ckpt"
    for command in ("validate", "test"):
        capsys.readouterr()
        main([command, "--config", "tiny.yaml", "--ckpt_path", last])
        printed = capsys.readouterr().out
        assert f"{float(after):.3f}" in printed and "DataLoader 0" not in printed


def test_a_checkpoint_of_another_model_is_refused(here, capsys):
    fit()
    last = "runs/tiny/checkpoints/last.ckpt"
    lora = "--model.model.lora.r=4"
    with pytest.raises(SystemExit):
        main(["validate", "--config", "tiny.yaml", lora, "--ckpt_path", last])
    assert "the checkpoint is of another model" in capsys.readouterr().err


def test_a_run_resumes_with_another_target(here, capsys):
    fit()
    last = "runs/tiny/checkpoints/last.ckpt"
    fit("--ckpt_path", last, "--trainer.max_steps", "3", "--model.target", "PSFT")
    assert "SFT towards PSFT" in capsys.readouterr().out


def test_the_end_is_validated_wherever_it_falls(here, capsys):
    fit("--trainer.check_val_every_n_epoch", "7")
    assert "Before and after training" in capsys.readouterr().out
    fit("--trainer.enable_checkpointing", "false")
    assert not Path("runs/tiny-1/checkpoints").exists()


@pytest.mark.parametrize("lora", [[], ["--model.model.lora.r=4"]], ids=["full", "lora"])
def test_the_exported_folder_is_the_trained_model(here, monkeypatch, lora):
    """Logits of the last batch; adapters on weights that cannot be loaded again come merged."""
    from gift_lightning.module import PolicyModule

    ids, seen = torch.arange(3, 12)[None], {}
    export = PolicyModule.export

    def spy(self, folder, *more):
        with torch.no_grad():
            seen["logits"] = self.model.eval()(input_ids=ids).logits
        export(self, folder, *more)

    monkeypatch.setattr(PolicyModule, "export", spy)
    fit(*lora, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "5")
    model = AutoModelForCausalLM.from_pretrained("runs/tiny/hf")
    torch.testing.assert_close(model(input_ids=ids).logits, seen["logits"], atol=1e-5, rtol=0)


def test_generation_ends_where_chats_were_taught_to_end(here):
    from gift_lightning.models import load_tokenizer

    tokenizer = load_tokenizer("gift:countdown")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unk>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    tokenizer.save_pretrained("tokenizer")
    Path("chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}\n'
    )
    fit("--data", "SFTData", "--data.train", "chat.jsonl", "--model.tokenizer", "tokenizer")
    ends = AutoModelForCausalLM.from_pretrained("runs/tiny/hf").generation_config.eos_token_id
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<unk>")]


def test_a_teacher_with_another_vocabulary_is_refused(here, capsys):
    from gift_lightning.models import tiny_llama

    model = tiny_llama(hidden_size=16, num_layers=1, num_heads=2)
    model.resize_token_embeddings(99)
    model.save_pretrained("teacher")
    said = refused(
        capsys, "--model.reference", "FrozenCopy", "--model.reference.pretrained", "teacher"
    )
    assert "teacher" in said and "99" in said and "vocabulary" in said


def test_a_defect_keeps_its_traceback(here):
    Path("broken.py").write_text(
        "from dataclasses import dataclass\n"
        "from gift_lightning.targets import Target\n\n"
        "@dataclass(frozen=True)\n"
        "class Broken(Target):\n"
        "    def label_weight(self, t):\n"
        "        return t.no_such_thing\n"
    )
    with pytest.raises(AttributeError, match="no_such_thing"):
        fit("--model.target", "broken.Broken")


def test_the_command_exists_and_explains_itself(tmp_path):
    command = [sys.executable, "-m", "gift_lightning", "fit", "--help"]
    assert (
        "--model" in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    words = ["fit", "--model", "SFT", "--model.target.help", "GIFT"]
    assert "nats" in gift(words, tmp_path)


@pytest.mark.parametrize(("bound", "said"), [({"max_steps": 4}, "Epoch 3"), ({}, "Epoch 3/6")])
def test_progress_names_no_end_that_is_not_known(bound, said):
    bar = _ProgressBar()
    bar._trainer = pl.Trainer(max_epochs=-1 if bound else 7, logger=False, **bound)
    assert bar._get_train_description(3).rstrip() == said
