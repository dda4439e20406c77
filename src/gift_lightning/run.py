"""One run, one folder: where it writes, what it leaves behind, what it says at the end."""

import csv
import fcntl
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gift_lightning.evaluation import GenerationEval
from gift_lightning.models import base_model, for_export
from gift_lightning.module import PolicyModule

_OWN = "GIFT_RUN_FOLDER"
"""Tells the processes that a run's first one starts where that one writes."""


@contextmanager
def own_folder(wanted: str | Path) -> Iterator[Path]:
    """The folder itself if it is new or empty, else the first free of folder-1, folder-2, ...

    No run ever writes into the folder of another, also if both start at once: the folder is made
    and locked here, long before anything is written. What was made here and stayed empty, parents
    too, is removed at the end.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        told = os.environ.get(_OWN)
        yield Path(told) if told else next(filter(_is_free, _candidates(Path(wanted))))
        return
    for folder in filter(_is_free, _candidates(Path(wanted))):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if (lock := _locked(folder)) is not None:
            break
    assert lock is not None  # there is always another name
    os.environ[_OWN] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop(_OWN, None)
        os.close(lock)
        with suppress(OSError):  # not empty: something was written, and stays
            for path in made:
                path.rmdir()


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{i}") for i in count(1))


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _locked(folder: Path) -> int | None:
    """An open folder that is this run's until it is closed; None if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not _is_free(folder)
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks
        taken = False
    if taken:
        os.close(lock)
    return None if taken else lock


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, wherever its logs go, and when training starts: a
    run that is refused leaves nothing behind."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / "config.yaml", skip_unset=False)


class ExportHF(Callback):
    """Writes the trained model as a Hugging Face folder, `hf/` in the run's folder."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        writes = trainer.is_global_zero
        policy = pl_module.policy.whole(torch.device("cpu"), keep=writes)
        if writes:
            folder = str(Path(trainer.default_root_dir) / "hf")
            pl_module.export(folder, for_export(policy.model))


_COLUMNS = (
    "nll",
    "entropy",
    "kl_reference",
    "mean_token_accuracy",
    "pass@",  # with any number behind it
    "maj@",
    "distinct",
    "coverage_kept@",
)

_HEADS = {"nll": "NLL", "kl_reference": "KL", "mean_token_accuracy": "acc"}


class Report(Callback):
    """Ends a run with a table of validation before and after, samples, and where things are."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._rejected(trainer)
            model: Any = pl_module.model
            trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            total = base_model(model).num_parameters()  # of 4 bits too
            steps = trainer.estimated_stepping_batches
            last = f"{steps} steps" if math.isfinite(steps) else "as many steps as the time allows"
            Console().print(
                f"{getattr(pl_module, 'about', type(pl_module).__name__)}: "
                f"{trained:,} of {total:,} parameters, {last}"
            )

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The validation before training is step 0 of the log."""
        self.before = {k: float(v) for k, v in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.before, step=0)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, "after", "Before and after training")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._end(trainer, "", "Validation")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, "", "Test")

    def _end(self, trainer: pl.Trainer, when: str, title: str) -> None:
        if not trainer.is_global_zero:
            return
        console = Console()
        after = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if any(k.startswith("val") for k in after):
            console.print(self._table({"before": self.before, when: after}, title))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GenerationEval) and callback.completions:
                console.print(self._samples(callback.completions))
        self._places(console, trainer)

    def _table(self, measured: dict[str, dict[str, float]], title: str) -> Table:
        """One row for each validation set and each time that it was measured."""
        seen = [k.rpartition("/") for metrics in measured.values() for k in metrics]
        sets = list(dict.fromkeys(s for s, _, _ in seen if s.startswith("val")))
        names = dict.fromkeys(k for s, _, k in seen if s in sets and not k.endswith("_se"))
        columns = [k for c in _COLUMNS for k in names if re.sub(r"@\d+", "@", k) == c]
        heads = [_HEADS.get(k, k.replace("coverage_", "")) for k in columns]
        table = Table(
            "set", "", *heads, title=title, box=SIMPLE, collapse_padding=True, pad_edge=False
        )
        for name in sets:
            for when, metrics in measured.items():
                cells = [
                    f"{metrics[f'{name}/{c}']:.3f}" if f"{name}/{c}" in metrics else "–"
                    for c in columns
                ]
                if metrics:
                    table.add_row(name.removeprefix("val/"), when, *cells)
        return table

    def _samples(self, completions: list[dict[str, Any]]) -> Table:
        table = Table("set", "prompt", "completion", "reward", "", box=SIMPLE)
        for x in completions:
            mark = "[green]right[/green]" if x["correct"] else "[red]wrong[/red]"
            texts = (escape(_shortened(x[name])) for name in ("prompt", "completion"))
            table.add_row(x["set"], *texts, f"{x['reward']:.2f}", mark)
        return table

    def _rejected(self, trainer: pl.Trainer) -> None:
        """Every record that is not trained, with its place and reason, as `rejected.csv`."""
        ledgers = getattr(trainer.datamodule, "ledger", {})  # type: ignore[attr-defined]
        rows = [(name, x.origin, x.reason) for name, y in ledgers.items() for x in y.rejected]
        if rows and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
            with (Path(trainer.default_root_dir) / "rejected.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("set", "record", "reason"), *rows])

    def _places(self, console: Console, trainer: pl.Trainer) -> None:
        root = Path(trainer.default_root_dir)
        names = ("config.yaml", "metrics.csv", "rejected.csv", "completions", "checkpoints", "hf")
        made = [name for name in names if (root / name).exists()]
        console.print(f"Written to [bold]{escape(str(root))}[/bold]: {', '.join(made)}")


def _shortened(text: str) -> str:
    """The start and, where the answer tends to be, the end of a long text."""
    return text if len(text) <= 400 else f"{text[:150]} … {text[-250:]}"
