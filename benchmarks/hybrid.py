"""What the controller costs: its share of a step's time, for GAC's proxies and for gradients.

    python benchmarks/hybrid.py

Countdown from the embedded base, as configs/hybrid/gac.yaml has it, in steps of two micro-batches.
Each figure is the time inside the named part over the time of all steps of the same run, the median
of some runs; the first steps are not counted. Statistics are taken at every step here; by default
they are read at every tenth.
"""

import argparse
import contextlib
import io
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from gift_lightning.branches import BranchGradients
from gift_lightning.controllers import GAC, Constant, Controller
from gift_lightning.countdown_data import CountdownData
from gift_lightning.hybrid import Hybrid
from gift_lightning.hybrid_data import HybridData
from gift_lightning.measures import StepMeasures
from gift_lightning.models import causal_lm
from gift_lightning.problems import CountdownProblems
from gift_lightning.prompts import PromptData
from gift_lightning.targets import CHORDPhi

PARTS: list[tuple[type, str]] = [
    (GAC, "update"),
    (StepMeasures, "add_demonstrations"),
    (StepMeasures, "_proxies"),
    (BranchGradients, "add"),
    (BranchGradients, "take"),
]


class Clock(pl.Callback):
    """Time of the steps behind the first few, and inside the parts."""

    def __init__(self, skip: int) -> None:
        self.skip, self.inside, self.total = skip, Counter[str](), 0.0
        self._start: float | None = None
        self._real: list[tuple[type, str, Callable[..., Any]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for owner, name in PARTS:
            if name in vars(owner):
                self._real.append((owner, name, vars(owner)[name]))
                setattr(owner, name, self._timed(name, vars(owner)[name]))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for owner, name, real in self._real:
            setattr(owner, name, real)

    def _timed(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return real(*args)
            finally:
                self.inside[name] += time.perf_counter() - start

        return timed

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.skip and self._start is None:
            self._start = time.perf_counter()
            self.inside.clear()
        if self._start is not None:
            self.total = time.perf_counter() - self._start


def run(controller: Controller, steps: int, skip: int, log_every: int) -> dict[str, float]:
    """Seconds per step, and shares by part."""
    prompts = PromptData(
        CountdownProblems("train", "drawn", 2400), prompts_per_rollout=24, num_generations=16
    )
    data = HybridData(prompts, CountdownData(num_demonstrations=512, num_eval=1, batch_size=32))
    module = Hybrid(
        causal_lm("gift:countdown"),
        ["Countdown"],
        controller,
        CHORDPhi(),
        max_completion_length=24,
        reward_workers=1,
    )
    clock = Clock(skip)
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=steps + skip,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=log_every,
        callbacks=[clock],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # what a run says of its data
        trainer.fit(module, data)
    inside = clock.inside
    gradients = inside["add"] + inside["take"]
    rule = inside["update"] + inside["add_demonstrations"] + inside["_proxies"]
    return {
        "seconds": clock.total / steps,
        "controller": (rule + gradients) / clock.total,
        "gradients": gradients / clock.total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    never = 10**6
    cases: dict[str, tuple[Callable[[], Controller], int]] = {
        "Constant": (lambda: Constant(0.5), never),
        "GAC, proxies": (lambda: GAC(update_every=1), never),
        "GAC, gradients of the last block": (
            lambda: GAC(update_every=1, estimator="gradient"),
            never,
        ),
        "Constant, branch gradients logged at every step": (lambda: Constant(0.5), 1),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(options.repeats):  # in turn, so that a slow minute is everybody's
        for name, (make, log_every) in cases.items():
            found[name].append(run(make(), options.steps, 2, log_every))
    console = Console(width=100)
    table = Table("", "seconds per step", "controller's share", "of it, gradients")
    for name, runs in found.items():
        middle = {key: statistics.median(x[key] for x in runs) for key in runs[0]}
        shares = (f"{100 * middle[key]:.2f} %" for key in ("controller", "gradients"))
        table.add_row(name, f"{middle['seconds']:.3f}", *shares)
    console.print(f"{torch.get_num_threads()} threads, medians of {options.repeats} runs")
    console.print(table)


if __name__ == "__main__":
    main()
