"""A real model on real data: SmolLM2-135M with LoRA on GSM8K, twenty optimizer steps on a CPU."""

import csv
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gift_lightning.cli import main


def write_shortest(source: Path, path: Path, count: int) -> None:
    """The shortest problems of a file: the time goes by tokens."""
    lines = source.read_text().splitlines()
    rows = sorted(lines, key=lambda line: sum(map(len, json.loads(line).values())))
    path.write_text("\n".join(rows[:count]))


def test_validation_nll_falls_in_twenty_steps(smollm2, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shortest(shared / "data/gsm8k_train.jsonl", Path("train.jsonl"), 100)
    write_shortest(shared / "data/gsm8k_test.jsonl", Path("val.jsonl"), 8)
    Path("real.yaml").write_text(f"""
model:
  class_path: SFT
  init_args:
    model:
      class_path: gift_lightning.models.causal_lm
      init_args:
        pretrained: {smollm2}
        gguf_file: SmolLM2-135M-Instruct.Q4_1.gguf
        lora: {{r: 8, alpha: 16}}
    target: {{class_path: GIFT, init_args: {{beta: 8}}}}
    reference: AdapterOff
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
    schedule: {{name: cosine, warmup: 2}}
data:
  class_path: SFTData
  init_args:
    train: train.jsonl
    val: val.jsonl
    batch_size: 2
    chat: true
trainer:
  max_steps: 20
  log_every_n_steps: 5
  enable_progress_bar: false
  default_root_dir: runs/real
""")
    main(["fit", "--config", "real.yaml"])
    with Path("runs/real/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    nll = [float(row["val/nll"]) for row in rows if row["val/nll"]]
    assert len(nll) == 2 and nll[1] < nll[0] - 0.02
    checkpoint = next(Path("runs/real/checkpoints").glob("epoch*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state and all("lora" in name for name in state)
    exported = AutoModelForCausalLM.from_pretrained("runs/real/hf")  # merged: no GGUF to go back to
    assert sum(p.numel() for p in exported.parameters()) > 134e6
    assert checkpoint.stat().st_size < 40e6  # adapters and their moments, not 134 M weights
