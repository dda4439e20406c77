"""What every run reports beside its objective, so that methods with different losses compare."""

import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from gift_lightning.loss import Evaluation

_COLUMNS: dict[str, Callable[[Evaluation], Tensor | None]] = {
    "loss": lambda e: e.value,  # of the target per token: not comparable between targets
    "gamma": lambda e: e.gamma,  # trust in the label
    "label_mass": lambda e: e.label_mass,  # Q_y, comparable between targets
    "nll": lambda e: e.nll,  # −log p_y, comparable between targets
    "mean_token_accuracy": lambda e: e.correct,
    # Share of tokens whose target departs from one-hot by more than 0.001.
    "softened": lambda e: (e.label_mass < 1 - 1e-3).to(e.value.dtype),
    "entropy": lambda e: e.entropy,
    # KL(Q‖π), the part of the objective that training can remove; it has no value where γ > 1.
    "kl_target": lambda e: None if e.kl_target is None else e.kl_target[~e.kl_target.isnan()],
    "kl_reference": lambda e: e.kl_reference,  # KL(π‖reference)
}


class TokenMeans(Metric):
    """Means over supervised tokens of the diagnostics of `loss.evaluate`, exact over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(_COLUMNS), dtype=torch.float64)
        self.add_state("sums", default=zeros.clone(), dist_reduce_fx="sum")
        self.add_state("counts", default=zeros.clone(), dist_reduce_fx="sum")
        self.sums: Tensor
        self.counts: Tensor

    def update(self, stats: Evaluation) -> None:
        """Adds the tokens of one micro-batch; a diagnostic that was not computed adds none."""
        for i, column_of in enumerate(_COLUMNS.values()):
            if (column := column_of(stats)) is not None:
                self.sums[i] += column.sum(dtype=torch.float64)
                self.counts[i] += len(column)

    def compute(self) -> dict[str, Tensor]:
        """Means by name, for the diagnostics that saw any token."""
        means = self.sums / self.counts
        return {name: means[i].float() for i, name in enumerate(_COLUMNS) if self.counts[i] > 0}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator if the run uses one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
