"""Tensors without data: a model's steps run as they are, and the memory that they take is counted.

Inside a `ByteCounter` floating-point tensors are torch's FakeTensors, which have a shape, a dtype
and a device but no numbers: nothing is computed and nothing is allocated. Token ids, positions and
masks are real, so that what a model decides from them (packed documents, attention masks) is
decided as in training. Numbers that are read off a tensor without data are 0, and comparisons are
false.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_SMALL = 2**20  # elements up to which what is decided from tensors without data has numbers
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)

# Whose memory is allocated, by the innermost of these modules that is at work.
_OWNERS = {
    "gift_lightning.head": "head",
    "gift_lightning.logprobs": "head",
    "transformers.cache_utils": "kv_cache",
    "gift_lightning.kvcache": "kv_cache",
}


class _OneMode(FakeTensorMode):
    """A copy of a tensor without data belongs to the same mode, and its dtype can be changed."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # A module changes the dtype only of parameters that no weak reference knows.
        self.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]

    def __deepcopy__(self, memo: Any) -> "_OneMode":
        return self


class AsAccelerator(TorchFunctionMode):
    """Code that asks takes an accelerator's way: fewer and larger operations on the same memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        asked = func == torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
        return True if asked else func(*args, **(kwargs or {}))


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it, by what they are for.

    Attributes:
        live: bytes now, by kind.
        peak: bytes by kind at the moment when their sum was largest since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kind: str | None = None
        self._fake = _OneMode()
        self._kinds: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of storages: what, and bytes

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """What is made in here is of that kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = +self.live

    def move(self, tensor: Tensor, kind: str) -> None:
        """Counts a tensor that is there already as another kind."""
        entry = self._kinds.get(tensor.untyped_storage())
        if entry is not None:
            self.live[entry[0]] -= entry[1]
            entry[0] = kind
            self.live[kind] += entry[1]

    def resize(self, tensor: Tensor, size: int) -> None:
        """Counts a tensor that is there already as `size` bytes."""
        entry = self._kinds[tensor.untyped_storage()]
        self.live[entry[0]] += size - entry[1]
        entry[1] = size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = self._run(func, args, kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x)
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._kinds:
            return
        entry: list[Any] = [self._kind or _owner(), storage.nbytes()]
        self._kinds[storage] = entry
        weakref.finalize(storage, self._drop, entry).atexit = False
        self.live[entry[0]] += entry[1]
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _drop(self, entry: list[Any]) -> None:
        self.live[entry[0]] -= entry[1]

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in given):
            return self._without_data(func, args, kwargs)
        wanted = kwargs.get("dtype")
        if (wanted is not None and wanted.is_floating_point) or not given:
            with self._fake:
                out = func(*args, **kwargs)
            if any(_is_float(x) for x in tree_leaves(out)):
                return out
        return tree_map(self._stripped, func(*args, **kwargs))

    def _without_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            return torch.ones((), dtype=args[0].dtype).item()
        if packet is _aten.is_set_to:
            return args[0].untyped_storage() is args[1].untyped_storage()
        if packet in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        with self._fake:
            out = func(*args, **kwargs)
        old = {id(x) for x in tree_leaves((args, kwargs))}
        return tree_map(lambda x: x if id(x) in old else _decided(x), out)

    def _stripped(self, x: Any) -> Any:
        return self._fake.from_tensor(x) if _is_float(x) else x


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _decided(x: Any) -> Any:
    """A small whole-number or truth-valued result, with numbers."""
    if isinstance(x, FakeTensor) and not _is_float(x) and x.numel() <= _SMALL:
        return torch.zeros(x.shape, dtype=x.dtype)
    return x


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices of which masks with numbers have become positions."""
    found: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool and type(index) is Tensor
        found += index.nonzero().unbind(1) if masks else [index]  # type: ignore[union-attr]
    return found


def _owner() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        if owner := _OWNERS.get(frame.f_globals.get("__name__", "")):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return "activations"
