"""`gift plan`: what it foretells is what runs take, and it takes nothing itself."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import warm
from gift_lightning.cli import main
from gift_lightning.models import load_tokenizer
from gift_lightning.plan import Plan, plan_of
from gift_lightning.sizes import Sizes

ROOT = Path(__file__).parents[1]
MODEL = "gift_lightning.models.causal_lm"
TRAINER = {
    "accelerator": "cpu",
    "max_steps": 2,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
}
VOCABULARY, BATCH, LENGTH = 8192, 8, 160
WEIGHTS, BUFFERS = 4 * 791_552, 2 * 4 * 16  # bytes of gift:countdown; of its positions' frequencies
STATES = 2 * WEIGHTS + 4 * 29  # of AdamW: two moments, and a count for each of 29 tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 6 million weights, and data whose samples are nearly of one length."""
    folder = tmp_path_factory.mktemp("plan")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    load_tokenizer("gift:countdown").save_pretrained(folder / "model")
    ids = torch.randint(0, VOCABULARY, (2 * BATCH, LENGTH)).tolist()
    rows = [{"input_ids": row[: LENGTH - i % 4]} for i, row in enumerate(ids)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = [{"prompt": f"{i}" * 24, "target": i} for i in range(1, 9)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    problems = [{"prompt": f"{i}" * 200, "target": i} for i in range(1, 9)]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return folder


def sft(folder: Path, **more: object) -> dict:
    data = {"train": str(folder / "train.jsonl"), "batch_size": BATCH}
    return {
        "model": {"class_path": "SFT", "init_args": {"model": policy(folder), **more}},
        "data": {"class_path": "SFTData", "init_args": data},
    }


def policy(folder: Path, **more: object) -> dict:
    options = {"pretrained": str(folder / "model"), **more}
    return {"class_path": MODEL, "init_args": options}


def grpo(folder: Path, **more: object) -> dict:
    init = {
        "model": policy(folder),
        "rewards": ["small_rewards.Even"],
        "reference": "FrozenCopy",
        "kl_weight": 0.1,
        "max_completion_length": LENGTH - 24,
        "reward_workers": 1,
    }
    data = {"train": {"class_path": "JSONLProblems"}, "prompts_per_rollout": 2}
    data["train"]["init_args"] = {"path": str(folder / "problems.jsonl")}
    data |= {"num_generations": BATCH, "batch_size": BATCH, **more}
    return {
        "model": {"class_path": "GRPO", "init_args": init},
        "data": {"class_path": "PromptData", "init_args": data},
    }


def large_rollouts(folder: Path, prompts: int = 2) -> dict:
    """Two rollouts that take more than the steps: many completions of long prompts, which a small
    micro-batch shares. The second one finds the optimizer's states."""
    config = grpo(folder, prompts_per_rollout=prompts, num_generations=64, share_prompts=True)
    config["data"]["init_args"]["train"]["init_args"]["path"] = str(folder / "long.jsonl")
    config["model"]["init_args"] |= {"max_completion_length": 16, "kl_weight": 0.0}
    del config["model"]["init_args"]["reference"]
    return {**config, "trainer": {"accumulate_grad_batches": 128 // BATCH}}


GIFT = {"class_path": "GIFT", "init_args": {"beta": 3}}
CASES = {
    "standard SFT": lambda f: sft(f),
    "GIFT with FrozenCopy": lambda f: sft(f, target=GIFT, reference="FrozenCopy"),
    "GIFT with AdapterOff": lambda f: sft(
        f, model=policy(f, lora={"r": 8}), target=GIFT, reference="AdapterOff"
    ),
    "gradient checkpointing": lambda f: sft(f, model=policy(f, gradient_checkpointing=True)),
    "GRPO": grpo,
    "GRPO with shared prompts": lambda f: grpo(f, share_prompts=True),
    "GRPO with large rollouts": large_rollouts,
}


def written(folder: Path, name: str, config: dict) -> list[str]:
    path = folder / f"{name}.yaml"
    root = str(folder / "runs" / name)
    trainer = {**TRAINER, **config.get("trainer", {}), "default_root_dir": root}
    path.write_text(yaml.safe_dump({**config, "trainer": trainer}))
    return ["fit", "--config", str(path)]


def planned(words: list[str]):
    return plan_of(words[1:])


SPREAD = [
    ("GIFT with FrozenCopy", "ddp"),
    ("GRPO", "fsdp2"),
    ("GRPO with large rollouts", "fsdp2"),
]
LARGER = {
    "GRPO": lambda f: grpo(f, prompts_per_rollout=4),
    "GRPO with large rollouts": lambda f: large_rollouts(f, prompts=4),
}


def spread(folder: Path, name: str, strategy: str) -> list[str]:
    """The command of a case by two processes, each of which takes what one takes alone."""
    config = {**CASES, **LARGER}[name](folder)
    words = written(folder, f"{name}, {strategy}", config)
    return [*words, "--trainer.strategy", strategy, "--trainer.devices", "2"]


def peaks(
    folder: Path, commands: list[list[str]], groups: Sequence[dict[str, str]] = ()
) -> "subprocess.Popen[str]":
    """Bytes at the peak of a real run of each command, as JSON; `groups` says for each which of
    several processes this is."""
    name = f"warm{groups[0]['RANK'] if groups else ''}"
    first = written(folder, name, CASES["GIFT with AdapterOff"](folder))
    files = {f"{name}.json": [first, *commands]}
    if groups:
        files[f"{name}-groups.json"] = list(groups)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    script = Path(__file__).with_name("peak_memory.py")
    words = [sys.executable, str(script), *(str(folder / file) for file in files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, env=environment, cwd=script.parent, text=True
    )


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, int]:
    """Bytes at the peak of a real run of each case."""
    process = peaks(folder, [written(folder, name, case(folder)) for name, case in CASES.items()])
    return dict(zip(CASES, json.loads(process.communicate()[0]), strict=True))


@pytest.fixture(scope="module")
def shared(folder: Path) -> dict[tuple[str, str], list[int]]:
    """The same of each of two processes."""
    commands = [spread(folder, *case) for case in SPREAD]
    groups = zip(*(warm.group(2) for _ in SPREAD), strict=True)
    processes = [peaks(folder, commands, own) for own in groups]
    both = [json.loads(process.communicate()[0]) for process in processes]
    return dict(zip(SPREAD, zip(*both, strict=True), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory as Linux counts it")
@pytest.mark.parametrize("name", CASES)
def test_a_run_takes_what_was_planned(folder: Path, measured: dict[str, int], name: str) -> None:
    plan = planned(written(folder, name, CASES[name](folder)))
    print(f"{name}: planned {plan.peak / 1e6:.0f} MB, measured {measured[name] / 1e6:.0f} MB")
    assert plan.peak == pytest.approx(measured[name], rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory as Linux counts it")
@pytest.mark.parametrize(("name", "strategy"), SPREAD)
def test_each_of_two_takes_what_was_planned(
    folder: Path, shared: dict[tuple[str, str], list[int]], name: str, strategy: str
) -> None:
    plan = planned(spread(folder, name, strategy))
    for found in shared[name, strategy]:
        print(f"{name}, {strategy}: planned {plan.peak / 1e6:.0f}, measured {found / 1e6:.0f} MB")
        assert plan.peak == pytest.approx(found, rel=0.15)


@pytest.fixture
def bare(folder: Path, tmp_path: Path) -> Path:
    """The same model as a folder without weights."""
    for path in (folder / "model").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def bytes_of(folder: Path) -> int:
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    return sum(p.nbytes for p in model.parameters())


def test_no_weights_are_needed_and_nothing_is_written(
    folder: Path, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sft(folder, target=GIFT, reference="FrozenCopy")
    config["model"]["init_args"]["model"]["init_args"]["pretrained"] = str(bare)
    words = written(folder, "bare", config)
    monkeypatch.chdir(bare)
    before = sorted(bare.rglob("*"))
    main(["plan", *words[1:]])
    said = capsys.readouterr().out
    assert sorted(bare.rglob("*")) == before and not (folder / "runs" / "bare").exists()
    assert f"{BATCH} demonstrations of up to {LENGTH} tokens" in said
    assert all(part in said for part in ("parameters", "optimizer", "reference", "head chunk"))
    assert "8 GB: fits" in said and "141 GB: fits" in said


def test_a_strategy_spreads_what_it_spreads(folder: Path) -> None:
    words = written(folder, "spread", sft(folder, target=GIFT, reference="FrozenCopy"))
    weights = bytes_of(folder)
    one = planned(words).training
    ddp = planned([*words, "--trainer.devices", "4"])
    assert ddp.strategy == "ddp"
    assert {**ddp.training, "gradients": one["gradients"]} == one
    assert ddp.training["gradients"] == one["gradients"] + weights
    words += ["--trainer.devices", "4", "--trainer.num_nodes", "2", "--trainer.strategy"]
    sharded = planned([*words, "fsdp2"])
    assert sharded.training["reference"] == -(-one["reference"] // 8)
    assert sharded.training["gathered"] > one["parameters"] / 2  # few blocks, a large vocabulary
    # Blocks are divided by all, what is outside of them by the four replicas.
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    inside = sum(p.nbytes for p in model.model.layers.parameters())
    split = planned([*words, "FSDP2", "--trainer.strategy.tensor_parallel_size", "2"])
    expected = (one["reference"] - inside) / 4 + inside / 8
    assert split.training["reference"] == pytest.approx(expected, rel=1e-4)
    assert split.training["gathered"] < sharded.training["gathered"]
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide the 8 devices"):
        planned([*words, "FSDP2", "--trainer.strategy.tensor_parallel_size", "3"])
    with pytest.raises(ValueError, match="auto, ddp and fsdp2, not deepspeed"):
        planned([*words, "deepspeed"])


def test_a_rollout_is_shared_by_those_that_see_other_samples(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = written(folder, "rollout", grpo(folder, prompts_per_rollout=8, batch_size=4))
    words += ["--trainer.devices", "4", "--trainer.strategy"]
    decoded = {}
    for tensor in (1, 2):
        flags = ["FSDP2", "--trainer.strategy.tensor_parallel_size", str(tensor)]
        decoded[tensor] = planned([*words, *flags]).sizes.decoded
    assert decoded == {1: 2 * BATCH, 2: 4 * BATCH}
    # One step for each rollout, whose completions need not be scored again.
    main(["plan", *words[1:], "ddp", "--data.batch_size", str(2 * BATCH)])
    said = capsys.readouterr().out
    assert all(x in said for x in ("training", "rollout", "KV cache", "ddp, 4 devices"))
    assert f"{2 * BATCH} are sampled side by side" in said


def countdown(folder: Path, *flags: str) -> Plan:
    """Of GRPO by the embedded model: a rollout is two prompts with four completions each."""
    config = grpo(folder, num_generations=4, batch_size=8)
    own = {"model": policy(folder, pretrained="gift:countdown"), "rewards": ["small_rewards.Even"]}
    own |= {"max_completion_length": 16, "reward_workers": 1}
    config["model"]["init_args"] = own
    return planned([*written(folder, "countdown", config), *flags])


def devices(number: int, strategy: str, *options: str) -> list[str]:
    return ["--trainer.devices", str(number), "--trainer.strategy", strategy, *options]


SERVER = ["--model.engine", "VLLMServerRollout", "--model.engine.url", "http://host:8000"]


def test_a_rollout_comes_beside_the_optimizers_states(folder: Path) -> None:
    plan = countdown(folder)
    assert plan.rollout["parameters"] == WEIGHTS + BUFFERS
    assert plan.rollout["optimizer"] == plan.training["optimizer"] == STATES
    assert plan.rollout["gradients"] == 0  # freed at the end of a step
    kept = 8 * (24 + 16 - 1) * 3 * 2 * 128 * 4  # keys and values of 8 rows in 3 layers of size 128
    assert plan.rollout["kv_cache"] >= kept
    assert sum(plan.rollout.values()) >= WEIGHTS + STATES + kept
    assert "optimizer" not in countdown(folder, "--model.optimizer", "torch.optim.SGD").rollout


@pytest.mark.parametrize("view", ["true", "false"])
def test_buckets_of_gradients_stay_in_a_rollout(folder: Path, view: str) -> None:
    options = ["--trainer.strategy.gradient_as_bucket_view", view]
    plan = countdown(folder, *devices(2, "DDPStrategy", *options))
    assert plan.rollout["gradients"] == WEIGHTS
    assert plan.training["gradients"] >= WEIGHTS


def test_a_rollout_gathers_a_copy_beside_the_shards(folder: Path) -> None:
    rollout = countdown(folder, *devices(2, "fsdp2")).rollout
    assert rollout["parameters"] == (WEIGHTS + BUFFERS) // 2
    assert rollout["gathered"] == WEIGHTS + BUFFERS
    assert rollout["optimizer"] == STATES // 2
    assert sum(rollout.values()) >= 1.5 * WEIGHTS + STATES / 2
    # One device has all there is, and copies nothing.
    assert countdown(folder, *devices(1, "fsdp2")).rollout["gathered"] == 0
    # Two that share every product both hold what is outside of the blocks.
    halves = ["--trainer.strategy.tensor_parallel_size", "2"]
    rollout = countdown(folder, *devices(2, "FSDP2", *halves)).rollout
    outside = 4 * (33 * 128 + 128) + BUFFERS
    inside = WEIGHTS + BUFFERS - outside
    assert (rollout["parameters"], rollout["gathered"]) == (outside + inside // 2, inside)


def test_a_references_head_stays_gathered(folder: Path) -> None:
    reference = ["--model.reference", "FrozenCopy"]
    plain = countdown(folder, *devices(2, "fsdp2"))
    plan = countdown(folder, *devices(2, "fsdp2"), *reference)
    head = 4 * (33 * 128 + 128)  # with the last norm; the embedding is the same
    for phase, without in ((plan.training, plain.training), (plan.rollout, plain.rollout)):
        # One number of the module's is there at one of the peaks.
        assert phase["gathered"] == pytest.approx(without["gathered"] + head, abs=4)
    away = countdown(folder, *devices(2, "fsdp2"), *reference, "--model.reference.device", "cpu")
    assert away.rollout["gathered"] == plain.rollout["gathered"]


def test_weights_are_gathered_for_a_server_too(folder: Path) -> None:
    assert countdown(folder, *SERVER).rollout is None
    plan = countdown(folder, *SERVER, *devices(2, "fsdp2"))
    assert plan.rollout["parameters"] == (WEIGHTS + BUFFERS) // 2
    assert plan.rollout["gathered"] == WEIGHTS + BUFFERS
    assert plan.rollout["optimizer"] == STATES // 2
    assert "kv_cache" not in plan.rollout
    # Old log-probabilities are scored by the copy: at the least a layer's 512 inner values.
    again = countdown(folder, *SERVER, *devices(2, "fsdp2"), "--data.num_iterations", "2")
    more = again.rollout["activations"] - plan.rollout["activations"]
    assert more >= 8 * (24 + 16) * 512 * 4


def test_a_base_that_is_quantised_already(folder: Path, bare: Path) -> None:
    """In 4 bits as by `load_in_4bit`; in another way it is refused."""
    config = sft(folder, model=policy(folder, lora={"r": 8}))
    made = config["model"]["init_args"]["model"]["init_args"]
    made["pretrained"] = str(bare)
    found = json.loads((bare / "config.json").read_text())
    for kind in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"}):
        (bare / "config.json").write_text(json.dumps({**found, "quantization_config": kind}))
        words = written(folder, "quantised", config)
        if "load_in_4bit" not in kind:
            with pytest.raises(ValueError, match="quantised in a way that gift plan cannot count"):
                planned(words)
            return
        assert planned(words).training["parameters"] < 0.6 * bytes_of(folder)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/cards").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_cards_configs_say_what_is_planned(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Qwen2.5's sizes and no weights."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cards, text = importlib.import_module("cards"), path.read_text()
    cards.qwen(cards.model_of(path)).save_pretrained(tmp_path)
    load_tokenizer("gift:countdown").save_pretrained(tmp_path)
    plan = planned(["fit", "--config", str(path), "--model.model.pretrained", str(tmp_path)])
    told = re.search(r"gift plan: ([\d.]+) GB; (.*)", text)
    assert f"{plan.peak / 1e9:.1f}" == told[1]
    for part, gigabytes in re.findall(r"(\w[\w ]*?) ([\d.]+)[,.]", told[2]):
        assert f"{plan.training[{'head chunk': 'head'}.get(part, part)] / 1e9:.1f}" == gigabytes
    assert plan.fits(int(re.match(r"\d+", path.stem)[0]))
    assert f"`{path.relative_to(ROOT)}` | {told[1]} GB" in (ROOT / "docs/card.md").read_text()


def test_half_precision_and_a_host_reference(folder: Path) -> None:
    reference = {"class_path": "FrozenCopy", "init_args": {"dtype": "bfloat16"}}
    config = sft(folder, target=GIFT, reference=reference)
    words = written(folder, "half", config)
    weights = bytes_of(folder)
    away = ["--model.reference.device", "cpu", "--trainer.accelerator", "gpu"]
    plan = planned([*words, *away])
    assert plan.training["parameters"] == pytest.approx(weights, rel=1e-3)  # buffers are small
    assert plan.training.get("reference", 0) < weights / 100
    plan = planned([*words, "--trainer.precision", "bf16-true"])
    assert plan.training["parameters"] == pytest.approx(weights / 2, rel=1e-3)
    assert plan.training["reference"] == pytest.approx(weights / 2, rel=1e-3)


def test_data_that_are_elsewhere_are_as_long_as_they_may_be(folder: Path) -> None:
    config = sft(folder)
    config["data"]["init_args"] |= {"train": "owner/name", "max_length": 64, "batch_size": 2}
    words = written(folder, "elsewhere", config)
    assert planned(words).sizes.lengths == (64, 63)
    assert planned([*words, "--data.max_length", "9999"]).sizes.lengths == (256, 255)
    with pytest.raises(ValueError, match=r"data\.max_length is null and .* set it"):
        planned([*words, "--data.max_length", "null"])


def test_a_card_is_not_filled_to_the_brim() -> None:
    plan = Plan("SFT", {"parameters": 22 * 10**9}, None, Sizes(), "one device", 1)
    assert not plan.fits(24) and plan.fits(48)
