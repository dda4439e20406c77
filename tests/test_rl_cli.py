"""The RL stage from the command line: runs, SFT to RL, and wrong input in one sentence."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gift_lightning.cli import main
from gift_lightning.models import embedded_path

ROOT = Path(__file__).parents[1]
BASE = embedded_path("gift:countdown")
TINY = """
model:
  class_path: GRPO
  init_args:
    model:
      class_path: gift_lightning.models.causal_lm
      init_args: {pretrained: gift:countdown}
    rewards: [Countdown]
    max_completion_length: 8
    reward_workers: 1
data:
  class_path: PromptData
  init_args:
    train: {class_path: CountdownProblems, init_args: {size: 16}}
    prompts_per_rollout: 4
    num_generations: 4
    batch_size: 16
trainer:
  max_steps: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  limit_val_batches: 0
  enable_progress_bar: false
  default_root_dir: runs/tiny
"""
SFT = """
model:
  class_path: SFT
  init_args:
    model:
      class_path: gift_lightning.models.causal_lm
      init_args: {pretrained: gift:countdown}
    target: OneHot
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}
data:
  class_path: CountdownData
  init_args: {num_demonstrations: 32, num_eval: 8, batch_size: 16}
trainer:
  max_steps: 2
  num_sanity_val_steps: 0
  limit_val_batches: 0
  enable_progress_bar: false
  enable_checkpointing: false
  default_root_dir: runs/sft
