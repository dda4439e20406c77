"""The position in the data: what a checkpoint keeps of it, and where a resumed run goes on."""

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl

from gift_lightning.order import Resumable
from gift_lightning.replicas import Replicas


class PositionedData(pl.LightningDataModule):
    """A data module whose order is a pure function of its options, so that a position restores it.

    A subclass sets `sampler` in `setup` and says in `identity` what the order depends on.
    """

    sampler: Resumable | None = None

    @property
    @abstractmethod
    def identity(self) -> dict[str, str | int]:
        """What the order of the data depends on, by the name that a user knows it by."""

    def check_order(self) -> None:
        """
        Raises:
            ValueError: the trainer would put an order of its own in the place of this one.
        """
        trainer: Any = self.trainer
        if getattr(trainer, "overfit_batches", 0):
            raise ValueError(
                "trainer.overfit_batches replaces the order of the data, which is this data "
                "module's: take fewer records by the source's `limit` instead."
            )
        connector = getattr(trainer, "_accelerator_connector", None)
        if Replicas.of(trainer).number > 1 and getattr(connector, "use_distributed_sampler", False):
            raise ValueError(
                "This data deals samples to devices itself; set trainer.use_distributed_sampler "
                "to false."
            )

    def test_dataloader(self) -> Any:
        """What `gift test` measures: by default the validation sets."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: the epoch and its micro-batches already trained."""
        if self.trainer is None or self.sampler is None:
            return {}
        loop: Any = self.trainer.fit_loop
        epoch, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        # `processed` counts trained batches at every hook; the trainer resumes from it as well.
        done = batch.processed
        if epoch.ready > epoch.started and done:
            raise ValueError(
                "A checkpoint written in on_train_epoch_start cannot be resumed; write it at the "
                "end of a step or of an epoch."
            )
        return {
            "epoch": self.sampler.epoch,
            "micro_batches_done": done,
            "accumulate": self.sampler.accumulate,
            "epoch_trained": done > 0 and done >= self.trainer.num_training_batches,
            "batch_closed": batch.completed == done,
            "epoch_closed": epoch.started == epoch.processed,
            "identity": self.identity,
        }

    def resplit(self, checkpoint: dict[str, Any]) -> None:
        """Counts the micro-batches of a checkpoint as this run does, which may split its optimizer
        steps into another number of them; in the position and in the trainer's progress.

        Raises:
            ValueError: The checkpoint does not say how its own steps were split.
        """
        position = checkpoint.get(type(self).__qualname__)
        if self.sampler is None or not position:
            return
        if "accumulate" not in position:
            raise ValueError(
                "The checkpoint is of an earlier version, which did not write how many "
                "micro-batches a step has: start a new run from its exported weights."
            )
        before, now = position["accumulate"], self.sampler.accumulate
        done = position["micro_batches_done"]
        if before == now or (done % before and not position["epoch_trained"]):
            return
        position["accumulate"] = now
        position["micro_batches_done"] = min(-(-done // before) * now, len(self.sampler))
        grown = position["micro_batches_done"] - done
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for name in progress["current"]:
            progress["current"][name] += grown
            progress["total"][name] += grown

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position.

        A checkpoint written inside an epoch goes on at the next micro-batch. After an epoch's last
        step there are two: written before the trainer has closed that batch (in
        `on_train_batch_end`), or after the epoch in a run that counts epochs, it goes on with the
        next epoch; in between, the trainer first enters the finished epoch again, which must then
        have no batch left.

        Raises:
            ValueError: The data or its order changed, or the position is inside a step.
        """
        assert self.trainer is not None and self.sampler is not None
        if self.trainer.state.fn != "fit":
            return
        old, new = state_dict["identity"], self.identity
        changed = [
            f"{key} ({old.get(key)} before, {new[key]} now)" if key != "samples" else "the samples"
            for key in new
            if old.get(key) != new[key]
        ]
        if changed:
            raise ValueError(
                f"The checkpoint was written with other data: {', '.join(changed)} changed; "
                "restore them, or start a new run from the exported weights."
            )
        epoch, done = state_dict["epoch"], state_dict["micro_batches_done"]
        by_epochs, accumulate = self.trainer.max_steps == -1, state_dict["accumulate"]
        if state_dict["epoch_trained"]:
            # Whether the trainer will enter the finished epoch once more.
            again = state_dict["batch_closed"] and not (by_epochs and state_dict["epoch_closed"])
            epoch, done = (epoch, len(self.sampler)) if again else (epoch + 1, 0)
        elif done % accumulate:
            raise ValueError(
                f"The checkpoint was written inside an optimizer step, after micro-batch {done} "
                f"of epoch {epoch} with accumulate_grad_batches={accumulate}; resume from one "
                "written at the end of a step."
            )
        elif done and by_epochs and state_dict["epoch_closed"]:
            raise ValueError(
                f"The checkpoint was written after training stopped inside epoch {epoch}; resume "
                "it with trainer.max_steps, or from one written at the end of a step."
            )
        self.sampler.start(epoch, done)
