"""Two streams side by side: prompts to roll out, and demonstrations to imitate."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Sampler

from gift_lightning.collate import Batch
from gift_lightning.data import SFTData
from gift_lightning.examples import Examples, Ledger
from gift_lightning.order import MicroBatch, MicroBatches
from gift_lightning.position import PositionedData
from gift_lightning.prompts import PromptData, Tickets


class HybridData(PositionedData):
    """A micro-batch of prompts and one of demonstrations at a time.

    The prompts say how long an epoch is. The demonstrations go round as often as it takes, in whole
    optimizer steps of their batch_size x accumulate_grad_batches x devices, each time in an order
    of its own. A module that takes the demonstrations of its rollouts' own prompts gets the prompts
    alone, and that batch_size says nothing.

    Args:
        prompts: what is rolled out.
        demonstrations: what is imitated; its validation sets are the run's.
    """

    def __init__(self, prompts: PromptData, demonstrations: SFTData) -> None:
        super().__init__()
        self.prompts, self.demonstrations = prompts, demonstrations

    def setup(self, stage: str) -> None:
        """Prepares both for the trainer's module.

        Raises:
            ValueError: one of them cannot be used, or an optimizer step takes more demonstrations
                than there are.
        """
        for part in self.prompts, self.demonstrations:
            part.trainer = self.trainer
            part.setup(stage)
        self.sampler, order = self.prompts.sampler, self.demonstrations.sampler
        assert order is not None
        if not self._is_paired and len(order.ids) < order.samples_per_step:
            raise ValueError(
                f"an optimizer step takes {order.samples_per_step} demonstrations "
                "(data.demonstrations.batch_size x trainer.accumulate_grad_batches x devices) and "
                f"there are {len(order.ids)}: lower one of them."
            )

    @property
    def _is_paired(self) -> bool:
        assert self.trainer is not None
        return getattr(self.trainer.lightning_module, "is_paired", False)

    def train_dataloader(self) -> CombinedLoader:
        tickets, order = self.prompts.sampler, self.demonstrations.sampler
        assert tickets is not None and order is not None
        streams: dict[str, DataLoader[Any]] = {"prompts": self.prompts.train_dataloader()}
        if not self._is_paired:
            streams["demonstrations"] = self.demonstrations.loader(_Around(tickets, order))
        return CombinedLoader(streams, "min_size")

    def val_dataloader(self) -> Any:
        """The demonstrations' validation sets, or one empty item."""
        return self.demonstrations.val_dataloader() or self.prompts.val_dataloader()

    # What a module that imitates asks of its data.

    @property
    def packing(self) -> bool:
        return self.prompts.packing or self.demonstrations.packing

    @property
    def share_prompts(self) -> bool:
        return self.prompts.share_prompts

    @property
    def ledger(self) -> dict[str, Ledger]:
        return {"prompts": self.prompts.ledger["train"], **self.demonstrations.ledger}

    @property
    def sets(self) -> dict[str, Examples]:
        return self.demonstrations.sets

    @property
    def train_examples(self) -> Examples:
        return self.demonstrations.train_examples

    @property
    def val_names(self) -> list[str]:
        return self.demonstrations.val_names

    def one_pass(self) -> DataLoader[Batch]:
        return self.demonstrations.one_pass()

    @property
    def identity(self) -> dict[str, str | int]:
        own = {f"demonstrations' {k}": v for k, v in self.demonstrations.identity.items()}
        return {**self.prompts.identity, **own}


class _Around(Sampler[MicroBatch]):
    """Demonstrations for every ticket: at its position in the run, so that a resume needs no more
    than the tickets' own."""

    def __init__(self, tickets: Tickets, order: MicroBatches) -> None:
        self.tickets, self.order = tickets, order
        self.num_windows = len(order.ids) // order.samples_per_step  # without a last short one
        self._windows = lru_cache(1)(order.windows)

    def __len__(self) -> int:
        return len(self.tickets)

    def __iter__(self) -> Iterator[MicroBatch]:
        tickets, before = self.tickets, self.tickets.epoch * len(self.tickets)
        for i in range(before + tickets.skipped, before + len(tickets)):
            step, part = divmod(i, self.order.accumulate)
            epoch, window = divmod(step, self.num_windows)
            yield self._step(epoch, window)[part]

    def _step(self, epoch: int, window: int) -> list[MicroBatch]:
        windows: list[np.ndarray] = self._windows(epoch)
        return self.order.parts(windows[window])