"""
# Every group has signal, and the policy moves.
DENSE = [
    "--model.rewards",
    '[{"class_path": "Format", "init_args": {"regex": ".*[0-4]"}}]',
    "--model.optimizer",
    "torch.optim.SGD",
    "--model.optimizer.lr",
    "0.1",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with two tiny configs, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("tiny.yaml").write_text(TINY)
    Path("sft.yaml").write_text(SFT)
    return tmp_path


def fit(*flags: str) -> None:
    main(["fit", "--config", "tiny.yaml", *flags])


def logged(run: str) -> list[dict[str, str]]:
    with (Path(run) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(capsys, *flags: str) -> str:
    """The one sentence that a refused run says; nothing is left behind."""
    with pytest.raises(SystemExit) as stopped:
        fit(*flags)
    assert stopped.value.code not in (0, None)
    assert not Path("runs").exists() or not any(Path("runs").iterdir())
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("gift: error: ")]
    assert len(lines) == 1
    return lines[0]


# --- runs -------------------------------------------------------------------------------------


def test_the_config_of_the_docs(here, capsys):
    """With fewer problems to evaluate, and from a working directory of its own."""
    small = ["--trainer.callbacks.sets.drawn.init_args.size", "8", "--data.train.size", "96"]
    flags = ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"]
    main(["fit", "--config", str(ROOT / "configs/grpo.yaml"), *flags, *small])
    printed = capsys.readouterr().out
    assert "Before and after training" in printed and "GRPO (dapo) on Countdown" in printed
    for word in ("drawn", "pass@1", "pass@16", "Written to runs/grpo", "96 read, 96 used"):
        assert word in printed
    run = Path("runs/grpo")
    made = {"config.yaml", "metrics.csv", "completions", "checkpoints", "hf"}
    assert {path.name for path in run.iterdir()} == made
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["class_path"].endswith("GRPO")
    rows = logged("runs/grpo")
    trained = [row for row in rows if row["train/reward"]]
    assert [row["step"] for row in trained] == ["0", "1"]
    assert all(0 <= float(row["train/reward"]) <= 1 for row in trained)
    names = {name for row in rows for name, value in row.items() if value}
    assert {"train/reward_std", "train/frac_reward_zero_std", "train/entropy"} <= names
    assert {"train/rewards/Countdown/mean", "train/rewards/Countdown/std"} <= names
    assert {"train/completions/mean_length", "train/completions/clipped_ratio"} <= names
    assert {"train/clip_ratio/low_mean", "train/rollout_time", "train/num_tokens"} <= names
    assert {"val/drawn/pass@1", "val/drawn/pass@16", "val/drawn/coverage_kept@16"} <= names
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not equal(model.state_dict(), weights(BASE))


def test_the_saved_config_trains_the_same_model_again(here):
    fit(*DENSE)
    main(["fit", "--config", "runs/tiny/config.yaml"])
    first, again = weights("runs/tiny/hf"), weights("runs/tiny-1/hf")
    assert equal(first, again)
    assert not equal(first, weights(BASE))


def test_rl_goes_on_from_a_checkpoint(here):
    fit(*DENSE, "--trainer.max_steps", "3")
    fit(*DENSE)
    last = next(Path("runs/tiny-1/checkpoints").glob("*step=2*.ckpt"))
    fit(*DENSE, "--trainer.max_steps", "3", "--ckpt_path", str(last))
    assert equal(weights("runs/tiny/hf"), weights("runs/tiny-2/hf"))
    rewards = [[x["train/reward"] for x in logged(f"runs/tiny{end}")] for end in ("", "-2")]
    assert rewards[1] == rewards[0][2:]


def test_stage_two_starts_from_stage_one(here, capsys):
    main(["fit", "--config", "sft.yaml"])
    fit(*DENSE, "--model.model.init_args.pretrained", "runs/sft/hf", "--model.optimizer.lr", "0")
    trained = weights("runs/sft/hf")
    assert not equal(trained, weights(BASE))
    assert equal(trained, weights("runs/tiny/hf"))  # without a learning rate it is still that
    fit(*DENSE, "--model.model.pretrained", "runs/sft/hf")
    assert not equal(trained, weights("runs/tiny-1/hf"))
    flags = ["--model.reference", "FrozenCopy", "--model.kl_weight", "0.1"]
    fit(*DENSE, *flags, "--model.reference.pretrained", "runs/sft/hf")
    kl = [float(row["train/kl"]) for row in logged("runs/tiny-2")]
    assert len(kl) == 2 and all(abs(x) > 1e-3 for x in kl)  # the reference is not the start


def test_rewards_of_ones_own(here, capsys):
    Path("rewards_of_ones_own.py").write_text(
        "from gift_lightning.rewards import Reward\n\n\n"
        "def digits(completions, target, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / len(text) for text in completions]\n\n\n"
        "class Starts(Reward):\n"
        "    def __init__(self, with_: str) -> None:\n"
        "        self.with_ = with_\n\n"
        "    def score(self, completion, **columns):\n"
        "        return float(completion.startswith(self.with_))\n"
    )
    rewards = [
        "rewards_of_ones_own.digits",
        {"class_path": "rewards_of_ones_own.Starts", "init_args": {"with_": "("}, "weight": 0.5},
        {"class_path": "LengthPenalty", "init_args": {"cache": 4}, "weight": 0.25},
    ]
    fit("--model.rewards", json.dumps(rewards))
    assert "GRPO (dapo) on digits, Starts, LengthPenalty" in capsys.readouterr().out
    for row in logged("runs/tiny"):
        parts = [float(row[f"train/rewards/{x}/mean"]) for x in ("digits", "Starts")]
        penalty = float(row["train/rewards/LengthPenalty/mean"])
        total = parts[0] + 0.5 * parts[1] + 0.25 * penalty
        assert float(row["train/reward"]) == pytest.approx(total, abs=1e-6)
        assert 0 < parts[0] < 1 and penalty < 0


def test_long_prompts_are_listed(here, capsys):
    rows = [{"prompt": "1 2 3 4 > 5 : ", "numbers": [1, 2, 3, 4], "target": i} for i in range(40)]
    rows[7]["prompt"] = "1 2 3 4 5 6 7 8 9 > 5 : "
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data.train", "JSONLProblems", "--data.train.path", "rows.jsonl"]
    fit(*flags, "--data.max_prompt_length", "16", "--trainer.max_steps", "1")
    printed = capsys.readouterr().out
    assert "40 read, 39 used, 1 prompt longer than max_prompt_length 16" in printed
    with Path("runs/tiny/rejected.csv").open() as file:
        (listed,) = csv.DictReader(file)
    assert (listed["set"], listed["record"]) == ("train", "rows.jsonl:8")
    assert listed["reason"] == "prompt longer than max_prompt_length 16: 24 tokens"


# --- refusals ---------------------------------------------------------------------------------


def rewards(*specs: str | dict) -> list[str]:
    return ["--model.rewards", json.dumps(specs)]


def penalty(**args: object) -> list[str]:
    return rewards({"class_path": "LengthPenalty", "init_args": args})


FILE = ["--data.train", "JSONLProblems", "--data.train.path"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        # a reward that does not import, or is none
        (rewards("no.such.reward"), ["rewards[0] (no.such.reward) does not import", "'no'"]),
        (
            rewards("broken_rewards.score"),
            ["(broken_rewards.score) does not import", "no_such_package"],
        ),
        (rewards("Countdown", "Cuntdown"), ["rewards[1] (Cuntdown) names no reward", "Format"]),
        (rewards("bad_rewards.VALUE"), ["(bad_rewards.VALUE) is neither a Reward nor a function"]),
        (
            rewards("bad_rewards.wrong"),
            ["takes no completions", "TRL's signature"],
        ),
        # a misspelt argument, or an impossible one
        (penalty(cach=4), ["rewards[0] (LengthPenalty).init_args", "'cach' is not accepted"]),
        (penalty(cache=500), ["cache must lie between 1 and", "got 500"]),
        (penalty(cache="four"), ["cache must be int, not 'four'"]),
        (rewards({"class_path": "Countdown", "wheight": 2}), ["'wheight' is no key of a reward"]),
        (["--model.rewards", "Countdown"], ["model.rewards", "expected list"]),
        # problems without what the reward reads
        (
            [*FILE, "bare.jsonl", *rewards("ExactMatch")],
            ["bare.jsonl:1 has no column 'answer', which the reward ExactMatch reads", "columns:"],
        ),
        (
            [*FILE, "bare.jsonl", *rewards("bad_rewards.score")],
            ["column 'answer'", "score reads"],
        ),
        ([*FILE, "some.jsonl", *rewards("ExactMatch")], ["some.jsonl:3 has no column 'answer'"]),
        ([*FILE, "bare.jsonl", "--data.train.prompt", "text"], ["no column 'text'", "'prompt'"]),
        ([*FILE, "gone.jsonl"], ["gone.jsonl does not exist"]),
        ([*FILE, "empty.jsonl"], ["empty.jsonl holds no problems"]),
        # sizes that do not fit
        (["--data.num_generations", "1"], ["data.num_generations must be at least 2, got 1"]),
        (
            ["--data.max_prompt_length", "5"],
            ["16 of 16 train records", "longer than max_prompt_length 5"],
        ),
        (
            ["--data.batch_size", "5"],
            ["a rollout of 16 completions", "no multiple of the 5 of an optimizer step"],
        ),
        (["--trainer.accumulate_grad_batches", "3"], ["no multiple of the 48"]),
        (
            ["--data.prompts_per_rollout", "64", "--data.batch_size", "256"],
            ["there are 16 problems, fewer than data.prompts_per_rollout=64"],
        ),
        (
            ["--model.max_completion_length", "4000"],
            ["countdown train any 0", "up to 4000 tokens exceed the model's 512 positions"],
        ),
        # data and references of another stage
        (
            ["--data", "SFTData", "--data.train", "sft.jsonl"],
            ["GRPO trains on prompts, and data is SFTData", "--data PromptData"],
        ),
        (
            ["--data", "CountdownData", "--data.num_demonstrations", "8", "--data.num_eval", "8"],
            ["data is CountdownData"],
        ),
        (
            ["--model.kl_weight", "0.1"],
            ["model.kl_weight=0.1 needs a reference", "--model.reference FrozenCopy"],
        ),
        (
            ["--model.reference", "AdapterOff", "--model.kl_weight", "0.1"],
            ["AdapterOff needs adapters to turn off"],
        ),
        (["--model.loss", "ppo"], ["model.loss", "'dapo'", "not ppo"]),
        (["--model.engine", "VLLM"], ["model.engine", "'VLLM' names no class"]),
        (["--model", "SFT"], ["SFT trains on demonstrations, and data is PromptData"]),
        (["--model.rewards", "[]"], ["rewards is empty: name at least one"]),
        (["--model.reward_timeout", "0"], ["timeout must be above 0"]),
        (["--model.reward_workers", "0"], ["num_workers must be at least 1"]),
        (["--model.target", "GIFT"], ["'target' is no option of GRPO"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and x[0].startswith("-") else "",
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(here, capsys, flags, parts):
    Path("broken_rewards.py").write_text("import no_such_package\n")
    Path("bad_rewards.py").write_text(
        "VALUE = 3\n\n\n"
        "def score(completions, answer, **columns):\n    return [1.0 for _ in completions]\n\n\n"
        "def wrong(texts):\n    return [1.0 for _ in texts]\n"
    )
    Path("empty.jsonl").touch()
    Path("bare.jsonl").write_text('{"prompt": "1 2 3 4 > 5 : "}\n' * 16)
    some = [{"prompt": "1 + 1 = ", **({} if i == 2 else {"answer": "2"})} for i in range(16)]
    Path("some.jsonl").write_text("\n".join(map(json.dumps, some)))
    Path("sft.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 16)
    said = refused(capsys, *flags)
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize("again", [[], ["--model.model.lora.r", "4"]], ids=["as is", "lora"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft
def test_stage_two_starts_from_adapters(here, again):
    """As from any other model: what stage 1 learned is there, and goes on to be trained."""
    main(["fit", "--config", "sft.yaml", "--model.model.lora.r", "4"])
    flags = ["--model.model.pretrained", "runs/sft/hf", *again]
    fit(*DENSE, *flags, "--model.optimizer.lr", "0")
    ids = torch.arange(3, 12)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(f"runs/{name}/hf")(input_ids=ids).logits
        for name in ("sft", "tiny")
    ]
    # Adapters that are merged round otherwise than beside their base.
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(embedded_path("gift:countdown"))
    assert (base(input_ids=ids).logits - logits[0]).abs().max() > 0.1
