"""GIFT on GSM8K: packed rows and the fused head against the official code's fixed padding.

    python benchmarks/packing.py --tokenizer SMOLLM2_FOLDER

The official form pads every example to the maximum length and computes student, frozen reference
and loss over whole rows, logits included; its losses are masked afterwards. Both train the same
model on the same samples in the same order of magnitude of steps, with an online reference. What is
counted is useful tokens: those of the samples, without padding. Without a tokenizer the embedded
one is used, and the vocabulary is small.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from measuring import ROOT, Clock, machine, markdown, median, run_cells

PADDED, PACKED = "official form, padded to max length", "GIFT, packed"
BETA = 20.0


def prepared(options: argparse.Namespace) -> tuple[Any, Any]:
    """The module and its data."""
    from torch.optim import AdamW

    import gift_lightning.sft as stage
    from gift_lightning.data import SFTData
    from gift_lightning.models import tiny_llama
    from gift_lightning.readers import Source
    from gift_lightning.references import FrozenCopy
    from gift_lightning.targets import GIFT

    limit = options.batch * (options.skip + options.steps)
    model = tiny_llama(
        options.tokenizer,
        hidden_size=options.width,
        num_layers=options.layers,
        max_positions=options.max_length,
    )
    module = stage.SFT(
        model, GIFT(beta=BETA), reference=FrozenCopy(), optimizer=lambda p: AdamW(p, lr=1e-5)
    )
    source = Source(options.data, limit=limit)
    data = SFTData(source, batch_size=options.batch, max_length=options.max_length)
    data.prepare(module.tokenizer, module.vocab_size)
    return module, data


def packed(options: argparse.Namespace) -> dict[str, float]:
    import lightning.pytorch as pl

    module, data = prepared(options)
    useful: list[int] = []

    class Tick(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
        ) -> None:
            useful.append(int((batch["sequence_ids"] >= 0).sum()))
            clock.tick()

    trainer = pl.Trainer(
        max_steps=options.skip + options.steps,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Tick()],
    )
    clock = Clock(options.skip)
    trainer.fit(module, data)
    return {**clock.found(), "tokens": sum(useful[options.skip :]) / options.steps}


def padded(options: argparse.Namespace) -> dict[str, float]:
    import copy

    import torch
    import torch.nn.functional as F

    module, data = prepared(options)
    model, examples = module.model, data.train_examples
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    shape = (options.batch, options.max_length)
    useful: list[int] = []
    clock = Clock(options.skip)
    for step in range(options.skip + options.steps):
        ids = torch.full(shape, module.tokenizer.pad_token_id)
        labels, mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.int64)
        for row in range(options.batch):
            sample, learned = examples[step * options.batch + row]
            ids[row, : len(sample)], labels[row, : len(sample)] = sample, learned
            mask[row, : len(sample)] = 1
        # zzy1127/GIFT, fsdp_gift_trainer.py, over all positions of all rows.
        y = labels[:, 1:].clamp_min(0)[..., None]
        student = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            base = reference(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            tilted = torch.log(F.softmax(base, -1) + 1e-10)
            tilted = tilted.scatter_add(-1, y, torch.full_like(y, BETA, dtype=tilted.dtype))
            q = F.softmax(tilted, -1)
        losses = -(q * F.log_softmax(student, -1)).sum(-1)
        where = labels[:, 1:] != -100
        ((losses * where).sum() / where.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        useful.append(int(mask.sum()))
        clock.tick()
    return {**clock.found(), "tokens": sum(useful[options.skip :]) / options.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=str(ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl")
    )
    parser.add_argument("--tokenizer", default="gift:countdown")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skip", type=int, default=1, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps((packed if options.cell == PACKED else padded)(options)))
        return
    if not Path(options.data).is_file():
        parser.error(f"--data: {options.data} does not exist")
    names = ("data", "tokenizer", "width", "layers", "batch", "max_length", "steps", "skip")
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    runs = run_cells(__file__, [PADDED, PACKED], flags, options.threads, options.repeats)
    rates = {k: median(x, "tokens") / median(x, "seconds") for k, x in runs.items()}
    print(f"{options.batch} samples a step, max length {options.max_length}.")
    print(f"{machine(options.threads, options.repeats)}\n")
    print(
        markdown(
            ("step", "seconds", "useful tokens/s", "peak MiB", "ratio"),
            [
                (
                    cell,
                    f"{median(found, 'seconds'):.3f}",
                    f"{rates[cell]:,.0f}",
                    f"{median(found, 'mib'):,.0f}",
                    f"{rates[cell] / rates[PADDED]:.2f}",
                )
                for cell, found in runs.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
