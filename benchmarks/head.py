"""Time and memory of the fused head against the dense losses, on the same inputs, in one run.

    python benchmarks/head.py --tokens 2048 --vocab 151936 --width 896 --threads 2

A cell is one forward and backward pass from hidden states [tokens, width] and a head
[vocab, width] in float32 to the gradients of both, measured in a process of its own, after a small
warm-up pass. Memory is the highest resident size during the pass beyond the size before it, so
that the two gradients are in it and the inputs are not. The cells take turns, `repeats` times, and
the table has the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

GIFT_OFFICIAL, GIFT_DENSE = "GIFT(beta=20), official form", "GIFT(beta=20), dense, less kept"
GIFT_FUSED = "GIFT(beta=20), fused"
SFT_DENSE, SFT_FUSED = "cross_entropy(hidden @ weight.T)", "OneHot(), fused"
SFT_TORCH = "linear_cross_entropy"
SFT_TORCH_CHUNKED = "linear_cross_entropy, chunked"
GROUPS = [
    [GIFT_OFFICIAL, GIFT_DENSE, GIFT_FUSED],
    [SFT_DENSE, SFT_TORCH, SFT_TORCH_CHUNKED, SFT_FUSED],
]
BETA = 20.0


def passes() -> dict[str, Callable[..., float]]:
    """Forward and backward of each cell: (hidden, weight, labels, reference's two) to mean loss."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from gift_lightning.head import fused_token_loss
    from gift_lightning.targets import GIFT, OneHot

    def official_gift(h: Tensor, w: Tensor, y: Tensor, rh: Tensor, rw: Tensor) -> float:
        # zzy1127/GIFT, fsdp_gift_trainer.py: softmax, mixing with the uniform distribution, log
        # with its floor, a copy that is tilted, softmax; all of them are referenced from the
        # function that runs the backward pass, as here, and so stay in memory until its end.
        smoothing = 0.0
        logits = h @ w.T
        with torch.no_grad():
            reference = rh @ rw.T
            p = F.softmax(reference, -1)
            mixed = (1 - smoothing) * p + smoothing / p.shape[-1]
            logp = torch.log(mixed + 1e-10)
            tilted = logp.clone()
            tilted[torch.arange(len(y)), y] += BETA
            q = F.softmax(tilted, -1)
        student = F.log_softmax(logits, -1)
        loss = -(q * student).sum(-1).mean()
        loss.backward()
        return loss.item()

    def dense_gift(h: Tensor, w: Tensor, y: Tensor, rh: Tensor, rw: Tensor) -> float:
        with torch.no_grad():  # the same numbers, each tensor dropped as soon as it can be
            q = F.softmax(rh @ rw.T, -1).add_(1e-10).log_()
            q[torch.arange(len(y)), y] += BETA
            q = F.softmax(q, -1)
        return backward(-(q * F.log_softmax(h @ w.T, -1)).sum(-1).mean())

    def fused_gift(h: Tensor, w: Tensor, y: Tensor, rh: Tensor, rw: Tensor) -> float:
        target = GIFT(beta=BETA)
        loss = fused_token_loss(h, w, y, target, reference_hidden=rh, reference_weight=rw)
        return backward(loss.mean())

    def backward(loss: Tensor) -> float:
        loss.backward()
        return loss.item()

    cells: dict[str, Callable[..., float]] = {
        GIFT_OFFICIAL: official_gift,
        GIFT_DENSE: dense_gift,
        GIFT_FUSED: fused_gift,
        SFT_DENSE: lambda h, w, y, *_: backward(F.cross_entropy(h @ w.T, y)),
        SFT_FUSED: lambda h, w, y, *_: backward(fused_token_loss(h, w, y, OneHot()).mean()),
    }
    if hasattr(F, "linear_cross_entropy"):  # a recent torch
        cells[SFT_TORCH] = lambda h, w, y, *_: backward(F.linear_cross_entropy(h, w, y))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        cells[SFT_TORCH_CHUNKED] = lambda h, w, y, *_: backward(
            F.linear_cross_entropy(h, w, y, options=torch.nn.LinearCrossEntropyOptions())
        )
    return cells


def measure(cell: str, tokens: int, vocab: int, width: int, threads: int) -> dict[str, float]:
    """Seconds, MiB and loss of one cell in this process; empty if this torch has no such cell."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run_pass = passes().get(cell)
    if run_pass is None:
        return {}

    def inputs(n: int, v: int) -> list[torch.Tensor]:
        h, rh = torch.randn(n, width), torch.randn(n, width)
        w = torch.randn(v, width).div_(width**0.5)
        rw = torch.randn(v, width).div_(width**0.5) if cell in GROUPS[0] else w.detach()[:0]
        return [h.requires_grad_(), w.requires_grad_(), torch.randint(0, v, (n,)), rh, rw]

    run_pass(*inputs(64, 256))
    given = inputs(tokens, vocab)
    before = _resident(peak=False)
    start = time.perf_counter()
    loss = run_pass(*given)
    seconds = time.perf_counter() - start
    assert given[0].grad is not None and given[1].grad is not None
    return {
        "seconds": seconds,
        "mib": max(_resident(peak=True) - before, 1) / 2**20,
        "loss": loss,
    }


def _resident(peak: bool) -> int:
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


def run(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All cells, one after another, `repeats` times over."""
    sizes = [f"--{k}={getattr(options, k)}" for k in ("tokens", "vocab", "width", "threads")]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    results: dict[str, list[dict[str, float]]] = {}
    for turn in range(options.repeats):
        for cell in (cell for group in GROUPS for cell in group):
            command = [sys.executable, __file__, *sizes, f"--cell={cell}"]
            out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if out.returncode:  # −9: killed, most likely for memory
                sys.exit(f"{cell} ended with status {out.returncode}: try fewer --tokens.")
            if found := json.loads(out.stdout.splitlines()[-1]):
                results.setdefault(cell, []).append(found)
                print(f"  {turn + 1}/{options.repeats} {cell}: {found['seconds']:.2f} s",
                      file=sys.stderr)  # fmt: skip
    return results


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A markdown table; the ratios are to the first row of each group."""
    lines = [
        "| computation | time (s) | memory (MiB) | time ratio | memory ratio | loss |",
        "|---|---|---|---|---|---|",
    ]
    for group in GROUPS:
        base = {k: _median(results[group[0]], k) for k in ("seconds", "mib")}
        for cell in group:
            if cell in results:
                seconds, mib, loss = (_median(results[cell], k) for k in ("seconds", "mib", "loss"))
                lines.append(
                    f"| {cell} | {seconds:.2f} | {mib:,.0f} | {seconds / base['seconds']:.2f} "
                    f"| 1/{base['mib'] / mib:.1f} | {loss:.5f} |"
                )
    return "\n".join(lines)


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936, help="Qwen2.5's by default")
    parser.add_argument("--width", type=int, default=896, help="of the hidden states")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        sizes = (options.tokens, options.vocab, options.width, options.threads)
        print(json.dumps(measure(options.cell, *sizes)))
        return
    print(
        f"{options.tokens} tokens, vocabulary {options.vocab}, width {options.width}, float32, "
        f"{options.threads} threads, medians of {options.repeats}. Ratios are to the dense form "
        "in the first row of the same\nmethod (GIFT, then SFT): below 1 is less time, 1/10 is a "
        "tenth of the memory.\n"
    )
    print(table(run(options)))


if __name__ == "__main__":
    main()
