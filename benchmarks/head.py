"""Time and memory of the fused head against the dense losses, on the same inputs, in one run.

    python benchmarks/head.py --tokens 2048 --vocab 151936 --width 896 --threads 2
    python benchmarks/head.py --tokens 1024 2048 4096 8192 16384 --vocab 16384 --width 256

A cell is one forward and backward pass from hidden states [tokens, width] and a head
[vocab, width] in float32 to the gradients of both, measured in a process of its own, after a small
warm-up pass. Memory is the highest resident size during the pass beyond the size before it, so
that the two gradients are in it and the inputs are not. The cells take turns, `repeats` times, and
the table has the medians.
"""

import argparse
import json
import time
from collections.abc import Callable

from measuring import Runs, machine, markdown, median, resident, run_cells

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
    before = resident(peak=False)
    start = time.perf_counter()
    loss = run_pass(*given)
    seconds = time.perf_counter() - start
    assert given[0].grad is not None and given[1].grad is not None
    return {
        "seconds": seconds,
        "mib": max(resident(peak=True) - before, 1) / 2**20,
        "loss": loss,
    }


def run(options: argparse.Namespace, tokens: int) -> Runs:
    """All cells at one number of tokens."""
    sizes = [f"--tokens={tokens}", f"--vocab={options.vocab}", f"--width={options.width}"]
    cells = [cell for group in GROUPS for cell in group]
    return run_cells(__file__, cells, sizes, options.threads, options.repeats)


def table(results: Runs) -> str:
    """A markdown table; the ratios are to the first row of each group."""
    lines = [
        "| computation | time (s) | memory (MiB) | time ratio | memory ratio | loss |",
        "|---|---|---|---|---|---|",
    ]
    for group in GROUPS:
        base = {k: median(results[group[0]], k) for k in ("seconds", "mib")}
        for cell in group:
            if cell in results:
                seconds, mib, loss = (median(results[cell], k) for k in ("seconds", "mib", "loss"))
                lines.append(
                    f"| {cell} | {seconds:.2f} | {mib:,.0f} | {seconds / base['seconds']:.2f} "
                    f"| 1/{base['mib'] / mib:.1f} | {loss:.5f} |"
                )
    return "\n".join(lines)


def growth(results: dict[int, Runs]) -> str:
    """A markdown table of memory by the number of tokens."""
    rows = []
    for cell in (cell for group in GROUPS for cell in group):
        if all(cell in runs for runs in results.values()):
            mib = (f"{median(runs[cell], 'mib'):,.0f}" for runs in results.values())
            rows.append((cell, *mib))
    return markdown(("memory (MiB) at tokens", *map(str, results)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="one table for each")
    parser.add_argument("--vocab", type=int, default=151_936, help="Qwen2.5's by default")
    parser.add_argument("--width", type=int, default=896, help="of the hidden states")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        sizes = (options.tokens[0], options.vocab, options.width, options.threads)
        print(json.dumps(measure(options.cell, *sizes)))
        return
    print(machine(options.threads, options.repeats))
    print(
        f"Vocabulary {options.vocab}, width {options.width}, float32. Ratios are to the dense form "
        "in the first row of the same\nmethod (GIFT, then SFT): below 1 is less time, 1/10 is a "
        "tenth of the memory."
    )
    results = {}
    for tokens in options.tokens:
        results[tokens] = run(options, tokens)
        print(f"\n{tokens} tokens\n\n{table(results[tokens])}")
    if len(results) > 1:
        print(f"\n{growth(results)}")


if __name__ == "__main__":
    main()
