"""Throughput of SFT in two processes against one, with the same threads for each process.

    python benchmarks/ddp.py
    python benchmarks/ddp.py --model SMOLLM2_FOLDER --batch 2

Every process has the same micro-batch, so that two would do twice the work in the same time. What
the machine allows at all is seen by two processes that do not talk to each other: they share its
memory and caches, but no gradient.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from measuring import (
    Clock,
    Runs,
    add_model_options,
    finish,
    machine,
    markdown,
    median,
    model_flags,
    model_said,
    policy,
    start,
)

ONE, APART, DDP = "one process", "two processes apart", "two processes, DDP"


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of all processes of the run."""
    import lightning.pytorch as pl
    import torch
    from torch.optim import AdamW

    import gift_lightning.sft as stage
    from gift_lightning.data import SFTData
    from gift_lightning.records import Record
    from gift_lightning.targets import OneHot

    processes, steps = 2 if options.cell == DDP else 1, options.skip + options.steps
    module = stage.SFT(policy(options), OneHot(), optimizer=lambda p: AdamW(p, lr=1e-5))

    class Rows(SFTData):
        def train_records(self) -> Iterator[Record]:
            shape = (processes * options.batch * steps, options.length)
            seed = torch.Generator().manual_seed(1)
            for ids in torch.randint(3, module.vocab_size, shape, generator=seed).tolist():
                yield Record("row", input_ids=ids)

    class Tick(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            clock.tick()

    trainer = pl.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Tick()],
    )
    clock = Clock(options.skip)
    trainer.fit(module, Rows(train=[], batch_size=options.batch, max_length=None))
    tokens = processes * options.batch * options.length
    return {"tokens/s": tokens / clock.found()["seconds"]} if trainer.is_global_zero else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=8, help="rows of a process's step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        import torch

        torch.set_num_threads(options.threads)
        if found := measure(options):  # the other rank writes to the same place
            print(json.dumps(found))
        return
    names = ("batch", "length", "steps", "skip")
    flags = [*model_flags(options), *(f"--{name}={getattr(options, name)}" for name in names)]
    runs: Runs = {ONE: [], APART: [], DDP: []}
    for _ in range(options.repeats):
        for cell, found in runs.items():
            count = 2 if cell == APART else 1
            together = [start(__file__, cell, flags, options.threads) for _ in range(count)]
            rates = [finish(process, cell)["tokens/s"] for process in together]
            found.append({"tokens/s": sum(rates)})
    one = median(runs[ONE], "tokens/s")
    print(f"{options.batch} x {options.length} tokens in each process, {model_said(options)}.")
    print(f"{machine(options.threads, options.repeats)}\n")
    print(
        markdown(
            ("run", "tokens/s", "of linear"),
            [
                (
                    cell,
                    f"{median(found, 'tokens/s'):,.0f}",
                    f"{median(found, 'tokens/s') / one / (1 if cell == ONE else 2):.2f}",
                )
                for cell, found in runs.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
