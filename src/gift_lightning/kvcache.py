"""A key-value cache that is written in place.

Sampling appends a token at every step, and drops the rows that have ended. transformers'
`DynamicLayer` copies all keys and values for each token, and again when rows are dropped. Here a
layer has room to grow, and a dropped row's place is taken by the last one.
"""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, length, size] as views of larger tensors.

    Args:
        limit: the largest length that is kept.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._store: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self._store is None:  # the prompts, which every one of their samples will have
            return super().update(key_states, value_states)
        rows, length, end = len(key_states), self.get_seq_length(), key_states.shape[-2]
        end += length
        if end > self._store[0].shape[-2]:
            self._make_room(end - length)
        keys, values = (x[:rows, :, :end] for x in self._store)
        keys[:, :, length:], values[:, :, length:] = key_states, value_states
        self.keys, self.values = keys, values
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.is_initialized:  # a layer that reads another's keys never is
            self._make_room(1)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)  # the inherited one would leave the larger tensors behind

    def keep(self, holes: Tensor, movers: Tensor, count: int) -> None:
        """Rows of `movers` take the places `holes`; the first `count` rows are left."""
        if self.is_initialized:
            self.keys, self.values = (_moved(x, holes, movers)[:count] for x in self._held())

    def _make_room(self, new: int) -> None:
        """A quarter more, so that each token is copied a bounded number of times."""
        length = self.get_seq_length()
        room = length + max(new, min(max(16, length // 4), self.limit - length))
        keys, values = self._held()
        self._store = _widened(keys, room), _widened(values, room)
        self.keys, self.values = (x[:, :, :length] for x in self._store)

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


def _moved(x: Tensor, holes: Tensor, movers: Tensor) -> Tensor:
    x[holes] = x[movers]
    return x


def _widened(x: Tensor, room: int) -> Tensor:
    rows, heads, length, size = x.shape
    out = x.new_empty(rows, heads, room, size)
    out[:, :, :length] = x
    return out


def roomy_cache(config: PretrainedConfig, limit: int) -> DynamicCache:
    """A cache for at most `limit` tokens of a row; layers that do not keep every token stay as
    transformers has them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(limit) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def keep(cache: DynamicCache, going: Tensor) -> Int[Tensor, " kept"]:
    """Drops the rows that are not `going` [rows], and returns which row stands where now."""
    count = int(going.sum())
    order = torch.arange(count, device=going.device)
    holes = (~going[:count]).nonzero()[:, 0]
    movers = count + going[count:].nonzero()[:, 0]
    order[holes] = movers
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(holes, movers, count)
        else:
            layer.reorder_cache(order)  # type: ignore[arg-type]
    return order
