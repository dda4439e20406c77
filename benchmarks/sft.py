"""A step of SFT and of GIFT against a bare PyTorch loop and TRL's SFTTrainer, on the same rows.

    python benchmarks/sft.py
    python benchmarks/sft.py --model SMOLLM2_FOLDER --batch 2

Full training in float32, AdamW, clipping, no gradient checkpointing; rows of equal length, all of
whose tokens are learned. Each cell is a process of its own. Memory is the highest resident size
beyond the size before the first step, with the model loaded: gradients, moments, activations and,
for GIFT, the frozen copy. The loss is the mean over all rows, which each sees once and in its own
order: the same for standard SFT by any code. TRL needs the `bench` extra.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import (
    Clock,
    add_model_options,
    has_trl,
    machine,
    markdown,
    median,
    model_flags,
    model_said,
    policy,
    run_cells,
)

BARE, SFT, TRL = "bare PyTorch loop", "SFT", "TRL SFTTrainer"
GIFT_CACHED, GIFT_ONLINE = "GIFT, cached reference", "GIFT, frozen copy"
CELLS = [BARE, SFT, TRL, GIFT_CACHED, GIFT_ONLINE]
PRODUCTS = "the head's products"
LR = 1e-5


def rows(options: argparse.Namespace, vocab: int) -> list[list[int]]:
    """Random tokens for all steps; only their number matters."""
    import torch

    shape = (options.batch * (options.skip + options.steps), options.length)
    drawn: list[list[int]] = torch.randint(
        5, vocab, shape, generator=torch.Generator().manual_seed(1)
    ).tolist()
    return drawn


def bare(options: argparse.Namespace) -> dict[str, float]:
    import torch

    model = policy(options)
    data = torch.tensor(rows(options, model.config.vocab_size)).split(options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    clock, losses = Clock(options.skip), []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return {**clock.found(), "loss": statistics.mean(losses)}


def ours(options: argparse.Namespace) -> dict[str, float]:
    import lightning.pytorch as pl
    from torch.optim import AdamW

    import gift_lightning.sft as stage
    from gift_lightning.cache import CachedTopK
    from gift_lightning.data import SFTData
    from gift_lightning.records import Record
    from gift_lightning.references import FrozenCopy, Reference
    from gift_lightning.targets import GIFT, OneHot

    class Rows(SFTData):
        def train_records(self) -> Iterator[Record]:
            for i, ids in enumerate(rows(options, module.vocab_size)):
                yield Record(f"row {i}", input_ids=ids)

    class Tick(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, *more: Any
        ) -> None:
            losses.append(float(outputs["loss"]))
            clock.tick()

    losses: list[float] = []
    folder = tempfile.TemporaryDirectory()
    reference: Reference | None = None
    if options.cell == GIFT_CACHED:
        reference = CachedTopK(str(Path(folder.name) / "cache"), k=64)
    elif options.cell == GIFT_ONLINE:
        reference = FrozenCopy()
    module = stage.SFT(
        policy(options),
        OneHot() if reference is None else GIFT(beta=20.0),
        reference=reference,
        optimizer=lambda p: AdamW(p, lr=LR),
    )
    data = Rows(train=[], batch_size=options.batch, max_length=None)
    data.prepare(module.tokenizer, module.vocab_size)
    if isinstance(reference, CachedTopK):
        reference.write(module.policy, module.tokenizer, data.sets)
    trainer = pl.Trainer(
        max_steps=options.skip + options.steps,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[Tick()],
    )
    clock = Clock(options.skip)
    trainer.fit(module, data)
    folder.cleanup()
    return {**clock.found(), "loss": statistics.mean(losses)}


def trl(options: argparse.Namespace) -> dict[str, float]:
    if not has_trl(TRL):
        return {}
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from gift_lightning.models import load_tokenizer

    model = policy(options)
    data = rows(options, model.config.vocab_size)
    losses: list[float] = []

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **more: Any) -> Any:
            found = super().training_step(*args, **more)
            losses.append(float(found))
            return found

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            SFTConfig(
                folder,
                per_device_train_batch_size=options.batch,
                max_steps=options.skip + options.steps,
                learning_rate=LR,
                weight_decay=0.01,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                max_length=None,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}),
            processing_class=load_tokenizer(options.model or "gift:countdown"),
            callbacks=[Tick()],
        )
        clock = Clock(options.skip)
        trainer.train()
    return {**clock.found(), "loss": statistics.mean(losses)}


def products(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of what a step multiplies for one chunk of tokens, and of one forward again.

    The logits, as the head makes them and by torch's own product, and the gradients of hidden
    states and weights have equally many operations.
    """
    import torch

    from gift_lightning.matmul import add_matmul_tn, default_chunk, matmul_nn, matmul_nt

    weight = policy(options).get_output_embeddings().weight.detach()
    hidden = torch.randn(default_chunk(weight), weight.shape[1])
    logits = torch.randn(len(hidden), len(weight))

    def milliseconds(product: Callable[[], Any]) -> float:
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            product()
            times.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(times[2:])

    gradient = torch.zeros_like(weight)
    return {
        "forward": milliseconds(lambda: matmul_nt(hidden, weight, None)),
        "torch": milliseconds(lambda: hidden @ weight.T),
        "hidden": milliseconds(lambda: matmul_nn(logits, weight, hidden.dtype)),
        "weight": milliseconds(lambda: add_matmul_tn(gradient, logits, hidden)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        import torch

        torch.set_num_threads(options.threads)
        run = {BARE: bare, TRL: trl, PRODUCTS: products}.get(options.cell, ours)
        print(json.dumps(run(options)))
        return
    names = ("batch", "length", "steps", "skip")
    flags = [*model_flags(options), *(f"--{name}={getattr(options, name)}" for name in names)]
    runs = run_cells(__file__, CELLS, flags, options.threads, options.repeats)
    alone = run_cells(__file__, [PRODUCTS], flags, options.threads, options.repeats)[PRODUCTS]
    tokens = options.batch * options.length
    seconds = {cell: median(found, "seconds") for cell, found in runs.items()}
    mib = {cell: median(found, "mib") for cell, found in runs.items()}
    print(f"{options.batch} x {options.length} tokens, {model_said(options)}.")
    print(f"{machine(options.threads, options.repeats)}\n")
    print(
        markdown(
            ("step", "seconds", "tokens/s", "peak MiB", "time to SFT's", "memory to SFT's", "loss"),
            [
                (
                    cell,
                    f"{seconds[cell]:.3f}",
                    f"{tokens / seconds[cell]:,.0f}",
                    f"{mib[cell]:,.0f}",
                    f"{seconds[cell] / seconds[SFT]:.2f}",
                    f"{mib[cell] / mib[SFT]:.2f}",
                    f"{median(runs[cell], 'loss'):.4f}",
                )
                for cell in runs
            ],
        )
    )
    print("\nSFT against the others, tokens/s and memory:")
    for other in (BARE, TRL):
        if other in runs:
            print(
                f"- {other}: {seconds[other] / seconds[SFT]:.2f}x and {mib[SFT] / mib[other]:.2f}x"
            )
    forward, plain, *backward = (median(alone, x) for x in ("forward", "torch", "hidden", "weight"))
    print(
        f"\nA chunk's logits take {forward:.0f} ms ({plain:.0f} by torch's own product), the "
        f"gradients of hidden states and weights {backward[0]:.0f} and {backward[1]:.0f}; with a "
        f"frozen copy's logits as well, {1 + forward / (forward + sum(backward)):.2f}x the time."
    )


if __name__ == "__main__":
    main()
