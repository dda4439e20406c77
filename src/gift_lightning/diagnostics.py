"""What every run reports beside its objective, so that methods with different losses compare."""

import resource
import sys

import torch
from torch import Tensor
from torchmetrics import Metric

from gift_lightning.loss import Evaluation

NAMES = (
    "loss",  # value of the target per token: not comparable between targets
    "gamma",  # trust in the label
    "label_mass",  # Q_y, comparable between targets
    "nll",  # −log p_y, comparable between targets
    "mean_token_accuracy",
    "softened",  # share of tokens whose target departs from one-hot by more than 0.001
    "entropy",
    "kl_target",  # KL(Q‖π), the part of the objective that training can remove
    "kl_reference",  # KL(π‖reference)
)


class TokenMeans(Metric):
    """Means over supervised tokens of the diagnostics of `target.evaluate`, exact over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(NAMES), dtype=torch.float64)
        self.add_state("sums", default=zeros.clone(), dist_reduce_fx="sum")
        self.add_state("counts", default=zeros.clone(), dist_reduce_fx="sum")
        self.sums: Tensor
        self.counts: Tensor

    def update(self, stats: Evaluation) -> None:
        """Adds the tokens of one micro-batch; a diagnostic that was not computed adds none."""
        softened = (stats.label_mass < 1 - 1e-3).to(stats.value.dtype)
        columns = (
            stats.value,
            stats.gamma,
            stats.label_mass,
            stats.nll,
            stats.correct,
            softened,
            stats.entropy,
            stats.kl_target,
            stats.kl_reference,
        )
        for i, column in enumerate(columns):
            if column is not None:
                if column is stats.kl_target:
                    column = column[~column.isnan()]  # it has no value where γ > 1
                self.sums[i] += column.sum(dtype=torch.float64)
                self.counts[i] += len(column)

    def compute(self) -> dict[str, Tensor]:
        """Means by name, for the diagnostics that saw any token."""
        means = self.sums / self.counts
        return {name: means[i].float() for i, name in enumerate(NAMES) if self.counts[i] > 0}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator if the run uses one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
