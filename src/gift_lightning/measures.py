"""What an optimizer step says about its two branches, for the controller of the next one."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gift_lightning.branches import BranchGradients, Reduce
from gift_lightning.collate import Batch
from gift_lightning.controller import Controller, MixStats
from gift_lightning.controllers import GAC
from gift_lightning.experience import Experience
from gift_lightning.policy import supervised_sequences
from gift_lightning.replicas import Replicas


class StepMeasures:
    """Collects over the micro-batches of a step what the controller asks for.

    Args:
        controller: whose `measures` say what.
        block: part of the model, of whose parameters gradients are taken.
    """

    def __init__(self, controller: Controller, block: nn.Module) -> None:
        self.controller = controller
        self._gradients = BranchGradients([])
        block.register_forward_pre_hook(self._note_parameters)
        self.forget()

    def forget(self) -> None:
        """Nothing of this step is left."""
        self._rows: list[Tensor] = []  # of the demonstrations on this rank
        self._kl = [0.0, 0.0]  # sum and count

    def _note_parameters(self, block: nn.Module, _: object) -> None:
        # As the forward pass uses them: sharded ones are whole, and others, only there.
        if torch.is_grad_enabled():
            self._gradients.parameters = [p for p in block.parameters() if p.requires_grad]

    def reads(self, what: str, step: int) -> bool:
        """Whether the controller will read it after that step."""
        return what in self.controller.measures and self.controller.is_due(step + 1)

    def add_gradients(self, losses: dict[str, Tensor]) -> None:
        """As `BranchGradients.add`."""
        self._gradients.add(losses)

    def add_kl(self, kl: Float[Tensor, " n"]) -> None:
        """Of the rollouts' tokens."""
        self._kl[0] += float(kl.detach().double().sum())
        self._kl[1] += len(kl)

    def add_demonstrations(self, batch: Batch, nll: Float[Tensor, " n"]) -> None:
        """With the −log p of their tokens."""
        assert isinstance(self.controller, GAC)
        found, row = supervised_sequences(batch).unique_consecutive(return_inverse=True)
        every = torch.ones(len(found), dtype=torch.bool, device=nll.device)
        rows = self.controller.rows(-nll.detach(), torch.zeros_like(nll), row, every)
        self._rows.append(rows.cpu())

    def take(
        self,
        step: int,
        experience: Experience,
        window: Int[Tensor, " s"],
        reduce: Reduce,
        replicas: Replicas,
        with_gradients: bool,
    ) -> tuple[MixStats, dict[str, float]]:
        """The statistics of a step, the same on every rank, and the norms of its gradients.

        Args:
            step: which it was.
            experience: the rollout.
            window: its completions in this step, on all ranks.
            reduce: the "sum" over the ranks.
            replicas: who shares the step.
            with_gradients: whether gradients were added.
        """
        norms: dict[str, float] = {}
        stats = MixStats(math.nan, math.nan, math.nan)
        if with_gradients:
            norms, stats = self._gradients.take(reduce)
        if self.reads("proxy", step):
            stats = self._proxies(experience, window[experience.counted[window]], replicas)
        if "kl" in self.controller.measures:
            total, count = reduce(torch.tensor(self._kl).double(), "sum").tolist()
            stats = replace(stats, kl=total / count if count else math.nan)
        signal = (experience.advantages != 0) & experience.counted
        self.forget()
        return replace(stats, has_signal=bool(signal[window].any())), norms

    def _proxies(
        self, experience: Experience, ids: Int[Tensor, " k"], replicas: Replicas
    ) -> MixStats:
        """All ranks have all rollouts, and exchange demonstrations."""
        assert isinstance(self.controller, GAC)
        logp, row = experience.sampled(ids)
        none = torch.zeros(len(ids), dtype=torch.bool)
        rollouts = self.controller.rows(logp, experience.advantages[ids][row], row, none)
        mine = torch.cat([rollouts[:0], *self._rows])
        rows = torch.cat([rollouts, *replicas.gathered(mine)])
        return self.controller.summary(rows, torch.arange(len(rows)) >= len(rollouts))
