"""A callback for startup.py, which `gift fit` finds by its name."""

from typing import Any

import lightning.pytorch as pl

SAID = "the first step is done"


class FirstStep(pl.Callback):
    """Says when the first step is done."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        print(SAID, flush=True)
