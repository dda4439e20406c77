"""The example configs for one card, planned and measured: `gift fit` for a few steps of each.

The models have Qwen2.5's sizes (its config.json) and random weights, the rows are random tokens of
the largest length that a config allows, so that neither a hub nor data are needed.
"""

import csv
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

from gift_lightning.cli import main
from gift_lightning.models import load_tokenizer
from gift_lightning.plan import plan_of

CONFIGS = sorted((ROOT / "configs" / "cards").glob("*.yaml"))
STEPS = 3  # the first is slower

_SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
}


def qwen(name: str) -> Qwen2Config:
    """The config of Qwen2.5-NAME."""
    hidden, mlp, layers, heads, key_values, vocabulary = _SIZES[name]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        vocab_size=vocabulary,
        max_position_embeddings=32_768,
        tie_word_embeddings=name != "7B",
    )


def model_of(path: Path) -> str:
    """Which Qwen2.5 a config trains."""
    model = yaml.safe_load(path.read_text())["model"]["init_args"]["model"]["init_args"]
    return str(model["pretrained"]).removeprefix("Qwen/Qwen2.5-")


def write_model(config: Qwen2Config, folder: Path, device: str = "cpu") -> None:
    """Random weights, made on a device, and a tokenizer whose ids they have."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer("gift:countdown").save_pretrained(folder)


def measured(path: Path, config: Qwen2Config, folder: Path, device: str) -> dict[str, Any]:
    """What `gift plan` and `gift fit` say of a config: GB planned and taken, tokens/s, loss."""
    write_model(config, folder / "model", device)
    said = yaml.safe_load(path.read_text())
    model, data = said["model"]["init_args"], said["data"]["init_args"]
    length = 12 if device == "cpu" else data["max_length"]
    words = ["--config", str(path), "--model.model.pretrained", str(folder / "model")]
    words += ["--data.train", str(folder / "rows.jsonl"), "--data.val", "null"]
    words += ["--data.chat", "false", "--trainer.default_root_dir", str(folder / "run")]
    words += ["--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1"]
    words += ["--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"]
    if device == "cpu":
        words += ["--data.max_length", str(length), "--trainer.accelerator", "cpu"]
        if "Paged" in model["optimizer"]["class_path"]:  # to the host, where this is
            words += ["--model.optimizer", "bitsandbytes.optim.AdamW8bit"]
    rows = data["batch_size"] * said["trainer"]["accumulate_grad_batches"] * STEPS
    shape = (rows, length)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    lines = (json.dumps({"input_ids": row}) for row in ids.tolist())
    (folder / "rows.jsonl").write_text("\n".join(lines))
    with redirect_stdout(sys.stderr):
        if "CachedTopK" in str(model["reference"]):
            words += ["--model.reference.path", str(folder / "cache")]
            main(["cache-reference", *words])
        planned = plan_of(words)
        main(["fit", *words])
    with (folder / "run" / "metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {
        "planned": planned.peak / 1e9,
        "taken": max(float(row["train/peak_memory_gib"]) for row in steps) * 2**30 / 1e9,
        "tokens/s": float(steps[-1]["train/tokens_per_second"]),
        "loss": float(steps[-1]["train/loss"]),
    }
