"""A control for the lab: GAC whose statistics say nothing."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gift_lightning.controllers import GAC


class ShuffledGAC(GAC):
    """GAC with the coefficients of all tokens of a step permuted before they are compared.

    GAC's authors report that its proxy then says nothing about the gradients (a correlation of
    about 0 instead of 0.84).
    """

    def rows(
        self,
        logp: Float[Tensor, " n"],
        advantages: Float[Tensor, " n"],
        row: Int[Tensor, " n"],
        is_demonstration: Bool[Tensor, " b"],
    ) -> Float[Tensor, "b 3"]:
        generator = torch.Generator().manual_seed(len(logp))
        logp, advantages = (
            x.cpu()[torch.randperm(len(x), generator=generator)].to(x.device)
            for x in (logp, advantages)
        )
        return super().rows(logp, advantages, row, is_demonstration)
