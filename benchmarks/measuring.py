"""What the benchmarks share: cells in processes of their own, memory, medians, the machine."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Runs = dict[str, list[dict[str, float]]]
"""What each cell found, by its name: one entry for each repeat."""

ROOT = Path(__file__).parents[1]


def resident(peak: bool) -> int:
    """Bytes resident now, after which the peak counts anew; or the highest since."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if status.exists() and os.access(reset, os.W_OK):
        if not peak:
            reset.write_text("5")
        key = "VmHWM:" if peak else "VmRSS:"
        line = next(x for x in status.read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) * 1024
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


class Clock:
    """Seconds of a step and peak memory of a run whose steps `tick`; the first are not timed.

    Memory is counted from where the clock is made, with every step.
    """

    def __init__(self, skip: int) -> None:
        self.skip, self.ticks, self.before = skip, 0, resident(peak=False)

    def tick(self) -> None:
        """Ends a step."""
        self.ticks += 1
        self.end = time.perf_counter()
        if self.ticks == self.skip:
            self.start = self.end

    def found(self) -> dict[str, float]:
        """Seconds per step, and MiB at the highest beyond those at the start."""
        seconds = (self.end - self.start) / (self.ticks - self.skip)
        return {"seconds": seconds, "mib": max(resident(peak=True) - self.before, 1) / 2**20}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `policy` reads."""
    parser.add_argument("--model", help="folder of a pretrained model; by default a small Llama")
    parser.add_argument("--vocab", type=int, default=49_152, help="of the small Llama")
    parser.add_argument("--width", type=int, default=256, help="likewise")
    parser.add_argument("--layers", type=int, default=4, help="likewise")


def policy(options: argparse.Namespace) -> Any:
    """A pretrained model, or a small Llama with a real vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gift_lightning.models import causal_lm, embedded_path

    torch.manual_seed(0)
    if options.model:
        return causal_lm(options.model)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train()
    model.config._name_or_path = model.name_or_path = embedded_path("gift:countdown")
    return model


def model_flags(options: argparse.Namespace) -> list[str]:
    """The options as words again, for a cell."""
    flags = [f"--{name}={getattr(options, name)}" for name in ("vocab", "width", "layers")]
    return [*flags, f"--model={options.model}"] if options.model else flags


def model_said(options: argparse.Namespace) -> str:
    return options.model or (
        f"a Llama of {options.layers} layers, width {options.width}, vocabulary {options.vocab:,}"
    )


def start(file: str, cell: str, flags: Sequence[str], threads: int) -> subprocess.Popen[str]:
    """A process that runs one cell of a benchmark, and ends with a line of JSON."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "GIFT_CACHE": "",
        "THP_MEM_ALLOC_ENABLE": "1",  # as `gift` sets it; for the others too
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, file, f"--threads={threads}", *flags, f"--cell={cell}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], cell: str) -> dict[str, float]:
    """What the cell found; ends the benchmark if it failed."""
    out, _ = process.communicate()
    if process.returncode:  # −9: killed, most likely for memory
        sys.exit(f"{cell} ended with status {process.returncode}: try smaller sizes.")
    # Other ranks of a cell, and TRL, write to the same place.
    last = [line for line in out.splitlines() if line.startswith('{"')][-1]
    found: dict[str, float] = json.loads(last)
    return found


def run_cells(
    file: str, cells: Sequence[str], flags: Sequence[str], threads: int, repeats: int
) -> Runs:
    """All cells, one after another, `repeats` times over and every second time backwards.

    A cell that finds nothing, because what it needs is not installed, is left out.
    """
    runs: Runs = {}
    for turn in range(repeats):
        for cell in cells[:: -1 if turn % 2 else 1]:
            if found := finish(start(file, cell, flags, threads), cell):
                runs.setdefault(cell, []).append(found)
                said = ", ".join(f"{k} {v:.4g}" for k, v in found.items())
                print(f"  {turn + 1}/{repeats} {cell}: {said}", file=sys.stderr)
    return runs


def median(runs: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def has_trl(cell: str) -> bool:
    """Whether TRL is installed; says what is left out if not."""
    try:
        import trl  # noqa: F401
    except ImportError:
        print(f'{cell} is left out: pip install "gift-lightning[bench]".', file=sys.stderr)
        return False
    return True


def machine(threads: int, repeats: int) -> str:
    """What a figure was measured on and with."""
    import torch
    import transformers

    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    cpu = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return (
        f"{cpu}, {os.cpu_count()} cores, {threads} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; commit {commit or 'unknown'}; "
        f"medians of {repeats}."
    )
