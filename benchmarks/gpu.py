"""Memory, speed and precision on a CUDA device, in one call of at most eight minutes.

    python benchmarks/gpu.py

It needs torch, transformers, peft and this package, no hub and no data: models have random weights
and the sizes of Qwen2.5 (0.5B for steps, 1.5B for the head). Tables:

- the head: forward and backward from hidden states and weights in bfloat16, fused and dense, and
  fused with the elementwise part (`loss.evaluate`) under `torch.compile`;
- an optimizer step of GIFT: all weights, LoRA, QLoRA (where bitsandbytes is there); the same
  documents packed on SDPA and padded;
- the example configs for one card (`configs/cards/`, where bitsandbytes is there): what `gift plan`
  says that they take, and what they take;
- parity of bfloat16 with float32, of packed with padded and of compiled with eager, each with its
  tolerance. The exit code is 1 if one does not hold.

Memory is the peak during a pass beyond what was there before the cell, and for steps everything.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cards
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config

from gift_lightning import head, loss
from gift_lightning.collate import Batch, collate
from gift_lightning.head import fused_token_loss
from gift_lightning.models import Lora, causal_lm
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised_sequences
from gift_lightning.references import AdapterOff, FrozenCopy
from gift_lightning.targets import GIFT, OneHot

TARGET = GIFT(beta=8)
LOSS, GRADIENT, STATES = 0.02, 0.05, 0.05  # relative tolerances


@dataclass(frozen=True)
class Sizes:
    tokens: int = 4096
    vocab: int = 151_936
    width: int = 1536
    layers: int = 24
    hidden: int = 896
    heads: int = 14
    mlp: int = 4864
    documents: int = 16
    longest: int = 1024
    repeats: int = 5
    backend: str = "inductor"


DRY = Sizes(32, 256, 16, 1, 16, 2, 32, 4, 12, 1, "aot_eager")


class Bench:
    """Cells of a run on one device, until its time is up."""

    def __init__(self, device: str, sizes: Sizes, seconds: float) -> None:
        self.device, self.sizes = torch.device(device), sizes
        self.until = time.perf_counter() + seconds
        self.rows: list[str] = []
        self.configs: list[str] = []
        self.checks: list[str] = []
        self.failed = False

    def cell(self, name: str, tokens: int, step: Callable[[], float], before: int = 0) -> None:
        """Adds a row: tokens a second, peak memory beyond `before` bytes, and the loss."""
        if time.perf_counter() > self.until:
            self.rows.append(f"| {name} | not run: out of time | | |")
            return
        try:
            step()  # kernels are chosen and compiled
            self._reset()
            taken = []
            for _ in range(self.sizes.repeats):
                start = time.perf_counter()
                value = step()  # reading the loss waits for the device
                taken.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            self.rows.append(f"| {name} | out of memory | | |")
            return
        speed = tokens / statistics.median(taken)
        self.rows.append(f"| {name} | {speed:,.0f} | {self._peak(before)} | {value:.4f} |")

    def check(self, name: str, error: float, tolerance: float) -> None:
        holds = error <= tolerance  # false for NaN
        self.failed |= not holds
        self.checks.append(f"| {name} | {error:.2g} | {tolerance} | {'yes' if holds else 'NO'} |")

    @property
    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self, before: int) -> str:
        if self.device.type != "cuda":
            return "–"
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"


# --- the head -------------------------------------------------------------------------------


def dense(h: Tensor, w: Tensor, y: Tensor, reference: tuple[Tensor, Tensor] | None) -> Tensor:
    logp = (h @ w.T).float().log_softmax(-1)
    if reference is None:
        return F.nll_loss(logp, y)
    with torch.no_grad():
        tilted = (reference[0] @ reference[1].T).float()
        tilted[torch.arange(len(y), device=y.device), y] += TARGET.beta
        q = tilted.softmax(-1)
    return -(q * logp).sum(-1).mean()


def fused(h: Tensor, w: Tensor, y: Tensor, reference: tuple[Tensor, Tensor] | None) -> Tensor:
    if reference is None:
        return fused_token_loss(h, w, y, OneHot()).mean()
    given = {"reference_hidden": reference[0], "reference_weight": reference[1]}
    return fused_token_loss(h, w, y, TARGET, **given).mean()


@contextmanager
def compiled(backend: str) -> Iterator[None]:
    """The elementwise part of the fused head under `torch.compile`."""
    head.evaluate = torch.compile(loss.evaluate, backend=backend)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        head.evaluate = loss.evaluate  # type: ignore[attr-defined]


def heads(bench: Bench, folder: str) -> None:
    """Rows and checks of the head."""
    s, device = bench.sizes, bench.device
    torch.manual_seed(0)
    y = torch.randint(0, s.vocab, (s.tokens,), device=device)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(scale).to(torch.bfloat16)

    h, w = drawn(s.tokens, s.width), drawn(s.vocab, s.width, scale=s.width**-0.5)
    other = drawn(s.tokens, s.width), drawn(s.vocab, s.width, scale=s.width**-0.5)
    h.requires_grad_(), w.requires_grad_()

    def once(form: Callable[..., Tensor], reference: Any, dtype: Any = None) -> Callable[[], float]:
        def step() -> float:
            h.grad = w.grad = None
            value = form(h.to(dtype), w.to(dtype), y, reference)
            value.backward()
            return value.item()

        return step

    for name, reference in {"OneHot()": None, "GIFT(beta=8)": other}.items():
        before = bench.allocated
        for form in (dense, fused):
            label = f"head, {name}, {form.__name__}"
            bench.cell(label, s.tokens, once(form, reference), before)
        eager, gradient = once(fused, reference)(), h.grad
        assert gradient is not None
        single = None if reference is None else tuple(x.float() for x in reference)
        exact, exact_gradient = once(fused, single, torch.float32)(), h.grad
        assert exact_gradient is not None
        error = _apart(gradient.float(), exact_gradient.float())
        bench.check(f"head, {name}: bfloat16 loss is float32's", _off(eager, exact), LOSS)
        bench.check(f"head, {name}: so is its gradient", error, GRADIENT)
        h.grad = w.grad = None
        with compiled(s.backend):
            label = f"head, {name}, fused, evaluate compiled ({s.backend})"
            try:
                bench.cell(label, s.tokens, once(fused, reference), before)
                off = _off(once(fused, reference)(), eager)
                bench.check(f"head, {name}: compiled is eager", off, LOSS)
            except Exception as failure:  # of the compiler: it is no part of this package
                bench.rows.append(f"| {label} | failed: {type(failure).__name__} | | |")
        h.grad = w.grad = None


def _off(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


# --- a training step ------------------------------------------------------------------------


def documents(sizes: Sizes, packing: bool, device: torch.device) -> Batch:
    """The same documents, of many lengths, in rows."""
    g = torch.Generator().manual_seed(0)
    lengths = [max(4, sizes.longest * (i + 1) // sizes.documents) for i in range(sizes.documents)]
    examples = []
    for n in lengths:
        ids = torch.randint(0, sizes.vocab, (n,), generator=g)
        examples.append((ids, ids.clone()))
    numbers = MicroBatch(tuple(range(len(lengths))), sum(lengths), len(lengths))
    batch = collate(examples, numbers, pad_id=0, packing=packing)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return moved  # type: ignore[return-value]


def steps(bench: Bench, folder: str) -> None:
    """Rows and checks of optimizer steps."""
    s, device, lora = bench.sizes, bench.device, Lora(r=16)
    kinds: dict[str, dict[str, Any]] = {
        "all weights, float32 under bf16-mixed": {},
        "LoRA, bfloat16 base": {"dtype": "bfloat16", "lora": lora},
        "QLoRA, NF4 base": {"dtype": "bfloat16", "lora": lora, "load_in_4bit": True},
    }
    packed, padded = (documents(s, packing, device) for packing in (True, False))
    tokens = int((packed["sequence_ids"] >= 0).sum())
    torch.manual_seed(0)
    exact = states(Policy(causal_lm(folder).to(device)), packed, half=False)
    for name, options in kinds.items():
        if "load_in_4bit" in options and find_spec("bitsandbytes") is None:
            bench.rows.append(f"| step, {name} | no bitsandbytes here | | |")
            continue
        policy = Policy(causal_lm(folder, gradient_checkpointing=True, **options).to(device))
        reference = AdapterOff() if "lora" in options else FrozenCopy(dtype="bfloat16")
        reference.setup(policy)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def step(batch: Batch, policy: Any = policy, reference: Any = reference,
                 optimizer: Any = optimizer) -> float:  # fmt: skip
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                value, _ = policy(batch, TARGET, reference=reference.rows(policy, batch))
                value = value.mean()
            value.backward()
            optimizer.step()
            return value.item()

        if "load_in_4bit" not in options:  # which computes with other weights
            found = states(policy, packed)
            bench.check(f"hidden states of {name}: as in float32", _apart(found, exact), STATES)
        if name.startswith("LoRA"):
            error = _apart(found, states(policy, padded))
            bench.check("hidden states packed: as padded", error, STATES)
            bench.cell(f"step, {name}, padded", tokens, lambda run=step: run(padded))  # type: ignore[misc]
        bench.cell(f"step, {name}, packed", tokens, lambda run=step: run(packed))  # type: ignore[misc]
        del policy, reference, optimizer, trained, step


def configs(bench: Bench, folder: str) -> None:
    """Rows of the example configs, the smallest model first."""
    for path in sorted(cards.CONFIGS, key=lambda path: float(cards.model_of(path)[:-1])):
        name, place = f"configs/cards/{path.name}", Path(folder, path.stem)
        late = time.perf_counter() > bench.until
        if late or find_spec("bitsandbytes") is None:
            why = "out of time" if late else "no bitsandbytes here"
            bench.configs.append(f"| {name} | not run: {why} | | | |")
            continue
        dry = bench.device.type == "cpu"
        config = small(bench.sizes) if dry else cards.qwen(cards.model_of(path))
        place.mkdir()
        try:
            found = cards.measured(path, config, place, bench.device.type)
        except (SystemExit, Exception) as failure:  # what was measured before is not lost
            traceback.print_exc()
            bench.failed = True
            bench.configs.append(f"| {name} | failed: {type(failure).__name__} | | | |")
            continue
        finally:
            shutil.rmtree(place)
        cells = ["–" if dry else f"{found[key]:,.2f}" for key in ("planned", "taken")]
        cells += [f"{found['tokens/s']:,.0f}", f"{found['loss']:.4f}"]
        bench.configs.append(f"| {name} | {' | '.join(cells)} |")


@torch.no_grad()
def states(policy: Policy, batch: Batch, half: bool = True) -> Tensor:
    """[n, d] final hidden states at the supervised tokens, document by document."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, half):
        found = policy.hidden(batch).float()
    return found[batch["sample_ids"][supervised_sequences(batch)].argsort(stable=True)]


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def small(s: Sizes) -> Qwen2Config:
    """The model of the steps."""
    return Qwen2Config(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.mlp,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.0, help="no cell is begun after that")
    parser.add_argument("--dry", action="store_true", help="try the code on a CPU, at toy sizes")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device was found, so nothing was measured.")
    device, sizes = ("cpu", DRY) if options.dry else ("cuda", Sizes())
    bench = Bench(device, sizes, 60 * options.minutes)
    name = "A dry run, whose speeds mean nothing" if options.dry else torch.cuda.get_device_name()
    print(f"{name}; torch {torch.__version__}; {sizes}\n")
    with tempfile.TemporaryDirectory() as folder:
        cards.write_model(small(sizes), Path(folder))
        for part in heads, steps, configs:
            try:
                part(bench, folder)
            except torch.OutOfMemoryError:
                bench.rows.append(f"| the rest of {part.__name__}: out of memory | | | |")
    print("| cell | tokens/s | peak memory (GiB) | loss |\n|---|---|---|---|")
    print("\n".join(bench.rows))
    print("\n| config | planned (GB) | taken (GB) | tokens/s | loss |\n|---|---|---|---|---|")
    print("\n".join(bench.configs))
    print("\n| parity | relative error | tolerance | holds |\n|---|---|---|---|")
    print("\n".join(bench.checks))
    sys.exit(int(bench.failed))


if __name__ == "__main__":
    main()
