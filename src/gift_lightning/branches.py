"""The gradients of two losses on the same parameters, apart from each other."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gift_lightning.controller import MixStats
from gift_lightning.head import kept_graph
from gift_lightning.skeleton import full

Reduce = Callable[[Tensor, str], Tensor]
"""`reduce(x, "sum")` over the ranks."""

ROLLOUTS, DEMONSTRATIONS = "rollouts", "demonstrations"


class BranchGradients:
    """Sums over the micro-batches of an optimizer step, on a subset of the parameters.

    Args:
        parameters: the subset; each branch takes as much memory.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._sums: dict[str, Tensor] = {}
        self._energies: dict[str, float] = {}
        self._count = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes the gradients of a micro-batch's losses, scaled so that their mean over all
        micro-batches and ranks is the step's gradient; their graphs stay."""
        for branch, loss in losses.items():
            with kept_graph():
                found = torch.autograd.grad(
                    loss, self.parameters, retain_graph=True, allow_unused=True
                )
            zipped = zip(found, self.parameters, strict=True)
            flat = torch.cat(
                [full(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in zipped]
            )
            flat = flat.detach()
            self._sums[branch] = self._sums.get(branch, 0.0) + flat
            self._energies[branch] = self._energies.get(branch, 0.0) + float(
                torch.linalg.vector_norm(flat, dtype=torch.float64).square()
            )
        self._count += 1

    def take(self, reduce: Reduce) -> tuple[dict[str, float], MixStats]:
        """What the step's micro-batches on all ranks say; the sums start anew.

        Returns:
            The norm of each branch's gradient and their cosine, and the noise of each with their
            squared distance. Between m micro-batches drawn at random, (mean ‖g‖² − ‖mean g‖²)/(m −
            1) is an unbiased estimate of the variance of the mean, and so is ‖mean g_s − mean
            g_r‖² less both variances of the distance, before it is kept at 0 or above; for m = 1
            all are NaN. Micro-batches are cut by length here, or by prompt where completions share
            it, which adds to the noise what these do to gradients.
        """
        count = int(reduce(torch.tensor(float(self._count)), "sum"))
        means, noise = {}, {ROLLOUTS: math.nan, DEMONSTRATIONS: math.nan}
        for branch in sorted(self._sums):
            mean = means[branch] = reduce(self._sums[branch], "sum").double() / count
            energy = float(reduce(torch.tensor(self._energies[branch]).double(), "sum")) / count
            if count > 1:
                noise[branch] = (energy - float(mean.square().sum())) / (count - 1)
        self._sums, self._energies, self._count = {}, {}, 0
        found = {branch: float(mean.norm()) for branch, mean in means.items()}
        distance = math.nan
        if len(means) == 2:
            a, b = means.values()
            distance = max(float((a - b).square().sum()) - sum(noise.values()), 0.0)
            if all(found.values()):
                found["cosine"] = float(a @ b) / math.prod(found.values())
        return found, MixStats(noise[ROLLOUTS], noise[DEMONSTRATIONS], distance)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, or none where the model has no list of them."""
    lists = {k: m for k, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    inner = {k for k in lists for outer in lists if k.startswith(f"{outer}.")}  # such as experts
    return list(max((m for k, m in lists.items() if k not in inner), key=len, default=[]))


def last_block(model: nn.Module) -> nn.Module:
    """The last transformer block, or the model where that trains nothing or there is none."""
    last = [model, *blocks(model)][-1]
    return last if any(p.requires_grad for p in last.parameters()) else model
