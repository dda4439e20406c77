"""A model without its weights: what is left of it on every device when sharding spreads them."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

WRAPPED = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names of weights."""


def full(value: Tensor) -> Tensor:
    """All of a tensor that is sharded, which every rank must ask for; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_like(place: Tensor, value: Tensor) -> Tensor:
    """The shard of a whole tensor that belongs at a place; every rank has all of it."""
    if not isinstance(place, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(place.device), place.device_mesh, place.placements)


class Skeleton:
    """The modules of a model, whose weights can be gathered into a copy of it.

    Args:
        model: as it is before it is sharded; tied weights stay tied.
    """

    def __init__(self, model: nn.Module) -> None:
        empty = {id(p): _frozen(torch.empty_like(p, device="meta")) for p in model.parameters()}
        self._model = copy.deepcopy(model, dict(empty))

    def filled(self, model: nn.Module, device: torch.device, keep: bool) -> nn.Module:
        """A copy of the model with all its weights, one by one gathered; all ranks call it.

        Args:
            model: the sharded model.
            device: of the copy.
            keep: whether this rank wants the weights; without, they stay on the meta device.
        """
        weights = {}
        sharded = model.named_parameters()
        for (name, p), (same, mine) in zip(sharded, self._model.named_parameters(), strict=True):
            assert name.replace(WRAPPED, "") == same
            value = full(p.detach())
            alive = isinstance(p, DTensor)  # else what is gathered lasts for this call
            weights[id(mine)] = _frozen(value.to(device, copy=not alive)) if keep else mine
        filled = copy.deepcopy(self._model, weights)
        return filled.to(device) if keep else filled


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
